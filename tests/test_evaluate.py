"""The evaluation job, predictions, and the commands that read a run's numbers."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import tiny
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from mixup_recipes.data import images
from mixup_recipes.data.decoding import decode
from mixup_recipes.runs import predict
from mixup_recipes.runs.models import eval_transform, evaluation_recipe, open_model, output_names
from mixup_recipes.typed import UserError


@pytest.fixture(scope="module")
def run(reference, tmp_path_factory):
    """A finished tiny run, with nothing beside it."""
    return shutil.copytree(reference("--mixer", "vanilla"), tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture(scope="module")
def results(run):
    """What the run's own evaluations found."""
    return json.loads((run / "eval_results.json").read_text())


def test_a_run_folder_scores_what_its_log_says_on_any_number_of_processes(run, results, console, server, tmp_path):
    status, shown, _ = console("evaluate", run, "--output", tmp_path / "1.json")
    assert status == 0 and "1 process" in shown
    script = tmp_path / "evaluation.py"  # in place of the training job
    script.write_text("import evaluate_mixup, train_mixup\ntrain_mixup.main = evaluate_mixup.main\n")
    given = ("--model", run, "--output", tmp_path / "2.json")
    status, shown = server.run(*given, processes=2, faults=[["script", str(script)]])
    assert status == 0 and "2 process" in shown
    for processes in (1, 2):
        scores = json.loads((tmp_path / f"{processes}.json").read_text())
        assert (scores["count"], scores["bad_images"]) == (30, 0)
        for key in ("top1", "top5", "ece", "nll"):
            assert scores[key] == pytest.approx(results["exported"][key], rel=1e-5)
        label, top = (load_file(run / "predictions.safetensors")[key] for key in ("label", "top"))
        each = [100 * (top[label == k, 0] == k).mean() for k in np.unique(label)]  # every class counts the same
        assert scores["macro_recall"] == pytest.approx(np.mean(each))


def test_predictions_are_those_that_the_run_wrote_with_its_weights(run, results, console, tmp_path):
    out = tmp_path / "predictions.safetensors"
    assert console("evaluate", "--run", run, "--predictions", out)[0] == 0
    found, expected = load_file(out), load_file(run / "predictions.safetensors")
    assert found.keys() == expected.keys() == {"index", "label", "top", "confidence", "nll"}
    for key in ("index", "label", "top"):
        assert np.array_equal(found[key], expected[key]) and found[key].dtype == np.int32
    for key in ("confidence", "nll"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4) and found[key].dtype == np.float32
    top1, nll = results["exported"]["top1"], results["exported"]["nll"]
    assert 100 * (expected["top"][:, 0] == expected["label"]).mean() == pytest.approx(top1)
    assert expected["nll"].mean() == pytest.approx(nll, rel=1e-5)


def test_a_model_that_is_no_run_is_scored_by_its_configuration(run, results, console, tiny_recipe, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, tmp_path)
    which = f"error: {tmp_path} comes without a recipe, so the data are not known; pass --dataset or --recipe\n"
    assert console("evaluate", tmp_path)[::2] == (2, which)
    data = ("--dataset", tiny_recipe.parent / "photos", "--split", "test")
    assert console("evaluate", tmp_path, *data, "--output", tmp_path / "scores.json")[0] == 0
    top1 = json.loads((tmp_path / "scores.json").read_text())["top1"]
    assert top1 == pytest.approx(results["exported"]["top1"], rel=1e-5)
    net = timm.create_model("resnet50.a1_in1k")  # 288 pixels and no margin in timm's tests, 224 and 0.95 in training
    assert str(eval_transform(net, evaluation_recipe(net, "", None, {"dataset": "x"}), True)) == "288 -> 288 px bicubic"


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_a_model_is_scored_at_its_own_size_on_a_part_of_its_classes_by_name(run, photos, console, tmp_path, size):
    names = ["zebra", *tiny.CLASSES, "ant"]  # not in the order of the data
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=len(names)).eval()
    config = json.loads((run / "config.json").read_text()) | {"num_classes": len(names), "label_names": names}
    config["pretrained_cfg"] |= {"num_classes": len(names), "input_size": [3, *size], "crop_pct": 1.0}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), tmp_path / "model/model.safetensors")
    for name in ("white", "green"):
        shutil.copytree(photos, tmp_path / "set/val" / name, ignore=shutil.ignore_patterns(".*", "*.txt"))
    out = tmp_path / "predictions.safetensors"
    args = ("--dataset", tmp_path / "set", "--split", "val", "--predictions", out)
    status, shown, errors = console("evaluate", tmp_path / "model", *args)
    assert status == 0 and "has 2 of the 6 classes of the model" in shown, errors
    found = load_file(out)
    assert found["label"].tolist() == [names.index("green")] * 30 + [names.index("white")] * 30
    opened, _ = open_model(str(tmp_path / "model"))
    recipe = evaluation_recipe(opened, "", None, {})
    files = sorted((tmp_path / "set/val/green").rglob("*.jpg"))
    seen = torch.stack([eval_transform(opened, recipe, True)(decode(path.read_bytes())) for path in files])
    assert seen.shape[2:] == size
    with torch.no_grad():
        top = net(images.normalise(seen, recipe, torch.device("cpu"))).argmax(1).tolist()
    assert found["top"][:, 0].tolist() == top * 2


def test_the_console_command_reports_runs_reads_protocols_and_compares(run, results, console, tmp_path):
    status, shown, _ = console("report", run, "--out", tmp_path / "report")
    assert status == 0 and f"{results['reported']['top1']:.2f}" in shown
    pages = {"report.md", "table.md", "classes.csv", "confusions.csv"}
    pages |= {f"{name}.png" for name in ("curves", "samples", "confusion", "reliability")}
    pages |= {"errors.png"} if results["exported"]["top1"] < 100 else set()
    assert {p.name for p in (tmp_path / "report").iterdir()} == pages
    status, shown, _ = console("protocol", run)
    for key in ("reported", "openmixup_tool"):
        assert f"{results[key]['top1']:.3f}  {results[key]['protocol']}" in shown
    assert status == 0 and "3 of 3 epochs" in shown
    given = ("--protocol", "median", "--last", 2, "--epochs", 3)
    assert console("protocol", run / "summary.csv", *given)[1].count("median of the last") == 2
    other = shutil.copytree(run, tmp_path / "other")
    status, shown, _ = console("compare", "--a", run, "--b", other)
    expected = "a - b of the exported weights: +0.00, 95 % interval +0.00 to +0.00 (paired bootstrap, 30 images, "
    assert status == 0 and expected in shown
    status, _, err = console("compare", "--a", run, other, "--b", other)
    assert status == 2 and "error: group a has seed 0 twice" in err


@pytest.fixture
def photos(tiny_recipe, tmp_path):
    """The run's 30 evaluation photos as files; the last ten in a folder of the folder."""
    table = pq.read_table(tiny_recipe.parent / "photos/data/test-00000-of-00001.parquet").to_pylist()
    (tmp_path / "photos/more").mkdir(parents=True)
    for i, row in enumerate(table):
        (tmp_path / "photos" / ("more" * (i >= 20)) / f"{i:02}.jpg").write_bytes(row["image"]["bytes"])
    for name in (".hidden.jpg", "notes.txt"):
        (tmp_path / "photos" / name).write_text("no image")
    return tmp_path / "photos"


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_run_says_of_images_what_its_evaluation_says(console, run, photos, tmp_path):
    out = tmp_path / "predictions.csv"
    (photos / "zzz.png").write_text("no image")
    done = console("predict", run, photos, "--top_k", 9, "--batch-size", 7, "--out", out)
    left_out = f"1 left out (.txt files): {photos}/notes.txt\n1 left out (hidden): {photos}/.hidden.jpg\n"
    assert done == (0, f"{out}: 31 images, of which 1 cannot be read\n", left_out)
    expected, found = load_file(run / "predictions.safetensors"), rows(out)
    ranks = ("", "_2", "_3", "_4")  # as many as there are classes
    assert list(found[0]) == [
        "path",
        *(f"{what}{rank}" for rank in ranks for what in ("label", "probability")),
        "error",
    ]
    assert [row["path"] for row in found] == [str(p) for p in sorted(photos.rglob("[0-9z]*.[jp]*g"))]
    bad = found.pop()
    assert {k for k, v in bad.items() if v} == {"path", "error"} and "not an image" in bad["error"]
    classes = np.array([[tiny.CLASSES.index(row[f"label{rank}"]) for rank in ranks] for row in found])
    assert np.array_equal(classes, expected["top"]) and not any(row["error"] for row in found)
    probabilities = np.array([[float(row[f"probability{rank}"]) for rank in ranks] for row in found])
    assert probabilities[:, 0] == pytest.approx(expected["confidence"], rel=1e-5)
    assert probabilities.sum(1) == pytest.approx(np.ones(30), abs=1e-5)


def test_files_folders_and_globs_come_in_the_order_given_and_a_bad_image_is_a_row(console, run, photos, tmp_path):
    bad, out = photos / "bad.png", tmp_path / "predictions.jsonl"
    bad.write_text("no image")
    given = [photos / "05.jpg", bad, photos / "more", f"{photos}/**/1*.jpg"]
    status, shown, _ = console("predict", "--run", run, *given, "--out", out, "--top_k", 1)
    assert (status, shown) == (0, f"{out}: 22 images, of which 1 cannot be read\n")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = [Path(line["path"]).name for line in lines]
    assert names == ["05.jpg", "bad.png", *(f"{i}.jpg" for i in (*range(20, 30), *range(10, 20)))]
    assert lines[1] == {"path": str(bad), "error": "not an image of a known format"}
    assert [len(line["predictions"]) for line in lines if "error" not in line] == [1] * 21
    status, shown, _ = console("predict", run, photos / "05.jpg", bad, "--top-k", 2)
    first, second = shown.splitlines()
    label, probability = lines[0]["predictions"][0].values()
    assert status == 0 and first.startswith(f"{photos}/05.jpg: {label} {probability:.4f}, ") and first.count(",") == 1
    assert second == f"{bad}: cannot be read: not an image of a known format"
    assert console("predict", run, bad) == (1, second + "\n", "")


def test_a_folder_is_read_by_the_rule_of_training_and_what_is_left_out_is_said(photos):
    for name in ("l0", "l1"):
        (photos / name).symlink_to(".")
    shutil.copy(photos / "00.jpg", photos / "more/without_suffix")
    (photos / "more/phone.HEIC").write_text("no image")
    found, notes = predict.paths_of([str(photos)])
    names = [f"{i:02}.jpg" for i in range(20)] + [f"more/{i}.jpg" for i in range(20, 30)] + ["more/without_suffix"]
    assert found == [photos / name for name in names]  # each once
    assert notes == [
        f"1 left out (.heic files): {photos}/more/phone.HEIC",
        f"1 left out (.txt files): {photos}/notes.txt",
        f"1 left out (hidden): {photos}/.hidden.jpg",
        f"2 left out (links to a folder that is read already): {photos}/l0, {photos}/l1",
    ]


def test_a_name_that_would_break_a_line_makes_no_row_and_no_line():
    found = [predict.Prediction(Path(name), ["a\rb", "c"], [0.7, 0.3]) for name in ("1\r2.jpg", "3\n4.jpg", '5"6.jpg')]
    read = list(csv.DictReader(io.StringIO(predict.as_csv(found), newline="")))
    assert [row["path"] for row in read] == ["1\r2.jpg", "3\n4.jpg", '5"6.jpg'] and read[0]["label"] == "a\rb"
    bare = [one._replace(path=Path("1.jpg"), labels=["a", "b"]) for one in found]
    assert predict.as_csv(bare).splitlines()[1] == "1.jpg,a,0.7,b,0.3,"
    assert predict.line(found[1]) == "3\\n4.jpg: a\\rb 0.7000, c 0.3000"
    assert "\n" not in predict.line(predict.Prediction(Path("3\n4.jpg"), [], [], "no\nimage"))
    with pytest.raises(UserError, match=r"class 'a\|b' contains '\|', which .*write a .jsonl"):
        predict.check_between(["c", "a|b"])


@pytest.mark.parametrize(
    ("names", "says"),
    [(["\ud800", "b"], r"expected text, got '\\ud800'"), ([1, "b"], "expected text, got 1"), (["a"], "of 2 names")],
)
def test_names_of_classes_that_cannot_be_written_are_refused_before_work_starts(names, says):
    net = timm.create_model("test_resnet", num_classes=2)
    net.pretrained_cfg = {"label_names": names}
    with pytest.raises(UserError, match=says):
        output_names(net)


def test_a_model_that_is_no_run_sees_images_as_its_configuration_says(console, run, photos, tmp_path):
    shutil.copy(run / "model.safetensors", tmp_path)
    config = json.loads((run / "config.json").read_text())
    del config["label_names"]
    config["pretrained_cfg"] |= {"input_size": [3, 36, 36], "crop_pct": 0.9, "interpolation": "bicubic"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert console("predict", tmp_path, photos / "00.jpg", "--out", tmp_path / "p.csv")[0] == 0
    net, opened = open_model(str(tmp_path))
    recipe = evaluation_recipe(net, str(tmp_path), opened, {})
    assert (recipe.eval_size, recipe.eval_resize, recipe.interpolation) == (36, 40, "bicubic")
    seen = images.EvalTransform(40, 36, "bicubic")(decode((photos / "00.jpg").read_bytes()))
    with torch.no_grad():
        top = net.eval()(images.normalise(seen[None], recipe, torch.device("cpu"))).softmax(1)[0].sort(descending=True)
    (found,) = (list(row.values())[1:-1] for row in rows(tmp_path / "p.csv"))
    assert found[::2] == [str(i) for i in top.indices.tolist()]  # no names: numbers
    assert [float(p) for p in found[1::2]] == pytest.approx(top.values.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("evaluate", "no model was given"),
        ("evaluate --model RUN --predictions nowhere/p.safetensors", "there is no folder nowhere"),
        ("evaluate --model resnet5", "did you mean 'resnet50'"),
        ("evaluate RUN --dataset nowhere", "neither a folder"),
        ("evaluate --model RUN --split tests", "did you mean 'test'"),
        ("evaluate EMPTY", "no config.json"),
        ("evaluate --model RUN --bacth_size 3", "Did you mean --batch_size"),
        ("predict RUN", "error: no images were given; pass files, folders or globs after the model"),
        ("predict RUN nowhere.jpg", "error: no file or folder 'nowhere.jpg'"),
        ("predict RUN PHOTOS PHOTOS/*.gif", "error: no file or folder matches 'PHOTOS/*.gif'"),
        ("predict RUN EMPTY", "error: no image in folder 'EMPTY'"),
        ("predict RUN PHOTOS --top_k 0", "error: top_k: expected an integer at least 1, got 0"),
        (
            "predict RUN PHOTOS --out p.txt",
            "error: expected a file name that ends in .csv or .jsonl, got",
        ),
        ("predict RUN PHOTOS --out no/p.csv", "error: cannot write no/p.csv: there is no folder no"),
        (
            "predict resnet5 PHOTOS",
            "error: model 'resnet5' is neither a run folder, hf-hub:owner/name nor in timm; ",
        ),
        (
            "predict PHOTOS PHOTOS",
            "error: PHOTOS has no config.json and model.safetensors, so it is not a run that",
        ),
    ],
)
def test_a_mistake_is_explained_with_status_2_before_work_starts(console, run, photos, tmp_path, argv, says):
    (tmp_path / "empty").mkdir()
    for word, place in {"RUN": run, "PHOTOS": photos, "EMPTY": tmp_path / "empty"}.items():
        argv, says = argv.replace(word, str(place)), says.replace(word, str(place))
    status, out, err = console(*argv.split())
    assert status == 2 and says in err
    assert argv.startswith("evaluate") or (out == "" and err.startswith("error: ") and err.count("\n") == 1)
