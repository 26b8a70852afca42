"""From rows of a table to batches: samples whose augmentation is a function of (seed, epoch, index, copy), and loaders."""

import atexit
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mixup_recipes.data import keys
from mixup_recipes.data.images import BadImage, decode
from mixup_recipes.data.order import Key, TrainOrder
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import RankError


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
