"""Promise: logs of ours, of OpenMixup and of timm become the same curves, and a log that cannot is one clear line."""

import itertools
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from runs import make_run, quick, train_line, val_line
from timm.utils import update_summary

from mixup_recipes.files import lock
from mixup_recipes.runs.curves import curves_of, describe, opened
from mixup_recipes.runs.log import read_rows
from mixup_recipes.runs.run import Run
from mixup_recipes.training.log import Log, evaluations
from mixup_recipes.typed import UserError

HEADS = ("one_k", "mix_k", "one_q", "mix_q")
NO_RULE = (None, None, None, None)


def openmixup(path: Path, *val: dict[str, float], start: int = 1) -> Path:
    """A log as mmcv writes it: one line of environment, training lines, one validation line per epoch."""
    config = 'evaluation = dict(interval=1, "mode": \'val\', "update": 1)'  # a text inside the first line
    lines: list[dict[str, Any]] = [{"env_info": "sys.platform: linux", "config": config, "seed": 0}]
    for epoch, values in enumerate(val, start):
        lines += [{"mode": "train", "epoch": epoch, "iter": 50, "lr": 0.1, "loss": 2.5, "acc": 60.0}]
        lines += [{"mode": "val", "epoch": epoch, "iter": 391, "lr": 0.1, **values}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ours(folder: Path, top1: list[float], **fields: Any) -> Path:
    """A run folder whose average of the weights is better by 1."""
    lines = []
    for epoch, value in enumerate(top1, 1):
        ema: dict[str, Any] = {"ema_top1": value + 1, "ema_top5": 90.0, "ema_nll": 1.0, "ema_ece": 2.0}
        lines += [train_line(epoch), val_line(epoch, value, **ema)]
    return make_run(folder, quick(**{"epochs": len(top1), "ema_decay": 0.9} | fields), lines=lines)


def timm_summary(path: Path, top1: list[float], start: int = 0) -> Path:
    """A summary as timm 1.0.31 writes it; its training script counts epochs from 0 and writes a header per start."""
    for epoch, value in enumerate(top1, start):
        found = {"loss": 1.0, "top1": value, "top5": 90.0}
        update_summary(epoch, {"loss": 2.0}, found, str(path), lr=0.1, write_header=epoch == start)
    return path


def test_a_run_folder_its_log_and_its_summary_say_the_same(tmp_path):
    run = ours(tmp_path / "run", [10.0, 30.0, 20.0])
    expected = {"": {1: 10.0, 2: 30.0, 3: 20.0}, "ema": {1: 11.0, 2: 31.0, 3: 21.0}}
    for source in (opened(run), run, run / "log.jsonl", run / "summary.csv"):
        assert curves_of(source).heads == expected
    assert isinstance(opened(run), Run) and opened(run / "log.jsonl") == run / "log.jsonl"
    assert curves_of(opened(run)).source == curves_of(run).source == f"{run}/log.jsonl: our log"
    assert curves_of(run / "summary.csv").source.endswith("our summary.csv")
    header = (run / "summary.csv").read_text().splitlines()[0].split(",")
    assert "eval_nll" in header and "eval_loss" not in header  # which tells it from timm's


def test_openmixups_log_has_one_classifier_or_four_and_the_format_shows_in_the_content_not_in_the_name(tmp_path):
    plain = [{"head0_top1": 70.0 + e, "head0_top5": 90.0} for e in range(3)]
    found = curves_of(openmixup(tmp_path / "log.jsonl", *plain))
    assert found.heads == {"": {1: 70.0, 2: 71.0, 3: 72.0}} and found.source.endswith(": OpenMixup's log")
    four = [{f"acc_{head}_top{n}": 10.0 * n + e for head in HEADS for n in (1, 5)} for e in range(2)]
    found = curves_of(openmixup(tmp_path / "b.log.json", *four))
    assert found.heads == {head: {1: 10.0, 2: 11.0} for head in HEADS}
    path = ours(tmp_path / "run", [1.0]) / "log.jsonl"
    assert curves_of(path.rename(tmp_path / "results.txt")).source.endswith("our log")
    assert curves_of(timm_summary(tmp_path / "x.log.json", [1.0])).source.endswith("timm's summary.csv")


def test_of_a_repeated_epoch_the_last_line_counts_and_of_several_logs_the_last_in_lexical_order(tmp_path):
    first = openmixup(tmp_path / "a.log.json", *[{"head0_top1": float(e)} for e in (1, 2, 3)])
    again = openmixup(tmp_path / "b.log.json", {"head0_top1": 30.0}, {"head0_top1": 40.0}, start=3)
    first.write_text(first.read_text() + again.read_text())
    assert curves_of(first).heads == {"": {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}}
    run = ours(tmp_path / "run", [1.0, 2.0])
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(val_line(2, 5.0, ema_top1=2.0)) + "\n")
    for source in (opened(run), run):
        assert curves_of(source).heads == {"": {1: 1.0, 2: 5.0}, "ema": {1: 2.0, 2: 2.0}}
    (tmp_path / "logs").mkdir()
    for value, name in ((1.0, "20220101_120000"), (3.0, "20220301_080000"), (2.0, "20220201_235959")):
        openmixup(tmp_path / f"logs/{name}.log.json", {"head0_top1": value})
    (tmp_path / "logs/summary.csv").write_text("no log")
    assert curves_of(tmp_path / "logs").heads == {"": {1: 3.0}}
    (tmp_path / "timm").mkdir()
    path = timm_summary(tmp_path / "timm/summary.csv", [10.0, 20.0, 30.0])  # its epochs count from 0
    assert curves_of(path).heads == {"": {1: 10.0, 2: 20.0, 3: 30.0}}
    timm_summary(path, [33.0, 40.0], start=2)  # a resumed run repeats its header
    assert curves_of(path.parent).heads == {"": {1: 10.0, 2: 20.0, 3: 33.0, 4: 40.0}}
    assert path.read_text().count("epoch,") == 2
    with path.open("a") as file:
        file.write("4,2.0,1.0,5")  # killed while it wrote 50.0
    assert max(curves_of(path.parent).heads[""]) == 4


def test_a_cut_last_line_is_left_out_and_damage_elsewhere_names_its_line(tmp_path):
    path = openmixup(tmp_path / "a.log.json", {"head0_top1": 1.0}, {"head0_top1": 2.0})
    whole = path.read_text()
    for text, expected in ((whole[:-9], {1: 1.0}), (whole[:-1], {1: 1.0, 2: 2.0})):  # whole, but for its end of line
        path.write_text(text)
        assert curves_of(path).heads == {"": expected}
    path.write_text(whole.replace('"iter": 391', '"iter": ', 1))
    log = ours(tmp_path / "run", [1.0, 2.0]) / "log.jsonl"
    log.write_text(log.read_text().replace('"update": 3, ', "", 1))
    (tmp_path / "empty").mkdir()
    table = timm_summary(tmp_path / "summary.csv", [1.0, 2.0, 3.0])
    table.write_text(table.read_text().replace("1,2.0,1.0,2.0", "1,2.0,2.0"))
    for source, says in (
        (path, r"a\.log\.json, line 3: expected a JSON object$"),
        (opened(log.parent), r"log\.jsonl, line 1: update is missing"),
        (log, r"log\.jsonl, line 1: update is missing"),
        (table, r"summary\.csv, line 3: expected 6 numbers"),
        (tmp_path / "nothing", f"cannot read {tmp_path}/nothing: No such file"),
        (tmp_path / "empty", f"no log in {tmp_path}/empty: expected log.jsonl, an OpenMixup"),
    ):
        with pytest.raises(UserError, match=says):
            curves_of(source)
    for damage, read in itertools.product(
        ("[" * 10**5, f'{{"epoch": {"9" * 5000}}}', "[1]", "null"), (curves_of, read_rows)
    ):
        log.write_text(f"{json.dumps(WHOLE)}\n{damage}\n{json.dumps(WHOLE)}\n")
        with pytest.raises(UserError, match=r"log\.jsonl, line 2: expected a JSON object$"):
            read(log)


WHOLE = val_line(1, 50.0, count=100)
TIMM = "epoch,train_loss,eval_loss,eval_top1\n0,1,1,50\n"


def test_what_is_no_log_or_a_damaged_summary_is_explained_in_one_line(tmp_path):
    path = tmp_path / "some.log"
    cases = {
        "": ": unknown format",
        "\x00\x01\x02": ": unknown format",
        '{\n "architecture": "resnet50"\n}\n': ": unknown format",
        "epoch,loss\n1,2.0\n": ": unknown format",
        "epoch,eval_top1\n1,2.0\n": ": unknown format; expected a column eval_loss (timm) or eval_nll (ours)",
        "epoch,eval_loss,eval_top1\n": ": timm's summary.csv has no validation lines",
        '{"env_info": "linux", "seed": 0}\n': ": OpenMixup's log has no validation lines",
        '{"mode": "train", "epoch": 1, "update": 3}\n': ": our log has no validation lines",
        '{"mode": "val", "epoch": 1, "head0_mAP": 3}\n': ": OpenMixup's log has no validation lines",
        '{"mode": "val", "head0_top1": 3.0}\n': ", line 1: epoch is missing",
        '{"mode": "val", "epoch": 2, "head0_top1": "x"}\n': ", line 1: head0_top1: expected a number from 0 to 100",
        TIMM.replace("0,1,1,50", "nan,1,1,50"): ", line 2: epoch: expected a positive integer, got nan",
        TIMM.replace("0,1,1,50", "inf,1,1,50"): ", line 2: epoch: expected a positive integer, got inf",
        TIMM.replace("0,1,1,50", "0.9,1,1,50"): ", line 2: epoch: expected a positive integer, got 1.9",
        TIMM.replace("0,1,1,50", "-1,1,1,50"): ", line 2: epoch: expected a positive integer, got 0",
        TIMM.replace("0,1,1,50", "0,1,1,nan"): ", line 2: top1: expected a number from 0 to 100, got nan",
        TIMM.replace("1,50", '"' + "1" * 200_000 + '",50'): ", line 2: field larger than field limit",
        TIMM.replace("eval_loss", "eval_top1,eval_loss"): ", line 1: column eval_top1 comes 2 times",
    }
    for text, says in cases.items():
        path.write_text(text)
        with pytest.raises(UserError) as error:
            curves_of(path)
        assert str(error.value).startswith(f"{path}{says}") and "\n" not in str(error.value)
    for name, text in (("log.jsonl", json.dumps(WHOLE) + "\n"), ("summary.csv", TIMM)):
        for encoding in ("utf-8", "utf-8-sig"):  # a byte order mark is no damage
            (tmp_path / name).write_text(text, encoding)
            assert curves_of(tmp_path / name).heads == {"": {1: 50}}


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("epoch", ("1", None, True, 1.5, 0, -3, [1], {}, math.nan, 10**30), "a positive integer"),
        ("update", ("1", None, True, 1.5, -1), "an integer, 0 or more"),
        ("mode", (None, ["val"], 1), "text"),
        ("top1", ("50", None, True, [1], math.nan, math.inf, -5, 500.0, 10**400), "a number from 0 to 100"),
        ("ema_top5", (math.nan, 100.1), "a number from 0 to 100"),
        ("ece", (-0.1, None), "a number from 0 to 100"),
        ("nll", (math.nan, -math.inf, None, 10**400), "a finite number"),
        ("count", (0, math.nan, None, 1.5), "a positive integer"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_line(tmp_path, key, values, expected):
    path = tmp_path / "log.jsonl"
    for value in values:
        spoilt = WHOLE | {key: value}
        logs_of = {f"{json.dumps(WHOLE)}\n{json.dumps(spoilt)}\n": (curves_of, read_rows)}
        if key not in ("mode", "update"):
            del spoilt["update"]
            logs_of[f'{{"env_info": "linux"}}\n{json.dumps(spoilt)}\n'] = (curves_of,)
        for text, readers in logs_of.items():
            path.write_text(text)
            for read in readers:
                with pytest.raises(UserError) as error:
                    read(path)
                assert str(error.value).startswith(f"{path}, line 2: {key}: expected {expected}, got ")
                assert len(str(error.value)) < len(str(path)) + 150


def test_a_run_folder_knows_its_rule_and_whether_the_average_is_reported(tmp_path):
    run = opened(ours(tmp_path / "run", [90.0, 90.0, 10.0, 50.0, 20.0, 40.0, 30.0]))
    text = describe([run], *NO_RULE).splitlines()
    assert text[0] == f"{tmp_path}/run/log.jsonl: our log, 7 of 7 epochs"
    assert text[1].split(maxsplit=1) == ["30.000", "median of the last 5 epochs"]
    assert text[2].split(maxsplit=1) == ["35.000", "OpenMixup's tool: median of the last 6 epochs"]
    assert describe([tmp_path / "run/log.jsonl"], *NO_RULE).splitlines() == text  # beside its recipe
    best = describe([run], None, "best", None, 8).splitlines()  # what is given goes before the recipe
    assert "7 of 8 epochs" in best[0] and best[1].split(maxsplit=1) == ["90.000", "best epoch (7 of 8 epochs)"]
    over = opened(ours(tmp_path / "over", [1.0, 2.0, 3.0], epochs=2))
    with pytest.raises(UserError, match=r"^.*/over: epoch 3 was evaluated, but only 2 epochs are planned"):
        describe([over], *NO_RULE)
    run = opened(ours(tmp_path / "average", [1.0, 2.0], report_ema=True))
    assert [line.split()[0] for line in describe([run], *NO_RULE).splitlines()[1:]] == ["2.500"] * 2
    path = timm_summary(tmp_path / "summary.csv", [81.5], start=299)  # other tools log it as if it were the model
    for recipe in ("deit_b_mixup", "deit_b_samix"):  # a recipe of any published cell will do
        assert "81.500" in describe([path], recipe, None, None, None)


def test_another_log_needs_a_rule(tmp_path):
    four = [{f"acc_{head}_top1": 10.0 * i + e for i, head in enumerate(HEADS)} for e in range(7)]
    path = openmixup(tmp_path / "a.log.json", *four)
    text = describe([path], None, "median", 5, 7).splitlines()
    assert [line.split(maxsplit=1)[1] for line in text[1:5]] == [f"median of the last 5 epochs, {h}" for h in HEADS]
    assert [line.split()[0] for line in text[1:]] == ["4.000", "14.000", "24.000", "34.000", "33.500"]
    assert describe([path], "r50_100e_cutmix", None, None, 7) == "\n".join(text)
    for given, words in (
        (NO_RULE, "the protocol is not known"),
        ((None, "mode", 5, 7), "the protocol is not known"),
        ((None, "median", 5, None), "the number of epochs is not known"),
        ((None, "median", None, 7), "the number of epochs is not known"),
        ((None, "median", 0, 7), "--last 0: expected at least 1"),
        ((None, "best", None, 3), "only 3 epochs are planned"),
    ):
        with pytest.raises(UserError, match=words):
            describe([path], *given)


def test_several_logs_are_averaged_over_the_newest_three_as_the_tool_does(tmp_path):
    tops = ([10, 20], [30, 41], [42, 33], [44, 44])
    paths = [timm_summary(tmp_path / f"{i}.csv", values) for i, values in enumerate(tops)]
    *_, strict, tool = describe(paths, None, "best", None, 2).splitlines()
    assert strict == f"{127 / 3:7.3f}  ± {(14 / 9) ** 0.5:.3f}, mean of the newest 3 runs: best epoch"  # 41, 42 and 44
    tools = [(max(t) + max(t) - 0.01 * (max(t) - min(t))) / 2 for t in tops[1:]]
    assert tool.startswith(f"{sum(tools) / 3:7.3f}  ± ") and "OpenMixup's tool" in tool
    assert "mean of" not in describe(paths, None, "best", None, 3)  # unfinished


def test_a_resumed_log_is_cut_back_to_its_checkpoint_and_a_damaged_one_is_an_error_and_left_as_it_is(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    for epoch in range(2):
        log.write(mode="val", epoch=epoch, update=epoch, top1=1.5)
    length, lines = log.length(), path.read_text().splitlines(keepends=True)
    for hurt in ("{garbage" + "".join(lines)[8:], lines[0][:9], lines[0], None):
        path.write_text(hurt) if hurt else path.unlink()
        with pytest.raises(UserError, match="is damaged or shorter than its checkpoint expects"):
            Log(path, length)
        assert path.read_text() == (hurt or "")
    path.write_text("".join(lines) + '{"mode": "val", "epo')
    log = Log(path, length)
    assert list(evaluations(log.lines)) == [0, 1]
    log.write(mode="val", epoch=2, update=2)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    lock(tmp_path)
    other = multiprocessing.get_context("fork").Pool(1)
    with other, pytest.raises(UserError, match="another run is writing to"):
        other.apply(lock, (tmp_path,))
