"""Whether the order of methods in our runs is the order of a published table: rank correlation with its interval.

Both sides have noise, and a published table says nothing of its own. So published tables are compared with each other
too: no table of ours can be expected to agree with them better than they do.
"""

import statistics
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata, spearmanr

from mixup_recipes.benchmark.cells import select
from mixup_recipes.typed import UserError

DRAWS = 2000  # of the bootstrap
LEAST = 5  # mixers, fewer have no order to speak of
Tops = dict[str, list[float]]
"""Mixer -> top-1 in percent of each run; of a published table one number."""


class Correlation(NamedTuple):
    """Spearman's rank correlation of two tables, -1 to 1, with a 95 % interval."""

    mixers: int
    rho: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rho:.2f} ({self.low:.2f} to {self.high:.2f})"


def rank_correlation(ours: Tops, theirs: Tops, seed: int = 0) -> Correlation:
    """Spearman's rho of the means of the mixers that both tables have.

    The interval is a percentile bootstrap that draws mixers, and of each mixer its runs, with replacement: it says how
    far rho depends on which methods happen to be in both tables, and on our seeds. Raises ``UserError`` for fewer than
    five common mixers.
    """
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < LEAST:
        raise UserError(f"a rank correlation needs {LEAST} common mixers or more, got {', '.join(common) or 'none'}")
    rng = np.random.default_rng(seed)
    some = rng.integers(len(common), size=(DRAWS, len(common)))  # mixers, with replacement
    drawn = np.empty((2, *some.shape))
    for side, table in enumerate((ours, theirs)):
        for i, name in enumerate(common):
            at = some == i
            runs = rng.choice(table[name], (int(at.sum()), len(table[name])))
            drawn[side][at] = runs.mean(1)
    ranks = rankdata(drawn, axis=2)
    ranks -= ranks.mean(2, keepdims=True)
    scale = np.sqrt((ranks**2).sum(2).prod(0))
    found = ranks.prod(0).sum(1)[scale > 0] / scale[scale > 0]  # without draws of one mixer alone: they have no order
    means = [[statistics.fmean(side[name]) for name in common] for side in (ours, theirs)]
    low, high = np.percentile(found, [2.5, 97.5])
    rho = float(spearmanr(*means).statistic)
    return Correlation(len(common), rho, float(low), float(high))


def pairs_as_published(mixer: str, ours: Tops, published: list[Tops]) -> tuple[int, int]:
    """In how many pairs with another mixer ours are ordered as a published table has them, and of how many pairs."""
    agree = total = 0
    for theirs in published:
        for other in (theirs.keys() & ours.keys()) - {mixer} if mixer in theirs else ():
            here, there = (statistics.fmean(t[mixer]) - statistics.fmean(t[other]) for t in (ours, theirs))
            total += there != 0
            agree += here * there > 0
    return agree, total


def published_tops(setting: str) -> Tops:
    """The published numbers of a setting. Raises ``UserError`` for one without."""
    return {cell.mixer: [cell.top1] for cell in select(setting=setting, numbered=True) if cell.top1 is not None}


def places(mixer: str, among: set[str], published: list[Tops]) -> list[int]:
    """The mixer's place, from 1, in each published table that has it, among the mixers of ``among``."""
    found = []
    for theirs in published:
        if mixer in theirs:
            ranked = sorted(theirs.keys() & among, key=lambda name: -statistics.fmean(theirs[name]))
            found.append(ranked.index(mixer) + 1)
    return found
