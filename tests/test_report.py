"""Promise: a report holds the numbers that the protocol asks for, computed from what the runs logged."""

import csv
import re
from types import SimpleNamespace
from urllib.parse import unquote

import datasets
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from runs import TOP1, edit, log_of, make_run, markdown_rows, quick, train_line, val_line

from mixup_recipes.data.splits import load_split
from mixup_recipes.metrics.calibration.formula import calibration
from mixup_recipes.pages import diagrams, errors, fonts
from mixup_recipes.pages.report import report, runs_table
from mixup_recipes.pages.seeds import seeds_table
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.seeds import grouped
from mixup_recipes.training.export import write_predictions
from mixup_recipes.typed import UserError


def opened(folder, *args, mixer="cutmix", lines=None, **fields):
    """A run folder of quickstart with these recipe fields."""
    return Run.open(make_run(folder, quick(mixer, **fields), *args, lines=lines))


def predicted(run, label, best, confidence=None, classes=None, split=None):
    """The run with these predictions of its exported weights, and its data as these classes and this record."""
    label, best = np.asarray(label), np.asarray(best)
    confidence = np.full(len(label), 0.75) if confidence is None else np.asarray(confidence)
    columns = {"index": np.arange(len(label)), "label": label, "top": best[:, None], "confidence": confidence}
    write_predictions(run.folder / "predictions.safetensors", columns | {"nll": 1.0 + np.arange(len(label))})
    exported = {"epoch": 7, "top1": 100 * float((label == best).mean()), "top5": 100.0, "count": len(label)}
    edit(run.folder / "eval_results.json", exported=exported)
    split = split or {"images": len(label), "labels_sha256": "aa"}
    names = {"classes": classes or [f"class {k}" for k in range(1 + max(label.max(), best.max()))]}
    edit(run.folder / "data.json", splits={"train": split, "test": split}, **names)
    return Run.open(run.folder)


def absent(folder):
    """A run folder whose images are nowhere."""
    return opened(folder, dataset="nowhere")


def links(page):
    """The files that a page shows or leads to, which are there."""
    found = [unquote(link) for link in re.findall(r"\]\(([^)]*)\)", page.read_text())]
    assert all((page.parent / link).is_file() for link in found)
    return found


def scores(summary):
    """All four metrics."""
    return tuple(summary.scores.values())


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
    assert (found.scores["top1"], found.epochs_used) == (43.0, 3)  # of 45 43 40
    found = opened(tmp_path / "best", protocol="best").summary
    assert scores(found) == (50.0, 90.0, 5.0, 1.5)
    assert (found.protocol, found.epochs_used, found.epochs_wanted) == ("best epoch", 7, 7)
    # 99 % of the way through 7 values is 5.94
    assert found.tool.value == pytest.approx((50 + 45 + 0.94 * 5) / 2)
    tie = opened(tmp_path / "tie", [20.0, 50.0, 50.0], protocol="best").summary
    assert (tie.scores["top1"], tie.scores["ece"], tie.epochs_used, tie.epochs_wanted) == (50.0, 1.0, 3, 7)


def test_the_average_of_the_weights_is_reported_where_the_recipe_says_so(tmp_path):
    ema = {"ema_top1": 60.0, "ema_top5": 91.0, "ema_nll": 1.0, "ema_ece": 2.0}
    lines = [train_line(1), val_line(1, 40.0, **ema)]
    assert opened(tmp_path / "raw", lines=lines, ema_decay=0.9).summary.scores["top1"] == 40.0
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
    said = report(runs, out)
    assert (out / "table.md").read_text() == runs_table(runs) and said.startswith(runs_table(runs))
    assert all(f"{run.folder.name} has no predictions.safetensors, and so no scores by class." in said for run in runs)
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "report.md", "samples.png", "table.md"]
    assert set(links(out / "report.md")) == {"curves.png", "samples.png"}
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


TABLES = ("classes", "confusions")
APPLES = ["apple", "pear", "a|<b>, *c*", "never"]
LABEL, BEST = [0, 0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 0, 2, 2]


def test_a_single_run_has_its_scores_by_class_on_the_page_and_as_tables(tmp_path):
    run = predicted(absent(tmp_path / "run"), LABEL, BEST, classes=APPLES)
    said, out = report([run], tmp_path / "out"), tmp_path / "out"
    # recall 25 50 100 0; precision 1 of 2, 1 of 4, 1 of 2, none; F1 2 of 6, 2 of 6, 2 of 3, 0
    assert "| run | 7 | 37.50 | 43.75 | 31.25 | 33.33 | 4 | 1 |" in said and said.startswith(runs_table([run]))
    assert "run: apple taken for pear: 3 of 4; never taken for a|<b>, *c*: 1 of 1; pear taken for apple: 1 of 2" in said
    rows, pairs = (list(csv.reader((out / f"{name}.csv").read_text().splitlines())) for name in TABLES)
    assert rows == [
        ["class", "images", "predicted", "precision", "recall", "f1", "most_confused_with", "times"],
        ["apple", "4", "2", "50.00", "25.00", "33.33", "pear", "3"],
        ["pear", "2", "4", "25.00", "50.00", "33.33", "apple", "1"],
        ["a|<b>, *c*", "1", "2", "50.00", "100.00", "66.67", "", "0"],
        ["never", "1", "0", "0.00", "0.00", "0.00", "a|<b>, *c*", "1"],
    ]
    assert pairs[1] == ["apple", "pear", "3", "4", "75.00"]
    text = (out / "report.md").read_text()
    assert "* apple taken for pear: 3 of 4\n" in text and "| never | 1 | 0 | 0.00 | 0.00 | 0.00 |" in text
    assert "<b>" not in text and "*c*" not in text and len({len(row) for row in markdown_rows(text)}) == 4
    pictures = {"curves.png", "confusion.png", "reliability.png"}
    assert set(links(out / "report.md")) == {"classes.csv", "confusions.csv", *pictures}
    assert sorted(path.name for path in out.iterdir()) == sorted(
        {*pictures, "classes.csv", "confusions.csv", "report.md", "table.md"}
    )
    right = predicted(absent(tmp_path / "right"), LABEL, LABEL, classes=APPLES)
    assert "right: every image is right" in report([right], tmp_path / "none")


def test_several_runs_have_a_page_each_below_a_page_of_all_and_one_given_twice_has_one(tmp_path):
    runs = [predicted(absent(tmp_path / f"{name}/a b"), LABEL, BEST, classes=APPLES) for name in ("one", "two")]
    said, out = report([*runs, opened(tmp_path / "bare"), runs[0]], tmp_path / "out"), tmp_path / "out"
    assert markdown_rows(said)[-2][:3] == ["one/a b", "7", "37.50"] and "/bare has no predictions.safetensors" in said
    assert set(links(out / "report.md")) == {"curves.png", "reliability.png", "one/a b/report.md", "two/a b/report.md"}
    for name in ("one", "two"):
        assert {"confusion.png", "classes.csv"} < set(links(out / name / "a b/report.md"))


def test_what_is_wrong_with_predictions_is_one_line_and_nothing_is_written(tmp_path):
    for name, changes, says in (
        ("classes", {"classes": APPLES[:2]}, r"is damaged \(label must be a class from 0 to 1; row 6 is 2\); make it"),
        ("sure", {"confidence": [1.5] * 8}, r"is damaged \(confidences must be probabilities"),
        ("row", {"split": {"images": 7, "labels_sha256": "aa"}}, "index names images that the split does not have"),
    ):
        run = predicted(absent(tmp_path / name), LABEL, BEST, **changes)
        with pytest.raises(UserError, match=says):
            report([run], tmp_path / "out")
    run = predicted(absent(tmp_path / "other"), LABEL, BEST)
    edit(run.folder / "eval_results.json", exported={"epoch": 7, "top1": 90.0, "top5": 100.0, "count": 8})
    with pytest.raises(UserError, match="was not made with the exported weights"):
        report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def house_style():
    """Figures that a test makes look as in a file."""
    with matplotlib.rc_context(diagrams.STYLE):
        yield


def test_a_confusion_matrix_has_names_numbers_and_colours_by_row_and_grows(house_style, tmp_path, monkeypatch):
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 998]])
    axes, _ = diagrams.confusion_figure(counts, ["a", "b", "c$x$"], "run").axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c$x$"]
    assert {t.get_position(): t.get_text() for t in axes.texts} == {
        (0, 0): "3", (1, 0): "1", (1, 2): "2", (2, 2): "998",
    }  # fmt: skip
    light = axes.images[0].get_array()[..., :3].sum(2)
    assert light[1, 0] == light[0, 2] > light[2, 1] > light[0, 1] > light[0, 0] > light[2, 2]
    widths = []
    for size in (10, 30, 100):
        figure = diagrams.confusion_figure(np.eye(size, dtype=int), [f"class {i}" for i in range(size)], "run")
        widths.append(figure.get_figwidth())
        labels = figure.axes[0].get_yticklabels()
        assert len(labels) == size and bool(figure.axes[0].texts) == (size == 10)
        assert labels[0].get_fontsize() / 72 < widths[-1] / size  # names don't touch
    assert widths == sorted(widths)
    monkeypatch.setattr(diagrams, "LARGEST", 50)
    for size, drawn in ((50, True), (51, False)):
        run = predicted(absent(tmp_path / f"{size}"), np.arange(size), np.arange(size) // 2 * 2)
        report([run], tmp_path / f"out{size}")
        text = (tmp_path / f"out{size}/report.md").read_text()
        assert (
            (tmp_path / f"out{size}/confusion.png").exists()
            == drawn
            == ("There is no picture, because 51 classes" not in text)
        )
        assert text.count("* class") == 20 and "* class 1 taken for class 0: 1 of 1" in text
        assert len((tmp_path / f"out{size}/confusions.csv").read_text().splitlines()) == 1 + size // 2


def test_a_reliability_diagram_shows_the_gaps_that_make_the_calibration_error_and_the_images(house_style):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 400).astype(np.float32)
    right = rng.random(400) < 0.6
    ece = calibration(confidence, right, np.ones(400))["ece"]
    models = [diagrams.Sure(name, confidence, right, ece) for name in ("m" * 99, "b$y$ \N{PEAR}", "c", "d")]
    for several in (models[:1], models):
        figure = diagrams.reliability_figure(several)
        FigureCanvasAgg(figure).draw()
        assert len(figure.axes) == 2 * len(several)
        inside = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
        assert all(figure.bbox.padded(1).contains(*corner) for box in inside for corner in box.corners())
    above, below = figure.axes[2:4]
    assert above.get_title("left") == f"b$y$ ?\nECE {ece:.2f} %"
    images = {round(bar.get_center()[0], 6): bar.get_height() for bar in below.patches}
    both, under, over = ([(round(b.get_center()[0], 6), b.get_height()) for b in c] for c in above.containers)
    assert sum(images.values()) == 400
    gaps = {x: a + b for (x, a), (_, b) in zip(under, over, strict=True)}
    assert sum(images[x] * gap for x, gap in gaps.items()) / 400 == pytest.approx(ece, rel=1e-5)
    accuracy = sum(images[x] * (a + b) for (x, a), (_, b) in zip(both, under, strict=True)) / 400
    assert accuracy == pytest.approx(100 * right.mean())


# --------------------------------------------------------------------------------------------- errors


@pytest.fixture
def photographed(tmp_path):
    """A run on a folder of photos of apples (0 to 3) and pears, of which one cannot be read: five errors of six."""
    place = tmp_path / "photos"
    names = [f"apple/a{i}.png" for i in range(4)] + ["pear/\N{PEAR} \u00e9\u0416 <b>|`.png", "pear/z.png"]
    for i, name in enumerate(names):
        (place / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 20), (10 * i, 200, 0)).save(place / "test" / name)
    (place / "test" / names[1]).write_bytes(b"no picture")
    recipe = {"dataset": str(place), "train_split": "test", "num_classes": 2}
    run = opened(tmp_path / "run", **recipe)
    split = load_split(run.recipe, "test", None)
    confidence = [0.5, 0.9, 0.7, 0.99, 0.7, 0.6]  # of the same confidence, the less likely label comes first
    return predicted(run, [0] * 4 + [1] * 2, [1, 1, 1, 0, 0, 0], confidence, split.classes, split.identity), names


def test_the_most_confident_errors_are_shown_with_their_files_and_what_cannot_be_read_says_so(photographed, tmp_path):
    run, names = photographed
    report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    rows = [row for row in markdown_rows(text) if len(row) == 5][1:]
    assert [row[1:] for row in rows] == [
        ["1", "apple", "pear", "90.00"], ["4", "pear", "apple", "70.00"], ["2", "apple", "pear", "70.00"],
        ["5", "pear", "apple", "60.00"], ["0", "apple", "pear", "50.00"],
    ]  # fmt: skip
    assert rows[0][0] == f"`test/{names[1]}`" and "5 of 5 errors" in text and "errors.png" in text
    pixels = np.asarray(Image.open(tmp_path / "out/errors.png").convert("RGB")).reshape(-1, 3)
    for i, there in enumerate((True, False, True, False, True, True)):  # 3 is right
        assert ((pixels == (10 * i, 200, 0)).all(1).sum() > 180 * 60) == there
    assert (pixels == 238).all(1).sum() > 180 * 100  # the empty tile
    assert fonts.drawable("\N{PEAR} \u00e9\u0416\n\u202e$") == "? \u00e9\u0416??$"
    assert fonts.fitting("a" * 500, 100, 13).startswith("aaa") and fonts.font(13).getlength("a" * 12) < 100


def test_no_pictures_of_images_that_are_not_the_runs_and_none_is_downloaded(photographed, tmp_path, monkeypatch):
    run, names = photographed

    def note():
        again = Run.open(run.folder)
        shown, said = errors.with_images(again, errors.most_confident(again.predictions, again.data.classes))
        assert len(shown) == 5 and any(error.picture for error in shown) == (not said.startswith("No pictures"))
        return said

    record = run.data.splits["test"]
    plain = {k: v for k, v in record.items() if k != "fingerprint"}
    edit(run.folder / "data.json", splits={"test": plain})
    assert note() == "The run has no fingerprint of its images, so only their number and labels were compared."
    edit(run.folder / "data.json", splits={"test": record})
    assert note() == ""
    with (tmp_path / "photos/test" / names[0]).open("ab") as file:
        file.write(b"more")
    assert "No pictures: the images here are not those of the run: as many images of each class, but" in note()
    (tmp_path / "photos").rename(tmp_path / "gone")
    assert note().startswith("No pictures: dataset")
    report([Run.open(run.folder)], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "No pictures: dataset" in text and "| 1 | apple | pear | 90.00 |" in text and "errors.png" not in text
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "photos"), "owner/name"))
    for builder in (SimpleNamespace(cache_dir=str(tmp_path / "not there")), OSError("no network")):

        def ask(*_, found=builder, **__):
            if isinstance(found, OSError):
                raise found
            return found  # which cannot download

        monkeypatch.setattr(datasets, "load_dataset_builder", ask)
        assert "No pictures: dataset 'owner/name' is not on this machine." in note()
    recipe.write_text(recipe.read_text().replace("streaming: false", "streaming: true"))
    assert "No pictures: the run read a stream, whose images cannot be found again." in note()
