"""What happens to decoded images: crops and RandAugment on the CPU, the rest on the device.

Images are uint8 tensors (3, H, W), RGB.
"""

import functools
import math
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomCrop, RandomResizedCrop
from torchvision.transforms import functional as TF

from mixup_recipes.data import keys
from mixup_recipes.data.decoding import LIMIT, BadImage
from mixup_recipes.data.picture import Part, Picture
from mixup_recipes.data.policy import rand_augment, tensor
from mixup_recipes.recipe import Recipe


class Transform(Protocol):
    """``TrainTransform`` or ``EvalTransform``."""

    size: list[int]
    """Height and width of what comes out."""

    def __call__(self, image: Tensor | Picture, key: tuple[int, ...], /) -> Tensor:
        """uint8 (3, H, W), decoded or not, and what random numbers are a function of, to uint8 (3, *size)."""


class TrainTransform:
    """Crop, flip and RandAugment of one image.

    A recipe's ``pixels`` say by what: torchvision's transforms, which draw from torch's global generator and scale
    floats (v1); or the same laws drawn from a generator of numpy, a tenth of the time, and torch's scaling of bytes, a
    third, of no more of a large JPEG than ``Picture.reduced`` decodes (v2). timm's RandAugment draws from the global
    generators of Python and numpy.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.size = recipe, [recipe.image_size] * 2
        self.rand_augment = rand_augment(recipe)

    def __call__(self, image: Tensor | Picture, key: tuple[int, ...]) -> Tensor:
        """uint8 (3, H, W) to uint8 (3, image_size, image_size), a function of the image and the key."""
        r, draw = self.recipe, None
        if r.pixels == "v1":
            keys.seed_everything(keys.SAMPLE, *key)
        else:
            draw = keys.rng(keys.SAMPLE, *key)
            if self.rand_augment:
                keys.seed_policy(draw)
        if r.train_crop == "rrc":
            part = box(image, r.scale, r.ratio, draw)
            out = cut(image, part, (r.image_size, r.image_size), r.interpolation, r.pixels)
        elif r.train_crop == "resize" or image.shape[1:] != (r.image_size, r.image_size):
            out = TF.center_crop(resize(image, r.image_size, r.interpolation, r.pixels), [r.image_size] * 2)
        else:
            out = whole(image)
        if mode := {"pad": "reflect", "pad_zeros": "constant"}.get(r.train_crop):
            padded = TF.pad(out, [r.image_size // 8], padding_mode=mode)  # constant: zeros
            out = TF.crop(padded, *corner(padded, r.image_size, draw), r.image_size, r.image_size)
        if (torch.rand(()) if draw is None else draw.random()) < r.hflip:
            out = out.flip(-1)
        return tensor(self.rand_augment(out)) if self.rand_augment else out


def box(
    image: Tensor | Picture, scale: tuple[float, float], ratio: tuple[float, float], draw: np.random.Generator | None
) -> Part:
    """Top, left, height and width of a random part, by the law of torchvision's RandomResizedCrop.

    ``scale``: range of its share of the area; ``ratio``: of width by height, log-uniform. The first of ten draws that
    fits; else the largest part at the centre that is within ``ratio``. Without ``draw``: torchvision's own.
    """
    if draw is None:
        return RandomResizedCrop.get_params(whole(image), list(scale), list(ratio))
    rows, columns = image.shape[1:]
    for _ in range(10):
        area = rows * columns * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= columns and 0 < height <= rows:
            return int(draw.integers(rows - height + 1)), int(draw.integers(columns - width + 1)), height, width
    width, height = min(columns, round(rows * ratio[1])), min(rows, round(columns / ratio[0]))
    return (rows - height) // 2, (columns - width) // 2, height, width


def corner(image: Tensor, size: int, draw: np.random.Generator | None) -> tuple[int, int]:
    """Top and left of a random square of ``size``; without ``draw`` torchvision's own, for its RandomCrop."""
    if draw is None:
        return RandomCrop.get_params(image, (size, size))[:2]
    rows, columns = image.shape[1:]
    return int(draw.integers(rows - size + 1)), int(draw.integers(columns - size + 1))


class EvalTransform:
    """Resize the picture so that it covers ``resize``, then take the centre: uint8 (3, H, W) to uint8 (3, *size).

    A number means a square; for a square the shorter side becomes ``resize``.
    """

    def __init__(
        self, resize: int | tuple[int, int], size: int | tuple[int, int], interpolation: str, pixels: str = "v1"
    ):
        self.resize, self.pixels = resize, pixels
        self.size = [size, size] if isinstance(size, int) else list(size)
        self.interpolation = interpolation

    @classmethod
    def of(cls, recipe: Recipe) -> "EvalTransform":
        """As a recipe says."""
        return cls(recipe.eval_resize, recipe.eval_size, recipe.interpolation, recipe.pixels)

    def __str__(self) -> str:
        height, width = self.size
        wanted = self.resize if isinstance(self.resize, int) else " x ".join(map(str, self.resize))
        return f"{wanted} -> {height if height == width else f'{height} x {width}'} px {self.interpolation}"

    def __call__(self, image: Tensor | Picture, _key: tuple[int, ...] = ()) -> Tensor:
        return TF.center_crop(resize(image, self.resize, self.interpolation, self.pixels), self.size)


def whole(image: Tensor | Picture) -> Tensor:
    """All pixels, uint8 (3, H, W)."""
    return image.pixels if isinstance(image, Picture) else image


def cut(image: Tensor | Picture, part: Part, size: tuple[int, int], interpolation: str, pixels: str) -> Tensor:
    """A part of a picture, scaled to uint8 (3, *size); with pixels "v2" of no more than has to be decoded."""
    if (
        pixels == "v2"
        and isinstance(image, Picture)
        and (ready := image.reduced(part, size, interpolation)) is not None
    ):
        return ready
    top, left, height, width = part
    return scaled(whole(image)[:, top : top + height, left : left + width], size, interpolation, pixels)


def resize(image: Tensor | Picture, size: int | tuple[int, int], interpolation: str, pixels: str) -> Tensor:
    """Scale a picture, antialiased: its shorter side to ``size``, or so that it just covers (height, width).

    ``pixels``: by which kernel, see ``Recipe``. Raises ``BadImage`` for one so thin that the result would be too large.
    """
    height, width = image.shape[1:]
    scale = size / min(height, width) if isinstance(size, int) else max(size[0] / height, size[1] / width)
    if height * scale * width * scale > LIMIT:
        raise BadImage(f"{width:,} x {height:,} pixels is too thin: its shorter side would become {size}")
    shorter = min(height, width)
    wanted = (
        (int(size * height / shorter), int(size * width / shorter))  # as torchvision rounds
        if isinstance(size, int)
        else (round(height * scale), round(width * scale))
    )
    return cut(image, (0, 0, height, width), wanted, interpolation, pixels)


def scaled(image: Tensor, size: tuple[int, int], interpolation: str, pixels: str) -> Tensor:
    """uint8 (3, H, W) to (3, *size), antialiased."""
    if image.shape[1:] == size:
        return image
    if pixels == "v1":
        return TF.resize(image, list(size), InterpolationMode(interpolation), antialias=True)
    return F.interpolate(image[None], size, mode=interpolation, antialias=True)[0]


def normalise(images: Tensor, recipe: Recipe, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) on the host to normalised float32 on the device, in the recipe's memory format."""
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    x = images.to(device, non_blocking=True).to(torch.float32, memory_format=layout)
    return x.sub_(per_channel(recipe.mean, device)).div_(per_channel(recipe.std, device))


@functools.cache
def per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Channel constants for pixels in [0, 255], sent to the device once."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1) * 255


def erase(x: Tensor, probability: float, mode: str, rng: np.random.Generator, pixels: str = "v1") -> Tensor:
    """Random erasing of a normalised batch, in place; on a device without a loop over samples.

    Random Erasing Data Augmentation, Zhong et al., https://arxiv.org/abs/1708.04896, with timm's law: area
    uniform in [0.02, 1/3] of the image, log-uniform aspect in [0.3, 1/0.3], the first of ten draws that fits.
    ``mode``: "const" fills with 0, "rand" with one normal colour, "pixel" with normal noise. ``pixels``: with "v2"
    a CPU, which is better at loops than at noise, draws it for the boxes alone.
    """
    b, c, h, w = x.shape
    area = rng.uniform(0.02, 1 / 3, (b, 10)) * h * w
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3), (b, 10)))
    box_h, box_w = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
    fits = (box_h < h) & (box_w < w)
    first, row = fits.argmax(1), np.arange(b)
    box_h, box_w = box_h[row, first], box_w[row, first]
    hit = (rng.random(b) < probability) & fits.any(1)
    top = np.floor(rng.random(b) * (h - box_h + 1)).astype(int)
    left = np.floor(rng.random(b) * (w - box_w + 1)).astype(int)
    bottom = np.where(hit, top + box_h, top)  # an empty box where nothing is erased
    corners = torch.from_numpy(np.stack([top, bottom, left, left + box_w])).view(4, b, 1)
    noise_seed = int(rng.integers(2**63))
    if pixels == "v2" and x.device.type == "cpu":
        noise = torch.Generator().manual_seed(noise_seed)
        for i in np.flatnonzero(hit).tolist():
            box = x[i, :, top[i] : bottom[i], left[i] : left[i] + box_w[i]]
            shape = {"pixel": box.shape, "rand": (c, 1, 1), "const": (1, 1, 1)}[mode]
            box.copy_(torch.zeros(shape) if mode == "const" else torch.randn(shape, generator=noise))
        return x

    if x.device.type == "cuda":
        corners = corners.pin_memory()
    corners = corners.to(x.device, non_blocking=True)
    rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    inside = ((rows >= corners[0]) & (rows < corners[1]))[:, None, :, None] & (
        (columns >= corners[2]) & (columns < corners[3])
    )[:, None, None, :]
    shape = {"pixel": (b, c, h, w), "rand": (b, c, 1, 1), "const": (1, 1, 1, 1)}[mode]
    fill = torch.zeros(shape, device=x.device)
    if mode != "const":
        fill.normal_(generator=torch.Generator(x.device).manual_seed(noise_seed))
    return x.copy_(torch.where(inside, fill, x))
