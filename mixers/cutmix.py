"""CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features. Yun et al. ICCV 2019.

https://arxiv.org/abs/1905.04899, reference code https://github.com/clovaai/CutMix-PyTorch

Formula: ``lam0 ~ Beta(alpha, alpha)``. A box has the height ``floor(H*sqrt(1-lam0))`` and the width
``floor(W*sqrt(1-lam0))``. Its centre is uniform on the pixel grid, and it is clipped at the border. The box is pasted
from ``x[index]``. After clipping, ``lam = 1 - area(box)/(H*W)``.

Published defaults: alpha = 1 (paper, section 4.1).

Sampling law: ``cutmix@clova-2019``: One box is drawn for the whole batch. Half sizes are rounded down, so a box that is
not clipped has an even height and width. Lambda is computed from the exact clipped area. Hence E[lam] = 0.683 at
alpha = 1 and 0.703 at alpha = 0.2 for images of 224 x 224. The partners are a uniformly random permutation of the
batch. Fixed points are allowed: an image may be its own partner.

Deviations: CutMix is applied to every batch, as in the paper's ImageNet runs. The paper's CIFAR runs apply it to every
second batch; use ``Switch`` with ``Vanilla`` for that. timm 1.0.31 rounds the far corner up, which is another law.
Since March 2025 (commit 9fc838b) OpenMixup redraws the partners up to ten times, until no image is its own partner. Its
tables are older. They were made with plain permutations, as here.

Kind: input.
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class CutMix(Mixer):
    """Paste one box of the partner. The whole batch has the same box.

    ``alpha`` is the Beta parameter and must be above 0.
    """

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
