"""The sampling laws that the mixers promise, tested on many draws with fixed seeds."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from mixers import (
    CutMix,
    FMix,
    GridMix,
    ManifoldMix,
    Mixup,
    ResizeMix,
    SaliencyMix,
    SmoothMix,
    Switch,
    build,
    fmix,
    ops,
)
from mixers.base import Plan

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


def boxes(mixer: ResizeMix, seed: int, draws: int, height: int, width: int) -> np.ndarray:
    """Tops, bottoms, lefts, rights."""
    return np.array([plan["box"][0].tolist() for plan in plans(mixer, seed, draws, 1, height, width)]).T


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0])
def test_mixup_blends_by_the_first_beta_draw_not_folded(alpha):
    drawn = [np.float32(np.random.default_rng((0, i)).beta(alpha, alpha)) for i in range(200)]
    planned = [plan["mask"].flatten().tolist() for plan in plans(Mixup(alpha), 0, 200, 2)]
    assert planned == [[lam, lam] for lam in drawn]
    assert 70 < sum(lam < 0.5 for lam in drawn) < 130


@pytest.mark.parametrize(("alpha", "mean", "almost_one"), [(1.0, 0.683, 0.012), (0.2, 0.703, 0.218)])
def test_cutmix_label_share_after_clipping_has_the_known_law(alpha, mean, almost_one):
    rng = np.random.default_rng(7)
    drawn = [ops.clipped_box(224, 224, ops.beta(alpha, alpha, rng), rng) for _ in range(20_000)]
    top, bottom, left, right = np.array(drawn).T
    lam = 1 - (bottom - top) * (right - left) / 224**2
    assert lam.mean() == pytest.approx(mean, abs=0.01)
    assert (lam > 0.99).mean() == pytest.approx(almost_one, abs=0.01)


def test_partner_index_is_a_uniform_permutation_which_leaves_one_sample_on_average():
    rng, (x, _) = np.random.default_rng(8), tiny(4)
    counts = Counter(tuple(ops.partners(x, rng).tolist()) for _ in range(6000))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > LEVEL
    for size in (1, 2, 7, 64):
        rng, (x, _) = np.random.default_rng(9), tiny(size)
        fixed = [(ops.partners(x, rng) == torch.arange(size)).sum().item() for _ in range(4000)]
        assert np.mean(fixed) == pytest.approx(1, abs=0.05)


SWITCHES = [
    (Switch([Mixup(), CutMix(), build("vanilla")]), [1 / 3] * 3),
    (Switch([Mixup(), CutMix(), build("vanilla")], [0.2, 0.5, 0.3]), [0.2, 0.5, 0.3]),
    (Switch([Mixup(), CutMix(), build("vanilla")], [0.0, 0.9, 0.1]), [0.0, 0.9, 0.1]),
    *((build(name), [0.5, 0.5]) for name in ("deit", "rsb", "alignmix")),
    (build("transmix"), [0.2, 0.8]),
    (build("mixpro"), [0.5, 0.25, 0.25]),
]


@pytest.mark.parametrize(("switch", "probs"), SWITCHES)
def test_switch_chooses_with_its_probabilities(switch, probs):
    choices = Counter(switch.draw(np.random.default_rng((10, i))) for i in range(4000))
    possible = [i for i, p in enumerate(probs) if p > 0]
    assert set(choices) == set(possible)
    assert stats.chisquare([choices[i] for i in possible], [4000 * probs[i] for i in possible]).pvalue > LEVEL


def test_switch_performs_the_step_of_the_member_it_chose(model, images_and_targets):
    members = [Mixup(0.8), CutMix(), build("vanilla")]
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    seen = set()
    for i in range(12):
        out = Switch(members)(model, criterion, *images_and_targets, np.random.default_rng((12, i)))
        rng = np.random.default_rng((12, i))
        choice = rng.choice(3)  # the switch's own draw
        alone = members[choice](model, criterion, *images_and_targets, rng)
        assert out.plan["choice"] == choice
        assert torch.equal(out.target, alone.target) and torch.equal(out.loss, alone.loss)
        seen.add(choice)
    assert seen == {0, 1, 2}


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


def test_lambda_of_exactly_zero_or_one_is_a_legal_draw():
    rng = np.random.default_rng(14)
    for lam, area in ((0.0, 1.0), (1.0, 0.0)):
        top, bottom, left, right = np.array([ops.clipped_box(8, 8, lam, rng) for _ in range(2000)]).T
        assert ((top >= 0) & (top <= bottom) & (bottom <= 8) & (left >= 0) & (left <= right) & (right <= 8)).all()
        assert ((bottom - top) * (right - left) / 64).max() == area
    assert {0.0, 1.0} <= {plan["mask"].item() for plan in plans(Mixup(0.01), 15, 200)}


def test_manifoldmix_draws_each_layer_as_often_and_its_lambda_apart_from_it():
    found = plans(ManifoldMix(0.2), 16, 6000, 2)
    assert stats.chisquare([sum(plan["layer"] == layer for plan in found) for layer in range(3)]).pvalue > LEVEL
    for layer in range(3):
        lam = shares([plan for plan in found if plan["layer"] == layer])
        inside = lam[(lam > 1e-6) & (lam < 1 - 1e-6)]  # float32 keeps no more digits next to 1
        low, high = stats.beta(0.2, 0.2).cdf([1e-6, 1 - 1e-6])
        assert stats.kstest((stats.beta(0.2, 0.2).cdf(inside) - low) / (high - low), "uniform").pvalue > LEVEL
        assert len(inside) / len(lam) == pytest.approx(high - low, abs=0.03)
    assert all(plan["lam"].tolist() == [plan["lam"][0].item()] * 2 for plan in found[:50])


def test_alignmix_lays_either_over_the_other_as_often_and_its_lambda_follows_the_beta_law():
    found = plans(build("align"), 17, 4000, 2)
    assert {plan["over"] for plan in found} == {"sample", "partner"}
    for over in ("sample", "partner"):
        lam = shares([plan for plan in found if plan["over"] == over])
        assert stats.binomtest(len(lam), len(found)).pvalue > LEVEL
        assert stats.kstest(lam, stats.beta(2, 2).cdf).pvalue > LEVEL


def test_smoothmix_label_share_has_the_known_law_whatever_alpha():
    pasted = 1 - shares(plans(SmoothMix(), 16, 2000, 1, 64, 64))
    assert pasted.mean() == pytest.approx(0.43, abs=0.01)
    assert np.quantile(pasted, [0.05, 0.95]) == pytest.approx([0.225, 0.642], abs=0.01)
    few, many = (shares(plans(SmoothMix(alpha), 16, 20, 1, 64, 64)) for alpha in (0.2, 5.0))
    assert np.array_equal(few, many)


@pytest.mark.parametrize(("clip", "mean"), [(False, 0.69), (True, 0.66)])
def test_gridmix_label_share_has_the_known_law(clip, mean):
    rng = np.random.default_rng(18)
    grids = [GridMix(0.2, clip=clip).grid(224, 224, rng) for _ in range(4000)]
    assert np.mean([1 - rows.mean() * columns.mean() for rows, columns in grids]) == pytest.approx(mean, abs=0.01)


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


def test_fmix_keeps_none_or_all_pixels_at_the_ends_and_more_with_each_count():
    image = torch.from_numpy(np.random.default_rng(23).random((6, 8), dtype=np.float32))
    masks = [top_pixels(image, kept, 0) for kept in range(49)]
    assert masks[0].sum() == 0 and masks[48].sum() == 48
    assert all((fewer <= more).all() for fewer, more in itertools.pairwise(masks))


@pytest.mark.parametrize(("placement", "mean"), [("clip", 0.827), ("inside", 0.756)])
def test_resizemix_area_has_the_known_law(placement, mean):
    found = boxes(ResizeMix(placement=placement), 24, 3000, 224, 224)
    top, bottom, left, right = found
    height, width = bottom - top, right - left
    assert (1 - height * width / 224**2).mean() == pytest.approx(mean, abs=0.01)
    assert found.min() >= 0 and found.max() <= 224
    free = (top > 0) & (bottom < 224) & (left > 0) & (right < 224)
    assert free.sum() > 300
    assert (height == width)[free if placement == "clip" else slice(None)].all()
    assert placement == "inside" or (height % 2 == 0)[free].all()


@pytest.mark.parametrize(("alpha", "use_alpha", "mean"), [(1.0, True, 0.45), (0.2, True, 0.444), (0.2, False, 0.45)])
def test_resizemix_scale_follows_the_beta_law_within_its_scope(alpha, use_alpha, mean):
    top, bottom, *_ = boxes(ResizeMix(alpha, use_alpha=use_alpha, placement="inside"), 25, 2000, 1000, 1)
    scales = (bottom - top) / 1000
    assert scales.min() >= 0.1 and scales.max() < 0.8
    assert scales.mean() == pytest.approx(mean, abs=0.012)
    drawn = [np.random.default_rng((25, i)).beta(alpha, alpha) for i in range(2000)]
    kept = [int(1000 * lam) / 1000 == scale for lam, scale in zip(drawn, scales, strict=True)]
    expected = np.diff(stats.beta(alpha, alpha).cdf([0.1, 0.8]))[0] if use_alpha else 0
    assert np.mean(kept) == pytest.approx(expected, abs=0.03)


def test_resizemix_scale_stays_in_the_scope_that_is_given():
    top, bottom, *_ = boxes(ResizeMix(scope=(0.3, 0.4), use_alpha=False, placement="inside"), 26, 1000, 1000, 1)
    scales = (bottom - top) / 1000
    assert scales.min() >= 0.3 and scales.max() < 0.4
    assert stats.kstest(scales + 0.0005, stats.uniform(0.3, 0.1).cdf).pvalue > LEVEL


def test_resizemix_shifts_a_box_of_uniform_centre_to_lie_inside():
    tops = boxes(ResizeMix(scope=(0.4, 0.4), use_alpha=False, placement="inside"), 27, 4000, 10, 10)[0].tolist()
    # 4 of 10 pixels: centres 0, 1, 2 are shifted to the top, 8 and 9 to row 6
    counts, expected = [tops.count(row) for row in range(7)], [400 * n for n in (3, 1, 1, 1, 1, 1, 2)]
    assert stats.chisquare(counts, expected).pvalue > LEVEL


def test_resizemix_places_one_box_per_batch_or_one_per_sample():
    assert all(len(plan["box"]) == 1 for plan in plans(ResizeMix(), 26, 10, 64, 40, 60))
    for plan in plans(ResizeMix(placement="inside"), 26, 10, 64, 40, 60):
        top, bottom, left, right = plan["box"].unbind(1)
        assert len(set(top.tolist())) > 3 and len(set(left.tolist())) > 3
        assert len(set((bottom - top).tolist())) == len(set((right - left).tolist())) == 1


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


DRAWN = [SmoothMix(), GridMix(), GridMix(clip=True), FMix(), FMix(max_soft=0.5, isotropic=True), ResizeMix()]
DRAWN += [ResizeMix(placement="inside"), *(SaliencyMix(box_from=where) for where in ("each", "first", "noise"))]


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
