"""Datasets by name, and loaders whose order and augmentation depend on the seed alone.

The order is a function of (seed, epoch), the augmentation of (seed, epoch, index, copy). Neither depends on the
number of workers, processes or resumes, so a run can start at any update without replaying the ones before.
"""

import atexit
import hashlib
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from recipes import Recipe, UserError
from recipes.typed import RankError, nearest

from . import keys
from .images import BadImage, EvalTransform, TrainTransform, decode
from .prepare import PREPARED, prepared

SMALL = 2**30  # bytes of parquet that are read into memory instead of being copied to Arrow files


# --------------------------------------------------------------------------------------------- by name


class Splits(NamedTuple):
    """The two tables a run needs, with encoded images, and what is recorded about them. Streams of the same rows
    for a recipe that says ``streaming``."""

    train: datasets.Dataset | datasets.IterableDataset
    eval: datasets.Dataset | datasets.IterableDataset
    classes: list[str]
    record: dict[str, Any]


def load_splits(recipe: Recipe) -> Splits:
    """Open the recipe's dataset and check everything that can be checked without decoding an image.

    Raises ``UserError`` with one clear line: unknown or gated dataset, missing split or column, classes that do
    not fit, empty split.
    """
    train, classes = load_split(recipe, recipe.train_split, recipe.max_train_samples, recipe.streaming)
    evaluation, others = load_split(recipe, recipe.eval_split, recipe.max_eval_samples, recipe.streaming)
    if classes != others:
        only = sorted(set(classes) ^ set(others))
        raise UserError(
            f"dataset {recipe.dataset!r}: classes of {recipe.train_split!r} and {recipe.eval_split!r} differ: "
            f"{', '.join(only[:5])}{' ...' if len(only) > 5 else ''} in one of them only"
        )
    if len(classes) != recipe.num_classes:
        raise UserError(
            f"dataset {recipe.dataset!r} has {len(classes)} classes, the recipe says num_classes "
            f"{recipe.num_classes}; pass --num_classes {len(classes)} if that is meant"
        )
    record = {
        "dataset": recipe.dataset,
        "config": recipe.dataset_config,
        "revision": recipe.dataset_revision,
        "commit": one_commit(recipe, train, evaluation),
        "splits": {
            split: {"images": count(table), "labels_sha256": labels_hash(table, recipe.label_column)}
            for split, table in ((recipe.train_split, train), (recipe.eval_split, evaluation))
        },
        "classes": classes,
    }
    return Splits(train, evaluation, classes, record)


def one_commit(recipe: Recipe, *tables: Any) -> str | None:
    """The commit of the Hub's repository that all tables were read from; None for data of this machine.

    Raises ``UserError`` when they are of different ones: the repository changed in between.
    """
    found = {commit(table) for table in tables}
    if len(found) > 1:
        raise UserError(
            f"dataset {recipe.dataset!r} changed on the Hub while it was opened ({', '.join(map(str, found))}); start "
            "again, or fix a commit with --dataset_revision"
        )
    return found.pop()


def commit(table: datasets.Dataset | datasets.IterableDataset) -> str | None:
    """The commit in the addresses of the files that a table was made from (``open_hub``)."""
    files = "\n".join(table.info.download_checksums or ())
    found = re.match(r"hf://datasets/[^@\n]+@([0-9a-f]{40})/", files)
    return found[1] if found else None


def load_split(recipe: Recipe, split: str, limit: int | None, streaming: bool = False) -> tuple[Any, list[str]]:
    """One split with encoded images, its first ``limit`` images of a fixed shuffle, and its class names."""
    table = open_split(recipe, split, streaming)
    for column in (recipe.image_column, recipe.label_column):
        if column not in table.column_names:
            raise UserError(
                f"dataset {recipe.dataset!r}, split {split!r}: no column {column!r}; "
                f"{nearest(column, table.column_names)} (set image_column or label_column)"
            )
    if not count(table):
        raise UserError(f"dataset {recipe.dataset!r}: split {split!r} is empty")
    classes = class_names(recipe, split, table)
    try:  # images stay encoded, and only the two columns that are read are kept
        table = table.select_columns([recipe.image_column, recipe.label_column])
        table = table.cast_column(recipe.image_column, datasets.Image(decode=False))
    except (KeyError, TypeError, ValueError, NotImplementedError):
        raise UserError(
            f"dataset {recipe.dataset!r}: column {recipe.image_column!r} does not hold images (set image_column)"
        ) from None
    return subset(table, limit), classes


def open_split(recipe: Recipe, split: str, streaming: bool = False) -> Any:
    """One split of a prepared set, a local folder or a Hub dataset, or a stream of the latter."""
    name = recipe.dataset
    folder = Path(name).expanduser()
    if streaming and (name in PREPARED or folder.exists()):
        raise UserError(f"streaming is for datasets of the Hub, and {name!r} is on this machine; leave it out")
    if name in PREPARED:
        if (found := prepared(name)) is None:
            raise UserError(f"dataset {name!r} is not prepared on this machine; run: mixup-recipes prepare {name}")
        folder = found
    elif not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(f"dataset {name!r} is neither a folder, a Hub id (owner/name), nor one of {sorted(PREPARED)}")
    try:
        if folder.exists():
            return open_folder(folder, split)
        return open_hub(recipe, split, streaming)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as e:
        if isinstance(e, UserError):
            raise
        reason = " ".join(str(e).split())
        if "gated" in reason.lower():
            reason = (
                f"access is gated: accept the terms on its page on the Hub, then `hf auth login` or set HF_TOKEN "
                f"({reason[:160]})"
            )
        if "reach" in reason or "offline" in reason.lower():
            reason += "; check the network and `hf auth login` (ImageNet is gated), or pass --dataset FOLDER"
        raise UserError(f"cannot open dataset {name!r}, split {split!r}: {reason[:400]}") from None


def open_folder(folder: Path, split: str) -> datasets.Dataset:
    """A folder of parquet files in the Hub's layout, or of ``<split>/<class>/<image>`` files."""
    parquet = sorted(p for p in folder.rglob("*.parquet") if p.name.startswith(split + "-") or p.stem == split)
    if parquet:
        size = sum(p.stat().st_size for p in parquet)
        if size <= SMALL:  # reading it is quicker than the Arrow copy that load_dataset would write
            import pyarrow.parquet as pq

            return datasets.concatenate_datasets([datasets.Dataset(pq.read_table(p)) for p in parquet])
        announce_copy(size, "parquet")
        return datasets.load_dataset("parquet", data_files={split: [str(p) for p in parquet]}, split=split)
    if any(folder.rglob("*.parquet")):
        names = sorted({p.name.split("-")[0].removesuffix(".parquet") for p in folder.rglob("*.parquet")})
        raise UserError(f"{folder} has no split {split!r}; {nearest(split, names)}")
    found = {p.name: p for p in folder.iterdir() if p.is_dir()}
    alias = {"validation": ("val", "valid"), "val": ("validation", "valid"), "test": ("val", "validation")}
    directory = next((found[n] for n in (split, *alias.get(split, ())) if n in found), None)
    if directory is None:
        raise UserError(f"{folder} has no folder for split {split!r}; {nearest(split, found)}")
    if not any(p.is_dir() for p in directory.iterdir()):
        raise UserError(f"{directory} has no class folders; expected {directory.name}/<class>/<image>")
    if not any(p.is_file() for p in directory.rglob("*")):
        raise UserError(f"{directory} has no images; expected {directory.name}/<class>/<image>")
    # "**" is all files: left alone, datasets sorts files into splits by words in their names, such as _val_
    files = {"train": "**"}
    return datasets.load_dataset(
        "imagefolder", data_dir=str(directory), data_files=files, split="train", drop_labels=False
    )


def open_hub(recipe: Recipe, split: str, streaming: bool) -> Any:
    """A Hub dataset; its size is announced before anything large is written. A stream writes nothing."""
    builder = datasets.load_dataset_builder(
        recipe.dataset, name=recipe.dataset_config, revision=recipe.dataset_revision
    )
    info = builder.info
    if info.splits and split not in info.splits:
        raise UserError(f"dataset {recipe.dataset!r} has no split {split!r}; {nearest(split, info.splits)}")
    if streaming and not (info.splits and info.features and info.splits[split].num_examples):
        raise UserError(
            f"dataset {recipe.dataset!r} does not say what columns and how many images it has; leave out --streaming"
        )
    if streaming:
        stream = builder.as_streaming_dataset(split=split)
        stream.info.download_checksums = {str(f): None for f in (builder.config.data_files or {}).get(split, ())}
        return stream
    announce_copy((info.download_size or 0) + (info.dataset_size or 0), recipe.dataset.replace("/", "___"))
    builder.download_and_prepare()
    table = builder.as_dataset(split=split)
    table.info.download_checksums = {f"hf://datasets/{recipe.dataset}@{builder.hash}/": None}  # its files' beginning
    return table


def announce_copy(size: int, kept: str) -> None:
    """Say how much disk ``datasets`` is about to fill; refuse when it is not there. ``size`` in bytes.

    ``kept``: the name under which the cache keeps the copy, if it was made before.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if size > SMALL and int(os.environ.get("RANK", "0")) == 0:
        print(f"datasets keeps up to {size / 1e9:.0f} GB in {cache} (once); {free / 1e9:.0f} GB are free there")
    if size > free and not (cache / kept).exists():
        raise UserError(f"{cache}: {size / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free; set HF_HOME to a larger disk")


def count(table: datasets.Dataset | datasets.IterableDataset) -> int:
    """Images of a table, or those that a stream says to have."""
    return len(table) if isinstance(table, datasets.Dataset) else table.info.splits[str(table.split)].num_examples


def class_names(recipe: Recipe, split: str, table: Any) -> list[str]:
    """The class names of a split, after checking that its labels are among them (those of a stream: when read)."""
    feature = table.features[recipe.label_column]
    if isinstance(table, datasets.IterableDataset):
        return list(getattr(feature, "names", map(str, range(recipe.num_classes))))
    whole = "int" in str(getattr(feature, "dtype", ""))
    used = np.unique(np.asarray(table.with_format("numpy")[recipe.label_column])) if whole else np.empty(0)
    if used.dtype.kind not in "iu":  # an integer column with gaps becomes one of floats
        raise UserError(f"dataset {recipe.dataset!r}: label column {recipe.label_column!r} is not of whole numbers")
    if used.min() < 0:
        raise UserError(f"dataset {recipe.dataset!r}, split {split!r} has unlabelled images (label -1)")
    if hasattr(feature, "names"):
        names = list(feature.names)
    else:
        names = [str(i) for i in range(max(recipe.num_classes, int(used.max()) + 1))]
    if used.max() >= len(names):
        raise UserError(
            f"dataset {recipe.dataset!r}, split {split!r} has label {used.max()}, but only {len(names)} class names"
        )
    return names


def subset(table: Any, size: int | None) -> Any:
    """The first ``size`` images of a shuffle that never changes, so that a small subset has all classes."""
    if size is None or size >= count(table):
        return table
    return table.select(np.sort(keys.rng(keys.SUBSET, 0, 0).permutation(len(table))[:size]))


def labels_hash(table: datasets.Dataset | datasets.IterableDataset, column: str) -> str:
    """SHA-256 of the labels in order: tells whether two runs saw the same table.

    Nobody has read a stream's labels: it is that of its files' addresses, which name the commit.
    """
    if isinstance(table, datasets.IterableDataset):
        return hashlib.sha256("\n".join(table.info.download_checksums or ()).encode()).hexdigest()
    labels = np.asarray(table.with_format("numpy")[column], dtype=np.int64)
    return hashlib.sha256(labels.tobytes()).hexdigest()


# --------------------------------------------------------------------------------------------- samples


class Key(NamedTuple):
    """Which sample, and which draw of its augmentation."""

    epoch: int
    index: int
    copy: int


class Samples(torch.utils.data.Dataset):
    """``samples[Key]`` gives ``(image uint8 (3, S, S), label, index, bad)``; ``bad`` counts images passed over."""

    def __init__(self, table: datasets.Dataset, recipe: Recipe, transform: Any, on_bad_image: str = "stop"):
        self.table, self.transform, self.on_bad_image, self.seed = table, transform, on_bad_image, recipe.seed
        self.image_column, self.label_column = recipe.image_column, recipe.label_column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int, int]:
        keys.seed_everything(keys.SAMPLE, self.seed, *key)
        for bad in range(len(self.table)):
            index = (key.index + bad) % len(self.table)
            row = self.table[index]
            image = row[self.image_column] or {"bytes": b"", "path": None}  # a table may have gaps
            try:
                data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
                return self.transform(decode(data)), row[self.label_column], key.index, bad
            except (BadImage, OSError) as e:
                if self.on_bad_image == "stop":
                    where = image["path"] or "no path"
                    raise RankError(
                        f"image {index} ({where}) cannot be read: {e}; mend it, or pass --on_bad_image skip"
                    ) from None
        raise RankError("no image of the dataset can be read")


class TrainOrder:
    """Which samples go where: the batch sampler of one process.

    The epoch's order, a function of (seed, epoch), is cut into updates of ``batch_size`` images; an update into
    ``micro_batches`` of ``per_device_train_batch_size``, dealt like cards so that the copies of a repeated
    image land in different ones; process ``rank`` of ``world`` takes every world-th micro-batch. So what a
    micro-batch holds does not depend on the number of processes.
    """

    def __init__(self, size: int, recipe: Recipe, rank: int, world: int, start: int = 0):
        self.size, self.recipe, self.rank, self.world, self.start = size, recipe, rank, world, start
        self.micro_batches, self.accumulation = cut(recipe, world)
        self.updates_per_epoch = updates_per_epoch(size, recipe)
        self.updates = self.updates_per_epoch * recipe.epochs

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Image index and copy number of each sample of one epoch in order, whole updates only."""
        order = keys.rng(keys.ORDER, self.recipe.seed, epoch).permutation(self.size)
        repeats = self.recipe.aug_repeats
        index = np.repeat(order, repeats)[: self.size]
        copy = np.tile(np.arange(repeats), self.size)[: self.size]
        length = self.updates_per_epoch * self.recipe.batch_size
        position = np.arange(length)
        return index[position % self.size], copy[position % self.size] + repeats * (position // self.size)

    def __iter__(self) -> Iterator[list[Key]]:
        """Micro-batches of this process, from update ``start`` to the end of the run."""
        for update in range(self.start, self.updates):
            epoch, within = divmod(update, self.updates_per_epoch)
            if update == self.start or within == 0:
                index, copy = self.epoch(epoch)
            first, end = within * self.recipe.batch_size, (within + 1) * self.recipe.batch_size
            for micro in range(self.rank, self.micro_batches, self.world):
                mine = slice(first + micro, end, self.micro_batches)
                yield [Key(epoch, int(i), int(c)) for i, c in zip(index[mine], copy[mine], strict=True)]


def cut(recipe: Recipe, world: int) -> tuple[int, int]:
    """Micro-batches of an update over all processes, and accumulation steps per process."""
    micro_batches = recipe.batch_size // recipe.per_device_train_batch_size
    if micro_batches % world:
        fits = recipe.batch_size // world
        advice = (
            f"pass --per_device_train_batch_size {fits} or another number of processes"
            if recipe.batch_size % world == 0
            else f"use a number of processes that divides batch_size {recipe.batch_size}"
        )
        raise UserError(
            f"batch_size {recipe.batch_size} in micro-batches of {recipe.per_device_train_batch_size} does not "
            f"divide over {world} processes; {advice}"
        )
    return micro_batches, micro_batches // world


def updates_per_epoch(size: int, recipe: Recipe) -> int:
    """Updates in one pass over ``size`` images."""
    updates = size // recipe.batch_size if recipe.drop_last else -(-size // recipe.batch_size)
    if not updates:
        raise UserError(f"the training split has {size} images, fewer than batch_size {recipe.batch_size}")
    return updates


def train_batches(
    samples: Any, order: TrainOrder, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``(images uint8 (B, 3, S, S), labels (B,), indices (B,), bad (B,))`` for the rest of the run.

    ``samples``: ``Samples`` or ``streaming.Stream``.
    """
    if not isinstance(samples, Samples):
        return samples.train_batches(order, workers, device)
    return readable(loader(samples, order, workers, device))


def eval_batches(samples: Any, rank: int, world: int, batch_size: int, workers: int, device: torch.device) -> Any:
    """Batches of every world-th image (of a stream: file); each image belongs to exactly one process."""
    if not isinstance(samples, Samples):
        return samples.eval_batches(rank, world, batch_size, workers, device)
    mine = [Key(0, i, 0) for i in range(rank, len(samples), world)]
    return readable(loader(samples, [list(b) for b in batched(mine, batch_size)], workers, device))


def readable(batches: Any) -> Iterator[Any]:
    """The batches; a worker's error arrives as one line again instead of a printed traceback.

    In Python 3.11 a forked process hangs when another thread enters the interpreter just then, as those of gloo do
    after a collective (about once in a thousand forks): they are given the time to finish.
    """
    if batches.num_workers and torch.distributed.is_initialized() and sys.version_info < (3, 12):
        time.sleep(0.05)
    try:
        yield from batches
        return
    except RankError as e:
        line = str(e).strip().splitlines()[-1].split("RankError: ")[-1]
        e.__traceback__ = None  # it is in a cycle with the loader: freed by the collector, that waits 10 s for workers
    raise RankError(line)


def batched(items: list[Key], size: int) -> Iterator[tuple[Key, ...]]:
    """Consecutive groups of ``size``; the last may be shorter."""
    iterator = iter(items)
    while group := tuple(itertools.islice(iterator, size)):
        yield group


@atexit.register
def end_workers() -> None:
    """End loader workers when the process leaves: they ignore the signal by which Python would ask them to."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end a failure
    for child in multiprocessing.active_children():
        child.kill()


def loader(samples: Samples, batch_sampler: Any, workers: int, device: torch.device) -> Any:
    """A DataLoader whose workers each use one thread and leave when their parent is gone."""
    return DataLoader(
        samples,
        batch_sampler=batch_sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker if workers else None,
    )


def start_worker(_worker: int) -> None:
    """One thread each: workers are the parallelism. Signals are the training process's business."""
    parent = multiprocessing.parent_process()
    if parent and multiprocessing.get_start_method() == "fork" and os.getppid() != parent.pid:
        os._exit(1)  # killed meanwhile: torch, which compares parents from here on, would never see it
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


__all__ = ["EvalTransform", "Key", "Samples", "Splits", "TrainOrder", "TrainTransform", "eval_batches", "load_splits"]
