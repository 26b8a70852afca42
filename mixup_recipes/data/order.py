"""Which image is seen when: a function of the seed and the epoch alone.

It does not depend on the number of workers, processes or resumes, so a run can start at any update without replaying
the ones before.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mixup_recipes.data import keys
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


class Key(NamedTuple):
    """Which sample, and which draw of its augmentation."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls
    copy: int


class TrainOrder:
    """Which samples go where: the batch sampler of one process.

    The epoch's order, a function of (seed, epoch), is cut into updates of ``batch_size`` images; an update into
    ``micro_batches`` of ``per_device_train_batch_size``, dealt like cards so that the copies of a repeated
    image land in different ones; process ``rank`` of ``world`` takes every world-th micro-batch. So what a
    micro-batch holds does not depend on the number of processes. ``labels`` (size,): for a balanced sampler. An epoch
    has as many samples as there are images, so with ``aug_repeats`` copies of each it has fewer images: the balanced
    sampler draws just as many, of each class as many as of any other. Only the last one may have fewer copies.
    """

    def __init__(
        self, size: int, recipe: Recipe, rank: int, world: int, start: int = 0, labels: np.ndarray | None = None
    ):
        self.size, self.recipe, self.rank, self.world, self.start = size, recipe, rank, world, start
        self.labels = labels
        self.micro_batches, self.accumulation = cut(recipe, world)
        self.updates_per_epoch = updates_per_epoch(size, recipe)
        self.updates = self.updates_per_epoch * recipe.epochs

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Image index and copy number of each sample of one epoch in order, whole updates only."""
        rng, repeats = keys.rng(keys.ORDER, self.recipe.seed, epoch), self.recipe.aug_repeats
        if self.labels is None:
            order, turn = rng.permutation(self.size), np.zeros(self.size, np.int64)
        else:
            order, turn = balanced(self.labels, -(-self.size // repeats), rng)
        index = np.repeat(order, repeats)[: self.size]
        copy = (np.arange(repeats) + repeats * turn[:, None]).ravel()[: self.size]
        length = self.updates_per_epoch * self.recipe.batch_size
        again, position = np.divmod(np.arange(length), self.size)
        return index[position], copy[position] + repeats * (turn.max() + 1) * again

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


def balanced(labels: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``size`` of the rows that the labels are of, of each class as many as of any other, or one more; shuffled.

    Returns the rows, and how often each came before: those of a class come equally often, or once more.
    """
    rows = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.unique(labels, return_counts=True)[1])[:-1])
    each, more = np.divmod(size, len(rows))
    counts = np.full(len(rows), each)
    counts[rng.permutation(len(rows))[:more]] += 1
    drawn = [
        np.concatenate([rng.permutation(own) for _ in range(-(-n // len(own)))] or [own])[:n]
        for own, n in zip(rows, counts.tolist(), strict=True)
    ]
    turns = [np.arange(n) // len(own) for own, n in zip(rows, counts.tolist(), strict=True)]
    mixed = rng.permutation(size)
    return np.concatenate(drawn)[mixed], np.concatenate(turns)[mixed]


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
        raise UserError(f"the training split has {many(size, 'image')}, fewer than batch_size {recipe.batch_size}")
    return updates
