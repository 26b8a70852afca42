"""TokenMix: Rethinking Image Mixing for Data Augmentation in Vision Transformers. Liu, Liu, Zhou, Li, Liu. ECCV 2022.

https://arxiv.org/abs/2207.08409, reference code https://github.com/Sense-X/TokenMix

Formula: M is a set of cells of the token grid, a union of rectangles. The cells of M show ``x[index]``, the other cells
show ``x``. A says where an image has its content, as a share of each cell. The shares sum to 1.
``w = sum of A over the cells outside M``, ``w' = sum of A[index] over M``, ``y' = lam*y + (1-lam)*y[index]`` with
``lam = w / (w + w')``. A is the attention of the class token to the patches in the last layer, as the mean over heads.
(Swin has no class token; there it is the attention of all patches.) A is taken in a pass over the clean images in
evaluation mode and without gradient.

Published defaults: alpha = 1 for the share of cells (tables of OpenMixup). This class mixes every batch. The published
method, ``tokenmix``, does so for half of the batches and takes Mixup with alpha = 0.8 for the others.

Sampling law: ``tokenmix@mixup-recipes-1``: ``lam0 ~ Beta(alpha, alpha)``. Of N cells exactly ``round((1-lam0)*N)`` show
the partner. They are the same for the whole batch. Rectangles are drawn until no cell is left to find. A rectangle has
the area U(1, cells left), and the logarithm of its aspect ratio is U(log 0.3, -log 0.3). It is rounded to cells and
placed uniformly. It is kept if it is smaller than the grid and has between one new cell and as many as are left. After
ten refusals the cells left are drawn uniformly. The grid is that of the attention that is looked at: 14 x 14 for DeiT,
7 x 7 for PVT and Swin at 224 pixels. The partners are a uniformly random permutation of the batch. Fixed points are
allowed: an image may be its own partner.

Cost: A step takes one more forward, which makes 1.33 steps of the model itself. ``tokenmix`` does this in half of the
steps, so 1.17 are expected.

Deviations: The reference code ignores Beta: in it 112 of 196 cells show the partner. ``use_alpha=False`` takes this
share, 4/7 of any grid. After ten refusals the reference code stops short of that number. Its A are dense labels that a
large network made offline, or none for a class that these labels miss. Its two label weights do not sum to 1. It takes
half of the label smoothing from each of the two; here the smoothing is in proportion. Here A is the model's own
attention, as in OpenMixup. With ``teacher`` it is the attention of a trained transformer. OpenMixup looks with drop
path on. It weighs each image by the cells where the image is hidden, by weights that do not sum to 1, and averages
these weights over the batch. It adds 14 of 196 cells to every count, rounds the count down, and stops short as the
reference code does. The reference code pairs a batch with its reverse and takes the binary cross-entropy. Here the loss
is the recipe's.

Kind: input, label.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from . import ops, taps
from .base import Mixer, Plan
from .compose import Switch
from .registry import build

ATTEMPTS = 10
OFFICIAL_SHARE = 112 / 196
LOG_ASPECT = math.log(1 / 0.3)


class TokenMix(Mixer):
    """Paste blocks of the partner's tokens. The labels go by how much of each image's content shows.

    ``alpha`` is the Beta parameter of the share of cells and must be above 0. With ``use_alpha=False`` the share is the
    constant of the reference code. ``teacher`` is the timm name or the folder of a trained transformer that says where
    the content is, for images of the size and normalisation of the run. If it is None, the model itself says so.
    """

    def __init__(self, alpha: float = 1.0, use_alpha: bool = True, teacher: str | None = None):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_choice("use_alpha", use_alpha, (False, True))
        if teacher is not None and not (isinstance(teacher, str) and teacher):
            raise ValueError(f"teacher must be the name of timm weights or a folder, or None, got {teacher!r}")
        self.alpha = alpha
        self.use_alpha = use_alpha
        self.teacher = teacher

    def setup(self, model: nn.Module) -> None:
        """Load the teacher. Raises ``ValueError`` when it, or without it the model, has no attention to look at."""
        self.frozen = taps.Frozen(self.teacher) if self.teacher else None
        taps.attention_layers(self.frozen.model if self.frozen else model)

    def plan(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
        model: nn.Module,
        *look: object,
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 0 in the partner's cells, ``lam`` (B,) by content."""
        content = self.content(model, x)
        height, width = content.shape[1:]
        share = 1 - ops.beta(self.alpha, self.alpha, rng) if self.use_alpha else OFFICIAL_SHARE
        pasted = blocks(height, width, round(share * height * width), rng)
        index = ops.partners(x, rng)
        cells = ops.send(1.0 - pasted, x)
        own, partner = (content * cells).sum((1, 2)), (content[index] * (1 - cells)).sum((1, 2))
        both = own + partner  # 0 if all that shows is weightless; then, as with even content, by area
        lam = torch.where(both > 0, own / both, 1 - pasted.mean())
        return {"index": index, "mask": ops.to_pixels(cells[None, None], x).expand(len(x), -1, -1, -1), "lam": lam}

    def content(self, model: nn.Module, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w"]:
        """Shares of an image's content by cell, summing to 1."""
        seer = self.frozen.model if self.frozen else model
        with taps.looking(seer), taps.attention(seer) as look:
            seer(x)
        return look.of_class_token() if look.has_class_token else look.of_patches()


def tokenmix(
    mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0, use_alpha: bool = True, teacher: str | None = None
) -> Switch:
    """Make the rows of the tables: Mixup or blocks of tokens, with probability one half each.

    ``cutmix_alpha`` is the Beta parameter of the share of tokens. The reference code ignores it (``use_alpha=False``).
    """
    return Switch([build("mixup", alpha=mixup_alpha), TokenMix(cutmix_alpha, use_alpha, teacher)])


def blocks(height: int, width: int, count: int, rng: np.random.Generator) -> Bool[np.ndarray, "{height} {width}"]:
    """Exactly ``count`` cells of a grid, mostly in a union of rectangles."""
    found = np.zeros((height, width), dtype=bool)
    while missing := count - int(found.sum()):
        for _ in range(ATTEMPTS):
            area, aspect = rng.uniform(1, missing), math.exp(rng.uniform(-LOG_ASPECT, LOG_ASPECT))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
                rectangle = found[top : top + rows, left : left + columns]
                if 0 < rectangle.size - rectangle.sum() <= missing:
                    rectangle[:] = True
                    break
        else:
            found.flat[rng.choice(np.flatnonzero(~found), missing, replace=False)] = True
    return found
