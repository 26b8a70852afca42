"""Mixing more than class labels: what lies on the pixels of an image follows them by the plan of a mixer.

``mix_like`` mixes label maps, heatmaps or frames. ``mix_boxes`` mixes the boxes of objects. Both take plans that blend
two images of a batch in place, with ``index`` and ``mask``. These are the plans of Mixup, CutMix, FMix, GridMix,
SmoothMix, SaliencyMix, of methods that look at the model and plan no more than this, and of a ``Switch`` of such
methods. Plans that move or shrink pixels or mix features are refused. ResizeMix shrinks by nearest neighbours, so its
``mixer.mix(maps, y, **plan)`` is right for float maps ``(B, K, H, W)`` of the images' size, one-hot ones included.

Targets that are numbers per image, for a regression, need nothing of this file: ``mix`` blends any float ``(B, K)``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .base import Plan
from .compose import inmost

COORDINATES = 4
"""A last side of so many numbers is that of points or boxes, no row of pixels."""


class Boxes(NamedTuple):
    """What shows of the objects of one mixed image."""

    boxes: Tensor
    """``(n, 4)`` left, top, right, bottom in pixels: the smallest box around what shows of each."""
    labels: Tensor
    """``(n, ...)`` the labels of those that are left."""
    shares: Tensor
    """``(n,)`` in (0, 1]: how much of the whole box shows, which is the weight of its loss."""


def mix_like(plan: Plan, maps: Tensor) -> Tensor:
    """Mix ``maps`` ``(B, ..., h, w)`` as the images were mixed, pixel by pixel.

    Each pixel comes from where the image's pixel came from. The maps are class numbers ``(B, h, w)``, one-hot maps or
    heatmaps ``(B, K, h, w)``, or frames ``(B, T, C, h, w)``. Their size is that of the images, or another one of the
    same proportions. For another size the mask is read at the nearest pixel. Float maps are blended,
    ``mask*maps + (1-mask)*maps[index]``. Integers and booleans are taken from one image or the other.

    Raises ``ValueError`` for integers under a mask that blends (make them one-hot floats), for a shape that does not
    lie on the pixels (coordinates of keypoints do not), and for a plan that is more than ``index`` and ``mask``. For
    integers the mask is looked through, which waits for the device.
    """
    parts = in_place(plan)
    if parts is None:
        return maps
    index, mask = parts
    if maps.ndim < 3 or len(maps) != len(index):
        raise ValueError(f"maps must have shape (B, ..., h, w) with B = {len(index)}, got {tuple(maps.shape)}")
    if maps.shape[-1] <= COORDINATES and maps.shape[-2:] != mask.shape[-2:]:
        raise ValueError(
            f"expected maps (B, ..., h, w), got {tuple(maps.shape)}, which look like coordinates: points of two images "
            "have no mean, make them heatmaps"
        )
    mask = fitted(mask, maps.shape[-2], maps.shape[-1])
    mask = mask.reshape(len(mask), *[1] * (maps.ndim - 3), *mask.shape[-2:])
    if maps.is_floating_point():
        return ops.blend(maps, index, mask)
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError(f"this mask blends, and {maps.dtype} maps cannot be blended: make them one-hot float maps")
    return torch.where(mask.bool(), maps, maps[index])


def mix_boxes(plan: Plan, boxes: Sequence[Tensor], labels: Sequence[Tensor], least: float = 0.1) -> list[Boxes]:
    """Return the objects of each mixed image, as far as they show: those of the image itself, then those of its
    partner.

    ``boxes`` has, for each image, ``(n, 4)``: left, top, right, bottom in its pixels, on the device of the plan.
    ``labels`` has, for each image, ``(n, ...)``. A box is cut down to the smallest one around the pixels that show.
    ``least``, in (0, 1], leaves out an object if a smaller share of its box shows. Under one lambda for all pixels
    (Mixup) a box stays whole, whatever ``least`` is, and its share is the image's. Raises ``ValueError`` as
    ``mix_like`` does for a plan. The plan's index is read, which waits for the device.
    """
    ops.check_between("least", least, 1e-6, 1.0)
    parts = in_place(plan)
    partners = range(len(boxes)) if parts is None else parts[0].tolist()
    if not len(boxes) == len(labels) == len(partners):
        raise ValueError(f"expected boxes and labels of {len(partners)} images, got {len(boxes)} and {len(labels)}")
    mixed = []
    for own, partner in enumerate(partners):
        if parts is None or partner == own:  # the image as it is
            seen = [(own, torch.ones(1, 1, device=boxes[own].device))]
        else:
            weight = parts[1][own, 0]
            seen = [(own, weight), (partner, 1 - weight)]
        around, shares = zip(*(visible(boxes[i], weight) for i, weight in seen), strict=True)
        found = Boxes(torch.cat(around), torch.cat([labels[i] for i, _ in seen]), torch.cat(shares))
        kept = found.shares >= least if seen[0][1].numel() > 1 else found.shares > 0
        mixed.append(Boxes(*(part[kept] for part in found)))
    return mixed


def in_place(plan: Plan) -> tuple[Tensor, Tensor] | None:
    """``index`` ``(B,)`` and ``mask`` ``(B, 1, H, W)`` or ``(B, 1, 1, 1)`` of a plan; None where nothing is mixed.

    Raises ``ValueError`` for a plan that holds more, or that has no mask.
    """
    plan = inmost(plan)
    keys = plan.keys() - {"choice", "lam"}
    if not keys:
        return None
    if keys != {"index", "mask"}:
        got = ", ".join(sorted(keys))
        raise ValueError(f"expected a plan of index and mask, which blends two images in place (cutmix's), got {got}")
    return plan["index"], plan["mask"]


def fitted(mask: Tensor, height: int, width: int) -> Tensor:
    """``mask`` ``(B, 1, H, W)`` for maps of another size, by the nearest pixel; one share for all pixels fits any."""
    rows, columns = mask.shape[-2:]
    if (rows, columns) in ((1, 1), (height, width)):
        return mask
    if abs(height * columns - width * rows) >= max(rows, columns):  # not even the same proportions when rounded
        raise ValueError(f"maps for images of {rows} x {columns} pixels need their proportions, got {height} x {width}")
    return F.interpolate(mask, size=(height, width), mode="nearest")


def visible(boxes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What shows of boxes ``(n, 4)`` under a weight ``(H, W)`` or ``(1, 1)`` of each pixel: boxes and shares ``(n,)``.

    A pixel that a box covers in part counts in part. A box without area, or of which nothing shows, has the share 0.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    weight = weight.to(boxes.dtype)
    if weight.numel() == 1:
        return boxes, weight.flatten().expand(len(boxes))
    across, down = (covered(boxes[:, i], boxes[:, i + 2], weight.shape[1 - i]) for i in (0, 1))
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    shares = (((down @ weight) * across).sum(1) / area).nan_to_num(0.0, 0.0).clamp(0, 1)
    shows, columns, rows = ((part > 0).to(boxes.dtype) for part in (weight, across, down))
    left, right = ends(columns * (rows @ shows) > 0)
    top, bottom = ends(rows * (columns @ shows.T) > 0)
    first, last = torch.stack([left, top], 1), torch.stack([right, bottom], 1)
    return torch.cat([torch.maximum(boxes[:, :2], first), torch.minimum(boxes[:, 2:], last)], 1), shares


def covered(first: Tensor, last: Tensor, length: int) -> Tensor:
    """How much of each of ``length`` pixels lies in [first, last): ``(n, length)`` in [0, 1]."""
    pixel = torch.arange(length, dtype=first.dtype, device=first.device)
    return (torch.minimum(last[:, None], pixel + 1) - torch.maximum(first[:, None], pixel)).clamp(min=0)


def ends(line: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of booleans ``(n, length)`` its first True and one past its last, ``(n,)`` each; or 0 and length."""
    return line.int().argmax(1), line.shape[1] - line.flip(1).int().argmax(1)
