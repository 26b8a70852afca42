"""SaliencyMix: A Saliency Guided Data Augmentation Strategy for Better Regularization. Uddin et al. ICLR 2021.

https://arxiv.org/abs/2006.01791, reference code https://github.com/SaliencyMix/SaliencyMix

Formula: This is CutMix with another place for the box. The box has the height ``floor(H*sqrt(1-lam0))`` and the width
``floor(W*sqrt(1-lam0))``, with ``lam0 ~ Beta(alpha, alpha)``. It is centred on the most salient pixel of ``x[index]``
and then clipped at the border. ``lam = 1 - area(box)/(H*W)``. Saliency is fine-grained static saliency (Montabone and
Soto, 2010), as in OpenCV.

Published defaults: alpha = 1 (paper, section 4).

Sampling law: ``saliencymix@mixup-recipes-1``: Half sides of the box are rounded down. Every sample has its own box
around the most salient pixel of its partner. Among equal pixels the first in reading order is taken. In an image
without any contrast the middle is taken. The partners are a uniformly random permutation of the batch. Fixed points are
allowed: an image may be its own partner.

Deviations: The published code hands normalised float images to a detector that reads bytes, so its map has nothing to
do with the image. It also takes the centre from the first partner alone and pastes one box for the whole batch.
``box_from="first"`` does the same with a detector that works. ``box_from="noise"`` is what the published code does in
effect: It draws one centre, in a uniform column and in a row near the top. The row is near the top because the map has
many equal maxima, of which the first in reading order wins. Here the row is Exp(18 pixels) modulo H. (With OpenCV 5.0.0
on 400 float photos of each size the mean row was 16 of 224, 18 of 160, 18 of 64 and 12 of 32. This law gives 18, 18, 16
and 11.) The detector here takes RGB for RGB. It also leaves out an overflow that turns OpenCV's strongest pixels dark.

Kind: input.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from . import ops
from .base import Mixer, Plan

LUMA = (0.299, 0.587, 0.114)
# Half sides of the windows that a pixel is compared with, in pixels.
WINDOWS = (12, 24, 48, 28, 56, 112)


class SaliencyMix(Mixer):
    """Paste a box around the partner's most salient pixel.

    ``alpha`` is the Beta parameter and must be above 0. ``box_from`` says what the box is placed by: ``"each"``
    partner, the ``"first"`` partner for the whole batch, or ``"noise"`` near the top for the whole batch. ``mean`` and
    ``std`` are those that the images were normalised with.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        box_from: str = "each",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_choice("box_from", box_from, ("each", "first", "noise"))
        ops.check_rgb("mean", mean)
        ops.check_rgb("std", std, 1e-6)
        self.alpha = alpha
        self.box_from = box_from
        self.mean = mean
        self.std = std

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 0 inside the box, ``lam`` (B,) its exact mean."""
        if x.shape[1] != 3:
            raise ValueError(f"SaliencyMix needs RGB images (B, 3, H, W), got {tuple(x.shape)}")
        height, width = x.shape[-2:]
        half = ops.send(np.array(ops.half_sides(height, width, ops.beta(self.alpha, self.alpha, rng))), x)
        if self.box_from == "noise":
            row, column = int(rng.exponential(18) % height), int(rng.integers(width))
            index = ops.partners(x, rng)
            centre = ops.send(np.array([[row, column]]), x)
        else:
            index = ops.partners(x, rng)
            centre = self.salient_pixel(x[index[:1]]) if self.box_from == "first" else self.salient_pixel(x)[index]
        rows, height_of_box = inside(height, centre[:, 0], half[0])
        columns, width_of_box = inside(width, centre[:, 1], half[1])
        mask = 1 - rows[:, None, :, None] * columns[:, None, None, :]
        lam = 1 - height_of_box * width_of_box / (height * width)
        return {"index": index, "mask": mask.expand(len(x), -1, -1, -1), "lam": lam.expand(len(x))}

    def salient_pixel(self, x: Float[Tensor, "n C H W"]) -> Int[Tensor, "n 2"]:
        """Row and column of the most salient pixel of each image; on a CPU a few images at a time, to stay in cache."""
        height, width = x.shape[-2:]
        some = max(1, ops.CPU_CHUNK // (2 * height * width)) if x.device.type == "cpu" else len(x)
        areas, found = window_areas(x), []
        for part in x.detach().split(some):
            saliency = fine_grained_saliency(self.grey(part), areas)
            peaks = saliency.amax(2)  # argmax gives the first of equals: the first such row, and in it the first column
            row = peaks.argmax(1)
            column = saliency.take_along_dim(row[:, None, None], 1)[:, 0].argmax(1)
            place = torch.stack([row, column], 1)
            middle = torch.tensor([[height // 2, width // 2]]).to(place, non_blocking=True)
            found.append(torch.where(peaks.amax(1, keepdim=True) > 0, place, middle))
        return torch.cat(found)

    def grey(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n H W"]:
        """The luma of normalised RGB images, rounded to 0 ... 255, in float32."""
        red, green, blue = x.float().unbind(1)
        scale = [255 * weight * std for weight, std in zip(LUMA, self.std, strict=True)]
        offset = 255 * sum(weight * mean for weight, mean in zip(LUMA, self.mean, strict=True))
        grey = (red * scale[0]).add_(green, alpha=scale[1]).add_(blue, alpha=scale[2])
        return grey.add_(offset).clamp_(0, 255).round_()


def fine_grained_saliency(
    grey: Float[Tensor, "n H W"], areas: Float[Tensor, "w H W"] | None = None
) -> Float[Tensor, "n H W"]:
    """Fine-grained static saliency, 0 ... 510, of grey images 0 ... 255 with at least 2 pixels a side.

    How much brighter, and how much darker, a pixel is than the mean of the rest of six windows around it, summed over
    the windows, each scaled to 0 ... 255 per image and added: on-centre and off-centre cells. Montabone and Soto. Human
    detection using a mobile platform and novel features derived from a visual saliency mechanism. Image and Vision
    Computing, 2010. ``areas`` are those of ``window_areas``. Time on a CPU is memory traffic, hence work in place.
    """
    areas = window_areas(grey) if areas is None else areas
    height, width = grey.shape[-2:]
    grey = blur(blur(grey))
    # Sums of windows are differences of an integral image; float32 holds its integers up to 2**24. A window ends at the
    # image's border: before it the integral is 0, behind it that of the border.
    exact = torch.float32 if 255 * height * width < 2**24 else torch.float64
    down, right = (min(max(WINDOWS), side) for side in (height, width))
    integral = grey.new_empty(len(grey), height, width + 2 * right, dtype=exact)
    integral[:, :, :right] = 0
    torch.cumsum(grey.to(exact).cumsum(2), 1, out=integral[:, :, right : right + width])
    integral[:, :, right + width :] = integral[:, :, right + width - 1, None]
    strips = grey.new_empty(len(grey), height + 2 * down, width, dtype=exact)
    strips[:, :down] = 0
    on, difference, cells = torch.zeros_like(grey), torch.zeros_like(grey), torch.empty_like(grey)
    for n, area, others in zip(WINDOWS, areas, areas - 1, strict=True):
        y, x = min(n, down), min(n, right)  # around row i: rows i-n+1 ... i+n; the same for columns
        after, before = integral[:, :, right + x :][:, :, :width], integral[:, :, right - x :][:, :, :width]
        torch.sub(after, before, out=strips[:, down : down + height])
        strips[:, down + height :][:, :y] = strips[:, down + height - 1, None]
        torch.sub(strips[:, down - y :][:, :height], strips[:, down + y :][:, :height], out=cells)
        # The pixel minus the mean of the others, g - (sum - g)/(area - 1) = (area*g - sum)/(area - 1), towards 0.
        torch.addcmul(cells, grey, area, out=cells).div_(others, rounding_mode="trunc")
        difference += cells
        on += cells.clamp_(min=0)
    return full_scale(on).add_(full_scale(difference.neg_().add_(on)))


def window_areas(x: Float[Tensor, "... H W"]) -> Float[Tensor, "w H W"]:
    """How many pixels of an image each window covers, around each pixel."""
    halves = ops.send(np.array(WINDOWS, dtype=float), x)[:, None]
    rows, columns = (covered(length, halves) for length in x.shape[-2:])
    return rows[:, :, None] * columns[:, None, :]


def blur(grey: Float[Tensor, "n H W"]) -> Float[Tensor, "n H W"]:
    """Each pixel and its eight neighbours with weights 1 2 1 by 1 2 1 over 16, rounded; the border is mirrored."""
    padded = F.pad(grey, (1, 1, 1, 1), mode="reflect")
    rows = (padded[:, :-2] + padded[:, 2:]).add_(padded[:, 1:-1], alpha=2)
    sums = (rows[:, :, :-2] + rows[:, :, 2:]).add_(rows[:, :, 1:-1], alpha=2)
    return sums.add_(8).div_(16, rounding_mode="trunc")


def covered(length: int, halves: Float[Tensor, "w 1"]) -> Float[Tensor, "w length"]:
    """How many places of an axis each window covers, around each place."""
    place = torch.arange(length, device=halves.device, dtype=halves.dtype)
    return (place + halves + 1).clamp(max=length) - (place - halves + 1).clamp(min=0)


def full_scale(cells: Float[Tensor, "n H W"]) -> Float[Tensor, "n H W"]:
    """Scaled per image so that the largest becomes 255, rounded down; all 0 stays all 0."""
    return (cells * 255).div_(cells.amax((1, 2), keepdim=True).clamp(min=1), rounding_mode="trunc")


def inside(length: int, centre: Int[Tensor, " n"], half: Tensor) -> tuple[Float[Tensor, "n length"], Tensor]:
    """1 in [centre-half, centre+half), clipped at both ends, and 0 elsewhere; and how many are 1."""
    first, last = (centre - half).clamp(min=0), (centre + half).clamp(max=length)
    place = torch.arange(length, device=centre.device)
    return ((place >= first[:, None]) & (place < last[:, None])).float(), last - first
