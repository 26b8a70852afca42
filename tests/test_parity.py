"""The formulas against slow, obvious loops over pixels, and against timm."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup as TimmMixup
from timm.data.mixup import mixup_target
from torch import Tensor

from mixers import CutMix, FMix, GridMix, Mixup, ResizeMix, SaliencyMix, SmoothMix, Switch, ops, resizemix, saliencymix

SHAPE = (5, 3, 4, 6)
INDEX = [3, 1, 0, 4, 2]

# Rounding of one blend in each type, in units of values of size 1.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def slow_blend(x: Tensor, index: list[int], mask: Tensor) -> Tensor:
    """``mask*x + (1-mask)*x[index]`` in float64, one pixel at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    mask = mask.detach().double().expand(len(x), 1, *x.shape[2:])
    for n, c, i, j in itertools.product(*map(range, x.shape)):
        m = mask[n, 0, i, j].item()
        out[n, c, i, j] = m * x[n, c, i, j].item() + (1 - m) * x[index[n], c, i, j].item()
    return out


def slow_targets(y: Tensor, index: list[int], lam: list[float]) -> Tensor:
    out = torch.zeros(y.shape, dtype=torch.float64)
    for n, k in itertools.product(*map(range, y.shape)):
        out[n, k] = lam[n] * y[n, k].item() + (1 - lam[n]) * y[index[n], k].item()
    return out


def random_batch(dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, SHAPE)).to(dtype).contiguous(memory_format=layout)
    y = torch.from_numpy(rng.dirichlet(np.ones(4), SHAPE[0]).astype(np.float32))
    return x, y


def random_mask(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).random(shape, dtype=np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mask_shape", [(5, 1, 1, 1), (5, 1, 4, 6)], ids=["constant", "per pixel"])
@pytest.mark.parametrize(
    ("chunk", "large"), [(1, 2**15), (144, 2**15), (2**19, 2**15), (2**19, 72)],
    ids=["a row a chunk", "three chunks", "one chunk", "image by image"],
)  # fmt: skip
def test_blend_is_the_formula_for_every_pixel(dtype, layout, mask_shape, chunk, large, monkeypatch) -> None:
    monkeypatch.setattr(ops, "CPU_CHUNK", chunk)
    monkeypatch.setattr(ops, "CPU_LARGE", large)
    x, _ = random_batch(dtype, layout)
    mask = random_mask(*mask_shape)
    mixed = ops.blend(x, torch.tensor(INDEX), mask)
    torch.testing.assert_close(mixed.double(), slow_blend(x, INDEX, mask), atol=ROUNDING[dtype], rtol=0)
    assert mixed.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("large", [2**15, 1], ids=["in chunks", "image by image"])
def test_blend_on_a_cpu_equals_blend_with_gradient_bit_for_bit(large: int, monkeypatch) -> None:
    monkeypatch.setattr(ops, "CPU_CHUNK", 2 * 3 * 4 * 6)
    monkeypatch.setattr(ops, "CPU_LARGE", large)
    x, _ = random_batch()
    mask = random_mask(5, 1, 4, 6)
    whole = ops.blend(x, torch.tensor(INDEX), mask.clone().requires_grad_())
    assert torch.equal(ops.blend(x, torch.tensor(INDEX), mask), whole.detach())


def test_blend_works_on_hidden_features_of_any_rank() -> None:
    tokens = torch.from_numpy(np.random.default_rng(2).random((5, 7, 8), dtype=np.float32))
    lam = random_mask(5, 1, 1)
    expected = torch.stack([lam[n] * tokens[n] + (1 - lam[n]) * tokens[INDEX[n]] for n in range(5)])
    torch.testing.assert_close(ops.blend(tokens, torch.tensor(INDEX), lam), expected)


def test_gradient_of_the_mask_is_own_pixel_minus_partner_pixel_and_that_of_images_arrives_at_both() -> None:
    x, _ = random_batch()
    x.requires_grad_()
    mask = random_mask(5, 1, 4, 6).requires_grad_()
    ops.blend(x, torch.tensor(INDEX), mask).sum().backward()
    torch.testing.assert_close(mask.grad, (x - x[INDEX]).sum(1, keepdim=True).detach())
    expected = mask.detach().clone()
    for n, partner in enumerate(INDEX):
        expected[partner] += 1 - mask[n].detach()
    torch.testing.assert_close(x.grad, expected.expand(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blend_targets_is_the_formula_for_every_class(dtype: torch.dtype) -> None:
    _, y = random_batch()
    y = y.to(dtype)
    lam = random_mask(5)
    mixed = ops.blend_targets(y, torch.tensor(INDEX), lam)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), slow_targets(y, INDEX, lam.tolist()), atol=ROUNDING[dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mixer",
    [Mixup(), CutMix(), Switch([Mixup(), CutMix()]), SmoothMix(), GridMix(), FMix(), FMix(max_soft=0.3), SaliencyMix()],
    ids=lambda mixer: type(mixer).__name__,
)
def test_mixers_do_what_their_plan_says(mixer, dtype: torch.dtype) -> None:
    x, y = random_batch(dtype)
    for i in range(6):
        plan = mixer.plan(x, y, np.random.default_rng((3, i)))
        mixed, target = mixer.mix(x, y, **plan)
        index, mask = plan["index"].tolist(), plan["mask"]
        torch.testing.assert_close(mixed.double(), slow_blend(x, index, mask), atol=ROUNDING[dtype], rtol=0)
        share = mask.expand(5, 1, 4, 6).mean((1, 2, 3)).tolist()
        torch.testing.assert_close(target.double(), slow_targets(y, index, share), atol=1e-6, rtol=0)


def test_mask_without_lambda_gives_its_mean_as_label_share() -> None:
    x, y = random_batch()
    mask = random_mask(5, 1, 4, 6)
    _, target = Mixup().mix(x, y, index=torch.tensor(INDEX), mask=mask)
    share = [mask[n].double().mean().item() for n in range(5)]
    torch.testing.assert_close(target.double(), slow_targets(y, INDEX, share), atol=1e-6, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.85, 1.0])
def test_mixup_equals_timm_for_the_same_lambda_and_partner(lam: float, monkeypatch) -> None:
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.standard_normal((4, 3, 8, 8), dtype=np.float32))
    labels = torch.tensor([0, 2, 1, 2])
    timm_mixup = TimmMixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=3)
    monkeypatch.setattr(timm_mixup, "_params_per_batch", lambda: (lam, False))
    theirs, their_target = timm_mixup(x.clone(), labels)
    smoothed = mixup_target(labels, 3, lam=1.0, smoothing=0.1)
    partner = torch.arange(4).flip(0)
    ours, target = Mixup().mix(x, smoothed, index=partner, mask=torch.full((4, 1, 1, 1), lam))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(target, their_target, atol=1e-6, rtol=1e-6)


# The mixers whose mask is drawn, each against its definition pixel by pixel, with the numbers that its plan drew.


def blank(height: int, width: int, size: int = 2):
    return torch.zeros(size, 3, height, width), torch.ones(size, 1)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20), (9, 5)])
def test_smoothmix_mask_is_one_minus_the_gaussian(height: int, width: int) -> None:
    for i in range(5):
        plan = SmoothMix().plan(*blank(height, width), np.random.default_rng((6, i)))
        rng = np.random.default_rng((6, i))
        spread = math.sqrt(height * width) * rng.uniform(0.25, 0.5)
        # Places whose distance to the middle of the image is a whole number: [-4, 4) for 8 pixels, [-4, 4] for 9.
        row = (height - 1) / 2 + rng.integers(-(height // 2), height // 2 + height % 2)
        column = (width - 1) / 2 + rng.integers(-(width // 2), width // 2 + width % 2)
        expected = np.zeros((height, width))
        for y in range(height):
            for x in range(width):
                expected[y, x] = 1 - math.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * spread**2))
        np.testing.assert_allclose(plan["mask"].numpy(), np.stack([expected[None]] * 2), atol=1e-6)
        np.testing.assert_allclose(plan["lam"].numpy(), expected.mean(), atol=1e-6)


def test_smoothmix_with_swapped_labels_differs_in_the_label_only() -> None:
    plan, swapped = (SmoothMix(None, s).plan(*blank(8, 12), np.random.default_rng(7)) for s in (False, True))
    assert torch.equal(plan["mask"], swapped["mask"]) and torch.equal(plan["index"], swapped["index"])
    torch.testing.assert_close(plan["lam"] + swapped["lam"], torch.ones(2))
    assert not torch.allclose(plan["lam"], swapped["lam"])


def counted_from_the_far_side(bound: int, length: int) -> int:
    """What python makes of a slice's bound."""
    return max(bound + length, 0) if bound < 0 else min(bound, length)


def grid_by_holes(height: int, width: int, rng: np.random.Generator, clip: bool, har: float = 1.0) -> np.ndarray:
    """GridMixup's mask, hole by hole and pixel by pixel: 0 in the holes."""
    lam = rng.beta(0.2, 0.2)
    across, area_ratio, aspect = rng.integers(2, 7), rng.uniform(0.5, 1), rng.uniform(0.5, 2)
    crop_w = int(math.sqrt(int(height * width * area_ratio) / aspect))
    crop_h = int(crop_w * aspect)
    if clip:
        crop_w, crop_h = min(crop_w, width), min(crop_h, height)
    left, top = int((width - crop_w) * rng.random()), int((height - crop_h) * rng.random())
    patch_w = math.ceil(crop_w / across)
    patch_h = max(int(patch_w * har), 1)
    hole_w = min(max(int(patch_w * math.sqrt(1 - lam)), 1), patch_w - 1)
    hole_h = min(max(int(patch_h * math.sqrt(1 - lam)), 1), patch_h - 1)
    mask = np.ones((height, width), dtype=np.float32)
    for i in range(across + 1):
        for j in range(math.ceil(crop_h / patch_h) + 1):
            x1, y1 = min(patch_w * i, crop_w), min(patch_h * j, crop_h)
            x2, y2 = min(x1 + hole_w, crop_w), min(y1 + hole_h, crop_h)
            for y in range(*(counted_from_the_far_side(top + bound, height) for bound in (y1, y2))):
                for x in range(*(counted_from_the_far_side(left + bound, width) for bound in (x1, x2))):
                    mask[y, x] = 0
    return mask


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("height", "width", "har"), [(8, 8, 1.0), (40, 24, 1.0), (24, 40, 0.5), (32, 32, 2.0)])
def test_gridmix_mask_is_its_holes(height: int, width: int, har: float, clip: bool) -> None:
    beyond = 0
    for i in range(40):
        mixer = GridMix(hole_aspect_ratio=har, clip=clip)
        plan = mixer.plan(*blank(height, width), np.random.default_rng((8, i)))
        expected = grid_by_holes(height, width, np.random.default_rng((8, i)), clip, har)
        np.testing.assert_array_equal(plan["mask"].numpy(), np.stack([expected[None]] * 2))
        np.testing.assert_allclose(plan["lam"].numpy(), expected.mean(), atol=1e-6)
        beyond += not np.array_equal(expected, grid_by_holes(height, width, np.random.default_rng((8, i)), True, har))
    assert beyond == 0 if clip else beyond > 0


def fmix_image(height: int, width: int, rng: np.random.Generator, isotropic: bool, decay: float = 3) -> np.ndarray:
    """The grey image, with numpy's transform in float64, from the spectrum as its authors index it."""
    size = (2, height, width // 2 + 1) if isotropic else (2, width // 2 + 1, 2)
    draws = rng.standard_normal(size)
    scaled = np.zeros((height, width // 2 + 1, 2))
    for y in range(height):
        for x in range(width // 2 + 1):
            frequency = math.hypot(min(y, height - y) / height, x / width)
            numbers = draws[:, y, x] if isotropic else draws[y, x] if y < 2 else np.zeros(2)
            scaled[y, x] = numbers / max(frequency, 1 / max(height, width)) ** decay
    parts = np.moveaxis(scaled, 2, 0) if isotropic else scaled  # the published code splits the rows, not the parts
    return np.fft.irfftn(parts[0] + 1j * parts[1], (height, width), axes=(0, 1))


@pytest.mark.parametrize("isotropic", [False, True])
def test_fmix_amplitudes_fall_with_the_given_power(isotropic: bool) -> None:
    found = FMix(decay_power=1.5, isotropic=isotropic).low_frequency_image(blank(12, 20)[0], np.random.default_rng(3))
    expected = fmix_image(12, 20, np.random.default_rng(3), isotropic, decay=1.5)
    np.testing.assert_array_equal(np.argsort(found.flatten().numpy()), np.argsort(expected.flatten()))


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("max_soft", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20), (20, 12)])
def test_fmix_mask_is_the_brightest_pixels(height: int, width: int, max_soft: float, isotropic: bool) -> None:
    pixels = height * width
    for i in range(6):
        alpha, rng = (1.0, 0.2)[i % 2], np.random.default_rng((9, i))
        mixer = FMix(alpha, max_soft=max_soft, isotropic=isotropic)
        plan = mixer.plan(*blank(height, width), np.random.default_rng((9, i)))
        lam = rng.beta(alpha, alpha)
        kept = math.ceil(lam * pixels) if rng.random() < 0.5 else math.floor(lam * pixels)
        soft = math.floor(pixels * min(max_soft, lam, 1 - lam))
        weights = [1.0] * (kept - soft) + list(np.linspace(1, 0, 2 * soft)) + [0.0] * (pixels - kept - soft)
        expected = np.zeros(pixels)
        expected[np.argsort(-fmix_image(height, width, rng, isotropic).flatten())] = weights
        np.testing.assert_allclose(plan["mask"].flatten(1).numpy(), np.stack([expected] * 2), atol=1e-6)
        np.testing.assert_allclose(plan["lam"].numpy(), expected.mean(), atol=1e-6)
        assert abs(expected.mean() - lam) * pixels < 1


def test_reformulated_fmix_keeps_the_own_label() -> None:
    x, y = random_batch()
    plan = FMix(reformulate=True).plan(x, y, np.random.default_rng(10))
    mixed, target = FMix(reformulate=True).mix(x, y, **plan)
    assert torch.equal(target, y) and not torch.equal(mixed, x)
    rng = np.random.default_rng(10)
    assert abs(plan["mask"].mean().item() - rng.beta(2, 1)) * 24 < 1


def slow_paste(x: Tensor, index: list[int], boxes: list[list[int]]) -> Tensor:
    """ResizeMix one pixel at a time, with the source pixel of ``F.interpolate``: a product of float32 numbers."""
    out = x.clone()
    height, width = x.shape[2:]
    for n, (top, bottom, left, right) in enumerate(boxes):
        for i in range(bottom - top):
            for j in range(right - left):
                row = int(np.float32(i) * (np.float32(height) / np.float32(bottom - top)))
                column = int(np.float32(j) * (np.float32(width) / np.float32(right - left)))
                out[n, :, top + i, left + j] = x[index[n], :, row, column]
    return out


@pytest.mark.parametrize(
    ("large", "with_gradient"), [(2**15, False), (1, False), (1, True)], ids=["at once", "image by image", "gradient"]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("placement", ["clip", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resizemix_pastes_the_whole_partner_shrunk(
    dtype, placement, layout, large: int, with_gradient: bool, monkeypatch
) -> None:
    monkeypatch.setattr(ops, "CPU_LARGE", large)
    mixer = ResizeMix(placement=placement)
    x = torch.from_numpy(np.random.default_rng(11).standard_normal((5, 3, 12, 17))).to(dtype)
    x, y = x.contiguous(memory_format=layout), torch.eye(5)
    for i in range(6):
        plan = mixer.plan(x, y, np.random.default_rng((12, i)))
        mixed, target = mixer.mix(x.clone().requires_grad_(with_gradient), y, **plan)
        index, boxes = plan["index"].tolist(), plan["box"].expand(5, 4).tolist()
        assert torch.equal(mixed.detach(), slow_paste(x, index, boxes))
        assert mixed.is_contiguous(memory_format=layout)
        share = [1 - (bottom - top) * (right - left) / (12 * 17) for top, bottom, left, right in boxes]
        torch.testing.assert_close(target.double(), slow_targets(y, index, share), atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [7, 32, 64, 160, 224, 288])
def test_shrinking_by_gather_equals_interpolate_at_every_size(length: int) -> None:
    line = torch.arange(float(length))
    sizes = torch.arange(1, length + 1)
    rows, inside = resizemix.source(length, torch.zeros_like(sizes), sizes)
    for size in range(1, length + 1):
        expected = F.interpolate(line[None, None], size=size, mode="nearest")[0, 0]
        assert torch.equal(line[rows[size - 1]][inside[size - 1]], expected)


def slow_saliency(grey: np.ndarray) -> np.ndarray:
    """Fine-grained saliency (H, W) of a grey image 0 ... 255, window by window."""
    height, width = grey.shape
    for _ in range(2):
        mirrored = np.pad(grey, 1, mode="reflect")
        smooth = np.zeros_like(grey)
        for y in range(height):
            for x in range(width):
                total = sum(
                    weight * mirrored[y + i, x + j]
                    for i, row in enumerate([[1, 2, 1], [2, 4, 2], [1, 2, 1]])
                    for j, weight in enumerate(row)
                )
                smooth[y, x] = (total + 8) // 16
        grey = smooth
    on, off = np.zeros(grey.shape), np.zeros(grey.shape)
    for n in (12, 24, 28, 48, 56, 112):
        for y in range(height):
            for x in range(width):
                window = grey[max(y - n + 1, 0) : y + n + 1, max(x - n + 1, 0) : x + n + 1]
                others = (int(window.sum()) - int(grey[y, x])) / (window.size - 1)
                on[y, x] += math.floor(max(grey[y, x] - others, 0))
                off[y, x] += math.floor(max(others - grey[y, x], 0))
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


@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 31), (40, 26), (9, 130)])
def test_saliency_equals_loops_over_windows(height: int, width: int, monkeypatch) -> None:
    images = pictures(3, height, width)
    mixer, x = SaliencyMix(mean=MEAN, std=STD), normalised(images, MEAN, STD)
    np.testing.assert_array_equal(mixer.grey(x).numpy(), luma(images))
    expected = np.stack([slow_saliency(grey) for grey in luma(images)])
    brightest = [np.unravel_index(one.argmax(), one.shape) for one in expected]
    for chunk in (1, 2**17):  # an image at a time, and all at once
        monkeypatch.setattr(ops, "CPU_CHUNK", chunk)
        np.testing.assert_array_equal(saliencymix.fine_grained_saliency(mixer.grey(x)).numpy(), expected)
        assert mixer.salient_pixel(x).tolist() == [list(map(int, place)) for place in brightest]


def test_saliency_of_a_large_image_is_exact() -> None:
    """Sums beyond 2**24: there are no odd numbers in float32 any more."""
    grey = np.random.default_rng(15).integers(150, 256, (300, 300))
    saliency = saliencymix.fine_grained_saliency(torch.from_numpy(grey).float()[None])[0].numpy()
    smooth = saliencymix.blur(saliencymix.blur(torch.from_numpy(grey).float()[None]))[0].numpy().astype(np.int64)
    on, off = np.zeros(grey.shape), np.zeros(grey.shape)
    total = np.pad(smooth.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    for n in (12, 24, 28, 48, 56, 112):
        low, high = np.maximum(np.arange(300) - n + 1, 0), np.minimum(np.arange(300) + n + 1, 300)
        sums = total[high][:, high] - total[high][:, low] - total[low][:, high] + total[low][:, low]
        others = (sums - smooth) / (np.outer(high - low, high - low) - 1)
        on += np.floor(np.maximum(smooth - others, 0))
        off += np.floor(np.maximum(others - smooth, 0))
    np.testing.assert_array_equal(saliency, np.floor(255 * on / on.max()) + np.floor(255 * off / off.max()))


@pytest.mark.parametrize("side", [64, 224])
def test_saliency_equals_opencv(side: int) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs the extra: oracle")
    if not hasattr(cv2, "saliency"):
        pytest.skip("needs opencv-contrib, from the extra: oracle")
    for image in pictures(6, side, side):
        done, theirs = cv2.saliency.StaticSaliencyFineGrained_create().computeSaliency(
            np.ascontiguousarray(image[..., ::-1])
        )
        assert done
        theirs = (theirs * 255).round()
        mixer = SaliencyMix()
        x = normalised(image[None], mixer.mean, mixer.std)
        ours = saliencymix.fine_grained_saliency(mixer.grey(x))[0].numpy()
        assert (ours % 256 == theirs).mean() > 0.98  # the remainder: OpenCV stores sums up to 510 in a byte
        assert mixer.salient_pixel(x).tolist() == [list(np.unravel_index(theirs.argmax(), theirs.shape))]


@pytest.mark.parametrize(("height", "width"), [(24, 36), (8, 8)])
def test_saliencymix_pastes_a_box_around_the_salient_pixel_of_the_partner(height: int, width: int) -> None:
    images = pictures(5, height, width)
    x, y = normalised(images, MEAN, STD), torch.eye(5)
    places = [np.unravel_index((s := slow_saliency(grey)).argmax(), s.shape) for grey in luma(images)]
    for i, box_from in itertools.product(range(6), ("each", "first")):
        plan = SaliencyMix(box_from=box_from, mean=MEAN, std=STD).plan(x, y, np.random.default_rng((14, i)))
        lam = np.random.default_rng((14, i)).beta(1, 1)
        half_h, half_w = int(height * math.sqrt(1 - lam)) // 2, int(width * math.sqrt(1 - lam)) // 2
        index = plan["index"].tolist()
        expected = np.ones((5, 1, height, width), dtype=np.float32)
        for n in range(5):
            row, column = places[index[n if box_from == "each" else 0]]
            expected[n, 0, max(row - half_h, 0) : row + half_h, max(column - half_w, 0) : column + half_w] = 0
        np.testing.assert_array_equal(plan["mask"].numpy(), expected)
        np.testing.assert_allclose(plan["lam"].numpy(), expected.mean((1, 2, 3)), atol=1e-6)


def test_an_image_without_contrast_is_salient_in_the_middle() -> None:
    assert SaliencyMix().salient_pixel(torch.full((2, 3, 9, 14), 0.3)).tolist() == [[4, 7], [4, 7]]
