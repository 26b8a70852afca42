"""AugMix's views of a batch: chains of nine operations on 8-bit pixels, blended. AugMix and NoisyMix share them.

``draw_view`` decides on the CPU. Everything is drawn per image, as in the paper. ``view`` then does it on the device,
for all images of a batch at once. At each step of the chains the images are grouped by the operation that was drawn for
them. Operations that map a value to a value become one table per image and channel. The others become one matrix per
image.

The operations are Pillow's, on integers from 0 to 255. After each operation pixels are integers again. Tables are equal
to Pillow's to the bit, and so is a shift. Rotations and shears are interpolated in 32 bits, where Pillow uses 64, and
are rounded down. Where a value lies next to an integer, as one in 40 does, the two can differ by 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from . import ops
from .base import Plan

OPERATIONS = (
    "autocontrast", "equalize", "posterize", "rotate", "solarize", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
GROUPS = ("autocontrast", "equalize", "posterize", "solarize", "affine")
DEEPEST = 3  # operations of a chain whose depth is drawn
LEAST = 0.1  # severity
WHOLE = 1 / 64  # a value this close below an integer is that integer: more than the rounding of 32 bits


def check(severity: object, width: object, depth: object) -> None:
    """Raise ValueError, in words, for what ``draw_view`` does not take."""
    ops.check_between("severity", severity, LEAST, 10.0)
    ops.check_count("width", width)
    if depth is not None:
        ops.check_count("depth", depth)


def draw_view(
    x: Float[Tensor, "B C H W"],
    rng: np.random.Generator,
    severity: float,
    width: int,
    depth: int | None,
    alpha: float,
) -> Plan:
    """One view of each image: ``lam`` (B,), its own share, ``weights`` (width, B) of its chains, and their ``steps``.

    A step is a dict with ``rows`` for each of ``GROUPS``, the places (n,) among width*B images (image i of chain c is
    c*B + i), and how strong: ``bits`` and ``threshold`` (n,) for those to posterize and to solarize, ``matrix``
    (n, 2, 3) for those to move, from a pixel of the result to its place in the image, in pixels, centres at halves.
    """
    if x.shape[1] != 3:
        raise ValueError(f"AugMix needs RGB images (B, 3, H, W), got {tuple(x.shape)}")
    size, deepest = len(x), DEEPEST if depth is None else depth
    lam = rng.beta(alpha, alpha, size)
    weights = rng.dirichlet(np.full(width, alpha), size).T
    depths = rng.integers(1, DEEPEST + 1, (width, size)) if depth is None else np.full((width, size), depth)
    drawn = [
        (
            rng.integers(len(OPERATIONS), size=(width, size)),
            rng.uniform(LEAST, severity, (width, size)),
            rng.random((width, size)),
        )
        for _ in range(deepest)
    ]
    steps = []
    for number, (operation, level, side) in enumerate(drawn):
        chosen = np.where(number < depths, operation, -1).ravel()
        steps.append(grouped(chosen, level.ravel(), np.where(side > 0.5, -1, 1).ravel(), x))
    return {"lam": ops.send(lam, x), "weights": ops.send(weights, x), "steps": steps}


def grouped(operation: np.ndarray, level: np.ndarray, sign: np.ndarray, x: Float[Tensor, "B C H W"]) -> dict[str, Any]:
    """One step of all chains: which images get what. ``operation``: of ``OPERATIONS``, -1 where a chain has ended."""
    height, width = x.shape[2:]
    places = {name: np.flatnonzero(operation == number) for number, name in enumerate(OPERATIONS)}
    moving = [name for name in OPERATIONS if name not in GROUPS]
    rows = [*(places[name] for name in GROUPS[:-1]), np.concatenate([places[name] for name in moving])]
    matrix = [matrices(name, level[places[name]], sign[places[name]], height, width) for name in moving]
    sent = ops.send(np.concatenate(rows), x).split([len(found) for found in rows])  # one transfer
    return {
        "rows": dict(zip(GROUPS, sent, strict=True)),
        "bits": ops.send(4 - scaled(level[places["posterize"]], 4.0), x),
        "threshold": ops.send(256 - scaled(level[places["solarize"]], 256.0), x),
        "matrix": ops.send(np.concatenate(matrix), x),
    }


def scaled(level: np.ndarray, most: float) -> np.ndarray:
    """Levels of at most 10 as whole numbers of at most ``most``, rounded down."""
    return (level * most / 10).astype(np.int64)


def matrices(name: str, level: np.ndarray, sign: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where each pixel of the results comes from, (n, 2, 3), as Pillow is given it by the reference code."""
    found = np.tile(np.eye(2, 3), (len(level), 1, 1))
    if name == "rotate":
        angle = -np.radians(sign * scaled(level, 30.0))
        cos, sin, x, y = np.cos(angle).round(15), np.sin(angle).round(15), width / 2, height / 2
        found[:, 0] = np.stack([cos, sin, x - cos * x - sin * y], 1)
        found[:, 1] = np.stack([-sin, cos, y + sin * x - cos * y], 1)
    elif name.startswith("shear"):
        shear = sign * level * 0.3 / 10
        found[:, *((0, 1) if name == "shear_x" else (1, 0))] = shear
    else:
        axis, side = (0, width) if name == "translate_x" else (1, height)
        found[:, axis, 2] = sign * scaled(level, side / 3)
    return found


@torch.no_grad()
def view(x: Float[Tensor, "B C H W"], drawn: Plan, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The images as ``draw_view`` has drawn, of the shape, dtype and memory format of ``x``.

    ``mean``, ``std``: those that the images were normalised with. Chains start from pixels rounded to 8 bits and kept
    within 0 to 255; the share of the image itself is ``x`` as it is.
    """
    with ops.full_precision(x.device):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        spread, middle = (ops.send(np.array(v)[:, None, None] * 255, x).to(wide.dtype) for v in (std, mean))
        pixels = (wide * spread + middle).round().clamp(0, 255).to(torch.uint8).contiguous()
        weights = drawn["weights"].to(wide.dtype)[..., None, None, None]
        chains = pixels.repeat(len(weights), 1, 1, 1)
        for step in drawn["steps"]:
            operate(chains, step)
        blended = torch.zeros_like(wide)
        for weight, chain in zip(weights, chains.unflatten(0, weights.shape[:2]), strict=True):
            blended.add_(weight * chain)
        out = torch.empty_like(x)
        return out.copy_(
            torch.lerp((blended - middle) / spread, wide, drawn["lam"].to(wide.dtype)[:, None, None, None])
        )


def operate(pixels: UInt8[Tensor, "n C H W"], step: dict[str, Any]) -> None:
    """One step of all chains, in place."""
    rows = step["rows"]
    looked_up = torch.cat([rows[name] for name in GROUPS[:-1]])
    if len(looked_up):
        found = pixels[looked_up]
        parts = found.split([len(rows[name]) for name in GROUPS[:-1]])
        tables = [autocontrast(parts[0]), equalize(parts[1])]
        tables += [
            table[:, None].expand(-1, found.shape[1], -1)
            for table in (posterize(step["bits"]), solarize(step["threshold"]))
        ]
        pixels.index_copy_(0, looked_up, by_table(found, torch.cat(tables)))
    if len(rows["affine"]):
        pixels.index_copy_(0, rows["affine"], moved(pixels[rows["affine"]], step["matrix"]))


def by_table(pixels: UInt8[Tensor, "n C H W"], tables: Int[Tensor, "n C v"]) -> UInt8[Tensor, "n C H W"]:
    """Each pixel replaced by what the table of its image and channel has in its place."""
    return tables.to(torch.uint8).gather(2, pixels.flatten(2).long()).view_as(pixels)


def values(like: Tensor) -> Int[Tensor, " v"]:
    """0 to 255."""
    return torch.arange(256, device=like.device)


def autocontrast(pixels: UInt8[Tensor, "n C H W"]) -> Int[Tensor, "n C v"]:
    """Tables by which the darkest value of a channel becomes 0 and the lightest 255; of a flat channel nothing."""
    low, high = (end[..., None].double() for end in (pixels.flatten(2).amin(2), pixels.flatten(2).amax(2)))
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # in 64 bits and in this order, as Pillow rounds
    stretched = (values(pixels) * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, stretched.long(), values(pixels))


def equalize(pixels: UInt8[Tensor, "n C H W"]) -> Int[Tensor, "n C v"]:
    """Tables by which the values of a channel are spread evenly; of a channel of few pixels or values nothing."""
    flat = pixels.flatten(2).long()
    counts = flat.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, torch.ones_like(flat))
    of_lightest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - of_lightest) // 255
    below = counts.cumsum(2) - counts
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, spread, values(pixels))


def posterize(bits: Int[Tensor, " n"]) -> Int[Tensor, "n v"]:
    """Tables that keep the first bits of a value."""
    rest = 2 ** (8 - bits)[:, None]
    return values(bits) // rest * rest


def solarize(threshold: Int[Tensor, " n"]) -> Int[Tensor, "n v"]:
    """Tables that turn around the values from the threshold on."""
    return torch.where(values(threshold) < threshold[:, None], values(threshold), 255 - values(threshold))


def moved(pixels: UInt8[Tensor, "n C H W"], matrices: Float[Tensor, "n 2 3"]) -> UInt8[Tensor, "n C H W"]:
    """Each pixel from where its image's matrix says, bilinear and rounded down; black where that is outside."""
    height, width = pixels.shape[2:]
    rows, columns = (torch.arange(side, device=pixels.device) + 0.5 for side in (height, width))
    x, y = (
        m[:, 0, None, None] * columns + m[:, 1, None, None] * rows[:, None] + m[:, 2, None, None]
        for m in matrices.unbind(1)
    )
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    places = torch.stack([2 * x / width - 1, 2 * y / height - 1], 3)
    found = F.grid_sample(pixels.float(), places, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside[:, None], found.add_(WHOLE).floor_().clamp_(max=255), 0).to(torch.uint8)


def divergence(*logits: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Jensen and Shannon's divergence of predictions of the same images, at least in float32.

    The mean over predictions p of ``sum p * (log p - log m)``, with their mean m, at least 1e-7.
    """
    with ops.full_precision(logits[0].device):
        logs = [z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(1) for z in logits]
        mean = torch.stack([log.exp() for log in logs]).mean(0).clamp(1e-7, 1).log()
        return torch.stack([(log.exp() * (log - mean)).sum(1) for log in logs]).mean(0)
