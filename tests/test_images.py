"""From encoded bytes to erased batches: decoding, crops, flips, RandAugment, normalising and random erasing."""

import contextlib
import dataclasses
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from mixup_recipes.data import keys
from mixup_recipes.data.images import (
    BadImage,
    EvalTransform,
    TrainTransform,
    decode,
    erase,
    normalise,
    rand_augment,
    to_tensor,
)
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe

CPU = torch.device("cpu")
POLICY = "rand-m9-mstd0.5-inc1"
ORIENTATION = 0x0112  # the EXIF tag


def recipe(**changes: Any) -> Recipe:
    """A small recipe that changes nothing about an image but its crop."""
    return dataclasses.replace(Recipe(image_size=32, hflip=0.0), **changes)


def photo(width: int = 61, height: int = 47, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, like a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + rng.integers(-12, 13, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> Tensor:
    return to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) * 50)


def transparent_palette() -> bytes:
    return save(photo(mode="P"), "PNG", transparency=3)


# --------------------------------------------------------------------------------------------- decoding

ENCODED = {
    "jpeg": lambda: save(photo(), "JPEG", quality=90),
    "jpeg, no subsampling": lambda: save(photo(), "JPEG", subsampling=0),
    "jpeg, odd size": lambda: save(photo(17, 33), "JPEG", subsampling=2),
    "jpeg, one pixel": lambda: save(photo(1, 1), "JPEG"),
    "jpeg, grey": lambda: save(photo(mode="L"), "JPEG"),
    "jpeg, cmyk": lambda: save(photo(mode="CMYK"), "JPEG"),
    "jpeg, progressive": lambda: save(photo(), "JPEG", progressive=True),
    "jpeg, progressive and grey": lambda: save(photo(mode="L"), "JPEG", progressive=True),
    "jpeg, optimised": lambda: save(photo(), "JPEG", optimize=True, quality=50),
    "jpeg with something behind it": lambda: save(photo(), "JPEG") + b"trailing",
    "png": lambda: save(photo(), "PNG"),
    "png, palette": lambda: save(photo(mode="P"), "PNG"),
    "png, transparent palette": transparent_palette,
    "png, rgba": lambda: save(photo(mode="RGBA"), "PNG"),
    "png, grey": lambda: save(photo(mode="L"), "PNG"),
    "png, grey and alpha": lambda: save(photo(mode="LA"), "PNG"),
    "png, black and white": lambda: save(photo(mode="1"), "PNG"),
    "png, 16 bits": lambda: save(sixteen_bits(), "PNG"),
    "webp": lambda: save(photo(), "WEBP"),
    "webp, lossless": lambda: save(photo(), "WEBP", lossless=True),
    "gif": lambda: save(photo(), "GIF"),
    "bmp": lambda: save(photo(), "BMP"),
    "tiff": lambda: save(photo(), "TIFF"),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_every_format_decodes_to_the_pixels_of_pillow(kind: str) -> None:
    data = ENCODED[kind]()
    image = decode(data)
    assert (image.dtype, image.shape[0]) == (torch.uint8, 3)
    torch.testing.assert_close(image, by_pillow(data), rtol=0, atol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_never_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    rotated, plain = save(photo(), kind, exif=exif), save(photo(), kind)
    assert Image.open(io.BytesIO(rotated)).getexif()[ORIENTATION] == orientation
    assert torch.equal(decode(rotated), decode(plain))


JPEG, PNG, WEBP = save(photo(), "JPEG"), save(photo(), "PNG"), save(photo(), "WEBP")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"garbage" * 100, b"<html>404</html>", bytes(5000)]
    + [data[: int(len(data) * share)] for data in (JPEG, PNG, WEBP) for share in (0.1, 0.5, 0.9)]
    + [JPEG[:-30], b"\xff\xd8" + b"\x00" * 500],
    ids=lambda data: f"{len(data)} bytes",
)
def test_a_truncated_or_unknown_image_is_a_bad_image(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert str(caught.value)
    assert "object at" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of the oddities that are planted here
def test_damaged_bytes_give_an_image_or_a_bad_image_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for data in (JPEG, PNG, WEBP, save(photo(), "GIF"), save(photo(), "BMP")):
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 400), 4):
                damaged[place] = rng.integers(256)
            with contextlib.suppress(BadImage):
                assert decode(bytes(damaged)).dtype == torch.uint8


# --------------------------------------------------------------------------------------------- training images


def transformed(image: Tensor, changes: dict[str, Any], *key: int) -> Tensor:
    keys.seed_everything(keys.SAMPLE, *key)
    return TrainTransform(recipe(**changes))(image)


@pytest.mark.parametrize("crop", ["rrc", "pad", "resize"])
@pytest.mark.parametrize("aa", [None, POLICY])
@pytest.mark.parametrize("size", [(61, 47), (47, 61), (32, 32), (5, 90), (1, 1)])
def test_a_training_image_is_square_and_a_function_of_its_key(crop: str, aa: str | None, size: tuple) -> None:
    image = to_tensor(photo(*size))
    before = image.clone()
    changes = {"train_crop": crop, "aa": aa, "hflip": 0.5}
    first = transformed(image, changes, 0, 1, 2, 3)
    assert (first.shape, first.dtype) == ((3, 32, 32), torch.uint8)
    assert torch.equal(first, transformed(image, changes, 0, 1, 2, 3))
    assert torch.equal(image, before)


def test_another_key_is_another_draw() -> None:
    image = to_tensor(photo())
    for changes in ({}, {"train_crop": "pad"}, {"train_crop": "resize", "aa": POLICY}):
        draws = {transformed(image, changes, 0, 0, 0, copy).numpy().tobytes() for copy in range(10)}
        assert len(draws) > 5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_resized_crop_is_that_of_pillow(interpolation: str) -> None:
    image = photo(120, 90)
    for index in range(20):
        changes = {"interpolation": interpolation}
        ours = transformed(to_tensor(image), changes, index)
        keys.seed_everything(keys.SAMPLE, index)
        top, left, height, width = RandomResizedCrop.get_params(to_tensor(image), [0.08, 1.0], [3 / 4, 4 / 3])
        box = image.crop((left, top, left + width, top + height))
        theirs = to_tensor(box.resize((32, 32), Image.Resampling[interpolation.upper()]))
        assert (ours.int() - theirs.int()).abs().max() <= 2


def test_the_resized_crop_keeps_its_range_of_areas() -> None:
    marked = torch.zeros(3, 64, 64, dtype=torch.uint8)
    marked[0] = torch.arange(64).view(64, 1) * 4  # rows and columns can be read off the colours
    marked[1] = torch.arange(64).view(1, 64) * 4
    for scale, low, high in (((1.0, 1.0), 0.9, 1.1), ((0.2, 0.3), 0.15, 0.35)):
        changes = {"scale": scale, "ratio": (1.0, 1.0), "interpolation": "bilinear"}
        for index in range(50):
            out = transformed(marked, changes, index).float()
            rows = (out[0, -1].mean() - out[0, 0].mean()) / 4 * 32 / 31
            columns = (out[1, :, -1].mean() - out[1, :, 0].mean()) / 4 * 32 / 31
            assert low < rows * columns / 64**2 < high


def test_an_image_is_flipped_with_the_given_probability() -> None:
    image = to_tensor(photo(32, 32))
    for probability in (0.0, 0.3, 1.0):
        changes = {"train_crop": "resize", "hflip": probability}
        outs = [transformed(image, changes, index) for index in range(400)]
        flips = sum(torch.equal(out, image.flip(-1)) for out in outs)
        assert flips + sum(torch.equal(out, image) for out in outs) == 400
        assert stats.binomtest(flips, 400, probability).pvalue > 1e-3


def padded_crops(image: Tensor) -> dict[bytes, tuple[int, int]]:
    """All crops of an image with a reflected border of 4 pixels, and where they begin."""
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    return {padded[:, i : i + 32, j : j + 32].tobytes(): (i, j) for i in range(9) for j in range(9)}


def test_the_padded_crop_is_uniform_and_reflects_after_bringing_an_image_to_the_training_size() -> None:
    image = to_tensor(photo(32, 32))
    crops, seen = padded_crops(image), np.zeros((9, 9), dtype=int)
    assert len(crops) == 81
    for index in range(1620):
        seen[crops[transformed(image, {"train_crop": "pad"}, index).numpy().tobytes()]] += 1
    assert stats.chisquare(seen.ravel()).pvalue > 1e-3
    larger = to_tensor(photo(64, 48))
    crops = padded_crops(EvalTransform(32, 32, "bicubic")(larger))
    for index in range(20):
        assert transformed(larger, {"train_crop": "pad"}, index).numpy().tobytes() in crops


def test_without_cropping_a_training_image_is_an_evaluation_image() -> None:
    image = to_tensor(photo())
    assert torch.equal(transformed(image, {"train_crop": "resize"}, 0), EvalTransform(32, 32, "bicubic")(image))


# --------------------------------------------------------------------------------------------- RandAugment


def timm_policy(image_size: int = 32) -> Any:
    """timm's own policy as its loader would make it."""
    mean = tuple(min(255, round(255 * m)) for m in Recipe.mean)
    extra = {"translate_const": int(image_size * 0.45), "img_mean": mean, "interpolation": str_to_pil_interp("bicubic")}
    return rand_augment_transform(POLICY, extra)


def test_randaugment_never_fails_and_is_that_of_timm_wherever_that_works() -> None:
    ours, theirs, image = rand_augment(recipe(), POLICY), timm_policy(), photo(32, 32)
    compared = failed = 0
    for index in range(2500):
        keys.seed_everything(keys.SAMPLE, index)
        out = ours(image)
        assert (out.size, out.mode) == ((32, 32), "RGB")
        keys.seed_everything(keys.SAMPLE, index)
        try:
            expected = theirs(image)
        except ValueError:  # timm asks this Pillow for 0 bits
            failed += 1
            continue
        compared += 1
        assert out.tobytes() == expected.tobytes()
    assert compared > 2400
    assert failed + compared == 2500


def test_posterising_keeps_the_leading_bits_and_none_of_them_is_black() -> None:
    policy, image = rand_augment(recipe(), POLICY), photo(32, 32)
    (posterise,) = [op.aug_fn for op in policy.ops if op.name.startswith("Posterize")]
    for bits in range(1, 8):
        assert posterise(image, bits).tobytes() == ImageOps.posterize(image, bits).tobytes()
    assert posterise(image, 8).tobytes() == posterise(image, 9).tobytes() == image.tobytes()
    for bits in (0, -1):
        black = posterise(image, bits)
        assert (black.size, black.mode, black.getextrema()) == ((32, 32), "RGB", ((0, 0),) * 3)


# --------------------------------------------------------------------------------------------- evaluation images


@pytest.mark.parametrize("size", [(120, 90), (90, 120), (100, 100), (300, 60), (20, 30)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_evaluation_image_is_the_centre_of_the_resized_photo(size: tuple, interpolation: str) -> None:
    image = photo(*size)
    out = EvalTransform(40, 32, interpolation)(to_tensor(image))
    width, height = (40, int(40 * size[1] / size[0])) if size[0] <= size[1] else (int(40 * size[0] / size[1]), 40)
    resized = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    expected = to_tensor(resized.crop((left, top, left + 32, top + 32)))
    assert (out.shape, out.dtype) == ((3, 32, 32), torch.uint8)
    assert (out.int() - expected.int()).abs().max() <= 2


def test_an_evaluation_image_of_the_right_size_is_left_alone() -> None:
    image = to_tensor(photo(32, 32))
    assert torch.equal(EvalTransform(32, 32, "bicubic")(image), image)


# --------------------------------------------------------------------------------------------- normalising


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalising_is_the_formula_in_the_asked_layout(channels_last: bool) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7), dtype=np.uint8))
    before = images.clone()
    r = recipe(channels_last=channels_last, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    x = normalise(images, r, CPU)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (r.mean, r.std))
    np.testing.assert_allclose(x.numpy(), (images.numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(images, before)


# --------------------------------------------------------------------------------------------- random erasing


def erased(probability: float, mode: str = "pixel", seed: int = 0, shape: tuple = (64, 3, 32, 48)) -> Tensor:
    """What is left of a batch whose every pixel is 9."""
    return erase(torch.full(shape, 9.0), probability, mode, np.random.default_rng(seed))


def holes(x: Tensor) -> np.ndarray:
    """Top, bottom, left, right of what was erased from each image, and nothing but a rectangle was; (0, 0, 0, 0)."""
    found = np.zeros((len(x), 4), dtype=int)
    for i, gone in enumerate((x != 9).numpy()):
        assert (gone == gone[0]).all()  # the same in every channel
        rows, columns = np.flatnonzero(gone[0].any(1)), np.flatnonzero(gone[0].any(0))
        if len(rows):
            found[i] = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
            assert gone[0].sum() == len(rows) * len(columns) == np.prod(found[i, 1::2] - found[i, ::2])
    return found


def test_erasing_never_at_probability_0_always_at_1_and_not_where_no_box_fits() -> None:
    assert torch.equal(erased(0.0), torch.full((64, 3, 32, 48), 9.0))
    assert holes(erased(1.0))[:, 1].all()
    assert torch.equal(erased(1.0, shape=(8, 3, 1, 1)), torch.full((8, 3, 1, 1), 9.0))


def test_erasing_is_a_function_of_its_generator_and_keeps_the_memory_layout() -> None:
    assert torch.equal(erased(0.5), erased(0.5))
    assert not torch.equal(erased(0.5), erased(0.5, seed=1))
    state = torch.get_rng_state()
    x = torch.full((64, 3, 32, 48), 9.0).to(memory_format=torch.channels_last)
    out = erase(x, 1.0, "pixel", np.random.default_rng(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, erased(1.0))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_works_in_place_and_leaves_all_other_pixels_bit_for_bit(mode: str) -> None:
    x = torch.randn(16, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    out = erase(x, 0.6, mode, np.random.default_rng(3))
    assert out is x
    top, bottom, left, right = holes(erase(torch.full_like(x, 9.0), 0.6, mode, np.random.default_rng(3))).T
    for i in range(16):
        inside = torch.zeros(20, 20, dtype=torch.bool)
        inside[top[i] : bottom[i], left[i] : right[i]] = True
        assert torch.equal(out[i][:, ~inside], before[i][:, ~inside])
        if inside.any():
            assert not torch.equal(out[i][:, inside], before[i][:, inside])


def test_erased_boxes_fill_with_zeros_or_one_colour_or_noise() -> None:
    boxes = holes(erased(1.0))
    for mode in ("const", "rand", "pixel"):
        values = []
        for image, (top, bottom, left, right) in zip(erased(1.0, mode), boxes, strict=True):
            hole = image[:, top:bottom, left:right].flatten(1)
            if mode == "const":
                assert not hole.any()
            elif mode == "rand":
                assert torch.equal(hole, hole[:, :1].expand_as(hole))
                values += hole[:, 0].tolist()
            else:
                values += hole.flatten().tolist()
        if values:
            assert stats.kstest(values, "norm").pvalue > 1e-3
            assert len(set(values)) > 0.99 * len(values)


def timm_erased(probability: float, count: int, seed: int = 0) -> Tensor:
    keys.seed_everything(keys.SAMPLE, seed)
    operation = RandomErasing(probability=probability, mode="const", max_count=1, device="cpu")
    return operation(torch.full((count, 3, 32, 48), 9.0))


def test_erased_boxes_follow_the_law_of_timm() -> None:
    count = 6000
    ours, theirs = holes(erased(0.4, "const", shape=(count, 3, 32, 48))), holes(timm_erased(0.4, count))
    hits = [int((h[:, 1] > 0).sum()) for h in (ours, theirs)]
    assert stats.binomtest(hits[0], count, 0.4).pvalue > 1e-3
    assert abs(hits[0] - hits[1]) < 4 * math.sqrt(2 * count * 0.4 * 0.6)
    measured = []
    for found in (ours, theirs):
        top, bottom, left, right = found[found[:, 1] > 0].T
        assert (top >= 0).all() and (bottom <= 32).all() and (left >= 0).all() and (right <= 48).all()
        height, width = bottom - top, right - left
        measured.append([height * width / (32 * 48), height / width, top / (32 - height), left / (48 - width)])
    for ours_, theirs_ in zip(*measured, strict=True):  # area, aspect, place
        assert stats.ks_2samp(ours_, theirs_).pvalue > 1e-3
    assert measured[0][0].mean() == pytest.approx(measured[1][0].mean(), abs=0.01)  # four standard errors
    assert measured[0][0].min() > 0.01 and measured[0][0].max() < 0.36


def test_transforms_travel_to_loader_processes_that_are_not_forked() -> None:
    transform = TrainTransform(load_recipe("deit_s_deit"))
    copy = pickle.loads(pickle.dumps(transform))
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 240, 240), dtype=np.uint8))
    for draw in range(3):
        drawn = []
        for one in (transform, copy):
            keys.seed_everything(keys.SAMPLE, draw, 0, 0)
            drawn.append(one(image))
        assert torch.equal(*drawn)
