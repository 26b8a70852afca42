"""Promise: the suite of robustness says what one image at a time would, on any number of processes, and where to."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from runs import markdown_rows
from teachers import fill

from mixers import ops
from mixup_recipes.data import keys, prepare
from mixup_recipes.data.decoding import decode
from mixup_recipes.data.images import EvalTransform
from mixup_recipes.data.order import Key
from mixup_recipes.data.splits import load_split
from mixup_recipes.metrics.calibration.formula import calibration
from mixup_recipes.pages import robustness
from mixup_recipes.recipe import changed
from mixup_recipes.resolve import load_recipe
from mixup_recipes.robustness import corruptions, measures, parts, passes, suite
from mixup_recipes.runs.run import Run
from mixup_recipes.training import known_weights, launch
from mixup_recipes.typed import UserError


@pytest.fixture(scope="module")
def bench(tiny_recipe):
    """A network with weights that are the same everywhere, and ten photos."""
    recipe = load_recipe(str(tiny_recipe), max_eval_samples=10)
    net = fill(timm.create_model("test_resnet", num_classes=4)).eval().requires_grad_(False)
    table = load_split(recipe, "test", 10).table
    accelerator = launch.accelerator(recipe, Path("."))
    return passes.Bench(net, table, recipe, EvalTransform.of(recipe), accelerator, 0)


@pytest.fixture
def each(bench):
    """The photos one by one: place, pixels in [0, 1] (1, 3, H, W), label (1,)."""
    samples = (bench.samples()[Key(0, i, 0)] for i in range(10))
    return [(i, image[None] / 255, torch.tensor([label])) for i, (image, label, *_) in enumerate(samples)]


def logits(bench, x):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (bench.recipe.mean, bench.recipe.std))
    return bench.net((x - mean) / std)


def flat(content, key=""):
    """Every number of a table of tables and lists."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = {k: v for name, inner in inside for k, v in flat(inner, f"{key}.{name}").items()}
    return found | ({key: content} if isinstance(content, int | float) else {})


def test_scores_that_tell_two_sets_apart_are_what_counting_says():
    rng = np.random.default_rng(0)
    for size, other in ((40, 25), (1, 7), (61, 1)):
        inside, outside = rng.integers(2, 9, size) / 4, rng.integers(0, 7, other) / 4  # many are equal
        pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
        assert measures.auroc(inside, outside) == pytest.approx(np.mean(pairs))
        reached = [t for t in {*inside} if (inside >= t).mean() >= 0.95]
        assert measures.fpr95(inside, outside) == pytest.approx((outside >= max(reached)).mean())
        precisions = [(inside >= t).sum() / ((inside >= t).sum() + (outside >= t).sum()) for t in inside]
        assert measures.aupr(inside, outside) == pytest.approx(np.mean(precisions))
    assert measures.told_apart(inside + 9, outside) == {"auroc": 100, "fpr95": 0, "aupr": 100}


def test_the_temperature_is_the_best_of_a_grid_and_what_it_changes_is_softmax_divided_by_it():
    rng = np.random.default_rng(0)
    z, y = 4 * rng.standard_normal((60, 5)).astype(np.float32), rng.integers(0, 5, 60)

    def plain(t):
        p = np.exp(z.astype(float) / t) / np.exp(z.astype(float) / t).sum(1, keepdims=True)
        return calibration(p.max(1), p.argmax(1) == y, -np.log(p[np.arange(60), y]))

    best = min(np.geomspace(0.05, 20, 2000), key=lambda t: plain(t)["nll"])
    assert measures.fitted_temperature(z, y) == pytest.approx(best, rel=0.01)
    assert measures.calibrated(z, y, 2.5) == pytest.approx(plain(2.5))
    sure = np.where(np.arange(5) == y[:, None], 1.0, 0)
    assert measures.fitted_temperature(sure, y) == pytest.approx(measures.COLDEST, rel=0.01)


def test_attacks_are_those_of_one_image_at_a_time(bench, each):
    def slope(x, y):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(logits(bench, x), y), x)[0].sign()

    fgsm, pgd = {}, {}
    for eps in parts.FGSM_EPS:
        moved = [((x + eps / 255 * slope(x, y)).clamp(0, 1), int(y)) for _, x, y in each]
        fgsm[str(eps)] = 100 * np.mean([int(logits(bench, x).argmax()) == y for x, y in moved])
    for eps in parts.PGD_EPS:
        right = []
        for i, x, y in each:
            seed = int(keys.rng(keys.ROBUST, 0, i, passes.PGD).integers(2**63))
            moved = x + eps / 255 * (2 * torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(seed)) - 1)
            moved = moved.clamp(0, 1)
            for _ in range(10):
                moved = x + (moved + eps / 1020 * slope(moved, y) - x).clamp(-eps / 255, eps / 255)
                moved = moved.clamp(0, 1)
            right.append(int(logits(bench, moved).argmax()) == int(y))
        pgd[str(eps)] = 100 * np.mean(right)
    found = parts.attacked(bench)
    assert found["fgsm"] == pytest.approx(fgsm) and found["pgd"] == pytest.approx(pgd)


def test_corruptions_and_occlusion_are_those_of_one_image_at_a_time(bench, each, monkeypatch):
    monkeypatch.setattr(corruptions, "NAMES", ("impulse_noise", "fog"))
    monkeypatch.setattr(corruptions, "GROUPS", {"noise": ("impulse_noise",), "weather": ("fog",)})
    monkeypatch.setattr(corruptions, "mce", lambda errors: 42 + len(errors))
    found = parts.corrupt(bench, thousand=True)
    for number, name in enumerate(corruptions.NAMES):
        for severity in range(1, 6):
            wrong = []
            for i, x, y in each:
                picture = (255 * x[0]).round().to(torch.uint8).permute(1, 2, 0).numpy()
                draw = keys.rng(keys.ROBUST, 0, i, passes.CORRUPT, number, severity)
                changed_ = torch.from_numpy(corruptions.corrupt(picture, name, severity, draw)).permute(2, 0, 1)
                wrong.append(int(logits(bench, changed_[None] / 255).argmax()) != int(y))
            assert found["errors"][name][severity - 1] == pytest.approx(100 * np.mean(wrong))
    noise, fog = (np.mean(found["errors"][name]) for name in corruptions.NAMES)
    assert found["groups"] == {"noise": noise, "weather": fog} and found["mce"] == 44
    assert found["mean"] == pytest.approx((noise + fog) / 2)

    curve, cell = [30.0], np.arange(32) * 14 // 32
    for share in np.arange(1, 10) / 10:
        right = []
        for i, x, y in each:
            order = keys.rng(keys.ROBUST, 0, i, passes.OCCLUDE, round(10 * share)).random(14 * 14).argsort()
            gone = torch.from_numpy(np.isin(cell[:, None] * 14 + cell, order[: round(share * 14 * 14)]))
            hidden = torch.where(gone, torch.tensor(bench.recipe.mean).view(3, 1, 1), x)
            right.append(int(logits(bench, hidden).argmax()) == int(y))
        curve.append(100 * np.mean(right))
    occluded = parts.occlude(bench, 30.0)
    assert list(occluded["accuracy"].values()) == pytest.approx(curve[1:])
    assert occluded["auc"] == pytest.approx(sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / 9)


def test_mixed_images_are_those_of_one_pair_at_a_time(bench, each):
    partner = parts.partners(10)
    assert sorted(partner) == list(range(10)) and not (partner == np.arange(10)).any()
    told = {name: ([], [], []) for name in ("mixup", "cutmix")}
    for i, x, y in each:
        _, other, second = each[partner[i]]
        draw = keys.rng(keys.ROBUST, 0, i, passes.MIX)
        blended = draw.beta(1, 1)
        top, bottom, left, right = ops.clipped_box(32, 32, draw.beta(1, 1), draw)
        pasted = x.clone()
        pasted[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / 1024
        for name, image, lam in (
            ("mixup", blended * x + (1 - blended) * other, blended),
            ("cutmix", pasted, kept),
        ):
            p = logits(bench, image).softmax(1)[0]
            correct, sure, share = told[name]
            correct.append(int(p.argmax()) == int(y if lam >= 0.5 else second))
            sure.append(float(p.max()))
            share.append(1 if y == second else max(lam, 1 - lam))
    found = parts.mixed_calibration(bench)
    for name, (correct, sure, share) in told.items():
        ece = calibration(sure, np.array(correct), np.zeros(10))["ece"]
        expected = {"top1": np.mean(correct), "confidence": np.mean(sure), "share": np.mean(share)}
        expected = {k: 100 * v for k, v in expected.items()} | {"ece": ece}
        assert found[name] == pytest.approx(expected, rel=1e-5)


def test_numbers_do_not_depend_on_the_batch_and_halves_are_two(bench):
    small = replace(bench, recipe=changed(bench.recipe, batch_size=3, per_device_train_batch_size=3))
    asked = ("attacks", "occlusion", "calibration")
    one, other = suite.measure(bench, asked, []), suite.measure(small, asked, [])
    assert flat(one) == pytest.approx(flat(other), rel=1e-5) and one["clean"]["count"] == 10
    found = one["calibration"]
    assert (found["fitted_on"], found["scored_on"]) == (5, 5)
    columns = parts.clean(bench, with_logits=True)
    half = np.isin(np.arange(10), keys.rng(keys.ROBUST, 0, 0, passes.HALVES).permutation(10)[:5])
    z, y = columns["logits"], columns["label"]
    assert found["temperature"] == pytest.approx(measures.fitted_temperature(z[half], y[half]), rel=1e-4)
    assert found["before"] == pytest.approx(measures.calibrated(z[~half], y[~half], 1), rel=1e-5)


@pytest.fixture(scope="module")
def finished(reference, tmp_path_factory):
    """A finished tiny run."""
    return shutil.copytree(reference("--mixer", "vanilla"), tmp_path_factory.mktemp("robustness") / "run")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """A second data set, of photos of other classes."""
    root = tmp_path_factory.mktemp("strangers")
    rng = np.random.default_rng(1)
    for kind, name in enumerate(("ant", "bee")):
        (root / "test" / name).mkdir(parents=True)
        for i in range(3):
            (root / "test" / name / f"{i}.jpg").write_bytes(tiny.jpeg(kind, rng))
    return root


def test_a_run_is_measured_on_any_number_of_processes_and_says_so_in_its_card(
    finished, strangers, console, server, tmp_path
):
    run = shutil.copytree(finished, tmp_path / "run")
    argv = ("--suite", "robustness", "--max_eval_samples", 6, "--ood", strangers)
    assert "has no robustness.json; make it with mixup-recipes evaluate" in console("robustness", run)[2]
    status, shown, errors = console("evaluate", run, *argv)
    assert status == 0, errors
    found = json.loads((run / "robustness.json").read_text())
    assert found["budgets"].keys() == {"attacks", "corruptions", "occlusion", "calibration", "ood"}
    assert (found["model"], found["data"]["images"], found["ood"]["data"]["images"]) == ("run", 6, 6)
    assert len(found["data"]["fingerprint"]) == 64 and found["ood"]["data"]["dataset"] == strangers.name
    assert found["corruptions"]["errors"].keys() == {*corruptions.NAMES} and found["corruptions"]["mce"] is None
    table = {cells[0]: cells[1] for cells in markdown_rows(shown)}
    assert table["FGSM, 8/255: top-1"] == f"{found['attacks']['fgsm']['8']:.2f}"
    assert table["second data set by energy: AUROC"] == f"{found['ood']['energy']['auroc']:.2f}"
    assert table["jpeg compression: mean error"] and "There is no mCE" in shown
    with Image.open(run / "robustness.png") as sheet:
        assert sheet.width > 8 * 128 and sheet.height > 4 * 128

    script = tmp_path / "evaluation.py"  # in place of the training job
    script.write_text("import evaluate_mixup, train_mixup\ntrain_mixup.main = evaluate_mixup.main\n")
    given = ("--model", run, *argv, "--batch_size", 2, "--output", tmp_path / "two.json")
    status, said = server.run(*given, processes=2, faults=[["script", str(script)]])
    assert status == 0, said
    assert flat(json.loads((tmp_path / "two.json").read_text())) == pytest.approx(flat(found), rel=1e-4)

    assert console("record", run, "--out", tmp_path / "results")[0] == 0
    (record,) = (tmp_path / "results").glob("*.json")
    (seed,) = json.loads(record.read_text())["seeds"].values()
    assert seed["robustness"]["corruptions"] == found["corruptions"] and seed["robustness"]["data"] == found["data"]
    (run / "robustness.json").rename(tmp_path / "kept.json")  # recorded again without it, the record keeps it
    assert console("record", run, "--out", tmp_path / "results")[0] == 0
    assert list(json.loads(record.read_text())["seeds"].values()) == [seed]
    (tmp_path / "kept.json").rename(run / "robustness.json")

    assert console("card", run)[0] == 0
    card = (run / "README.md").read_text()
    assert "## Robustness" in card and "(robustness.png)" in card and str(tmp_path) not in card
    other = tmp_path / "other.json"
    apart = {"data": found["data"] | {"fingerprint": "0" * 64}, "device": "cuda"}
    other.write_text(json.dumps(found | apart))
    status, shown, _ = console("robustness", run, other, "--out", tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert markdown_rows(text)[0] == ["robustness", "run", "other"]
    assert "other cannot be compared with run: the images differ, the device differs (cpu; cuda)." in text
    assert text.count("Numbers are in percent, except NLL (in nats)") == 1  # the notes on both

    argv = (run, "--suite", "robustness", "--parts", "occlusion", "--max_eval_samples")
    status, shown, _ = console("evaluate", *argv, 6)
    assert status == 0 and "PGD, 8/255: top-1" in shown  # the other parts stay
    assert json.loads((run / "robustness.json").read_text()) == found
    for images, more, says in (
        (5, (), "the images differ"),
        (6, ("--output", other), "the device differs (cuda; cpu)"),
    ):
        status, _, errors = console("evaluate", *argv, images, *more)
        assert status == 2 and says in errors and "pass --output FILE.json" in errors
    (run / "robustness.json").write_text(json.dumps(found | {"weights_sha256": "0" * 64}))
    assert robustness.before(run / "robustness.json", found, Run.open(run)) == {}  # it is made anew
    assert "belongs to other weights" in console("robustness", run)[2] and console("card", run)[0] == 0
    assert "belongs to other weights, so nothing" in (run / "README.md").read_text()
    for damage in (
        {"clean": {}},
        {"attacks": {"fgsm": {"1": "much"}}},
        {"format": 99},
        {"ood": {"energy": [None, {}, "x"]}},
    ):
        (run / "robustness.json").write_text(json.dumps(found | damage))
        status, _, errors = console("robustness", run)
        assert status == 2 and errors.startswith(f"error: {run}/robustness.json: ")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("RUN --parts ood", "--parts needs --suite robustness"),
        ("RUN --suite robustness --parts attacks odd", "got 'odd'"),
        ("RUN --suite robustness --parts ood", "the part ood needs a second data set"),
        ("RUN --suite robustness --parts attacks --ood RUN", "needs the part ood, which is not among --parts attacks"),
        ("RUN --suite robustness --ood_split x", "--ood_split is the split of a second data set"),
        ("RUN --suite robustness --ood nowhere/x/y", "neither a folder"),
        ("RUN --suite robustness --output a.txt", "expected a name that ends in .json"),
        ("RUN --suite robustness --subset real", "cannot be combined"),
        ("MODEL --dataset PHOTOS --split test --suite robustness", "pass --output FILE.json"),
        ("SEVERAL --dataset PHOTOS --split test --suite robustness --output a.json", "need one label per image"),
    ],
)
def test_a_mistake_is_explained_before_work_starts(finished, tiny_recipe, console, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    config = json.loads((finished / "config.json").read_text())
    for name, more in (("MODEL", {}), ("SEVERAL", {"multi_label": True})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | more))
        shutil.copy(finished / "model.safetensors", tmp_path / name)
    words = argv.replace("RUN", str(finished)).replace("PHOTOS", str(tiny_recipe.parent / "photos")).split()
    status, _, errors = console("evaluate", *words)
    assert status == 2 and says in errors and errors.count("\n") == 1
    assert not (finished / "robustness.json").exists() and not (tmp_path / "a.json").exists()


def test_too_few_images_and_too_small_ones_are_refused_before_one_is_read(bench, monkeypatch):
    one = replace(bench, table=bench.table.select([0]))
    with pytest.raises(UserError, match="one half of the images"):  # as where others cannot be read
        parts.calibrate(one, parts.clean(one, with_logits=True))
    monkeypatch.setattr(passes.Bench, "over", None)
    with pytest.raises(UserError, match="one half of the images"):
        suite.measure(one, ("calibration",), [])
    small = replace(bench, transform=EvalTransform.of(changed(bench.recipe, eval_size=13, eval_resize=13)))
    with pytest.raises(UserError, match="cells of 14 a side, got images of 13 x 13 pixels"):
        suite.measure(small, ("occlusion",), [])


def test_a_second_set_needs_no_labels_and_may_call_its_images_otherwise(tiny_recipe, strangers, tmp_path):
    rng = np.random.default_rng(0)
    images = [{"bytes": tiny.jpeg(i, rng), "path": None} for i in range(4)]
    table = datasets.Dataset.from_dict({"img": images, "fine": [0, 1, 2, 3]}).cast_column("img", datasets.Image())
    (tmp_path / "second/data").mkdir(parents=True)
    table.to_parquet(tmp_path / "second/data/test-00000-of-00001.parquet")
    for columns in ({}, {"image_column": "img", "label_column": "kind", "holdout": 0}):
        recipe = load_recipe(str(tiny_recipe), **columns)
        found, there, notes = suite.second_set(recipe, str(tmp_path / "second"), "test", ["red"])
        assert (len(found.table), there.image_column, found.identity["images"]) == (4, "img", 4)
        assert decode(found.table[0]["img"]["bytes"]).shape == (3, 40, 48) and "nothing is known" in notes[-1]
        found, there, notes = suite.second_set(recipe, str(strangers), "test", ["ant"])
        assert (there.image_column, found.classes, len(found.table)) == ("image", ["ant", "bee"], 6)
        assert "the model knows 1 class of it by name: ant" in notes[-1]


@pytest.mark.slow  # its small sibling is above
def test_a_trained_network_on_real_photos_bears_little_more_than_is_known_of_such(console, tmp_path):
    try:
        weights, photos = known_weights.find_weights("efficientnet_lite0"), prepare.find_prepared("groceries")
    except UserError:
        pytest.skip("mixup-recipes prepare efficientnet_lite0")
    if photos is None:
        pytest.skip("mixup-recipes prepare groceries")
    split = load_split(load_recipe("quickstart"), "test", None)
    for name, synset in (("Granny-Smith", "n07742313"), ("Orange", "n07747607"), ("Watermelon", "strange")):
        folder = tmp_path / ("second" if synset == "strange" else "photos") / "validation" / synset
        folder.mkdir(parents=True)
        rows = [i for i, label in enumerate(split.table["label"]) if split.classes[label] == name][:5]
        for i in rows:
            (folder / f"{i}.jpg").write_bytes(split.table[i]["image"]["bytes"])
    shutil.copytree(tmp_path / "second/validation/strange", tmp_path / "second/validation/b")
    out = tmp_path / "found.json"
    argv = ("--dataset", tmp_path / "photos", "--ood", tmp_path / "second", "--output", out)
    status, _, errors = console("evaluate", weights, "--suite", "robustness", *argv)
    assert status == 0, errors
    found = json.loads(out.read_text())
    clean, attacked, errors_ = found["clean"]["top1"], found["attacks"], found["corruptions"]["errors"]
    assert clean >= 50 and clean > attacked["fgsm"]["1"] >= attacked["pgd"]["1"] >= attacked["pgd"]["8"] == 0, found
    weak, strong = (np.mean([errors_[name][k] for name in corruptions.NAMES]) for k in (0, 4))
    assert strong > weak >= 100 - clean - 10
    assert clean > found["occlusion"]["accuracy"]["0.9"] and math.isfinite(found["calibration"]["after"]["nll"])
    assert found["ood"]["energy"]["auroc"] > 50
