"""Saliency Grafting against its formula by loops, its law, its invariants, and maps without content."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from test_taps import CRITERION, FAMILIES, backbone, photos, state
from torch import nn

from mixers import Grafting
from mixers.testing import batch, differences, rng_of

LEVEL = 1e-3


def slow_candidates(s: np.ndarray, temperature: float, sigma: float) -> np.ndarray:
    weight = [[math.exp(v / temperature) for v in row] for row in s]
    total = sum(map(sum, weight))
    return np.array([[float(v / total >= sigma / s.size - 1e-9) for v in row] for row in weight])


def slow_label(own: np.ndarray, partner: np.ndarray, mask: np.ndarray, norm: int) -> float:
    def length(values: np.ndarray) -> float:
        return sum(abs(v) ** norm for v in values.flat) ** (1 / norm)

    a, b = length(own * mask) / length(own), length(partner * (1 - mask)) / length(partner)
    return a / (a + b)


@pytest.mark.parametrize("args", [{}, {"grid": 4}, {"label_norm": 1, "temperature": 0.5}, {"sigma": 1.5}])
@pytest.mark.parametrize("source", ["activation", "gradient"])
def test_a_plan_is_the_formula(source: str, args: dict) -> None:
    mixer = Grafting(source=source, **args)
    model, (x, y) = backbone("resnet18").eval(), batch(4, 128, 192)
    images = x.clone().requires_grad_()
    feature = model.forward_features(images)
    if source == "activation":
        raw = feature.detach().abs().mean(1)
    else:
        (gradient,) = torch.autograd.grad(CRITERION(model(images), y).sum(), images)
        raw = gradient.square().mean(1).sqrt()
    rows, columns = (args["grid"],) * 2 if "grid" in args else feature.shape[2:]
    maps = np.zeros((4, rows, columns))
    height, width = raw.shape[1:]
    for i, r, c in np.ndindex(maps.shape):
        down = slice(r * height // rows, -(-(r + 1) * height // rows))
        along = slice(c * width // columns, -(-(c + 1) * width // columns))
        maps[i, r, c] = raw[i, down, along].double().mean()
    maps /= maps.max((1, 2), keepdims=True)
    for update in range(3):
        plan = mixer.plan(x, y, rng_of(update), model, CRITERION)
        rng = rng_of(update)
        p, index = rng.beta(1, 1), rng.permutation(4)
        drawn = rng.random((4, rows, columns)) < p
        assert plan["index"].tolist() == index.tolist()
        for i, j in enumerate(index):
            mask = slow_candidates(maps[i], mixer.temperature, mixer.sigma) * drawn[i]
            pixels = np.kron(mask, np.ones((128 // rows, 192 // columns)))
            assert np.array_equal(plan["mask"][i, 0].numpy(), pixels)
            expected = slow_label(maps[i], maps[j], mask, mixer.label_norm)
            assert plan["lam"][i].item() == pytest.approx(expected, abs=1e-5)


def test_the_share_of_candidates_grafted_is_the_drawn_probability() -> None:
    mixer, (x, y) = Grafting(alpha=0.7, sigma=0.0), batch(2, 8, 8)
    mixer.saliency = lambda *_: torch.ones(2, 8, 8)  # type: ignore[method-assign]
    rng = np.random.default_rng(2)
    ranks = []
    for _ in range(1500):
        again = np.random.default_rng()
        again.bit_generator.state = rng.bit_generator.state
        p = again.beta(0.7, 0.7)
        count = int(mixer.plan(x, y, rng, nn.Identity(), CRITERION)["mask"].sum())
        low, high = stats.binom.cdf([count - 1, count], 128, p)
        ranks.append(low + again.random() * (high - low))  # of a discrete law, uniform when spread at random
    assert stats.kstest(ranks, "uniform").pvalue > LEVEL


def test_label_and_mask_agree_at_both_ends() -> None:
    mixer, (x, y) = Grafting(sigma=0.0), batch(4)
    mixer.saliency = lambda *_: torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1)) + 0.01
    none = every = some = 0
    for update in range(300):
        plan = mixer.plan(x, y, rng_of(update), nn.Identity(), CRITERION)
        share, lam = plan["mask"].mean((1, 2, 3)), plan["lam"]
        assert ((lam >= 0) & (lam <= 1)).all()
        assert torch.equal(share == 0, lam == 0) and torch.equal(share == 1, lam == 1)
        none, every = none + int((share == 0).sum()), every + int((share == 1).sum())
        some += int(((share - lam).abs() > 0.01).sum())
    assert min(none, every, some) > 20  # label share is not pixel share


def test_even_maps_and_maps_without_saliency_let_every_cell_be_grafted(monkeypatch) -> None:
    mixer = Grafting()
    for cells in (4, 49, 196, 784):
        side = int(cells**0.5)
        assert mixer.candidates(torch.ones(2, side, side)).all()
    model, (x, y) = backbone("resnet18"), photos()
    for value in (0.0, math.nan, math.inf):
        monkeypatch.setattr(model, "forward_features", lambda x, value=value: torch.full((4, 6, 2, 2), value))
        assert torch.equal(mixer.saliency(model, CRITERION, x, y), torch.ones(4, 2, 2))
        plan = mixer.plan(x, y, rng_of(0), model, CRITERION)
        assert plan["lam"].isfinite().all()
    model = backbone("resnet18")
    nn.init.zeros_(model.get_classifier().weight)  # a loss without a gradient
    assert torch.equal(Grafting(source="gradient").saliency(model, CRITERION, x, y), torch.ones(4, 2, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_look_leaves_no_trace(name: str) -> None:
    """By activations; of the gradient ``test_taps.py`` says so."""
    model, (x, y) = backbone(name), photos()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = state(model)
    found = Grafting().saliency(model, CRITERION, x, y)
    assert not differences(before, state(model))
    assert not found.requires_grad and found.ndim == 3
    assert torch.equal(found.amax((1, 2)), torch.ones(4)) and (found >= 0).all()


def test_a_model_that_has_no_features_is_refused_with_some_that_have() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    with pytest.raises(ValueError, match=r"Sequential has no forward_features.*resnet50"):
        Grafting().plan(*batch(), rng_of(0), model, CRITERION)
