"""GuidedMixup against loops: pairing, spectral residual, pixel-wise mixing, images without content."""

import math

import numpy as np
import pytest
import torch
from test_taps import CRITERION, backbone, photos
from torch import nn

from mixers import GuidedMix, build
from mixers.guidedmix import farthest_partners, spectral_residual
from mixers.testing import batch, rng_of


def slow_partners(vectors: np.ndarray) -> list[int]:
    """The farthest pair first, then always the farthest of those left, and back to the first."""
    size = len(vectors)
    distance = [[math.dist(a, b) for b in vectors] for a in vectors]
    _, first, second = max((distance[i][j], -i, -j) for i in range(size) for j in range(size) if i != j)
    cycle = [-first, -second]
    while len(cycle) < size:
        left = [i for i in range(size) if i not in cycle]
        cycle.append(max(left, key=lambda i: distance[cycle[-1]][i]))
    index = [0] * size
    for place, i in enumerate(cycle):
        index[i] = cycle[(place + 1) % size]
    return index


def is_one_cycle(index: list[int]) -> bool:
    seen = [0]
    while index[seen[-1]] not in seen:
        seen.append(index[seen[-1]])
    return index[seen[-1]] == 0 and len(seen) == len(index)


@pytest.mark.parametrize("size", [2, 3, 7, 16, 33])
def test_partners_are_the_greedy_chain_of_farthest_ones(size: int) -> None:
    for seed in range(5):
        vectors = np.random.default_rng(seed).random((size, 40))
        found = farthest_partners(torch.from_numpy(vectors)).tolist()
        assert found == slow_partners(vectors)
        assert is_one_cycle(found)  # nobody is his own partner
    for dull in (torch.zeros(size, 3), torch.full((size, 3), math.nan)):  # without any distance
        assert is_one_cycle(farthest_partners(dull).tolist())
    assert farthest_partners(torch.zeros(1, 3)).tolist() == [0]


def slow_residual(grey: np.ndarray) -> np.ndarray:
    """Hou and Zhang: back from log amplitude less its 3 x 3 mean, and the phase."""
    spectrum = np.fft.fft2(grey)
    log_amplitude, phase = np.log(np.abs(spectrum)), np.angle(spectrum)
    height, width = grey.shape
    mean = np.zeros_like(grey)
    for r, c, i, j in np.ndindex(height, width, 3, 3):
        mean[r, c] += log_amplitude[min(max(r + i - 1, 0), height - 1), min(max(c + j - 1, 0), width - 1)] / 9
    return np.abs(np.fft.ifft2(np.exp(log_amplitude - mean + 1j * phase))) ** 2


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 33), (16, 100)])
def test_spectral_residual_is_the_published_one(height: int, width: int) -> None:
    x, _ = batch(3, height, width)
    found = spectral_residual(x)
    for i in range(3):
        grey = 0.299 * x[i, 0].double() + 0.587 * x[i, 1].double() + 0.114 * x[i, 2].double()
        np.testing.assert_allclose(found[i].numpy(), slow_residual(grey.numpy()), rtol=2e-3, atol=1e-6)


def test_large_images_are_looked_at_in_128_pixels() -> None:
    x = torch.nn.functional.interpolate(batch(2, 128, 128)[0], (256, 256), mode="bilinear", antialias=True)
    assert spectral_residual(x).shape == (2, 256, 256)
    small = spectral_residual(torch.nn.functional.interpolate(x, (128, 128), mode="bilinear", antialias=True))
    at_centres = torch.nn.functional.avg_pool2d(spectral_residual(x)[:, None], 2)[:, 0]
    assert np.corrcoef(at_centres.flatten(), small.flatten())[0, 1] > 0.8


def slow_blur(s: np.ndarray) -> np.ndarray:
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / 18)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    padded = np.pad(s, 3, mode="reflect")
    result = np.zeros_like(s)
    for r, c in np.ndindex(s.shape):
        result[r, c] = (padded[r : r + 7, c : c + 7] * kernel).sum()
    return result


@pytest.mark.parametrize("source", ["spectral", "gradient"])
def test_pixels_are_mixed_by_the_saliency_of_both(source: str) -> None:
    model, (x, y) = backbone("resnet18").eval(), batch(5, 40, 56)
    if source == "spectral":
        maps = spectral_residual(x).double().numpy()
    else:
        images = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(CRITERION(model(images), y).sum(), images)
        maps = gradient.double().square().mean(1).sqrt().numpy()
    maps = np.stack([slow_blur(s) for s in maps])
    maps /= maps.sum((1, 2), keepdims=True)
    mixer = GuidedMix(source)
    assert mixer.needs == ("batch" if source == "spectral" else "model")
    plan = mixer.plan(x, y, rng_of(0), *(() if source == "spectral" else (model, CRITERION)))
    index = slow_partners(maps.reshape(5, -1))
    assert plan["index"].tolist() == index
    mixed, target = mixer.mix(x, y, **plan)
    for i, j in enumerate(index):
        both = maps[i] + maps[j]
        own = np.divide(maps[i], both, out=np.full_like(both, 0.5), where=both > 0)
        np.testing.assert_allclose(plan["mask"][i, 0].numpy(), own, atol=1e-4)
        weight = torch.from_numpy(own).float()
        torch.testing.assert_close(mixed[i], weight * x[i] + (1 - weight) * x[j], atol=1e-3, rtol=0)
        torch.testing.assert_close(
            target[i], y[i] * own.mean() + y[j] * (1 - own.mean()), check_dtype=False, atol=1e-4, rtol=0
        )


def test_without_contrast_or_gradient_all_is_salient_alike() -> None:
    mixer, (x, y) = GuidedMix(), batch(4)
    flat = torch.tensor([-2.0, 0.0, 0.5, 2.0])[:, None, None, None].expand(4, 3, 32, 32).contiguous()
    assert torch.equal(spectral_residual(flat), torch.ones(4, 32, 32))
    torch.testing.assert_close(mixer.plan(flat, y, rng_of(0))["mask"], torch.full((4, 1, 32, 32), 0.5))
    x[0] = 0.7
    assert mixer.plan(x, y, rng_of(0))["mask"].isfinite().all()
    model, (x, y) = backbone("resnet18"), photos()
    nn.init.zeros_(model.get_classifier().weight)
    mask = GuidedMix("gradient").plan(x, y, rng_of(0), model, CRITERION)["mask"]
    torch.testing.assert_close(mask, torch.full_like(mask, 0.5))


@pytest.mark.parametrize(("args", "share"), [({}, 0.5), ({"source": "gradient"}, 0.8), ({"share": 0.3}, 0.3)])
def test_the_published_share_of_batches_is_mixed(args: dict, share: float) -> None:
    """By a switch, whose law ``test_laws.py`` proves."""
    assert build("guidedmix", **args).probs == pytest.approx([1 - share, share])


def test_small_images_and_a_gradient_without_a_model_are_refused_in_words() -> None:
    for source in ("spectral", "gradient"):
        with pytest.raises(ValueError, match="GuidedMix needs sides of at least 4 pixels, got 3 x 8"):
            GuidedMix(source).plan(torch.rand(2, 3, 3, 8), torch.eye(2), rng_of(0))
    with pytest.raises(ValueError, match="needs a look at the model"):
        GuidedMix("gradient").plan(*batch(), rng_of(0))
