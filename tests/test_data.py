"""Data: which image goes where, draws that depend on the key alone, and datasets that are refused in one line."""

import contextlib
import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from tiny import CLASSES, jpeg, make_photos

from mixup_recipes.data import keys, loading
from mixup_recipes.data.images import EvalTransform, TrainTransform
from mixup_recipes.data.loading import Samples, on_device
from mixup_recipes.data.order import Key, TrainOrder, cut
from mixup_recipes.data.picture import Picture
from mixup_recipes.data.prepare import PREPARED
from mixup_recipes.data.splits import load_splits
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import RankError, UserError

CPU = torch.device("cpu")
JPEG = jpeg(0, np.random.default_rng(0))
NAMES = ClassLabel(names=CLASSES)
GOOD = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """72 training and 30 test images of four classes, in parquet files."""
    return make_photos(tmp_path_factory.mktemp("photos") / "set")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """datasets and the Hub write into a folder of this module, quietly, and reach no network."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        datasets.disable_progress_bars()
        yield folder
        datasets.enable_progress_bars()


def recipe(photos: Path | str = "", **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "dataset": str(photos),
        "eval_split": "test",
        "num_classes": 4,
        "image_size": 16,
        "epochs": 3,
    }
    values |= {"batch_size": 16, "per_device_train_batch_size": 4, "aa": "rand-m9-mstd0.5-inc1"}
    return Recipe(**(values | changes))


def complaint(r: Recipe) -> str:
    """What load_splits says about a dataset; always one line."""
    with pytest.raises(UserError) as caught:
        load_splits(r)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_epoch_takes_each_image_once_and_leaves_out_the_rest_or_is_completed():
    for size, drop_last in [(s, True) for s in (16, 17, 64, 70)] + [(s, False) for s in (5, 17, 64, 70)]:
        length = 16 * (size // 16 if drop_last else -(-size // 16))
        order = TrainOrder(size, recipe(drop_last=drop_last), 0, 1)
        run = [key for micro in order for key in micro]
        assert len(run) == 3 * length
        for epoch in range(3):
            seen = run[epoch * length : (epoch + 1) * length]
            assert len(set(seen)) == length  # a second visit is another draw
            counts = Counter(key.index for key in seen)
            assert {key.epoch for key in seen} == {epoch} and set(counts) <= set(range(size))
            if drop_last:
                assert {key.copy for key in seen} == {0} and max(counts.values()) == 1
            else:  # with the first ones again
                assert len(counts) == size and max(counts.values()) == -(-length // size)
                index, _ = order.epoch(epoch)
                assert index[size:].tolist() == index[: len(index) - size].tolist()


def test_what_an_update_holds_depends_neither_on_the_processes_nor_on_where_a_run_starts():
    cases = ({}, {"drop_last": False}, {"aug_repeats": 3}, {"drop_last": False, "aug_repeats": 2})
    for changes, size in itertools.product(cases, (16, 17, 64, 70)):
        whole = list(TrainOrder(size, recipe(**changes), 0, 1))  # four micro-batches an update
        for world, start in itertools.product((1, 2, 4), range(len(whole) // 4 + 1)):
            ranks = [list(TrainOrder(size, recipe(**changes), rank, world, start)) for rank in range(world)]
            dealt = [micro for turn in zip(*ranks, strict=True) for micro in turn]  # no process waits for another
            assert dealt == whole[4 * start :], (changes, size, world, start)


def test_the_order_is_a_function_of_seed_and_epoch():
    keys_of = [(seed, epoch) for seed in range(3) for epoch in range(3)]
    orders = [TrainOrder(64, recipe(seed=s), 0, 1).epoch(e)[0].tolist() for s, e in keys_of * 2]
    assert orders[:9] == orders[9:] and len({tuple(order) for order in [*orders, range(64)]}) == 10


def test_repeated_images_differ_in_their_draw_and_meet_in_no_micro_batch():
    for repeats in (2, 3, 4):
        micros = list(TrainOrder(64, recipe(aug_repeats=repeats), 0, 1))
        assert len(micros) == 3 * 4 * 4  # the epoch is as long as without
        assert all(len({key.index for key in micro}) == len(micro) == 4 for micro in micros)
        for epoch in range(3):
            seen = [key for micro in micros[16 * epoch : 16 * epoch + 16] for key in micro]
            counts = Counter(key.index for key in seen)
            assert len(set(seen)) == 64 and len(counts) == -(-64 // repeats)
            assert sorted(counts.values())[1:] == [repeats] * (len(counts) - 1)
            assert all({key.copy for key in seen if key.index == i} == set(range(n)) for i, n in counts.items())


def test_the_global_batch_is_shared_out_or_what_would_do_is_said():
    cases = ((256, 64, 1, 4, 4), (256, 64, 4, 4, 1), (256, 64, 2, 4, 2), (100, 100, 1, 1, 1), (96, 32, 3, 3, 1))
    for size, device_size, world, *expected in cases:
        assert list(cut(recipe(batch_size=size, per_device_train_batch_size=device_size), world)) == expected
    for world, advice in (
        (8, "pass --per_device_train_batch_size 32 or another number of processes"),
        (3, "use a number of processes that divides batch_size 256"),
    ):
        says = f"^batch_size 256 in micro-batches of 64 does not divide over {world} processes; {advice}$"
        with pytest.raises(UserError, match=says):
            cut(recipe(batch_size=256, per_device_train_batch_size=64), world)
    with pytest.raises(UserError, match="the training split has 15 images, fewer than batch_size 16"):
        TrainOrder(15, recipe(), 0, 1)
    assert TrainOrder(15, recipe(drop_last=False), 0, 1).updates == 3


def test_every_purpose_and_key_has_a_stream_of_its_own_and_seeding_fixes_every_global_generator():
    purposes = (keys.ORDER, keys.SAMPLE, keys.STEP, keys.ERASE, keys.SUBSET)
    assert len(set(purposes)) == len(purposes) and 0 not in purposes
    small, few = range(7), range(3)
    wanted = [
        key for axes in ((small,) * 2, (small,) * 3, (few, small, small, few)) for key in itertools.product(*axes)
    ]
    first = {keys.rng(purpose, *key).bytes(8) for purpose in purposes for key in wanted}
    mixing = {np.random.default_rng((seed, update)).bytes(8) for seed in range(20) for update in range(200)}
    assert len(first) == 5 * len(wanted) and len(mixing) == 4000 and not first & mixing

    def draws(*key):
        keys.seed_everything(keys.STEP, *key)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draws(0, 1) == draws(0, 1)
    assert all(a != b for a, b in zip(draws(0, 1), draws(0, 2), strict=True))


def write_table(folder: Path, kind: Any, train: list, test: list, **bad: Any) -> Path:
    """Parquet files with labels of a feature and one image for all; ``bad_train``: other bytes of some, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), "label": kind})
    for split, labels in (("train", train), ("test", test)):
        data = dict.fromkeys(range(len(labels)), JPEG) | bad.get(f"bad_{split}", {})
        images = [None if d is None else {"bytes": d, "path": f"{split}-{i}.jpg"} for i, d in data.items()]
        columns = {"image": images, "label": labels}
        pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / f"{split}.parquet")
    return folder


def make_samples(photos: Path, on_bad_image: str = "stop", train: bool = True, **changes: Any) -> Samples:
    r = recipe(photos, **changes)
    splits, evaluating = load_splits(r), EvalTransform(16, 16, "bilinear")
    return Samples(splits.train if train else splits.eval, r, TrainTransform(r) if train else evaluating, on_bad_image)


def test_augmentation_depends_on_the_key_alone(photos):
    samples, wanted = make_samples(photos), [Key(e, i, c) for e in range(2) for i in range(5) for c in range(2)]
    forward = {key: samples[key][0] for key in wanted}
    torch.manual_seed(99)
    assert all(torch.equal(samples[key][0], forward[key]) for key in reversed(wanted))
    assert len({image.numpy().tobytes() for image in forward.values()}) == len(wanted)
    other_seed = make_samples(photos, seed=1)
    assert not all(torch.equal(other_seed[key][0], forward[key]) for key in wanted)
    image, *rest = samples[Key(0, 6, 0)]
    assert (image.dtype, image.shape, rest) == (torch.uint8, (3, 16, 16), [6 % 4, 6, 0])


def test_batches_that_loader_processes_hand_out_stay_as_they_were(photos):
    samples, order = make_samples(photos), [[Key(e, i, 0) for i in range(e, 70, 7)][: 9 - e % 3] for e in range(24)]
    alone, shared = (list(samples.batches(order, 9, workers, CPU)) for workers in (0, 2))
    for batch, expected in zip(shared, alone, strict=True):
        assert all(torch.equal(*parts) for parts in zip(batch, expected, strict=True))


def test_a_gpu_gets_the_next_batch_by_a_side_stream_while_the_step_of_this_one_runs(monkeypatch):
    """With stand-ins for streams, events and tensors, which write down who does what in which order."""
    said, now = [], ["main"]

    class Name(str):
        def record_event(self):
            return said[-1]

        def wait_event(self, event):
            said.append(f"{self} waits until {event}")

        def to(self, device, non_blocking):
            said.append(f"{now[-1]} copies {self}")
            return self if non_blocking else None

        def record_stream(self, stream):
            said.append(f"{stream} keeps {self}")

    @contextlib.contextmanager
    def entered(stream):
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Name("side"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Name(now[-1]))
    for *_, index, bad in on_device(((Name(f"x{n}"), Name(f"y{n}"), n, -n) for n in range(2)), torch.device("cuda")):
        said.append(f"step {index} {bad} on {now}")
    assert said == [
        *("side copies x0", "side copies y0", "side copies x1", "side copies y1"),
        *("main waits until side copies y0", "main keeps x0", "main keeps y0", "step 0 0 on ['main']"),
        *("main waits until side copies y1", "main keeps x1", "main keeps y1", "step 1 -1 on ['main']"),
    ]


def test_evaluation_sees_each_image_once_and_knows_which_to_leave_out(tmp_path):
    folder = write_table(tmp_path, NAMES, GOOD, GOOD * 7 + [0, 1], bad_test={0: b"", 7: b"no image"})
    samples = make_samples(folder, "skip", train=False)
    for world, workers in ((1, 0), (1, 2), (2, 0), (4, 0)):
        batches = [b for rank in range(world) for b in samples.eval_batches(rank, world, 4, workers, CPU)]
        assert all(len({len(part) for part in b}) == 1 and len(b[0]) <= 4 for b in batches)
        labels, indices, bad = (torch.cat([b[i] for b in batches]) for i in (1, 2, 3))
        assert indices.tolist() == [i for rank in range(world) for i in range(rank, 30, world)]
        assert sorted(indices[bad > 0].tolist()) == [0, 7] and torch.equal(labels[bad == 0], indices[bad == 0] % 4)


def test_a_bad_image_stops_with_its_index_and_path_in_one_line(tmp_path):
    samples = make_samples(write_table(tmp_path, NAMES, GOOD, GOOD, bad_train={3: JPEG[:200]}))
    says = r"^image 3 \(train-3.jpg\) cannot be read: [^\n]*; fix it, or pass --on_bad_image skip\Z"
    for workers in (0, 1):
        with pytest.raises(RankError, match=says):  # printed by whichever process meets it
            list(samples.batches([[Key(0, 2, 0)], [Key(0, 3, 0)]], 1, workers, CPU))


def test_a_small_picture_of_a_table_is_decoded_once_and_as_before_while_there_is_room(tmp_path, monkeypatch):
    folder = write_table(tmp_path, NAMES, GOOD * 2, GOOD)
    order = [Key(epoch, index, 0) for epoch in range(3) for index in range(8)]
    kept = []
    for room, decoded in ((loading.KEPT, 8), (3 * loading.SMALL, 3 + 5 * 3), (0, 24)):
        monkeypatch.setattr(loading, "KEPT", room)
        samples = make_samples(folder)
        pictures = Mock(wraps=Picture)
        monkeypatch.setattr(loading, "Picture", pictures)
        kept.append([(image.tolist(), *rest) for image, *rest in map(samples.__getitem__, order)])
        assert pictures.call_count == decoded
        monkeypatch.setattr(loading, "Picture", Picture)
    assert kept[0] == kept[1] == kept[2] and len({str(image) for image, *_ in kept[0]}) > 8  # each epoch's crop anew
    monkeypatch.setattr(loading, "SMALL", 10)
    large = make_samples(folder)
    assert large[order[0]] and not large.kept


def test_a_skipped_image_is_replaced_by_the_next_good_one_and_counted(tmp_path):
    folder = write_table(tmp_path, NAMES, GOOD * 18, GOOD, bad_train={3: b"", 4: None, 71: b"no image"})
    for index in (3, 4, 71):  # no data and no image are bad images too
        with pytest.raises(UserError, match=rf"^image {index} \((train-{index}.jpg|no path)\) cannot be read: "):
            make_samples(folder)[Key(0, index, 0)]
    samples = make_samples(folder, "skip")
    (image, *rest), (again, *_) = samples[Key(0, 3, 0)], samples[Key(0, 3, 0)]
    assert rest == [5 % 4, 3, 2] and torch.equal(image, again)
    assert samples[Key(0, 71, 0)][1:] == (0, 71, 1)  # goes on at the start
    assert samples[Key(0, 5, 0)][1:] == (1, 5, 0)
    nothing = make_samples(write_table(tmp_path, NAMES, GOOD, GOOD, bad_train=dict.fromkeys(range(4), b"")), "skip")
    with pytest.raises(UserError, match="no image of the dataset can be read"):
        nothing[Key(0, 0, 0)]


def test_a_folder_of_parquet_files_is_a_dataset_and_its_shards_are_read_in_order(photos, own_cache, tmp_path):
    splits = load_splits(recipe(photos))
    assert (len(splits.train), len(splits.eval), splits.classes) == (72, 30, CLASSES)
    assert splits.train.column_names == ["image", "label"]
    assert splits.train[0]["image"]["bytes"][:2] == b"\xff\xd8"  # still encoded
    assert json.loads(json.dumps(splits.identity)) == splits.identity
    assert splits.identity["splits"]["train"]["images"] == 72
    shutil.copytree(photos, tmp_path / "set")
    whole = tmp_path / "set/data/train-00000-of-00001.parquet"
    table = pq.read_table(whole)
    whole.unlink()
    for i, part in enumerate((table.slice(0, 40), table.slice(40))):
        pq.write_table(part, tmp_path / f"set/data/train-0000{i}-of-00002.parquet")
    sharded = load_splits(recipe(tmp_path / "set"))
    assert [r["image"]["bytes"] for r in splits.train] == [r["image"]["bytes"] for r in sharded.train]
    for split, found in splits.identity["splits"].items():
        again = sharded.identity["splits"][split]
        assert {**found, "fingerprint": ""} == {**again, "fingerprint": ""} != found
        assert (found == again) == (split == "test")
    assert not (own_cache / "datasets").exists()  # read in place


@pytest.mark.parametrize(
    ("kind", "train", "test", "changes", "says"),
    [
        (NAMES, GOOD, GOOD, {"eval_split": "tset"}, "has no split 'tset'; did you mean 'test'?"),
        (NAMES, GOOD, GOOD, {"train_split": "zzz"}, "has no split 'zzz'; valid names: test, train"),
        (NAMES, GOOD, [], {}, "split 'test' is empty"),
        (NAMES, [], GOOD, {}, "split 'train' is empty"),
        (NAMES, GOOD, GOOD, {"label_column": "lable"}, "split 'train': no column 'lable'; did you mean 'label'?"),
        (NAMES, GOOD, GOOD, {"image_column": "img"}, "no column 'img'; did you mean 'image'? (set image_column or"),
        (NAMES, GOOD, GOOD, {"image_column": "label"}, "column 'label' does not hold images (set image_column)"),
        (NAMES, GOOD, GOOD, {"label_column": "image"}, "column 'image', row 1: expected a word or a whole number, "),
        (NAMES, GOOD, GOOD, {"num_classes": 5}, "has 4 classes, but the recipe has num_classes 5; pass --"),
        (NAMES, GOOD, GOOD, {"num_classes": 3}, "3; pass --num_classes 4 if that is meant"),
        (Value("int64"), GOOD, [0, 1, 2, 7], {}, "'test', has classes that 'train' does not: 4, 5, 6, 7"),
        (NAMES, [0, 1, 2, 7], GOOD, {}, "split 'train' has label 7, but only 4 class names"),
        (NAMES, GOOD, [-1, -1], {}, "split 'test' has unlabelled images (label -1)"),
        (NAMES, GOOD, [0, None], {}, "1 row has no label in column 'label', the first is row 2"),
        (Value("string"), list("abcd"), list("abce"), {}, "'test', has classes that 'train' does not: e"),
        (Value("string"), ["a", None], list("ab"), {}, "1 row has no label in column 'label', the first is row 2"),
        (Value("float32"), [0.0, 0.5], [0.0, 1.0], {}, "row 2: expected a word or a whole number, got 0.5"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(tmp_path, own_cache, kind, train, test, changes, says):
    folder = write_table(tmp_path / "set", kind, train, test)
    before = sorted(tmp_path.rglob("*")), sorted(own_cache.rglob("*"))
    message = complaint(recipe(folder, **changes))
    assert says in message and str(folder) in message
    assert (sorted(tmp_path.rglob("*")), sorted(own_cache.rglob("*"))) == before  # nothing written


def test_what_is_no_dataset_out_of_reach_or_gated_is_refused_and_nothing_written(tmp_path, monkeypatch, own_cache):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("grocries", "photoz/", "no/such/folder", "./nothing", "~/nothing-of-this-name"):
        says = f"dataset {name!r} is neither a folder, a Hub id (owner/name), nor one of {sorted(PREPARED)}"
        meant = {"grocries": "; did you mean 'groceries'?", "photoz/": "; did you mean 'photos'?"}.get(name, "")
        assert complaint(recipe(name)) == says + meant
    (tmp_path / "photos").rmdir()
    monkeypatch.setenv("MIXUP_RECIPES_CACHE", str(tmp_path))
    says = "dataset 'groceries' is not prepared on this machine; run: mixup-recipes prepare groceries"
    assert complaint(recipe("groceries")) == says
    assert not list(tmp_path.iterdir())
    (tmp_path / "set/train").mkdir(parents=True)
    (tmp_path / "set/train/1.jpg").write_bytes(JPEG)
    assert "has one class, 'train'; expected <class>/<image>" in complaint(recipe(tmp_path / "set"))
    (tmp_path / "set/train.parquet").write_bytes(b"no parquet")
    assert complaint(recipe(tmp_path / "set")).startswith(f"cannot open dataset '{tmp_path / 'set'}', split 'train': ")

    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("'a/b' is a gated dataset on the Hub.\nYou must log in.")

    slow = type("TransportError", (Exception,), {})("timed out")  # as the HTTP library calls it
    before = sorted(own_cache.rglob("*"))
    says = "cannot open dataset 'owner/set', split 'train': there is no folder owner/set here; Couldn't reach"
    assert complaint(recipe("owner/set")).startswith(says)
    monkeypatch.setattr(datasets, "load_dataset_builder", Mock(side_effect=slow))
    assert "split 'train': cannot reach the Hub: timed out; check the network" in complaint(recipe("a/b"))
    monkeypatch.setattr(datasets, "load_dataset_builder", gated)
    says = "access is gated: accept the terms on its page on the Hub, then `hf auth login` or set HF_TOKEN"
    assert says in complaint(recipe("a/b")) and sorted(own_cache.rglob("*")) == before


def test_a_subset_never_changes_and_holds_all_classes(photos):
    def taken(**changes):
        return [row["image"]["bytes"] for row in load_splits(recipe(photos, **changes)).train]

    whole, part = taken(), taken(max_train_samples=24)
    assert len(part) == 24 and part == taken(max_train_samples=24, seed=5)
    places = [whole.index(data) for data in part]
    assert places == sorted(places) != list(range(24))
    assert set(taken(max_train_samples=10)) < set(part)
    assert taken(max_train_samples=1000) == whole
    splits = load_splits(recipe(photos, max_train_samples=24, max_eval_samples=8))
    assert {row["label"] for row in splits.train} == {0, 1, 2, 3}
    assert [splits.identity["splits"][split]["images"] for split in ("train", "test")] == [24, 8]


def test_the_record_changes_with_the_labels_and_with_nothing_else(tmp_path):
    def hashes(name, train, kind=NAMES):
        splits = load_splits(recipe(write_table(tmp_path / name, kind, train, GOOD)))
        return [split["labels_sha256"] for split in splits.identity["splits"].values()], splits.classes

    first, classes = hashes("a", GOOD)
    assert hashes("b", GOOD) == (first, classes)
    assert hashes("b", GOOD, Value("uint8")) == (first, ["0", "1", "2", "3"])  # labels may be plain whole numbers
    for changed in ([0, 1, 3, 2], [0, 1, 2], [0, 1, 2, 3, 0]):
        other, _ = hashes("c", changed)
        assert other[0] != first[0] and other[1] == first[1]
