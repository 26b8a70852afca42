"""The formulas against slow, obvious references, and against timm."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from timm.data.mixup import Mixup as TimmMixup
from timm.data.mixup import mixup_target
from torch import Tensor

from mixers import CutMix, FMix, GridMix, Mixup, ResizeMix, SaliencyMix, SmoothMix, Switch, ops, resizemix, saliencymix

INDEX = torch.tensor([3, 1, 0, 4, 2])
# Rounding of one blend in each type, in units of values of size 1.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2}

both_types = pytest.mark.parametrize("dtype", ROUNDING)
both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def formula(x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """``mask*x + (1-mask)*x[index]`` in float64."""
    x, mask = x.detach().double(), mask.detach().double()
    return mask * x + (1 - mask) * x[index]


def random_batch(dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, (5, 3, 4, 6))).to(dtype).contiguous(memory_format=layout)
    return x, torch.from_numpy(rng.dirichlet(np.ones(4), 5).astype(np.float32))


def random_mask(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).random(shape, dtype=np.float32))


@both_types
@both_layouts
@pytest.mark.parametrize("mask_shape", [(5, 1, 1, 1), (5, 1, 4, 6)], ids=["constant", "per pixel"])
# A row a chunk, three chunks, one chunk, image by image.
@pytest.mark.parametrize(("chunk", "large"), [(1, 2**15), (144, 2**15), (2**19, 2**15), (2**19, 72)])
def test_blend_is_the_formula_for_every_pixel(dtype, layout, mask_shape, chunk, large, monkeypatch):
    monkeypatch.setattr(ops, "CPU_CHUNK", chunk)
    monkeypatch.setattr(ops, "CPU_LARGE", large)
    (x, _), mask = random_batch(dtype, layout), random_mask(*mask_shape)
    mixed = ops.blend(x, INDEX, mask)
    torch.testing.assert_close(mixed.double(), formula(x, INDEX, mask), atol=ROUNDING[dtype], rtol=0)
    assert mixed.is_contiguous(memory_format=layout)
    assert torch.equal(mixed, ops.blend(x, INDEX, mask.requires_grad_()).detach())  # bit for bit as with gradient


def test_gradient_of_the_mask_is_own_pixel_minus_partner_pixel_and_that_of_images_arrives_at_both():
    x, mask = random_batch()[0].requires_grad_(), random_mask(5, 1, 4, 6).requires_grad_()
    ops.blend(x, INDEX, mask).sum().backward()
    torch.testing.assert_close(mask.grad, (x - x[INDEX]).sum(1, keepdim=True).detach())
    torch.testing.assert_close(x.grad, mask.index_add(0, INDEX, 1 - mask).detach().expand(x.shape))


@both_types
def test_targets_and_hidden_features_of_any_rank_are_blended_too(dtype):
    y, lam, tokens = random_batch()[1].to(dtype), random_mask(5), random_mask(5, 7, 8)
    mixed = ops.blend_targets(y, INDEX, lam)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), formula(y, INDEX, lam[:, None]), atol=ROUNDING[dtype], rtol=0)
    lam = lam[:, None, None]
    torch.testing.assert_close(ops.blend(tokens, INDEX, lam), formula(tokens, INDEX, lam).float())


@both_types
@pytest.mark.parametrize(
    "mixer",
    [Mixup(), CutMix(), Switch([Mixup(), CutMix()]), SmoothMix(), GridMix(), FMix(), FMix(max_soft=0.3), SaliencyMix()],
    ids=lambda mixer: type(mixer).__name__,
)
def test_mixers_do_what_their_plan_says_and_a_mask_without_lambda_gives_its_mean_as_label_share(mixer, dtype):
    x, y = random_batch(dtype)
    for i in range(6):
        plan = mixer.plan(x, y, np.random.default_rng((3, i)))
        share = plan["mask"].expand(5, 1, 4, 6).double().mean((1, 2, 3))
        for given in (plan, plan | {"lam": None}):
            mixed, target = mixer.mix(x, y, **given)
            expected = formula(x, plan["index"], plan["mask"])
            torch.testing.assert_close(mixed.double(), expected, atol=ROUNDING[dtype], rtol=0)
            expected = formula(y, plan["index"], share[:, None])
            torch.testing.assert_close(target.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.85, 1.0])
def test_mixup_equals_timm_for_the_same_lambda_and_partner(lam, monkeypatch):
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((4, 3, 8, 8), dtype=np.float32))
    labels = torch.tensor([0, 2, 1, 2])
    timm_mixup = TimmMixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=3)
    monkeypatch.setattr(timm_mixup, "_params_per_batch", lambda: (lam, False))
    smoothed = mixup_target(labels, 3, lam=1.0, smoothing=0.1)
    ours = Mixup().mix(x, smoothed, index=torch.arange(4).flip(0), mask=torch.full((4, 1, 1, 1), lam))
    torch.testing.assert_close(ours, timm_mixup(x.clone(), labels), atol=1e-6, rtol=1e-6)


# The mixers whose mask is drawn, each against its definition pixel by pixel, with the numbers that its plan drew.


def blank(height: int, width: int, size: int = 2):
    return torch.zeros(size, 3, height, width), torch.ones(size, 1)


def assert_mask(plan: dict, expected: np.ndarray, atol: float = 0.0) -> None:
    """Both images have the mask, and its mean as label share."""
    both = np.broadcast_to(expected, (2, 1, *expected.shape))
    np.testing.assert_allclose(plan["mask"].numpy(), both, rtol=0, atol=atol)
    np.testing.assert_allclose(plan["lam"].numpy(), expected.mean(), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (13, 7), (1, 6)])
def test_cutmix_mask_is_the_box_of_the_paper(height, width):
    for i in range(60):
        rng = np.random.default_rng((5, i))
        lam, row, column = rng.beta(1.0, 1.0), rng.integers(height), rng.integers(width)
        half_height, half_width = (math.floor(side * math.sqrt(1 - lam)) // 2 for side in (height, width))
        expected = np.ones((height, width))
        for y, x in itertools.product(range(height), range(width)):
            if -half_height <= y - row < half_height and -half_width <= x - column < half_width:
                expected[y, x] = 0
        assert_mask(CutMix(1.0).plan(*blank(height, width), np.random.default_rng((5, i))), expected)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20), (9, 5)])
def test_smoothmix_mask_is_one_minus_the_gaussian_and_swapped_labels_differ_in_the_label_only(height, width):
    rows, columns = np.ogrid[:height, :width]
    for i in range(5):
        plan, swapped = (
            SmoothMix(None, swap).plan(*blank(height, width), np.random.default_rng((6, i))) for swap in (False, True)
        )
        rng = np.random.default_rng((6, i))
        spread = math.sqrt(height * width) * rng.uniform(0.25, 0.5)
        # Places whose distance to the middle of the image is a whole number: [-4, 4) for 8 pixels, [-4, 4] for 9.
        row, column = ((n - 1) / 2 + rng.integers(-(n // 2), n // 2 + n % 2) for n in (height, width))
        assert_mask(plan, 1 - np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * spread**2)), atol=1e-6)
        assert torch.equal(plan["mask"], swapped["mask"]) and torch.equal(plan["index"], swapped["index"])
        torch.testing.assert_close(plan["lam"] + swapped["lam"], torch.ones(2))
        assert not torch.allclose(plan["lam"], swapped["lam"])


def grid_by_holes(height: int, width: int, rng: np.random.Generator, clip: bool, har: float = 1.0) -> np.ndarray:
    """GridMixup's mask, hole by hole: 0 in the holes. Python counts a negative bound from the far side."""
    lam = rng.beta(0.2, 0.2)
    across, area_ratio, aspect = rng.integers(2, 7), rng.uniform(0.5, 1), rng.uniform(0.5, 2)
    crop_w = int(math.sqrt(int(height * width * area_ratio) / aspect))
    crop_h = int(crop_w * aspect)
    if clip:
        crop_w, crop_h = min(crop_w, width), min(crop_h, height)
    left, top = int((width - crop_w) * rng.random()), int((height - crop_h) * rng.random())
    patch_w = math.ceil(crop_w / across)
    patch_h = max(int(patch_w * har), 1)
    hole_w, hole_h = (min(max(int(side * math.sqrt(1 - lam)), 1), side - 1) for side in (patch_w, patch_h))
    mask = np.ones((height, width))
    for i, j in itertools.product(range(across + 1), range(math.ceil(crop_h / patch_h) + 1)):
        x1, y1 = min(patch_w * i, crop_w), min(patch_h * j, crop_h)
        x2, y2 = min(x1 + hole_w, crop_w), min(y1 + hole_h, crop_h)
        mask[top + y1 : top + y2, left + x1 : left + x2] = 0
    return mask


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("height", "width", "har"), [(8, 8, 1.0), (40, 24, 1.0), (24, 40, 0.5), (32, 32, 2.0)])
def test_gridmix_mask_is_its_holes(height, width, har, clip):
    beyond = 0
    for i in range(40):
        expected = grid_by_holes(height, width, np.random.default_rng((8, i)), clip, har)
        mixer = GridMix(hole_aspect_ratio=har, clip=clip)
        assert_mask(mixer.plan(*blank(height, width), np.random.default_rng((8, i))), expected)
        beyond += not np.array_equal(expected, grid_by_holes(height, width, np.random.default_rng((8, i)), True, har))
    assert beyond == 0 if clip else beyond > 0


def fmix_image(height: int, width: int, rng: np.random.Generator, isotropic: bool, decay: float) -> np.ndarray:
    """The grey image, with numpy's transform in float64, from the spectrum as its authors index it."""
    draws = rng.standard_normal((2, height, width // 2 + 1) if isotropic else (2, width // 2 + 1, 2))
    scaled = np.zeros((height, width // 2 + 1, 2))
    for y, x in itertools.product(range(height), range(width // 2 + 1)):
        frequency = math.hypot(min(y, height - y) / height, x / width)
        numbers = draws[:, y, x] if isotropic else draws[y, x] if y < 2 else np.zeros(2)
        scaled[y, x] = numbers / max(frequency, 1 / max(height, width)) ** decay
    parts = np.moveaxis(scaled, 2, 0) if isotropic else scaled  # the published code splits the rows, not the parts
    return np.fft.irfftn(parts[0] + 1j * parts[1], (height, width), axes=(0, 1))


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("max_soft", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20), (20, 12)])
def test_fmix_mask_is_the_brightest_pixels_of_the_given_spectrum(height, width, max_soft, isotropic):
    pixels = height * width
    for i in range(6):
        (alpha, decay), rng = ((1.0, 3.0), (0.2, 3.0), (1.0, 1.5))[i % 3], np.random.default_rng((9, i))
        mixer = FMix(alpha, decay, max_soft=max_soft, isotropic=isotropic)
        plan = mixer.plan(*blank(height, width), np.random.default_rng((9, i)))
        lam = rng.beta(alpha, alpha)
        kept = math.ceil(lam * pixels) if rng.random() < 0.5 else math.floor(lam * pixels)
        soft = math.floor(pixels * min(max_soft, lam, 1 - lam))
        weights = [1.0] * (kept - soft) + [*np.linspace(1, 0, 2 * soft)] + [0.0] * (pixels - kept - soft)
        expected = np.zeros((height, width))
        expected.flat[np.argsort(-fmix_image(height, width, rng, isotropic, decay).flatten())] = weights
        assert_mask(plan, expected, atol=1e-6)
        assert abs(expected.mean() - lam) * pixels < 1


def test_reformulated_fmix_keeps_the_own_label():
    x, y = random_batch()
    plan = FMix(reformulate=True).plan(x, y, np.random.default_rng(10))
    mixed, target = FMix(reformulate=True).mix(x, y, **plan)
    assert torch.equal(target, y) and not torch.equal(mixed, x)
    assert abs(plan["mask"].mean().item() - np.random.default_rng(10).beta(2, 1)) * 24 < 1


@pytest.mark.parametrize(("large", "with_gradient"), [(2**15, False), (1, False), (1, True)])  # at once, by image
@both_layouts
@pytest.mark.parametrize("placement", ["clip", "inside"])
@both_types
def test_resizemix_pastes_the_whole_partner_shrunk(dtype, placement, layout, large, with_gradient, monkeypatch):
    monkeypatch.setattr(ops, "CPU_LARGE", large)
    mixer = ResizeMix(placement=placement)
    x = torch.from_numpy(np.random.default_rng(11).standard_normal((5, 3, 12, 17))).to(dtype)
    x, y = x.contiguous(memory_format=layout), torch.eye(5)
    for i in range(6):
        plan = mixer.plan(x, y, np.random.default_rng((12, i)))
        mixed, target = mixer.mix(x.clone().requires_grad_(with_gradient), y, **plan)
        expected, share = x.clone(), torch.ones(5, 1)
        for n, (top, bottom, left, right) in enumerate(plan["box"].expand(5, 4).tolist()):
            partner, sides = x[plan["index"][n]], (bottom - top, right - left)
            expected[n, :, top:bottom, left:right] = F.interpolate(partner[None], sides, mode="nearest")[0]
            share[n] -= math.prod(sides) / (12 * 17)
        assert torch.equal(mixed.detach(), expected) and mixed.is_contiguous(memory_format=layout)
        torch.testing.assert_close(target.double(), formula(y, plan["index"], share), atol=1e-6, rtol=0)


@pytest.mark.parametrize("placement", ["clip", "inside"])
@pytest.mark.parametrize(
    ("alpha", "use_alpha", "scope"), [(1.0, True, (0.1, 0.8)), (0.2, True, (0.1, 0.8)), (0.2, False, (0.3, 0.4))]
)
def test_resizemix_boxes_have_a_scale_in_scope_and_their_place(placement, alpha, use_alpha, scope):
    sides = (40, 10)
    mixer = ResizeMix(alpha, scope, use_alpha, placement)
    for i in range(200):
        rng, expected = np.random.default_rng((13, i)), []
        scale = rng.beta(alpha, alpha) if use_alpha else rng.uniform(*scope)
        if not scope[0] <= scale <= scope[1]:
            scale = rng.uniform(*scope)
        rng.permutation(5)
        for centre in rng.integers(sides, size=(1 if placement == "clip" else 5, 2)):
            box = []
            for side, place in zip(sides, centre, strict=True):
                if placement == "clip":  # one for the batch
                    half = max(int(side * scale) // 2, 1)
                    box += [max(place - half, 0), min(place + half, side)]
                else:  # one for each sample, shifted to lie inside
                    size = max(int(side * scale), 1)
                    first = min(max(place - size // 2, 0), side - size)
                    box += [first, first + size]
            expected.append(box)
        assert mixer.plan(*blank(*sides, 5), np.random.default_rng((13, i)))["box"].tolist() == expected


@pytest.mark.parametrize("length", [7, 32, 64, 160, 224, 288])
def test_shrinking_by_gather_equals_interpolate_at_every_size(length):
    line, sizes = torch.arange(float(length)), torch.arange(1, length + 1)
    rows, inside = resizemix.source(length, torch.zeros_like(sizes), sizes)
    for size in range(1, length + 1):
        expected = F.interpolate(line[None, None], size=size, mode="nearest")[0, 0]
        assert torch.equal(line[rows[size - 1]][inside[size - 1]], expected)


def window_sums(values: np.ndarray, n: int) -> np.ndarray:
    """Sums over the rows ``y - n + 1 ... y + n`` that there are, and such columns."""
    for axis in (0, 1):
        padded = np.pad(values, [(n - 1, n) if axis == side else (0, 0) for side in (0, 1)])
        values = sliding_window_view(padded, 2 * n, axis).sum(-1)
    return values


def slow_saliency(grey: np.ndarray) -> np.ndarray:
    """Fine-grained saliency (H, W) of a grey image 0 ... 255 of integers, window by window."""
    for _ in range(2):
        mirrored = sliding_window_view(np.pad(grey, 1, mode="reflect"), (3, 3))
        grey = ((mirrored * np.outer([1, 2, 1], [1, 2, 1])).sum((2, 3)) + 8) // 16
    on, off = np.zeros(grey.shape), np.zeros(grey.shape)
    for n in (12, 24, 28, 48, 56, 112):
        others = (window_sums(grey, n) - grey) / (window_sums(np.ones_like(grey), n) - 1)
        on += np.floor(np.maximum(grey - others, 0))
        off += np.floor(np.maximum(others - grey, 0))
    return sum(np.floor(255 * cells / max(cells.max(), 1)) for cells in (on, off))


def pictures(size: int, height: int, width: int) -> np.ndarray:
    """uint8 RGB images (n, H, W, 3): a dull noisy ground with one bright or dark blob each."""
    rng = np.random.default_rng(13)
    out = rng.normal(120, 8, (size, height, width, 3))
    for n in range(size):
        y, x = rng.integers(height), rng.integers(width)
        out[n, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] += (1 if n % 2 else -1) * rng.uniform(40, 110, 3)
    return out.round().clip(0, 255).astype(np.uint8)


def normalised(images: np.ndarray, mean, std) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).float()


MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)


def luma(images: np.ndarray) -> np.ndarray:
    return (images @ np.array([0.299, 0.587, 0.114])).round().astype(np.int64)


def brightest(image: np.ndarray) -> list[int]:
    return np.argwhere(image == image.max())[0].tolist()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 31), (40, 26), (9, 130)])
def test_saliency_equals_loops_over_windows(height, width, monkeypatch):
    images = pictures(3, height, width)
    mixer, x = SaliencyMix(mean=MEAN, std=STD), normalised(images, MEAN, STD)
    np.testing.assert_array_equal(mixer.grey(x).numpy(), luma(images))
    expected = np.stack([slow_saliency(grey) for grey in luma(images)])
    for chunk in (1, 2**17):  # an image at a time, and all at once
        monkeypatch.setattr(ops, "CPU_CHUNK", chunk)
        np.testing.assert_array_equal(saliencymix.fine_grained_saliency(mixer.grey(x)).numpy(), expected)
        assert mixer.salient_pixel(x).tolist() == [brightest(one) for one in expected]


def test_saliency_of_a_large_image_is_exact_and_without_contrast_the_middle_is_salient():
    # Sums beyond 2**24: there are no odd numbers in float32 any more.
    grey = np.random.default_rng(15).integers(150, 256, (300, 300))
    saliency = saliencymix.fine_grained_saliency(torch.from_numpy(grey).float()[None])[0]
    np.testing.assert_array_equal(saliency.numpy(), slow_saliency(grey))
    assert SaliencyMix().salient_pixel(torch.full((2, 3, 9, 14), 0.3)).tolist() == [[4, 7], [4, 7]]


@pytest.mark.parametrize("side", [64, 224])
def test_saliency_equals_opencv(side):
    cv2 = pytest.importorskip("cv2", reason="needs the extra: oracle")
    if not hasattr(cv2, "saliency"):
        pytest.skip("needs opencv-contrib, from the extra: oracle")
    for image in pictures(6, side, side):
        oracle = cv2.saliency.StaticSaliencyFineGrained_create()
        done, theirs = oracle.computeSaliency(np.ascontiguousarray(image[..., ::-1]))
        theirs, mixer = (theirs * 255).round(), SaliencyMix()
        x = normalised(image[None], mixer.mean, mixer.std)
        ours = saliencymix.fine_grained_saliency(mixer.grey(x))[0].numpy()
        assert done and (ours % 256 == theirs).mean() > 0.98  # the rest: OpenCV stores sums up to 510 in a byte
        assert mixer.salient_pixel(x).tolist() == [brightest(theirs)]


@pytest.mark.parametrize(("height", "width"), [(24, 36), (8, 8)])
def test_saliencymix_pastes_a_box_around_the_salient_pixel_of_the_partner(height, width):
    images = pictures(5, height, width)
    x, y = normalised(images, MEAN, STD), torch.eye(5)
    places = [brightest(slow_saliency(grey)) for grey in luma(images)]
    for i, box_from in itertools.product(range(6), ("each", "first")):
        plan = SaliencyMix(box_from=box_from, mean=MEAN, std=STD).plan(x, y, np.random.default_rng((14, i)))
        lam = np.random.default_rng((14, i)).beta(1, 1)
        half_h, half_w = int(height * math.sqrt(1 - lam)) // 2, int(width * math.sqrt(1 - lam)) // 2
        expected = np.ones((5, 1, height, width), dtype=np.float32)
        for n in range(5):
            row, column = places[plan["index"][n if box_from == "each" else 0]]
            expected[n, 0, max(row - half_h, 0) : row + half_h, max(column - half_w, 0) : column + half_w] = 0
        np.testing.assert_array_equal(plan["mask"].numpy(), expected)
        np.testing.assert_allclose(plan["lam"].numpy(), expected.mean((1, 2, 3)), atol=1e-6)
