"""Streams: which images an epoch reads, how they are dealt, and what a resumed run reads."""

import io
import itertools
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import tiny
import torch
from accelerate import Accelerator
from PIL import Image

from mixup_recipes.data import images, streaming
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.splits import load_splits
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import evaluation
from mixup_recipes.typed import RankError, UserError

CPU = torch.device("cpu")
LENGTHS = (9, 3, 12, 6, 10)  # images of each file: 40

pytestmark = pytest.mark.slow  # whole clients and runs against a server: minutes


def png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 pixels (H, W) or (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def grey(level: int) -> bytes:
    """One grey, which says which image it is."""
    return png(np.full((4, 4), level, dtype=np.uint8))


def open_stream(folder: Path, **changed: bytes) -> tuple[datasets.IterableDataset, datasets.Dataset]:
    """Images 0 to 39 in five files, with labels n % 4, as a stream and as a table; ``changed``: bytes of some."""
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    first, files = 0, []
    for i, length in enumerate(LENGTHS):
        numbers = range(first, first + length)
        column = [{"bytes": changed.get(f"i{n}", grey(6 * n)), "path": f"{n}.png"} for n in numbers]
        table = pa.table({"image": column, "label": [n % 4 for n in numbers]}, schema=features.arrow_schema)
        files.append(str(folder / f"train-{i}.parquet"))
        pq.write_table(table, files[-1])
        first += length
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, features=features)
    stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=40)})
    table = datasets.concatenate_datasets([datasets.Dataset(pq.read_table(f)) for f in files])
    return stream, table.cast_column("image", datasets.Image(decode=False))


def recipe(**changes: Any) -> Recipe:
    values = {"num_classes": 4, "image_size": 4, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "epochs": 3}
    values |= {"batch_size": 8, "per_device_train_batch_size": 4, "eval_size": 4, "eval_resize": 4, "streaming": True}
    return Recipe(**(values | changes))


def batches(table: Any, r: Recipe, rank: int = 0, world: int = 1, start: int = 0, workers: int = 0) -> list[list[int]]:
    """The images, by number, of every micro-batch of a process from an update on."""
    stream = streaming.Stream(table, r, images.TrainTransform(r))
    order = TrainOrder(len(stream), r, rank, world, start)
    found = stream.train_batches(order, workers, CPU)
    return [(pixels[:, 0, 0, 0] // 6).tolist() for pixels, *_ in found]


def flat(found: list[list[int]]) -> list[int]:
    return [n for batch in found for n in batch]


def whole_files(numbers: list[int]) -> bool:
    """Whether these are all images of some files, each once."""
    files = np.split(np.arange(40), np.cumsum(LENGTHS)[:-1])
    return sorted(numbers) == sorted(n for f in files if set(f.tolist()) & set(numbers) for n in f.tolist())


def test_an_epoch_of_one_reader_is_every_image_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    stream, _ = open_stream(tmp_path)
    found = batches(stream, recipe())
    assert [len(b) for b in found] == [4] * (3 * 40 // 4)
    epochs = [flat(found[i : i + 10]) for i in (0, 10, 20)]
    assert all(sorted(e) == list(range(40)) for e in epochs)
    assert len({tuple(e) for e in [*epochs, range(40)]}) == 4
    assert found == batches(stream, recipe()) != batches(stream, recipe(seed=1))


def test_processes_read_different_files_and_begin_again_where_theirs_end(tmp_path: Path) -> None:
    stream, _ = open_stream(tmp_path)
    for world in (2, 4):
        parts = [batches(stream, recipe(per_device_train_batch_size=2), rank, world) for rank in range(world)]
        each = 40 // 2 // world
        assert [len(p) for p in parts] == [3 * each] * world  # nobody waits for another
        dealt = set()
        for epoch in range(3):
            reads = [flat(p[epoch * each : (epoch + 1) * each]) for p in parts]
            r = recipe(per_device_train_batch_size=2)
            reader = streaming.Stream(stream, r, images.TrainTransform(r))
            rows = [reader.train_rows(rank, world, epoch, 0) for rank in range(world)]
            longer = [[int(next(row)[0][0, 0, 0]) // 6 for _ in range(40)] for row in rows]
            assert [found[: len(read)] for found, read in zip(longer, reads, strict=True)] == reads
            ends = [[n for n in range(1, 41) if whole_files(found[:n])] for found in longer]
            turns = [t for t in itertools.product(*ends) if sum(t) == 40]  # where the first turn of each may end
            firsts = [[set(found[:n]) for found, n in zip(longer, t, strict=True)] for t in turns]
            (first,) = [f for f in firsts if len(set().union(*f)) == 40]
            dealt.add(tuple(map(frozenset, first)))
        assert len(dealt) > 1  # the deal is drawn anew for each epoch


def test_loaders_of_one_process_read_what_as_many_processes_would(tmp_path: Path) -> None:
    stream, _ = open_stream(tmp_path)
    r = recipe(epochs=2)
    one, other = (batches(stream, r, rank, world=2) for rank in range(2))
    turn = [b for pair in zip(one, other, strict=True) for b in pair]
    assert batches(stream, r, workers=2) == turn


def test_a_run_resumed_between_epochs_reads_the_same_and_within_one_as_much(tmp_path: Path) -> None:
    stream, _ = open_stream(tmp_path)
    whole = batches(stream, recipe())
    assert batches(stream, recipe(), start=5) == whole[10:]
    within = batches(stream, recipe(), start=7)
    assert len(within) == 30 - 14 and within[:6] != whole[14:20] and within[6:] == whole[20:]


def test_augmentation_depends_on_image_and_epoch_alone(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), dtype=np.uint8)
    stream, _ = open_stream(tmp_path, **{f"i{n}": png(pixels) for n, pixels in enumerate(noise)})
    r = recipe(scale=(0.2, 1.0), hflip=0.5, aa="rand-m9-mstd0.5-inc1")

    def seen(world: int, epoch: int) -> set[bytes]:
        reader = streaming.Stream(stream, r, images.TrainTransform(r))
        parts = []
        for part in range(world):
            rows = reader.train_rows(part, world, epoch, 0)
            parts += [next(rows)[0].numpy().tobytes() for _ in range(12)]
        return set(parts)

    alone, shared, later = seen(1, 0), seen(2, 0), seen(1, 1)
    assert len(alone) == 12 and len(shared) == 24 and not alone & later
    everything = {
        image.numpy().tobytes() for image, *_ in take(streaming.Stream(stream, r, images.TrainTransform(r)), 40)
    }
    assert len(everything) == 40 and alone <= everything and shared <= everything


def take(stream: streaming.Stream, count: int) -> list[Any]:
    rows = stream.train_rows(0, 1, 0, 0)
    return [next(rows) for _ in range(count)]


def test_the_buffer_draws_every_row_once_and_none_before_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 5)
    places = np.array([list(streaming.shuffled(iter(range(50)), np.random.default_rng(s))) for s in range(200)])
    assert all(sorted(p) == list(range(50)) for p in places.tolist())
    assert (places <= np.arange(50) + 5).all()  # the buffer, and the row that takes the place
    assert list(streaming.shuffled(iter(()), np.random.default_rng(0))) == []
    monkeypatch.setattr(streaming, "BUFFER", 60)  # a shuffle of the whole: each row is as often at each place
    places = np.array([list(streaming.shuffled(iter(range(4)), np.random.default_rng(s))) for s in range(2000)])
    for row in range(4):
        assert abs((places == row).mean(0) - 0.25).max() < 0.05  # 5 standard deviations of 2000 draws


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_says_of_each_image_what_the_table_says(tmp_path: Path, workers: int) -> None:
    stream, table = open_stream(tmp_path, i7=tiny.jpeg(0, np.random.default_rng(0)))
    r = recipe(eval_size=32, eval_resize=32, per_device_train_batch_size=8)
    transform = images.EvalTransform(32, 32, "bilinear")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    accelerator = Accelerator(cpu=True)
    readers = (Samples(table, r, transform), streaming.Stream(stream, r, transform))
    expected, found = (evaluation.predict_all(model, reader, r, accelerator, workers) for reader in readers)
    assert expected is not None and found is not None and found["index"].tolist() == list(range(40))
    for column in ("label", "top", "bad"):
        assert np.array_equal(found[column], expected[column])
    for column in ("nll", "confidence"):
        assert found[column] == pytest.approx(expected[column], abs=1e-5)


def test_each_image_is_evaluated_by_one_process_only(tmp_path: Path) -> None:
    stream, _ = open_stream(tmp_path)
    r = recipe()
    reader = streaming.Stream(stream, r, images.EvalTransform(4, 4, "bilinear"))
    found = []
    for rank in range(3):
        for pixels, labels, index, _ in reader.eval_batches(rank, 3, 4, 0, CPU):
            numbers = (pixels[:, 0, 0, 0] // 6).tolist()
            assert labels.tolist() == [n % 4 for n in numbers]
            found += zip(index.tolist(), numbers, strict=True)
    assert [number for _, number in sorted(found)] == list(range(40))


def test_a_bad_image_stops_or_is_counted(tmp_path: Path) -> None:
    stream, _ = open_stream(tmp_path, i7=b"no image", i8=b"")
    r = recipe()
    transforms = images.TrainTransform(r), images.EvalTransform(4, 4, "bilinear")
    with pytest.raises(RankError, match=r"an image \([78]\.png\) cannot be read: .*; mend it, or pass --on_bad_image"):
        list(batches(stream, r))
    rows = take(streaming.Stream(stream, r, transforms[0], "skip"), 38)
    assert sorted(int(image[0, 0, 0]) // 6 for image, *_ in rows) == sorted({*range(40)} - {7, 8})
    assert sum(bad for *_, bad in rows) in (0, 1, 2)  # those at the very end are counted with the next turn's first
    reader = streaming.Stream(stream, r, transforms[1], "skip")
    evaluated = [(int(image.sum()), bad) for image, _, _, bad in reader.eval_rows(0, 1)]
    assert len(evaluated) == 40 and [i for i, (_, bad) in enumerate(evaluated) if bad] == [7, 8]
    assert evaluated[7] == evaluated[8] == (0, 1)


def test_what_a_stream_cannot_do_is_refused_and_one_that_breaks_is_one_line(tmp_path: Path) -> None:
    stream, _ = open_stream(tmp_path)
    with pytest.raises(UserError, match="a split has 5 files, fewer than the 8 processes that read it"):
        batches(stream, recipe(per_device_train_batch_size=1), world=8)
    with pytest.raises(RankError, match="label 3 is not one of the 3 classes"):
        batches(stream, recipe(num_classes=3))
    for field in ("max_train_samples", "max_eval_samples", "aug_repeats"):
        with pytest.raises(UserError, match=f"{field} needs the whole table: it does not go with streaming"):
            load_recipe("r18_100e_mixup", streaming=True, **{field: 2})
    with pytest.raises(UserError, match=r"streaming is for datasets of the Hub, and .* is on this machine"):
        load_splits(load_recipe("r18_100e_mixup", streaming=True, dataset=str(tmp_path)))

    (tmp_path / "train-3.parquet").unlink()
    with pytest.raises(RankError, match=r"cannot go on reading dataset .*; later, continue with --resume") as caught:
        batches(stream, recipe())
    assert "\n" not in str(caught.value)
