"""GridMixup: mixing by a grid of holes. Dobrynin. 2020, code only, https://github.com/IlyaDobrynin/GridMixup

OpenMixup's tables call it GridMix. There is another method of that name: GridMix: Strong regularization through local
context mapping, Baek et al. Pattern Recognition 2021,
https://www.sciencedirect.com/science/article/pii/S0031320320303976. That method has a loss for each grid cell and has
no public code.

Formula: A crop with a random area, shape and place is cut into ``n`` patches across, and into as many patches of its
height as fit. Every patch has a hole in its upper left corner. The hole covers ``sqrt(1-lam0)`` of each side of the
patch, with ``lam0 ~ Beta(alpha, alpha)``, and shows ``x[index]``. ``lam = 1 - (pixels in holes)/(H*W)``.

Published defaults: alpha = 0.2 in OpenMixup's tables. n is 2 to 6, and patches are square. The area of the crop is 0.5
to 1 of the image, and its height over its width is 0.5 to 2.

Sampling law: ``gridmix@gridmixup-2020``: One grid is drawn for the whole batch. A hole has at least one pixel and
leaves at least one pixel of its patch. The crop may be larger than the image. Then it starts at a negative pixel, and
python's slices count such a pixel backwards from the end. The part of a hole that lies before the border therefore
comes back at the far side or vanishes. This happens in 56 % of the draws at 224 x 224. There E[lam] = 0.69 at alpha =
0.2. The partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own
partner.

Deviations: OpenMixup takes square images only. It draws the aspect of the holes from a range, and it refuses images
narrower than 2n. Here the aspect is one number, and images of any size work. A patch of one pixel has no hole. With
``clip=True`` the crop is cut to the image, and then E[lam] is 0.66.

Kind: input.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class GridMix(Mixer):
    """Show the partner through a grid of holes. The whole batch has the same grid.

    ``alpha`` is the Beta parameter and must be above 0. ``n_holes`` gives the least and the largest number of holes
    across the crop. ``hole_aspect_ratio`` is the height over the width of a patch. ``cut_area_ratio`` is the range of
    the crop's share of the image, and ``cut_aspect_ratio`` is the range of its height over its width. ``clip`` keeps
    the crop inside the image, which is not the published law.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        n_holes: Sequence[int] = (2, 6),
        hole_aspect_ratio: float = 1.0,
        cut_area_ratio: Sequence[float] = (0.5, 1.0),
        cut_aspect_ratio: Sequence[float] = (0.5, 2.0),
        clip: bool = False,
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_interval("n_holes", n_holes, 1.0, whole=True)
        ops.check_positive("hole_aspect_ratio", hole_aspect_ratio)
        ops.check_interval("cut_area_ratio", cut_area_ratio, 0.0, 1.0)
        ops.check_interval("cut_aspect_ratio", cut_aspect_ratio, 0.01, 100.0)
        ops.check_choice("clip", clip, (False, True))
        self.alpha = alpha
        self.n_holes = n_holes
        self.hole_aspect_ratio = hole_aspect_ratio
        self.cut_area_ratio = cut_area_ratio
        self.cut_aspect_ratio = cut_aspect_ratio
        self.clip = clip

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 0 in the holes, ``lam`` (B,) its exact mean."""
        height, width = x.shape[-2:]
        rows, columns = self.grid(height, width, rng)
        lam = 1 - rows.mean() * columns.mean()
        return {
            "index": ops.partners(x, rng),
            "mask": ops.product_mask(rows, columns, x),
            "lam": ops.per_sample(lam, x),
        }

    def grid(self, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``(H,)`` and columns ``(W,)`` with holes, 1 or 0; the holes are where such a row and column cross."""
        side = math.sqrt(1 - ops.beta(self.alpha, self.alpha, rng))
        across = int(rng.integers(self.n_holes[0], self.n_holes[1] + 1))
        area = int(height * width * rng.uniform(self.cut_area_ratio[0], self.cut_area_ratio[1]))
        aspect = rng.uniform(self.cut_aspect_ratio[0], self.cut_aspect_ratio[1])
        crop_width = int(math.sqrt(area / aspect))
        crop_height = int(crop_width * aspect)
        if self.clip:
            crop_width, crop_height = min(crop_width, width), min(crop_height, height)
        left, top = int((width - crop_width) * rng.random()), int((height - crop_height) * rng.random())
        patch_width = max(1, math.ceil(crop_width / across))
        patch_height = max(1, int(patch_width * self.hole_aspect_ratio))
        return (
            comb(height, top, top + crop_height, patch_height, side),
            comb(width, left, left + crop_width, patch_width, side),
        )


def comb(length: int, start: int, end: int, pitch: int, side: float) -> np.ndarray:
    """A line ``(length,)``: 1 in the first ``side`` of every ``pitch`` pixels from ``start`` to ``end``, 0 elsewhere.

    ``start`` may be negative and ``end`` beyond the line: the published law is python's. A range [p, q) with
    p < 0 covers [length+p, length+q) if q < 0 too, and else [length+p, q), which is nearly always empty; a
    range is cut at the line's end.
    """
    line = np.zeros(length)
    hole = min(max(int(pitch * side), 1), pitch - 1)
    for first in range(start, end, pitch):
        line[first : min(first + hole, end)] = 1
    return line
