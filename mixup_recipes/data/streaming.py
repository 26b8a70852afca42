"""Training on a dataset of the Hub while it is read: nothing is copied to the disk.

An epoch's order is drawn from (seed, epoch): its files are shuffled and dealt to the loader processes, each of which
reads its own through a shuffle buffer, and begins again with another draw where its files end before the epoch does.
So an epoch has as many images as the split, but only a single loader process sees each of them once; what
is seen depends on the number of processes and loaders. A run that is resumed between epochs goes on as if never
stopped; within an epoch the buffers are lost, and the rest of it is drawn anew.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from mixup_recipes.data import keys
from mixup_recipes.data.decoding import LIMIT, BadImage
from mixup_recipes.data.images import Transform
from mixup_recipes.data.loading import Loaded, Sample, Samples, Source, on_device, readable, start_worker
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.origin import encoded, origin
from mixup_recipes.data.picture import Picture
from mixup_recipes.data.splits import count
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import RankError, UserError
from mixup_recipes.words import many

BUFFER = 1000  # encoded images that a loader process draws from


def reader(table: Any, *args: Any) -> Source:
    """What a run reads a table or a stream with; ``args``: those of both classes."""
    return Stream(table, *args) if isinstance(table, datasets.IterableDataset) else Samples(table, *args)


class Stream:
    """What ``Samples`` is to a table, for one that is read in order: ``len``, and batches of both kinds."""

    def __init__(
        self,
        table: datasets.IterableDataset,
        recipe: Recipe,
        transform: Transform,
        on_bad_image: str = "stop",
        limit: int = LIMIT,
        note: Callable[[str], None] | None = None,
    ):
        self.table, self.recipe, self.transform, self.on_bad_image = table, recipe, transform, on_bad_image
        self.limit = limit  # pixels of a picture
        self.note = note  # is told of each image that is passed over
        self.labels: np.ndarray | None = None
        self.origin = origin(table)
        self.files = table.num_shards

    def __len__(self) -> int:
        return count(self.table)

    def train_batches(self, order: TrainOrder, workers: int, device: torch.device) -> Iterator[Loaded]:
        """See ``Source``; an epoch that is begun anew is another draw."""
        size = self.recipe.per_device_train_batch_size
        for epoch in range(order.start // order.updates_per_epoch, self.recipe.epochs):
            begin = max(0, order.start - epoch * order.updates_per_epoch)
            batches = (order.updates_per_epoch - begin) * order.accumulation

            def rows(part: int, parts: int, mine: int, key: tuple[int, ...] = (epoch, begin)) -> Iterator[Sample]:
                return itertools.islice(self.train_rows(part, parts, *key), mine * size)

            yield from self.batches(rows, batches, order.rank, order.world, size, workers, device)

    def eval_batches(self, rank: int, world: int, size: int, workers: int, device: torch.device) -> Iterator[Loaded]:
        """Batches of the files of this process; each image belongs to exactly one."""
        return self.batches(lambda part, parts, _: self.eval_rows(part, parts), 0, rank, world, size, workers, device)

    def batches(
        self,
        rows: Callable[[int, int, int], Iterator[Sample]],
        count: int,
        rank: int,
        world: int,
        size: int,
        workers: int,
        device: torch.device,
    ) -> Iterator[Loaded]:
        """Batches of ``rows(part, parts, batches of this part)``, a part for each loader process of each process."""
        if self.files < world:
            raise UserError(
                f"dataset {self.recipe.dataset!r}: a split has {many(self.files, 'file')}, fewer than the {world} "
                "processes that read it; use fewer processes, or leave out --streaming"
            )
        workers = min(workers, self.files // world)
        each = max(1, workers)

        def part(worker: int) -> Iterator[Sample]:
            return rows(rank + world * worker, world * each, len(range(worker, count, each)))

        loader = DataLoader(
            Parts(part),
            batch_size=size,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=start_worker if workers else None,
        )
        return on_device(readable(loader), device)

    def train_rows(self, part: int, parts: int, epoch: int, begin: int) -> Iterator[Sample]:
        """Samples of one part without end, shuffled; ``bad`` counts the images that were passed over before one."""
        for turn in itertools.count():
            files = keys.rng(keys.ORDER, self.recipe.seed, epoch, begin, turn).permutation(self.files)[part::parts]
            rows = (row for file in files for row in self.rows(int(file)))
            rng, bad, good = keys.rng(keys.ORDER, self.recipe.seed, epoch, begin, turn, part), 0, 0
            for row in shuffled(rows, rng):
                if (image := self.image(row, (epoch, turn))) is None:
                    bad += 1
                    continue
                yield image, self.label(row), 0, bad
                bad, good = 0, good + 1
            if not good:
                raise RankError(f"no image of part {part + 1} of {parts} of the dataset can be read")

    def eval_rows(self, part: int, parts: int) -> Iterator[Sample]:
        """Samples of one part; the index sorts as the split does. A black image stands for one that is bad."""
        for file in range(part, self.files, parts):
            for number, row in enumerate(self.rows(file)):
                image = self.image(row)
                size = self.recipe.eval_size
                black = torch.zeros(3, size, size, dtype=torch.uint8)
                yield (black if image is None else image), self.label(row), file << 32 | number, int(image is None)

    def rows(self, file: int) -> Iterator[dict[str, Any]]:
        """Rows of one file. In batches, since row by row datasets deals them among the loaders by itself."""
        batches = self.table.shard(self.files, file).iter(32)
        while True:
            try:
                batch = next(batches, None)
            except Exception as e:  # of one of the libraries below, after its own retries
                reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
                raise RankError(
                    f"cannot continue reading dataset {self.recipe.dataset!r}: {reason}; continue later with "
                    "--resume_from_checkpoint auto"
                ) from None
            if batch is None:
                return
            yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))

    def image(self, row: dict[str, Any], draw: tuple[int, int] | None = None) -> Tensor | None:
        """The transformed image; None for a bad one that may be skipped. ``draw``: epoch and turn, for training."""
        try:
            content = encoded(row[self.recipe.image_column], self.origin)
            key: tuple[int, ...] = ()
            if draw is not None:
                digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
                key = self.recipe.seed, draw[0], digest, draw[1]
            return self.transform(Picture(content, self.limit, self.recipe.exif_orientation), key)
        except BadImage as e:
            line = f"an image ({(row[self.recipe.image_column] or {}).get('path') or 'no path'}) cannot be read: {e}"
            if self.on_bad_image == "stop":
                raise RankError(f"{line}; fix it, or pass --on_bad_image skip") from None
            if self.note:
                self.note(line)
            return None

    def label(self, row: dict[str, Any]) -> int:
        """The label, which no one has looked at before."""
        label = row[self.recipe.label_column]
        if not isinstance(label, int) or not 0 <= label < self.recipe.num_classes:
            raise RankError(f"label {label!r} is not one of the {many(self.recipe.num_classes, 'class')}")
        return label


class Parts(torch.utils.data.IterableDataset[Sample]):
    """What each loader process iterates over."""

    def __init__(self, part: Callable[[int], Iterator[Sample]]):
        self.part = part

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        return self.part(worker.id if worker else 0)


def shuffled(rows: Iterator[Any], rng: np.random.Generator) -> Iterator[Any]:
    """The rows, each drawn from the next ``BUFFER`` or so."""
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < BUFFER:
            buffer.append(row)
            continue
        place = int(rng.integers(BUFFER))
        row, buffer[place] = buffer[place], row
        yield row
    yield from (buffer[i] for i in rng.permutation(len(buffer)))
