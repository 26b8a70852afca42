"""mixup-recipes predict: the labels of images without labels, as an evaluation of the same model sees them."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.numpy import load_file

from mixup_recipes.data import images
from mixup_recipes.runs.models import evaluation_recipe, open_model


@pytest.fixture(scope="module")
def run(reference):
    """A finished tiny run."""
    return reference("--mixer", "vanilla")


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
    """A file of predictions."""
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_run_says_of_images_what_its_evaluation_says(console, run, photos, tmp_path):
    out = tmp_path / "predictions.csv"
    done = console("predict", run, photos, "--top_k", 9, "--batch-size", 7, "--out", out)
    assert done == (0, f"{out}: 30 images\n", "")
    expected, found = load_file(run / "predictions.safetensors"), rows(out)
    assert list(found[0]) == ["path", "rank", "label", "probability", "error"]
    assert [row["path"] for row in found[::4]] == [str(p) for p in sorted(photos.rglob("[0-9]*.jpg"))]
    assert [row["rank"] for row in found] == ["1", "2", "3", "4"] * 30  # as many as there are classes
    classes = np.array([tiny.CLASSES.index(row["label"]) for row in found]).reshape(30, 4)
    assert np.array_equal(classes, expected["top"])
    probabilities = np.array([float(row["probability"]) for row in found]).reshape(30, 4)
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
    seen = images.EvalTransform(40, 36, "bicubic")(images.decode((photos / "00.jpg").read_bytes()))
    with torch.no_grad():
        top = net.eval()(images.normalise(seen[None], recipe, torch.device("cpu"))).softmax(1)[0].sort(descending=True)
    found = rows(tmp_path / "p.csv")
    assert [row["label"] for row in found] == [str(i) for i in top.indices.tolist()]  # no names: numbers
    assert [float(row["probability"]) for row in found] == pytest.approx(top.values.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("RUN", "which images? pass files, folders or globs after the model"),
        ("RUN nowhere.jpg", "no file or folder 'nowhere.jpg'"),
        ("RUN PHOTOS PHOTOS/*.gif", "no file or folder matches 'PHOTOS/*.gif'"),
        ("RUN EMPTY", "no image in folder 'EMPTY'"),
        ("RUN PHOTOS --top_k 0", "top_k: expected an integer at least 1, got 0"),
        ("RUN PHOTOS --out p.txt", "predictions are written as .csv or .jsonl; expected a name that ends so,"),
        ("RUN PHOTOS --out no/p.csv", "cannot write no/p.csv: there is no folder no"),
        ("resnet5 PHOTOS", "model 'resnet5' is neither a run folder, hf-hub:owner/name nor in timm; did you mean"),
        ("PHOTOS PHOTOS", "PHOTOS has no config.json and model.safetensors: not a run that was evaluated once"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_before_work_starts(console, run, photos, tmp_path, argv, says):
    (tmp_path / "empty").mkdir()
    for word, place in {"RUN": run, "PHOTOS": photos, "EMPTY": tmp_path / "empty"}.items():
        argv, says = argv.replace(word, str(place)), says.replace(word, str(place))
    status, out, err = console("predict", *argv.split())
    assert (status, out) == (2, "") and err.startswith(f"error: {says}") and err.count("\n") == 1
