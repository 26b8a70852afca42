"""Promise: tars of samples are read as their headers say, each sample whole, and which tars are a split is told."""

import io
import os
import tarfile
from collections import defaultdict

import numpy as np
import pytest
from odd import END, JPEG, PNG, member, sample
from tiny import jpeg

from mixup_recipes.data import tars
from mixup_recipes.data.splits import load_split, load_splits
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError

DRAW = np.random.default_rng(0)
PHOTOS = [jpeg(i % 3, DRAW) for i in range(12)]


def recipe(dataset, **changes):
    return Recipe(**({"dataset": str(dataset), "num_classes": 0} | changes))


def put(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(members) + END)
    return path


def numbered(path, rows):
    """A tar of some of the photos, whose class is a number."""
    return put(path, *(sample(f"{i:04}", i // 2 % 2, PHOTOS[i]) for i in rows))


def read_whole(*paths):
    """Image and class of each sample, in order, by reading all of each tar."""
    found = []
    for path in paths:
        samples = defaultdict(dict)
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
            for info in tar:
                key, suffix = info.name.split(".")
                samples[key][suffix] = tar.extractfile(info).read()
        found += [(s["jpg"], int(s["cls"])) for s in samples.values()]
    return found


def rows(table):
    return [(row["image"]["bytes"], row["label"]) for row in table]


def refused(dataset, **changes):
    with pytest.raises(UserError) as error:
        load_splits(recipe(dataset, **changes))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        ("train.tar", "validation.tar"), ("train-0000.tar", "train-0001.tar", "val-0000.tar"),
        ("train/0000.tar", "train/0001.tar", "validation/a.tar"), ("data/train-00000-of-00001.tar", "data/valid_7.tar"),
    ],
)  # fmt: skip
def test_the_tars_of_a_split_have_its_samples_in_order(tmp_path, names):
    parts = {name: numbered(tmp_path / name, range(i, 12, len(names))) for i, name in enumerate(names)}
    numbered(tmp_path / os.path.dirname(names[0]) / "train-extra-0.tar", range(3))  # which is none of them
    if "/0" in names[0]:
        (tmp_path / "train/train-extra-0.tar").unlink()
    found = load_splits(recipe(tmp_path))
    train = [path for name, path in parts.items() if "train" in name]
    assert rows(found.train) == read_whole(*train) and rows(found.eval) == read_whole(parts[names[-1]])
    assert found.classes == ["0", "1"] and not found.held_out and "holdout" not in found.identity
    assert found.eval[0]["image"]["path"] == f"{len(names) - 1:04}.jpg"


def test_tars_that_are_called_like_no_split_are_one_and_a_split_that_is_there_twice_is_refused(tmp_path):
    for i in range(4):
        numbered(tmp_path / f"one/photos-{i}.tar", range(i, 12, 4))
    found = load_splits(recipe(tmp_path / "one"))
    assert len(found.train) + len(found.eval) == 12 and found.identity["holdout"]["of"] == "train"
    assert len(load_split(recipe(tmp_path / "one", holdout=0), "train", None).table) == 12
    assert "has no split 'validation'; valid names: train" in refused(tmp_path / "one", holdout=0)
    for name in ("in1k-train-0", "in1k-validation-0"):
        numbered(tmp_path / f"named/{name}.tar", range(6))
    assert "name those to train and to evaluate on: --train_split in1k-train" in refused(tmp_path / "named")
    named = {"train_split": "in1k-train", "eval_split": "in1k-validation"}
    assert len(load_splits(recipe(tmp_path / "named", **named)).eval) == 6
    for name in ("a/x.tar", "b/x.tar"):
        numbered(tmp_path / "two" / name, range(6))
    assert "has 2 configurations: a, b; choose one with --dataset_config" in refused(tmp_path / "two")
    for name in ("train.tar", "train/0.tar"):
        numbered(tmp_path / "twice" / name, range(6))
    assert "split 'train' is there twice, as a folder of its own and one file" in refused(tmp_path / "twice")
    for name in ("train", "train-extra"):
        numbered(tmp_path / f"extra/{name}-0.tar", range(6))
    assert "has no split 'validation'" in refused(tmp_path / "extra")


@pytest.mark.parametrize(
    ("names", "splits", "found"),
    [
        (("train17-0", "train17-1"), {}, "train: all tars are one split, train: train17-0.tar to train17-1.tar"),
        (("Train-0",), {}, "train: all tars are one split, train: Train-0.tar"),
        (("b-0", "a-1", "a-0"), {}, "train: all tars are one split, train: a-0.tar to a-1.tar, b-0.tar"),
        (("x-000000", "x-000003", "x-000004"), {}, "train: the files x-000000.tar to x-000004.tar have gaps: x-000001, "
                                                   "x-000002"),
        (("x-20240101", "x-20240109"), {}, None),
        (("train2017-0", "val2017-0"), {}, "called train2017, val2017; name those to train and to evaluate on: "
                                           "--train_split train2017"),
        (("val2017-0",), {}, "called val2017; name those to train"),
        (("Train-0", "photos-0"), {}, "called Train, photos; name those to train"),
        (("photos-0", "birds-0"), {"train_split": "phots"}, "has no split 'phots'; did you mean 'photos'?"),
        (("photos-0", "birds-0"), {"eval_split": "brids"}, "has no split 'brids'; did you mean 'birds'?"),
        (("train-0", "val-0"), {"train_split": "trian"}, "has no split 'trian'; did you mean 'train'?"),
        (("train-0", "val-0"), {"eval_split": "vla"}, "has no split 'vla'; did you mean 'val'?"),
    ],
)  # fmt: skip
def test_what_tars_are_a_split_is_told_where_their_names_do_not_say_it(tmp_path, names, splits, found):
    for i, name in enumerate(names):
        numbered(tmp_path / f"{name}.tar", range(i, 12, len(names)))
    if found is None or found.startswith("train: "):
        notes = load_splits(recipe(tmp_path, **splits)).notes
        assert found in notes if found else not any("gaps" in note for note in notes)
    else:
        assert found in refused(tmp_path, **splits)


def test_columns_are_what_samples_have_or_what_is_asked_for_and_what_they_lack_is_counted(tmp_path):
    both = [
        member(f"{i:02}.jpg", PHOTOS[i]) + member(f"{i:02}.mask.png", PNG) + member(f"{i:02}.cls", b"%d\n" % (i % 2))
        + member(f"{i:02}.json", b'{"label": 7, "fruit": "%s", "n": "%d"}' % ([b"pear", b"apple"][i % 2], 10 - i % 2))
        + member(f"{i:02}.txt", [b"red\n", b"green\n"][i % 2])
        for i in range(6)
    ]  # fmt: skip
    put(tmp_path / "set/train.tar", *both)
    put(tmp_path / "set/val.tar", *both[:2], member("7.jpg"), member("8.cls", b"0"), member("nothing"),
        *map(member, ("__9.jpg", "x/.10.jpg", "x/._11.jpg", ".DS_Store")))  # fmt: skip
    found = load_splits(recipe(tmp_path / "set"))
    assert rows(found.train)[0] == (PHOTOS[0], 0) and found.classes == ["0", "1"]
    for words in ("samples without an image): 8", "samples without a label): 7", "members without a suffix): nothing"):
        assert f"validation: 1 left out ({words}" in found.notes
    assert "validation: 2 left out (names that begin with . or __): __9.jpg, x/.10.jpg" in found.notes
    assert found.notes[0] == "validation: read from the files of val"
    masks = load_split(recipe(tmp_path / "set", image_column="mask.png"), "train", None).table
    assert masks[0]["mask.png"]["bytes"] == PNG
    for column, classes in {"fruit": ["apple", "pear"], "n": ["9", "10"], "txt": ["green", "red"]}.items():
        found = load_split(recipe(tmp_path / "set", label_column=column), "train", None)
        assert found.classes == classes and found.table[column] == [1, 0] * 3
    for changes in ({"image_column": "picture"}, {"label_column": "x"}):
        says = "no sample has an image and a label; samples have cls, jpg, json, mask.png, txt (set image_column or"
        assert says in refused(tmp_path / "set", **changes)
    put(tmp_path / "upper/train.tar", member("A.JPEG"), member("A.Cls", b"1"), member("b.webp"), member("b.cls", b"0"))
    assert rows(load_split(recipe(tmp_path / "upper", holdout=0), "train", None).table) == [(JPEG, 1), (JPEG, 0)]


def test_images_by_classes_win_over_a_tar_beside_them(tmp_path):
    for i, name in enumerate(("ant", "bee")):
        for number in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.jpg").write_bytes(JPEG + bytes(10 * number + i))
    numbered(tmp_path / "backup.tar", range(12))
    assert load_splits(recipe(tmp_path)).classes == ["ant", "bee"]


def test_large_tars_are_copied_and_copied_again_when_they_were_changed(tmp_path, monkeypatch):
    numbered(tmp_path / "set[1]/train.tar", range(9))
    wanted = load_split(recipe(tmp_path / "set[1]", holdout=0), "train", None)
    monkeypatch.setattr(tars, "SMALL", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = load_split(recipe(tmp_path / "set[1]", holdout=0), "train", None)
    assert found.table.cache_files and rows(found.table) == rows(wanted.table)
    assert (found.identity, found.notes, found.table.features) == (wanted.identity, wanted.notes, wanted.table.features)
    again = bytearray((tmp_path / "set[1]/train.tar").read_bytes())
    at = again.index(PHOTOS[0])
    again[at : at + len(PHOTOS[0])] = bytes(len(PHOTOS[0]))  # of the same names and sizes
    (tmp_path / "set[1]/train.tar").write_bytes(again)
    assert not any(load_split(recipe(tmp_path / "set[1]", holdout=0), "train", None).table[0]["image"]["bytes"])


def test_headers_that_lead_back_or_are_large_themselves_are_refused(tmp_path):
    back = member("a.jpg", type=b"S", at=124, field=b"\xff" * 10 + b"\xfe\x00")  # 512 bytes before its beginning
    put(tmp_path / "back/train-0.tar", back)
    assert "is not a whole tar" in refused(tmp_path / "back")
    large = member("pax", b"9" * 2**15, type=b"x")
    put(tmp_path / "large/train-0.tar", large, sample("0"))
    assert "a header of 32,768 bytes, more than 16,384" in refused(tmp_path / "large")
