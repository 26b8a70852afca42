"""AugMix: its operations against Pillow's, its views and its loss against loops, and what its step shows the model."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.testing import assert_close

from mixers import AugMix, Step, augmentations
from mixers.augmentations import OPERATIONS
from mixers.testing import batch, footprint, rng_of, tiny_step
from mixers.testing.parts import differences

MEAN, STD = np.array(AugMix().mean), np.array(AugMix().std)


def pictures(height: int, width: int) -> Tensor:
    """Bytes (5, 3, H, W): three like photos, one of few values, one flat."""
    coarse = torch.randn(4, 3, 2 + height // 8, 2 + width // 8, generator=torch.Generator().manual_seed(0))
    found = F.interpolate(coarse, (height, width), mode="bicubic") * 60 + 120
    found[3] = found[3] // 64 * 64
    return torch.cat([found, torch.full((1, 3, height, width), 77.0)]).round().clamp(0, 255).to(torch.uint8)


def by_pillow(image: Image.Image, name: str, level: float, sign: int) -> Image.Image:
    """The operations as the paper's code writes them."""
    width, height = image.size
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    if name in ("posterize", "solarize"):
        return getattr(ImageOps, name)(
            image, 4 - int(level * 4 / 10) if name == "posterize" else 256 - int(level * 25.6)
        )
    if name == "rotate":
        return image.rotate(sign * int(level * 30 / 10), resample=Image.Resampling.BILINEAR)
    places = {
        "shear_x": (1, sign * level * 0.3 / 10, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * level * 0.3 / 10, 1, 0),
        "translate_x": (1, 0, sign * int(level * (width / 3) / 10), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * int(level * (height / 3) / 10)),
    }
    bilinear = Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.AFFINE, places[name], resample=bilinear)


def to_pillow(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def of_pillow(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_that_of_pillow_on_bytes_but_for_1_where_places_are_between_pixels(name):
    rng, apart = np.random.default_rng(0), []
    for height, width in ((32, 32), (40, 56), (160, 128), (13, 7)):
        x = pictures(height, width)
        for _ in range(8):
            level, sign = rng.uniform(0.1, 10, len(x)), rng.choice([-1, 1], len(x))
            found = x.clone()
            operation = np.full(len(x), OPERATIONS.index(name))
            augmentations.operate(found, augmentations.grouped(operation, level, sign, x.float()))
            for picture, ours, *strength in zip(x, found, level.tolist(), sign.tolist(), strict=True):
                theirs = of_pillow(by_pillow(to_pillow(picture), name, *strength))
                apart.append((ours.int() - theirs.int()).abs().flatten())
    off = torch.cat(apart)
    if name == "rotate" or name.startswith("shear"):
        assert off.max() == 1 and (off > 0).float().mean() < 0.02
    else:
        assert off.max() == 0


@pytest.mark.parametrize(
    "mixer", [AugMix(), AugMix(severity=9.5, width=2, depth=4, alpha=0.5)], ids=["default", "other"]
)
def test_a_view_is_chain_after_chain_of_pillow_and_the_two_blends(mixer):
    """With the draws in their order: the own share, weights, depths, then operation, level and side of each step."""
    pixels = pictures(24, 40)
    x = ((pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).float()
    x[0, :, :5] = 7.0  # what no byte can be keeps its own share
    rng, expected = rng_of(0), torch.zeros_like(x)
    size, width = len(x), mixer.width
    lam = rng.beta(mixer.alpha, mixer.alpha, size)
    weights = rng.dirichlet([mixer.alpha] * width, size)
    depths = rng.integers(1, 4, (width, size)) if mixer.depth is None else np.full((width, size), mixer.depth)
    steps = [
        (
            rng.integers(9, size=(width, size)),
            rng.uniform(0.1, mixer.severity, (width, size)),
            rng.random((width, size)),
        )
        for _ in range(mixer.depth or 3)
    ]
    for i in range(size):
        start = (x[i].double() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
        blend = np.zeros((3, 24, 40))
        for chain in range(width):
            image = to_pillow(start.round().clamp(0, 255).to(torch.uint8))
            for operation, level, side in steps[: depths[chain, i]]:
                name = OPERATIONS[operation[chain, i]]
                image = by_pillow(image, name, level[chain, i], -1 if side[chain, i] > 0.5 else 1)
            blend += weights[i, chain] * (of_pillow(image).numpy() / 255 - MEAN[:, None, None]) / STD[:, None, None]
        expected[i] = lam[i] * x[i] + (1 - lam[i]) * torch.from_numpy(blend).float()
    plan = mixer.plan(x, torch.eye(5), rng_of(0))
    off = ((mixer.mix(x, torch.eye(5), **plan)[0] - expected).abs() * 255 * 0.225).flatten()
    assert (
        off.median() < 1e-3 and (off < 0.5).float().mean() > 0.95
    )  # a 1 here and there, and what equalize makes of it
    one, other = (mixer.plan(x, torch.eye(5), rng_of(0)) for _ in range(2))
    assert not differences(one, other) and differences(one["view"], one["other"])


def test_the_divergence_and_its_gradient_are_those_of_the_formula_also_where_a_probability_is_0():
    z = [torch.randn(6, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 3 for n in range(3)]
    for i, found in enumerate(augmentations.divergence(*z).tolist()):
        p = [[math.exp(v) / sum(map(math.exp, row[i].tolist())) for v in row[i].tolist()] for row in z]
        mean = [sum(column) / 3 for column in zip(*p, strict=True)]
        assert found == pytest.approx(sum(a * math.log(a / m) for row in p for a, m in zip(row, mean, strict=True)) / 3)
    hard = [torch.tensor([[500.0, 0.0, 0.0]]), torch.tensor([[0.0, 500.0, 0.0]]), torch.tensor([[0.0, 0.0, 500.0]])]
    for row in hard:
        row.requires_grad_()
    found = augmentations.divergence(*hard)
    assert found.item() == pytest.approx(math.log(3))
    found.sum().backward()
    assert all(row.grad.isfinite().all() for row in hard)
    for dtype in (torch.bfloat16, torch.float16):
        assert augmentations.divergence(*(row.detach().to(dtype) for row in hard)).dtype == torch.float32


def test_a_step_shows_the_model_the_batch_and_two_views_at_once_and_learns_the_label_of_the_clean_one():
    step, (x, y) = tiny_step(lambda: AugMix(jsd_weight=5.0)), batch(6)
    y = 0.9 * y + 0.02
    plain, before = copy.deepcopy(step.model), footprint(step.model)
    out = step(x, y, rng_of(0))
    assert not differences(before, footprint(step.model))
    mixer = step.mixer
    views = [augmentations.view(x, out.plan[name], mixer.mean, mixer.std) for name in ("view", "other")]
    assert torch.equal(views[0], mixer.mix(x, y, **out.plan)[0]) and not torch.equal(*views)
    logits = plain(torch.cat([x, *views]))
    apart = augmentations.divergence(*logits.split(6))
    assert_close(out.loss, (F.cross_entropy(logits[:6], y) + 5 * apart.mean()))
    assert torch.equal(out.target, y) and set(out.logs) == {"clean", "jsd"}
    assert_close(out.logits, logits[:6])
    out.loss.backward()
    (F.cross_entropy(logits[:6], y) + 5 * apart.mean()).backward()
    for ours, theirs in zip(step.model.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(step.model.buffers(), plain.buffers(), strict=True):
        assert_close(ours, theirs)


def test_without_the_divergence_it_mixes_in_any_loop_and_a_view_is_all_that_is_learned():
    alone, (x, y) = AugMix(jsd_weight=0.0), batch()
    assert (alone.needs, AugMix().needs) == ("batch", "step") and not alone.one_label and AugMix().one_label
    step = tiny_step(lambda: alone)
    plain = Step(copy.deepcopy(step.model), alone, step.criterion).model
    out = step(x, y, rng_of(0))
    assert [*out.plan] == ["view"] and [*out.logs] == ["mix"]
    assert_close(out.loss, F.cross_entropy(plain(alone.mix(x, y, **out.plan)[0]), y))


def test_images_that_are_not_of_three_colours_are_refused():
    with pytest.raises(ValueError, match=r"AugMix needs RGB images \(B, 3, H, W\), got \(2, 1, 8, 8\)"):
        AugMix().plan(torch.zeros(2, 1, 8, 8), torch.eye(2), rng_of(0))
