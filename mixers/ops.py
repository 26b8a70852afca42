"""What all mixers share: drawing partners and lambdas, blending images and targets.

B batch, C channels, H W pixels, K classes. Scalars are drawn on the CPU in float64 and sent to the device once. Nothing
here reads a value back from the device.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Elements of the batch that are worked on at a time on a CPU: 2**19 float32 are 2 MiB, so that own pixels and result of
# a chunk stay in cache. Images of CPU_LARGE elements are worth a call each.
CPU_CHUNK = 2**19
CPU_LARGE = 2**15
SEEDS = 2**63 - 1  # of a generator on the device: how many there are to draw from


def check_batch(x: Tensor, y: Tensor) -> None:
    """Raise TypeError or ValueError, in words, when a batch is not what mixers take."""
    if not x.is_floating_point():
        raise TypeError(f"images must be float and normalised before mixing, got {x.dtype}: convert and normalise them")
    if x.ndim != 4:
        other = {
            3: "; signals (B, C, L) go in as x[:, :, None], to a mixer that needs no height, such as mixup",
            5: "; video (B, T, C, H, W) goes in as x.flatten(1, 2)",
        }
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(x.shape)}{other.get(x.ndim, '')}")
    if not len(x):
        raise ValueError("the batch is empty: there is nothing to mix")
    if not y.is_floating_point():
        raise TypeError(f"targets must be dense float (B, K), got {y.dtype}: use F.one_hot(labels, K).float()")
    if y.ndim != 2 or len(y) != len(x):
        raise ValueError(f"targets must have shape (B, K) with B = {len(x)}, got {tuple(y.shape)}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless a hyperparameter is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def check_between(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless a hyperparameter is a finite number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value == math.inf:
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be a number of at least {low:g}{most}, got {value!r}")


def check_count(name: str, value: object, unit: str = "") -> None:
    """Raise ValueError unless a hyperparameter is an integer of at least 1. ``unit``: of pixels, of cells."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number{unit and f' {unit}'}, at least 1, got {value!r}")


def check_interval(name: str, pair: object, low: float, high: float = math.inf, whole: bool = False) -> None:
    """Raise ValueError unless a hyperparameter is a pair of numbers, ``low <= first <= second <= high``.

    ``whole``: only integers.
    """
    expected = f"{name} must be two {'integers' if whole else 'numbers'}, the smaller first, got {pair!r}"
    if not isinstance(pair, list | tuple) or len(pair) != 2 or (whole and not all(isinstance(v, int) for v in pair)):
        raise ValueError(expected)
    for value in pair:
        check_between(name, value, low, high)
    if pair[0] > pair[1]:
        raise ValueError(expected)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless a hyperparameter is one of ``choices``, e.g. ``(False, True)``."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_rgb(name: str, values: object, least: float = 0.0) -> None:
    """Raise ValueError unless a hyperparameter is three numbers of at least ``least``, one per channel."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{name} must be three numbers, one per channel, got {values!r}")
    for value in values:
        check_between(name, value, least)


def check_look(look: Sequence[object]) -> None:
    """Raise ValueError in a ``plan`` that is only complete after a look at the model, where it is given none."""
    if not look:
        raise ValueError("this plan needs a look at the model: run a step and take Out.plan")


def send(values: np.ndarray, like: Tensor) -> Tensor:
    """Copy a host array to the device of ``like`` without waiting; floats arrive as float32, integers as int64."""
    dtype = torch.float32 if values.dtype.kind == "f" else torch.int64
    host = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    if like.device.type == "cuda":
        host = host.pin_memory()
    return host.to(like.device, non_blocking=True)


def partners(x: Float[Tensor, "B C H W"], rng: np.random.Generator) -> Int[Tensor, " B"]:
    """A uniformly random permutation of the batch; fixed points are allowed, as in the published runs."""
    return send(rng.permutation(len(x)), x)


def beta(a: float, b: float, rng: np.random.Generator) -> float:
    """One draw from Beta(a, b) in float64, in [0, 1], both ends included. Not folded to max(lam, 1-lam)."""
    return float(rng.beta(a, b))


def per_sample(lam: float, x: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """One lambda for the whole batch, as a ``(B,)`` float32 tensor on the batch's device."""
    return torch.full((len(x),), lam, dtype=torch.float32, device=x.device)


def half_sides(height: int, width: int, lam: float) -> tuple[int, int]:
    """Half the height and width in pixels, rounded down twice as CutMix does, of a box of ``1-lam`` of the area."""
    return int(height * math.sqrt(1 - lam)) // 2, int(width * math.sqrt(1 - lam)) // 2


def clipped_box(height: int, width: int, lam: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """CutMix's box ``(top, bottom, left, right)`` in pixels: about ``1-lam`` of the area, clipped at the border."""
    half_height, half_width = half_sides(height, width, lam)
    row, column = int(rng.integers(height)), int(rng.integers(width))
    return (
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    )


def box_mask(top: int, bottom: int, left: int, right: int, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H W"]:
    """Mask of the whole batch: 0 inside rows [top, bottom) and columns [left, right), 1 outside."""
    rows, columns = np.zeros(x.shape[2]), np.zeros(x.shape[3])
    rows[top:bottom] = columns[left:right] = 1
    return product_mask(rows, columns, x)


def product_mask(rows: np.ndarray, columns: np.ndarray, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H W"]:
    """Mask of the whole batch: ``1 - rows[i] * columns[j]``, from two host vectors ``(H,)`` and ``(W,)`` in [0, 1].

    Its mean is ``1 - rows.mean() * columns.mean()``: no pass over the pixels is needed for the label.
    """
    return (1 - torch.outer(send(rows, x), send(columns, x))).expand(len(x), 1, -1, -1)


def to_pixels(cells: Float[Tensor, "n 1 h w"], x: Float[Tensor, "B C H W"]) -> Float[Tensor, "n 1 H W"]:
    """A mask on the model's token grid, for the images ``x``. Raises ``ValueError`` unless each cell is as large."""
    size, grid = x.shape[2:], cells.shape[2:]
    if size[0] % grid[0] or size[1] % grid[1]:
        wrong = f"{size[0]} x {size[1]} pixels, {grid[0]} x {grid[1]} tokens"
        raise ValueError(f"the sides of the images must be multiples of those of the token grid, got {wrong}")
    return F.interpolate(cells, size=size, mode="nearest")


def blend(
    x: Float[Tensor, "B *rest"], index: Int[Tensor, " B"], mask: Float[Tensor, "B *#rest"]
) -> Float[Tensor, "B *rest"]:
    """``mask*x + (1-mask)*x[index]`` in a new tensor of the same dtype and memory format.

    Exact at both ends: a mask of 1 returns ``x``, a mask of 0 returns ``x[index]``, bit for bit.
    """
    mask = mask.to(x.dtype)
    if x.device.type != "cpu" or x.requires_grad or mask.requires_grad or torch.compiler.is_compiling():
        return torch.lerp(x[index], x, mask)
    out = torch.empty_like(x)
    if x[0].numel() >= CPU_LARGE:  # one image at a time, the partner where it lies
        images = x.unbind()
        for j, own, weight, mixed in zip(index.tolist(), images, mask.unbind(), out.unbind(), strict=True):
            torch.lerp(images[j], own, weight, out=mixed)
        return out
    size = max(1, CPU_CHUNK // max(1, x[0].numel()))
    for i in range(0, len(x), size):  # fetch partners to where the result will be, and blend while that is in cache
        part = slice(i, i + size)
        if x.is_contiguous():
            torch.index_select(x, 0, index[part], out=out[part])
        else:
            out[part] = x[index[part]]
        out[part].lerp_(x[part], mask[part])
    return out


def blend_samples(
    h: Float[Tensor, "B *rest"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"]
) -> Float[Tensor, "B *rest"]:
    """``lam*h + (1-lam)*h[index]``, one lambda per sample, for images, maps and tokens."""
    return blend(h, index, lam.view(-1, *[1] * (h.ndim - 1)))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` along the first axis, in the form that is five times as fast on a CPU where the layout allows it."""
    return x.index_select(0, index) if x.device.type == "cpu" and x.is_contiguous() else x[index]


def blend_targets(y: Float[Tensor, "B K"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"]) -> Float[Tensor, "B K"]:
    """``lam*y + (1-lam)*y[index]``, one lambda per sample."""
    return torch.lerp(gather(y, index), y, lam.to(y.dtype)[:, None])


def draw_noise(add_level: float, mult_level: float, rng: np.random.Generator) -> dict[str, Any]:
    """What ``noisy`` takes: the levels, each times a draw from Beta(2, 5), as in Noisy Feature Mixup, and a seed."""
    add, mult = (level * beta(2.0, 5.0, rng) for level in (add_level, mult_level))
    return {"add": add, "mult": mult, "seed": int(rng.integers(SEEDS))}


def noisy(h: Float[Tensor, "..."], add: float, mult: float, seed: int, sparse: float = 0.0) -> Float[Tensor, "..."]:
    """``(1 + mult*U)*h + add*N`` for U uniform in [-1, 1] and N standard normal, of a generator on the device of ``h``.

    ``sparse``: the share of numbers that a noise spares; each noise spares its own, drawn separately. Drawn at least in
    float32, in the order of ``h.shape``.
    """
    if torch.compiler.is_compiling():  # a compiler knows no generators, and would make new code for each seed
        return torch.compiler.disable(noisy)(h, add, mult, seed, sparse)
    generator = torch.Generator("cpu" if h.device.type == "meta" else h.device).manual_seed(seed)
    wide = torch.promote_types(h.dtype, torch.float32)

    def drawn(draw: Callable[..., Tensor]) -> Tensor:
        return draw(h.shape, generator=generator, dtype=wide, device=h.device)

    noise = factor = None
    if add:
        noise = drawn(torch.randn).mul_(add)
        noise = noise.masked_fill_(drawn(torch.rand) < sparse, 0) if sparse else noise
    if mult:
        factor = drawn(torch.rand).mul_(2 * mult).add_(1 - mult)
        factor = factor.masked_fill_(drawn(torch.rand) < sparse, 1) if sparse else factor
    out = h if factor is None else h * factor
    return (out if noise is None else out + noise).to(h.dtype)


def touch(parameters: Iterable[Tensor]) -> Tensor | float:
    """0, as a sum over nothing of each parameter, so that each has a gradient, of zeros.

    DistributedDataParallel waits for the gradient of every parameter, also of one that a step does without.
    """
    return sum((p.flatten()[:0].sum() for p in parameters if p.requires_grad), start=0.0)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Arithmetic in the types of its operands during the block, also under autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
