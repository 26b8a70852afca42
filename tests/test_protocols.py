"""Promise: a run's number is the one that the protocol names, as the text states it and as OpenMixup's tools do."""

import numpy as np
import pytest

from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import protocols
from mixup_recipes.typed import UserError

HEADS = ("one_k", "mix_k", "one_q", "mix_q")


def numbered(*values: float) -> dict[int, float]:
    """Values of epochs 1, 2, ..."""
    return dict(enumerate(values, 1))


# ------------------------------------------------------------------------------------------------ the text


def test_the_median_takes_the_last_epochs_only() -> None:
    found = protocols.strict(numbered(90, 90, 10, 50, 20, 40, 30), "median", 5, 7)
    assert found == ("median of the last 5 epochs", 30, 5, 5, 7, "")
    assert found.label == "median of the last 5 epochs"
    assert protocols.strict(numbered(90, 90, 10, 50, 20, 40), "median", 4, 6).value == 30  # between 20 and 40


def test_the_best_epoch_is_the_first_of_equals() -> None:
    assert protocols.strict(numbered(10, 50, 30, 50), "best", 5, 4) == ("best epoch", 50, 4, 4, 2, "")


def test_the_window_counts_epochs_not_evaluations() -> None:
    found = protocols.strict({2: 10, 4: 20, 6: 60, 8: 70}, "median", 5, 8)
    assert (found.value, found.used, found.wanted, found.missing) == (60, 3, 5, "3 of 5 epochs")


def test_an_unfinished_run_says_so() -> None:
    found = protocols.strict(numbered(1, 2, 3, 4, 5, 6), "median", 5, 100)
    assert (found.value, found.used, found.epoch) == (4, 5, 6)
    assert found.label == "median of the last 5 epochs (at epoch 6 of 100)"
    assert protocols.strict(numbered(1, 2), "median", 5, 100).missing == "2 of 5 epochs, at epoch 2 of 100"
    assert protocols.strict(numbered(3, 2), "best", 5, 100) == ("best epoch", 3, 2, 100, 1, "2 of 100 epochs")


def test_a_window_larger_than_the_run_says_so() -> None:
    found = protocols.strict(numbered(1, 5, 3), "median", 10, 3)
    assert (found.value, found.used, found.wanted, found.missing) == (3, 3, 10, "3 of 10 epochs")
    found = protocols.tool({"": numbered(1, 5, 3)}, "median", 10, 3)
    assert (found.value, found.used, found.wanted, found.missing) == (3, 3, 11, "3 of 11 epochs")


def test_no_epoch_and_too_many_are_errors() -> None:
    for read in (protocols.strict, lambda values, *rule: protocols.tool({"": values}, *rule)):
        with pytest.raises(UserError, match="no evaluated epoch yet"):
            read({}, "median", 5, 100)
        with pytest.raises(UserError, match="epoch 101 was evaluated, but only 100 epochs are planned"):
            read({101: 1.0}, "best", 5, 100)


# ------------------------------------------------------------------------------------------------ the tools


@pytest.mark.parametrize(("last", "window"), [(5, 6), (10, 11)])
def test_the_tools_median_takes_one_epoch_more(last: int, window: int) -> None:
    values = {epoch: float(epoch * epoch) for epoch in range(1, 301)}
    found = protocols.tool({"": values}, "median", last, 300)
    assert found.name == f"OpenMixup's tool: median of the last {window} epochs"
    assert found.value == np.median([e * e for e in range(300 - last, 301)])
    assert (found.used, found.wanted, found.epoch, found.missing) == (window, window, 300, "")


def test_the_tools_best_is_the_mean_of_maximum_and_99th_percentile() -> None:
    # of 3 values the percentile lies .98 of the way from the second to the third: 20 + .98 x 20 = 39.6
    found = protocols.tool({"": numbered(10, 40, 20)}, "best", 5, 3)
    assert (found.value, found.epoch, found.used, found.wanted) == (pytest.approx(39.8), 2, 3, 3)
    assert found.name == "OpenMixup's tool: (maximum + 99th percentile) / 2 over all epochs"
    assert protocols.tool({"": numbered(*range(101))}, "best", 5, 101).value == 99.5
    assert protocols.tool({"": numbered(7)}, "best", 5, 1).value == 7


def test_the_percentile_is_numpys() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 50, 100, 101, 200):
        values = rng.uniform(0, 100, size).tolist()
        for q in (0, 1, 50, 99, 100):
            assert protocols.percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-14)


def test_the_automix_tool_by_hand() -> None:
    # last 5: epochs 5 ... 10. one_q: 1 2 3 4 5 6 -> 3.5, without the newest 3; mix_k: 9 9 1 9 9 -> 9, and 0 -> 9, too
    heads = dict.fromkeys(HEADS, numbered(*[0] * 4, 1, 2, 3, 4, 5, 6))
    assert protocols.tool(heads, "median", 5, 10).value == 3.5
    heads["mix_k"] = numbered(*[99] * 4, 9, 9, 1, 9, 9, 0)
    found = protocols.tool(heads, "median", 5, 10)
    name = "OpenMixup's AutoMix tool: best of 4 heads (mix_k), median of the last 6 epochs without the newest"
    assert found == (name, 9, 6, 6, 9, "")
    # from 10 on one more epoch than the other tool: 12 for 10, 11 for 9 would be 10
    heads = dict.fromkeys(HEADS, numbered(*range(300)))
    assert protocols.tool(heads, "median", 10, 300).value == np.median(range(288, 300))
    assert protocols.tool(heads, "median", 10, 300).wanted == 12
    assert protocols.tool(heads, "median", 9, 300).wanted == 10


def automix_tool(heads: dict[str, dict[int, float]], last: int, end: int) -> float:
    """The larger of the numbers k and q that OpenMixup's AutoMix tool prints."""
    begin = end - last - (1 if last >= 10 else 0)
    rows = {head: [values[e] for e in sorted(values) if e >= begin] for head, values in heads.items()}
    length = len(rows["one_k"])
    lengths = [n for n in (length - 1, length, length + 1) if n]
    best = [max(np.median(row[:n]) for row in rows.values()) for n in lengths]
    n = lengths[best.index(max(best))]
    k = max(np.median(rows["one_k"][:n]), np.median(rows["mix_k"][:n]))
    q = max(np.median(rows["one_q"][:n]), np.median(rows["mix_q"][:n]))
    return max(k, q)


def test_the_automix_tool_on_random_runs() -> None:
    rng = np.random.default_rng(1)
    truncated = 0
    for _ in range(300):
        done = int(rng.integers(1, 30))
        heads = {head: numbered(*rng.integers(0, 40, done).tolist()) for head in HEADS}
        last = int(rng.choice([1, 5, 9, 10, 12]))
        found = protocols.tool(heads, "median", last, 30)
        assert found.value == automix_tool(heads, last, done)
        truncated += "without the newest" in found.name
    assert 0 < truncated < 300


def test_of_several_heads_the_best_one_gives_the_tools_best() -> None:
    heads = {"one_k": numbered(1, 2, 3), "mix_k": numbered(9, 5, 4), "one_q": numbered(8, 8, 8)}
    found = protocols.tool(heads, "best", 5, 3)
    assert found.value == pytest.approx((9 + 5 + 0.98 * 4) / 2) and found.epoch == 1
    assert found.name.endswith("over all epochs, best of 3 heads (mix_k)")


def test_heads_of_different_epochs_are_refused() -> None:
    with pytest.raises(UserError, match="classifiers one_k, one_q were not evaluated at the same epochs"):
        protocols.tool({"one_k": numbered(1, 2), "one_q": numbered(1)}, "median", 5, 2)


# ------------------------------------------------------------------------------------------------ lines and trials


def test_an_epoch_logged_again_after_a_resume_counts_once() -> None:
    lines = [{"epoch": e, "top1": float(10 * e), "top5": 99.0} for e in (1, 2, 3, 2, 3)]
    lines[3]["top1"], lines[4]["top1"] = 21.0, 31.0
    heads = protocols.by_head(lines)
    assert heads == {"": {1: 10.0, 2: 21.0, 3: 31.0}}
    assert protocols.tool(heads, "median", 2, 3).value == 21.0  # four equal votes of two epochs would give 25.5


def test_heads_are_told_apart_by_their_keys() -> None:
    line = {"epoch": 4, "top1": 1.0, "ema_top1": 2.0, "mix_k_top1": 3.0, "mix_k_top5": 4.0, "stop1": 5.0}
    heads = protocols.by_head([line])
    assert heads == {"": {4: 1.0}, "ema": {4: 2.0}, "mix_k": {4: 3.0}}
    assert list(protocols.reported_heads(heads, ema=False)) == ["", "mix_k"]
    assert list(protocols.reported_heads(heads, ema=True)) == ["ema"]
    for wrong in ("high", None, float("nan")):
        with pytest.raises(UserError, match="validation of epoch 4: expected a number as top1"):
            protocols.by_head([line | {"top1": wrong}])


def test_a_run_is_read_by_its_recipe() -> None:
    lines = [{"epoch": e, "top1": float(e), "ema_top1": 50.0 + e, "mix_k_top1": 80.0} for e in range(1, 8)]
    fields = {"epochs": 7, "warmup_epochs": 0, "ema_decay": 0.9}
    number, tool = protocols.of_run(lines, load_recipe("quickstart_cutmix", **fields))
    assert (number.value, tool.value) == (5.0, 80.0)  # 3 ... 7; the best of two heads, but never the average
    number, tool = protocols.of_run(lines, load_recipe("quickstart_cutmix", **fields, report_ema=True))
    assert (number.value, tool.value) == (55.0, 54.5)
    number, tool = protocols.of_run(lines, load_recipe("quickstart_cutmix", **fields, protocol="best"))
    assert (number.value, number.epoch, tool.value) == (7.0, 7, 80.0)
    with pytest.raises(UserError, match="no validation line has ema_top1"):
        protocols.of_run([{"epoch": 1, "top1": 1.0}], load_recipe("quickstart_cutmix", **fields, report_ema=True))


def test_trials_are_the_newest_three_and_their_deviation_divides_by_n() -> None:
    mean, std = protocols.over_trials([99.0, 1.0, 2.0, 6.0])
    assert mean == 3.0 and std == pytest.approx(((4 + 1 + 9) / 3) ** 0.5)
    assert std == pytest.approx(np.std([1, 2, 6]))
    assert protocols.over_trials([5.0]) == (5.0, 0.0)
    with pytest.raises(UserError, match="no finished run"):
        protocols.over_trials([])
