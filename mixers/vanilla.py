"""No mixing. This is the baseline row of every published table.

Formula: ``x' = x``, ``y' = y``.

Sampling law: ``vanilla@1``: nothing is drawn.

Deviations: none.

Kind: none.
"""

import numpy as np
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class Vanilla(Mixer):
    """Train on the batch as it is."""

    def plan(self, x: Tensor, y: Tensor, rng: np.random.Generator, *look: object) -> Plan:
        """Nothing to decide."""
        return {}

    def mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The batch itself: nothing is written, so nothing is copied."""
        ops.check_batch(x, y)
        return x, y
