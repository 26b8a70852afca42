"""Promise: a probe scores nearest neighbours and a linear classifier on frozen features, by their formulas."""

import json
import math
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file

from mixup_recipes.data import images, prepare
from mixup_recipes.data.decoding import decode
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import features, readout
from mixup_recipes.runs.features import Features
from mixup_recipes.runs.models import open_model
from mixup_recipes.training import known_weights

CPU = torch.device("cpu")


def clouds(count, spread=2.0, seed=0):
    """Features of three classes that overlap; the last feature never changes."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3
    x = rng.normal(size=(count, 4)) * spread + np.eye(3, 4)[y] * 3
    x[:, 3] = 0.1
    return Features(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), 0)


def test_the_neighbours_vote_as_in_a_slow_loop():
    train, asked = clouds(40), clouds(9, seed=1)
    found = readout.neighbours(train, asked, 3, (5, 20, 100), 0.07, CPU)
    assert list(found) == [5, 20, 40]  # no more than there are
    for i, image in enumerate(asked.x.double()):
        near = sorted(
            (
                (float(image @ one / image.norm() / one.norm()), k)
                for one, k in zip(train.x.double(), train.y.tolist(), strict=True)
            ),
            reverse=True,
        )
        for k, votes in found.items():
            best = near[0][0]
            expected = [sum(math.exp((s - best) / 0.07) for s, c in near[:k] if c == label) for label in range(3)]
            assert votes[i].tolist() == pytest.approx(expected, rel=1e-4)
    (cold,) = readout.neighbours(train, train, 3, (5,), 1e-5, CPU).values()
    assert cold.isfinite().all() and torch.equal(cold.argmax(1), train.y)  # each is its own nearest


def test_ranks_take_equal_scores_in_the_order_of_classes_and_no_class_without_a_vote():
    scores = torch.tensor([[2.0, 2, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    assert readout.rates(scores, torch.tensor([1, 5])) == {"top1": 50.0, "top5": 100.0}
    assert readout.rates(scores, torch.tensor([0, 4])) == {"top1": 50.0, "top5": 50.0}
    assert readout.rates(scores, torch.tensor([3, 5]), votes=True) == {"top1": 50.0, "top5": 50.0}


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_the_linear_classifier_is_the_minimum_of_its_loss(l2):
    train = clouds(60)
    found = readout.regression(train, 3, l2, CPU)
    assert all(torch.equal(a, b) for a, b in zip(found, readout.regression(train, 3, l2, CPU), strict=True))
    x, y = train.x.double().numpy(), train.y.tolist()
    x = (x - x.mean(0)) / np.where(x.std(0) > 1e-6, x.std(0), 1)
    weight, bias = found.weight.numpy(), found.bias.numpy()
    slope, shift = l2 * weight, np.zeros(3)
    for row, label in zip(x, y, strict=True):
        p = np.exp(row @ weight + bias)
        p = p / p.sum() - np.eye(3)[label]
        slope, shift = slope + np.outer(row, p) / len(y), shift + p / len(y)
    assert np.abs(slope).max() < 1e-6 and np.abs(shift).max() < 1e-6  # convex: no other point has no slope
    assert found(train.x).numpy() == pytest.approx(x @ weight + bias, abs=1e-4)


def test_the_penalty_is_chosen_on_a_fifth_of_each_class_that_was_kept_apart():
    train = clouds(60, spread=4.0)
    apart = readout.kept_apart(train.y)
    assert torch.bincount(train.y[apart]).tolist() == [4, 4, 4] and apart.equal(readout.kept_apart(train.y))
    assert readout.kept_apart(torch.tensor([0, 1, 1, 2])).sum() == 1  # never the only image of a class
    assert readout.chosen(Features(train.x[:3], train.y[:3], 0), 3, CPU) in readout.GRID
    fit, rest = (Features(train.x[rows], train.y[rows], 0) for rows in (~apart, apart))
    best = (-1.0, 0.0, 0.0)
    for l2 in readout.GRID:
        likely = readout.regression(fit, 3, l2, CPU)(rest.x).softmax(1)
        right = sum(int(p.argmax() == k) for p, k in zip(likely, rest.y.tolist(), strict=True)) / len(rest.y)
        best = max(best, (right, sum(math.log(p[k]) for p, k in zip(likely, rest.y.tolist(), strict=True)), l2))
    assert readout.chosen(train, 3, CPU) == best[2]


def test_a_run_is_probed_on_its_own_data_and_features_are_computed_once(
    run, tiny_recipe, console, tmp_path, monkeypatch
):
    kept, out = tmp_path / "f.safetensors", tmp_path / "scores.json"
    status, shown, errors = console("probe", run, "--features", kept, "--output", out, "--k", 5, 999)
    assert status == 0 and "knn k=72" in shown and "linear        top1 " in shown, errors
    scores, found = json.loads(out.read_text()), load_file(kept)
    (net, _), recipe = open_model(str(run)), load_recipe(str(run / "recipe.yaml"))
    net.eval()
    for split, name in (("train", recipe.train_split), ("test", recipe.eval_split)):
        rows = pq.read_table(tiny_recipe.parent / f"photos/data/{split}-00000-of-00001.parquet").to_pylist()
        see = images.EvalTransform.of(recipe)
        x = images.normalise(torch.stack([see(decode(row["image"]["bytes"])) for row in rows]), recipe, CPU)
        with torch.no_grad():  # the model's last map, averaged
            expected = net.forward_features(x).mean((2, 3))
        torch.testing.assert_close(found[f"{name}.x"], expected, rtol=1e-4, atol=1e-5)
        assert found[f"{name}.y"].tolist() == [row["label"] for row in rows]
    assert scores["splits"] == json.loads((run / "data.json").read_text())["splits"]
    assert scores["classes"] == tiny.CLASSES and scores["counts"] == {"train": 72, "test": 30}
    parts = [Features(found[f"{name}.x"], found[f"{name}.y"], 0) for name in ("train", "test")]
    votes = readout.neighbours(*parts, 4, (5,), 0.07, CPU)[5]
    assert scores["knn"]["k"]["5"] == readout.rates(votes, parts[1].y, True) and set(scores["knn"]["k"]) == {"5", "72"}

    monkeypatch.setattr(features, "of_images", Mock(side_effect=AssertionError))
    status, again, _ = console("probe", run, "--features", kept, "--k", 5, 999, "--method", "linear")
    assert status == 0 and again.splitlines()[-2] == shown.splitlines()[-2]
    status, _, errors = console("probe", run, "--features", kept, "--max_train_samples", 40)
    assert status == 2 and "holds other features than these, which differ in splits; remove it" in errors


def test_a_hold_out_is_divided_as_in_training_and_a_bad_image_is_left_out(run, console, tmp_path):
    rng = np.random.default_rng(0)
    for kind, name in enumerate(("ant", "bee", "cow")):  # none of the classes of the model
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            (tmp_path / f"photos/{name}/{i}.jpg").write_bytes(tiny.jpeg(kind, rng) + bytes(i))
    (tmp_path / "photos/ant/0.jpg").write_bytes(b"\xff\xd8 no image")
    given = ("--dataset", tmp_path / "photos", "--method", "knn", "--output", tmp_path / "s.json")
    status, _, errors = console("probe", run, *given)
    assert status == 2 and "cannot be read" in errors and not (tmp_path / "s.json").exists()
    status, shown, errors = console("probe", run, *given, "--on_bad_image", "skip")
    assert status == 0 and "are held out to evaluate on" in shown and "bad_images    1" in shown, errors
    scores = json.loads((tmp_path / "s.json").read_text())
    assert sum(scores["counts"].values()) == 35 and scores["classes"] == ["ant", "bee", "cow"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("resnet5", "did you mean 'resnet50'"),
        ("MODEL", "comes without a recipe, so the data are not known; pass --dataset or --recipe"),
        ("RUN --k 0", "k: expected integers at least 1, got '0'"),
        ("RUN --temperature 0", "temperature: expected a number above 0, got 0"),
        ("RUN --split train", "cannot learn from and score the same split"),
        ("RUN --features nowhere/f.safetensors", "there is no folder nowhere"),
        ("RUN --features RUN/README.md", "holds no features"),
        ("RUN --dataset nowhere", "neither a folder"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(run, console, tmp_path, argv, says):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((run / name).read_bytes())
    words = [word.replace("RUN", str(run)).replace("MODEL", str(model)) for word in argv.split()]
    status, _, errors = console("probe", *words)
    assert status == 2 and says in errors, errors


@pytest.mark.slow
def test_the_features_of_trained_weights_tell_real_photos_apart(console, tmp_path):
    """EfficientNet-Lite0 on the groceries of the quickstart, which are downloaded unless they are there."""
    prepare.prepare("groceries")
    known_weights.prepare_weights("efficientnet_lite0")
    given = ("efficientnet_lite0", "--dataset", "groceries", "--split", "test", "--output", tmp_path / "s.json")
    status, shown, errors = console("probe", *given)
    assert status == 0, errors
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["counts"] == {"train": 675, "test": 661} and scores["features"] == 1280
    assert scores["knn"]["k"]["20"]["top1"] > 50 and scores["linear"]["top1"] > 60, shown
