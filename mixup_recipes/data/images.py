"""What happens to decoded images: crops and RandAugment on the CPU, the rest on the device.

Images are uint8 tensors (3, H, W), RGB.
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
from torchvision.transforms import InterpolationMode, RandomCrop, RandomResizedCrop
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import functional as TF2

from mixup_recipes.data.decoding import LIMIT, BadImage, to_tensor
from mixup_recipes.recipe import Recipe

Transform = Callable[[Tensor], Tensor]
"""uint8 (3, H, W) to uint8 (3, S, S): ``TrainTransform`` or ``EvalTransform``."""
KERNELS: dict[str, Any] = {"v1": TF, "v2": TF2}
"""What scales a picture, by the recipe's ``pixels``."""


class TrainTransform:
    """Crop, flip and RandAugment of one image; draws from the global generators, which the loader has keyed."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.interpolation = InterpolationMode(recipe.interpolation)
        self.rand_augment = rand_augment(recipe, recipe.aa) if recipe.aa else None

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) to uint8 (3, image_size, image_size)."""
        r, size = self.recipe, [self.recipe.image_size] * 2
        if r.train_crop == "rrc":
            box = RandomResizedCrop.get_params(image, list(r.scale), list(r.ratio))
            scaled = KERNELS[r.pixels].resized_crop
            image = scaled(image, *box, size, self.interpolation, antialias=True)
        elif r.train_crop == "pad":
            if list(image.shape[1:]) != size:
                image = TF.center_crop(resize(image, r.image_size, self.interpolation, r.pixels), size)
            image = TF.pad(image, [r.image_size // 8], padding_mode="reflect")
            image = TF.crop(image, *RandomCrop.get_params(image, tuple(size)))
        else:
            image = TF.center_crop(resize(image, r.image_size, self.interpolation, r.pixels), size)
        if torch.rand(()) < r.hflip:
            image = image.flip(-1)
        if self.rand_augment is not None:
            image = to_tensor(self.rand_augment(TF.to_pil_image(image)))
        return image


class EvalTransform:
    """Resize the picture so that it covers ``resize``, then take the centre: uint8 (3, H, W) to uint8 (3, *size).

    A number means a square; for a square the shorter side becomes ``resize``.
    """

    def __init__(
        self, resize: int | tuple[int, int], size: int | tuple[int, int], interpolation: str, pixels: str = "v1"
    ):
        self.resize, self.pixels = resize, pixels
        self.size = [size, size] if isinstance(size, int) else list(size)
        self.interpolation = InterpolationMode(interpolation)

    @classmethod
    def of(cls, recipe: Recipe) -> "EvalTransform":
        """As a recipe says."""
        return cls(recipe.eval_resize, recipe.eval_size, recipe.interpolation, recipe.pixels)

    def __str__(self) -> str:
        height, width = self.size
        wanted = self.resize if isinstance(self.resize, int) else " x ".join(map(str, self.resize))
        return f"{wanted} -> {height if height == width else f'{height} x {width}'} px {self.interpolation.value}"

    def __call__(self, image: Tensor) -> Tensor:
        return TF.center_crop(resize(image, self.resize, self.interpolation, self.pixels), self.size)


def resize(image: Tensor, size: int | tuple[int, int], interpolation: InterpolationMode, pixels: str) -> Tensor:
    """Scale a picture, antialiased: its shorter side to ``size``, or so that it just covers (height, width).

    ``pixels``: by which kernel, see ``Recipe``.

    Raises ``BadImage`` for one so thin that the result would be too large.
    """
    height, width = image.shape[1:]
    scale = size / min(height, width) if isinstance(size, int) else max(size[0] / height, size[1] / width)
    if height * scale * width * scale > LIMIT:
        raise BadImage(f"{width:,} x {height:,} pixels is too thin: its shorter side becomes {size}")
    wanted = size if isinstance(size, int) else [round(height * scale), round(width * scale)]
    scaled: Tensor = KERNELS[pixels].resize(image, wanted, interpolation, antialias=True)
    return scaled


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation, with a black image for fewer than one bit."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def rand_augment(recipe: Recipe, policy: str) -> Any:
    """timm's RandAugment by its policy string, with one operation mended.

    The "increasing" posterise can ask for 0 bits, which Pillow before 13 answered with a black image and
    Pillow 13 refuses; here it is the black image again.
    """
    hparams = {
        "translate_const": int(recipe.image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * m)) for m in recipe.mean),
        "interpolation": str_to_pil_interp(recipe.interpolation),
    }
    augment = rand_augment_transform(policy, hparams)
    for op in augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = posterize
    return augment


def normalise(images: Tensor, recipe: Recipe, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) on the host to normalised float32 on the device, in the recipe's memory format."""
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    x = images.to(device, non_blocking=True).to(torch.float32, memory_format=layout)
    return x.sub_(per_channel(recipe.mean, device)).div_(per_channel(recipe.std, device))


@functools.cache
def per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Channel constants for pixels in [0, 255], sent to the device once."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1) * 255


def erase(x: Tensor, probability: float, mode: str, rng: np.random.Generator) -> Tensor:
    """Random erasing of a normalised batch, in place, without a loop over samples.

    Random Erasing Data Augmentation, Zhong et al., https://arxiv.org/abs/1708.04896, with timm's law: area
    uniform in [0.02, 1/3] of the image, log-uniform aspect in [0.3, 1/0.3], the first of ten draws that fits.
    ``mode``: "const" fills with 0, "rand" with one normal colour, "pixel" with normal noise.
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
