"""The sampling laws that the mixers promise, tested on many draws with fixed seeds."""

import itertools
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from scipy import stats

from mixers import (
    NFM,
    CutMix,
    FMix,
    GridMix,
    ManifoldMix,
    Mixup,
    NoisyMix,
    ResizeMix,
    SaliencyMix,
    SmoothMix,
    Switch,
    build,
    ops,
)
from mixers.base import Plan
from mixers.testing import Recorder

# Tens of thousands of calls: that what they take and give has the right shapes is seen in test_parity.py.
pytestmark = pytest.mark.usefixtures("without_shape_checks")

# A correct sampler fails a test at this level once in a thousand seeds; the seeds are fixed.
LEVEL = 1e-3


def tiny(size: int = 1, height: int = 1, width: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(size, 3, height, width), torch.ones(size, 1)


def plans(mixer, seed: int, draws: int, *shape: int) -> list[Plan]:
    """What a mixer plans for one batch with the generators (seed, 0), (seed, 1) ..."""
    batch = tiny(*shape)
    return [mixer.plan(*batch, np.random.default_rng((seed, i))) for i in range(draws)]


def shares(found: list[Plan]) -> np.ndarray:
    """Label shares of the first sample."""
    return np.array([plan["lam"][0].item() for plan in found])


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0])
def test_mixup_blends_by_the_first_beta_draw_not_folded(alpha):
    drawn = [np.float32(np.random.default_rng((0, i)).beta(alpha, alpha)) for i in range(200)]
    planned = [plan["mask"].flatten().tolist() for plan in plans(Mixup(alpha), 0, 200, 2)]
    assert planned == [[lam, lam] for lam in drawn]
    assert 70 < sum(lam < 0.5 for lam in drawn) < 130


def test_partner_index_is_a_uniform_permutation_which_leaves_one_sample_on_average():
    rng, (x, _) = np.random.default_rng(8), tiny(4)
    counts = Counter(tuple(ops.partners(x, rng).tolist()) for _ in range(6000))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > LEVEL
    for size in (1, 2, 7, 64):
        rng, (x, _) = np.random.default_rng(9), tiny(size)
        fixed = [(ops.partners(x, rng) == torch.arange(size)).sum().item() for _ in range(4000)]
        assert np.mean(fixed) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("probs", [None, [0.2, 0.5, 0.3], [0.0, 0.9, 0.1]])
def test_switch_chooses_with_its_probabilities(probs):
    switch = Switch([Mixup(), CutMix(), build("vanilla")], probs)
    choices = Counter(switch.draw(np.random.default_rng((10, i))) for i in range(4000))
    possible = {i: 4000 * p for i, p in enumerate(probs or [1 / 3] * 3) if p > 0}
    assert set(choices) == set(possible)
    assert stats.chisquare([choices[i] for i in possible], list(possible.values())).pvalue > LEVEL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [False, True], ids=["in chunks", "with gradient"])
def test_lambda_zero_and_one_are_exact(dtype, with_gradient):
    rng = np.random.default_rng(13)
    # Values of very different sizes: a + (b - a) is not b in floating point.
    x = torch.from_numpy(rng.standard_normal((5, 3, 4, 6)) * 10.0 ** rng.integers(-6, 6, (5, 3, 4, 6))).to(dtype)
    y = torch.from_numpy(rng.random((5, 7), dtype=np.float32))
    index = torch.tensor([3, 1, 0, 4, 2])
    own = torch.from_numpy(rng.random((5, 1, 4, 6)) < 0.5)
    pasted = ops.blend(x, index, own.float().requires_grad_(with_gradient))
    assert torch.equal(pasted, torch.where(own, x, x[index]))  # as a box is pasted
    one, zero = (torch.full((5, 1, 1, 1), lam, requires_grad=with_gradient) for lam in (1.0, 0.0))
    assert torch.equal(ops.blend(x, index, one), x)
    assert torch.equal(ops.blend(x, index, zero), x[index])
    assert torch.equal(ops.blend_targets(y, index, torch.ones(5)), y)
    assert torch.equal(ops.blend_targets(y, index, torch.zeros(5)), y[index])


@pytest.mark.parametrize(
    ("mixer", "alpha", "choice", "choices"),
    [
        (ManifoldMix(0.2), 0.2, "layer", {0, 1, 2}),
        (build("align"), 2.0, "over", {"sample", "partner"}),
        (NFM(0.2), 0.2, "layer", {0, 1, 2, 3}),
        (NoisyMix(0.2), 0.2, "layer", {0, 1, 2, 3}),
    ],
    ids=["manifoldmix", "alignmix", "nfm", "noisymix"],
)
def test_each_layer_or_order_is_drawn_as_often_and_lambda_apart_from_it(mixer, alpha, choice, choices):
    found, law = plans(mixer, 16, 6000, 2), stats.beta(alpha, alpha)
    counts = Counter(plan[choice] for plan in found)
    assert set(counts) == choices and stats.chisquare(list(counts.values())).pvalue > LEVEL
    for chosen in choices:
        lam = shares([plan for plan in found if plan[choice] == chosen])
        inside = lam[(lam > 1e-6) & (lam < 1 - 1e-6)]  # float32 keeps no more digits next to 1
        low, high = law.cdf([1e-6, 1 - 1e-6])
        assert stats.kstest((law.cdf(inside) - low) / (high - low), "uniform").pvalue > LEVEL
        assert len(inside) / len(lam) == pytest.approx(high - low, abs=0.03)
    assert all(plan["lam"].tolist() == [plan["lam"][0].item()] * 2 for plan in found[:50])


def test_the_strengths_of_noise_follow_beta_2_5_apart_from_each_other():
    found = plans(NFM(add_noise_level=0.4, mult_noise_level=0.2), 17, 3000)
    add, mult = (np.array([plan[key] for plan in found]) for key in ("add", "mult"))
    for values, level in ((add, 0.4), (mult, 0.2)):
        assert stats.kstest(values / level, stats.beta(2, 5).cdf).pvalue > LEVEL
    assert stats.pearsonr(add, mult).pvalue > LEVEL and len({plan["seed"] for plan in found}) == 3000


def test_augmix_draws_each_operation_as_often_for_one_to_three_steps_of_each_chain_and_its_blends_by_their_laws():
    size, width = 5000, 3
    (plan,) = plans(build("augmix", severity=10.0, alpha=0.5), 29, 1, size, 30, 30)
    for view in (plan["view"], plan["other"]):
        alive = []
        for step in view["steps"]:
            counts = np.array([len(rows) for rows in step["rows"].values()])
            alive.append(counts.sum())
            assert stats.chisquare(counts, counts.sum() * np.array([1, 1, 1, 1, 5]) / 9).pvalue > LEVEL
            kinds = Counter(kind_of(*m) for m in step["matrix"].tolist())
            still = kinds.pop("still")  # shifts by less than a pixel and turns by less than a degree
            expected = {"rotate": 29 / 30, "shear_x": 1, "shear_y": 1, "translate_x": 0.9, "translate_y": 0.9}
            for kind, share in expected.items():
                assert kinds[kind] == pytest.approx(share * counts[-1] / 5, rel=0.1), kind
            assert still == pytest.approx((1 / 30 + 0.2) * counts[-1] / 5, rel=0.2)
            bits = Counter(step["bits"].tolist())
            assert set(bits) == {1, 2, 3, 4} and bits[1] == pytest.approx(counts[2] / 4, rel=0.2)
            assert stats.kstest(step["threshold"].numpy() / 256, "uniform").pvalue > LEVEL
        assert alive[0] == width * size
        assert [alive[1] / alive[0], alive[2] / alive[0]] == pytest.approx([2 / 3, 1 / 3], abs=0.02)
        assert stats.kstest(view["lam"].numpy(), stats.beta(0.5, 0.5).cdf).pvalue > LEVEL
        assert stats.kstest(view["weights"][1].numpy(), stats.beta(0.5, 1.0).cdf).pvalue > LEVEL
        assert torch.allclose(view["weights"].sum(0), torch.ones(size))


def kind_of(x: list[float], y: list[float]) -> str:
    """Which of AugMix's operations a matrix is of, also to the other side."""
    if x[1] and y[0]:
        return "rotate"
    return "shear_x" if x[1] else "shear_y" if y[0] else "translate_x" if x[2] else "translate_y" if y[2] else "still"


@pytest.mark.parametrize(
    ("mixer", "mean"),
    [
        (CutMix(1.0), 0.683), (CutMix(0.2), 0.703), (GridMix(0.2), 0.69), (GridMix(0.2, clip=True), 0.66),
        (ResizeMix(), 0.827), (ResizeMix(placement="inside"), 0.756),
    ],
)  # fmt: skip
def test_the_mean_label_share_is_the_known_one(mixer, mean):
    found = plans(mixer, 24, 6000, 1, 224, 224)
    if "box" in found[0]:
        top, bottom, left, right = np.array([plan["box"][0].tolist() for plan in found]).T
        lam = 1 - (bottom - top) * (right - left) / 224**2
    else:
        lam = shares(found)
    assert lam.mean() == pytest.approx(mean, abs=0.01)


def test_mixtoken_cuts_tokens_as_cutmix_cuts_pixels_and_tokenmixup_draws_nothing():
    model, (x, y) = timm.create_model("test_vit", img_size=224, num_classes=1), tiny(2, 224, 224)
    for i in range(300):
        cut, of_tokens = CutMix(), build("mixtoken")
        small = cut.plan(*tiny(2, 14, 14), np.random.default_rng((30, i)))
        plan = of_tokens.plan(x, y, np.random.default_rng((30, i)), model)
        assert torch.equal(plan["mask"][:, :, ::16, ::16], small["mask"]) and torch.equal(plan["index"], small["index"])
        assert torch.equal(ops.to_pixels(small["mask"], x), plan["mask"])
    rng = Recorder()
    assert build("tokenmixup").plan(x, y, rng, model) == {"base": {}} and rng.draws == []


def test_smoothmix_label_share_has_the_known_law_whatever_alpha():
    pasted = 1 - shares(plans(SmoothMix(), 16, 2000, 1, 64, 64))
    assert pasted.mean() == pytest.approx(0.43, abs=0.01)
    assert np.quantile(pasted, [0.05, 0.95]) == pytest.approx([0.225, 0.642], abs=0.01)
    few, many = (shares(plans(SmoothMix(alpha), 16, 20, 1, 64, 64)) for alpha in (0.2, 5.0))
    assert np.array_equal(few, many)


@pytest.mark.parametrize(("isotropic", "energies"), [(False, [0.12, 0.88, 0, 0]), (True, [0.30, 0.67, 0.03, 0.004])])
def test_fmix_image_has_the_known_frequencies_across(isotropic, energies):
    rng, (x, _) = np.random.default_rng(22), tiny(1, 64, 64)
    found = []
    for _ in range(1000):
        image = FMix(isotropic=isotropic).low_frequency_image(x, rng).double().numpy()
        energy = np.abs(np.fft.fft2(image - image.mean())) ** 2
        across = energy.sum(0) + np.roll(energy.sum(0)[::-1], 1)  # positive and negative frequencies together
        found.append(across[:4] / [2, 1, 1, 1] / energy.sum())
    assert np.mean(found, axis=0) == pytest.approx(energies, abs=0.02)


@pytest.mark.parametrize("height", [224, 32])
def test_saliencymix_noise_is_near_the_top_and_the_same_for_the_batch(height, monkeypatch):
    monkeypatch.setattr(ops, "half_sides", lambda *_: (1, 1))
    rows, columns = [], []
    for plan in plans(SaliencyMix(box_from="noise"), 27, 1000, 2, height, 20):
        first, second = plan["mask"]
        assert torch.equal(first, second)
        row, column = (first[0] == 0).nonzero().max(0).values.tolist()
        rows.append(row)
        columns.append(column)
    probabilities = np.exp(-np.arange(height) / 18) * (1 - np.exp(-1 / 18)) / (1 - np.exp(-height / 18))
    edges = [0, 5, 10, 20, height]
    expected = [probabilities[a:b].sum() * 1000 for a, b in itertools.pairwise(edges)]
    assert stats.chisquare(np.histogram(rows, edges)[0], expected).pvalue > LEVEL
    assert stats.chisquare(list(Counter(columns).values())).pvalue > LEVEL
    assert len(set(columns)) == 20


DRAWN = [Mixup(0.01), CutMix(), SmoothMix(), GridMix(), GridMix(clip=True), FMix(), FMix(max_soft=0.5, isotropic=True)]
DRAWN += [ResizeMix(), ResizeMix(placement="inside"), *(SaliencyMix(box_from=w) for w in ("each", "first", "noise"))]


@pytest.mark.parametrize("mixer", DRAWN, ids=str)
@pytest.mark.parametrize("lam", [None, 0.0, 1.0])
def test_small_images_and_extreme_draws_keep_labels_and_pixels_together(mixer, lam, monkeypatch):
    if lam is not None:
        monkeypatch.setattr(ops, "beta", lambda *_: lam)
    for (size, *sides), i in itertools.product([(1, 8, 8), (3, 8, 11), (2, 13, 8)], range(10)):
        y = torch.eye(3)[:size]
        x = y[:, :, None, None].expand(size, 3, *sides).contiguous()  # constant images, one channel each
        mixed, target = mixer.mix(x, y, **mixer.plan(x, y, np.random.default_rng((28, i))))
        torch.testing.assert_close(mixed.mean((2, 3)), target, atol=1e-6, rtol=0)
        assert size > 1 or (torch.equal(mixed, x) and torch.equal(target, y))
