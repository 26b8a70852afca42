"""Promise: a report holds the numbers that the protocol asks for, computed from what the runs logged."""

import numpy as np
import pytest
from PIL import Image
from runs import TOP1, edit, log_of, make_run, quick, train_line, val_line

from mixup_recipes.pages.report import report, runs_table
from mixup_recipes.pages.seeds import seeds_table
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.seeds import grouped
from mixup_recipes.typed import UserError


def opened(folder, *args, mixer="cutmix", lines=None, **fields):
    """A run folder of quickstart with these recipe fields."""
    return Run.open(make_run(folder, quick(mixer, **fields), *args, lines=lines))


def scores(summary):
    """All four metrics."""
    return summary.top1, summary.top5, summary.nll, summary.ece


def test_a_median_is_of_the_last_epochs_not_evaluations_and_best_takes_all_metrics_from_the_best_epoch(tmp_path):
    found = opened(tmp_path / "run", protocol="median", protocol_epochs=5).summary
    assert scores(found) == (43.0, 83.0, 4.3, 2.5)  # of 50 45 41 43 40; each metric has its own median
    assert (found.epochs, found.epochs_used, found.epochs_wanted) == (7, 5, 5)
    assert (found.seconds, found.img_per_s, found.count) == (70.0, 304.0, 661)
    assert (found.mixer, found.seed, found.protocol) == ("cutmix", 0, "median of the last 5 epochs")
    # OpenMixup's tool takes six: 30 50 45 41 43 40, the middle between 41 and 43
    assert (found.tool.value, found.tool.label) == (42.0, "OpenMixup's tool: median of the last 6 epochs")
    lines = [line for line in log_of(TOP1) if line["mode"] == "train" or line["epoch"] in (2, 4, 6, 7)]
    found = opened(tmp_path / "few", lines=lines, protocol_epochs=5, eval_epochs=2).summary
    assert (found.top1, found.epochs_used) == (43.0, 3)  # of 45 43 40
    found = opened(tmp_path / "best", protocol="best").summary
    assert scores(found) == (50.0, 90.0, 5.0, 1.5)
    assert (found.protocol, found.epochs_used, found.epochs_wanted) == ("best epoch", 7, 7)
    # 99 % of the way through 7 values is 5.94
    assert found.tool.value == pytest.approx((50 + 45 + 0.94 * 5) / 2)
    tie = opened(tmp_path / "tie", [20.0, 50.0, 50.0], protocol="best").summary
    assert (tie.top1, tie.ece, tie.epochs_used, tie.epochs_wanted) == (50.0, 1.0, 3, 7)


def test_the_average_of_the_weights_is_reported_where_the_recipe_says_so(tmp_path):
    ema = {"ema_top1": 60.0, "ema_top5": 91.0, "ema_nll": 1.0, "ema_ece": 2.0}
    lines = [train_line(1), val_line(1, 40.0, **ema)]
    assert opened(tmp_path / "raw", lines=lines, ema_decay=0.9).summary.top1 == 40.0
    found = opened(tmp_path / "ema", lines=lines, ema_decay=0.9, report_ema=True).summary
    assert scores(found) == (60.0, 91.0, 1.0, 2.0) and found.protocol == "median of the last 5 epochs, EMA"
    lacking = opened(tmp_path / "lacking", lines=[lines[0], val_line(1, 40.0)], ema_decay=0.9, report_ema=True)
    with pytest.raises(UserError, match=r"lacking/log\.jsonl, line 2: ema_top1 is missing"):
        _ = lacking.summary


def test_the_table_names_the_protocol_and_how_much_of_it_there_is_and_names_cannot_break_it(tmp_path):
    runs = [opened(tmp_path / "a", mixer="vanilla"), opened(tmp_path / "b")]
    text = runs_table(runs).splitlines()
    assert text[0].split(" | ")[3] == "top-1 (median of the last 5 epochs)"
    assert text[2] == "| a | vanilla | 7 | 43.00 | 83.00 | 4.300 | 2.50 | 70 | 304 |"
    assert len({line.count("|") for line in text[:4]}) == 1 and "661 images of `test`" in text[-1]
    mixed = runs_table([*runs, opened(tmp_path / "c", protocol="best")])
    assert "| top-1 |" in mixed and "43.00 (median of the last 5 epochs)" in mixed and "50.00 (best epoch)" in mixed
    young = runs_table([opened(tmp_path / "young", [10.0, 20.0, 40.0])])
    assert "| young | cutmix | 3 of 7 | 20.00 (3 of 5 epochs) | 60.00 | 2.000 | 1.00 | 30 | 302 |" in young
    text = runs_table([opened(tmp_path / "first/run"), opened(tmp_path / "second/run")])
    assert "| first/run |" in text and "| second/run |" in text
    folder = opened(tmp_path / "a|<b>").folder
    assert "\n| a\\|&lt;b> | cutmix |" in runs_table([Run.open(folder)])
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("quickstart_cutmix", "x|<y>_cutmix"))
    assert seeds_table([Run.open(folder)]).startswith("| x\\|&lt;y> | top-1 (")


def test_seeds_on_other_images_are_not_averaged(tmp_path):
    runs = []
    for seed, images, labels in ((0, 675, "aa"), (1, 675, "aa"), (2, 5, "bb"), (3, 675, "cc")):
        folder = opened(tmp_path / str(seed), seed=seed).folder
        splits = {"train": {"images": images, "labels_sha256": labels}, "test": {"images": 661, "labels_sha256": "dd"}}
        edit(folder / "data.json", splits=splits)
        runs.append(Run.open(folder))
    assert [(group.runs, group.setting) for group in grouped(runs)] == [
        (members, f"quickstart, train {images} images (labels {labels}), test 661 images (labels dd)")
        for members, images, labels in ((runs[:2], 675, "aa"), (runs[2:3], 5, "bb"), (runs[3:], 675, "cc"))
    ]
    assert [group.setting for group in grouped(runs[:2])] == ["quickstart"]


def test_report_writes_table_curves_and_samples_or_explains_why_not_before_anything_is_written(tmp_path):
    runs = [opened(tmp_path / name, mixer=name) for name in ("mixup", "cutmix", "vanilla")]
    report(runs, tmp_path / "bare")
    assert not (tmp_path / "bare/samples.png").exists()
    for run, colour, names in ((runs[0], "red", (2, 10, 9)), (runs[1], "blue", (1,))):
        (run.folder / "samples").mkdir()
        for name in names:  # the newest by number, not by spelling
            sheet = Image.new("RGB", (200, 50), colour if name in (1, 10) else "black")
            sheet.save(run.folder / "samples" / f"epoch_{name}.png")
    out = tmp_path / "out"
    assert report(runs, out) == (out / "table.md").read_text() == runs_table(runs)
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "samples.png", "table.md"]
    pixels = np.asarray(Image.open(out / "samples.png").convert("RGB")).reshape(-1, 3)
    counts = [int((pixels == colour).all(1).sum()) for colour in ((255, 0, 0), (0, 0, 255), (0, 0, 0))]
    assert counts == [200 * 50, 200 * 50, 0]
    out, slow = tmp_path / "none", {"seconds": 1.0}
    broken = opened(tmp_path / "broken")
    (broken.folder / "samples").mkdir()
    (broken.folder / "samples/1.png").write_bytes(b"no picture")
    for runs, says in (
        ([], "no run folders given"),
        ([broken], "cannot read the sample sheet"),
        ([opened(tmp_path / "young", lines=[train_line(1)])], "no evaluated epoch yet"),
        ([opened(tmp_path / "empty", lines=[])], "no trained epoch yet"),
        ([opened(tmp_path / "odd", lines=[train_line(1, perf=slow), val_line(1, 40.0)])], "perf.img_per_s is missing"),
        ([opened(tmp_path / "over", epochs=6)], "/over: epoch 7 was evaluated, but only 6 epochs are planned"),
    ):
        with pytest.raises(UserError, match=says):
            report(runs, out)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file/"):
        report([opened(tmp_path / "whole")], tmp_path / "file")
