"""Promise: corruptions, attacks and occlusions do what their papers say, to the letter of a slow reference."""

import colorsys
import copy
import math

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib import cbook
from PIL import Image, ImageOps
from scipy import ndimage

from mixup_recipes.data import prepare
from mixup_recipes.robustness import attacks, corruptions, fields, parts
from mixup_recipes.robustness.corruptions import CORRUPTIONS, GROUPS, NAMES, corrupt, corruption_errors, mce
from mixup_recipes.robustness.occlusion import occlude
from mixup_recipes.training import known_weights
from mixup_recipes.typed import UserError


def photo(height, width):
    """The photo that comes with matplotlib."""
    image = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, (0, 0, 512, 512)))


def inside(i, side, border):
    """The pixel that stands for pixel ``i`` beyond a border: the last one again or mirrored, with it or without."""
    if border == "nearest":
        return min(max(i, 0), side - 1)
    period = 2 * side - 2 * (border == "mirror")
    return min(i % period, period - (border == "reflect") - i % period)


def between(x, row, column, border):
    """A value between four pixels."""
    top, left = math.floor(row), math.floor(column)
    values = 0
    for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = (1 - abs(row - r)) * (1 - abs(column - c))
        values = values + weight * x[inside(r, x.shape[0], border), inside(c, x.shape[1], border)]
    return values


def everywhere(x, value):
    """The picture whose pixel at (row, column) is ``value(row, column)``."""
    return np.array([[value(r, c) for c in range(x.shape[1])] for r in range(x.shape[0])])


def convolved(x, kernel, border):
    reach, (h, w) = len(kernel) // 2, x.shape[:2]
    places = [[[inside(i + a - reach, n, border) for i in range(n)] for a in range(len(kernel))] for n in (h, w)]
    return sum(kernel[a, b] * x[np.ix_(places[0][a], places[1][b])] for a, b in np.ndindex(kernel.shape))


def bell(reach, sigma):
    weights = np.array([math.exp(-(i**2) / (2 * sigma**2)) for i in range(-reach, reach + 1)])
    return weights / weights.sum()


def defocus_blur(x, rng, radius, softness):
    reach, edge = max(8, radius), 1 if radius <= 8 else 2
    disk = np.array(
        [[a * a + b * b <= radius * radius for a in range(-reach, reach + 1)] for b in range(-reach, reach + 1)]
    )
    soft = np.outer(bell(edge, softness), bell(edge, softness))
    return convolved(x, convolved(disk / disk.sum(), soft, "mirror"), "mirror")


def glass_blur(x, rng, sigma, reach, rounds):
    soft = np.outer(bell(int(4 * sigma + 0.5), sigma), bell(int(4 * sigma + 0.5), sigma))
    x = convolved(x, soft, "nearest")
    for _ in range(rounds):
        turns = [(r, c) for r in range(len(x) - reach, reach, -1) for c in range(x.shape[1] - reach, reach, -1)]
        for (r, c), down, right in zip(turns, *rng.integers(-reach, reach, (2, len(turns))), strict=True):
            here, there = x[r, c], x[r + down, c + right]  # views: the swap of the reference is a copy
            here[:], there[:] = there, here
    return convolved(x, soft, "nearest")


def streaked(x, radius, sigma, degrees):
    weights, (h, w) = bell(2 * radius, sigma)[2 * radius :], x.shape[:2]
    down, right = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    places = [(math.ceil(i * down - 0.5), math.ceil(i * right - 0.5), k) for i, k in enumerate(weights / weights.sum())]
    return everywhere(
        x, lambda r, c: sum(k * x[inside(r + a, h, "nearest"), inside(c + b, w, "nearest")] for a, b, k in places)
    )


def motion_blur(x, rng, radius, sigma):
    return streaked(x, radius, sigma, rng.uniform(-45, 45))


def enlarged(x, factor):
    cut = [slice((n - (m := math.ceil(n / factor))) // 2, (n - m) // 2 + m) for n in x.shape[:2]]
    large = ndimage.zoom(x[tuple(cut)], (factor, factor, 1)[: x.ndim], order=1)
    top, left = ((a - b) // 2 for a, b in zip(large.shape[:2], x.shape[:2], strict=True))
    return large[top : top + x.shape[0], left : left + x.shape[1]]


def zoom_blur(x, rng, end, step):
    pictures = [x, *(enlarged(x, factor) for factor in np.arange(1, end, step))]
    return sum(pictures) / len(pictures)


def snow(x, rng, mean, spread, zoom, least, radius, sigma, kept):
    flakes = enlarged(rng.normal(mean, spread, x.shape[:2]), zoom)
    flakes = everywhere(flakes, lambda r, c: min(flakes[r, c], 1) if flakes[r, c] >= least else 0)
    flakes = streaked(flakes, radius, sigma, rng.uniform(-135, -45))

    def pixel(r, c):
        white = 1.5 * (0.299 * x[r, c, 0] + 0.587 * x[r, c, 1] + 0.114 * x[r, c, 2]) + 0.5
        return [kept * v + (1 - kept) * max(v, white) + flakes[r, c] + flakes[-1 - r, -1 - c] for v in x[r, c]]

    return everywhere(x, pixel)


def cloud(side, decay, rng):
    known, noise, n = np.zeros((side, side)), 1, 1
    while n < side:
        step, draws = side // n, rng.uniform(-noise, noise, (3, n, n))
        half = step // 2
        for kind, (down, right), near in (
            (0, (half, half), ((half, half), (half, -half), (-half, half), (-half, -half))),
            (1, (0, half), ((half, 0), (-half, 0), (0, half), (0, -half))),
            (2, (half, 0), ((half, 0), (-half, 0), (0, half), (0, -half))),
        ):
            for i, j in np.ndindex(n, n):
                r, c = i * step + down, j * step + right
                known[r, c] = sum(known[(r + a) % side, (c + b) % side] for a, b in near) / 4 + draws[kind, i, j]
        n, noise = 2 * n, noise / decay**2
    return (known - known.min()) / (known.max() - known.min())


def fog(x, rng, amount, decay):
    mist, most = cloud(32, decay, rng), x.max()
    return everywhere(x, lambda r, c: (x[r, c] + amount * mist[r, c]) * most / (most + amount))


def brightness(x, rng, amount):
    def pixel(r, c):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[r, c])
        return colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1))

    return everywhere(x, pixel)


def contrast(x, rng, factor):
    means = [sum(x[..., k].ravel()) / x[..., k].size for k in range(3)]
    return everywhere(x, lambda r, c: [(v - m) * factor + m for v, m in zip(x[r, c], means, strict=True)])


def elastic_transform(x, rng, amount, sigma, jitter):
    h, w = x.shape[:2]
    arm = min(h, w) // 3  # points are (across, down)
    given = np.array([[w // 2 + arm, h // 2 + arm], [w // 2 + arm, h // 2 - arm], [w // 2 - arm, h // 2 - arm]])
    forth = np.linalg.solve(np.c_[given, np.ones(3)], given + rng.uniform(-jitter, jitter, (3, 2))).T
    back = np.linalg.inv(np.r_[forth, [[0, 0, 1]]])
    x = everywhere(x, lambda r, c: between(x, *(back @ [c, r, 1])[1::-1], "mirror"))
    reach = int(3 * sigma + 0.5)
    soft = np.outer(bell(reach, sigma), bell(reach, sigma))
    across, down = (amount * convolved(rng.uniform(-1, 1, (h, w)), soft, "reflect") for _ in range(2))
    return everywhere(x, lambda r, c: between(x, r + down[r, c], c + across[r, c], "reflect"))


def pixelate(x, rng, share):
    def resized(x, side):  # of the first axis: the mean of the pixels whose middles are in a box
        width = max(1, len(x) / side)
        boxes = [[(p + 0.5 - (i + 0.5) * len(x) / side) / width for p in range(len(x))] for i in range(side)]
        return np.array([np.mean([x[p] for p, away in enumerate(box) if -0.5 < away <= 0.5], 0) for box in boxes])

    for _ in range(2):
        x = resized(resized(x, int(len(x) * share)), len(x)).swapaxes(0, 1)
    return x


SLOW = [defocus_blur, glass_blur, motion_blur, zoom_blur, snow, fog, brightness, contrast, elastic_transform, pixelate]


@pytest.mark.parametrize("slow", SLOW, ids=lambda f: f.__name__)
@pytest.mark.parametrize("severity", [2, 5])
def test_a_corruption_is_that_of_a_slow_reference(slow, severity):
    x, (function, strengths) = photo(19, 24) / 255, CORRUPTIONS[slow.__name__]
    strength = strengths[224][severity - 1]
    fast, reference = (f(x.copy(), np.random.default_rng(3), *strength) for f in (function, slow))
    assert np.abs(fast - reference).max() < (1.5 / 255 if slow is pixelate else 1e-9) and np.ptp(fast - x) > 0.05


def test_noise_has_the_law_of_its_strength():
    x = np.full((200, 200, 3), 0.4)
    made = {
        name: CORRUPTIONS[name][0](x, np.random.default_rng(0), c)
        for name, c in (("gaussian_noise", 0.12), ("shot_noise", 25), ("impulse_noise", 0.06))
    }
    assert made["gaussian_noise"].std() == pytest.approx(0.12, rel=0.02)
    assert made["shot_noise"].mean() == pytest.approx(0.4, rel=0.02)
    assert made["shot_noise"].var() == pytest.approx(0.4 / 25, rel=0.02)
    assert [(made["impulse_noise"] == v).mean() for v in (0, 0.4, 1)] == pytest.approx([0.03, 0.94, 0.03], abs=0.002)


def test_a_pane_of_ice_has_the_colours_of_a_photograph_of_frost():
    x = np.zeros((224, 224, 3))
    panes = [CORRUPTIONS["frost"][0](x, np.random.default_rng(seed), 0.6, 0.75, 1) * 255 / 0.75 for seed in range(6)]
    for pane in panes:
        assert any(
            np.abs(pane.mean((0, 1)) - p[:3]).max() < 9 and abs(pane.mean(2).std() - p[3]) < 6 for p in fields.PANES
        )
    assert len({tuple(np.rint(pane.mean((0, 1)) / 20)) for pane in panes}) > 2


def test_the_higher_the_severity_the_further_from_the_photo():
    """But four change in kind from one to the next: even AlexNet errs less at snow 3 than at snow 2."""
    x, uneven = photo(128, 128), {"glass_blur": [0, 4], "snow": [0, 4], "frost": [1, 4], "elastic_transform": [3, 4]}
    for name in NAMES:
        far = [np.square(corrupt(x, name, s, np.random.default_rng(0)) / 255 - x / 255).mean() for s in range(1, 6)]
        far = [far[i] for i in uneven.get(name, range(5))]
        assert far == sorted(far) and far[0] > 1e-4, name


@pytest.mark.parametrize(("height", "width"), [(33, 47), (64, 50), (140, 121), (1, 5)])
def test_a_picture_of_any_size_keeps_it_and_comes_out_the_same_from_the_same_generator(height, width):
    x = photo(height, width)
    before, state = x.copy(), np.random.get_state()[1].tolist()
    for name in NAMES:
        once, again, other = (corrupt(x, name, 5, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert once.dtype == np.uint8 and once.shape == x.shape and (once == again).all()
        drawn = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
        assert (once != other).any() == drawn or height == 1
    assert (x == before).all() and np.random.get_state()[1].tolist() == state


def test_grey_stays_grey_where_noise_is_not_of_a_colour():
    grey = np.repeat(photo(40, 40)[..., :1], 3, 2)
    for name in set(NAMES) - {*GROUPS["noise"], "frost"}:
        assert np.ptp(corrupt(grey, name, 4, np.random.default_rng(0)), 2).max() <= 1, name


def test_strengths_are_those_of_the_data_set_whose_pictures_are_nearest_in_size():
    sides = [
        corruptions.reference_side(*size) for size in ((384, 512), (120, 999), (119, 224), (46, 46), (45, 64), (1, 1))
    ]
    assert sides == [224, 224, 64, 64, 32, 32]
    assert {len(five) for _, table in CORRUPTIONS.values() for five in table.values()} == {5}
    assert all(table.keys() == {224, 64, 32} for _, table in CORRUPTIONS.values()) and tuple(CORRUPTIONS) == NAMES
    x = photo(32, 32)
    mild = CORRUPTIONS["contrast"][0](x / 255, None, 0.75)
    assert np.abs(corrupt(x, "contrast", 1, np.random.default_rng(0)) - mild * 255).max() <= 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "gausian_noise"}, "unknown corruption 'gausian_noise'; did you mean 'gaussian_noise'?"),
        ({"severity": 6}, "must be 1, 2, 3, 4 or 5, got 6"),
        ({"picture": np.zeros((4, 4, 3))}, r"must be uint8 of shape \(H, W, 3\), got float64 \(4, 4, 3\)"),
    ],
)
def test_what_is_no_corruption_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        corrupt(**{"picture": photo(8, 8), "name": "fog", "severity": 1, "rng": np.random.default_rng(0)} | change)


# The errors of AlexNet on ImageNet-C in percent, severities 1 to 5, as the authors published them
ALEXNET = {
    "gaussian_noise": (69.528, 82.542, 93.554, 98.138, 99.452), "shot_noise": (71.224, 85.108, 93.574, 98.182, 99.146),
    "impulse_noise": (78.374, 89.808, 94.870, 98.720, 99.548), "defocus_blur": (65.624, 73.202, 85.036, 91.364, 94.714),
    "glass_blur": (64.308, 75.054, 88.806, 91.622, 93.344), "motion_blur": (58.430, 70.048, 82.108, 89.750, 92.638),
    "zoom_blur": (70.008, 76.992, 80.784, 84.198, 87.198), "snow": (71.726, 88.392, 86.468, 91.870, 94.952),
    "frost": (61.390, 79.734, 88.790, 89.942, 93.430), "fog": (67.474, 76.050, 84.378, 87.260, 94.500),
    "brightness": (45.140, 48.502, 54.048, 62.166, 72.440), "contrast": (64.548, 76.150, 88.874, 97.760, 99.270),
    "elastic_transform": (52.596, 70.116, 55.686, 64.076, 80.554), "pixelate": (52.218, 54.620, 73.728, 87.092, 91.262),
    "jpeg_compression": (51.002, 54.718, 57.294, 65.458, 74.778),
}  # fmt: skip
# The published CE of ResNet-50, whole percent, in the order of NAMES; its published mCE is 76.7
RESNET50 = (80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77)


def test_mce_is_that_of_the_paper():
    assert mce(ALEXNET) == pytest.approx(100, abs=1e-3)
    assert all(ce == pytest.approx(100, abs=2e-3) for ce in corruption_errors(ALEXNET).values())
    resnet = {name: [e * ce / 100 for e in ALEXNET[name]] for name, ce in zip(NAMES, RESNET50, strict=True)}
    assert mce(resnet) == pytest.approx(76.7, abs=0.5)  # half a percent: what rounding leaves open
    # torchvision's ResNet-50 under Gaussian noise: 29.29 % of the images right, a CE of 79.77
    assert corruption_errors({"gaussian_noise": [70.71] * 5})["gaussian_noise"] == pytest.approx(79.77, abs=0.005)
    with pytest.raises(UserError, match="missing: fog, brightness, contrast"):
        mce({name: [1] * 5 for name in NAMES[:9]})
    for wrong in ({"fogg": [1] * 5}, {"fog": [1] * 4}, {"fog": [101] * 5}, {"fog": [float("nan")] * 5}):
        with pytest.raises(UserError, match=r"unknown corruption|needs 5 errors in percent"):
            corruption_errors(wrong)


@pytest.fixture
def victim(model):
    """A network over pixels, in evaluation mode, and pictures with the classes that it takes them for."""
    wrapper = torch.nn.Sequential(Normalise(), model).eval()
    x = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    x[0, :, :4], x[1, :, :4] = 0, 1  # where the ball leaves the cube of pixels
    return wrapper, x, wrapper(x).argmax(1)


class Normalise(torch.nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


def slow_attack(model, x, y, eps, step, steps, start):
    """One picture and one step at a time, by backward passes on a copy."""
    model, found = copy.deepcopy(model), []
    for image, label, point in zip(x, y, start, strict=True):
        for _ in range(steps):
            point = point.clone().requires_grad_()
            F.cross_entropy(model(point[None]), label[None]).backward()
            point = point.detach() + step * point.grad.sign()
            point = torch.minimum(torch.maximum(point, image - eps), image + eps).clamp(0, 1)
        found.append(point)
    return torch.stack(found)


def test_attacks_are_those_of_a_slow_reference_and_stay_in_the_ball(victim):
    model, x, y = victim
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    eps = parts.PGD_EPS[-1] / 255
    step, steps = parts.PGD_STEP * eps, parts.PGD_STEPS
    with torch.no_grad():
        fast = attacks.fgsm(model, x, y, eps)
        strong = attacks.pgd(model, x, y, eps, step, steps, torch.Generator().manual_seed(1))
        again = attacks.pgd(model, x, y, eps, step, steps, torch.Generator().manual_seed(1))
    start = x + eps * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 1)
    assert torch.equal(strong, again)
    torch.testing.assert_close(fast, slow_attack(model, x, y, eps, eps, 1, x))
    slow = slow_attack(model, x, y, eps, step, steps, start.clamp(0, 1))
    assert (strong - slow).abs().gt(1e-6).float().mean() < 0.001  # the sign of a gradient of about 0 may be either
    for moved in (fast, strong):
        assert (moved - x).abs().max() <= eps + 1e-6 and moved.min() >= 0 and moved.max() <= 1
        assert moved.dtype == x.dtype and not moved.requires_grad
    clean, once, more = (F.cross_entropy(model(images), y).item() for images in (x, fast, strong))
    assert clean < once <= more
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert flags == [p.requires_grad for p in model.parameters()] and not x.requires_grad


def test_occlusion_drops_each_pictures_own_cells():
    x, grid = torch.arange(1, 1 + 5 * 2 * 33 * 47).reshape(5, 2, 33, 47).float(), 7
    hidden = occlude(x, 0.4, grid, np.random.default_rng(0))
    rng, expected = np.random.default_rng(0), x.clone()
    for image in expected:
        for cell in rng.random(grid * grid).argsort()[: round(0.4 * grid * grid)]:
            for r in range(33):
                for c in range(47):
                    if (r * grid // 33) * grid + c * grid // 47 == cell:
                        image[:, r, c] = 0
    assert torch.equal(hidden, expected) and len({tuple(image.eq(0).flatten().tolist()) for image in hidden}) == 5
    rng = np.random.default_rng(0)  # in batches of another size
    assert torch.equal(torch.cat([occlude(part, 0.4, grid, rng) for part in x.split(2)]), hidden)
    assert torch.equal(occlude(x, 0, grid, rng), x) and not occlude(x, 1, grid, rng).any() and x.all()
    for share, cells, message in ((1.2, 7, "from 0 to 1, got 1.2"), (0.5, 34, "1 to 33 cells a side")):
        with pytest.raises(UserError, match=message):
            occlude(x, share, cells, rng)


@pytest.mark.slow
def test_a_network_is_less_sure_of_an_orange_that_is_corrupted(tmp_path):
    """Downloads 78 MB where they are not in the cache: the weights of EfficientNet-Lite0, photos of oranges."""
    folder = known_weights.prepare_weights("efficientnet_lite0")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    test = datasets.load_dataset(
        "parquet", data_files=str(prepare.prepare("groceries") / "data/test-*"), cache_dir=tmp_path
    )
    rows = test["train"]
    oranges = [row["image"] for row in rows if rows.features["label"].int2str(row["label"]) == "Orange"][:16]
    photos = np.stack([np.asarray(ImageOps.fit(image, (224, 224), Image.Resampling.BICUBIC)) for image in oranges])

    def sure(pictures):
        with torch.no_grad():
            x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
            return model(x).softmax(1)[:, 950].mean().item()

    clean = sure(photos)
    worst = {
        name: sure([corrupt(photo, name, 5, np.random.default_rng(i)) for i, photo in enumerate(photos)])
        for name in NAMES
    }
    assert all(worst[name] < 0.7 * clean for name in NAMES if name != "brightness")  # the photos are dark: it may help
    assert all(np.mean([worst[name] for name in names]) < 0.6 * clean for names in GROUPS.values())
