"""HMix. A Unified Analysis of Mixed Sample Data Augmentation: A Loss Function Perspective. Park, Yun, Chun.
NeurIPS 2022.

https://arxiv.org/abs/2208.09913, reference code https://github.com/naver-ai/hmix-gmix

HMix is the paper's hybrid of Mixup and CutMix. The paper's other method is GMix.

Formula: ``lam ~ Beta(alpha, alpha)``. A box has the height ``floor(H*sqrt(r*(1-lam)))`` and the width
``floor(W*sqrt(r*(1-lam)))``. Its centre is uniform on the pixel grid, and it is clipped at the border. The box is
pasted from ``x[index]``. Outside of it ``x' = m*x + (1-m)*x[index]`` with ``m = lam / (1 - area(box)/(H*W))``. So the
sample itself has the share lam of the pixels, whatever was clipped. ``y' = lam*y + (1-lam)*y[index]``. With r = 0 it is
Mixup.

Published defaults: alpha = 1 (reference code, as of timm's Mixup), r = 0.5 (the paper's examples and the authors'
notebook). The reference code has r = 1 where nothing is said. It does not say which r made the published numbers.

Sampling law: ``hmix@park-2022``: One lambda and one box are drawn for the whole batch. Half sizes are rounded down, so
a box that is not clipped has an even height and width. The partners are a uniformly random permutation of the batch.
Fixed points are allowed: an image may be its own partner.

Cost: The cost is that of Mixup.

Deviations: The reference code pairs a batch with its reverse, which needs an even batch. It has a probability of
mixing, 1 by default, and a switch to Mixup. Here ``Switch`` does both. With r = 1 it is not CutMix, there or here:
where the box was clipped, the label stays as it was drawn and the rest is blended. Only the abstract and captions of
the paper were read for this file. The formula is that of the code.

Kind: input.
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class HMix(Mixer):
    """Paste one box of the partner and blend what is around it. The whole batch has the same box.

    ``alpha`` is the Beta parameter and must be above 0. ``r``, in [0, 1], is the box's part of the partner's share.
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
