"""Promise: what authors distribute becomes a prepared set, with all bytes, labels and splits, or nothing is written."""

import io
import json
import os
import re
import shutil
import signal
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from PIL import Image

from mixup_recipes.cli import jobs
from mixup_recipes.data import authors, opening, prepare, shards, source
from mixup_recipes.data.known import PUBLISHED, Published
from mixup_recipes.resolve import load_recipe
from mixup_recipes.typed import UserError


def photo(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (number * 20, 90, 200 - number * 9)).save(buffer, "JPEG")
    return buffer.getvalue()


PHOTOS = [*map(photo, range(5))]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
Files = dict[str, bytes]


def text(*lines: object) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def cub200() -> tuple[Files, list[str], list[str]]:
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    paths = [f"{names[i % 2]}/{i}.jpg" for i in range(5)]
    tables = {
        "images.txt": text(*(f"{i + 1} {path}" for i, path in enumerate(paths))),
        "image_class_labels.txt": text(*(f"{i + 1} {i % 2 + 1}" for i in range(5))),
        "train_test_split.txt": text(*(f"{i + 1} {int(i < 3)}" for i in range(5))),
        "classes.txt": text(*(f"{i + 1} {name}" for i, name in enumerate(names))),
    }
    files = tables | {f"images/{path}": PHOTOS[i] for i, path in enumerate(paths)}
    return {f"CUB_200_2011/{path}": data for path, data in files.items()}, names, [names[i % 2] for i in range(5)]


def aircraft() -> tuple[Files, list[str], list[str]]:
    names = ["F/A-18", "Eurofighter Typhoon"]
    told = [f"{i:07d} {names[i % 2]}" for i in range(5)]
    lists = {"variants": names, "images_variant_trainval": told[:3], "images_variant_test": told[3:]}
    files = {f"{name}.txt": text(*lines) for name, lines in lists.items()}
    files |= {f"images/{i:07d}.jpg": PHOTOS[i] for i in range(5)}
    return {f"fgvc-aircraft-2013b/data/{k}": v for k, v in files.items()}, names, [names[i % 2] for i in range(5)]


def inat(year: int) -> tuple[Files, list[str], list[str]]:
    """The ids of categories are in no order; a name is there twice, in two supercategories."""
    names = ["Aves/Morus", "Lynx rufus", "Plantae/Morus"]
    kinds = [(7, "Morus", "Plantae"), (2, "Morus", "Aves"), (5, "Lynx rufus", "Mammalia")]
    folder = "train_val_images" if year == 2017 else "train_val2018"
    paths = [f"{folder}/Aves/{i}/{i}.jpg" for i in range(5)]
    files = {path: PHOTOS[i] for i, path in enumerate(paths)}
    categories = [{"id": i, "name": name, "supercategory": over} for i, name, over in kinds]
    if year == 2018:  # in whose lists the names are hidden
        files["categories.json"] = json.dumps(categories).encode()
        categories = [{"id": i, "name": f"hidden {i}"} for i, *_ in kinds]
    else:  # that of another year may lie beside it
        files["categories.json"] = json.dumps(
            [{"id": i, "name": "of 2018", "supercategory": ""} for i in range(9)]
        ).encode()
    for part, rows in (("train", range(3)), ("val", range(3, 5))):
        images = [{"id": 100 + i, "file_name": paths[i]} for i in rows]
        labels = [{"id": i, "image_id": 100 + i, "category_id": kinds[i % 3][0]} for i in reversed(rows)]
        lists = {"images": images, "annotations": labels, "categories": categories}
        files[f"{part}{year}.json"] = json.dumps(lists).encode()
    return files, names, [["Plantae/Morus", "Aves/Morus", "Lynx rufus"][i % 3] for i in range(5)]


def places205() -> tuple[Files, list[str], list[str]]:
    names = ["a/abbey", "c/church/outdoor"]
    told = [f"{names[i % 2]}/gsun_{i}.jpg" for i in range(5)]
    lines = [f"{path} {i % 2}" for i, path in enumerate(told)]
    files = {
        f"trainvalsplit_places205/{k}_places205.csv": text(*v) for k, v in (("train", lines[:3]), ("val", lines[3:]))
    }
    deep = "data/vision/torralba/deeplearning/images256"
    return files | {f"{deep}/{path}": PHOTOS[i] for i, path in enumerate(told)}, names, [names[i % 2] for i in range(5)]


def cifar100() -> tuple[Files, list[str], list[str]]:
    names = ["apple", "aquarium_fish"]
    records = [bytes([9, i % 2]) + pixels.tobytes() for i, pixels in enumerate(PIXELS)]
    files = {"train.bin": b"".join(records[:3]), "test.bin": b"".join(records[3:])}
    files["fine_label_names.txt"] = text(*names)
    return {f"cifar-100-binary/{k}": v for k, v in files.items()}, names, [names[i % 2] for i in range(5)]


LAYOUTS = {"cub200": cub200, "aircraft": aircraft, "places205": places205, "cifar100": cifar100}
LAYOUTS |= {"inat2017": lambda: inat(2017), "inat2018": lambda: inat(2018)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and published numbers of small sets."""
    monkeypatch.setenv("MIXUP_RECIPES_CACHE", str(tmp_path / "cache"))
    for name, published in PUBLISHED.items():
        counts = dict(zip(published.splits, (3, 2), strict=True))
        monkeypatch.setitem(PUBLISHED, name, Published(3 if "inat" in name else 2, counts))
    return tmp_path / "cache"


def given(form: str, files: Files, at: Path) -> Path:
    """The files as a folder or an archive."""
    at.parent.mkdir(parents=True, exist_ok=True)
    if form == "folder":
        for name, data in files.items():
            (at / name).parent.mkdir(parents=True, exist_ok=True)
            (at / name).write_bytes(data)
    elif form == "zip":
        with zipfile.ZipFile(at, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(at, "w:gz") if form == "tgz" else tarfile.open(at, "w") as archive:
            for name, data in files.items():
                entry = tarfile.TarInfo(f"./{name}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return at


def rows(folder: Path) -> dict[str, list[tuple[str, str, bytes]]]:
    """Name, class and bytes of each image by split."""
    found: dict[str, list[tuple[str, str, bytes]]] = {}
    for path in sorted(folder.glob("data/*.parquet")):
        table = pq.read_table(path)
        names = datasets.Features.from_arrow_schema(table.schema)["label"].names
        for row in table.to_pylist():
            image = row["image"]
            found.setdefault(path.name.split("-")[0], []).append((image["path"], names[row["label"]], image["bytes"]))
    return found


@pytest.mark.parametrize("form", ["folder", "tgz", "tar", "zip"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_keeps_bytes_labels_names_and_order_as_a_folder_and_as_an_archive(name, form, tmp_path, cache):
    files, names, labels = LAYOUTS[name]()
    folder = prepare.prepare(name, [given(form, files, tmp_path / "given")])
    found = rows(folder)
    train, evaluation = PUBLISHED[name].splits
    everything = found[train] + found[evaluation]
    assert len(found[train]) == 3 and [label for _, label, _ in everything] == labels
    if name == "cifar100":
        pictures = [np.asarray(Image.open(io.BytesIO(image))).transpose(2, 0, 1) for *_, image in everything]
        assert np.array_equal(pictures, PIXELS)
    else:
        assert [image for *_, image in everything] == PHOTOS
        assert all("/" not in path and path.endswith(".jpg") for path, *_ in everything)
    recipe = load_recipe("quickstart_vanilla", dataset=name, eval_split=evaluation)
    opened = opening.open_split(recipe, evaluation)
    assert len(opened.table) == 2 and opened.table.features["label"].names == names
    assert list(cache.iterdir()) == [folder]


def test_what_is_given_in_several_parts_is_one_set_and_is_written_once(tmp_path, capfd):
    files, *_ = LAYOUTS["inat2018"]()
    images = {path: data for path, data in files.items() if path.endswith(".jpg")}
    lists = {path: data for path, data in files.items() if path not in images}
    parts = [given("tgz", images, tmp_path / "a/images.tgz"), given("folder", lists, tmp_path / "lists")]
    folder = prepare.prepare("inat2018", parts)
    assert {split: len(images) for split, images in rows(folder).items()} == {"train": 3, "validation": 2}
    shutil.rmtree(tmp_path / "a")
    assert prepare.prepare("inat2018", parts) == folder
    assert "inat2018 is there already; to write it again, delete" in capfd.readouterr().err


def test_shards_are_cut_by_size_and_all_of_them_must_be_there(tmp_path, monkeypatch):
    files, *_ = cub200()
    at = given("folder", files, tmp_path / "given")
    one = rows(prepare.prepare("cub200", [at]))
    shutil.rmtree(prepare.find_prepared("cub200"))
    monkeypatch.setattr(shards, "ROWS", 1)
    monkeypatch.setattr(shards, "SHARD", len(PHOTOS[0]) + 1)
    folder = prepare.prepare("cub200", [at])
    assert sorted(path.name for path in folder.glob("data/*")) == [
        "test-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"
    ]  # fmt: skip
    assert rows(folder) == one
    (folder / "data/train-00000-of-00002.parquet").unlink()
    assert prepare.find_prepared("cub200") is None


def wrong(files: Files, path: str, old: bytes, new: bytes) -> Files:
    assert old in files[path]
    files[path] = files[path].replace(old, new)
    return files


BAD = {
    "an image that is missing": (
        "cub200", lambda f: f.pop("CUB_200_2011/images/001.Black_footed_Albatross/0.jpg"),
        r"1 image of cub200 is missing: CUB_200_2011/images/001.Black_footed_Albatross/0.jpg$",
    ),
    "a list cut short": (
        "places205", lambda f: wrong(f, "trainvalsplit_places205/val_places205.csv", b"a/abbey/gsun_4.jpg 0\n", b""),
        "places205: expected 2 classes, 3 .*2 images of validation, got 2 classes, 3 images of train, 1 image of valid",
    ),
    "a class less": (
        "inat2017", lambda f: wrong(f, "train2017.json", b', {"id": 2, "name": "Morus", "supercategory": "Aves"}', b""),
        "train2017.json: unknown category 2",
    ),
    "a name that leads out": (
        "cub200", lambda f: wrong(f, "CUB_200_2011/images.txt", b"001.Black_footed_Albatross/0", b"../../../secret"),
        "names the file 'CUB_200_2011/images/../../../secret.jpg', which is outside of the data set",
    ),
    "a class with the name of no folder": (
        "aircraft", lambda f: [wrong(f, k, b"F/A-18", b"..") for k in f if k.endswith(".txt")],
        "names of classes must be words, and each must be there once: '..'",
    ),
    "an unknown variant": (
        "aircraft", lambda f: wrong(f, "fgvc-aircraft-2013b/data/images_variant_test.txt", b"F/A-18", b"F/A-19"), None,
    ),
    "lists that do not agree": (
        "cub200", lambda f: wrong(f, "CUB_200_2011/image_class_labels.txt", b"3 1\n", b""),
        "images.txt and image_class_labels.txt do not name the same images: 3",
    ),
    "a line without a label": (
        "cub200", lambda f: wrong(f, "CUB_200_2011/image_class_labels.txt", b"3 1", b"3"),
        "image_class_labels.txt, line 3: expected two words, got '3'",
    ),
    "no list of its form": (
        "inat2018", lambda f: wrong(f, "val2018.json", b"file_name", b"file"),
        "val2018.json is not a list in COCO's form: KeyError 'file_name'",
    ),
    "another set": (
        "aircraft", lambda f: f.update(cub200()[0]) or [f.pop(k) for k in [*f] if "fgvc" in k],
        "variants.txt is not in .*; expected fgvc-aircraft-2013b.tar.gz, or a folder with what they hold",
    ),
    "pickles": (
        "cifar100", lambda f: [f.update({"cifar-100-python/train": f.pop(k)}) for k in [*f]],
        "train.bin is not in .*; expected cifar-100-binary.tar.gz",
    ),
    "half a record": (
        "cifar100", lambda f: wrong(f, "cifar-100-binary/test.bin", PIXELS[4].tobytes(), b""),
        "test.bin have 3,076 bytes, which is not a multiple of 3,074",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_the_whole_set_is_refused_in_one_line_and_nothing_is_written(case, tmp_path, cache):
    name, spoil, message = BAD[case]
    files, *_ = LAYOUTS[name]()
    spoil(files)
    with pytest.raises(UserError, match=message or "test.txt: unknown variant 'F/A-19'; .*F/A-18") as error:
        prepare.prepare(name, [given("folder", files, tmp_path / "given")])
    assert "\n" not in str(error.value) and list(cache.iterdir()) == []


def test_an_archive_that_is_not_the_authors_is_refused_and_nothing_is_written(tmp_path, cache, monkeypatch):
    files, *_ = cub200()
    whole = given("tgz", files, tmp_path / "whole.tgz").read_bytes()
    cut, official, odd = tmp_path / "cut.tgz", tmp_path / "CUB_200_2011.tgz", tmp_path / "odd"
    cut.write_bytes(whole[: len(whole) // 2])
    official.write_bytes(whole)
    odd.write_bytes(b"no archive" * 100)
    for path, message in (
        (cut, "cut.tgz is damaged or cut short .*; download it again"),
        (official, "CUB_200_2011.tgz has the MD5 [0-9a-f]{32}, expected 97eceeb196236b17998738112f37df78"),
        (odd, "odd is not a whole tar"),
        (
            given("tgz", files | {"../evil.txt": b""}, tmp_path / "out.tgz"),
            "'../evil.txt', which is outside of the",
        ),
        (given("zip", files | {"/evil.txt": b""}, tmp_path / "out.zip"), "'/evil.txt', which is outside of the"),
        (tmp_path / "none", "none is neither a folder nor a file"),
        (tmp_path, "images.txt is not in .*; pass an archive by its own name: --from .*CUB_200_2011.tgz"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.prepare("cub200", [path])
        assert list(cache.iterdir()) == []
    monkeypatch.setattr(source.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    for path in (tmp_path / "whole.tgz", given("folder", files, tmp_path / "folder")):
        with pytest.raises(UserError, match=r"GB needed, 0\.0 GB free; set MIXUP_RECIPES_CACHE"):
            prepare.prepare("cub200", [path])
        assert list(cache.iterdir()) == []


def test_the_command_says_what_to_download_and_a_signal_leaves_nothing(tmp_path, cache, monkeypatch, console):
    files, *_ = aircraft()
    at, before = given("folder", files, tmp_path / "given"), signal.getsignal(signal.SIGTERM)
    for words, message in (
        (("aircraft",), "get fgvc-aircraft-2013b.tar.gz from https://www.robots.ox.ac.uk"),
        (("groceries", "--from", at), "groceries is downloaded; leave out --from"),
        (("aircarft",), "'aircraft'"),
    ):
        status, _, error = console("prepare", *words)
        assert status == 2 and message in error
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(authors, "write_card", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        jobs.prepare("aircraft", from_=[str(at)])
    assert list(cache.iterdir()) == []
    status, out, _ = console("prepare", "aircraft", "--from", at, "--folder", tmp_path / "photos")
    assert status == 0 and out.strip() == str(tmp_path / "photos")
    assert (tmp_path / "photos/train/F_A-18/0000002.jpg").read_bytes() == PHOTOS[2]
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def parquet():
    """The files of a small CIFAR-100 as the Hub has it, by path."""
    names = datasets.ClassLabel(names=["apple", "aquarium_fish"])
    number = datasets.Value("int64")
    features = datasets.Features({"img": datasets.Image(), "fine_label": names, "coarse_label": number})
    files = {}
    for split, part in (("train", PHOTOS[:3]), ("test", PHOTOS[3:])):
        columns = {"img": [{"bytes": photo, "path": None} for photo in part], "fine_label": [1, 0, 1][: len(part)]}
        table = pa.table(columns | {"coarse_label": [0] * len(part)}, schema=features.arrow_schema)
        pq.write_table(table, buffer := io.BytesIO())
        files[f"cifar100/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    return files


def check_cifar100(folder: Path) -> None:
    found = [row for split in ("train", "test") for row in rows(folder)[split]]
    assert [image for *_, image in found] == PHOTOS
    assert [label for _, label, _ in found] == ["aquarium_fish", "apple", "aquarium_fish", "aquarium_fish", "apple"]


def test_cifar100_is_copied_from_the_hub_with_its_bytes_labels_and_order(parquet, tmp_path, monkeypatch):
    at, builder = given("folder", parquet, tmp_path / "hub"), datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: builder(str(at / "cifar100")))
    check_cifar100(prepare.prepare("cifar100"))


def from_the_hub(expected):
    from mixup_recipes.data import known, prepare
    from mixup_recipes.typed import UserError

    known.PUBLISHED["cifar100"] = known.Published(2, {"train": 3, "test": expected})
    try:
        return str(prepare.prepare("cifar100"))
    except UserError as e:
        return str(e)


@pytest.mark.slow
def test_cifar100_comes_from_a_server_or_not_at_all(parquet, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        hub.write("uoft-cs/cifar100", parquet, kind="dataset")
        assert "cifar100 has 2 classes, 3 images of train, 2 images of test; expected" in hub.client(from_the_hub, 4)
        check_cifar100(folder := Path(hub.client(from_the_hub, 2)))
        assert (
            f"From `uoft-cs/cifar100` at {hub.repos['dataset', 'uoft-cs/cifar100'].commits[-1].oid}"
            in (folder / "README.md").read_text()
        )
        shutil.rmtree(folder)
        hub.fault("GET .*/resolve/.*test", float("inf"), status=403)
        assert re.search("cannot read uoft-cs/cifar100: .*--from cifar-100-binary", hub.client(from_the_hub, 2))
        assert list(folder.parent.iterdir()) == []
