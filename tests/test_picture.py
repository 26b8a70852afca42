"""With pixels v2 a large JPEG is decoded at a part of its size; the result is that of the whole, within levels."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import photo, recipe, save
from torch import Tensor

from mixup_recipes.data import images, picture
from mixup_recipes.data.decoding import BadImage, decode
from mixup_recipes.data.images import EvalTransform, TrainTransform
from mixup_recipes.data.picture import Picture, aligned, factor, lying

WIDE, HIGH = 803, 605  # no multiples of 8
SMOOTH = photo(160, 120).resize((WIDE, HIGH), Image.Resampling.BICUBIC)


def jpeg(mode: str = "RGB", orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(SMOOTH.convert(mode), "JPEG", exif=exif, quality=92, **options)


def levels(one: Tensor, other: Tensor) -> tuple[float, float, int]:
    """How far two images are from each other: on average, in 99.9 % of the values, at most."""
    assert (one.shape, one.dtype) == (other.shape, torch.uint8)
    apart = (one.int() - other.int()).abs().numpy()
    return float(apart.mean()), float(np.percentile(apart, 99.9)), int(apart.max())


def test_a_reduced_part_is_that_of_the_whole_decode_within_levels_however_the_camera_was_held():
    kinds = [("RGB", orientation, False) for orientation in range(1, 9)]
    for mode, orientation, progressive in kinds + [(mode, 6, True) for mode in ("RGB", "L", "CMYK")]:
        data = jpeg(mode, orientation, progressive=progressive)
        whole = decode(data, upright=True)
        found = Picture(data, upright=True)
        rows, columns = whole.shape[1:]
        assert found.shape == whole.shape
        for drawn, size in (((0, 0, rows, columns), (30, 40)), ((21, 38, 403, 407), (24, 25))):
            by = factor(drawn, size)
            part = aligned(lying(drawn, HIGH, WIDE, orientation), by, HIGH, WIDE)
            back = {6: 8, 8: 6}.get(orientation, orientation)
            top, left, height, width = lying(part, rows, columns, back)
            assert abs(top - drawn[0]) < by and abs(left - drawn[1]) < by and (height, width) == drawn[2:]
            reduced = found.reduced(drawn, size, "bicubic")
            expected = images.scaled(whole[:, top : top + height, left : left + width], size, "bicubic", "v2")
            mean, most, farthest = levels(reduced, expected)
            assert mean < 1 and most <= 6 and farthest <= 8, (mode, orientation, drawn)
        assert "pixels" not in vars(found)  # the whole was never decoded
    for orientation in (0, 9, 65535):
        assert Picture(jpeg(orientation=orientation), upright=True).orientation == 1


def test_it_is_decoded_whole_where_the_part_is_small_and_by_the_least_that_keeps_twice_the_size():
    assert [factor((0, 0, side, 900), (56, 56)) for side in (223, 224, 447, 448, 895, 896)] == [1, 2, 2, 4, 4, 8]
    assert Picture(jpeg()).reduced((0, 0, 300, 400), (80, 80), "bicubic") is None
    assert Picture(save(photo(640, 480), "JPEG")).reduced((0, 0, 480, 640), (30, 40), "bicubic") is None  # not large
    assert Picture(save(SMOOTH, "PNG")).reduced((0, 0, HIGH, WIDE), (30, 40), "bicubic") is None


def test_both_transforms_take_a_picture_reduced_by_v2_only_and_the_result_is_a_function_of_its_key(monkeypatch):
    data, seen = jpeg(), []
    real = Picture.reduced
    monkeypatch.setattr(picture.Picture, "reduced", lambda *given: seen.append(real(*given)) or seen[-1])
    for crop, pixels in itertools.product(("rrc", "resize", "pad"), ("v1", "v2")):
        transform = TrainTransform(recipe(train_crop=crop, pixels=pixels, hflip=0.5, scale=(0.3, 1.0)))
        found = [transform(Picture(data), (0, i)) for i in range(4)]
        assert all(map(torch.equal, found, [transform(Picture(data), (0, i)) for i in range(4)]))
        if pixels == "v1":
            assert not seen and all(map(torch.equal, found, [transform(decode(data), (0, i)) for i in range(4)]))
        else:
            assert len(seen) == 8 and all(reduced is not None for reduced in seen)
            seen.clear()
    whole, reduced = (EvalTransform(40, 32, "bicubic", "v2")(given) for given in (decode(data), Picture(data)))
    assert 0 < levels(whole, reduced)[0] < 1 and levels(whole, reduced)[2] <= 8
    by_v1 = (EvalTransform(40, 32, "bicubic")(given) for given in (decode(data), Picture(data)))
    assert torch.equal(*by_v1)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of the oddities that are planted here
def test_a_damaged_jpeg_is_bad_where_the_whole_decode_says_so_and_only_there():
    rng, transform = np.random.default_rng(0), EvalTransform(40, 32, "bilinear", "v2")
    answers = {True: 0, False: 0}
    for data in (jpeg(), jpeg(orientation=6, progressive=True)):
        cases = [data[:cut] for cut in (3, 60, 700, len(data) // 2, len(data) - 40, len(data) - 2)]
        for _ in range(15):
            damaged = bytearray(data)
            for place in rng.integers(2, 1500, 2):
                damaged[place] = rng.integers(256)
            cases.append(bytes(damaged))
        for case in cases:
            results = []
            for given in (lambda c=case: decode(c, upright=True), lambda c=case: Picture(c, upright=True)):
                try:
                    results.append(transform(given()) is not None)
                except BadImage:
                    results.append(False)
            assert results[0] == results[1]
            answers[results[0]] += 1
    assert min(answers.values()) > 5
    with pytest.raises(BadImage, match="max_image_pixels"):
        transform(Picture(jpeg(), limit=1000))
