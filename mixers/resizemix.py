"""ResizeMix: Mixing Data with Preserved Object Information and True Labels. Qin et al. 2020.

https://arxiv.org/abs/2012.11101, reference code https://github.com/JayQine/ResizeMix

Formula: The whole of ``x[index]`` is shrunk by nearest neighbours to ``tau`` of its height and width. Then it is pasted
on ``x``. ``lam = 1 - area(patch)/(H*W)``.

Published defaults: tau ~ U(0.1, 0.8) (paper, section 3.3).

Sampling law: ``resizemix@openmixup-2021``: tau ~ Beta(alpha, alpha). Where that lies outside 0.1 to 0.8, tau ~ U(0.1,
0.8) instead. At alpha = 1 this is the paper's law. The whole batch has one box of even sides,
``2*floor(floor(H*tau)/2)`` by ``2*floor(floor(W*tau)/2)``. Its centre is uniform on the pixel grid, and it is clipped
at the border. The partner is shrunk to what is left of the box. Hence E[lam] = 0.827 at alpha = 1 for 224 x 224. With
``placement="inside"`` the law is ``resizemix@qin-2020``: The box is ``floor(H*tau)`` by ``floor(W*tau)``, each sample
has its own box, and the box is shifted until it lies inside the image. Then E[lam] = 0.756. The partners are a
uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.

Deviations: A side of the box has at least 2 pixels before clipping (1 with ``placement="inside"``). There OpenMixup
would fail on images of less than 20 pixels. The reference code hands tau itself to the interpolation. Here and in
OpenMixup the source pixel follows from the sizes. So nearly every patch differs towards its far end, by up to one and a
half pixels of the patch.

Kind: input.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class ResizeMix(Mixer):
    """Paste the whole partner, shrunk, on each image.

    ``alpha`` is the Beta parameter of the scale and must be above 0. It is used only with ``use_alpha``. ``scope``
    gives the least and the largest scale. ``placement`` is ``"clip"`` for one box for the whole batch, clipped at the
    border, or ``"inside"`` for one box per sample.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        scope: Sequence[float] = (0.1, 0.8),
        use_alpha: bool = True,
        placement: str = "clip",
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_interval("scope", scope, 0.01, 1.0)
        ops.check_choice("use_alpha", use_alpha, (False, True))
        ops.check_choice("placement", placement, ("clip", "inside"))
        self.alpha = alpha
        self.scope = scope
        self.use_alpha = use_alpha
        self.placement = placement

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,) and ``box`` (B or 1, 4): top, bottom, left, right, all boxes of one size."""
        low, high = self.scope
        scale = ops.beta(self.alpha, self.alpha, rng) if self.use_alpha else rng.uniform(low, high)
        if not low <= scale <= high:
            scale = rng.uniform(low, high)
        index = ops.partners(x, rng)
        sides = np.array(x.shape[-2:])
        cut = (sides * scale).astype(int)
        if self.placement == "clip":
            half, centre = np.maximum(cut // 2, 1), rng.integers(sides)[None]
            first, last = np.maximum(centre - half, 0), np.minimum(centre + half, sides)
        else:
            cut, centre = np.maximum(cut, 1), rng.integers(sides, size=(len(x), 2))
            last = np.minimum(np.maximum(centre - cut // 2, 0) + cut, sides)
            first = last - cut
        return {"index": index, "box": ops.send(np.stack([first, last], 2).reshape(-1, 4), x)}

    def mix(  # type: ignore[override]
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], *, index: Int[Tensor, " B"], box: Int[Tensor, "n 4"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """``x`` with the shrunk ``x[index]`` inside the boxes; the label share is the area outside."""
        ops.check_batch(x, y)
        top, bottom, left, right = box.unbind(1)
        lam = 1 - (bottom - top) * (right - left) / x[0, 0].numel()
        slices = x.device.type == "cpu" and not x.requires_grad and not torch.compiler.is_compiling()
        paste = paste_slices if slices else paste_by_gather
        return paste(x, index, box), ops.blend_targets(y, index, lam.expand(len(x)))


def paste_slices(x: Tensor, index: Tensor, box: Tensor) -> Tensor:
    """On a CPU: shrink all images, and paste the patches into a copy. Reads ``box``."""
    boxes = box.tolist()
    top, bottom, left, right = boxes[0]
    height, width = bottom - top, right - left
    rows, columns = (shrunk(length, size) for length, size in zip(x.shape[2:], (height, width), strict=True))
    pixels = (rows[:, None] * x.shape[3] + columns).flatten()
    out, patches = torch.empty_like(x), x.new_empty(*x.shape[:2], height, width)
    images = 1 if x[0].numel() >= ops.CPU_LARGE else len(x)  # large: shrunk while it is in cache from being copied
    for own, copy, patch in zip(*(t.split(images) for t in (x, out, patches)), strict=True):
        copy.copy_(own)
        torch.index_select(own.reshape(-1, x[0, 0].numel()), 1, pixels, out=patch.view(-1, height * width))
    if len(boxes) == 1 and images > 1:
        out[:, :, top:bottom, left:right] = patches.index_select(0, index)
        return out
    boxes = boxes * (len(x) // len(boxes))
    for copy, partner, (top, bottom, left, right) in zip(out, index.tolist(), boxes, strict=True):
        copy[:, top:bottom, left:right] = patches[partner]
    return out


def shrunk(length: int, size: int) -> Tensor:
    """Source (size,) of each place on an axis of ``length`` that is shrunk to ``size``, as in ``F.interpolate``."""
    ratio = torch.tensor(length, dtype=torch.float32) / size
    return (torch.arange(size) * ratio).to(torch.int64).clamp(max=length - 1)


def paste_by_gather(x: Tensor, index: Tensor, box: Tensor) -> Tensor:
    """Anywhere: every pixel is fetched from where the shrunk partner has it, then chosen or not. Reads no value."""
    top, bottom, left, right = box.unbind(1)
    rows, in_rows = source(x.shape[2], top, bottom)
    columns, in_columns = source(x.shape[3], left, right)
    channels = torch.arange(x.shape[1], device=x.device)[:, None, None]
    patch = x[index[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
    outside = ~(in_rows[:, None, :, None] & in_columns[:, None, None, :])
    return torch.where(outside, x, patch)  # x comes first: its memory format is that of the result


def source(length: int, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """For each place on an axis, ``(n, length)``: its source if [first, last) shows the whole axis; if it is inside.

    The ratio is a float32, as in ``F.interpolate``: in integers some sizes would differ by one pixel.
    """
    place = torch.arange(length, device=first.device) - first[:, None]
    size = last - first
    ratio = torch.full_like(size, length, dtype=torch.float32) / size
    index = (place * ratio[:, None]).floor().long().clamp(0, length - 1)
    return index, (place >= 0) & (place < size[:, None])
