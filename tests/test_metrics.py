"""The `evaluate` metrics: right numbers, loud errors, load by path with no network, one or several processes."""

import doctest
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml

from mixup_recipes.metrics.calibration.formula import calibration
from mixup_recipes.metrics.topk_accuracy.formula import topk_accuracy

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["topk_accuracy", "calibration"]


# Reference values: slow loops, written from the definitions.


def slow_topk(top_ids, labels, ks):
    hits = {k: [label in list(ids[:k]) for ids, label in zip(top_ids, labels, strict=True)] for k in ks}
    return {f"top{k}": 100 * sum(found) / len(labels) for k, found in hits.items()}


def slow_calibration(confidences, correct, nlls, bins):
    error = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidences) if (m - 1) / bins < float(c) <= m / bins or (m == 1 and c == 0)]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            confidence = sum(float(confidences[i]) for i in inside) / len(inside)
            error += len(inside) / len(confidences) * abs(accuracy - confidence)
    return {"ece": 100 * error, "nll": sum(float(v) for v in nlls) / len(nlls)}


def samples(n, classes=10, width=5, seed=0):
    """Inputs of both metrics: about a third of the labels is the first id."""
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(classes), (n, 1)), axis=1)[:, :width].astype(np.int32)
    labels = np.where(rng.random(n) < 0.3, ids[:, 0], rng.integers(0, classes, n)).astype(np.int32)
    confidences = rng.random(n, dtype=np.float32)
    return {
        "predictions": ids,
        "references": labels,
        "confidences": confidences,
        "nlls": rng.exponential(size=n).astype(np.float32),
    }


def inputs_of(name, data):
    return data if name == "calibration" else {k: data[k] for k in ("predictions", "references")}


def expected(name, data):
    if name == "topk_accuracy":
        return slow_topk(data["predictions"], data["references"], (1, 5))
    correct = data["predictions"][:, 0] == data["references"]
    return slow_calibration(data["confidences"], correct, data["nlls"], 15)


# The formulas.


@pytest.mark.parametrize("n, classes, width, ks", [(1, 5, 5, (1, 5)), (257, 10, 5, (1, 5)), (64, 3, 3, (1, 2, 3))])
def test_topk_equals_the_slow_loop(n, classes, width, ks):
    for seed in range(5):
        data = samples(n, classes, width, seed)
        got = topk_accuracy(data["predictions"], data["references"], ks)
        assert got == pytest.approx(slow_topk(data["predictions"], data["references"], ks), abs=1e-12)
    ids = np.tile(np.arange(5), (8, 1))
    assert topk_accuracy(ids, np.zeros(8, int)) == {"top1": 100.0, "top5": 100.0}
    assert topk_accuracy(ids, np.full(8, 4)) == {"top1": 0.0, "top5": 100.0}
    assert topk_accuracy(ids, np.full(8, 9)) == {"top1": 0.0, "top5": 0.0}
    assert topk_accuracy(ids[:, :4], np.full(8, 3), ks=[3, 4]) == {"top3": 0.0, "top4": 100.0}


@pytest.mark.parametrize(
    "top_ids, labels, ks, message",
    [
        ([[0, 1]], [0], (1, 5), "top-5.*2 ids"),
        ([0, 1], [0, 1], (1,), r"\(N, k_max\).*\(2,\) and \(2,\)"),
        ([[0, 1]], [[0]], (1,), r"\(1, 2\) and \(1, 1\)"),
        ([[0, 1]], [0, 1], (1,), r"\(1, 2\) and \(2,\)"),
        ([[0, 1], [0]], [0, 1], (1,), "different lengths"),
        ([], [], (1,), "empty"),
        (np.zeros((3, 0), int), [0, 1, 2], (1,), "empty"),
        ([[0.2, 0.8]], [1], (1,), "whole numbers.*float64"),
        ([[0, 1]], [0.0], (1,), "labels must be whole numbers"),
        ([[0, 1]], [-1], (1,), "labels has a negative class id"),
        ([[0, 1], [3, 3]], [0, 0], (1,), "row 1 .*twice"),
        ([[0, 1]], [0], (0,), "at least 1"),
        ([[0, 1]], [0], (1.0,), "whole numbers"),
        ([[0, 1]], [0], (), "at least 1"),
    ],
)
def test_topk_errors(top_ids, labels, ks, message):
    with pytest.raises(ValueError, match=message):
        topk_accuracy(top_ids, labels, ks)


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_calibration_equals_the_slow_loop(bins, dtype):
    for seed in range(5):
        data = samples(300, seed=seed)
        correct = data["predictions"][:, 0] == data["references"]
        confidences = data["confidences"].astype(dtype)
        got = calibration(confidences, correct, data["nlls"], bins)
        assert got == pytest.approx(slow_calibration(confidences, correct, data["nlls"], bins), abs=1e-10)


@pytest.mark.parametrize("bins", [3, 7, 10, 15, 49])
def test_calibration_on_the_edges_of_bins(bins):
    """A confidence of exactly m/M belongs to bin m, its neighbours in float64 to m and m + 1; 0 is in the first."""
    edges = np.arange(bins + 1) / bins
    confidences = np.concatenate([edges, np.nextafter(edges[1:], 0), np.nextafter(edges[:-1], 1)])
    rng = np.random.default_rng(bins)
    for _ in range(5):
        correct, nlls = rng.random(len(confidences)) < 0.5, np.zeros(len(confidences))
        want = slow_calibration(confidences, correct, nlls, bins)
        assert calibration(confidences, correct, nlls, bins) == pytest.approx(want, abs=1e-10)


def test_calibration_by_hand():
    """Two bins: 0 and 0.5 fall into the first, accuracy 1/2 against 1/4; 1 into the second, 0 against 1."""
    got = calibration([0.0, 0.5, 1.0], [True, False, False], [1.0, 2.0, 6.0], bins=2)
    assert got == pytest.approx({"ece": 100 * (2 / 3 * 0.25 + 1 / 3 * 1), "nll": 3.0})
    assert calibration([1.0] * 4, [True] * 4, [0.0] * 4) == {"ece": 0.0, "nll": 0.0}
    assert calibration([1.0] * 4, [False] * 4, [np.inf] * 4) == {"ece": 100.0, "nll": np.inf}
    assert calibration([0.0] * 4, [False] * 4, [1.0] * 4)["ece"] == 0.0
    assert calibration([0.0] * 4, [True] * 4, [1.0] * 4)["ece"] == 100.0
    assert calibration([0.75] * 4, [True, True, True, False], [1.0] * 4)["ece"] == 0.0


@pytest.mark.parametrize(
    "confidences, correct, nlls, bins, message",
    [
        ([0.5], [True, False], [1.0], 15, r"\(1,\), \(2,\) and \(1,\)"),
        ([0.5], [True], [1.0, 1.0], 15, r"\(1,\), \(1,\) and \(2,\)"),
        ([[0.5]], [[True]], [[1.0]], 15, r"must each be \(N,\)"),
        ([], [], [], 15, "empty"),
        ([0.5], [1], [1.0], 15, "correct must be bool, got int64"),
        ([0.5, 1.5], [True, True], [1.0, 1.0], 15, r"confidences .* row 1 is 1\.5"),
        ([-0.1], [True], [1.0], 15, "confidences .* row 0"),
        ([np.nan], [True], [1.0], 15, "confidences .* nan"),
        ([0.5], [True], [-1.0], 15, "nlls .* row 0 is -1"),
        ([0.5], [True], [np.nan], 15, "nlls .* nan"),
        ([0.5], [True], [1.0], 0, "bins .* got 0"),
        ([0.5], [True], [1.0], 1.5, "bins .* got 1.5"),
    ],
)
def test_calibration_errors(confidences, correct, nlls, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration(confidences, correct, nlls, bins)


def test_formulas_need_numpy_only():
    code = (
        "import sys; from mixup_recipes.metrics.topk_accuracy.formula import topk_accuracy; "
        "from mixup_recipes.metrics.calibration.formula import calibration; "
        "print([m for m in ('evaluate', 'datasets', 'torch', 'pandas', 'gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The metrics.


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """``evaluate.load`` by name, with caches of its own and every connection refused."""
    cache = tmp_path_factory.mktemp("evaluate")

    def refuse(*_):
        raise AssertionError("the metric asked for a connection")

    def copies():  # what `evaluate.load` imported: its own copies of the metric files
        return [module for module in sys.modules if module.partition(".")[0] == "evaluate_modules"]

    with pytest.MonkeyPatch.context() as patch:
        for module in copies():
            patch.delitem(sys.modules, module)
        patch.setattr("evaluate.config.HF_MODULES_CACHE", cache / "modules")
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(socket.socket, "connect", refuse)
        yield lambda name: evaluate.load(str(ROOT / "mixup_recipes/metrics" / name), cache_dir=str(cache))
        for module in copies():
            del sys.modules[module]


@pytest.mark.parametrize("name", NAMES)
def test_load_by_path(load, name, tmp_path):
    metric, data = load(name), samples(120)
    assert metric.name == name
    assert metric.description.strip() and "@" in metric.citation and "predictions" in metric.inputs_description
    assert "percent" in type(metric).__doc__
    whole = metric.compute(**inputs_of(name, data))
    assert whole == pytest.approx(expected(name, data), abs=1e-5)
    for part in np.split(np.arange(120), [1, 50, 51]):
        metric.add_batch(**inputs_of(name, {key: values[part] for key, values in data.items()}))
    assert metric.compute() == whole
    metric.add(**{"prediction" if k == "predictions" else "reference" if k == "references" else k: v[0]
                  for k, v in inputs_of(name, data).items()})  # fmt: skip
    first = {key: values[:1] for key, values in data.items()}
    assert metric.compute() == metric.compute(**inputs_of(name, first))
    module = importlib.import_module(f"mixup_recipes.metrics.{name}.{name}")  # and without load
    cls = {"topk_accuracy": "TopkAccuracy", "calibration": "Calibration"}[name]
    assert getattr(module, cls)(cache_dir=str(tmp_path)).compute(**inputs_of(name, data)) == whole


def test_options_and_types_of_inputs(load):
    topk, cal, data = load("topk_accuracy"), load("calibration"), samples(60, classes=3, width=3)
    want = slow_topk(data["predictions"], data["references"], (1, 2))
    for convert in (np.asarray, np.ndarray.tolist, torch.from_numpy):
        ids, labels = convert(data["predictions"]), convert(data["references"])
        assert topk.compute(predictions=ids, references=labels, ks=(1, 2)) == pytest.approx(want)
    top1 = data | {"predictions": data["predictions"][:, 0]}
    for width in (1, 3):
        wide = data | {"predictions": data["predictions"][:, :width]}
        assert cal.compute(**wide, bins=4) == cal.compute(**top1, bins=4)
    want = slow_calibration(data["confidences"], top1["predictions"] == data["references"], data["nlls"], 4)
    assert cal.compute(**top1, bins=4) == pytest.approx(want, abs=1e-5)
    tensors = {key: torch.from_numpy(values) for key, values in top1.items()}
    assert cal.compute(**tensors) == pytest.approx(expected("calibration", data), abs=1e-5)


def test_errors_pass_through_and_leave_the_metric_usable(load):
    metric, data = load("topk_accuracy"), inputs_of("topk_accuracy", samples(20))
    with pytest.raises(ValueError, match=r"top-9.*5 ids"):
        metric.compute(**data, ks=(1, 9))
    with pytest.raises(ValueError, match="empty"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="twice"):  # `evaluate` cuts these scores to whole numbers
        metric.compute(predictions=[[0.1, 0.7, 0.2, 0.0, 0.0]], references=[1])
    assert metric.compute(**data) == pytest.approx(slow_topk(*data.values(), (1, 5)))
    with pytest.raises(ValueError, match="missing"):
        load("calibration").compute(**data)


def take_part(rank: int, cache: str, data: dict) -> list:
    """What process ``rank`` of two gets when it adds its half of the samples."""
    results, mine = [], np.array_split(np.arange(len(data["references"])), 2)[rank]
    for name in NAMES:
        path = str(ROOT / "mixup_recipes/metrics" / name)
        metric = evaluate.load(path, num_process=2, process_id=rank, experiment_id="two", cache_dir=cache)
        for part in np.array_split(mine, 3):
            metric.add_batch(**inputs_of(name, {key: values[part] for key, values in data.items()}))
        results.append(metric.compute())
    return results


WORKER = """
import json, socket, sys
def refuse(*_): raise AssertionError("the metric asked for a connection")
socket.socket.connect = refuse
import numpy as np
import test_metrics
print("ready", flush=True)
print(json.dumps(test_metrics.take_part(0, sys.argv[1], dict(np.load(sys.argv[2])))))
"""


def test_two_processes_offline(load, tmp_path):
    """Process 0 gets what one process gets with all samples, process 1, which is this one, gets None."""
    data, cache = samples(101), str(tmp_path / "cache")
    np.savez(tmp_path / "data.npz", **data)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, "-c", WORKER, cache, tmp_path / "data.npz"]
    with subprocess.Popen(command, env=env, text=True, stdout=-1, stderr=-1) as first:
        try:
            assert first.stdout.readline() == "ready\n", first.stderr.read()
            assert take_part(1, cache, data) == [None, None]
            out, errors = first.communicate(timeout=120)
        finally:
            first.kill()
    assert first.returncode == 0, errors
    assert json.loads(out.splitlines()[-1]) == [load(name).compute(**inputs_of(name, data)) for name in NAMES]


# What is published with them.


@pytest.mark.parametrize("name", NAMES)
def test_readme_runs_and_is_a_space_card(load, monkeypatch, tmp_path, name):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)
    monkeypatch.chdir(ROOT)
    path = ROOT / "mixup_recipes/metrics" / name / "README.md"
    _, head, body = path.read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["sdk"] == "gradio" and card["tags"] == ["evaluate", "metric"]
    assert (path.parent / card["app_file"]).is_file() and (path.parent / "requirements.txt").is_file()
    assert importlib.import_module(f"mixup_recipes.metrics.{name}.{name}")._CITATION.strip() in body
    failed, run = doctest.testfile(str(path), module_relative=False)
    assert run and not failed


@pytest.mark.parametrize(
    "name, calls, results",
    [
        (
            "topk_accuracy",
            [(None, "1, 2"), ("3,3\n\n 0 , 2", "1"), ("3 x",), ("",)],
            [{"top1": 100 / 3, "top2": 200 / 3}, {"top1": 50.0}, "expected whole numbers, got '3 x'", "empty"],
        ),
        (
            "calibration",
            [("1 1 0\n0.5, 0, 2",), (None, 1), ("0.5 2 1",), ("",)],
            [{"ece": 25.0, "nll": 1.0}, {"ece": 35 / 3, "nll": 1.67 / 3}, "expected confidence, 0 or 1", "empty"],
        ),
    ],
)
def test_app_computes_without_gradio(monkeypatch, name, calls, results):
    """With its own folder as the path, as a Space has it: both apps import a ``formula``."""
    folder = ROOT / "mixup_recipes/metrics" / name
    monkeypatch.syspath_prepend(folder)
    for module in ("gradio", "formula"):
        monkeypatch.setitem(sys.modules, module, None)
    del sys.modules["formula"]  # imported anew, and taken out again at the end
    app = runpy.run_path(str(folder / "app.py"))
    assert app["compute"].__globals__[name].__code__.co_filename == str(folder / "formula.py")
    for (rows, *options), want in zip(calls, results, strict=True):
        rows = app["EXAMPLE"] if rows is None else rows
        if isinstance(want, str):
            with pytest.raises(ValueError, match=want):
                app["compute"](rows, *options)
        else:
            assert app["compute"](rows, *options) == pytest.approx(want)
