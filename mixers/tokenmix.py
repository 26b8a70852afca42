"""TokenMix: Rethinking Image Mixing for Data Augmentation in Vision Transformers. Liu, Liu, Zhou, Li, Liu. ECCV 2022.

https://arxiv.org/abs/2207.08409, reference code https://github.com/Sense-X/TokenMix

Formula: a set M of cells of the token grid, a union of rectangles, shows ``x[index]``, the other cells show ``x``. A is
where an image has its content, a share of each cell that sums to 1: ``w = sum of A over the cells outside M``,
``w' = sum of A[index] over M``, ``y' = lam*y + (1-lam)*y[index]`` with ``lam = w / (w + w')``.
A is the attention, in the last layer, of the class token to the patches (of all patches in Swin, which has none), mean
over heads, in a pass over the clean images in evaluation mode and without gradient.

Published defaults: alpha = 1 for the share of cells (tables of OpenMixup). This class mixes every batch; the published
method, ``tokenmix``, does so for half of them and takes Mixup with alpha = 0.8 for the others.

Sampling law: ``tokenmix@mixup-recipes-1``: ``lam0 ~ Beta(alpha, alpha)``; of N cells exactly ``round((1-lam0)*N)`` show
the partner, the same for the whole batch. Until no cell is left to find: a rectangle with area U(1, cells left) and
the logarithm of its aspect ratio U(log 0.3, -log 0.3), rounded to cells, is placed uniformly, and kept if it is smaller
than the grid and has between one new cell and as many as are left; after ten refusals the cells left are drawn
uniformly. The grid is that of the attention looked at: 14 x 14 for DeiT, 7 x 7 for PVT and Swin at 224 pixels. The
partner is a uniformly random permutation of the batch, fixed points allowed.

Cost: one more forward, 1.33 steps of the model itself (half of the steps in ``tokenmix``, 1.17 expected).

Deviations: the reference code ignores Beta: 112 of 196 cells show the partner, 4/7 of any grid with
``use_alpha=False``; after ten refusals it stops short of that. Its A are dense labels that a large network made
offline, or none for a class that they miss, and its two label weights do not sum to 1; it takes half of the label
smoothing from each of them, here it is in proportion. Here A is the model's own attention, as in OpenMixup, or with
``teacher`` that of a trained transformer. OpenMixup looks with drop path on, weighs each image by the cells where it is
hidden, by weights that do not sum to 1, and averages them over the batch; it adds 14 of 196 cells to every count,
rounds it down, and stops short as the reference code does. The reference code pairs a batch with its reverse and takes
the binary cross-entropy; here the loss is the recipe's.

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
    """Paste blocks of the partner's tokens; labels by how much of each image's content shows.

    ``alpha`` > 0 is the Beta parameter of the share of cells; with ``use_alpha=False`` it is the constant of the
    reference code. ``teacher``: timm name or folder of a trained transformer that says where the content is, for images
    of the size and normalisation of the run; None: the model itself.
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
    """The rows of the tables: Mixup or blocks of tokens with probability one half each.

    ``cutmix_alpha``: the Beta parameter of the share of tokens, which the reference code ignores (``use_alpha=False``).
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
