"""SmoothMix: A Simple Yet Effective Data Augmentation to Train Robust Classifiers. Lee et al. CVPR Workshops 2020.

https://openaccess.thecvf.com/content_CVPRW_2020/html/w45/Lee_SmoothMix_A_Simple_Yet_Effective_Data_Augmentation_to_Train_Robust_CVPRW_2020_paper.html

Formula: ``G(i, j) = exp(-((i-r)^2 + (j-c)^2) / (2*s^2))`` is a Gaussian whose centre and spread are random.
``x' = (1-G)*x + G*x[index]``, ``lam = 1 - mean(G)``.

Published defaults: There are none. OpenMixup's tables print alpha = 0.2. OpenMixup's code draws from this alpha and
then overwrites what it drew.

Sampling law: ``smoothmix@openmixup-2022``: One Gaussian is drawn for the whole batch. Its centre is the middle of the
image plus uniform integers in [-H/2, H/2) and [-W/2, W/2). For an odd side the centre is one of its pixels. The spread
is ``s = sqrt(H*W) * U(0.25, 0.5)``, so the Gaussian is a circle in pixels for every shape of image. (OpenMixup takes
square images only, with s in units of H.) Hence E[mean(G)] = 0.43, and 90 % of the draws lie in 0.225 to 0.642. The
partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.

Deviations: OpenMixup gives the image with the pixel share ``1-mean(G)`` the label share ``mean(G)``, so it swaps the
labels of the pair. It does so in all public versions, and probably in the one that made its table. Here the labels
follow the pixels, as in the paper. ``swapped_label=True`` swaps the labels as OpenMixup does. ``alpha`` has no effect
there or here.

Kind: input.
"""

import math

import numpy as np
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class SmoothMix(Mixer):
    """Fade to the partner inside one Gaussian blob. The whole batch has the same blob.

    ``alpha`` is accepted because the published settings carry it. It has no effect. ``swapped_label`` gives each image
    the label share of its partner, as OpenMixup does.
    """

    def __init__(self, alpha: float | None = None, swapped_label: bool = False):
        super().__init__()
        if alpha is not None:
            ops.check_positive("alpha", alpha)
        ops.check_choice("swapped_label", swapped_label, (False, True))
        self.alpha = alpha
        self.swapped_label = swapped_label

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W), and ``lam`` (B,), its mean unless the labels are swapped."""
        height, width = x.shape[-2:]
        spread = math.sqrt(height * width) * rng.uniform(0.25, 0.5)
        rows, columns = bell(height, spread, rng), bell(width, spread, rng)
        share = rows.mean() * columns.mean()
        return {
            "index": ops.partners(x, rng),
            "mask": ops.product_mask(rows, columns, x),
            "lam": ops.per_sample(share if self.swapped_label else 1 - share, x),
        }


def bell(length: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Return one axis of the Gaussian, ``(length,)``, with 1 at its centre.

    In two dimensions the Gaussian is the product of its axes.
    """
    centre = (length - 1) / 2 + rng.integers(-(length // 2), length - length // 2)
    return np.exp(-((np.arange(length) - centre) ** 2) / (2 * spread**2))
