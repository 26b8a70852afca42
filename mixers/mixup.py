"""mixup: Beyond Empirical Risk Minimization. Zhang, Cisse, Dauphin, Lopez-Paz. ICLR 2018.

https://arxiv.org/abs/1710.09412, reference code https://github.com/facebookresearch/mixup-cifar10

Formula: ``lam ~ Beta(alpha, alpha)``, ``x' = lam*x + (1-lam)*x[index]``, ``y' = lam*y + (1-lam)*y[index]``.

Published defaults: alpha = 1 on CIFAR, 0.2 on ImageNet (paper, section 3).

Sampling law: ``mixup@zhang-2018``: One lambda is drawn for the whole batch. It is not folded to max(lam, 1-lam). The
partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.

Deviations: There are none from the paper and its code. timm pairs a batch with its reverse, which needs an even batch.
Here any batch size works.

Kind: input.
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class Mixup(Mixer):
    """Blend each image with a partner. One lambda holds for the whole batch.

    ``alpha`` is the Beta parameter and must be above 0.
    """

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        ops.check_positive("alpha", alpha)
        self.alpha = alpha

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,) and a constant ``mask`` (B, 1, 1, 1)."""
        lam = ops.beta(self.alpha, self.alpha, rng)
        return {"index": ops.partners(x, rng), "mask": ops.per_sample(lam, x).view(-1, 1, 1, 1)}
