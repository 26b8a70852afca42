"""Promise: images with any number of labels are read, mixed, trained on, scored, predicted and exported as such."""

import csv
import json
import math
import re
import shutil

import datasets
import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import resuming
import torch
from odd import END, sample
from resuming import small_model_for
from safetensors.numpy import load_file, save_file
from tiny import ROOT, jpeg

from mixers import MIXERS, build
from mixup_recipes.data import holdout
from mixup_recipes.data.images import EvalTransform
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.multi_label import Pairs
from mixup_recipes.data.order import Key
from mixup_recipes.data.splits import load_splits
from mixup_recipes.metrics.multi_label.formula import average_precisions, multi_label_scores
from mixup_recipes.pages import by_label
from mixup_recipes.resolve import load_recipe, resolve
from mixup_recipes.runs import recording
from mixup_recipes.runs.compare import compare
from mixup_recipes.runs.models import is_multi_label, open_model
from mixup_recipes.runs.noise import paired_bootstrap_map, weighted_map
from mixup_recipes.runs.replay import replay
from mixup_recipes.runs.run import Run
from mixup_recipes.training import backbones, evaluation
from mixup_recipes.training.update import new_step, one_hot
from mixup_recipes.typed import UserError

WORDS = ("sky", "sea", "ant", "10")
TINY = ["--model", "test_resnet", "--pretrained", "none", "--data_config", "recipe", "--image_size", 32]
TINY += ["--eval_size", 32, "--eval_resize", 32, "--batch_size", 8, "--per_device_train_batch_size", 4]


def labels_of(i):
    """Those of photo i: each of the four words is in half of 16 photos, and one photo has none."""
    return [word for k, word in enumerate(WORDS) if i >> k & 1]


def photos(folder, count=48):
    """A folder of photos and its table, ``photos.csv``."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(jpeg(i % 4, rng) + bytes(i))
    rows = "".join(f"{i}.jpg,{'|'.join(labels_of(i % 16))}\n" for i in range(count))
    (folder / "photos.csv").write_text(f"image,label\n{rows}")
    return folder / "photos.csv"


def recipe(dataset, name="finetune_cutmix", **changes):
    return load_recipe(name, **{"dataset": str(dataset), "multi_label": True} | changes)


def refused(dataset, **changes):
    with pytest.raises(UserError) as error:
        load_splits(recipe(dataset, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def parquet(folder, feature, values):
    """The same images and labels in two splits, as the Hub lays them out."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = [{"bytes": jpeg(i % 4, rng), "path": f"{i}.jpg"} for i in range(len(values))]
    schema = datasets.Features({"image": datasets.Image(), "label": feature}).arrow_schema
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": images, "label": values}, schema=schema), folder / f"{split}.parquet")
    return folder


def words_in(split, table="train"):
    return [{split.classes[k] for k in row} for row in getattr(split, table)["label"]]


def test_a_table_of_paths_says_labels_in_a_cell_or_in_a_list(tmp_path):
    table = photos(tmp_path, 16)
    found = load_splits(recipe(table))
    by_path = {path.rsplit("/", 1)[1]: row for part in (found.train, found.eval) for path, row in zip(
        part["image"], part["label"], strict=True)}  # fmt: skip
    assert found.classes == sorted(WORDS) and len(by_path) == 16
    for i in range(16):
        assert [found.classes[k] for k in by_path[f"{i}.jpg"]] == sorted(labels_of(i))
    rows = [{"image": f"{i}.jpg", "label": labels_of(i)} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = load_splits(recipe(tmp_path / "rows.jsonl"))
    assert again.identity["splits"] == found.identity["splits"]
    train = found.identity["splits"]["train"]
    words = words_in(found)
    assert train["per_class"] == [sum(name in row for row in words) for name in found.classes]
    assert train["without_label"] == sum(not row for row in words)
    with pytest.raises(UserError, match=r"column 'label' holds lists: .* pass --multi_label"):
        load_splits(load_recipe("finetune_cutmix", dataset=str(tmp_path / "rows.jsonl")))
    (tmp_path / "odd.tsv").write_text("image\tlabel\n0.jpg\tb | a|b\n1.jpg\t\n\ta\n2.jpg\tb\n3.jpg\tb\n4.jpg\ta\n")
    odd = load_splits(recipe(tmp_path / "odd.tsv", holdout=0.5))
    assert sorted(map(sorted, words_in(odd) + words_in(odd, "eval"))) == [[], ["a"], ["a", "b"], ["b"], ["b"]]
    assert "validation: 1 left out (rows without a path): row 3" in odd.notes
    (tmp_path / "twice.csv").write_text("image,label\n0.jpg,a\n0.jpg,b\n")
    assert "two labels, 'a' and 'b'; write them into one row, as a|b" in refused(tmp_path / "twice.csv")
    (tmp_path / "turned.csv").write_text("image,label\n0.jpg,a|b\n0.jpg,b|a\n1.jpg,b\n2.jpg,a\n3.jpg,b\n")
    assert any(
        "(rows that are there twice): 0.jpg" in n
        for n in load_splits(recipe(tmp_path / "turned.csv", holdout=0.5)).notes
    )
    for cells, says in (
        (({"label": [0, 1]}, {"label": [1, 1]}), "holds zeros and ones; expected the names or numbers"),
        (
            ({"label": ["a"]}, {}),
            "row 2 has a null; an image without labels needs an empty list or an empty text there",
        ),
        (({"label": ["a", None]}, {"label": []}), "row 1 has a null"),
    ):
        lines = [json.dumps({"image": f"{i}.jpg"} | cell) + "\n" for i, cell in enumerate(cells)]
        (tmp_path / "wrong.jsonl").write_text("".join(lines))
        assert says in refused(tmp_path / "wrong.jsonl")


def test_an_evaluation_split_of_images_without_any_label_is_refused(tmp_path):
    photos(tmp_path, 4)
    rows = [("train", "a"), ("train", "b"), ("val", ""), ("val", "")]
    lines = [f"{i}.jpg,{label},{split}\n" for i, (split, label) in enumerate(rows)]
    (tmp_path / "labels.csv").write_text("image,label,split\n" + "".join(lines))
    says = "split 'validation': no image has a label in column 'label'"
    assert says in refused(tmp_path / "labels.csv")


def test_a_column_of_parquet_may_be_of_lists_words_or_numbers(tmp_path):
    number, names = datasets.Value("int64"), datasets.ClassLabel(names=["x", "y", "z"])
    cases = [
        (datasets.List(datasets.Value("string")), [["b", "a"], [], ["c"], ["a", "a"]], "abc", ["ab", "", "c", "a"]),
        (datasets.List(number), [[2, 0], [], [1], [3]], "0123", ["02", "", "1", "3"]),
        (datasets.List(names), [[2, 0], [], [1], [1]], "xyz", ["xz", "", "y", "y"]),
        (datasets.LargeList(names), [[2, 0], [], [1], [1]], "xyz", ["xz", "", "y", "y"]),
        (names, [0, 1, 1, 2], "xyz", ["x", "y", "y", "z"]),
        (datasets.Value("string"), ["a|b", "", "b", "c"], "abc", ["ab", "", "b", "c"]),
        (number, [3, 1, 1, 0], "0123", ["3", "1", "1", "0"]),
    ]
    for i, (feature, values, classes, rows) in enumerate(cases):
        found = load_splits(recipe(parquet(tmp_path / str(i), feature, values)))
        assert found.classes == list(classes) and words_in(found) == [{*row} for row in rows]
    wrong = [
        (
            datasets.List(number),
            [[0, 1, 1], [1, 0, 0], [0, 0, 0]],
            "holds zeros and ones; expected the names or numbers",
        ),
        (datasets.List(number), [[0, 1], [1, 0], [0, 0]], "holds zeros and ones"),
        (datasets.List(number), [[0], None], "'label': row 2 has a null; an image without labels needs an empty list"),
        (datasets.List(names), [[0], [-1]], "has unlabelled images (label -1)"),
        (datasets.List(datasets.Value("float32")), [[0.5], [1.0]], "row 1: expected a word or a whole number, got 0.5"),
        (datasets.List(datasets.Value("float32")), [[0.0, 1.0], [1.0, 1.0]], "holds zeros and ones"),
        (datasets.List(datasets.Value("bool")), [[False, True], [True, True]], "holds zeros and ones"),
        (datasets.Value("float32"), [1.0, float("nan"), 2.0], "'label': row 2 has a null"),
        (datasets.List(datasets.Value("string")), [["a", None], []], "'label': row 1 has a null"),
        (datasets.List(number), [[], []], "no image has a label in column 'label'"),
    ]
    for i, (feature, values, says) in enumerate(wrong):
        assert says in refused(parquet(tmp_path / f"wrong{i}", feature, values))
    with pytest.raises(UserError, match="holds lists"):
        load_splits(load_recipe("finetune_cutmix", dataset=str(tmp_path / "0")))
    # a folder of classes has one label to an image
    for name in ("ant", "bee"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "folder" / name / f"{name}{i}.jpg").write_bytes(b"\xff\xd8\xff" + bytes(i + 1))
    found = load_splits(recipe(tmp_path / "folder"))
    assert found.classes == ["ant", "bee"] and all(len(row) == 1 for row in found.train["label"])


def test_tars_say_labels_in_a_list_or_a_text(tmp_path):
    labels = [b'{"label": ["b", "a"]}', b'{"label": "a|c"}', b'{"label": []}', b'{"label": ""}', b'{"label": " c"}']
    for split in ("train", "validation"):
        tar = b"".join(sample(f"{i}", label) for i, label in enumerate(labels)) + END
        (tmp_path / f"{split}.tar").write_bytes(tar)
    found = load_splits(recipe(tmp_path))
    assert words_in(found) == [{"a", "b"}, {"a", "c"}, set(), set(), {"c"}]
    (tmp_path / "train.tar").write_bytes(sample("0", b'{"label": [["a"]]}') + END)
    assert "expected a word or a whole number, got ['a']" in refused(tmp_path)
    for label in (b"null", b'["a", null]', b"NaN"):
        (tmp_path / "train.tar").write_bytes(sample("0", b'{"label": %s}' % label) + END)
        assert "got a null; a sample without labels needs an empty list" in refused(tmp_path)


def test_a_hold_out_does_not_depend_on_labels_and_leaves_an_image_of_each_class(tmp_path):
    table = photos(tmp_path)
    before = load_splits(recipe(table))
    text = table.read_text().replace("sky|", "")
    table.write_text(text.replace("\n16.jpg,\n", "\n16.jpg,ant|sky\n"))
    assert load_splits(recipe(table)).eval["image"][:] == before.eval["image"][:]
    names = [f"{i}.jpg" for i in range(300)]
    pairs = Pairs(np.arange(300), np.repeat(np.arange(100), 3))  # a class has three images
    held = holdout.held_out(names, pairs, [str(k) for k in range(100)], 0.9, 0)
    draws = np.array([holdout.draw(f"0\0\0{name}") for name in names])
    for k in range(100):
        own = draws[3 * k : 3 * k + 3]
        assert held[3 * k : 3 * k + 3].tolist() == [d < 0.9 and not (max(own) < 0.9 and d == max(own)) for d in own]


def test_targets_are_multi_hot_and_the_loss_is_a_binary_cross_entropy(tmp_path):
    own = recipe(photos(tmp_path, 16), "finetune_vanilla", model="test_resnet", num_classes=4)
    splits = load_splits(own)
    samples = Samples(splits.train, own, EvalTransform(32, 32, "bilinear"))
    y = torch.stack([samples[Key(0, i, 0)][1] for i in range(len(samples))])
    for row, words in zip(y.tolist(), words_in(splits), strict=True):
        assert row == [float(name in words) for name in splits.classes]
    assert torch.equal(one_hot(y, own), y)
    step, x = new_step(backbones.create_model(own), own), torch.randn(len(y), 3, 32, 32)
    out = step(x, y, np.random.default_rng(0))
    expected = 0.0
    for row, target in zip(out.logits.tolist(), y.tolist(), strict=True):
        for z, t in zip(row, target, strict=True):
            p = 1 / (1 + math.exp(-z))
            expected -= (t * math.log(p) + (1 - t) * math.log(1 - p)) / (4 * len(y))
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_recipe_changes_what_means_one_label_and_says_where_that_is_from():
    found, origin = resolve("deit_s_cutmix", {"multi_label": "true"})
    assert (found.loss, found.smoothing) == ("bce_mean", 0.0)
    assert origin["loss"] == origin["smoothing"] == "multi_label"
    assert load_recipe("r50_rsb_a3_cutmix", multi_label=True).loss == "bce_sum"
    for given, says in (
        ({"loss": "ce"}, "multi_label needs loss bce_mean, bce_sum or asymmetric, got ce"),
        ({"smoothing": 0.1}, "cannot be combined with smoothing 0.1"),
        ({"streaming": True}, "cannot be combined with streaming"),
    ):
        with pytest.raises(UserError, match=says):
            load_recipe("deit_s_cutmix", multi_label=True, **given)


def test_mixers_that_take_each_image_for_one_of_one_class_are_refused_by_name():
    one = {
        "snapmix", "supermix", "smmix", "recursivemix", "mixpro", "decouplemix", "augmix", "noisymix", "tokenmixup",
        "remix", "lumix", "sumix",
    }  # fmt: skip
    for mixer in MIXERS:
        own = {"model": small_model_for(mixer), "num_classes": 5}
        if mixer in one:
            with pytest.raises(UserError, match=f"mixer '{mixer}' assumes one class per image"):
                recipe("photos", f"finetune_{mixer}", **own)
        else:
            assert new_step(backbones.create_model(made := recipe("photos", f"finetune_{mixer}", **own)), made)
    assert not build("decouplemix", eta=0.0, two_hot=0.8).one_label  # the paper's form for binary cross-entropy
    page = (ROOT / "docs/photos.md").read_text()
    listed = " ".join(re.split(r"one\s+class,\s+and\s+they\s+are\s+refused:", page)[1].partition("\n\n")[0].split())
    assert {*re.findall(r"`(\w+)`", listed)} == one | {"mixtoken"} and "`mixtoken` with a teacher" in listed
    assert build("mixtoken", teacher="any").one_label  # the labels of its tokens
    unless = {"decouplemix": "eta", "lumix": "predicted", "augmix": "jsd_weight", "noisymix": "jsd_weight"}
    assert [*re.findall(r"`--mixer\.(\w+) 0`", listed)] == [*dict.fromkeys(unless.values())]
    assert not any(build(mixer, **{name: 0.0}).one_label for mixer, name in unless.items())


def slow_average_precision(label, score):
    """By its definition, one threshold after the other."""
    total, before = 0.0, 0.0
    for threshold in sorted({*score}, reverse=True):
        chosen = [lab for lab, s in zip(label, score, strict=True) if s >= threshold]
        recall, precision = sum(chosen) / sum(label), sum(chosen) / len(chosen)
        total, before = total + (recall - before) * precision, recall
    return total


def test_map_and_f1_equal_slow_loops():
    rng = np.random.default_rng(0)
    for digits in (1, 8):  # with and without ties
        label = (rng.random((60, 7)) < 0.3).astype(np.uint8)
        label[:, 3] = 0
        score = rng.random((60, 7)).round(digits).astype(np.float32)
        there = [k for k in range(7) if label[:, k].any()]
        each = [slow_average_precision(label[:, k].tolist(), score[:, k].tolist()) for k in there]
        assert average_precisions(label, score)[there] == pytest.approx(each)
        said, f1 = score >= 0.5, []
        for k in there:
            right, wrong = (said[:, k] & (label[:, k] == 1)).sum(), (said[:, k] != (label[:, k] == 1)).sum()
            f1.append(2 * right / (2 * right + wrong))
        right, wrong = (said & (label == 1)).sum(), (said != (label == 1)).sum()
        expected = {"map": np.mean(each), "f1": 2 * right / (2 * right + wrong), "f1_macro": np.mean(f1)}
        assert multi_label_scores(label, score) == pytest.approx({k: 100 * v for k, v in expected.items()})
    assert multi_label_scores([[0, 0]], [[0.3, 0.9]]) == {"map": 0.0, "f1": 0.0, "f1_macro": 0.0}
    for wrong, says in (([[0.2, 2.0]], "row 0 has others"), ([[0.2, math.nan]], "probabilities"), ([[0.2]], "both be")):
        with pytest.raises(ValueError, match=says):
            multi_label_scores([[0, 1]], wrong)


def test_the_interval_of_a_difference_of_map_is_that_of_resampled_images():
    rng = np.random.default_rng(0)
    label = (rng.random((40, 3)) < 0.4).astype(np.uint8)
    good = (0.7 * label + 0.3 * rng.random((40, 3))).round(1)  # with ties
    rows = rng.integers(40, size=40)
    weights = np.bincount(rows, minlength=40)[None].astype(float)
    resampled = multi_label_scores(label[rows], good[rows])["map"]
    assert 100 * weighted_map(label, good, weights)[0] == pytest.approx(resampled)
    poor = rng.random((40, 3))
    difference, low, high = paired_bootstrap_map(label, good[None], np.stack([poor, poor]), rng, 200)
    expected = multi_label_scores(label, good)["map"] - multi_label_scores(label, poor)["map"]
    assert difference == pytest.approx(expected) and low < difference < high and high - low < 40
    assert paired_bootstrap_map(label, good[None], good[None], rng, 50) == (0.0, 0.0, 0.0)


def test_the_most_confident_errors_are_the_farthest_probabilities():
    columns = {
        "index": np.array([4, 7]),
        "label": np.array([[1, 0], [0, 1]]),
        "score": np.array([[0.1, 0.6], [0.2, 0.9]]),
    }
    found = [(e.row, e.true, e.said, round(e.confidence, 6)) for e in by_label.most_confident(columns, ["a", "b"])]
    assert found == [(4, "a", "not a", 0.9), (4, "not b", "b", 0.6)]


def test_a_run_that_was_killed_goes_on_to_the_last_digit(server, tmp_path):
    args = ["--recipe", "finetune_puzzlemix", "--multi_label", "--dataset", photos(tmp_path / "photos"), *TINY]
    args += ["--epochs", 2, "--ema_decay", 0.9, "--aug_repeats", 2, "--dataloader_num_workers", 0]
    resuming.finish(server, *args, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for newer in resuming.checkpoints(tmp_path / "again")[1:]:
        shutil.rmtree(newer)
    resuming.finish(server, *args, "--output_dir", tmp_path / "again", "--resume_from_checkpoint", "auto")
    assert resuming.differences(tmp_path / "whole", tmp_path / "again") == []


def test_from_a_table_to_a_report_predictions_and_a_file_for_a_phone(server, console, tmp_path):
    table, run, report = photos(tmp_path / "photos"), tmp_path / "run", tmp_path / "report"
    args = ["--recipe", "finetune_cutmix", "--dataset", table, "--output_dir", run, "--epochs", 2, *TINY]
    status, output = server.run(*args, "--multi_label", "--ema_decay", 0.9)
    assert status == 0, output
    assert "train: " in output and "images without a label" in output and "map " in output
    data, saved = json.loads((run / "data.json").read_text()), load_recipe(str(run / "recipe.yaml"))
    held = data["splits"]["validation"]["images"]
    assert (saved.loss, saved.num_classes, data["classes"]) == ("bce_mean", 4, sorted(WORDS))
    found, columns = Run.open(run), load_file(run / "predictions.safetensors")
    last = found.log.val[-1].line
    assert {"map", "f1", "f1_macro", "nll", "count", "ema_map", "ema_f1_macro"} < last.keys() and "top1" not in last
    assert {k: (v.shape, str(v.dtype)) for k, v in columns.items()} == {
        "index": ((held,), "int32"), "label": ((held, 4), "uint8"), "score": ((held, 4), "float32")}  # fmt: skip
    assert evaluation.score(columns)["map"] == last["map"] == found.results["reported"]["map"]
    assert found.summary.metric == "map" and found.summary.reading.value == last["map"]
    card = (run / "README.md").read_text()
    assert f"**{last['map']:.2f} %** mAP" in card and "sigmoid()" in card and "mean_average_precision" in card

    status, output, errors = console("evaluate", run, "--output", tmp_path / "scores.json")
    assert status == 0 and "other images" not in output, errors
    again = json.loads((tmp_path / "scores.json").read_text())
    assert again["map"] == pytest.approx(last["map"]) and again["nll"] == pytest.approx(last["nll"])
    bare = tmp_path / "bare"  # as others have it: weights and their configuration
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, bare / name)
    assert is_multi_label(open_model(str(bare))[0])
    assert console("evaluate", bare, "--dataset", table)[0] == 0

    status, output, errors = console("report", run, "--out", report)
    assert status == 0 and "mAP" in output and "AP of " in output, errors
    assert {p.name for p in report.iterdir()} >= {"classes.csv", "errors.png", "report.md", "curves.png"}
    assert not (report / "confusion.png").exists() and "no confusion matrix" in (report / "report.md").read_text()
    rows = list(csv.DictReader((report / "classes.csv").read_text().splitlines()))
    assert [int(row["images"]) for row in rows] == columns["label"].sum(0).tolist()

    for model in (run, bare):
        assert console("predict", model, table.parent, "--top_k", 2, "--out", tmp_path / "said.jsonl")[0] == 0
        said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
        assert len(said) == 48 and all(len(row["predictions"]) == 2 for row in said)
        likely = [[p["label"] for p in row["predictions"] if p["probability"] >= 0.5] for row in said]
        assert all(
            {*some} == {*row["labels"]} or len(row["labels"]) > 2 for some, row in zip(likely, said, strict=True)
        )
    assert console("predict", run, table.parent / "0.jpg", "--out", tmp_path / "said.csv")[0] == 0
    assert (tmp_path / "said.csv").read_text().startswith("path,labels,label,probability,label_2,probability_2,")
    assert "; " in console("predict", run, table.parent / "3.jpg")[1]

    for ending in ("pt", "onnx"):
        status, output, errors = console("export", run, "--out", tmp_path / f"photos.{ending}")
        assert status == 0 and f"{held} get the labels of predictions" in output and "if p >= 0.5" in output, errors
    session = onnxruntime.InferenceSession(tmp_path / "photos.onnx")
    images = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    (probabilities,) = session.run(["probabilities"], {session.get_inputs()[0].name: images})
    assert probabilities.shape == (3, 4) and 0 < probabilities.min() < probabilities.max() < 1
    assert session.get_modelmeta().custom_metadata_map["multi_label"] in ("true", "True")

    assert "row " in str(replay(found, 0))
    with pytest.raises(UserError, match="images may have several labels, and a record holds top-1"):
        recording.of_run(found)
    with pytest.raises(UserError, match="is in both groups"):
        compare([found], [found])
    shutil.copytree(run, other := tmp_path / "other")  # of another mixer, which knew the labels better
    text = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text.replace("mixer: cutmix", "mixer: mixup"))
    score = (columns["score"] + columns["label"]).astype(np.float32) / 2
    save_file(columns | {"score": score}, other / "predictions.safetensors")
    label = columns["label"][:, there := columns["label"].any(0)].T.tolist()
    own, its = (
        100 * np.mean(list(map(slow_average_precision, label, found[:, there].T.tolist())))
        for found in (score, columns["score"])
    )
    results = json.loads((run / "eval_results.json").read_text())
    results["exported"]["map"] = own
    (other / "eval_results.json").write_text(json.dumps(results))
    compared = compare([Run.open(other)], [found])
    assert compared.values == pytest.approx((own, its)) and compared.difference == pytest.approx(own - its)
    assert compared.low <= compared.difference <= compared.high and compared.images == held
    status, output, errors = console("compare", "--a", other, "--b", run)
    assert status == 0 and f"mAP of the exported weights {own:.2f} and {its:.2f}" in output, errors
    assert console("verify", run, "--dataset", table)[0] == 0
