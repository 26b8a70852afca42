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
EVALUATING = images.EvalTransform(4, 4, "bilinear")

pytestmark = pytest.mark.slow  # whole clients and runs against a server: minutes


def png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 pixels (H, W) or (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def open_stream(folder: Path, changed: dict[int, bytes] | None = None) -> tuple[Any, datasets.Dataset]:
    """Images 0 to 39 in five files, as a stream and as a table: each of one grey, which says its number, or changed."""
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    greys = {n: png(np.full((4, 4), 6 * n, dtype=np.uint8)) for n in range(40)} | (changed or {})
    column = [{"bytes": greys[n], "path": f"{n}.png"} for n in range(40)]
    rows = pa.table({"image": column, "label": [n % 4 for n in range(40)]}, schema=features.arrow_schema)
    files = [str(folder / f"train-{i}.parquet") for i in range(5)]
    for file, first, length in zip(files, np.cumsum((0, *LENGTHS[:-1])), LENGTHS, strict=True):
        pq.write_table(rows.slice(first, length), file)
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, features=features)
    stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=40)})
    return stream, datasets.Dataset(rows).cast_column("image", datasets.Image(decode=False))


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {"num_classes": 4, "image_size": 4, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "epochs": 3}
    values |= {"batch_size": 8, "per_device_train_batch_size": 4, "eval_size": 4, "streaming": True, "hflip": 0.0}
    return Recipe(**(values | changes))


def reading(stream: Any, r: Recipe, on_bad_image: str = "stop") -> streaming.Stream:
    return streaming.Stream(stream, r, images.TrainTransform(r), on_bad_image)


def batches(stream: Any, r: Recipe, rank: int = 0, world: int = 1, start: int = 0, workers: int = 0) -> list[list[int]]:
    """The images, by number, of every micro-batch of a process from an update on."""
    source = reading(stream, r)
    found = source.train_batches(TrainOrder(len(source), r, rank, world, start), workers, CPU)
    return [(pixels[:, 0, 0, 0] // 6).tolist() for pixels, *_ in found]


def whole_files(numbers: list[int]) -> bool:
    """Whether these are all images of some files, each once."""
    files = np.split(np.arange(40), np.cumsum(LENGTHS)[:-1])
    return sorted(numbers) == sorted(n for f in files if set(f.tolist()) & set(numbers) for n in f.tolist())


def test_an_epoch_of_one_reader_is_every_image_once_in_an_order_of_its_own_also_after_a_resume(tmp_path):
    stream, _ = open_stream(tmp_path)
    whole = batches(stream, recipe())
    assert [len(b) for b in whole] == [4] * (3 * 40 // 4)
    epochs = [[*itertools.chain(*whole[i : i + 10])] for i in (0, 10, 20)]
    assert all(sorted(e) == list(range(40)) for e in epochs)
    assert len({tuple(e) for e in [*epochs, range(40)]}) == 4
    assert whole == batches(stream, recipe()) != batches(stream, recipe(seed=1))
    assert batches(stream, recipe(), start=5) == whole[10:]
    within = batches(stream, recipe(), start=7)  # as many images, but others until the epoch ends
    assert len(within) == 30 - 14 and within[:6] != whole[14:20] and within[6:] == whole[20:]


def test_processes_or_as_many_loaders_read_different_files_and_begin_again_where_theirs_end(tmp_path):
    (stream, _), r = open_stream(tmp_path), recipe(per_device_train_batch_size=2)
    for world in (2, 4):
        parts, each, dealt = [batches(stream, r, rank, world) for rank in range(world)], 40 // 2 // world, set()
        assert [len(p) for p in parts] == [3 * each] * world  # nobody waits for another
        for epoch in range(3):
            reads = [[*itertools.chain(*p[epoch * each : (epoch + 1) * each])] for p in parts]
            rows = [reading(stream, r).train_rows(rank, world, epoch, 0) for rank in range(world)]
            longer = [[int(next(row)[0][0, 0, 0]) // 6 for _ in range(40)] for row in rows]
            assert [found[: len(read)] for found, read in zip(longer, reads, strict=True)] == reads
            ends = [[n for n in range(1, 41) if whole_files(found[:n])] for found in longer]
            turns = [t for t in itertools.product(*ends) if sum(t) == 40]  # where the first turn of each may end
            firsts = [[frozenset(found[:n]) for found, n in zip(longer, t, strict=True)] for t in turns]
            (first,) = [f for f in firsts if len(set().union(*f)) == 40]
            dealt.add(tuple(first))
        assert len(dealt) > 1  # the deal is drawn anew for each epoch
    one, other = (batches(stream, recipe(epochs=2), rank, world=2) for rank in range(2))
    turn = [b for pair in zip(one, other, strict=True) for b in pair]
    assert batches(stream, recipe(epochs=2), workers=2) == turn


def test_augmentation_depends_on_image_and_epoch_alone(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), dtype=np.uint8)
    stream, _ = open_stream(tmp_path, {n: png(pixels) for n, pixels in enumerate(noise)})
    reader = reading(stream, recipe(scale=(0.2, 1.0), hflip=0.5, aa="rand-m9-mstd0.5-inc1"))

    def seen(world, epoch, count=12):
        parts = [itertools.islice(reader.train_rows(part, world, epoch, 0), count) for part in range(world)]
        return {image.numpy().tobytes() for part in parts for image, *_ in part}

    alone, shared, later, everything = seen(1, 0), seen(2, 0), seen(1, 1), seen(1, 0, 40)
    assert len(alone) == 12 and len(shared) == 24 and not alone & later
    assert len(everything) == 40 and alone <= everything and shared <= everything


def test_the_buffer_draws_every_row_once_and_none_before_it_was_read(monkeypatch):
    def places(rows, draws):
        return np.array([list(streaming.shuffled(iter(rows), np.random.default_rng(s))) for s in range(draws)])

    monkeypatch.setattr(streaming, "BUFFER", 5)
    found = places(range(50), 200)
    assert (np.sort(found) == np.arange(50)).all()
    assert (found <= np.arange(50) + 5).all()  # the buffer, and the row that takes the place
    assert places((), 1).size == 0
    monkeypatch.setattr(streaming, "BUFFER", 60)  # a shuffle of the whole: each row is as often at each place
    found = places(range(4), 2000)
    for row in range(4):
        assert abs((found == row).mean(0) - 0.25).max() < 0.05  # 5 standard deviations of 2000 draws


def test_evaluation_says_of_each_image_what_the_table_says_and_by_one_process_only(tmp_path):
    stream, table = open_stream(tmp_path, {7: tiny.jpeg(0, np.random.default_rng(0))})
    r, transform = recipe(eval_size=32, per_device_train_batch_size=8), images.EvalTransform(32, 32, "bilinear")
    torch.manual_seed(0)
    model, accelerator = timm.create_model("test_resnet", num_classes=4).eval(), Accelerator(cpu=True)
    for workers in (0, 2):
        readers = (Samples(table, r, transform), streaming.Stream(stream, r, transform))
        expected, found = (evaluation.predict_all(model, reader, r, accelerator, workers) for reader in readers)
        assert found["index"].tolist() == list(range(40))
        for column in ("label", "top", "bad"):
            assert np.array_equal(found[column], expected[column])
        for column in ("nll", "confidence"):
            assert found[column] == pytest.approx(expected[column], abs=1e-5)

    stream, _ = open_stream(tmp_path)
    seen = []
    for rank in range(3):
        for pixels, labels, index, _ in streaming.Stream(stream, recipe(), EVALUATING).eval_batches(rank, 3, 4, 0, CPU):
            numbers = pixels[:, 0, 0, 0] // 6
            assert torch.equal(labels, numbers % 4)
            seen += zip(index.tolist(), numbers.tolist(), strict=True)
    assert [number for _, number in sorted(seen)] == list(range(40))


@pytest.mark.parametrize("told", [39, 44])
def test_a_card_that_miscounts_is_one_line(tmp_path, told):
    stream, _ = open_stream(tmp_path)
    stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=told)})
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    with pytest.raises(UserError, match=f"the card says {told} images, 40 were read; fix its dataset_info"):
        evaluation.predict_all(
            model, streaming.Stream(stream, recipe(), EVALUATING), recipe(), Accelerator(cpu=True), 0
        )


def test_a_bad_image_stops_or_is_counted(tmp_path):
    stream, _ = open_stream(tmp_path, {7: b"no image", 8: b""})
    with pytest.raises(RankError, match=r"an image \([78]\.png\) cannot be read: .*; fix it, or pass --on_bad_image"):
        batches(stream, recipe())
    rows = list(itertools.islice(reading(stream, recipe(), "skip").train_rows(0, 1, 0, 0), 38))
    assert sorted(int(image[0, 0, 0]) // 6 for image, *_ in rows) == sorted({*range(40)} - {7, 8})
    assert sum(bad for *_, bad in rows) in (0, 1, 2)  # those at the very end are counted with the next turn's first
    reader = streaming.Stream(stream, recipe(), EVALUATING, "skip")
    evaluated = [(int(image.sum()), bad) for image, _, _, bad in reader.eval_rows(0, 1)]
    assert len(evaluated) == 40 and [i for i, (_, bad) in enumerate(evaluated) if bad] == [7, 8]
    assert evaluated[7] == evaluated[8] == (0, 1)


def test_what_a_stream_cannot_do_is_refused_and_one_that_breaks_is_one_line(tmp_path):
    stream, _ = open_stream(tmp_path)
    with pytest.raises(UserError, match="a split has 5 files, fewer than the 8 processes that read it"):
        batches(stream, recipe(per_device_train_batch_size=1), world=8)
    with pytest.raises(RankError, match="label 3 is not one of the 3 classes"):
        batches(stream, recipe(num_classes=3))
    for field in ("max_train_samples", "max_eval_samples", "aug_repeats"):
        with pytest.raises(UserError, match=f"{field} needs the whole table, so it cannot be combined with streaming"):
            load_recipe("r18_100e_mixup", streaming=True, **{field: 2})
    with pytest.raises(UserError, match=r"streaming needs a dataset of the Hub, and .* is on this machine"):
        load_splits(load_recipe("r18_100e_mixup", streaming=True, dataset=str(tmp_path)))

    (tmp_path / "train-3.parquet").unlink()
    with pytest.raises(RankError, match=r"cannot continue reading dataset .*; continue later with --resume") as caught:
        batches(stream, recipe())
    assert "\n" not in str(caught.value)
