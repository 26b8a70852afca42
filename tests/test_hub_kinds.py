"""Promise: a data set of the Hub gives the same images and labels copied and streamed, whatever kind it is of."""

import gzip
import io
import json
import os
import re
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, load_dataset_builder
from datasets import Image as ImageFeature
from odd import END, JPEG, sample
from tiny import jpeg

from mixup_recipes.data import images, samples, splits, streaming, streams, zips
from mixup_recipes.data.classes import among
from mixup_recipes.data.decoding import BadImage
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.origin import encoded
from mixup_recipes.data.repository import in_zips
from mixup_recipes.data.samples import mended
from mixup_recipes.data.splits import load_splits
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError

CLASSES, BOTH, LABELS = ("ant", "bee", "cow"), ("train", "test"), [k for k in range(3) for _ in range(4)]
DRAW = np.random.default_rng(0)
PHOTOS = {f"{s}/{name}/{i}.jpg": jpeg(k, DRAW) for s in BOTH for k, name in enumerate(CLASSES) for i in range(4)}
EIGHT = {"num_classes": 3, "image_size": 8, "eval_size": 8, "batch_size": 4, "per_device_train_batch_size": 4}


def read_all(name, streamed, **changes):
    """A set's record and classes, its evaluation images as sums of pixels, and those of an epoch; or what is said."""
    values = {"dataset": f"tester/{name}", "eval_split": "test", "streaming": streamed, "epochs": 1}
    recipe = Recipe(**(values | EIGHT | changes))
    try:
        found = load_splits(recipe)
        evaluated = streaming.reader(found.eval, recipe, images.EvalTransform(8, 8, "bilinear"), "skip")
        trained = streaming.reader(found.train, recipe, images.TrainTransform(recipe), "skip")
        batches = list(evaluated.eval_batches(0, 1, 5, 0, torch.device("cpu")))
        epoch = list(trained.train_batches(TrainOrder(len(trained), recipe, 0, 1), 0, torch.device("cpu")))
    except UserError as e:
        return {"says": str(e)}
    pixels, labels, _, bad = (torch.cat(part) for part in zip(*batches, strict=True))
    sums, drawn = pixels.long().sum((1, 2, 3)), [int(batch[0].long().sum()) for batch in epoch]
    answer = {"pixels": sums.tolist(), "labels": labels.tolist(), "bad": bad.gt(0).tolist(), "epoch": drawn}
    return answer | {"record": found.identity, "classes": found.classes}


def main():
    """``read_all`` of each case on the command line, in a process that knows the Hub."""
    streamed, cases = json.loads(sys.argv[1])
    print("\n" + json.dumps({name: read_all(name, streamed, **changes) for name, changes in cases.items()}))


def of(split):
    return [(path, data) for path, data in PHOTOS.items() if path.startswith(split)]


def parquet(rows, labels, names=CLASSES):
    """A parquet file of images with their bytes or names."""
    schema = Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))}).arrow_schema
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": rows, "label": labels}, schema=schema), sink)
    return sink.getvalue()


def naming(split, names):
    rows = [{"bytes": None, "path": name} for name in names]
    return {f"data/{split}.parquet": parquet(rows, LABELS[: len(rows)])}


def shards(split):
    rows = [{"bytes": data, "path": None} for _, data in of(split)]
    parts = [slice(4 * i, 4 * i + 4) for i in range(3)]
    return {f"data/{split}-{i:05}-of-00003.parquet": parquet(rows[p], LABELS[p]) for i, p in enumerate(parts)}


def in_words(split):
    """Parquet files whose labels are words."""
    made = {}
    for path, content in shards(split).items():
        table, sink = pq.read_table(io.BytesIO(content)), io.BytesIO()
        words = pa.array([f" {CLASSES[k]}" for k in table["label"].to_pylist()])
        pq.write_table(pa.table({"image": table["image"], "label": words}), sink)
        made[path] = sink.getvalue()
    return made


def packed(split, kind):
    """A split's images in one file, with their labels in a tar and by folders in a zip."""
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED if split == "test" else zipfile.ZIP_STORED) as folder:
            for path, data in reversed(of(split)):  # in no order, and deeper than the classes
                folder.writestr(f"all/{path}", data)
        return {f"{split}.zip": sink.getvalue()}
    with tarfile.open(fileobj=sink, mode="w") as file:
        for (path, data), label in zip(of(split), LABELS, strict=True):
            said = ("cls", b"%d\n" % label)
            if kind == "words":
                said = ("json", json.dumps({"label": f" {CLASSES[label]} ", "n": label}).encode())
            for suffix, content in (("jpg", data), said):
                info = tarfile.TarInfo(f"{path.replace('/', '-')[:-4]}.{suffix}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return {f"{split}-0.tar": sink.getvalue()}


def listed(split, first=""):
    """A split's metadata file."""
    rows = [
        f"{first}{path.removeprefix(f'{split}/')},{label}" for (path, _), label in zip(of(split), LABELS, strict=True)
    ]
    return {f"{split}/metadata.csv": "\n".join(["file_name,label", *rows]).encode()}


def two(make, *args):
    """The files of both splits."""
    return make("train", *args) | make("test", *args)


def card(text):
    return {"README.md": f"---\n{text}\n---\n".encode()}


FILES = "configs: [{config_name: default, data_files: [%s]}]"
TABLES = card(FILES % ", ".join(f"{{split: {s}, path: data/{s}.parquet}}" for s in BOTH))
SIZES = card(
    "dataset_info:\n  features: [{name: jpg, dtype: image}, {name: cls, dtype: int64}]\n"
    "  splits: [{name: train, num_examples: 12, num_bytes: 1}, {name: test, num_examples: 12, num_bytes: 1}]"
)
NAMED = card(
    "dataset_info:\n  features:\n  - {name: jpg, dtype: image}\n"
    f"  - {{name: cls, dtype: {{class_label: {{names: {dict(enumerate(map(str, range(len(CLASSES), 0, -1))))}}}}}}}"
)
TAR = {"image_column": "jpg", "label_column": "cls"}
STRANGE = [
    *("train/ant/0.jpg", "/etc/hostname", "../../secret.jpg", "file:///etc/hostname", "gone.jpg", ".", None),
    "hf://datasets/tester/files/train/ant/0.jpg",
]
KINDS = {  # files of the repository, columns of the recipe
    "files": (PHOTOS, {}),
    "metadata": (PHOTOS | two(listed), {}),
    "parquet": (two(shards), {}),
    "names": (PHOTOS | two(lambda s: naming(s, [p for p, _ in of(s)])) | TABLES, {}),
    "tar": (two(packed, "tar") | SIZES, TAR),
    "unsized": (two(packed, "tar"), {}),
    "named": (two(packed, "tar") | NAMED, TAR),  # whose names are numbers, but not the classes' own
    "words": (two(packed, "words"), {}),
    "numbers": (two(packed, "words"), {"label_column": "n"}),
    "parquet-words": (two(in_words), {}),
    "zip": (two(packed, "zip"), {}),
}
REFUSED = {  # and what is said
    "up": (
        PHOTOS | two(listed, "../"),
        {},
        "cannot open dataset 'tester/up', split 'train': Invalid metadata file_name",
    ),
    "mixed": (
        two(shards) | {"data/train-00001-of-00003.parquet": parquet([None], [0], CLASSES[::-1])},
        {},
        "data/train-00001-of-00003.parquet does not have the same class names as train-00000-of-00003.parquet",
    ),
    "miscounted": (
        two(shards) | card(f"dataset_info: {{splits: [{', '.join(f'{{name: {s}, num_examples: 9}}' for s in BOTH)}]}}"),
        {},
        "split 'train': the card says 9 images, the files have 12; fix its dataset_info",
    ),
    "local": (two(shards), {}, "Data files don't belong to tester/local"),
    "typo": (PHOTOS, {"train_split": "trian"}, "has no split 'trian'; did you mean 'train'?"),
    "column": (PHOTOS, {"image_column": "picture"}, "no column 'picture'; valid names: image, label"),
}


@pytest.fixture(scope="module")
def answers(only_hub, clients, tmp_path_factory):
    """``read_all`` of all sets by their name, streamed and copied; and the images that were asked for to stream."""
    only_hub.clear()
    sets = {name: files for name, (files, *_) in (KINDS | REFUSED).items()}
    own = tmp_path_factory.mktemp("own") / "own.parquet"
    own.write_bytes(next(iter(shards("train").values())))
    sets["local"] |= card(FILES % f"{{split: train, path: {own}}}")
    before = f"hf://datasets/tester/strange@{only_hub.write('tester/strange', PHOTOS, 'dataset')}/train/ant/0.jpg"
    sets["strange"] = PHOTOS | two(lambda s: naming(s, [*STRANGE, before])) | TABLES
    for name, files in sets.items():
        only_hub.write(f"tester/{name}", files, "dataset")
    changes = {name: more for name, (_, more, *_) in (KINDS | REFUSED).items()} | {"strange": {}}
    found, asked = [], []
    for streamed in (True, False):
        cases = {name: more for name, more in changes.items() if streamed or name not in REFUSED}
        done = clients.run("import test_hub_kinds as t\nt.main()", json.dumps([streamed, cases]))
        assert done.returncode == 0, done.output
        found.append(json.loads(done.output.splitlines()[-1]))
        asked = asked or [
            m[1] for line in only_hub.requests if (m := re.search(r"GET .*/tester/(.*)/resolve/.*jpg", line))
        ]
    return *found, asked


@pytest.mark.parametrize("kind", KINDS)
def test_copied_and_streamed_a_set_has_the_same_images_and_labels(answers, kind):
    streamed, copied = (answer[kind] for answer in answers[:2])
    assert streamed["labels"] == LABELS and not any(streamed["bad"]) and len({*streamed["pixels"]}) == 12
    table = kind in ("files", "metadata", "zip")  # which gives the very same run
    for key in ("pixels", "labels", "bad", "classes", *(("epoch", "record") if table else ())):
        assert streamed[key] == copied[key], key
    for split, found in copied["record"]["splits"].items():
        assert streamed["record"]["splits"][split]["fingerprint"] == found["fingerprint"]
        assert streamed["record"]["splits"][split]["images"] == found["images"] == 12
    if kind != "names":
        single = kind in ("files", "metadata")
        assert answers[2].count(kind) == (24 if single else 0)  # each once, none to find out what there is


def test_a_row_of_the_hub_names_files_of_its_own_repository_only(answers):
    streamed, copied = (answer["strange"] for answer in answers[:2])
    assert streamed["bad"] == copied["bad"] == [False] + [True] * 8


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_streamed_is_one_line(answers, kind):
    assert REFUSED[kind][2] in answers[0][kind]["says"] and "\n" not in answers[0][kind]["says"]


def test_a_member_of_a_zip_is_read_from_its_place_or_is_a_bad_image():
    sink, content = io.BytesIO(), PHOTOS["train/ant/0.jpg"]
    for number, method in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(sink, "a", method) as archive:
            archive.writestr(f"a::{number}.jpg", content)
    found = zips.addresses("x.zip", sink)
    parts = [zips.ADDRESS.fullmatch(found[f"a::{number}.jpg"]) for number in range(3)]
    assert all(part["zip"] == "x.zip" for part in parts)
    data = [sink.getvalue()[int(p["first"]) : int(p["end"])] for p in parts]
    sizes = [int(part["size"]) for part in parts]
    assert [zips.unpacked(data[i], sizes[i]) for i in range(2)] == [content] * 2
    encrypted = data[0][:6] + b"\1" + data[0][7:]
    for part, size, says in (
        (data[2], sizes[2], "by method 14; expected stored or deflated"), (encrypted, sizes[0], "encrypted"),
        (data[0][:-9], sizes[0], "cut short"), (data[1][:-9], sizes[1], "cut short"), (data[1], sizes[1] - 9, "cut"),
        (data[1][:60] + b"\xff" * len(data[1][60:]), sizes[1], "damaged|cut"), (b"PK", 1, "not a member of a zip"),
    ):  # fmt: skip
        with pytest.raises(BadImage, match=says):
            zips.unpacked(part, size)


def test_a_member_of_a_zip_whose_name_looks_like_a_place_leads_to_no_other_file(tmp_path):
    outside, archive = tmp_path / "private", tmp_path / "set/photos.zip"
    archive.parent.mkdir()
    os.mkfifo(outside)
    odd = f"{str(outside)[1:]}::0-9-9::/q/ant/0.jpg"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("ant/0.jpg", odd):
            file.writestr(name, PHOTOS["train/ant/0.jpg"])
    good = in_zips([f"zip://ant/0.jpg::{archive}", None], str(archive.parent))
    assert good[1] is None and encoded(good[0]) == PHOTOS["train/ant/0.jpg"]
    with pytest.raises(UserError, match="rows name files that are in no zip of"):
        in_zips([f"zip://{odd}::{archive}"], str(archive.parent))
    with pytest.raises(BadImage, match="not a regular file"):  # a pipe is not waited for
        encoded(f"zip:/{odd}")


def test_a_class_of_a_tar_is_digits_for_datasets_too(tmp_path):
    def classes(name, content):
        (tmp_path / name).write_bytes(content)
        files = {"train": str(tmp_path / name)}
        found = mended(load_dataset_builder("webdataset", data_files=files, cache_dir=str(tmp_path / "cache")))
        return [row["cls"] for row in found.as_streaming_dataset("train").select_columns(["cls"])]

    tar = next(iter(packed("train", "tar").values()))
    assert classes("good.tar", tar) == LABELS
    with pytest.raises(ValueError, match=r"expected a whole number in digits, got '\+1'"):
        classes("bad.tar", tar.replace(b"1\n" + bytes(510), b"+1" + bytes(510)))


def test_a_member_of_a_tar_that_is_too_large_is_no_image_and_pictures_are_not_read_for_labels(tmp_path, monkeypatch):
    rows = [sample("a", 0, JPEG), sample("b", 1, JPEG + bytes(9000)), sample("c", 1, JPEG)]
    (tmp_path / "train.tar.gz").write_bytes(gzip.compress(b"".join(rows) + END))
    files = {"train": str(tmp_path / "train.tar.gz")}
    builder = mended(load_dataset_builder("webdataset", data_files=files, cache_dir=str(tmp_path / "cache")))
    table = samples.of_samples(builder.as_streaming_dataset("train"), Recipe())
    monkeypatch.setattr(samples, "LARGEST_FILE", len(JPEG) + 8999)
    read, value_of = [], samples.value_of
    monkeypatch.setattr(samples, "value_of", lambda name, *rest: read.append(name) or value_of(name, *rest))
    assert streams.read_labels(builder, table, "label", [], "") == [0, 1, 1] and read == ["a.cls", "b.cls", "c.cls"]
    assert [(row["image"] or {}).get("bytes") for row in table] == [JPEG, None, JPEG]


def test_classes_of_a_stream_are_those_of_training_wherever_labels_stand():
    """An evaluation split has some of the classes, in an order of its own."""
    rows = [{"label": "bee"}, {"label": "cow"}, {"label": "bee"}]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    moved = streams.relabelled_stream(stream, "label", {"bee": 0, "cow": 1}, ["bee", "cow"])
    again = splits.relabelled(moved, "label", among(CLASSES, ["bee", "cow"], "", ""), list(CLASSES))
    assert [row["label"] for row in again] == [1, 2, 1] and again.features["label"].names == list(CLASSES)


def test_a_packed_member_of_a_tar_is_unpacked_or_the_library_that_it_needs_is_named(monkeypatch):
    assert samples.value_of("a.cls.gz", io.BytesIO(gzip.compress(b"7")), 99) == 7
    monkeypatch.setattr(samples, "compr", {})
    with pytest.raises(UserError, match=r"a\.cls\.zst in a tar is compressed by zstd: pip install zstandard"):
        samples.value_of("a.cls.zst", io.BytesIO(b"7"), 99)
