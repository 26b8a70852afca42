"""C-Mixup: Improving Generalization in Regression. Yao, Wang, Zhang, Zou, Finn. NeurIPS 2022.

https://arxiv.org/abs/2210.05775, reference code https://github.com/huaxiuyao/C-Mixup

Formula: The partner j of sample i is drawn with a probability in proportion to
``exp(-|y_i - y_j|^2 / (2*bandwidth^2))``, over all samples of the batch, i itself among them.
``lam ~ Beta(alpha, alpha)``, ``x' = lam*x + (1-lam)*x[index]``, ``y' = lam*y + (1-lam)*y[index]``. Targets are values,
such as an age or a pose, and not shares of classes.

Published defaults: alpha = 2 (the code; 1.5 for one of the time series, 0.2 for video). The bandwidth is in the unit of
the targets and is chosen for each data set. In the code's commands it is 0.05 to 50, with 0.2 for RCF-MNIST and 0.5 for
PovertyMap, its sets of images. The default of its command line is 1.

Sampling law: ``cmixup@yao-2022``: One lambda is drawn for the whole batch. It is not folded. Each sample draws its
partner by itself, with replacement, so one image may be the partner of many. Weights are rounded to multiples of 2**-24
of the sample's own, so a partner whose weight is below 2**-25 is never drawn.

Cost: A step takes the distances of all pairs of a batch, on its device. These are B x B numbers, next to nothing for
batches up to thousands.

Deviations: Partners come from the batch. The paper's algorithm draws them from the whole training set, by a matrix of
all pairs that its code computes ahead of time. A mixer sees one batch. The code has a form for batches too
(``batch_type`` 1, for RCF-MNIST): it joins the batch and a second one that is drawn at random, and draws from both.
Here one batch is all, so no image is loaded that is not trained on. PovertyMap's loop draws a lambda for each sample.
The other loops draw one for a batch, as here. The code has an option to mix hidden features, which is on for some of
its data sets. It is not offered here.

Kind: input.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import ops
from .base import Mixer, Plan

STEPS = 24
"""Bits of the whole numbers that stand for probabilities, as many as a float32 has."""


class CMixup(Mixer):
    """Mix images of near values as Mixup does, for regression.

    ``alpha`` is the Beta parameter and must be above 0. ``bandwidth``, above 0, is the width of the kernel in the unit
    of the targets. Values that are several times as far apart are not mixed.
    """

    regression = True

    def __init__(self, alpha: float = 2.0, bandwidth: float = 1.0):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_positive("bandwidth", bandwidth)
        self.alpha, self.bandwidth = alpha, bandwidth

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), drawn by the distance of the targets, and a constant ``mask`` (B, 1, 1, 1)."""
        lam = ops.beta(self.alpha, self.alpha, rng)
        return {"index": self.near(y, rng), "mask": ops.per_sample(lam, x).view(-1, 1, 1, 1)}

    def near(self, y: Float[Tensor, "B K"], rng: np.random.Generator) -> Int[Tensor, " B"]:
        """A partner for each sample, by the kernel of the distance between their targets."""
        values = y.detach().to(torch.promote_types(y.dtype, torch.float32)) / self.bandwidth
        apart = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
        # Whole numbers, whose sum does not depend on the order in which a device adds: a GPU draws the same each time.
        near = torch.exp(-(apart**2) / 2).nan_to_num(0).fill_diagonal_(1)  # a missing value mixes with itself alone
        weights = (near * 2**STEPS).round().long()
        ends = weights.cumsum(1)
        spots = ops.send(rng.integers(2**STEPS, size=len(y)), y)[:, None] * ends[:, -1:] >> STEPS
        return torch.searchsorted(ends, spots, right=True)[:, 0]
