"""GMix. A Unified Analysis of Mixed Sample Data Augmentation: A Loss Function Perspective. Park, Yun, Chun.
NeurIPS 2022.

https://arxiv.org/abs/2208.09913, reference code https://github.com/naver-ai/hmix-gmix

GMix is the paper's CutMix by a Gaussian in place of a box. The paper's other method is HMix.

Formula: ``lam ~ Beta(alpha, alpha)``, ``s = min(lam, 1-lam)`` and ``G(i, j) = exp(-pi*((i-r)^2 + (j-c)^2) / (s*H*W))``.
The centre (r, c) is uniform on the pixel grid. On an endless image G would cover the share s. The image with the
smaller share shows inside G. The mask is 1 where the sample itself stays: it is G where ``lam < 0.5``, else ``1 - G``.
``x' = mask*x + (1-mask)*x[index]``. The label share of the sample itself is the mask's mean.

Published defaults: alpha = 1 (reference code, as of timm's Mixup).

Sampling law: ``gmix@park-2022``: One lambda and one Gaussian are drawn for the whole batch. What lies beyond the border
is lost, so the smaller share is smaller than it was drawn. At alpha = 1 it is 0.17 in the mean in place of 0.25. The
partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.

Cost: The cost is that of CutMix.

Deviations: The reference code takes the height for both sides, so it takes square images only. Here ``H*W`` stands in
place of its ``H*H``, which keeps the Gaussian a circle in pixels. A share of exactly 0 leaves the other image as it is.
In the reference code 0 gives no number at the centre. The reference code pairs a batch with its reverse, which needs an
even batch. It has a probability of mixing, 1 by default, and a switch to Mixup. Here ``Switch`` does both. Only the
abstract and captions of the paper were read for this file. The formula is that of the code.

Kind: input.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class GMix(Mixer):
    """Show the image with the smaller share inside one Gaussian blob. The whole batch has the same blob.

    ``alpha`` is the Beta parameter and must be above 0.
    """

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        ops.check_positive("alpha", alpha)
        self.alpha = alpha

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W), ``lam`` (B,) its mean."""
        height, width = x.shape[-2:]
        lam = ops.beta(self.alpha, self.alpha, rng)
        area = min(lam, 1 - lam) * height * width
        rows, columns = bell(height, area, rng), bell(width, area, rng)
        blob, share = torch.outer(ops.send(rows, x), ops.send(columns, x)), rows.mean() * columns.mean()
        mask, stays = (blob, share) if lam < 0.5 else (1 - blob, 1 - share)
        return {
            "index": ops.partners(x, rng),
            "mask": mask.expand(len(x), 1, -1, -1),
            "lam": ops.per_sample(stays, x),
        }


def bell(length: int, area: float, rng: np.random.Generator) -> np.ndarray:
    """One axis of the Gaussian that covers ``area`` pixels, ``(length,)``, 1 at its centre; 0 where it covers none."""
    centre = rng.integers(length)
    if area == 0:
        return np.zeros(length)
    return np.exp(-math.pi * (np.arange(length) - centre) ** 2 / area)
