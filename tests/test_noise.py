"""Promise: what is called a difference is one. Verdicts, paired intervals, and which runs may be compared."""

import math
import tracemalloc

import numpy as np
import pytest
from runs import edit, make_run, quick
from safetensors.numpy import load_file, save_file
from scipy import stats

from mixup_recipes.runs.compare import compare
from mixup_recipes.runs.noise import EARLY, OFF, REPRODUCED, paired_bootstrap, verdict
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError


def test_the_band_by_hand_is_inclusive_and_grows_with_the_spread_of_our_runs():
    # 80 % of 10,000 images: sigma_b = .4. Three runs, s = .3: (8 x .16 + 2 x .09) / 10 = .146; t(.975, 10) = 2.228139
    found = verdict([79.4, 79.7, 80.0], 80.0, 1, 10_000)
    assert (found.std, found.mean, found.difference) == pytest.approx((0.3, 79.7, -0.3))
    assert found.band == pytest.approx(2.228139 * math.sqrt(0.146) * math.sqrt(4 / 3), rel=1e-6)
    assert found.status == REPRODUCED
    assert verdict([79.4, 79.7, 80.0], 80.0, 3, 10_000).band == pytest.approx(found.band / math.sqrt(2))
    # one run: t(.975, 8) = 2.306004
    assert verdict([80.0], 80.0, 1, 10_000).band == pytest.approx(2.306004 * 0.4 * math.sqrt(2), rel=1e-6)
    band = verdict([80.0, 80.0], 80.0, 1, 10_000).band
    for share, status in ((1 - 1e-9, REPRODUCED), (1 + 1e-9, OFF)):
        assert verdict([80.0 + band * share] * 2, 80.0, 1, 10_000).status == status
    assert verdict([79.0, 81.0], 80.0, 1, 10_000).band > 1.5 * band


def test_a_verdict_needs_two_runs_to_be_off_and_impossible_numbers_are_refused():
    for values, status in (
        ([], EARLY), ([83.0], EARLY),  # how far seeds spread is not known yet
        ([80.9], REPRODUCED), ([80.3, 80.5], REPRODUCED), ([83.0, 83.1], OFF), ([77.0, 76.9, 77.0], OFF),
    ):  # fmt: skip
        found = verdict(values, 80.0, 1, 10_000)
        assert found.status == status
        assert (found.mean is None) == (not values) and (found.std is None) == (len(values) < 2)
    for given in ((101.0, 1, 100), (-1.0, 1, 100), (50.0, 0, 100), (50.0, 1, 0)):
        with pytest.raises(ValueError, match="expected a percentage, trials and images"):
            verdict([50.0], *given)


def test_of_true_reproductions_few_are_called_off_and_a_clear_difference_is_found():
    rng = np.random.default_rng(0)
    spread = 0.4  # as much as the binomial deviation, the careful case
    for runs, missed in ((2, 0.25), (3, 0.2)):
        off = {}
        for shift in (0.0, 4 * spread):
            ours, theirs = 80 + shift + spread * rng.normal(size=(2000, runs)), 80 + spread * rng.normal(size=2000)
            statuses = [verdict(row, float(p), 1, 10_000).status for row, p in zip(ours.tolist(), theirs, strict=True)]
            off[shift] = statuses.count(OFF) / len(statuses)
        assert off[0.0] < 0.05 and off[4 * spread] > 1 - missed


def answers(both, only_a, only_b, neither):
    """Correctness (1, images) of two models by how often which of them is right."""
    counts = (both, only_a, only_b, neither)
    return np.repeat([[True, True, False, False]], counts, 1), np.repeat([[True, False, True, False]], counts, 1)


def test_the_interval_is_mcnemars_and_the_spread_over_runs_unbiased():
    a, b = answers(7000, 800, 700, 1500)
    difference, low, high = paired_bootstrap(a, b, np.random.default_rng(0), 40_000)
    assert difference == pytest.approx(1.0)
    deviation = 100 * math.sqrt((800 + 700 - (800 - 700) ** 2 / 10_000) / 10_000**2)
    assert (low, high) == pytest.approx((1 - 1.96 * deviation, 1 + 1.96 * deviation), abs=0.05 * deviation)
    p = 0.78  # unpaired, the interval would be half as wide again
    assert high - low < 0.7 * 2 * 1.96 * 100 * math.sqrt(2 * p * (1 - p) / 10_000)
    # all images alike: only the runs differ, by whole percentages; the variance of the mean of S is s^2 / S
    share = np.array([30, 50, 70, 90])
    a = np.arange(1000) % 100 < share[:, None]
    _, low, high = paired_bootstrap(a, np.zeros((1, 1000), bool), np.random.default_rng(0), 40_000)
    deviation = math.sqrt(np.var(share, ddof=1) / 4 + 60 * 40 / 1000)
    assert (high - low) / (2 * 1.96) == pytest.approx(deviation, rel=0.08)


@pytest.mark.parametrize(("runs_a", "runs_b"), [(1, 1), (3, 1), (3, 2), (4, 4)])
def test_the_interval_is_that_of_a_naive_loop(runs_a, runs_b):
    rng = np.random.default_rng(2)
    ease = rng.uniform(size=40)
    a = rng.uniform(size=(runs_a, 40)) < ease + 0.1 * np.arange(runs_a)[:, None]
    b = rng.uniform(size=(runs_b, 40)) < ease
    difference, low, high = paired_bootstrap(a, b, np.random.default_rng(3), 20_000)
    assert difference == pytest.approx(100 * (a.mean() - b.mean()))
    draw, found = np.random.default_rng(4).integers, []
    for _ in range(1000):  # one image and one run at a time
        columns, means = draw(0, 40, 40), []
        for group in (a, b):
            rows = draw(0, len(group), len(group) - 1) if len(group) > 1 else [0]
            means.append(np.mean([np.mean([group[r, c] for c in columns]) for r in rows]))
        found.append(100 * (means[0] - means[1]))
    assert (low, high) == pytest.approx(np.percentile(found, (2.5, 97.5)), abs=0.1 * (high - low))


def test_the_interval_is_a_function_of_the_generator_and_covers_a_true_zero():
    a, b = answers(60, 20, 10, 10)
    assert paired_bootstrap(a, b, np.random.default_rng(1)) == paired_bootstrap(a, b, np.random.default_rng(1))
    rng, covered = np.random.default_rng(5), 0
    for _ in range(300):
        ease = rng.uniform(size=500)
        a, b = rng.uniform(size=(1, 500)) < ease, rng.uniform(size=(1, 500)) < ease
        _, low, high = paired_bootstrap(a, b, rng, 500)
        covered += low <= 0 <= high
    assert stats.binomtest(covered, 300, 0.95).pvalue > 1e-3


def test_imagenet_needs_little_memory_and_other_shapes_are_refused():
    rng = np.random.default_rng(0)
    right = rng.uniform(size=(6, 50_000)) < 0.77
    tracemalloc.start()
    paired_bootstrap(right[:3], right[3:], rng, 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    for a, b in (((1, 3), (1, 4)), ((3,), (3,)), ((0, 3), (1, 3))):
        with pytest.raises(ValueError, match="of the same images"):
            paired_bootstrap(np.ones(a, bool), np.ones(b, bool), rng)


@pytest.fixture
def run(tmp_path):
    """A run of three epochs by how many of 100 images its exported weights get right."""

    def make(name, right, seed=0, mixer="cutmix", done=3, labels=None, **fields):
        recipe = quick(mixer, **{"epochs": 3, "seed": seed} | fields)
        top1 = [float(right + epoch) for epoch in range(1, done + 1)]
        return Run.open(make_run(tmp_path / name, recipe, top1, sizes=(675, 100), right=right, labels=labels))

    return make


def test_two_groups_of_runs_are_compared_on_the_same_images(run):
    a = [run("a0", 60, 0), run("a1", 64, 1)]
    b = [run("b0", 50, 0, "mixup"), run("b1", 50, 1, "mixup")]
    found = compare(a, b)
    assert found.reported == (64.0, 52.0)  # medians of three epochs
    assert found.values == pytest.approx((62.0, 50.0)) and found.difference == pytest.approx(12.0)
    assert found.low < 12 < found.high and (found.images, found.runs) == (100, (2, 2))
    rows = np.arange(100)
    expected = paired_bootstrap(np.stack([rows < 60, rows < 64]), np.stack([rows < 50] * 2), np.random.default_rng(0))
    assert (found.difference, found.low, found.high) == expected
    assert "a - b of the exported weights: +12.00" in str(found)
    assert "2 runs and 2 runs" in str(found) and "one run" not in str(found)
    assert "the interval does not include its spread over seeds" in str(compare(a[:1], b[:1]))
    assert compare(b, a).difference == pytest.approx(-12.0)
    written = load_file(a[0].folder / "predictions.safetensors")
    types = {"index": "int32", "label": "int32", "top": "int32", "confidence": "float32", "nll": "float32"}
    assert {k: str(v.dtype) for k, v in written.items()} == types  # small ones
    assert written["top"].shape == (100, 2) and (written["top"][:, 0] == 0).sum() == 60


def test_only_the_mixer_may_differ_between_groups_only_the_seed_within_and_what_is_no_evidence_is_refused(run):
    a, b, far = run("a", 60), run("b", 50, mixer="mixup"), run("far", 50, mixer="mixup", lr=0.02, weight_decay=0.5)
    other, strength = run("other", 50, 1, mixer="mixup"), run("strength", 50, 1, mixer_args={"alpha": 0.3})
    splits = b.data.identity["splits"]
    edit(b.folder / "data.json", splits=splits | {"train": splits["train"] | {"images": 5}})
    other_data, again = Run.open(b.folder), Run.open(b.folder.parent / "b/../a")
    shown = run("labels", 50, 2, labels=np.arange(100) % 7)
    (blind := run("blind", 50, 1)).folder.joinpath("predictions.safetensors").unlink()
    for first, second, ignore, says in (
        ([a], [far], (), r"a and .*far differ in lr: [0-9.e-]+ and 0.02; weight_decay: .* and 0.5; pass"),
        ([a, other], [other], (), r"a and .*other differ in mixer: cutmix and mixup"),
        ([a, strength], [other], (), "differ in mixer_args: "),
        ([a], [far], ("weight_decy",), "unknown recipe field 'weight_decy'; did you mean 'weight_decay'"),
        ([a, a], [other], (), "group a has seed 0 twice"),
        ([a], [], (), "no run folders in group b"),
        ([a], [run("young", 50, done=2)], (), "young is not finished: 2 of 3 epochs"),
        ([a], [again], (), "/a is in both groups"),
        ([a], [other_data], (), r"a and .*b were trained on different images: 675 .*then, 5 now.*--ignore dataset"),
        ([a], [shown], (), r"labels and .*a were evaluated on different images: label differs"),
        ([a], [blind], (), r"blind has no predictions.safetensors.*evaluate_mixup.py .*blind --predictions"),
    ):
        with pytest.raises(UserError, match=says):
            compare(first, second, ignore=ignore)
    for second, ignore in ((far, ("lr", "weight_decay")), (strength, ()), (other_data, ("dataset",))):
        assert compare([a], [second], ignore=ignore).difference == pytest.approx(10.0)


def test_predictions_that_cannot_be_of_the_run_are_refused(run):
    a, b = run("a", 60), run("b", 50, mixer="mixup")
    p = load_file(b.folder / "predictions.safetensors")
    lacking = "was not made with the exported weights: it has top-1"
    for columns, says in (
        ({k: v for k, v in p.items() if k != "index"}, "is damaged"),
        (p | {"more": p["nll"]}, "is damaged"),
        (p | {"top": p["top"][:, 0].copy()}, "is damaged"),
        (p | {"top": p["top"][:-1].copy()}, "is damaged"),
        (p | {"top": p["top"].astype(np.float32)}, "is damaged"),
        ({k: v[:0].copy() for k, v in p.items()}, "is damaged"),
        ({k: v[:-1].copy() for k, v in p.items()}, f"{lacking} 50.51 on 99"),
        (p | {"top": p["top"] + 1}, f"{lacking} 0.00 on 100 images, but .* 50.00"),
    ):
        save_file(columns, b.folder / "predictions.safetensors")
        with pytest.raises(UserError, match=f"b/predictions.safetensors {says}"):
            compare([a], [Run.open(b.folder)])
