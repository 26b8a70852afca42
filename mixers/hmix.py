"""A Unified Analysis of Mixed Sample Data Augmentation: A Loss Function Perspective. Park, Yun, Chun. NeurIPS 2022.

https://arxiv.org/abs/2208.09913, reference code https://github.com/naver-ai/hmix-gmix

HMix is the paper's hybrid of Mixup and CutMix; its other method is GMix.

Formula: ``lam ~ Beta(alpha, alpha)``; a box of height ``floor(H*sqrt(r*(1-lam)))`` and width
``floor(W*sqrt(r*(1-lam)))`` with a uniform centre on the pixel grid, clipped at the border, is pasted from
``x[index]``. Outside of it ``x' = m*x + (1-m)*x[index]`` with ``m = lam / (1 - area(box)/(H*W))``, so that the sample
itself has the share lam of the pixels, whatever was clipped; ``y' = lam*y + (1-lam)*y[index]``. r = 0 is Mixup.

Published defaults: alpha = 1 (reference code, as of timm's Mixup), r = 0.5 (the paper's examples and the authors'
notebook). The reference code has r = 1 where nothing is said, and does not say which r made the published numbers.

Sampling law: ``hmix@park-2022``: one lambda and one box for the whole batch; half sizes are rounded down, so a box that
is not clipped has an even height and width; the partner is a uniformly random permutation of the batch, fixed points
allowed.

Cost: that of Mixup.

Deviations: the reference code pairs a batch with its reverse, which needs an even batch. It has a probability of
mixing, 1 by default, and a switch to Mixup; here ``Switch`` does both. r = 1 is no CutMix, there or here:
where the box was clipped, the label stays as it was drawn and the rest is blended. Of the paper only the abstract
and captions were read for this file; the formula is that of the code.

Kind: input.
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class HMix(Mixer):
    """Paste one box of the partner and blend what is around it, the same for the whole batch.

    ``alpha`` > 0 is the Beta parameter; ``r`` in [0, 1]: the box's part of the partner's share.
    """

    def __init__(self, alpha: float = 1.0, r: float = 0.5):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_between("r", r, 0.0, 1.0)
        self.alpha = alpha
        self.r = r

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W), 0 inside the box and one number outside, ``lam`` (B,) as drawn."""
        height, width = x.shape[-2:]
        lam = ops.beta(self.alpha, self.alpha, rng)
        top, bottom, left, right = ops.clipped_box(height, width, 1 - self.r * (1 - lam), rng)
        around = 1 - (bottom - top) * (right - left) / (height * width)
        blended = lam / around if around else 0.0  # a box that covers the image leaves nothing to blend
        box = ops.box_mask(top, bottom, left, right, x)[:1]
        return {
            "index": ops.partners(x, rng),
            "mask": (blended * box).expand(len(x), -1, -1, -1),
            "lam": ops.per_sample(lam, x),
        }
