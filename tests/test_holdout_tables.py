"""Promise: data with one split are divided by the same rule whatever kind they are of, and no image is copied."""

import hashlib
import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from odd import END, member
from test_own_photos import CLASSES, recipe
from tiny import jpeg

from mixup_recipes.data import opening
from mixup_recipes.data.splits import load_split, load_splits
from mixup_recipes.typed import UserError

SHARE, SEED = 0.3, 5
OWN = {"holdout": SHARE, "holdout_seed": SEED}
SMALL = ["--model", "test_resnet", "--pretrained", "none", "--data_config", "recipe", "--image_size", 32]
SMALL += ["--eval_size", 32, "--eval_resize", 32, "--batch_size", 8, "--per_device_train_batch_size", 8]


def photos(count, more=0):
    """Name, bytes and class of each photo; every sixth has the bytes of the one before, under another name."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        kind = i % 3
        data = found[i - 3][1] if i % 6 == 5 else jpeg(kind, rng) + bytes(more)
        found.append((f"{i:03}.jpg", data, kind))
    return found


def parquet(path, rows, named=True):
    schema = Features({"image": ImageFeature(), "label": ClassLabel(names=list(CLASSES))}).arrow_schema
    images = [{"bytes": data, "path": f"folder/{name}" if named else None} for name, data, _ in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": [kind for *_, kind in rows]}, schema=schema), path)


def bare(path, rows):
    parquet(path, rows, named=False)


def naming(path, rows):
    """A parquet file whose rows name files beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, data, _ in rows:
        (path.parent / name).write_bytes(data)
    images = [{"bytes": None, "path": name} for name, *_ in rows]
    image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "label": [CLASSES[kind] for *_, kind in rows]}), path)


def tar(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    members = [
        member(f"x/{name}", data) + member(f"x/{name[:-4]}.json", json.dumps({"label": CLASSES[kind]}).encode())
        for name, data, kind in rows
    ]
    path.with_suffix(".tar").write_bytes(b"".join(members) + END)


KINDS = {"parquet": parquet, "bare": bare, "naming": naming, "tar": tar}


def reference(rows, named=True, classes=CLASSES):
    """The photos that are trained on and those that are held out, one by one."""

    def draw(row):
        name, data, kind = row
        text = f"{SEED}\0{classes[kind]}\0{name if named else hashlib.sha256(data).hexdigest()}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

    held = [row for row in rows if draw(row) < SHARE]
    assert {kind for *_, kind in held} == {0, 1, 2} and len(held) < len(rows)  # no class is held out whole
    contents = {data for _, data, _ in held}
    train = [row for row in rows if row not in held and row[1] not in contents]
    assert len(train) + len(held) < len(rows) or not named
    return train, held


def seen(table, at=None):
    """Bytes and class of each row."""
    found = []
    for row in table:
        image = row["image"]
        data = image["bytes"] if image["bytes"] is not None else (at / image["path"]).read_bytes()
        found.append((data, row["label"]))
    return found


def wanted(rows):
    return [(data, kind) for _, data, kind in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sides_are_those_of_the_rule_and_more_rows_move_none(tmp_path, kind):
    for count in (48, 66):
        rows = photos(count)
        KINDS[kind](tmp_path / "train.parquet", rows)
        found = load_splits(recipe(tmp_path, **OWN))
        train, held = reference(rows, kind != "bare")
        assert seen(found.train, tmp_path) == wanted(train) and seen(found.eval, tmp_path) == wanted(held)
        assert found.classes == list(CLASSES)
        assert found.identity["holdout"] == {"of": "train", "share": SHARE, "seed": SEED}
        assert found.notes[0] == f"validation: {len(held)} of {count} images are held out to evaluate on"
        if kind != "bare":
            assert found.held_out == [name for name, *_ in held]
            left = count - len(train) - len(held)
            assert found.notes[1].startswith(
                f"validation: {left} left out of training because the same content is held out: "
            )
    few = load_splits(recipe(tmp_path, max_eval_samples=5, **OWN))
    assert (
        len(few.eval) == len(few.held_out) == 5 and few.identity["splits"]["train"] == found.identity["splits"]["train"]
    )
    alone = load_split(recipe(tmp_path, **OWN), "validation", None)
    assert alone.identity == found.identity["splits"]["validation"]
    if kind == "naming":  # the size of a file that a row names counts
        (tmp_path / held[0][0]).write_bytes(b"another")
        other = load_split(recipe(tmp_path, **OWN), "validation", None)
        assert other.identity["fingerprint"] != alone.identity["fingerprint"]


def test_which_tables_are_divided(tmp_path):
    rows = photos(24)
    for name in ("train", "test"):
        parquet(tmp_path / f"set/data/{name}-00000-of-00001.parquet", rows)
    found = load_splits(recipe(tmp_path / "set"))
    assert len(found.eval) < 12 and found.held_out  # tests stay aside
    assert load_splits(recipe(tmp_path / "set", eval_split="test")).held_out == []
    assert len(load_split(recipe(tmp_path / "set"), "test", None).table) == 24
    for changes in ({"holdout": 0}, {"train_split": "trian"}, {"eval_split": "mine"}):
        with pytest.raises(UserError, match="has no split"):
            load_splits(recipe(tmp_path / "set", **changes))
    parquet(tmp_path / "set/data/val-00000-of-00001.parquet", rows[:6])
    assert len(load_splits(recipe(tmp_path / "set")).eval) == 6
    for name in ("train", "train-extra"):
        parquet(tmp_path / f"more/{name}.parquet", rows)
    with pytest.raises(UserError, match="has no split 'validation'; valid names: train, train-extra"):
        load_splits(recipe(tmp_path / "more"))
    parquet(tmp_path / "one/train.parquet", [row for row in rows if row[2] == 0])
    assert len(load_splits(recipe(tmp_path / "one")).classes) == 3  # the table says so


@pytest.mark.parametrize("named", [True, False])
def test_a_large_table_is_divided_where_it_lies(tmp_path, monkeypatch, named):
    rows = photos(60, more=200_000)
    parquet(tmp_path / "set/train.parquet", rows, named)
    monkeypatch.setattr(opening, "SMALL", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    load_split(recipe(tmp_path / "set", holdout=0), "train", None)  # the copy is there
    before = pa.total_allocated_bytes()
    found = load_splits(recipe(tmp_path / "set", **OWN))
    assert found.train.cache_files and pa.total_allocated_bytes() - before < 2**20
    train, held = reference(rows, named)
    assert seen(found.train) == wanted(train) and seen(found.eval) == wanted(held)


def test_a_run_goes_on_over_the_same_rows_only_and_is_evaluated_on_its_hold_out_alone(server, console, tmp_path):
    root, run = tmp_path / "photos", tmp_path / "run"
    tar(root / "train.tar", photos(36))
    args = ["--recipe", "finetune_cutmix", "--dataset", root, "--output_dir", run, "--epochs", 1, *SMALL]
    status, output = server.run(*args)
    assert status == 0, output
    data = json.loads((run / "data.json").read_text())
    held = (run / "holdout.txt").read_text().splitlines()
    assert data["holdout"]["of"] == "train" and len(held) == data["splits"]["validation"]["images"]
    assert server.run(*args, "--resume_from_checkpoint", "auto")[0] == 0
    status, output, errors = console("evaluate", run)
    assert status == 0 and f"count {len(held)}" in " ".join(output.split()), errors
    assert "other images" not in output
    shutil.copytree(root, tmp_path / "copy")
    trained = data["splits"]["train"]["images"]
    for split, count in (("validation", len(held)), ("train", trained)):
        status, output, errors = console("evaluate", run, "--dataset", tmp_path / "copy", "--split", split)
        assert status == 0 and f"count {count} " in " ".join(output.split()) and "other images" not in output, errors
    for split in ("trian", "test"):  # the second one may be the name of a split
        status, _, errors = console("evaluate", run, "--split", split)
        assert status == 2 and f"no split '{split}'" in errors and "did you mean 'train'" * (split == "trian") in errors
    tar(root / "train.tar", photos(48))
    status, output = server.run(*args, "--resume_from_checkpoint", "auto")
    assert status == 2 and "is not what" in output and "images then" in output


# ------------------------------------------------------------------------------------------------ on the Hub


def on_the_hub(name, streamed, changes):
    """Bytes, as a hash, and class of each row of both sides, and the hold-out's record; or what is said."""
    try:
        found = load_splits(recipe(f"tester/{name}", streaming=streamed, **(OWN | changes)))
    except UserError as e:
        return {"says": str(e)}

    def read(image):
        return open(image, "rb").read() if isinstance(image, str) else image["bytes"]

    sides = [
        [[hashlib.sha256(read(row["image"])).hexdigest(), row["label"]] for row in table]
        for table in (found.train, found.eval)
    ]
    return {"sides": sides, "holdout": found.identity.get("holdout"), "commit": found.identity["commit"]}


def main():
    """``on_the_hub`` of each case on the command line, in a process that knows the Hub."""
    print("\n" + json.dumps([on_the_hub(*case) for case in json.loads(sys.argv[1])]))


def test_a_set_of_the_hub_with_one_split_is_divided_and_one_with_two_is_not(hub, clients, tmp_path):
    rows = photos(48)
    for make in (parquet, tar):
        make(tmp_path / "train.parquet", rows)
    files, tars = (tmp_path / f"train.{suffix}" for suffix in ("parquet", "tar"))
    words = b"".join(member(f"{name}", data) + member(f"{name[:-4]}.cls", b"%d" % kind) for name, data, kind in rows)
    images = {f"{CLASSES[kind]}/{name}": data for name, data, kind in rows}
    sets = {
        "one": {"data/train-00000-of-00001.parquet": files.read_bytes()},
        "tars": {"train-0.tar": tars.read_bytes()}, "numbers": {"train-0.tar": words + END}, "files": images,
        "three": {f"data/{s}-00000-of-00001.parquet": files.read_bytes() for s in ("train", "validation", "test")},
        "test": {f"data/{s}-00000-of-00001.parquet": files.read_bytes() for s in ("train", "test")},
    }  # fmt: skip
    for name, content in sets.items():
        hub.write(f"tester/{name}", content, "dataset")
    cases = [(name, False, {}) for name in sets] + [(name, True, {}) for name in ("one", "files")]
    cases += [("test", False, {"eval_split": "test"}), ("one", False, {"holdout": 0})]
    done = clients.run("import test_holdout_tables as t\nt.main()", json.dumps(cases))
    assert done.returncode == 0, done.output
    *found, streamed, listed, tested, refused = json.loads(done.output.splitlines()[-1])
    hashed = [[(hashlib.sha256(data).hexdigest(), kind) for _, data, kind in side] for side in reference(rows)]
    by_name = dict(zip(sets, found, strict=True))
    for name in ("one", "tars", "test", "files"):
        sides = [[tuple(row) for row in side] for side in by_name[name]["sides"]]
        assert [sorted(side) for side in sides] == [sorted(side) for side in hashed]  # files lie by their classes
        assert (sides == hashed) is (name != "files") and by_name[name]["holdout"]["of"] == "train"
        assert by_name[name]["commit"] == hub.repos["dataset", f"tester/{name}"].commits[-1].oid
    counts = [len(side) for side in reference(rows, classes="012")]
    assert [len(side) for side in by_name["numbers"]["sides"]] == counts
    for answer in (by_name["three"], tested):
        assert [len(side) for side in answer["sides"]] == [48, 48] and answer["holdout"] is None
    for answer in (streamed, listed):
        assert (
            "no split 'validation', and only a copy of the data can have a part of 'train' held out; leave"
            in answer["says"]
        )
    assert "sides" not in refused and "has no split 'validation'; valid names: train" in refused["says"]


def test_the_metadata_of_an_image_folder_are_a_table_of_paths(tmp_path):
    rows = photos(24)
    for name, data, _ in rows:
        (tmp_path / name).write_bytes(data)
    lines = "".join(f"{name},{CLASSES[kind]}\n" for name, _, kind in rows)
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + lines)
    found = load_splits(recipe(tmp_path / "metadata.csv", image_column="file_name"))
    assert found.classes == list(CLASSES) and len(found.train) < 24 and found.held_out
