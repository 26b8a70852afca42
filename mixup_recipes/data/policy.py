"""timm's RandAugment on uint8 tensors (3, H, W), RGB, with the operations that Pillow is slow at or refuses.

An image becomes one of Pillow when the first of Pillow's operations is drawn, and a tensor again in the end.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import str_to_pil_interp
from torch import Tensor

from mixup_recipes.data.decoding import to_tensor
from mixup_recipes.recipe import Recipe

Either = Tensor | Image.Image


def pillow(image: Either) -> Image.Image:
    """As Pillow's RGB; band by band in a sixth of the time that pixel by pixel takes."""
    return Image.merge("RGB", [Image.fromarray(band) for band in image.numpy()]) if isinstance(image, Tensor) else image


def tensor(image: Either) -> Tensor:
    """As a tensor."""
    return image if isinstance(image, Tensor) else to_tensor(image)


def rand_augment(recipe: Recipe) -> Callable[[Either], Either] | None:
    """timm's RandAugment by the recipe's policy string, drawn from the global generators; None without one.

    The "increasing" posterise can ask for 0 bits, which Pillow before 13 answered with a black image and
    Pillow 13 refuses; here it is the black image again. With pixels "v2", bicubic shears and translations are those of
    ``moved``.
    """
    if not recipe.aa:
        return None
    hparams = {
        "translate_const": int(recipe.image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * m)) for m in recipe.mean),
        "interpolation": str_to_pil_interp(recipe.interpolation),
    }
    augment: Any = rand_augment_transform(recipe.aa, hparams)
    fast = MOVES if recipe.pixels == "v2" and recipe.interpolation == "bicubic" else {}
    for op in augment.ops:
        by_pillow = posterize if op.name.startswith("Posterize") else op.aug_fn
        op.aug_fn = fast.get(op.name, functools.partial(on_pillow, by_pillow))
    return augment


def on_pillow(operation: Callable[..., Image.Image], image: Either, *args: Any, **rest: Any) -> Image.Image:
    """An operation of Pillow's on an image of either kind."""
    return operation(pillow(image), *args, **rest)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation, with a black image for fewer than one bit."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def move(image: Either, amount: float, fillcolor: tuple[int, int, int], shear: bool, down: bool, **_: Any) -> Tensor:
    """timm's ShearX, ShearY, TranslateXRel and TranslateYRel for bicubic interpolation.

    A translation is by ``amount`` of the side; a shear moves a row, or with ``down`` a column, by ``amount`` times its
    place.
    """
    image, dim = tensor(image), 1 if down else 2
    across, along = image.shape[3 - dim], image.shape[dim]
    shift = amount * (np.arange(across) + 0.5) if shear else np.full(across, amount * along)
    return moved(image, shift, fillcolor, dim)


MOVES = {
    "ShearX": functools.partial(move, shear=True, down=False),
    "ShearY": functools.partial(move, shear=True, down=True),
    "TranslateXRel": functools.partial(move, shear=False, down=False),
    "TranslateYRel": functools.partial(move, shear=False, down=True),
}


def moved(image: Tensor, shift: np.ndarray, fill: tuple[int, int, int], dim: int) -> Tensor:
    """A pixel of line i is what lies ``shift[i]`` further along it, cubic between four pixels; ``fill`` for nothing.

    image uint8 (3, H, W); lines are rows for ``dim`` 2, columns for 1. Pillow's cubic of a = -1, which cuts off what is
    behind the point, in float32 instead of its float64: at most one level away from it, for one pixel in 30,000. Pillow
    goes through both axes for each pixel.
    """
    length, shape = image.shape[dim], (-1, 1) if dim == 2 else (1, -1)
    along = (1, -1) if dim == 2 else (-1, 1)
    by = torch.from_numpy(shift).view(shape)
    whole = by.floor()
    taps = (whole.long() + torch.arange(-1, length + 2).view(along)).clamp_(0, length - 1)
    values = image.float().gather(dim, taps.expand(3, -1, -1))
    a, b, c, d = (values.narrow(dim, k, length) for k in range(4))
    rise, fall, share = b - a, c - d, (by - whole).float()
    out = torch.addcmul(fall - 2 * rise, rise - fall, share).mul_(share).add_(c - a).mul_(share).add_(b)
    places = by + torch.arange(length).view(along) + 0.5
    inside = ((places >= 0) & (places < length)).float()
    out = out.clamp_(0, 255).mul_(inside).add_((1 - inside) * torch.tensor(fill).view(3, 1, 1))
    return torch.from_numpy(out.numpy().astype(np.uint8))  # torch takes ten times as long for this
