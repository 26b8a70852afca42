"""From encoded bytes to erased batches: decoding, crops, flips, RandAugment, normalising and random erasing."""

import contextlib
import dataclasses
import io
import itertools
import math
import pickle
import random
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from timm.data import auto_augment
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from mixup_recipes.data import decoding, images, keys, policy
from mixup_recipes.data.decoding import BadImage, decode, to_tensor
from mixup_recipes.data.images import EvalTransform, TrainTransform, erase
from mixup_recipes.data.policy import rand_augment, tensor
from mixup_recipes.recipe import Recipe

POLICY = "rand-m9-mstd0.5-inc1"


def recipe(**changes: Any) -> Recipe:
    """A small recipe that changes nothing about an image but its crop."""
    return dataclasses.replace(Recipe(image_size=32, hflip=0.0), **changes)


def photo(width: int = 61, height: int = 47, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise, like a photo."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + rng.integers(-12, 13, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_format_decodes_to_the_pixels_of_pillow():
    jpegs = [("RGB", {}), ("RGB", {"subsampling": 0}), ("RGB", {"progressive": True}), ("L", {"progressive": True})]
    jpegs += [("RGB", {"quality": 90}), ("RGB", {"optimize": True, "quality": 50}), ("L", {}), ("CMYK", {})]
    kinds = [(mode, "JPEG", options) for mode, options in jpegs]
    kinds += [(mode, "PNG", {}) for mode in ("RGB", "P", "RGBA", "L", "LA", "1")] + [("P", "PNG", {"transparency": 3})]
    kinds += [("RGB", kind, {}) for kind in ("WEBP", "GIF", "BMP", "TIFF")] + [("RGB", "WEBP", {"lossless": True})]
    files = {str(kind): save(photo(mode=kind[0]), kind[1], **kind[2]) for kind in kinds}
    files |= {"odd size": save(photo(17, 33), "JPEG", subsampling=2), "one pixel": save(photo(1, 1), "JPEG")}
    files |= {"something behind it": JPEG + b"trailing"}
    for name, data in files.items():
        image, by_pillow = decode(data), to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (image.dtype, image.shape[0]) == (torch.uint8, 3), name
        assert torch.equal(image, by_pillow), name


def test_exif_orientation_is_never_applied():
    tag, exif = 0x0112, Image.Exif()
    for kind, orientation in itertools.product(("JPEG", "PNG", "WEBP", "TIFF"), range(1, 9)):
        exif[tag] = orientation
        rotated = save(photo(), kind, exif=exif)
        assert Image.open(io.BytesIO(rotated)).getexif()[tag] == orientation
        assert torch.equal(decode(rotated), decode(save(photo(), kind))), (kind, orientation)


JPEG, PNG, WEBP = save(photo(), "JPEG"), save(photo(), "PNG"), save(photo(), "WEBP")


def test_a_truncated_or_unknown_image_is_a_bad_image():
    bad = [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"garbage" * 100, b"<html>404</html>", bytes(5000)]
    bad += [data[: int(len(data) * share)] for data in (JPEG, PNG, WEBP) for share in (0.1, 0.5, 0.9)]
    for data in (*bad, JPEG[:-30], b"\xff\xd8" + b"\x00" * 500):
        with pytest.raises(BadImage) as caught:
            decode(data)
        assert str(caught.value) and "object at" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of the oddities that are planted here
def test_damaged_bytes_give_an_image_or_a_bad_image_and_nothing_else():
    rng = np.random.default_rng(0)
    for data in (JPEG, PNG, WEBP, save(photo(), "GIF"), save(photo(), "BMP")):
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 400), 4):
                damaged[place] = rng.integers(256)
            with contextlib.suppress(BadImage):
                assert decode(bytes(damaged)).dtype == torch.uint8


@pytest.mark.filterwarnings("ignore")
def test_a_jpeg_whose_head_is_read_here_is_the_one_that_pillow_opens(monkeypatch):
    """The same picture, or none from both, of damaged files too."""
    exif, rng, answers = Image.Exif(), np.random.default_rng(0), []
    exif[0x0112] = 6
    good = [
        JPEG,
        save(photo(), "JPEG", exif=exif),
        save(photo(), "JPEG", progressive=True),
        save(photo(mode="L"), "JPEG"),
    ]
    cases = []
    for data in good:
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(2, min(len(data), 700), rng.integers(0, 3)):
                damaged[place] = rng.integers(256)
            cases.append(bytes(damaged))
    assert decoding.jpeg_head(JPEG) == (61, 47, False) and decoding.jpeg_head(good[1]) == (61, 47, True)
    for head in (decoding.jpeg_head, lambda data: None):
        monkeypatch.setattr(decoding, "jpeg_head", head)
        for data, upright in itertools.product(cases, (False, True)):
            try:
                answers.append(decode(data, upright=upright))
            except BadImage:
                answers.append(None)
    pairs = [*zip(answers[: len(answers) // 2], answers[len(answers) // 2 :], strict=True)]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    assert len(both) > 100 and all(torch.equal(a, b) for a, b in both)
    assert sum((a is None) != (b is None) for a, b in pairs) <= 2  # whose head Pillow refuses


def transformed(image: Tensor, changes: dict[str, Any], *key: int) -> Tensor:
    return TrainTransform(recipe(**changes))(image, key)


def test_a_training_image_is_square_and_a_function_of_its_key():
    for crop, aa, pixels in itertools.product(("rrc", "pad", "resize"), (None, POLICY), ("v1", "v2")):
        changes = {"train_crop": crop, "aa": aa, "hflip": 0.5, "pixels": pixels}
        for size in ((61, 47), (47, 61), (32, 32), (5, 90), (1, 1)):
            image = to_tensor(photo(*size))
            before = image.clone()
            first = transformed(image, changes, 0, 1, 2, 3)
            assert (first.shape, first.dtype) == ((3, 32, 32), torch.uint8)
            torch.rand(1), random.random(), np.random.rand()
            copy = pickle.loads(pickle.dumps(TrainTransform(recipe(**changes))))  # for loaders that are not forked
            assert torch.equal(first, copy(image, (0, 1, 2, 3))) and torch.equal(image, before)
    for changes in ({}, {"train_crop": "pad"}, {"train_crop": "resize", "aa": POLICY}):  # another key, another draw
        assert len({transformed(to_tensor(photo()), changes, 0, 0, 0, i).numpy().tobytes() for i in range(10)}) > 5


def test_a_crop_has_the_law_of_torchvision_and_where_none_fits_its_place():
    image, scale, ratio = torch.zeros(3, 90, 120, dtype=torch.uint8), (0.08, 1.0), (3 / 4, 4 / 3)
    measured = []
    for draw in (None, np.random.default_rng(0)):
        torch.manual_seed(0)
        boxes = np.array([images.box(image, scale, ratio, draw) for _ in range(4000)])
        top, left, height, width = boxes.T
        assert (boxes >= 0).all() and (top + height <= 90).all() and (left + width <= 120).all()
        measured.append((height * width, width / height, top / (91 - height), left / (121 - width)))
    for theirs, ours in zip(*measured, strict=True):
        assert stats.ks_2samp(theirs, ours).pvalue > 1e-3
    for size in ((9, 200), (200, 9), (1, 1)):  # nothing fits: the centre
        thin = torch.zeros(3, *size, dtype=torch.uint8)
        assert images.box(thin, (1.0, 1.0), ratio, np.random.default_rng(0)) == images.box(thin, (1, 1), ratio, None)


METHODS = ("bilinear", "bicubic")


def test_a_resized_crop_is_that_of_pillow_within_the_range_of_areas():
    image, boxes = photo(120, 90), (((0.08, 1.0), (3 / 4, 4 / 3)), ((0.2, 0.3), (1.0, 1.0)), ((1.0, 1.0), (1.2, 1.3)))
    for (scale, ratio), method, pixels, index in itertools.product(boxes, METHODS, ("v1", "v2"), range(20)):
        given = {"interpolation": method, "scale": scale, "ratio": ratio, "pixels": pixels}
        ours = transformed(to_tensor(image), given, index)
        if pixels == "v1":
            keys.seed_everything(keys.SAMPLE, index)
            top, left, height, width = RandomResizedCrop.get_params(to_tensor(image), list(scale), list(ratio))
        else:
            top, left, height, width = images.box(to_tensor(image), scale, ratio, keys.rng(keys.SAMPLE, index))
        assert 0.95 * scale[0] < height * width / (120 * 90) < 1.05 * scale[1]
        box = image.crop((left, top, left + width, top + height))
        theirs = to_tensor(box.resize((32, 32), Image.Resampling[method.upper()]))
        assert (ours.int() - theirs.int()).abs().max() <= 2


def test_both_ways_to_scale_are_within_levels_of_each_other_and_one_that_is_not_said_is_v1():
    image, farthest = to_tensor(photo(120, 90)), {}
    for method, index in itertools.product(METHODS, range(50)):
        top, left, height, width = images.box(image, (0.08, 1.0), (3 / 4, 4 / 3), keys.rng(keys.SAMPLE, index))
        part = image[:, top : top + height, left : left + width]
        v1, v2 = (images.scaled(part, (32, 32), method, pixels) for pixels in ("v1", "v2"))
        farthest[method] = max(farthest.get(method, 0), int((v1.int() - v2.int()).abs().max()))
    assert 1 <= farthest["bilinear"] <= 2 and 1 <= farthest["bicubic"] <= 6
    wide = decode(save(photo(90, 60), "JPEG"))
    assert not wide.is_contiguous()  # the channels last, as libjpeg leaves it
    assert torch.equal(transformed(image, {}, 0, 1), transformed(image, {"pixels": "v1"}, 0, 1))
    assert not torch.equal(transformed(image, {}, 0, 1), transformed(image, {"pixels": "v2"}, 0, 1))
    for pixels in ("v1", "v2"):
        transform = EvalTransform(40, 32, "bicubic", pixels)
        assert torch.equal(transform(wide), transform(wide.contiguous()))
    assert EvalTransform.of(recipe(pixels="v2")).pixels == "v2" and Recipe().pixels == "v1"


def test_an_image_is_flipped_with_the_given_probability():
    image = to_tensor(photo(32, 32))
    for probability, pixels in itertools.product((0.0, 0.3, 1.0), ("v1", "v2")):
        changes = {"train_crop": "resize", "hflip": probability, "pixels": pixels}
        outs = [transformed(image, changes, index) for index in range(400)]
        flips = sum(torch.equal(out, image.flip(-1)) for out in outs)
        assert flips + sum(torch.equal(out, image) for out in outs) == 400
        assert stats.binomtest(flips, 400, probability).pvalue > 1e-3


BORDERS: dict[str, Literal["reflect", "constant"]] = {"pad": "reflect", "pad_zeros": "constant"}


def padded_crops(image: Tensor, crop: str) -> dict[bytes, tuple[int, int]]:
    """All crops of an image with a border of 4 pixels, and where they begin."""
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode=BORDERS[crop])
    return {padded[:, i : i + 32, j : j + 32].tobytes(): (i, j) for i in range(9) for j in range(9)}


@pytest.mark.parametrize("crop", BORDERS)
def test_the_padded_crop_is_uniform_with_its_border_after_bringing_an_image_to_the_training_size(crop):
    image, larger = to_tensor(photo(32, 32)), to_tensor(photo(64, 48))
    crops = padded_crops(image, crop)
    for pixels in ("v1", "v2"):
        seen = np.zeros((9, 9), dtype=int)
        for index in range(1620):
            seen[crops[transformed(image, {"train_crop": crop, "pixels": pixels}, index).numpy().tobytes()]] += 1
        assert stats.chisquare(seen.ravel()).pvalue > 1e-3
    crops = padded_crops(EvalTransform(32, 32, "bicubic")(larger), crop)
    assert all(transformed(larger, {"train_crop": crop}, i).numpy().tobytes() in crops for i in range(20))


def test_randaugment_never_fails_and_is_that_of_timm_wherever_that_works():
    mean = tuple(min(255, round(255 * m)) for m in Recipe.mean)
    extra = {"translate_const": int(32 * 0.45), "img_mean": mean, "interpolation": str_to_pil_interp("bicubic")}
    ours, theirs, image = rand_augment(recipe(aa=POLICY)), rand_augment_transform(POLICY, extra), photo(32, 32)
    assert rand_augment(recipe()) is None
    compared = 0
    for index in range(2500):
        keys.seed_everything(keys.SAMPLE, index)
        out = ours(to_tensor(image))
        assert tensor(out).shape == (3, 32, 32)
        keys.seed_everything(keys.SAMPLE, index)
        with contextlib.suppress(ValueError):  # timm asks this Pillow for 0 bits
            expected = theirs(image)
            compared += 1
            assert torch.equal(tensor(out), to_tensor(expected))
    assert compared > 2400
    posterise = policy.posterize
    assert posterise(image, 8).tobytes() == posterise(image, 9).tobytes() == image.tobytes()
    assert posterise(image, 7).tobytes() == ImageOps.posterize(image, 7).tobytes()
    for black in (posterise(image, 0), posterise(image, -1)):  # none of the bits is kept
        assert (black.size, black.mode, black.getextrema()) == ((32, 32), "RGB", ((0, 0),) * 3)


MOVES: dict[str, Callable[..., Image.Image]] = {
    "ShearX": auto_augment.shear_x,
    "ShearY": auto_augment.shear_y,
    "TranslateXRel": auto_augment.translate_x_rel,
    "TranslateYRel": auto_augment.translate_y_rel,
}


def test_shears_and_translations_are_those_of_pillow_to_the_level():
    rng, given = np.random.default_rng(0), {"fillcolor": (124, 116, 104)}
    functions = {op.name: op.aug_fn for op in rand_augment(recipe(aa=POLICY, pixels="v2")).ops}
    assert {name for name, function in functions.items() if function.func is policy.move} == set(MOVES)
    apart = []
    for (name, theirs), turn in itertools.product(MOVES.items(), range(30)):
        height, width = rng.integers(1, 90, 2).tolist()
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = noise if turn % 2 else noise.resize((7, 5)).resize((width, height), Image.Resampling.BICUBIC)
        amount = (0.0, 0.25, -0.5, 1.5, -3.0)[turn] if turn < 5 else rng.uniform(-0.6, 0.6)
        expected = to_tensor(theirs(image, amount, resample=Image.Resampling.BICUBIC, **given)).int()
        found = functions[name](to_tensor(image), amount, resample=Image.Resampling.BICUBIC, **given).int()
        assert (found - expected).abs().max() <= 1, (name, amount)
        apart.append((found != expected).float().mean().item())
    assert np.mean(apart) < 1e-3 and np.median(apart) == 0


def test_an_evaluation_image_is_the_centre_of_the_resized_photo():
    sizes = ((120, 90), (90, 120), (100, 100), (300, 60), (20, 30))
    for size, interpolation, pixels in itertools.product(sizes, METHODS, ("v1", "v2")):
        out = EvalTransform(40, 32, interpolation, pixels)(to_tensor(photo(*size)))
        width, height = (40, int(40 * size[1] / size[0])) if size[0] <= size[1] else (int(40 * size[0] / size[1]), 40)
        resized = photo(*size).resize((width, height), Image.Resampling[interpolation.upper()])
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        expected = to_tensor(resized.crop((left, top, left + 32, top + 32)))
        assert (out.shape, out.dtype) == ((3, 32, 32), torch.uint8)
        assert (out.int() - expected.int()).abs().max() <= 2, (size, interpolation)
    fits, image, transform = to_tensor(photo(32, 32)), to_tensor(photo()), EvalTransform(32, 32, "bicubic")
    assert torch.equal(transform(fits), fits)
    for pixels in ("v1", "v2"):  # as training without a crop
        transform = EvalTransform(32, 32, "bicubic", pixels)
        assert torch.equal(transform(image), transformed(image, {"train_crop": "resize", "pixels": pixels}, 0))


def test_normalising_is_the_formula_in_the_asked_layout():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7), dtype=np.uint8))
    before = pixels.clone()
    for last, layout in ((False, torch.contiguous_format), (True, torch.channels_last)):
        r = recipe(channels_last=last, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
        x = images.normalise(pixels, r, torch.device("cpu"))
        mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (r.mean, r.std))
        np.testing.assert_allclose(x.numpy(), (pixels.numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-6)
        assert x.dtype == torch.float32 and x.is_contiguous(memory_format=layout)
    assert torch.equal(pixels, before)


NINES = torch.full((64, 3, 32, 48), 9.0)


@pytest.fixture(params=["v1", "v2"])
def erased(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """What is left of a batch whose every pixel is 9."""

    def erased(probability: float, mode: str = "pixel", seed: int = 0, x: Tensor = NINES) -> Tensor:
        return erase(x.clone(), probability, mode, np.random.default_rng(seed), request.param)

    erased.pixels = request.param  # type: ignore[attr-defined]
    return erased


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


def test_erasing_never_at_probability_0_always_at_1_and_not_where_no_box_fits_as_its_generator_says(erased):
    assert torch.equal(erased(0.0), NINES)
    assert holes(erased(1.0))[:, 1].all()
    assert torch.equal(erased(1.0, x=NINES[..., :1, :1]), NINES[..., :1, :1])
    state = torch.get_rng_state()
    assert torch.equal(erased(0.5), erased(0.5)) and not torch.equal(erased(0.5), erased(0.5, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    out = erased(1.0, x=NINES.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last) and torch.equal(out, erased(1.0))


def test_erasing_in_place_leaves_all_other_pixels_and_fills_boxes_with_zeros_or_one_colour_or_noise(erased):
    before = torch.randn(128, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    boxes, filled = holes(erased(0.6, x=torch.full_like(before, 9.0))), {"const": [], "rand": [], "pixel": []}
    for mode, found in filled.items():
        x = before.clone()
        assert erase(x, 0.6, mode, np.random.default_rng(0), erased.pixels) is x
        for image, old, (top, bottom, left, right) in zip(x, before, boxes, strict=True):
            found += [image[:, top:bottom, left:right].flatten(1).clone()] if bottom else []
            image[:, top:bottom, left:right] = old[:, top:bottom, left:right]
        assert torch.equal(x, before)
    assert not any(hole.any() for hole in filled["const"])
    assert all(torch.equal(hole, hole[:, :1].expand_as(hole)) for hole in filled["rand"])
    for values in (torch.cat([hole[:, 0] for hole in filled["rand"]]), torch.cat([h.ravel() for h in filled["pixel"]])):
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
        assert len(values.unique()) > 0.99 * len(values)


def test_erased_boxes_follow_the_law_of_timm(erased):
    count, measured = 6000, []
    nines = torch.full((count, 3, 32, 48), 9.0)
    ours = holes(erased(0.4, "const", x=nines))
    keys.seed_everything(keys.SAMPLE, 0)
    theirs = holes(RandomErasing(probability=0.4, mode="const", max_count=1, device="cpu")(nines))
    hits = [int((h[:, 1] > 0).sum()) for h in (ours, theirs)]
    assert stats.binomtest(hits[0], count, 0.4).pvalue > 1e-3
    assert abs(hits[0] - hits[1]) < 4 * math.sqrt(2 * count * 0.4 * 0.6)
    for found in (ours, theirs):
        top, bottom, left, right = found[found[:, 1] > 0].T
        height, width = bottom - top, right - left
        measured.append([height * width / (32 * 48), height / width, top / (32 - height), left / (48 - width)])
    for mine, other in zip(*measured, strict=True):  # area, aspect, place
        assert stats.ks_2samp(mine, other).pvalue > 1e-3
    assert measured[0][0].mean() == pytest.approx(measured[1][0].mean(), abs=0.01)  # four standard errors
    assert measured[0][0].min() > 0.01 and measured[0][0].max() < 0.36
