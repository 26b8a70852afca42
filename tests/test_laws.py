"""The sampling laws that the mixers promise, tested on many draws with fixed seeds."""

import itertools
import math
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

# Tens of thousands of calls: that what they take and give has the right shapes is seen in test_parity.py.
pytestmark = pytest.mark.usefixtures("without_shape_checks")

# A correct sampler fails a test at this level once in a thousand seeds; the seeds are fixed.
LEVEL = 1e-3


def tiny(size: int = 1, height: int = 1, width: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(size, 3, height, width), torch.ones(size, 1)


def cutmix_lambdas(alpha: float, draws: int = 20_000, side: int = 224) -> np.ndarray:
    """Label shares of CutMix on square images, without making the masks."""
    rng = np.random.default_rng(7)
    boxes = np.array([ops.clipped_box(side, side, ops.beta(alpha, alpha, rng), rng) for _ in range(draws)])
    top, bottom, left, right = boxes.T
    return 1 - (bottom - top) * (right - left) / side**2


def paper_box(height: int, width: int, lam: float, row: int, column: int) -> np.ndarray:
    """CutMix's mask, one pixel at a time: 0 where it is pasted."""
    cut_height = math.floor(height * math.sqrt(1 - lam))
    cut_width = math.floor(width * math.sqrt(1 - lam))
    mask = np.ones((height, width), dtype=np.float32)
    for i in range(height):
        for j in range(width):
            in_rows = row - cut_height // 2 <= i < row + cut_height // 2
            in_columns = column - cut_width // 2 <= j < column + cut_width // 2
            if in_rows and in_columns:
                mask[i, j] = 0
    return mask


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0])
def test_mixup_blends_by_the_first_beta_draw_not_folded(alpha: float) -> None:
    planned = [Mixup(alpha).plan(*tiny(2), np.random.default_rng((0, i)))["mask"] for i in range(200)]
    drawn = [np.float32(np.random.default_rng((0, i)).beta(alpha, alpha)) for i in range(200)]
    assert [mask.flatten().tolist() for mask in planned] == [[lam, lam] for lam in drawn]
    assert 70 < sum(lam < 0.5 for lam in drawn) < 130


@pytest.mark.parametrize(("alpha", "mean", "almost_one"), [(1.0, 0.683, 0.012), (0.2, 0.703, 0.218)])
def test_cutmix_label_share_after_clipping_has_the_known_law(alpha: float, mean: float, almost_one: float) -> None:
    lam = cutmix_lambdas(alpha)
    assert lam.mean() == pytest.approx(mean, abs=0.01)
    assert (lam > 0.99).mean() == pytest.approx(almost_one, abs=0.01)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (13, 7), (1, 6)])
def test_cutmix_mask_is_the_box_of_the_paper(height: int, width: int) -> None:
    for i in range(60):
        plan = CutMix(1.0).plan(*tiny(2, height, width), np.random.default_rng((5, i)))
        rng = np.random.default_rng((5, i))
        lam = rng.beta(1.0, 1.0)
        expected = paper_box(height, width, lam, rng.integers(height), rng.integers(width))
        np.testing.assert_array_equal(plan["mask"].numpy(), np.stack([expected[None]] * 2))
        np.testing.assert_allclose(plan["lam"].numpy(), expected.mean(), atol=1e-6)


def test_partner_index_is_a_uniform_permutation_which_leaves_one_sample_on_average() -> None:
    rng = np.random.default_rng(8)
    x, _ = tiny(4)
    drawn = [tuple(ops.partners(x, rng).tolist()) for _ in range(6000)]
    counts = Counter(drawn)
    assert len(counts) == 24
    assert all(sorted(index) == [0, 1, 2, 3] for index in counts)
    assert stats.chisquare(list(counts.values())).pvalue > LEVEL
    for size in (1, 2, 7, 64):
        rng = np.random.default_rng(9)
        x, _ = tiny(size)
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
def test_switch_chooses_with_its_probabilities(switch: Switch, probs: list[float]) -> None:
    choices = Counter(switch.draw(np.random.default_rng((10, i))) for i in range(4000))
    possible = [i for i, p in enumerate(probs) if p > 0]
    assert set(choices) == set(possible)
    assert stats.chisquare([choices[i] for i in possible], [4000 * probs[i] for i in possible]).pvalue > LEVEL


def test_switch_performs_the_step_of_the_member_it_chose(model, images_and_targets) -> None:
    members = [Mixup(0.8), CutMix(), build("vanilla")]
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    seen = set()
    for i in range(12):
        out = Switch(members)(model, criterion, *images_and_targets, np.random.default_rng((12, i)))
        choice = out.plan["choice"]
        seen.add(choice)
        rng = np.random.default_rng((12, i))
        assert rng.choice(3) == choice  # the switch's own draw
        alone = members[choice](model, criterion, *images_and_targets, rng)
        assert torch.equal(out.target, alone.target)
        assert torch.equal(out.loss, alone.loss)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [False, True], ids=["in chunks", "with gradient"])
def test_lambda_zero_and_one_are_exact(dtype: torch.dtype, with_gradient: bool) -> None:
    rng = np.random.default_rng(13)
    # Values of very different sizes: a + (b - a) is not b in floating point.
    values = rng.standard_normal((5, 3, 4, 6)) * 10.0 ** rng.integers(-6, 6, (5, 3, 4, 6))
    x = torch.from_numpy(values).to(dtype)
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


def test_lambda_of_exactly_zero_or_one_is_a_legal_draw() -> None:
    rng = np.random.default_rng(14)
    for lam, area in ((0.0, 1.0), (1.0, 0.0)):
        largest = 0.0
        for _ in range(2000):
            top, bottom, left, right = ops.clipped_box(8, 8, lam, rng)
            assert 0 <= top <= bottom <= 8
            assert 0 <= left <= right <= 8
            largest = max(largest, (bottom - top) * (right - left) / 64)
        assert largest == area
    draws = [Mixup(0.01).plan(*tiny(), np.random.default_rng((15, i)))["mask"].item() for i in range(200)]
    assert {0.0, 1.0} <= set(draws)


def test_manifoldmix_draws_each_layer_as_often_and_its_lambda_apart_from_it() -> None:
    plans = [ManifoldMix(0.2).plan(*tiny(2), np.random.default_rng((16, i))) for i in range(6000)]
    assert stats.chisquare([sum(plan["layer"] == layer for plan in plans) for layer in range(3)]).pvalue > LEVEL
    for layer in range(3):
        lam = np.array([plan["lam"][0].item() for plan in plans if plan["layer"] == layer], dtype=np.float64)
        inside = lam[(lam > 1e-6) & (lam < 1 - 1e-6)]  # float32 keeps no more digits next to 1
        low, high = stats.beta(0.2, 0.2).cdf([1e-6, 1 - 1e-6])
        assert stats.kstest((stats.beta(0.2, 0.2).cdf(inside) - low) / (high - low), "uniform").pvalue > LEVEL
        assert len(inside) / len(lam) == pytest.approx(high - low, abs=0.03)
    assert all(plan["lam"].tolist() == [plan["lam"][0].item()] * 2 for plan in plans[:50])


def test_alignmix_lays_either_over_the_other_as_often_and_its_lambda_follows_the_beta_law() -> None:
    plans = [build("align").plan(*tiny(2), np.random.default_rng((17, i))) for i in range(4000)]
    assert {plan["over"] for plan in plans} == {"sample", "partner"}
    for over in ("sample", "partner"):
        lam = [plan["lam"][0].item() for plan in plans if plan["over"] == over]
        assert stats.binomtest(len(lam), len(plans)).pvalue > LEVEL
        assert stats.kstest(lam, stats.beta(2, 2).cdf).pvalue > LEVEL


def shares(mixer, draws: int, side: int = 64) -> np.ndarray:
    """Label shares of the first sample over many plans, on square images."""
    x, y = tiny(1, side, side)
    return np.array([mixer.plan(x, y, np.random.default_rng((16, i)))["lam"][0].item() for i in range(draws)])


def test_smoothmix_label_share_has_the_known_law_whatever_alpha() -> None:
    pasted = 1 - shares(SmoothMix(), 2000)
    assert pasted.mean() == pytest.approx(0.43, abs=0.01)
    assert np.quantile(pasted, [0.05, 0.95]) == pytest.approx([0.225, 0.642], abs=0.01)
    assert np.array_equal(shares(SmoothMix(0.2), 20), shares(SmoothMix(5.0), 20))


@pytest.mark.parametrize(("clip", "mean"), [(False, 0.69), (True, 0.66)])
def test_gridmix_label_share_has_the_known_law(clip: bool, mean: float) -> None:
    rng = np.random.default_rng(18)
    grids = [GridMix(0.2, clip=clip).grid(224, 224, rng) for _ in range(4000)]
    assert np.mean([1 - rows.mean() * columns.mean() for rows, columns in grids]) == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize(("isotropic", "energies"), [(False, [0.12, 0.88, 0, 0]), (True, [0.30, 0.67, 0.03, 0.004])])
def test_fmix_image_has_the_known_frequencies_across(isotropic: bool, energies: list[float]) -> None:
    rng = np.random.default_rng(22)
    x, _ = tiny(1, 64, 64)
    found = []
    for _ in range(1000):
        image = FMix(isotropic=isotropic).low_frequency_image(x, rng).double().numpy()
        energy = np.abs(np.fft.fft2(image - image.mean())) ** 2
        across = energy.sum(0) + np.roll(energy.sum(0)[::-1], 1)  # positive and negative frequencies together
        found.append(across[:4] / [2, 1, 1, 1] / energy.sum())
    assert np.mean(found, axis=0) == pytest.approx(energies, abs=0.02)


def test_fmix_keeps_none_or_all_pixels_at_the_ends_and_more_with_each_count() -> None:
    image = torch.from_numpy(np.random.default_rng(23).random((6, 8), dtype=np.float32))
    masks = [fmix.top_pixels(image, kept, 0) for kept in range(49)]
    assert masks[0].sum() == 0 and masks[48].sum() == 48
    assert all((fewer <= more).all() for fewer, more in itertools.pairwise(masks))


def boxes(mixer: ResizeMix, seed: int, draws: int, height: int, width: int) -> np.ndarray:
    """Rows of top, bottom, left, right."""
    x, y = tiny(1, height, width)
    return np.array([mixer.plan(x, y, np.random.default_rng((seed, i)))["box"][0].tolist() for i in range(draws)])


@pytest.mark.parametrize(("placement", "mean"), [("clip", 0.827), ("inside", 0.756)])
def test_resizemix_area_has_the_known_law(placement: str, mean: float) -> None:
    found = boxes(ResizeMix(placement=placement), 24, 3000, 224, 224)
    top, bottom, left, right = found.T
    assert (1 - (bottom - top) * (right - left) / 224**2).mean() == pytest.approx(mean, abs=0.01)
    assert found.min() >= 0 and found.max() <= 224
    free = (top > 0) & (bottom < 224) & (left > 0) & (right < 224)
    assert free.sum() > 300
    assert (bottom - top == right - left)[free].all()
    if placement == "clip":
        assert ((bottom - top) % 2 == 0)[free].all()
    else:
        assert (bottom - top == right - left).all()


@pytest.mark.parametrize(("alpha", "use_alpha", "mean"), [(1.0, True, 0.45), (0.2, True, 0.444), (0.2, False, 0.45)])
def test_resizemix_scale_follows_the_beta_law_within_its_scope(alpha: float, use_alpha: bool, mean: float) -> None:
    top, bottom, *_ = boxes(ResizeMix(alpha, use_alpha=use_alpha, placement="inside"), 25, 2000, 1000, 1).T
    scales = (bottom - top) / 1000
    assert scales.min() >= 0.1 and scales.max() < 0.8
    assert scales.mean() == pytest.approx(mean, abs=0.012)
    drawn = [np.random.default_rng((25, i)).beta(alpha, alpha) for i in range(2000)]
    kept = [int(1000 * lam) / 1000 == scale for lam, scale in zip(drawn, scales, strict=True)]
    expected = np.diff(stats.beta(alpha, alpha).cdf([0.1, 0.8]))[0] if use_alpha else 0
    assert np.mean(kept) == pytest.approx(expected, abs=0.03)


def test_resizemix_scale_stays_in_the_scope_that_is_given() -> None:
    top, bottom, *_ = boxes(ResizeMix(scope=(0.3, 0.4), use_alpha=False, placement="inside"), 26, 1000, 1000, 1).T
    scales = (bottom - top) / 1000
    assert scales.min() >= 0.3 and scales.max() < 0.4
    assert stats.kstest(scales + 0.0005, stats.uniform(0.3, 0.1).cdf).pvalue > LEVEL


def test_resizemix_shifts_a_box_of_uniform_centre_to_lie_inside() -> None:
    tops = boxes(ResizeMix(scope=(0.4, 0.4), use_alpha=False, placement="inside"), 27, 4000, 10, 10)[:, 0].tolist()
    # 4 of 10 pixels: centres 0, 1, 2 are shifted to the top, 8 and 9 to row 6
    expected = {0: 3, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2}
    counts = [tops.count(row) for row in range(7)]
    assert stats.chisquare(counts, [400 * n for n in expected.values()]).pvalue > LEVEL


def test_resizemix_places_one_box_per_batch_or_one_per_sample() -> None:
    x, y = tiny(64, 40, 60)
    for i in range(10):
        rng = np.random.default_rng((26, i))
        assert len(ResizeMix().plan(x, y, rng)["box"]) == 1
        top, bottom, left, right = ResizeMix(placement="inside").plan(x, y, rng)["box"].unbind(1)
        assert len(set(top.tolist())) > 3 and len(set(left.tolist())) > 3
        assert len(set((bottom - top).tolist())) == len(set((right - left).tolist())) == 1


@pytest.mark.parametrize("height", [224, 32])
def test_saliencymix_noise_is_near_the_top_and_the_same_for_the_batch(height: int) -> None:
    x, y = tiny(2, height, 20)
    rows, columns = [], []
    for i in range(1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "half_sides", lambda *_: (1, 1))
            mask = SaliencyMix(box_from="noise").plan(x, y, np.random.default_rng((27, i)))["mask"]
        assert torch.equal(mask[0], mask[1])
        inside = (mask[0, 0] == 0).nonzero()
        rows.append(inside[:, 0].max().item())
        columns.append(inside[:, 1].max().item())
    probabilities = np.exp(-np.arange(height) / 18) * (1 - np.exp(-1 / 18)) / (1 - np.exp(-height / 18))
    edges = [0, 5, 10, 20, height]
    counts = np.histogram(rows, edges)[0]
    expected = [probabilities[a:b].sum() * 1000 for a, b in itertools.pairwise(edges)]
    assert stats.chisquare(counts, expected).pvalue > LEVEL
    assert stats.chisquare(list(Counter(columns).values())).pvalue > LEVEL
    assert len(set(columns)) == 20


DRAWN = [SmoothMix(), GridMix(), GridMix(clip=True), FMix(), FMix(max_soft=0.5, isotropic=True), ResizeMix()]
DRAWN += [ResizeMix(placement="inside"), *(SaliencyMix(box_from=where) for where in ("each", "first", "noise"))]


@pytest.mark.parametrize("mixer", DRAWN, ids=str)
@pytest.mark.parametrize("lam", [None, 0.0, 1.0])
@pytest.mark.parametrize(("size", "height", "width"), [(1, 8, 8), (3, 8, 11), (2, 13, 8)])
def test_small_images_and_extreme_draws_keep_labels_and_pixels_together(
    mixer, lam, size, height, width, monkeypatch
) -> None:
    if lam is not None:
        monkeypatch.setattr(ops, "beta", lambda *_: lam)
    y = torch.eye(3)[:size]
    x = y[:, :, None, None].expand(size, 3, height, width).contiguous()  # constant images, one channel each
    for i in range(10):
        plan = mixer.plan(x, y, np.random.default_rng((28, i)))
        mixed, target = mixer.mix(x, y, **plan)
        torch.testing.assert_close(mixed.mean((2, 3)), target, atol=1e-6, rtol=0)
        if size == 1:
            assert torch.equal(mixed, x) and torch.equal(target, y)
