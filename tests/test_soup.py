"""Promise: a soup is the mean of weights in float64, of classes by their names, with statistics of its own."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from resuming import SHORT
from runs import edit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixup_recipes import fetch
from mixup_recipes.data.images import TrainTransform
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.splits import load_splits
from mixup_recipes.recipe import to_yaml
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import soup as soups
from mixup_recipes.runs.run import Run
from mixup_recipes.training import backbones
from mixup_recipes.training.export import export
from mixup_recipes.training.update import inputs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(reference: object, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in their seeds, to be read only."""
    folder = tmp_path_factory.mktemp("soup")
    made = [reference(*SHORT), reference(*SHORT, "--seed", 1)]  # type: ignore[operator]
    return [shutil.copytree(run, folder / name) for name, run in zip("ab", made, strict=True)]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def is_statistic(name: str) -> bool:
    return "running_" in name or "num_batches" in name


def mean_of(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The slow mean of what is learnt."""
    return {
        k: torch.from_numpy(np.mean([one[k].numpy().astype(np.float64) for one in found], 0)).float()
        for k in found[0]
        if not is_statistic(k)
    }


def test_a_uniform_soup_is_the_mean_with_statistics_of_training_images_and_is_a_model_for_all_commands(
    runs, console, tmp_path
):
    out = tmp_path / "soup"
    status, shown, errors = console("soup", *runs, "--out", out, "--bn_samples", 20)
    assert status == 0, errors
    assert "on 20 images of train, in whole updates" in shown and f"{out}: the average of 2, top-1 " in shown
    found, expected = weights(out), mean_of([weights(run) for run in runs])
    assert all(torch.equal(found[k], v) for k, v in expected.items())

    recipe = load_recipe(str(runs[0] / "recipe.yaml"))  # 20 images are two updates of two micro-batches
    samples = Samples(load_splits(recipe).train, recipe, TrainTransform(recipe))
    batches = samples.train_batches(TrainOrder(len(samples), recipe, 0, 1), 0, CPU)
    conv = nn.Conv2d(3, *found["conv1.0.weight"].shape[::2], stride=2, padding=1, bias=False)
    conv.weight.data = found["conv1.0.weight"]
    seen = []
    for (update, micro), (pixels, labels, *_) in zip(itertools.product((0, 1), (0, 1)), batches, strict=False):
        seen.append(conv(inputs(pixels, labels, recipe, update, micro, CPU)[0]).detach())
    mean, var = ([f(x, (0, 2, 3)) for x in seen] for f in (torch.mean, torch.var))
    torch.testing.assert_close(found["conv1.1.running_mean"], sum(mean) / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["conv1.1.running_var"], sum(var) / 4, rtol=1e-4, atol=1e-5)

    about = json.loads((out / "soup.json").read_text())
    results = [json.loads((run / "eval_results.json").read_text()) for run in runs]
    assert [(row["name"], row["sha256"], row["score"], row["used"]) for row in about["ingredients"]] == [
        (name, result["weights_sha256"], result["exported"]["top1"], True)
        for name, result in zip("ab", results, strict=True)
    ]
    assert (out / "config.json").read_bytes() == (runs[0] / "config.json").read_bytes()
    assert (out / "data.json").read_bytes() == (runs[0] / "data.json").read_bytes() and not list(tmp_path.glob(".*"))
    assert console("evaluate", out, "--output", tmp_path / "scores.json")[0] == 0
    assert json.loads((tmp_path / "scores.json").read_text())["nll"] == pytest.approx(about["scores"]["nll"], rel=1e-5)
    (tmp_path / "0.jpg").write_bytes(tiny.jpeg(0, np.random.default_rng(0)))
    assert console("predict", out, tmp_path / "0.jpg")[0] == 0
    assert console("export", out, "--out", tmp_path / "soup.pt2")[0] == 0


@pytest.mark.parametrize("reported", ["model", "ema"])
def test_the_last_checkpoints_of_a_run_are_averaged(runs, console, tmp_path, reported):
    run, out = shutil.copytree(runs[0], tmp_path / "run"), tmp_path / "soup"
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("report_ema: false", f"report_ema: {reported == 'ema'}"))
    assert console("soup", run, "--last", 2, "--out", out)[0] == 0
    kept = [load_file(place / f"{reported}.safetensors") for place in sorted((run / "checkpoints").iterdir())[-2:]]
    models = [{k.removeprefix("model."): v for k, v in one.items() if not k.startswith("mixer.")} for one in kept]
    found = weights(out)
    assert all(torch.equal(found[k], v) for k, v in mean_of(models).items())
    rows = json.loads((out / "soup.json").read_text())["ingredients"]
    exported = json.loads((run / "eval_results.json").read_text())["exported"]
    assert rows[1]["score"] == exported["ema_top1" if reported == "ema" else "top1"]
    status, _, errors = console("soup", run, "--last", 9, "--out", tmp_path / "other")
    assert status == 2 and "keeps 2 checkpoints, but --last asks for 9" in errors


def test_a_network_without_batchnorm_needs_no_data(runs, console, tmp_path):
    made = []
    for seed in (0, 1):
        made.append(shutil.copytree(runs[seed], tmp_path / str(seed)))
        fields = {"model": "test_vit", "model_args": {"img_size": 32, "patch_size": 8}}
        recipe = load_recipe(str(made[seed] / "recipe.yaml"), **fields, seed=seed)
        (made[seed] / "recipe.yaml").write_text(to_yaml(recipe))
        export(backbones.create_model(recipe), made[seed], recipe, tiny.CLASSES)
    status, shown, errors = console("soup", *made, "--out", tmp_path / "soup", "--dataset", tmp_path / "nowhere")
    assert status == 0 and "the average of 2, not scored: " in shown, errors
    found, about = weights(tmp_path / "soup"), json.loads((tmp_path / "soup/soup.json").read_text())
    assert all(torch.equal(found[k], v) for k, v in mean_of([weights(run) for run in made]).items())
    assert (about["scores"], about["bn_samples"]) == ({}, None)
    status, _, errors = console("soup", *made, "--greedy", "--out", tmp_path / "b", "--dataset", tmp_path / "nowhere")
    assert status == 2 and "greedy scores each soup, and the data of" in errors


def test_runs_that_thawed_make_a_soup_too(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    thawing = {"precise_bn_samples": None, "freeze": "body", "unfreeze_epochs": 1.0}
    (run / "recipe.yaml").write_text(to_yaml(load_recipe(str(run / "recipe.yaml"), **thawing)))
    opened = Run.open(str(run))
    kitchen, why = soups.opened(opened, fetch.model_of(opened.folder, opened.name), None, 8, 20, needed=True)
    assert kitchen is not None and kitchen.recipe.precise_bn_samples == 20, why


def renumbered(run: Path, to: Path) -> Path:
    """The same classifier with its classes in another order."""
    shutil.copytree(run, to)
    order = [2, 0, 3, 1]
    tensors = {k: v[order].contiguous() if k.startswith("fc.") else v for k, v in weights(run).items()}
    save_file(tensors, to / "model.safetensors")
    edit(to / "config.json", label_names=[tiny.CLASSES[i] for i in order])
    return to


def test_classes_go_by_their_names_and_others_are_refused(runs, console, tmp_path):
    other = renumbered(runs[0], tmp_path / "other")
    assert console("soup", runs[0], other, "--out", tmp_path / "soup")[0] == 0
    found, own = weights(tmp_path / "soup"), weights(runs[0])
    assert all(torch.equal(found[k], v) for k, v in own.items() if not is_statistic(k))
    edit(other / "config.json", label_names=[*tiny.CLASSES[:3], "black"])
    status, _, errors = console("soup", runs[0], other, "--out", tmp_path / "new")
    assert status == 2 and "does not have the same classes as" in errors and "it has black; it lacks white" in errors
    assert not (tmp_path / "new").exists()


def test_greedy_leaves_out_what_lowers_the_score(runs, console, tmp_path):
    bad = shutil.copytree(runs[0], tmp_path / "bad")
    tensors = weights(bad)
    save_file(tensors | {"fc.weight": -9 * tensors["fc.weight"]}, bad / "model.safetensors")
    results = json.loads((bad / "eval_results.json").read_text())
    edit(bad / "eval_results.json", exported=results["exported"] | {"top1": 1.0})
    status, shown, errors = console("soup", bad, runs[0], "--greedy", "--out", tmp_path / "soup")
    assert status == 0 and "bad: top-1 1.00, left out" in shown and "the score on test decided" in shown, errors
    assert [row["used"] for row in json.loads((tmp_path / "soup/soup.json").read_text())["ingredients"]] == [
        False,
        True,
    ]
    found = weights(tmp_path / "soup")
    assert all(torch.equal(found[k], v) for k, v in weights(runs[0]).items())  # its own statistics too


def test_greedy_adds_what_a_slow_loop_adds():
    rng, target = np.random.default_rng(0), np.array([0.1, -0.2, 0.3])

    def near(mean):
        return -float(np.round(np.abs(mean - target).max(), 1))  # with ties

    for _ in range(20):
        given, expected = rng.normal(size=(6, 3)), [0]
        for i in range(1, 6):
            if near(given[[*expected, i]].mean(0)) >= near(given[expected].mean(0)):
                expected.append(i)
        reads = [lambda row=row: {"w": torch.from_numpy(row)} for row in given]
        average, kept = soups.greedily(reads, lambda soup: near(soup.weights()["w"].numpy()))
        assert kept == expected and average.weights()["w"].numpy() == pytest.approx(given[kept].mean(0))


def test_low_precision_is_summed_in_float64():
    ones = [{"w": torch.tensor([v], dtype=torch.bfloat16), "n": torch.tensor(i)} for i, v in enumerate((256, 1, 1))]
    average = soups.Average.of(ones[0]).plus(ones[1]).plus(ones[2])  # in bfloat16 256 + 1 is 256
    assert average.weights() == {"w": torch.tensor([86.0], dtype=torch.bfloat16), "n": torch.tensor(0)}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("A", "needs two or more runs"),
        ("A A", "is given twice"),
        ("A B --last 2", "pass a single run"),
        ("A --last 1", "last: expected an integer at least 2, got 1"),
        ("A B --bn_samples 0", "bn_samples: expected an integer at least 1"),
        ("A nowhere", "no run folder nowhere"),
        ("A WIDE", "has eval_size 64 and "),
        ("A B --dataset nowhere", "statistics have to be computed again on training images, and the data of"),
        ("A B --out A", "it is there already"),
    ],
)
def test_what_makes_no_soup_is_refused_and_nothing_is_written(runs, console, tmp_path, argv, says):
    wide = shutil.copytree(runs[1], tmp_path / "wide")
    text = (wide / "recipe.yaml").read_text()
    (wide / "recipe.yaml").write_text(
        text.replace("eval_size: 32", "eval_size: 64").replace("resize: 32", "resize: 64")
    )
    names = {"A": runs[0], "B": runs[1], "WIDE": wide}
    words = [names.get(word, word) for word in argv.split()]
    status, _, errors = console("soup", *words, *(() if "--out" in words else ("--out", tmp_path / "soup")))
    assert status == 2 and says in errors and not (tmp_path / "soup").exists(), errors


def test_a_soup_that_cannot_be_written_leaves_nothing(runs, console, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(soups, "export", full)
    status, _, errors = console("soup", *runs, "--out", tmp_path / "soup", "--bn_samples", 16)
    assert status == 2 and "No space left on device" in errors and not list(tmp_path.iterdir())
