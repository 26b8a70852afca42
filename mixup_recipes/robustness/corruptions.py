"""The 15 common corruptions of Hendrycks and Dietterich at 5 severities, and the mean corruption error (mCE).

Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019,
https://arxiv.org/abs/1903.12261; reference code https://github.com/hendrycks/robustness (8190fe3), whose laws and
strengths are written anew here on NumPy, SciPy and Pillow.

Size. The paper defines ImageNet-C at 224 x 224; its authors have strengths of their own for Tiny ImageNet-C (64) and
CIFAR-10-C (32). A picture of another size gets the strengths of the nearest of the three (``reference_side``). Within
them radii, shifts and blurs are in pixels and do not scale; zoom, pixelation, fog and frost follow the picture's sides.

Deviations.
- ``frost`` needs photographs of frost that cannot be shipped: the pattern here is made of random needles of ice, with
  the mean colour and the spread of one of the reference's five photographs. It is not the same test as ImageNet-C's.
- ImageNet-C is stored as JPEG of quality 85, which is a corruption more; here the pixels themselves are returned.
- ``glass_blur``: the reference means to swap two pixels and, by a slip with NumPy's views, copies one onto the other.
  The data sets were made so, hence it is done here too.
- ``motion_blur`` and the streaks of ``snow`` are ImageMagick's motion blur by its formula, the affine map of
  ``elastic_transform`` is OpenCV's, which rounds positions to 1/32 pixel. Nothing is 8 bits in between.
- Values are rounded at the end, where the reference cuts them off. Pictures need not be square.
- All is drawn from the generator that is given; the reference draws from NumPy's global one.

The authors' code was run beside this one on a photograph at 224, 64 and 32 pixels, all severities. Defocus, zoom,
brightness, contrast, pixelation and JPEG differ by at most half a level of 255, which is the rounding; noises, glass
blur, fog and the elastic transform lie as far from the photograph as there, within the spread of their draws. Motion
blur and snow, which need ImageMagick there, were held so against the package ``imagecorruptions``, which writes them
out.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage

from mixup_recipes.names import nearest
from mixup_recipes.robustness.fields import Array, gaussian, ice, plasma, sampled, streaks, zoomed
from mixup_recipes.typed import UserError

Strengths = tuple[tuple[Any, ...], ...]

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
NAMES = tuple(name for group in GROUPS.values() for name in group)

ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}  # fmt: skip
"""Top-1 error of AlexNet on ImageNet-C in percent, mean of five severities: the authors' numbers, which mCE takes."""


def corrupt(picture: NDArray[np.uint8], name: str, severity: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture (H, W, 3) of uint8 with a corruption of ``NAMES`` at a severity of 1 to 5; a new array of its shape.

    Raises ``UserError`` for another name, severity or kind of array.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption {name!r}; {nearest(name, NAMES)}")
    if severity not in range(1, 6):
        raise UserError(f"the severity of a corruption must be 1, 2, 3, 4 or 5, got {severity!r}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UserError(f"a picture must be uint8 of shape (H, W, 3), got {picture.dtype} {picture.shape}")
    function, strengths = CORRUPTIONS[name]
    strength = strengths[reference_side(*picture.shape[:2])][severity - 1]
    return np.rint(function(picture / 255, rng, *strength).clip(0, 1) * 255).astype(np.uint8)


def reference_side(height: int, width: int) -> int:
    """Whose strengths a picture gets: 224 ImageNet-C, 64 Tiny ImageNet-C, 32 CIFAR-10-C, nearest in ratio to its sides.

    The shorter side counts: from 120 pixels on 224, from 46 on 64.
    """
    return min((224, 64, 32), key=lambda side: abs(math.log(min(height, width) / side)))


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """CE of each corruption in percent: its summed top-1 errors as a share of AlexNet's.

    ``errors``: corruption -> top-1 errors in percent at severities 1 to 5. Raises ``UserError`` for other contents.
    AlexNet's errors are of ImageNet-C: of other data report the mean error instead.
    """
    for name, values in errors.items():
        if name not in ALEXNET:
            raise UserError(f"unknown corruption {name!r}; {nearest(name, NAMES)}")
        if len(values) != 5 or not all(0 <= value <= 100 for value in values):
            raise UserError(f"{name} needs 5 errors in percent, one for each severity, got {list(values)}")
    return {name: 100 * sum(errors[name]) / (5 * ALEXNET[name]) for name in NAMES if name in errors}


def mce(errors: Mapping[str, Sequence[float]]) -> float:
    """The mean corruption error in percent, AlexNet 100: the mean of the 15 ``corruption_errors``.

    Raises ``UserError`` unless all 15 are there.
    """
    if missing := [name for name in NAMES if name not in errors]:
        raise UserError(f"mCE needs all 15 corruptions; missing: {', '.join(missing)}")
    return sum(corruption_errors(errors).values()) / len(NAMES)


# Each corruption takes a picture x (H, W, 3) in [0, 1], the generator and its strength, and returns the same kind, not
# yet clipped.


def gaussian_noise(x: Array, rng: np.random.Generator, sigma: float) -> Array:
    """Normal noise of a standard deviation, each channel its own."""
    return x + rng.normal(scale=sigma, size=x.shape)


def shot_noise(x: Array, rng: np.random.Generator, photons: float) -> Array:
    """Counts of light, Poisson; ``photons`` come from white on average."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Array, rng: np.random.Generator, share: float) -> Array:
    """Salt and pepper: a share of all values becomes 0 or 1, one as likely as the other."""
    hit, kind = rng.random((2, *x.shape))
    return np.where(hit < share, kind < 0.5, x)


def defocus_blur(x: Array, rng: np.random.Generator, radius: float, softness: float) -> Array:
    """A lens out of focus: the mean over a disk, whose edge a Gaussian of ``softness`` pixels has smoothed."""
    reach, edge = (8, 1) if radius <= 8 else (int(radius), 2)
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(float)
    disk /= disk.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, gaussian(np.arange(-edge, edge + 1), softness), axis, mode="mirror")
    # Hundreds of weights: by Fourier transforms of the picture, mirrored at its borders
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    size = padded.shape[:2]
    product = fft.rfft2(padded, axes=(0, 1)) * fft.rfft2(disk, size)[..., None]
    return fft.irfft2(product, size, axes=(0, 1))[2 * reach :, 2 * reach :]


def glass_blur(x: Array, rng: np.random.Generator, sigma: float, reach: int, rounds: int) -> Array:
    """Frosted glass: between two Gaussian blurs each pixel takes, one after the other, that of a near place.

    In each round from the last pixel to the first; a place that had its turn hands on what it took itself. The order
    makes it a loop, over places in a list of Python: they are moved first, the pixels once.
    """
    x = ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
    height, width = x.shape[:2]
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    turn = (rows[:, None] * width + columns).ravel()
    places = list(range(height * width))
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, len(turn)))
        for here, there in zip(turn.tolist(), (turn + down * width + right).tolist(), strict=True):
            places[here] = places[there]
    return ndimage.gaussian_filter(x.reshape(-1, 3)[places].reshape(x.shape), (sigma, sigma, 0), mode="nearest")


def motion_blur(x: Array, rng: np.random.Generator, radius: int, sigma: float) -> Array:
    """A moved camera: streaks at -45 to 45 degrees."""
    return streaks(x, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(x: Array, rng: np.random.Generator, end: float, step: float) -> Array:
    """A camera moved forwards: the mean of the picture and of it zoomed by 1, 1 + step, ... up to ``end``."""
    factors = np.arange(1, end, step)
    return (x + sum(zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(
    x: Array,
    rng: np.random.Generator,
    mean: float,
    spread: float,
    zoom: float,
    least: float,
    radius: int,
    sigma: float,
    kept: float,
) -> Array:
    """Flakes, which are enlarged noise above ``least``, in streaks over a picture that is whitened by ``1 - kept``."""
    flakes = zoomed(rng.normal(mean, spread, x.shape[:2]), zoom)
    flakes = np.where(flakes < least, 0, flakes).clip(0, 1)
    flakes = streaks(flakes, radius, sigma, rng.uniform(-135, -45))[..., None]
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    return kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5) + flakes + np.rot90(flakes, 2)


def frost(x: Array, rng: np.random.Generator, kept: float, added: float, scale: float) -> Array:
    """Ice on a window before the picture; ``scale`` below 1 makes its pattern finer."""
    height, width = x.shape[:2]
    pane = ice(math.ceil(height / scale), math.ceil(width / scale), rng)
    if scale < 1:
        pane = np.asarray(as_image(pane).resize((width, height), Image.Resampling.BILINEAR)) / 255
    return kept * x + added * pane


def fog(x: Array, rng: np.random.Generator, amount: float, decay: float) -> Array:
    """Clouds of white added, and the whole darkened so that the brightest can stay what it was."""
    height, width = x.shape[:2]
    brightest = x.max()
    mist = plasma(max(height, width), decay, rng)[:height, :width, None]
    return (x + amount * mist) * brightest / (brightest + amount)


def brightness(x: Array, rng: np.random.Generator, amount: float) -> Array:
    """The value (of hue, saturation, value) raised: the largest channel, the others in proportion."""
    value = x.max(2, keepdims=True)
    raised = np.minimum(value + amount, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def contrast(x: Array, rng: np.random.Generator, factor: float) -> Array:
    """Each channel drawn in towards its mean."""
    mean = x.mean((0, 1))
    return (x - mean) * factor + mean


def elastic_transform(x: Array, rng: np.random.Generator, amount: float, sigma: float, jitter: float) -> Array:
    """Stretched: an affine map that moves three points by up to ``jitter``, then smooth random shifts of each pixel."""
    height, width = x.shape[:2]
    centre, arm = np.array([height // 2, width // 2]), min(height, width) // 3
    points = centre + arm * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = points + rng.uniform(-jitter, jitter, (3, 2))[:, ::-1]
    back = np.linalg.solve(np.c_[moved, np.ones(3)], points)  # from where a pixel of the result comes
    grid = np.indices((height, width)).astype(float)
    x = sampled(x, np.tensordot(back[:2], grid, (0, 0)) + back[2][:, None, None], "mirror")
    across, down = (
        amount * ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), sigma, mode="reflect", truncate=3)
        for _ in range(2)
    )
    return sampled(x, grid + np.stack([down, across]), "reflect")


def pixelate(x: Array, rng: np.random.Generator, share: float) -> Array:
    """Made smaller, to ``share`` of its sides, and as large as before again, with boxes."""
    height, width = x.shape[:2]
    small = as_image(x).resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(x: Array, rng: np.random.Generator, quality: int) -> Array:
    """Written as JPEG and read again."""
    file = io.BytesIO()
    as_image(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def as_image(x: Array) -> Image.Image:
    """The same as a picture of 8 bits."""
    return Image.fromarray(np.rint(x.clip(0, 1) * 255).astype(np.uint8))


def each(*values: float) -> Strengths:
    """Five strengths of one number each."""
    return tuple((value,) for value in values)


CORRUPTIONS: dict[str, tuple[Callable[..., Array], dict[int, Strengths]]] = {
    "gaussian_noise": (gaussian_noise, {
        224: each(0.08, 0.12, 0.18, 0.26, 0.38), 64: each(0.04, 0.08, 0.12, 0.15, 0.18),
        32: each(0.04, 0.06, 0.08, 0.09, 0.1),
    }),
    "shot_noise": (shot_noise, {
        224: each(60, 25, 12, 5, 3), 64: each(250, 100, 50, 30, 15), 32: each(500, 250, 100, 75, 50),
    }),
    "impulse_noise": (impulse_noise, {
        224: each(0.03, 0.06, 0.09, 0.17, 0.27), 64: each(0.01, 0.02, 0.05, 0.08, 0.14),
        32: each(0.01, 0.02, 0.03, 0.05, 0.07),
    }),
    "defocus_blur": (defocus_blur, {
        224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    }),
    "glass_blur": (glass_blur, {
        224: ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    }),
    "motion_blur": (motion_blur, {
        224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), 64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    }),
    "zoom_blur": (zoom_blur, {
        224: ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        64: ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        32: ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    }),
    "snow": (snow, {
        224: (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        64: (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8), (0.1, 0.2, 1, 0.5, 10, 4, 0.8), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        32: (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    }),
    "frost": (frost, {
        224: ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
        64: ((1, 0.3, 0.3), (0.9, 0.4, 0.3), (0.8, 0.45, 0.3), (0.75, 0.5, 0.3), (0.7, 0.55, 0.3)),
        32: ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
    }),
    "fog": (fog, {
        224: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        64: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    }),
    "brightness": (brightness, {
        224: each(0.1, 0.2, 0.3, 0.4, 0.5), 64: each(0.1, 0.2, 0.3, 0.4, 0.5), 32: each(0.05, 0.1, 0.15, 0.2, 0.3),
    }),
    "contrast": (contrast, {
        224: each(0.4, 0.3, 0.2, 0.1, 0.05), 64: each(0.4, 0.3, 0.2, 0.1, 0.05), 32: each(0.75, 0.5, 0.4, 0.3, 0.15),
    }),
    "elastic_transform": (elastic_transform, {
        224: ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
        64: ((0, 0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84), (6.4, 1.92, 1.92), (10.24, 1.92, 1.28)),
        32: ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    }),
    "pixelate": (pixelate, {
        224: each(0.6, 0.5, 0.4, 0.3, 0.25), 64: each(0.9, 0.8, 0.7, 0.6, 0.5), 32: each(0.95, 0.9, 0.85, 0.75, 0.65),
    }),
    "jpeg_compression": (jpeg_compression, {
        224: each(25, 18, 15, 10, 7), 64: each(65, 58, 50, 40, 25), 32: each(80, 65, 58, 50, 40),
    }),
}  # fmt: skip
"""Name -> its function, and its five strengths by ``reference_side``, as the authors' three scripts have them."""
