"""Promise: a report holds the numbers that the protocol asks for, computed from what the runs logged."""

import json

import numpy as np
import pytest
from mixup_recipes.runs.logs import read_log
from PIL import Image

from mixup_recipes.pages import report
from mixup_recipes.recipe import to_yaml
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import seeds
from mixup_recipes.typed import UserError

TOP1 = [10.0, 30.0, 50.0, 45.0, 41.0, 43.0, 40.0]


def train_line(epoch, loss=2.0, **more):
    perf = {"img_per_s": 300.0 + epoch, "seconds": 10.0 * epoch}
    return {"mode": "train", "epoch": epoch, "update": epoch * 4 - 1, "lr": 0.1, "loss": loss, "perf": perf} | more


def val_line(epoch, top1, **more):
    metrics = {"top1": top1, "top5": min(100.0, top1 + 40), "nll": top1 / 10, "ece": epoch / 2, "count": 1322}
    return {"mode": "val", "epoch": epoch, "update": epoch * 4, "perf": {"seconds": 10.0 * epoch + 2}} | metrics | more


def log_of(top1):
    return [line for e, t in enumerate(top1, 1) for line in (train_line(e, loss=3 - e / 10), val_line(e, t))]


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", lines=None, mixer="cutmix", tail="", **fields):
        run = tmp_path / name
        run.mkdir(parents=True)
        fields = {"epochs": 7, "warmup_epochs": 0} | fields
        (run / "recipe.yaml").write_text(to_yaml(load_recipe(f"quickstart_{mixer}", **fields)))
        lines = log_of(TOP1) if lines is None else lines
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        return run

    return make


def test_median_of_the_last_epochs(make_run):
    found = report.summarise(make_run(protocol="median", protocol_epochs=5))
    # Of 50 45 41 43 40; each metric has its own median
    assert (found["top1"], found["top5"], found["nll"], found["ece"]) == (43.0, 83.0, 4.3, 2.5)
    assert (found["epochs"], found["epochs_used"], found["epochs_wanted"]) == (7, 5, 5)
    assert (found["seconds"], found["img_per_s"], found["count"]) == (72.0, 304.0, 1322)
    assert (found["mixer"], found["seed"], found["protocol"]) == ("cutmix", 0, "median of the last 5 epochs")
    # OpenMixup's tool takes six: 30 50 45 41 43 40, the middle between 41 and 43
    assert (found["tool_top1"], found["tool_protocol"]) == (42.0, "OpenMixup's tool: median of the last 6 epochs")


def test_best_takes_all_metrics_from_the_best_epoch(make_run):
    found = report.summarise(make_run(protocol="best"))
    assert (found["top1"], found["top5"], found["nll"], found["ece"]) == (50.0, 90.0, 5.0, 1.5)
    assert (found["protocol"], found["epochs_used"], found["epochs_wanted"]) == ("best epoch", 7, 7)
    assert found["tool_top1"] == pytest.approx((50 + 45 + 0.94 * 5) / 2)  # 99 % of the way through 7 values is 5.94
    tie = report.summarise(make_run("tie", log_of([20.0, 50.0, 50.0]), protocol="best"))
    assert (tie["top1"], tie["ece"], tie["epochs_used"], tie["epochs_wanted"]) == (50.0, 1.0, 3, 7)


def test_the_window_counts_epochs_not_evaluations(make_run):
    lines = [line for line in log_of(TOP1) if line["mode"] == "train" or line["epoch"] in (2, 4, 6, 7)]
    found = report.summarise(make_run(lines=lines, protocol_epochs=5, eval_epochs=2))
    assert (found["top1"], found["epochs_used"]) == (43.0, 3)  # of 45 43 40


def test_the_average_of_the_weights_is_reported_where_the_recipe_says_so(make_run):
    ema = {"ema_top1": 60.0, "ema_top5": 91.0, "ema_nll": 1.0, "ema_ece": 2.0}
    lines = [train_line(1), val_line(1, 40.0, **ema)]
    assert report.summarise(make_run("raw", lines, ema_decay=0.9))["top1"] == 40.0
    found = report.summarise(make_run("ema", lines, ema_decay=0.9, report_ema=True))
    assert (found["top1"], found["top5"], found["nll"], found["ece"]) == (60.0, 91.0, 1.0, 2.0)
    assert found["protocol"] == "median of the last 5 epochs, EMA"
    with pytest.raises(UserError, match="val line of epoch 1: ema_top1 is missing"):
        report.summarise(make_run("lacking", [train_line(1), val_line(1, 40.0)], ema_decay=0.9, report_ema=True))


def test_fewer_epochs_than_the_protocol_are_named(make_run):
    text = report.table([make_run(lines=log_of([10.0, 20.0, 40.0]))])
    assert "| run | cutmix | 3 of 7 | 20.00 (3 of 5 epochs) | 60.00 | 2.000 | 1.00 | 32 | 302 |" in text


def test_table_names_the_protocol(make_run):
    runs = [make_run("a", mixer="vanilla"), make_run("b")]
    text = report.table(runs).splitlines()
    assert text[0].split(" | ")[3] == "top-1 (median of the last 5 epochs)"
    assert text[2] == "| a | vanilla | 7 | 43.00 | 83.00 | 4.300 | 2.50 | 72 | 304 |"
    assert len({line.count("|") for line in text[:4]}) == 1
    assert "1,322 images of `test`" in text[-1]
    mixed = report.table([*runs, make_run("c", protocol="best")])
    assert "| top-1 |" in mixed and "43.00 (median of the last 5 epochs)" in mixed and "50.00 (best epoch)" in mixed


def test_runs_of_the_same_name_are_told_apart(make_run):
    text = report.table([make_run("first/run"), make_run("second/run")])
    assert "| first/run |" in text and "| second/run |" in text


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_truncated_last_line_is_left_out(make_run, cut):
    run = make_run(tail=json.dumps(val_line(8, 99.0))[:cut])
    assert len(read_log(run / "log.jsonl")) == 14
    assert report.summarise(run)["top1"] == 43.0


def test_a_whole_last_line_without_newline_counts(make_run):
    run = make_run(tail=json.dumps(val_line(8, 99.0)))
    assert read_log(run / "log.jsonl")[-1]["top1"] == 99.0


def test_damage_elsewhere_is_an_error(make_run):
    run = make_run(tail='{"mode": "va\n' + json.dumps(val_line(8, 99.0)) + "\n")
    with pytest.raises(UserError, match=r"log.jsonl, line 15: expected a JSON object"):
        report.summarise(run)


def test_epochs_logged_again_after_a_resume_count_once(make_run):
    # Killed after epoch 7, resumed from epoch 5; so far epoch 6 is there anew, with other numbers
    again = [train_line(6, loss=9.0), val_line(6, 48.0)]
    run = make_run(lines=log_of(TOP1) + again)
    lines = read_log(run / "log.jsonl")
    assert [(line["mode"], line["epoch"]) for line in lines] == [(m, e) for e in range(1, 8) for m in ("train", "val")]
    assert [line["loss"] for line in lines if line["mode"] == "train" and line["epoch"] == 6] == [9.0]
    assert report.summarise(run)["top1"] == 45.0  # of 50 45 41 48 40


def test_report_writes_table_curves_and_samples(make_run, tmp_path):
    runs = [make_run("a", mixer="mixup"), make_run("b"), make_run("c", mixer="vanilla")]
    for run, colour, names in ((runs[0], "red", (2, 10, 9)), (runs[1], "blue", (1,))):
        (run / "samples").mkdir()
        for name in names:  # the newest by number, not by spelling
            sheet = Image.new("RGB", (200, 50), colour if name in (1, 10) else "black")
            sheet.save(run / "samples" / f"epoch_{name}.png")
    out = tmp_path / "out"
    text = report.report(runs, out)
    assert text == (out / "table.md").read_text() == report.table(runs)
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "samples.png", "table.md"]
    pixels = np.asarray(Image.open(out / "samples.png").convert("RGB")).reshape(-1, 3)
    counts = [int((pixels == colour).all(1).sum()) for colour in ((255, 0, 0), (0, 0, 255), (0, 0, 0))]
    assert counts == [200 * 50, 200 * 50, 0]


def test_no_samples_no_sheet(make_run, tmp_path):
    report.report([make_run()], tmp_path / "out")
    assert not (tmp_path / "out" / "samples.png").exists()


@pytest.mark.parametrize("file", ["recipe.yaml", "log.jsonl"])
def test_a_missing_file_is_named_before_anything_is_written(make_run, tmp_path, file):
    run = make_run()
    (run / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        report.report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_runs_are_explained(make_run, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        report.summarise(tmp_path / "nothing")
    with pytest.raises(UserError, match="no evaluated epoch"):
        report.summarise(make_run("young", [train_line(1)]))
    with pytest.raises(UserError, match="no trained epoch"):
        report.summarise(make_run("empty", []))
    with pytest.raises(UserError, match=r"train line of epoch 1: perf.img_per_s is missing"):
        report.summarise(make_run("odd", [train_line(1, perf={"seconds": 1.0}), val_line(1, 40.0)]))
    with pytest.raises(UserError, match=r"train line of epoch 1: perf.seconds: expected a finite number, got True"):
        report.summarise(make_run("bool", [train_line(1, perf={"seconds": True, "img_per_s": 1}), val_line(1, 40.0)]))
    with pytest.raises(UserError, match=r"/over: epoch 7 was evaluated, but only 6 epochs are planned"):
        report.summarise(make_run("over", epochs=6))
    with pytest.raises(UserError, match="no run folders given"):
        report.report([], tmp_path / "out")
    broken = make_run("broken")
    (broken / "samples").mkdir()
    (broken / "samples" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read the sample sheet"):
        report.report([broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file/"):
        report.report([make_run("whole")], tmp_path / "file")


def test_names_cannot_break_a_table(make_run):
    run = make_run("a|<b>")
    assert "\n| a\\|&lt;b> | cutmix |" in report.table([run])
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("quickstart_cutmix", "x|<y>_cutmix"))
    assert seeds.summary([run]).startswith("| x\\|&lt;y> | top-1 (")


def test_seeds_on_other_images_are_not_averaged(make_run):
    runs = [make_run(str(seed), seed=seed) for seed in range(4)]
    for run, images, labels in zip(runs, (675, 675, 5, 675), ("aa", "aa", "bb", "cc"), strict=True):
        splits = {"train": {"images": images, "labels_sha256": labels}, "test": {"images": 661, "labels_sha256": "dd"}}
        (run / "data.json").write_text(json.dumps({"dataset": "groceries", "splits": splits, "classes": []}))
    groups = seeds.grouped(runs)
    assert [group.runs for group in groups] == [runs[:2], runs[2:3], runs[3:]]
    assert [group.setting for group in groups] == [
        f"quickstart, train {images} images (labels {labels}), test 661 images (labels dd)"
        for images, labels in ((675, "aa"), (5, "bb"), (675, "cc"))
    ]
    assert [group.setting for group in seeds.grouped(runs[:2])] == ["quickstart"]
    (runs[0] / "data.json").write_text('{"splits": {"train": 5}}')
    with pytest.raises(UserError, match=r"0/data.json: splits.train: expected a table, got 5"):
        seeds.grouped(runs)
