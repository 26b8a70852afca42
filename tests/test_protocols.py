"""Promise: a run's number is the one that the protocol names, as the text states it and as OpenMixup's tools do."""

import numpy as np
import pytest

from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import protocols
from mixup_recipes.training.protocols import strict, tool
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

HEADS = ("one_k", "mix_k", "one_q", "mix_q")


def numbered(*values):
    """Values of epochs 1, 2, ..."""
    return dict(enumerate(values, 1))


def test_the_text_takes_the_last_epochs_or_the_first_best_one_and_says_what_is_missing_or_wrong():
    for values, protocol, last, epochs, expected in (
        (numbered(90, 90, 10, 50, 20, 40, 30), "median", 5, 7, (30, 5, 5, 7, "")),
        (numbered(90, 90, 10, 50, 20, 40), "median", 4, 6, (30, 4, 4, 6, "")),  # between 20 and 40
        (numbered(10, 50, 30, 50), "best", 5, 4, (50, 4, 4, 2, "")),
        ({2: 10, 4: 20, 6: 60, 8: 70}, "median", 5, 8, (60, 3, 5, 8, "3 of 5 epochs")),  # epochs, not evaluations
        (numbered(1, 2, 3, 4, 5, 6), "median", 5, 100, (4, 5, 5, 6, "at epoch 6 of 100")),
        (numbered(1, 2), "median", 5, 100, (1.5, 2, 5, 2, "2 of 5 epochs, at epoch 2 of 100")),
        (numbered(3, 2), "best", 5, 100, (3, 2, 100, 1, "2 of 100 epochs")),
        (numbered(1, 5, 3), "median", 10, 3, (3, 3, 10, 3, "3 of 10 epochs")),
        (numbered(9, 3, 5, 5), "best_of_last", 3, 4, (5, 3, 3, 3, "")),
        (numbered(9, 8, 5), "best_of_last", 2, 6, (5, 0, 2, 3, "0 of 2 epochs, at epoch 3 of 6")),  # not begun
        (numbered(9, 8, 7, 5, 6), "best_of_last", 2, 6, (6, 1, 2, 5, "1 of 2 epochs, at epoch 5 of 6")),
    ):
        found, missing = strict(values, protocol, last, epochs), expected[-1]
        name = {"best": "best epoch", "best_of_last": f"best of the last {last} epochs"}.get(protocol)
        name = name or f"median of the last {last} epochs"
        assert found == (name, *expected) and found.label == name + f" ({missing})" * bool(missing)
    for read in (strict, lambda values, *rule: tool({"": values}, *rule)):
        with pytest.raises(UserError, match="no evaluated epoch yet"):
            read({}, "median", 5, 100)
        with pytest.raises(UserError, match="epoch 101 was evaluated, but only 100 epochs are planned"):
            read({101: 1.0}, "best", 5, 100)
    with pytest.raises(UserError, match="classifiers one_k, one_q were not evaluated at the same epochs"):
        tool({"one_k": numbered(1, 2), "one_q": numbered(1)}, "median", 5, 2)


def test_one_epoch_and_one_of_anything_are_said_as_one():
    assert protocols.plainly(strict(numbered(1, 5), "median", 1, 2).label) == "last epoch"
    name = strict(numbered(1, 5), "median", 11, 2).label
    assert protocols.plainly(name) == name == "median of the last 11 epochs (2 of 11 epochs)"
    assert [many(n, "image") for n in (0, 1, 1234)] == ["0 images", "1 image", "1,234 images"]
    assert (many(1, "class"), many(2, "class"), many(2, "row is", "rows are")) == ("1 class", "2 classes", "2 rows are")


def test_the_tools_median_takes_one_epoch_more():
    squares = [float(epoch * epoch) for epoch in range(1, 301)]
    for last, window in ((5, 6), (10, 11)):
        name, value = f"OpenMixup's tool: median of the last {window} epochs", np.median(squares[-window:])
        assert tool({"": numbered(*squares)}, "median", last, 300) == (name, value, window, window, 300, "")
    assert tool({"": numbered(1, 5, 3)}, "median", 10, 3)[1:] == (3, 3, 11, 3, "3 of 11 epochs")


def test_the_tools_best_is_the_mean_of_maximum_and_99th_percentile_of_the_best_head():
    # of 3 values the percentile lies .98 of the way from the second to the third: 20 + .98 x 20 = 39.6
    name = "OpenMixup's tool: (maximum + 99th percentile) / 2 over all epochs"
    assert tool({"": numbered(10, 40, 20)}, "best", 5, 3) == (name, pytest.approx(39.8), 3, 3, 2, "")
    assert tool({"": numbered(*range(101))}, "best", 5, 101).value == 99.5
    assert tool({"": numbered(10, 40, 20)}, "best_of_last", 1, 3) == tool({"": numbered(10, 40, 20)}, "best", 5, 3)
    assert tool({"": numbered(7)}, "best", 5, 1).value == 7
    found = tool({"one_k": numbered(1, 2, 3), "mix_k": numbered(9, 5, 4), "one_q": numbered(8, 8, 8)}, "best", 5, 3)
    assert found[:2] == (f"{name}, best of 3 heads (mix_k)", pytest.approx((9 + 5 + 0.98 * 4) / 2)) and found.epoch == 1
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 50, 100, 101, 200):
        values = rng.uniform(0, 100, size).tolist()
        for q in (0, 1, 50, 99, 100):
            assert protocols.percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-14)


def automix_tool(heads, last, end):
    """The larger of the numbers k and q that OpenMixup's AutoMix tool prints: both are of the best window of all."""
    begin = end - last - (1 if last >= 10 else 0)
    rows = [[values[e] for e in sorted(values) if e >= begin] for values in heads.values()]
    length = len(rows[0])
    return max(np.median(row[:n]) for n in (length - 1, length, length + 1) if n for row in rows)


def test_the_automix_tool_by_hand_and_on_random_runs():
    # last 5: epochs 5 ... 10. one_q: 1 2 3 4 5 6 -> 3.5, without the newest 3; mix_k: 9 9 1 9 9 -> 9, and 0 -> 9, too
    heads = dict.fromkeys(HEADS, numbered(*[0] * 4, 1, 2, 3, 4, 5, 6))
    assert tool(heads, "median", 5, 10).value == 3.5
    heads["mix_k"] = numbered(*[99] * 4, 9, 9, 1, 9, 9, 0)
    name = "OpenMixup's AutoMix tool: best of 4 heads (mix_k), median of the last 6 epochs without the newest"
    assert tool(heads, "median", 5, 10) == (name, 9, 6, 6, 9, "")
    # from 10 on one more epoch than the other tool: 12 for 10, 11 for 9 would be 10
    heads = dict.fromkeys(HEADS, numbered(*range(300)))
    assert tool(heads, "median", 10, 300)[1:4] == (np.median(range(288, 300)), 12, 12)
    assert tool(heads, "median", 9, 300).wanted == 10
    rng = np.random.default_rng(1)
    truncated = 0
    for _ in range(300):
        done = int(rng.integers(1, 30))
        heads = {head: numbered(*rng.integers(0, 40, done).tolist()) for head in HEADS}
        last = int(rng.choice([1, 5, 9, 10, 12]))
        found = tool(heads, "median", last, 30)
        assert found.value == automix_tool(heads, last, done)
        truncated += "without the newest" in found.name
    assert 0 < truncated < 300


def test_heads_are_told_apart_by_their_keys_and_an_epoch_logged_again_counts_once():
    lines = [{"epoch": e, "top1": t, "top5": 99.0} for e, t in ((1, 10.0), (2, 20.0), (3, 30.0), (2, 21.0), (3, 31.0))]
    heads = protocols.by_head(lines)
    assert heads == {"": {1: 10.0, 2: 21.0, 3: 31.0}}
    assert tool(heads, "median", 2, 3).value == 21.0  # four equal votes of two epochs would give 25.5
    line = {"epoch": 4, "top1": 1.0, "ema_top1": 2.0, "mix_k_top1": 3.0, "mix_k_top5": 4.0, "stop1": 5.0}
    heads = protocols.by_head([line])
    assert heads == {"": {4: 1.0}, "ema": {4: 2.0}, "mix_k": {4: 3.0}}
    assert list(protocols.reported_heads(heads, ema=False)) == ["", "mix_k"]
    assert list(protocols.reported_heads(heads, ema=True)) == ["ema"]
    for wrong in ("high", None, float("nan")):
        with pytest.raises(UserError, match="validation of epoch 4: expected a number as top1"):
            protocols.by_head([line | {"top1": wrong}])


def test_a_run_is_read_by_its_recipe():
    lines = [{"epoch": e, "top1": float(e), "ema_top1": 50.0 + e, "mix_k_top1": 80.0} for e in range(1, 8)]
    for fields, value, epoch, tools in (
        ({}, 5.0, 7, 80.0),  # 3 ... 7; the best of two heads, but never the average
        ({"report_ema": True}, 55.0, 7, 54.5),
        ({"protocol": "best"}, 7.0, 7, 80.0),
    ):
        recipe = load_recipe("quickstart_cutmix", epochs=7, warmup_epochs=0, ema_decay=0.9, **fields)
        number, other = protocols.of_run(lines, recipe)
        assert (number.value, number.epoch, other.value) == (value, epoch, tools)
        if recipe.report_ema:
            with pytest.raises(UserError, match="no validation line has ema_top1"):
                protocols.of_run([{"epoch": 1, "top1": 1.0}], recipe)


def test_trials_are_the_newest_three_and_their_deviation_divides_by_n():
    assert protocols.over_trials([99.0, 1.0, 2.0, 6.0]) == (3.0, pytest.approx(((4 + 1 + 9) / 3) ** 0.5))
    assert protocols.over_trials([5.0]) == (5.0, 0.0)
    with pytest.raises(UserError, match="no finished run"):
        protocols.over_trials([])
