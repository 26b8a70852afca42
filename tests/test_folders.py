"""Promise: a folder of images or of parquet files is read by its documented rules, and what is left out is named."""

import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny import jpeg

from mixup_recipes.data import folder, opening
from mixup_recipes.data.decoding import BadImage, decode, read
from mixup_recipes.data.images import EvalTransform
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import Key
from mixup_recipes.data.origin import encoded, origin
from mixup_recipes.data.splits import load_split, load_splits
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError

JPEG = jpeg(0, np.random.default_rng(0))
NAMES, BOTH = ("ant", "bee"), ("train", "val")


def recipe(dataset, **changes):
    return Recipe(**({"dataset": str(dataset), "eval_split": "val", "num_classes": 2} | changes))


def put(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    return root


def tree(root, classes=NAMES, images=2):
    return put(root, *(f"{split}/{name}/{i}.jpg" for split in BOTH for name in classes for i in range(images)))


def paths(table, root):
    return [os.path.relpath(path, root) for path in table["image"]]


def test_classes_are_the_first_level_whatever_they_are_called_and_however_deep_their_images_lie(tmp_path):
    root = put(tmp_path, *(f"{split}/{name}/cam{i}/x.jpg" for split in BOTH for name in NAMES for i in (1, 2)))
    put(root, "train/bee/0.jpg", "train/bee-2.jpg")
    found = load_splits(recipe(root))
    assert found.classes == ["ant", "bee"]
    inside = ["ant/cam1/x.jpg", "ant/cam2/x.jpg", "bee/0.jpg", "bee/cam1/x.jpg", "bee/cam2/x.jpg"]
    assert paths(found.train, root / "train") == inside and found.train["label"] == [0, 0, 1, 1, 1]
    assert found.notes == ["train: 1 left out (beside the class folders): bee-2.jpg"]
    odd = tree(tmp_path / "odd", ("__other__", ".net", "cow"))
    put(odd, "train/.ipynb_checkpoints/a.jpg", "train/__MACOSX/a.jpg", "train/cow/._0.jpg", "train/cow/.DS_Store")
    found = load_splits(recipe(odd, num_classes=3))
    assert found.classes == [".net", "__other__", "cow"] and len(found.train) == 6 and found.notes == []
    numbers = load_splits(recipe(tree(tmp_path / "numbers", [str(i) for i in range(12)], 1), num_classes=12))
    assert numbers.classes == [str(i) for i in range(12)] and numbers.train["label"] != list(range(12))


def test_images_are_told_by_suffix_or_content_and_all_else_is_counted_by_its_reason(tmp_path):
    root = tree(tmp_path)
    put(root, "train/ant/a", "train/ant/b.JPG", "train/ant/c.jfif", "train/ant/d.heic", "train/ant/0.jpg_original")
    (root / "train/ant/notes").write_text("no image")
    (root / "train/metadata.csv").write_text("file_name,label\nant/0.jpg,3\n")
    os.mkfifo(root / "train/ant/pipe.jpg")
    (root / "train/ant/gone.jpg").symlink_to("nowhere.jpg")
    (root / "train/ant/loop").symlink_to("..")
    (root / "train/ant" / os.fsdecode(b"\xff.jpg")).write_bytes(JPEG)
    found = load_splits(recipe(root))
    assert [path for path in paths(found.train, root / "train") if "ant" in path] == [
        "ant/0.jpg", "ant/1.jpg", "ant/a", "ant/b.JPG", "ant/c.jfif"
    ]  # fmt: skip
    assert found.notes == [
        "train: 1 left out (.heic files): ant/d.heic",
        "train: 1 left out (.jpg_original files): ant/0.jpg_original",
        "train: 1 left out (a broken link): ant/gone.jpg",
        "train: 1 left out (beside the class folders): metadata.csv",
        "train: 1 left out (links to a folder that is read already): ant/loop",
        "train: 1 left out (names that are not UTF-8): 'ant/\\udcff.jpg'",
        "train: 1 left out (not a regular file): ant/pipe.jpg",
        "train: 1 left out (not images by their content): ant/notes",
    ]


def test_the_folder_of_that_very_name_is_read_and_links_are_what_they_lead_to(tmp_path):
    for name, images in (("set[12]", 1), ("set1", 3), ("v?", 1), ("v1", 3)):
        tree(tmp_path / name, images=images)
    assert [len(load_splits(recipe(tmp_path / name)).train) for name in ("set[12]", "v?")] == [2, 2]
    linked = tree(tmp_path / "linked")
    for split in ("train", "val"):
        (linked / "pool").mkdir(exist_ok=True)
        (linked / split / "bee").rename(linked / "pool" / split)
        (linked / split / "bee").symlink_to(f"../pool/{split}")
    found = load_split(recipe(linked), "train", None)
    assert found.classes == ["ant", "bee"] and found.notes == ["1 left out (folders that are not a split): pool"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["ant/0.jpg", "bee/0.jpg"], "has 2 images of 1 name, of which none is held out"),
        (["trian/a/0.jpg", "val/a/0.jpg"], "has no folder for split 'train'; did you mean 'trian'?"),
        (["train/a/no.txt", "val/a/0.jpg"], "train has no images; expected train/<class>/<image>"),
        (
            ["train/a/0.jpg", "train/b/0.jpg", "val/a/0.jpg", "val/c/0.jpg"],
            "split 'val', has classes that 'train' does not: c",
        ),
        (["train/0.jpg", "bus/0.jpg", "val/0.jpg"], "has 3 images of 1 name, of which none is held out"),
        (["train/a/0.jpg", "bus/b/0.jpg"], "has no folder for split 'train'"),  # a class that is called train
        (["train/ant/0.jpg", "train/bee/no.txt", "val/ant/0.jpg"], "class folders without an image: bee"),
    ],
)
def test_a_folder_without_splits_or_images_is_refused(tmp_path, files, says):
    with pytest.raises(UserError, match=says):
        load_splits(recipe(put(tmp_path, *files)))


def test_a_split_may_have_another_name_which_is_told_and_a_bad_file_is_named_by_its_path(tmp_path):
    for pair in ("val validation", "valid validation", "validation val", "val test", "test test", "val val"):
        name, split = pair.split()
        root = put(
            tmp_path / pair, *(f"{part}/{file}.jpg" for part in ("train", name) for file in ("a/_train_", "b/_test_"))
        )
        found = load_splits(recipe(root, eval_split=split))
        assert found.train["label"] == found.eval["label"] == [0, 1]
        assert found.notes == [f"{split}: read from {tmp_path / pair / name}"] * (name != split)
    samples, file = Samples(found.eval, recipe(""), EvalTransform(16, 16, "bilinear")), root / "val/b/_test_.jpg"
    assert samples[Key(0, 1, 0)][1:] == (1, 1, 0)
    file.write_bytes(b"no image")
    for reason in ("not an image", "No such file"):
        with pytest.raises(UserError, match=rf"^image 1 \(.*/val/b/_test_.jpg\) cannot be read: {reason}"):
            samples[Key(0, 1, 0)]
        file.unlink(missing_ok=True)


def test_processes_of_one_machine_share_one_scan(tmp_path, monkeypatch):
    root = tree(tmp_path / "set") / "train"
    put(root, "ant/a.heic")
    whole = folder.listing(root)
    monkeypatch.setenv("MIXUP_RECIPES_CACHE", str(tmp_path / "cache"))
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(key, value)
    first = folder.listing(root)
    monkeypatch.setattr(folder, "scan", lambda _: pytest.fail("a second scan"))
    monkeypatch.setenv("RANK", "1")
    second = folder.listing(root)
    for found in (first, second):
        assert found.table.to_list() == whole.table.to_list() and found.table.features == whole.table.features
        assert (found.fingerprint, found.notes) == (whole.fingerprint, whole.notes)


def shard(path, rows, names=NAMES):
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))}).arrow_schema
    images, labels = [{"bytes": JPEG, "path": None}] * rows, [i % len(names) for i in range(rows)]
    pq.write_table(pa.table({"image": images, "label": labels}, schema=schema), path)


SHARD = "-00000-of-00001.parquet"


def test_parquet_files_are_of_the_very_split_and_configuration_that_are_asked_for(tmp_path):
    for name, rows in {"small": 2, "large": 6}.items():
        for split in ("train", "val"):
            shard(tmp_path / "two" / name / f"{split}{SHARD}", rows)
    with pytest.raises(UserError, match="has 2 configurations: large, small; choose one with --dataset_config"):
        load_splits(recipe(tmp_path / "two"))
    assert len(load_splits(recipe(tmp_path / "two", dataset_config="small")).train) == 2
    with pytest.raises(UserError, match="has no configuration 'smal'; did you mean 'small'"):
        load_splits(recipe(tmp_path / "two", dataset_config="smal"))
    head = "---\nconfigs:\n- config_name: s\n  data_files: {train: small/train-*, val: small/v*}\n"
    (tmp_path / "two/README.md").write_text(head + "---\n")
    assert len(load_splits(recipe(tmp_path / "two")).train) == 2
    extra = tmp_path / "extra[1]"
    for name, rows in {"data/train": 2, "data/train-extra": 4, "data/val": 2, "backup/train": 8}.items():
        shard(extra / f"{name}{SHARD}", rows)
    found = load_splits(recipe(extra))
    assert len(found.train) == 2
    assert found.notes[0] == f"train: 1 left out (parquet files of other places): backup/train{SHARD}"
    shard(tmp_path / "short/train-00001-of-00002.parquet", 2)
    with pytest.raises(UserError, match="shards 0 of 2 are missing"):
        load_split(recipe(tmp_path / "short"), "train", None)
    for number, names in enumerate((NAMES, NAMES[::-1])):
        shard(tmp_path / f"mixed/train-{number:05}-of-00002.parquet", 2, names)
    with pytest.raises(
        UserError, match=r"does not have the same columns and class names as train-00000-of-00002.parquet"
    ):
        load_split(recipe(tmp_path / "mixed"), "train", None)
    for given, says in ({"dataset_revision": "v1"}, "a commit of the Hub"), ({"dataset_config": "x"}, "no config"):
        with pytest.raises(UserError, match=says):
            load_splits(recipe(tree(tmp_path / "images"), **given))


def test_a_large_folder_of_parquet_files_is_the_one_of_that_very_name(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "SMALL", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, rows in {"set[12]": 2, "set1": 6}.items():
        shard(tmp_path / name / f"train{SHARD}", rows)
    assert len(load_split(recipe(tmp_path / "set[12]"), "train", None).table) == 2


def test_classes_of_another_split_or_model_go_by_their_names(tmp_path):
    for split, names in {"train": ("ant", "bee", "cow"), "val": ("cow", "ant", "bee")}.items():
        shard(tmp_path / "order" / f"{split}.parquet", 3, names)
    found = load_splits(recipe(tmp_path / "order", num_classes=3))
    assert found.classes == ["ant", "bee", "cow"] and found.eval["label"] == [2, 0, 1]
    assert found.identity["splits"]["val"]["per_class"] == [1, 1, 1]
    like = load_splits(recipe(tmp_path / "order", num_classes=3), ["bee", "ant", "cow"])  # of a run that goes on
    assert like.classes == ["bee", "ant", "cow"] and like.train["label"] == [1, 0, 2]
    few = put(tree(tmp_path / "few"), "train/cow/0.jpg")
    found = load_splits(recipe(few, num_classes=3))
    assert found.eval["label"] == [0, 0, 1, 1]
    assert found.notes == ["val: split 'val' has 2 of the 3 classes of the model"]


def saved(array, kind="TIFF", mode=None):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, kind)
    return buffer.getvalue()


def test_pictures_of_more_than_8_bits_are_scaled_from_their_own_range_or_refused():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    wanted = decode(saved(grey.astype(np.uint8), "PNG"))
    for data in (saved(grey * 257, "PNG"), saved(grey * 257), saved(grey.astype(np.float32) / 255)):
        assert (decode(data) == wanted).all()
    for array, says in (
        (grey.astype(np.int32) * 257, "do not say how bright white is"),
        (grey.astype(np.float32), "0 to 255"),
    ):
        with pytest.raises(BadImage, match=says):
            decode(saved(array))


def test_no_row_and_no_picture_opens_other_files_starts_a_program_or_fills_the_memory(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    for row, says in (
        ({"bytes": None, "path": str(tmp_path / "secret.jpg")}, "names a file"), (None, "no image"),
        ({"bytes": None, "path": "/dev/zero"}, "names a file"), ({"bytes": None, "path": None}, "no image"),
    ):  # fmt: skip
        with pytest.raises(BadImage, match=says):
            encoded(row)
    paths = pa.table({"image": pa.array([str(tmp_path / "secret.jpg")], pa.large_string()), "label": [0]})
    pq.write_table(paths, tmp_path / "train.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs: [{data_files: {train: ../../**/*.parquet}}, {config_name: [x]}]\n---\n"
    )
    with pytest.raises(UserError, match="names no file that is there"):
        load_split(recipe(tmp_path), "train", None)
    (tmp_path / "README.md").unlink()
    with pytest.raises(BadImage, match="names a file"):
        encoded(load_split(recipe(tmp_path), "train", None).table[0]["image"])
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path, "directory|regular"),
    ):
        with pytest.raises(BadImage, match=says):
            read(path)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(BadImage, match="more than"):
        read(tmp_path / "large")
    huge = bytearray(JPEG)
    at = huge.index(b"\xff\xc0") + 5
    huge[at : at + 4] = b"\xfd\xe8\xfd\xe8"  # 65,000 x 65,000 pixels in a kilobyte
    for data in (bytes(huge), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", b"%PDF-1.4\n", b""):
        with pytest.raises(BadImage):
            decode(data)
    with pytest.raises(BadImage, match="48 x 40 pixels, more than the 1,000 of --max_image_pixels"):
        decode(JPEG, limit=1000)
    thin = decode(saved(np.zeros((1, 30000, 3), np.uint8), "PNG"))
    with pytest.raises(BadImage, match="too thin"):
        EvalTransform(256, 224, "bicubic")(thin)
    assert EvalTransform((40, 80), (32, 64), "bilinear")(decode(JPEG)).shape == (3, 32, 64)  # a model that is no square


def test_links_lead_to_configurations_and_a_net_of_links_comes_to_an_end(tmp_path):
    for name, rows in {"small": 2, "large": 6}.items():
        shard(tmp_path / "pool" / name / f"train{SHARD}", rows)
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).symlink_to(f"../pool/{name}")
    (tmp_path / "set/default").symlink_to("small")
    nets = [tmp_path / "pool/small/net", tmp_path / "set/net"]
    for net in nets:
        for i in range(12):  # each leads to all, its own folder and those above
            (net / str(i)).mkdir(parents=True)
            for j in range(12):
                (net / str(i) / f"to-{j}").symlink_to(f"../{j}")
            (net / str(i) / "up").symlink_to("../../..")
    for head in ("", "---\nconfigs: [{config_name: large, data_files: {train: large/**/*.parquet}}]\n---\n"):
        (tmp_path / "set/README.md").write_text(head)
        for config, rows in (("large", 6),) if head else (("small", 2), ("large", 6), ("default", 2)):
            found = load_split(recipe(tmp_path / "set", dataset_config=config), "train", None)
            assert len(found.table) == rows, (head, config)


NAMED = {  # and what is wrong with it
    "images/a.jpg": None, "beside.jpg": None, "images/./a.jpg": None, "images/inside.jpg": None,
    "images/outside.jpg": "by a link", "away/secret.jpg": "by a link", "pipe": "not a regular file",
    "images": "not a regular file",
    "../../secret.jpg": "outside", "images/../images/a.jpg": "outside", "{set}/images/a.jpg": "outside",
    "file://{set}/images/a.jpg": "outside", "hf://datasets/a/b@main/c.jpg": "outside", "/dev/zero": "outside",
    "gone.jpg": "not there", "": "no image", "a\0": "outside", ".": "outside", "a/" * 3000: "outside",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["struct", "text", "large"])
def test_a_row_names_files_of_its_own_data_set_only(tmp_path, monkeypatch, kind):
    if kind == "large":
        monkeypatch.setattr(opening, "SMALL", 0)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = put(tmp_path / "set[1]", "images/a.jpg", "data/beside.jpg", "../secret.jpg")
    (root / "images/inside.jpg").symlink_to("a.jpg")
    (root / "images/outside.jpg").symlink_to("../../secret.jpg")
    (root / "away").symlink_to("..")
    os.mkfifo(root / "pipe")
    names = [name.format(set=root) for name in NAMED]
    images = names if kind == "text" else [{"bytes": None, "path": name} for name in names]
    pq.write_table(pa.table({"image": images, "label": [0] * len(names)}), root / f"data/train{SHARD}")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    found = load_split(recipe("../set[1]", holdout=0), "train", None)
    for name, row, wrong in zip(NAMED, found.table["image"], NAMED.values(), strict=True):
        if wrong is None:
            assert encoded(row, origin(found.table)) == JPEG, name
        else:
            with pytest.raises(BadImage, match=wrong):
                encoded(row, origin(found.table))
    samples = Samples(found.table, recipe(""), EvalTransform(16, 16, "bilinear"), "skip")
    assert [samples[Key(0, i, 0)][3] for i in range(4)] == [0] * 4 and samples[Key(0, 4, 0)][3] > 0
    (root / "images/a.jpg").write_bytes(JPEG * 2)
    again = load_split(recipe(root, holdout=0), "train", None)
    assert again.identity["fingerprint"] != found.identity["fingerprint"]


def test_the_layouts_of_the_hub_are_read_a_split_there_twice_is_refused_and_images_win_over_tables(tmp_path):
    for name in (f"a/train/train{SHARD}", "b/train/0000.parquet", "c/default/train/0000.parquet", f"d/train{SHARD}"):
        shard(tmp_path / name, 2)
    shard(tmp_path / f"d/backup/train{SHARD}", 6)
    assert [len(load_split(recipe(tmp_path / name), "train", None).table) for name in "abcd"] == [2] * 4
    shard(tmp_path / "d/val.parquet", 2)
    assert load_split(recipe(tmp_path / "d"), "validation", None).notes[0] == "read from the files of val"
    shard(tmp_path / "d/train.parquet", 2)
    with pytest.raises(UserError, match="split 'train' is there twice"):
        load_split(recipe(tmp_path / "d"), "train", None)
    shard(tree(tmp_path / "images") / "train/metadata.parquet", 6)
    found = load_split(recipe(tmp_path / "images"), "train", None)
    assert len(found.table) == 4 and found.notes == ["1 left out (beside the class folders): metadata.parquet"]
    (tmp_path / "d/README.md").write_text(
        "---\nconfigs:\n- data_files: {train: [3, gone-*]}\n- data_files: [{split: [x]}]\n---\n"
    )
    with pytest.raises(UserError, match=r"has no split .train.|names no file that is there"):
        load_split(recipe(tmp_path / "d"), "train", None)
