"""From rows of a table to batches: the augmentation of a sample is a function of (seed, epoch, index, copy)."""

import atexit
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from mixup_recipes.data.decoding import LIMIT, BadImage
from mixup_recipes.data.images import Transform
from mixup_recipes.data.multi_label import is_many, multi_hot
from mixup_recipes.data.order import Key, TrainOrder
from mixup_recipes.data.origin import encoded, origin
from mixup_recipes.data.picture import Picture
from mixup_recipes.data.splits import labels_of
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import RankError

SMALL = 64 * 64 * 3  # bytes of a decoded picture that is kept
KEPT = 2**27  # bytes of all that a process keeps, at least 10,000 pictures
PREFETCHED = 3  # batches of a loader process: two that wait, one that is being made
Sample = tuple[Tensor, int | Tensor, int, int]
"""image uint8 (3, S, S), label, index, and ``bad``: how many unreadable images were passed over for it.

Where an image may have several labels, they are a multi-hot float (K,).
"""
Loaded = tuple[Tensor, Tensor, Tensor, Tensor]
"""A batch of samples: images uint8 (B, 3, S, S), labels (B,) or (B, K), indices (B,), bad (B,).

All of it is on the host, but what ``on_device`` has sent to a GPU.
"""


class Source(Protocol):
    """What a run reads its images from: ``Samples`` of a table, or ``streaming.Stream``."""

    labels: np.ndarray | None
    """Of all images, (N,), where the recipe's sampler looks at them."""

    def __len__(self) -> int: ...

    def train_batches(self, order: TrainOrder, workers: int, device: torch.device) -> Iterator[Loaded]:
        """This process's micro-batches for the rest of the run, from update ``order.start`` on."""

    def eval_batches(self, rank: int, world: int, size: int, workers: int, device: torch.device) -> Iterator[Loaded]:
        """This process's batches of up to ``size`` images; each image belongs to exactly one process."""


class Samples(torch.utils.data.Dataset[Sample]):
    """The images of a table: ``samples[Key]`` is a ``Sample``."""

    def __init__(
        self,
        table: datasets.Dataset,
        recipe: Recipe,
        transform: Transform,
        on_bad_image: str = "stop",
        limit: int = LIMIT,
        note: Callable[[str], None] | None = None,
    ):
        self.table, self.transform, self.on_bad_image, self.seed = table, transform, on_bad_image, recipe.seed
        self.limit = limit  # pixels of a picture
        self.note = note  # is told of each image that is passed over
        self.origin, self.upright = origin(table), recipe.exif_orientation
        self.image_column, self.label_column = recipe.image_column, recipe.label_column
        self.labels: np.ndarray | None = None
        if recipe.sampler == "balanced":
            self.labels = np.asarray(labels_of(table, recipe.label_column))
        self.paths = isinstance(table.features[recipe.image_column], datasets.Value)
        self.kept: dict[int, tuple[Tensor, Any]] = {}  # decoded pictures and their labels, of small ones in a table
        self.room = KEPT
        self.several = None  # how many classes there are, where an image may have several
        if is_many(feature := table.features[recipe.label_column]):
            self.several = len(feature.feature.names)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Key) -> Sample:
        (sample,) = self.__getitems__([key])
        return sample

    def __getitems__(self, batch: Sequence[Key]) -> list[Sample]:
        """What a loader asks for. The paths of a batch are looked up at once, which takes a tenth of the time."""
        rows: Iterable[tuple[Any, Any]]
        if self.paths:
            columns = self.table[[key.index for key in batch]]
            rows = zip(columns[self.image_column], columns[self.label_column], strict=True)
        else:
            rows = map(self.row, (key.index for key in batch))
        return [self.sample(key, *row) for key, row in zip(batch, rows, strict=True)]

    def row(self, index: int) -> tuple[Any, Any]:
        """Image and label, as the table holds them."""
        if index in self.kept:
            return self.kept[index]
        row = self.table[index]
        return row[self.image_column], row[self.label_column]

    def picture(self, index: int, image: Any, label: Any) -> Picture | Tensor:
        """The picture of a row; a small one is kept decoded, as reading it takes as long as training on it."""
        picture = Picture(encoded(image, self.origin), self.limit, self.upright)
        if self.paths or self.room < SMALL or math.prod(picture.shape) > SMALL:
            return picture
        self.room -= SMALL
        self.kept[index] = picture.pixels, label
        return picture.pixels

    def sample(self, key: Key, image: Any, label: Any) -> Sample:
        """The sample of a key and its row, or of the next row whose image can be read."""
        for bad in range(len(self.table)):
            index = (key.index + bad) % len(self.table)
            if bad:
                image, label = self.row(index)
            try:
                picture = image if isinstance(image, Tensor) else self.picture(index, image, label)
                label = label if self.several is None else multi_hot(label, self.several)
                return self.transform(picture, (self.seed, *key)), label, key.index, bad
            except BadImage as e:
                where = image if isinstance(image, str) else (image or {}).get("path") or "no path"
                line = f"image {index} ({where}) cannot be read: {e}"
                if self.on_bad_image == "stop":
                    raise RankError(f"{line}; fix it, or pass --on_bad_image skip") from None
                if self.note:
                    self.note(line)
        raise RankError("no image of the dataset can be read")

    def train_batches(self, order: TrainOrder, workers: int, device: torch.device) -> Iterator[Loaded]:
        """See ``Source``."""
        return self.batches(order, order.recipe.per_device_train_batch_size, workers, device)

    def eval_batches(self, rank: int, world: int, size: int, workers: int, device: torch.device) -> Iterator[Loaded]:
        """Batches of every world-th image."""
        mine = [Key(0, i, 0) for i in range(rank, len(self), world)]
        return self.batches([mine[i : i + size] for i in range(0, len(mine), size)], size, workers, device)

    def batches(self, order: Iterable[list[Key]], size: int, workers: int, device: torch.device) -> Iterator[Loaded]:
        """A batch of up to ``size`` for each list of keys."""
        return on_device(readable(loader(self, order, size, workers, device)), device)


def loader(
    samples: Samples, order: Iterable[list[Key]], size: int, workers: int, device: torch.device
) -> DataLoader[Sample]:
    """A DataLoader whose workers each use one thread and leave when their parent is gone. ``size``: of a batch."""
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        prefetch_factor=PREFETCHED - 1 if workers else None,
        pin_memory=device.type == "cuda",
        collate_fn=Slots(workers, (size, 3, *samples.transform.size)) if workers else None,
        worker_init_fn=start_worker if workers else None,
    )


class Slots:
    """Memory that loader processes share with the one that trains, three batches each, which they fill in turn.

    A fresh piece for each batch, as torch has it, costs more in page faults than the batch takes to copy. DataLoader's
    ``prefetch_factor`` lets a loader process have two batches under way, so that one which was handed out is whole
    until the next is asked for: who takes it makes a copy (``readable``, or DataLoader where it pins).
    """

    def __init__(self, workers: int, shape: tuple[int, ...]):
        self.memory = torch.empty((workers, PREFETCHED, *shape), dtype=torch.uint8).share_memory_()
        self.turn = 0

    def __call__(self, samples: list[Sample]) -> list[Tensor]:
        """Collate a batch into the next slot of this process."""
        worker = get_worker_info()
        assert worker is not None
        slot, self.turn = self.memory[worker.id, self.turn], (self.turn + 1) % PREFETCHED
        images = torch.stack([image for image, *_ in samples], out=slot[: len(samples)])
        return [images, *default_collate([rest for _, *rest in samples])]


def start_worker(_worker: int) -> None:
    """One thread each: workers are the parallelism. Signals are the training process's business."""
    parent = multiprocessing.parent_process()
    if parent and multiprocessing.get_start_method() == "fork" and os.getppid() != parent.pid:
        os._exit(1)  # killed meanwhile: torch, which compares parents from here on, would never see it
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """End loader workers when the process leaves: they ignore the signal by which Python would ask them to."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end a failure
    for child in multiprocessing.active_children():
        child.kill()


def readable(batches: DataLoader[Sample]) -> Iterator[Loaded]:
    """The batches; a worker's error arrives as one line again instead of a printed traceback.

    In Python 3.11 a forked process hangs when another thread enters the interpreter just then, as those of gloo do
    after a collective (about once in a thousand forks): they are given the time to finish.
    """
    if batches.num_workers and torch.distributed.is_initialized() and sys.version_info < (3, 12):
        time.sleep(0.05)
    try:
        for images, *rest in batches:
            lent = isinstance(batches.collate_fn, Slots) and not batches.pin_memory
            yield (images.clone() if lent else images), *rest
        return
    except RankError as e:
        line = e.args[0].strip().splitlines()[-1].split("RankError: ", 1)[-1] if batches.num_workers else str(e)
        e.__traceback__ = None  # it is in a cycle with the loader: freed by the collector, that waits 10 s for workers
    raise RankError(line)


def on_device(batches: Iterator[Loaded], device: torch.device) -> Iterator[Loaded]:
    """The batches; where the device is a GPU, with images and labels on it. Indices and bad stay on the host.

    A stream of its own copies the next batch while the step of this one runs, so one more batch of bytes lies on the
    GPU. What is copied is not overwritten meanwhile: DataLoader empties a loader's slot into pinned memory before it
    hands out the batch, and torch lends pinned memory again only when the copy from it is done.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)

    def sent(batch: Loaded) -> tuple[Loaded, torch.cuda.Event]:
        images, labels, index, bad = batch
        with torch.cuda.stream(side):
            images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
            return (images, labels, index, bad), side.record_event()

    copies = map(sent, batches)
    coming = next(copies, None)
    while coming is not None:
        (batch, copied), coming = coming, next(copies, None)
        step = torch.cuda.current_stream(device)
        step.wait_event(copied)
        for part in batch[:2]:
            part.record_stream(step)  # their memory is the side stream's, which must not use it again during the step
        yield batch
