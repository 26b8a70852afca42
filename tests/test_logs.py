"""Promise: logs of ours, of OpenMixup and of timm become the same curves, and a log that cannot is one clear line."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
from timm.utils import update_summary

from mixup_recipes.recipe import to_yaml
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import logs
from mixup_recipes.training.folder import Log
from mixup_recipes.typed import UserError

HEADS = ("one_k", "mix_k", "one_q", "mix_q")


def openmixup(path: Path, *val: dict, start: int = 1) -> Path:
    """A log as mmcv writes it: one line of environment, training lines, one validation line per epoch."""
    config = 'evaluation = dict(interval=1, "mode": \'val\', "update": 1)'  # a text inside the first line
    lines = [{"env_info": "sys.platform: linux", "config": config, "seed": 0, "exp_name": "r50.py"}]
    for epoch, values in enumerate(val, start):
        lines += [{"mode": "train", "epoch": epoch, "iter": 50, "lr": 0.1, "loss": 2.5, "acc": 60.0}]
        lines += [{"mode": "val", "epoch": epoch, "iter": 391, "lr": 0.1, **values}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ours(folder: Path, top1: list[float], **fields: object) -> Path:
    """A run folder with recipe, log and summary, written by the code that writes them in a run."""
    folder.mkdir()
    fields = {"epochs": len(top1), "warmup_epochs": 0} | fields
    (folder / "recipe.yaml").write_text(to_yaml(load_recipe("quickstart_cutmix", **fields)))
    log = Log(folder / "log.jsonl")
    for epoch, value in enumerate(top1, 1):
        log.write(mode="train", epoch=epoch, update=4 * epoch, lr=0.1, loss=2.0, images=64, perf={})
        log.write(
            mode="val", epoch=epoch, update=4 * epoch, top1=value, top5=90.0, nll=1.0, ece=2.0, ema_top1=value + 1
        )
    (folder / "summary.csv").write_text(log.summary())
    return folder


def timm_summary(path: Path, top1: list[float], start: int = 0) -> Path:
    """A summary as timm 1.0.31 writes it; its training script counts epochs from 0 and writes a header per start."""
    for epoch, value in enumerate(top1, start):
        found = {"loss": 1.0, "top1": value, "top5": 90.0}
        update_summary(epoch, {"loss": 2.0}, found, str(path), lr=0.1, write_header=epoch == start)
    return path


def test_a_run_folder_its_log_and_its_summary_say_the_same(tmp_path: Path) -> None:
    run = ours(tmp_path / "run", [10.0, 30.0, 20.0])
    expected = {"": {1: 10.0, 2: 30.0, 3: 20.0}, "ema": {1: 11.0, 2: 31.0, 3: 21.0}}
    for path in (run, run / "log.jsonl", run / "summary.csv"):
        assert logs.read(path).heads == expected
    assert logs.read(run).source == f"{run}/log.jsonl: our log"
    assert logs.read(run / "summary.csv").source.endswith("our summary.csv")


def test_openmixups_log_has_one_classifier_or_four(tmp_path: Path) -> None:
    plain = [{"head0_top1": 70.0 + e, "head0_top5": 90.0} for e in range(3)]
    found = logs.read(openmixup(tmp_path / "a.log.json", *plain))
    assert found.heads == {"": {1: 70.0, 2: 71.0, 3: 72.0}} and found.source.endswith(": OpenMixup's log")
    four = [{f"acc_{head}_top{n}": 10.0 * n + e for head in HEADS for n in (1, 5)} for e in range(2)]
    assert logs.read(openmixup(tmp_path / "b.log.json", *four)).heads == {head: {1: 10.0, 2: 11.0} for head in HEADS}


def test_the_format_shows_in_the_content_not_in_the_name(tmp_path: Path) -> None:
    misnamed = openmixup(tmp_path / "log.jsonl", {"head0_top1": 70.0})
    assert logs.read(misnamed).source.endswith("OpenMixup's log")
    path = ours(tmp_path / "run", [1.0]) / "log.jsonl"
    assert logs.read(path.rename(tmp_path / "results.txt")).source.endswith("our log")
    assert logs.read(timm_summary(tmp_path / "x.log.json", [1.0])).source.endswith("timm's summary.csv")


def test_of_an_epoch_that_a_resumed_run_repeats_the_last_line_counts(tmp_path: Path) -> None:
    first = openmixup(tmp_path / "a.log.json", *[{"head0_top1": float(e)} for e in (1, 2, 3)])
    again = openmixup(tmp_path / "b.log.json", {"head0_top1": 30.0}, {"head0_top1": 40.0}, start=3)
    first.write_text(first.read_text() + again.read_text())
    assert logs.read(first).heads == {"": {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}}
    run = ours(tmp_path / "run", [1.0, 2.0])
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps({"mode": "val", "epoch": 2, "update": 8, "top1": 5.0, "ema_top1": 2.0}) + "\n")
    assert logs.read(run).heads == {"": {1: 1.0, 2: 5.0}, "ema": {1: 2.0, 2: 2.0}}


def test_of_several_logs_in_a_folder_the_last_in_lexical_order_counts(tmp_path: Path) -> None:
    for value, name in ((1.0, "20220101_120000"), (3.0, "20220301_080000"), (2.0, "20220201_235959")):
        openmixup(tmp_path / f"{name}.log.json", {"head0_top1": value})
    (tmp_path / "summary.csv").write_text("no log")
    assert logs.read(tmp_path).heads == {"": {1: 3.0}}


def test_timms_epochs_count_from_0_and_a_resumed_run_repeats_its_header(tmp_path: Path) -> None:
    path = timm_summary(tmp_path / "summary.csv", [10.0, 20.0, 30.0])
    assert logs.read(path).heads == {"": {1: 10.0, 2: 20.0, 3: 30.0}}
    timm_summary(path, [33.0, 40.0], start=2)
    assert logs.read(tmp_path).heads == {"": {1: 10.0, 2: 20.0, 3: 33.0, 4: 40.0}}
    assert path.read_text().count("epoch,") == 2
    with path.open("a") as file:
        file.write("4,2.0,1.0,5")  # killed while it wrote 50.0
    assert max(logs.read(tmp_path).heads[""]) == 4


def test_a_cut_last_line_is_left_out_and_damage_elsewhere_names_its_line(tmp_path: Path) -> None:
    path = openmixup(tmp_path / "a.log.json", {"head0_top1": 1.0}, {"head0_top1": 2.0})
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert logs.read(path).heads == {"": {1: 1.0}}
    path.write_text(whole[:-1])  # whole, but for its end of line
    assert logs.read(path).heads == {"": {1: 1.0, 2: 2.0}}
    path.write_text(whole.replace('"iter": 391', '"iter": ', 1))
    with pytest.raises(UserError, match=r"a\.log\.json, line 3: expected a JSON object$"):
        logs.read(path)
    run = ours(tmp_path / "run", [1.0, 2.0])
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text().replace('"update": 4, ', "", 1))
    with pytest.raises(UserError, match=r"log\.jsonl, line 1: update is missing"):
        logs.read(run)
    table = timm_summary(tmp_path / "summary.csv", [1.0, 2.0, 3.0])
    table.write_text(table.read_text().replace("1,2.0,1.0,2.0", "1,2.0,2.0"))
    with pytest.raises(UserError, match=r"summary\.csv, line 3: expected 6 numbers"):
        logs.read(table)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unknown format"),
        ("\x00\x01\x02", "unknown format"),
        ('{\n "architecture": "resnet50"\n}\n', "unknown format"),
        ("epoch,loss\n1,2.0\n", "unknown format"),
        ("epoch,eval_top1\n1,2.0\n", "expected a column eval_loss .timm. or eval_nll .ours."),
        ("epoch,eval_loss,eval_top1\n", "timm's summary.csv without validation lines"),
        ('{"env_info": "linux", "seed": 0}\n', "OpenMixup's log without validation lines"),
        ('{"mode": "train", "epoch": 1, "update": 3}\n', "our log without validation lines"),
        ('{"mode": "val", "epoch": 1, "head0_mAP": 3}\n', "OpenMixup's log without validation lines"),
        ('{"mode": "val", "head0_top1": 3.0}\n', "line 1: epoch is missing"),
        ('{"mode": "val", "epoch": 2, "head0_top1": "x"}\n', "line 1: head0_top1: expected a number from 0 to 100"),
    ],
)
def test_what_is_no_log_is_explained_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "some.log.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        logs.read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


WHOLE = {"mode": "val", "epoch": 1, "update": 3, "top1": 50.0, "top5": 90.0, "nll": 1.0, "ece": 2.0, "count": 100}
TIMM = "epoch,train_loss,eval_loss,eval_top1\n0,1,1,50\n"


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
def test_a_value_that_cannot_be_is_refused_with_its_line(
    tmp_path: Path, key: str, values: tuple, expected: str
) -> None:
    path = tmp_path / "log.jsonl"
    foreign = json.dumps({"env_info": "linux"})
    for value in values:
        spoilt = WHOLE | {key: value}
        logs_of = {f"{json.dumps(WHOLE)}\n{json.dumps(spoilt)}\n": (logs.read, logs.read_log)}
        if key not in ("mode", "update"):
            del spoilt["update"]
            logs_of[f"{foreign}\n{json.dumps(spoilt)}\n"] = (logs.read,)
        for text, readers in logs_of.items():
            path.write_text(text)
            for read in readers:
                with pytest.raises(UserError) as error:
                    read(path)
                assert str(error.value).startswith(f"{path}, line 2: {key}: expected {expected}, got ")
                assert len(str(error.value)) < len(str(path)) + 150


@pytest.mark.parametrize("damage", ["[" * 100_000, '{"epoch": ' + "9" * 5000 + "}", "[1]", "null"])
def test_a_line_that_cannot_be_read_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f"{json.dumps(WHOLE)}\n{damage}\n{json.dumps(WHOLE)}\n")
    for read in (logs.read, logs.read_log):
        with pytest.raises(UserError, match=r"log\.jsonl, line 2: expected a JSON object$"):
            read(path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("0,1,1,50", "nan,1,1,50", "line 2: epoch: expected a positive integer, got nan"),
        ("0,1,1,50", "inf,1,1,50", "line 2: epoch: expected a positive integer, got inf"),
        ("0,1,1,50", "0.9,1,1,50", "line 2: epoch: expected a positive integer, got 1.9"),
        ("0,1,1,50", "-1,1,1,50", "line 2: epoch: expected a positive integer, got 0"),
        ("0,1,1,50", "0,1,1,nan", "line 2: top1: expected a number from 0 to 100, got nan"),
        ("0,1,1,50", '0,1,"' + "1" * 200_000 + '",50', "line 2: field larger than field limit"),
        ("eval_loss", "eval_top1,eval_loss", "line 1: column eval_top1 comes 2 times"),
    ],
)
def test_a_damaged_summary_is_refused_with_its_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "summary.csv"
    path.write_text(TIMM)
    assert logs.read(path).heads == {"": {1: 50}}
    path.write_text(TIMM.replace(old, new))
    with pytest.raises(UserError) as error:
        logs.read(path)
    assert str(error.value).startswith(f"{path}, {says}")


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    for name, text in (("log.jsonl", json.dumps(WHOLE) + "\n"), ("summary.csv", TIMM)):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert logs.read(tmp_path / name).heads == {"": {1: 50}}


def test_an_epoch_beyond_the_planned_ones_names_the_run(tmp_path: Path) -> None:
    run = ours(tmp_path / "run", [1.0, 2.0, 3.0], epochs=2)
    with pytest.raises(UserError, match=r"^.*/run: epoch 3 was evaluated, but only 2 epochs are planned"):
        logs.describe([run], None, None, None, None)


def test_what_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read {tmp_path}/nothing: No such file"):
        logs.read(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"no log in {tmp_path}: expected log.jsonl, an OpenMixup"):
        logs.read(tmp_path)


# ------------------------------------------------------------------------------------------------ both readings


def test_a_run_folder_knows_its_rule(tmp_path: Path) -> None:
    run = ours(tmp_path / "run", [90.0, 90.0, 10.0, 50.0, 20.0, 40.0, 30.0])
    text = logs.describe([run], None, None, None, None).splitlines()
    assert text[0] == f"{run}/log.jsonl: our log, 7 of 7 epochs"
    assert text[1].split(maxsplit=1) == ["30.000", "median of the last 5 epochs"]
    assert text[2].split(maxsplit=1) == ["35.000", "OpenMixup's tool: median of the last 6 epochs"]
    best = logs.describe([run], None, "best", None, 8).splitlines()  # what is given goes before the recipe
    assert "7 of 8 epochs" in best[0] and best[1].split(maxsplit=1) == ["90.000", "best epoch (7 of 8 epochs)"]


def test_the_average_is_read_where_the_recipe_reports_it(tmp_path: Path) -> None:
    run = ours(tmp_path / "run", [1.0, 2.0], ema_decay=0.9, report_ema=True)
    assert [line.split()[0] for line in logs.describe([run], None, None, None, None).splitlines()[1:]] == ["2.500"] * 2


def test_another_log_needs_a_rule(tmp_path: Path) -> None:
    four = [{f"acc_{head}_top1": 10.0 * i + e for i, head in enumerate(HEADS)} for e in range(7)]
    path = openmixup(tmp_path / "a.log.json", *four)
    text = logs.describe([path], None, "median", 5, 7).splitlines()
    assert [line.split(maxsplit=1)[1] for line in text[1:5]] == [f"median of the last 5 epochs, {h}" for h in HEADS]
    assert [line.split()[0] for line in text[1:]] == ["4.000", "14.000", "24.000", "34.000", "33.500"]
    assert logs.describe([path], "r50_100e_cutmix", None, None, 7) == "\n".join(text)
    for given, words in (
        ((None, None, None, None), "which protocol"),
        ((None, "mode", 5, 7), "which protocol"),
        ((None, "median", 5, None), "which window"),
        ((None, "median", None, 7), "which window"),
        ((None, "median", 0, 7), "--last 0: expected at least 1"),
        ((None, "best", None, 3), "only 3 epochs are planned"),
    ):
        with pytest.raises(UserError, match=words):
            logs.describe([path], *given)


def test_the_summary_of_a_run_has_columns_that_tell_it_from_timms(tmp_path: Path) -> None:
    header = next(csv.reader(io.StringIO((ours(tmp_path / "run", [1.0]) / "summary.csv").read_text())))
    assert "eval_nll" in header and "eval_loss" not in header


def test_several_logs_are_averaged_over_the_newest_three_as_the_tool_does(tmp_path):
    def log(name, tops):
        rows = "".join(f"{e},1.0,{t},0.1,0.2\n" for e, t in enumerate(tops))
        (tmp_path / name).write_text("epoch,train_loss,eval_top1,eval_loss,lr\n" + rows)
        return tmp_path / name

    paths = [log(f"{i}.csv", tops) for i, tops in enumerate(([10, 20], [30, 41], [42, 33], [44, 44]))]
    text = logs.describe(paths, None, "best", None, 2).splitlines()
    bests = [41, 42, 44]
    mean = sum(bests) / 3
    std = (sum((b - mean) ** 2 for b in bests) / 3) ** 0.5
    assert text[-2] == f"{mean:7.3f}  ± {std:.3f}, mean of the newest 3 runs: best epoch"
    tools = [(max(t) + max(t) - 0.01 * (max(t) - min(t))) / 2 for t in ([30, 41], [42, 33], [44, 44])]
    assert text[-1].startswith(f"{sum(tools) / 3:7.3f}  ± ") and "OpenMixup's tool" in text[-1]
    unfinished = logs.describe(paths, None, "best", None, 3).splitlines()
    assert not [line for line in unfinished if "mean of" in line]


def test_the_log_of_another_tool_holds_the_average_where_the_recipe_reports_it(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text("epoch,train_loss,eval_top1,eval_loss,lr\n299,1.0,81.5,0.1,0.2\n")
    assert "81.500" in logs.describe([path], "deit_b_mixup", None, None, None)
    assert "81.500" in logs.describe([path], "deit_b_samix", None, None, None)  # a recipe of any published cell will do
