"""The `evaluate` metrics: right numbers, loud errors, load by path with no network, one or several processes."""

import doctest
import importlib
import json
import runpy
import socket
import sys

import evaluate
import numpy as np
import pytest
import torch
import yaml
from tiny import ROOT

from mixup_recipes.metrics.calibration.formula import calibration
from mixup_recipes.metrics.topk_accuracy.formula import topk_accuracy

METRICS = ROOT / "mixup_recipes/metrics"
NAMES = ["topk_accuracy", "calibration"]
NAN = float("nan")


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
    confidences, nlls = rng.random(n, dtype=np.float32), rng.exponential(size=n).astype(np.float32)
    return {"predictions": ids, "references": labels, "confidences": confidences, "nlls": nlls}


def inputs_of(name, data):
    return data if name == "calibration" else {k: data[k] for k in ("predictions", "references")}


def expected(name, data):
    if name == "topk_accuracy":
        return slow_topk(data["predictions"], data["references"], (1, 5))
    return slow_calibration(data["confidences"], data["predictions"][:, 0] == data["references"], data["nlls"], 15)


# The formulas.


def test_topk_equals_the_slow_loop() -> None:
    for n, classes, width, ks in ((1, 5, 5, (1, 5)), (257, 10, 5, (1, 5)), (64, 3, 3, (1, 2, 3))):
        for seed in range(5):
            ids, labels, *_ = samples(n, classes, width, seed).values()
            assert topk_accuracy(ids, labels, ks) == pytest.approx(slow_topk(ids, labels, ks), abs=1e-12)
    ids = np.tile(np.arange(5), (8, 1))
    for label, top5 in ((0, 100.0), (4, 100.0), (9, 0.0)):
        assert topk_accuracy(ids, np.full(8, label)) == {"top1": 100.0 * (label == 0), "top5": top5}
    assert topk_accuracy(ids[:, :4], np.full(8, 3), ks=[3, 4]) == {"top3": 0.0, "top4": 100.0}


def test_calibration_equals_the_slow_loop_also_on_the_edges_of_bins():
    """A confidence of exactly m/M belongs to bin m, its neighbours in float64 to m and m + 1; 0 is in the first."""
    for seed in range(5):
        ids, labels, confidences, nlls = samples(300, seed=seed).values()
        for bins in (1, 2, 10, 15, 100):
            for given in (confidences, confidences.astype(np.float64)):
                want = slow_calibration(given, ids[:, 0] == labels, nlls, bins)
                assert calibration(given, ids[:, 0] == labels, nlls, bins) == pytest.approx(want, abs=1e-10)
    for bins in (3, 7, 10, 15, 49):
        edges = np.arange(bins + 1) / bins
        confidences = np.concatenate([edges, np.nextafter(edges[1:], 0), np.nextafter(edges[:-1], 1)])
        rng = np.random.default_rng(bins)
        for _ in range(5):
            correct, nlls = rng.random(len(confidences)) < 0.5, np.zeros(len(confidences))
            want = slow_calibration(confidences, correct, nlls, bins)
            assert calibration(confidences, correct, nlls, bins) == pytest.approx(want, abs=1e-10)


def test_calibration_by_hand() -> None:
    """Two bins: 0 and 0.5 fall into the first, accuracy 1/2 against 1/4; 1 into the second, 0 against 1."""
    got = calibration([0.0, 0.5, 1.0], [True, False, False], [1.0, 2.0, 6.0], bins=2)
    assert got == pytest.approx({"ece": 100 * (2 / 3 * 0.25 + 1 / 3 * 1), "nll": 3.0})
    assert calibration([1.0] * 4, [True] * 4, [0.0] * 4) == {"ece": 0.0, "nll": 0.0}
    assert calibration([1.0] * 4, [False] * 4, [np.inf] * 4) == {"ece": 100.0, "nll": np.inf}
    assert calibration([0.0] * 4, [False] * 4, [1.0] * 4)["ece"] == 0.0
    assert calibration([0.0] * 4, [True] * 4, [1.0] * 4)["ece"] == 100.0
    assert calibration([0.75] * 4, [True, True, True, False], [1.0] * 4)["ece"] == 0.0


@pytest.mark.parametrize(
    "formula, args, message",
    [
        (topk_accuracy, ([[0, 1]], [0], (1, 5)), "top-5.*2 ids"),
        (topk_accuracy, ([0, 1], [0, 1], (1,)), r"\(N, k_max\).*\(2,\) and \(2,\)"),
        (topk_accuracy, ([[0, 1]], [[0]], (1,)), r"\(1, 2\) and \(1, 1\)"),
        (topk_accuracy, ([[0, 1]], [0, 1], (1,)), r"\(1, 2\) and \(2,\)"),
        (topk_accuracy, ([[0, 1], [0]], [0, 1], (1,)), "different lengths"),
        (topk_accuracy, ([], [], (1,)), "empty"),
        (topk_accuracy, (np.zeros((3, 0), int), [0, 1, 2], (1,)), "empty"),
        (topk_accuracy, ([[0.2, 0.8]], [1], (1,)), "whole numbers.*float64"),
        (topk_accuracy, ([[0, 1]], [0.0], (1,)), "labels must be whole numbers"),
        (topk_accuracy, ([[0, 1]], [-1], (1,)), "labels has a negative class id"),
        (topk_accuracy, ([[0, 1], [3, 3]], [0, 0], (1,)), "row 1 .*twice"),
        (topk_accuracy, ([[0, 1]], [0], (0,)), "at least 1"),
        (topk_accuracy, ([[0, 1]], [0], (1.0,)), "whole numbers"),
        (topk_accuracy, ([[0, 1]], [0], ()), "at least 1"),
        (calibration, ([0.5], [True, False], [1.0]), r"\(1,\), \(2,\) and \(1,\)"),
        (calibration, ([0.5], [True], [1.0, 1.0]), r"\(1,\), \(1,\) and \(2,\)"),
        (calibration, ([[0.5]], [[True]], [[1.0]]), r"must each be \(N,\)"),
        (calibration, ([], [], []), "empty"),
        (calibration, ([0.5], [1], [1.0]), "correct must be bool, got int64"),
        (calibration, ([0.5, 1.5], [True, True], [1.0, 1.0]), r"confidences .* row 1 is 1\.5"),
        (calibration, ([-0.1], [True], [1.0]), "confidences .* row 0"),
        (calibration, ([NAN], [True], [1.0]), "confidences .* nan"),
        (calibration, ([0.5], [True], [-1.0]), "nlls .* row 0 is -1"),
        (calibration, ([0.5], [True], [NAN]), "nlls .* nan"),
        (calibration, ([0.5], [True], [1.0], 0), "bins .* got 0"),
        (calibration, ([0.5], [True], [1.0], 1.5), "bins .* got 1.5"),
    ],
)
def test_what_a_formula_cannot_use_is_explained(formula, args, message):
    with pytest.raises(ValueError, match=message):
        formula(*args)


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
        yield lambda name: evaluate.load(str(METRICS / name), cache_dir=str(cache))
        for module in copies():
            del sys.modules[module]


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_loads_by_path_and_takes_batches_and_single_samples(load, name, tmp_path):
    metric, data = load(name), samples(120)
    assert metric.name == name and "percent" in type(metric).__doc__
    assert metric.description.strip() and "@" in metric.citation and "predictions" in metric.inputs_description
    whole = metric.compute(**inputs_of(name, data))
    assert whole == pytest.approx(expected(name, data), abs=1e-5)
    for part in np.split(np.arange(120), [1, 50, 51]):
        metric.add_batch(**inputs_of(name, {key: values[part] for key, values in data.items()}))
    assert metric.compute() == whole
    singular = {"predictions": "prediction", "references": "reference"}
    metric.add(**{singular.get(key, key): values[0] for key, values in inputs_of(name, data).items()})
    first = {key: values[:1] for key, values in data.items()}
    assert metric.compute() == metric.compute(**inputs_of(name, first))
    module = importlib.import_module(f"mixup_recipes.metrics.{name}.{name}")  # and without load
    cls = {"topk_accuracy": "TopkAccuracy", "calibration": "Calibration"}[name]
    assert getattr(module, cls)(cache_dir=str(tmp_path)).compute(**inputs_of(name, data)) == whole


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of datasets with NumPy before 2.3
def test_options_types_of_inputs_and_errors_which_leave_the_metric_usable(load):
    topk, cal, data = load("topk_accuracy"), load("calibration"), samples(60, classes=3, width=3)
    ids, labels, confidences, nlls = data.values()
    for convert in (np.asarray, np.ndarray.tolist, torch.from_numpy):
        got = topk.compute(predictions=convert(ids), references=convert(labels), ks=(1, 2))
        assert got == pytest.approx(slow_topk(ids, labels, (1, 2)))
    want = slow_calibration(confidences, ids[:, 0] == labels, nlls, 4)
    for wide in (ids[:, 0], ids[:, :1], ids):
        assert cal.compute(**data | {"predictions": wide}, bins=4) == pytest.approx(want, abs=1e-5)
    tensors = {key: torch.from_numpy(values) for key, values in (data | {"predictions": ids[:, 0]}).items()}
    assert cal.compute(**tensors) == pytest.approx(expected("calibration", data), abs=1e-5)
    for given, words in (
        ({"predictions": ids, "references": labels, "ks": (1, 9)}, "top-9.*3 ids"),
        ({"predictions": [], "references": []}, "empty"),
        ({"predictions": [[0.1, 0.7, 0.2]], "references": [1], "ks": (1,)}, "twice"),  # `evaluate` cuts these scores
    ):
        with pytest.raises(ValueError, match=words):
            topk.compute(**given)
    assert topk.compute(predictions=ids, references=labels, ks=(1, 2)) == got
    with pytest.raises(ValueError, match="missing"):
        cal.compute(predictions=ids, references=labels)


WORKER = """
import json, os, socket, sys
import evaluate, numpy, train_mixup
import test_metrics
def refuse(*_): raise AssertionError("the metric asked for a connection")
socket.socket.connect = refuse
rank, cache = int(os.environ["RANK"]), sys.argv[1]
evaluate.config.HF_MODULES_CACHE = f"{cache}/modules{rank}"
train_mixup.main = lambda: print(json.dumps(test_metrics.take_part(rank, cache, dict(numpy.load(sys.argv[2])))))
"""


def take_part(rank: int, cache: str, data: dict) -> list:
    """What process ``rank`` of two gets when it adds its half of the samples."""
    results, mine = [], np.array_split(np.arange(len(data["references"])), 2)[rank]
    for name in NAMES:
        metric = evaluate.load(
            str(METRICS / name), num_process=2, process_id=rank, experiment_id="two", cache_dir=cache
        )
        for part in np.array_split(mine, 3):
            metric.add_batch(**inputs_of(name, {key: values[part] for key, values in data.items()}))
        results.append(metric.compute())
    return results


def test_of_two_processes_the_first_gets_what_one_gets_with_all_samples_and_the_second_none(load, server, tmp_path):
    np.savez(tmp_path / "data.npz", **samples(101))
    (tmp_path / "worker.py").write_text(WORKER)
    script = ["script", str(tmp_path / "worker.py")]
    run = server.start(tmp_path / "cache", tmp_path / "data.npz", processes=2, faults=[script])
    assert run.wait() == [0, 0], run.output(0) + run.output(1)
    found = [json.loads(run.output(rank).splitlines()[-1]) for rank in range(2)]
    assert found == [[load(name).compute(**inputs_of(name, samples(101))) for name in NAMES], [None, None]]


# What is published with them.


@pytest.mark.parametrize("name", NAMES)
def test_readme_runs_and_is_a_space_card(load, monkeypatch, tmp_path, name):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)
    monkeypatch.chdir(ROOT)
    path = METRICS / name / "README.md"
    _, head, body = path.read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["sdk"] == "gradio" and card["tags"] == ["evaluate", "metric"]
    assert (path.parent / card["app_file"]).is_file() and (path.parent / "requirements.txt").is_file()
    assert importlib.import_module(f"mixup_recipes.metrics.{name}.{name}")._CITATION.strip() in body
    failed, run = doctest.testfile(str(path), module_relative=False)
    assert run and not failed


TOPK_ROWS = {
    (None, "1, 2"): {"top1": 100 / 3, "top2": 200 / 3},
    ("3,3\n\n 0 , 2", "1"): {"top1": 50.0},
    ("3 x",): "expected whole numbers, got '3 x'",
    ("",): "empty",
}
CALIBRATION_ROWS = {
    ("1 1 0\n0.5, 0, 2",): {"ece": 25.0, "nll": 1.0},
    (None, 1): {"ece": 35 / 3, "nll": 1.67 / 3},
    ("0.5 2 1",): "expected confidence, 0 or 1",
    ("",): "empty",
}


@pytest.mark.parametrize(("name", "results"), [("topk_accuracy", TOPK_ROWS), ("calibration", CALIBRATION_ROWS)])
def test_app_computes_without_gradio(monkeypatch, name, results):
    """With its own folder as the path, as a Space has it: both apps import a ``formula``."""
    folder = METRICS / name
    monkeypatch.syspath_prepend(folder)
    for module in ("gradio", "formula"):
        monkeypatch.setitem(sys.modules, module, None)
    del sys.modules["formula"]  # imported anew, and taken out again at the end
    app = runpy.run_path(str(folder / "app.py"))
    assert app["compute"].__globals__[name].__code__.co_filename == str(folder / "formula.py")
    for (rows, *options), want in results.items():
        rows = app["EXAMPLE"] if rows is None else rows
        if isinstance(want, str):
            with pytest.raises(ValueError, match=want):
                app["compute"](rows, *options)
        else:
            assert app["compute"](rows, *options) == pytest.approx(want)
