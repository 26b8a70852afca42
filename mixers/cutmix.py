"""CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features. Yun et al. ICCV 2019.

https://arxiv.org/abs/1905.04899, reference code https://github.com/clovaai/CutMix-PyTorch

Formula: ``lam0 ~ Beta(alpha, alpha)``; a box of height ``floor(H*sqrt(1-lam0))`` and width
``floor(W*sqrt(1-lam0))`` with a uniform centre on the pixel grid, clipped at the border, is pasted from
``x[index]``; ``lam = 1 - area(box)/(H*W)`` after clipping.

Published defaults: alpha = 1 (paper, section 4.1).

Sampling law: ``cutmix@clova-2019``: one box for the whole batch; half sizes are rounded down, so a box that
is not clipped has an even height and width; lambda from the exact clipped area, hence E[lam] = 0.683 at
alpha = 1 and 0.703 at alpha = 0.2 for 224 x 224; the partner is a uniformly random permutation of the
batch, fixed points allowed.

Deviations: applied to every batch, as in the paper's ImageNet runs; its CIFAR runs apply it to every second one (use
``Switch`` with ``Vanilla`` for that). timm 1.0.31 rounds the far corner up, which is another law. OpenMixup redraws the
partners up to ten times until no image is its own, since March 2025 (commit 9fc838b); its tables are older, and made
with plain permutations, as here.

Kind: input.
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class CutMix(Mixer):
    """Paste one box of the partner, the same box for the whole batch. ``alpha`` > 0 is the Beta parameter."""

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        ops.check_positive("alpha", alpha)
        self.alpha = alpha

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 0 inside the box, ``lam`` (B,) its exact mean."""
        height, width = x.shape[-2:]
        top, bottom, left, right = ops.clipped_box(height, width, ops.beta(self.alpha, self.alpha, rng), rng)
        lam = 1 - (bottom - top) * (right - left) / (height * width)
        return {
            "index": ops.partners(x, rng),
            "mask": ops.box_mask(top, bottom, left, right, x),
            "lam": ops.per_sample(lam, x),
        }
