"""Promise: an exported file says what the model and its run say, tells how to be used, and no other file is written."""

import csv
import importlib.util
import json
import re
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from runs import edit
from safetensors.numpy import load_file, save_file
from teachers import fill
from test_every_cell_trains import MOGANET, SMALLER, family, smaller

from mixup_recipes import __version__
from mixup_recipes.data.images import EvalTransform
from mixup_recipes.resolve import load_recipe, settings
from mixup_recipes.runs import deploy
from mixup_recipes.runs.portable import FORMATS, Classifier
from mixup_recipes.training import backbones

# torch advises torch.export whenever TorchScript is read, also to who asked for it
TORCHSCRIPT = pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def finished(reference):
    """A finished tiny run, to be read only."""
    return reference("--mixer", "vanilla")


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, finished, tmp_path_factory):
    """The run in a format: its name, the file, and what the command prints."""
    path = tmp_path_factory.mktemp(request.param) / f"model{FORMATS[request.param].ending}"
    return request.param, path, deploy.deploy(str(finished), None, path)


@pytest.fixture
def run(finished, tmp_path):
    """A finished run that a test may change, without its checkpoints."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))


@pytest.fixture
def photos(tiny_recipe, tmp_path):
    """A folder with a photo of each class."""
    rows = pq.read_table(tiny_recipe.parent / "photos/data/test-00000-of-00001.parquet").to_pylist()
    (tmp_path / "photos").mkdir()
    for row, name in zip(rows, tiny.CLASSES, strict=False):
        (tmp_path / f"photos/{name}.jpg").write_bytes(row["image"]["bytes"])
    return tmp_path / "photos"


def contents(kind, path):
    """All bytes of a file, unpacked."""
    if kind == "onnx":
        return path.read_bytes()
    with zipfile.ZipFile(path) as file:
        return b"".join(file.read(entry) for entry in file.infolist())


def notes_of(kind, path):
    """The metadata of a file."""
    if kind == "onnx":
        pairs = {pair.key: pair.value for pair in onnx.load(path).metadata_props}
        return {
            k: v if k.startswith("weights") or v[0] not in "[0123456789" else json.loads(v) for k, v in pairs.items()
        }
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if re.search(r"extra(_files)?/config\.json$", name))
        return json.loads(file.read(name))


@pytest.fixture
def says_what_predict_says(console, photos, tmp_path, monkeypatch, capsys):
    """Runs a printed example on photos, and predict with the model."""

    def compare(model, path, shown):
        assert console("predict", model, photos, "--out", tmp_path / "said.csv")[0] == 0
        said = list(csv.DictReader((tmp_path / "said.csv").read_text().splitlines()))
        monkeypatch.chdir(path.parent)
        for name in tiny.CLASSES:
            shutil.copy(photos / f"{name}.jpg", "photo.jpg")
            exec(shown[shown.index("import json") :], found := {})
            (expected,) = (row for row in said if row["path"] == str(photos / f"{name}.jpg"))
            assert capsys.readouterr().out == expected["label"] + "\n"
            probabilities = torch.as_tensor(found["logits"])[0].softmax(0).sort(descending=True).values.tolist()
            assert probabilities == pytest.approx([float(expected[k]) for k in expected if "prob" in k], abs=0.01)

    return compare


@TORCHSCRIPT
def test_the_example_that_is_printed_says_of_photos_what_predict_says(exported, finished, says_what_predict_says):
    _, path, shown = exported
    assert shown.startswith(f"{path}: test_resnet of 4 classes, 1.")
    assert "\nchecked on 30 images of split 'test': 30 get the class of predictions.safetensors\n" in shown
    says_what_predict_says(finished, path, shown)


@TORCHSCRIPT
def test_a_model_that_is_no_run_goes_by_its_configuration(console, run, tmp_path, says_what_predict_says):
    (run / "recipe.yaml").unlink()
    config = json.loads((run / "config.json").read_text())
    sizes = {"input_size": [3, 36, 32], "crop_pct": 0.9, "interpolation": "bicubic"}
    names = [f"{name} stripes" for name in tiny.CLASSES]
    edit(run / "config.json", pretrained_cfg=config["pretrained_cfg"] | sizes, label_names=names)
    status, shown, _ = console("export", "--model", run, "--format", "torchscript", "--out", tmp_path / "model.pt")
    assert status == 0 and "\nchecked without predictions of a run: the model is not a run folder\n" in shown
    found = notes_of("torchscript", tmp_path / "model.pt")
    assert (found["resize"], found["input_size"], found["interpolation"]) == ([40, 35], [36, 32], "bicubic")
    assert found["class_names"] == names and "recipe" not in found
    says_what_predict_says(run, tmp_path / "model.pt", shown)


def test_a_file_carries_how_to_use_it_and_where_it_is_from_but_no_path_of_the_machine(exported, finished):
    kind, path, _ = exported
    results = json.loads((finished / "eval_results.json").read_text())
    assert notes_of(kind, path) == {
        "made_by": f"mixup-recipes {__version__}", "weights": finished.name, "recipe": "tiny",
        "weights_sha256": results["weights_sha256"], "architecture": "test_resnet",
        "input": "pixels: float32 (N, 3, 32, 32), RGB from 0 to 1, not normalised",
        "output": "logits: float32 (N, 4), before the softmax", "resize": 32, "interpolation": "bilinear",
        "crop": "center", "input_size": [32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "normalisation": "inside: (pixels - mean) / std",
        "orientation": "as stored", "class_names": tiny.CLASSES,
    }  # fmt: skip
    content = contents(kind, path)
    assert not [place for place in (tiny.ROOT, finished.parent, "site-packages") if str(place).encode() in content]
    if kind == "onnx":
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
        assert (model.opset_import[0].version, model.ir_version) == (18, 8)
        for value, name, sides in ((model.graph.input, "pixels", [3, 32, 32]), (model.graph.output, "logits", [4])):
            shape = [side.dim_param or side.dim_value for side in value[0].type.tensor_type.shape.dim]
            assert (value[0].name, shape) == (name, ["batch", *sides])


@TORCHSCRIPT
def test_the_weights_are_those_that_the_run_reports(console, reference, tmp_path):
    given = ("--mixer", "deit", "--precise_bn_samples", "none", "--epochs", 2, "--report_ema", "true")
    run = reference(*given)
    assert console("export", run, "--out", tmp_path / "model.pt")[0] == 0
    found = torch.jit.load(tmp_path / "model.pt").state_dict()
    reported, raw = load_file(run / "model.safetensors"), load_file(run / "models/raw/model.safetensors")
    assert all(np.array_equal(found[f"net.{name}"].numpy(), reported[name]) for name in reported)
    assert not np.array_equal(reported["fc.weight"], raw["fc.weight"])


def wrong_answers(answer):
    """Files that went wrong, by what is said of them."""
    return {
        "differ from the model's by up to 0.0": lambda x: answer(x) + 0.01,
        "differ from the model's by up to nan": lambda x: answer(x) * torch.nan,
        "it gives (1, 4) for 3 images, not (3, 4)": lambda x: answer(x[:1]),
        "made for one image": lambda x: answer(x) if len(x) == 1 else 1 / 0,
    }


@pytest.mark.parametrize("says", wrong_answers(None))
def test_a_file_that_differs_from_its_model_is_not_written(console, finished, tmp_path, monkeypatch, says):
    whole = FORMATS["torchscript"]
    broken = whole._replace(open=lambda content: wrong_answers(whole.open(content))[says])
    monkeypatch.setitem(FORMATS, "torchscript", broken)
    (tmp_path / "model.pt").write_text("of before")
    status, out, err = console("export", finished, "--out", tmp_path / "model.pt")
    *steps, error = err.splitlines()
    assert steps == [f"writing {finished} as torchscript", "checking it against the model"]
    assert (status, out) == (2, "") and error.startswith(f"error: {finished} cannot be written as torchscript: ")
    assert says.replace("made for one image", "division by zero") in err
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_text() == "of before"


HANG = """
import ctypes, os, signal, sys, threading
from mixup_recipes import cli, files

def hang(first, _):  # where no Python runs, with a file half-written
    assert os.path.exists(first)
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(lock), libc.pthread_mutex_lock(lock)

files.os.replace, number = hang, int(sys.argv[1])
cli.command(sys.argv[2:])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_at_once_and_leaves_no_file(clients, finished, tmp_path, number):
    done = clients.run(HANG, int(number), "export", finished, "--out", tmp_path / "model.pt", timeout=30)
    assert done.returncode == 128 + number and done.output.endswith("stopped: no file is left half-written; the same "
                                                                    "command begins again\n"), done.output  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changed", ["top", "nll", "model.safetensors", "mean"])
def test_a_file_that_differs_from_the_runs_predictions_is_not_written(console, run, tmp_path, changed):
    columns = load_file(run / "predictions.safetensors")
    if changed == "model.safetensors":
        weights = load_file(run / changed)
        save_file(weights | {"fc.bias": weights["fc.bias"][::-1].copy() + np.float32(0.5)}, run / changed)
    elif changed == "mean":
        recipe = (run / "recipe.yaml").read_text()
        (run / "recipe.yaml").write_text(re.sub(r"^mean:(\n- .*)*", "mean: [0, 0, 0]", recipe, flags=re.M))
    else:
        columns["top"][3] = columns["top"][3][::-1]
        columns["nll"][5] += 0.2
        save_file(columns, run / "predictions.safetensors")
    status, out, err = console("export", run, "--out", tmp_path / "model.pt")
    assert (status, out) == (2, "") and "\nchecking it against the run's predictions for 30 images\nerror: " in err
    assert re.search(r"of 30 images of split 'test', \d+ get another class than in predictions.safetensors", err)
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("moved", "its data, nowhere, are not on this machine"),
        ("other", "the data of the run have changed: 40 images then, 30 now"),
        ("unnamed", "the run has no fingerprint of its data"),
        ("damaged", "predictions.safetensors is damaged"),
        ("gone", "has no predictions.safetensors"),
    ],
)
def test_what_could_not_be_compared_is_said(console, run, tmp_path, change, says):
    if change == "moved":
        (run / ".dataset.json").unlink()
        recipe = (run / "recipe.yaml").read_text()
        (run / "recipe.yaml").write_text(re.sub("^dataset: .*", "dataset: nowhere", recipe, flags=re.M))
    elif change in ("other", "unnamed"):
        splits = json.loads((run / "data.json").read_text())["splits"]
        splits["test"] |= {"images": 40} if change == "other" else {"fingerprint": None}
        edit(run / "data.json", splits=splits)
    elif change == "damaged":
        (run / "predictions.safetensors").write_bytes(b"no numbers")
    else:
        (run / "predictions.safetensors").unlink()
    status, out, _ = console("export", run, "--out", tmp_path / "model.pt")
    assert (
        status == 0
        and "\nchecked on batches of 1 and 3 random images: its logits agree with those of the model\n" in out
    )
    assert re.search(f"\nchecked without predictions of a run: .*{re.escape(says)}", out)
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("export", "export: RUN is missing. Run folder, timm name or hf-hub:OWNER/NAME"),
        ("export RUN", "export: --out is missing. File to write"),
        (
            "export RUN --out m.tflite",
            "m.tflite: the ending of the name chooses the format; expected one of .onnx (onnx), .pt (torch",
        ),
        (
            "export RUN --out m.onnx --format torchscript",
            "torchscript: expected a file name that ends in .pt, got m.onnx",
        ),
        ("export RUN --out m.pt --format onx", 'Invalid value "onx" for --format. Choose from: "onnx", "torchscript",'),
        ("export RUN --out no/m.pt", "cannot write no/m.pt: there is no folder no"),
        ("export RUN --out FOLDER.pt", "cannot write FOLDER.pt: it is a folder"),
        ("export RUN --out m.onnx", "export to onnx needs: pip install 'mixup-recipes[export]'\n"),
        ("export FOLDER.pt --out m.pt", "FOLDER.pt has no config.json and model.safetensors, so it is not a run that"),
        (
            "export resnet5 --out m.pt",
            "model 'resnet5' is neither a run folder, hf-hub:owner/name nor in timm; did you m",
        ),
    ],
)
def test_a_mistake_is_one_line_with_status_2_before_work_starts(console, finished, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").mkdir()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnx" else find(name, *more))
    words = [str(finished) if word == "RUN" else word for word in argv.replace("FOLDER", "x").split()]
    status, out, err = console(*words)
    assert (status, out) == (2, "") and err.startswith(f"error: {says.replace('FOLDER', 'x')}") and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_the_document_shows_the_example_of_the_quickstart() -> None:
    text = (tiny.ROOT / "docs/deploy.md").read_text()
    recipe = load_recipe("quickstart_cutmix")
    transform = EvalTransform.of(recipe)
    shown = {kind: deploy.example(kind, Path(f"quickstart{FORMATS[kind].ending}"), transform) for kind in FORMATS}
    assert f"```python\n{shown['onnx']}\n```" in text
    assert not [line for example in shown.values() for line in example.splitlines() if line not in text]
    notes = deploy.metadata_of("quickstart", None, backbones.create_model(recipe), recipe, transform)
    assert not [name for name in (*notes, "weights_sha256", "recipe") if f"`{name}`" not in text]


# A setting of each kind of network, the small stem told apart.
FAMILIES = {family(load_recipe(s)) + "_cifar" * load_recipe(s).model.endswith("_cifar"): s for s in settings()}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[] if (kind, name) == ("torchscript", "pvt") else pytest.mark.slow)
        for kind in FORMATS
        for name in FAMILIES
    ],
)
def test_every_family_of_backbones_becomes_every_format(kind, name, monkeypatch):
    """Small models of random weights, at any number of images."""
    assert len(FAMILIES) >= len(SMALLER) + 2
    monkeypatch.setattr(backbones.moganet, "DEPTHS", MOGANET)
    recipe = smaller(load_recipe(f"{FAMILIES[name]}_vanilla"))
    net = fill(backbones.create_model(recipe))
    classifier, size = Classifier(net, recipe.mean, recipe.std), (recipe.image_size,) * 2
    answer = FORMATS[kind].open(FORMATS[kind].write(classifier, size, {"class_names": ["a"]}))
    for batch in (1, 3, 4):
        pixels = torch.rand(batch, 3, *size)
        expected = classifier(pixels)
        assert expected.std() > 1e-3, "weights that say nothing"
        torch.testing.assert_close(answer(pixels), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
