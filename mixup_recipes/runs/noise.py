"""Is a difference real? A verdict on a reproduction, and an interval for the difference of two methods."""

import math
import statistics
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

REPRODUCED, OFF, EARLY = "reproduced within the band", "off", "too early to say"
PRIOR = 8  # degrees of freedom that the expected spread over seeds is worth


class Verdict(NamedTuple):
    """Our runs against a published number, in percent; None without a finished run, and ``std`` with fewer than two."""

    status: str
    mean: float | None
    std: float | None
    difference: float | None
    """Ours minus published."""
    band: float
    """Half width: differences up to it are noise."""


def verdict(values: list[float], published: float, trials: int, images: int) -> Verdict:
    """Whether our runs differ from a published number by more than noise.

    ``values``: top-1 in percent of finished runs, one per seed; ``published``: mean over ``trials`` runs;
    ``images``: size of the evaluation set.

    Both numbers come from the same images and, if the recipe is the same, from the same distribution of runs: what
    makes them differ is the seed alone, with variance sigma^2 (1/n + 1/trials). sigma is estimated from few runs, often
    from one or two, where Student's t alone would call almost anything reproduced (t = 12.7 for two runs). So it is
    pooled with what is expected before any run: the binomial deviation of the evaluation set, p the published
    share,

        sigma_b = 100 sqrt(p (1 - p) / images)
        sigma^2 = (8 sigma_b^2 + (n - 1) s^2) / (8 + n - 1)
        band    = t(.975, 8 + n - 1) sigma sqrt(1/n + 1/trials),

    the 95 % interval for a scaled inverse chi-squared prior of 8 degrees of freedom (the moderated t of Smyth 2004).
    sigma_b is a careful guess: if seeds flipped images independently of each other, the deviation over seeds,
    sqrt(mean p_i (1 - p_i) / images) with p_i the share of seeds right on image i, could not be above it.

    One run beyond the band is too early to say, not off: its spread was never seen.
    """
    if not 0 <= published <= 100 or trials < 1 or images < 1:
        raise ValueError(f"expected a percentage, trials and images, not {published}, {trials}, {images}")
    n = max(1, len(values))
    share = published / 100
    expected = 100 * math.sqrt(share * (1 - share) / images)
    std = statistics.stdev(values) if len(values) > 1 else None
    freedom = PRIOR + n - 1
    sigma = math.sqrt((PRIOR * expected**2 + (n - 1) * (std or 0) ** 2) / freedom)
    band = float(stdtrit(freedom, 0.975)) * sigma * math.sqrt(1 / n + 1 / trials)
    if not values:
        return Verdict(EARLY, None, None, None, band)
    mean = statistics.fmean(values)
    difference = mean - published
    status = REPRODUCED if abs(difference) <= band else OFF if len(values) > 1 else EARLY
    return Verdict(status, mean, std, difference, band)


def paired_bootstrap(
    a: NDArray[np.bool_], b: NDArray[np.bool_], rng: np.random.Generator, n: int = 10_000
) -> tuple[float, float, float]:
    """Top-1 of a minus that of b in percentage points, and its 95 % percentile interval from ``n`` resamples.

    ``a`` (seeds, images), ``b`` (seeds, images): which images the runs of two methods got right, in the same order.
    Images are drawn with replacement, the same for all runs, and so are the runs of a method that has more than one:
    S - 1 of S, which makes the variance of their mean unbiased (Rao and Wu 1988);
    for two or three runs the interval is still on the narrow side. With one run each it speaks of these two networks,
    not of the methods.

    Images on which all runs agree pairwise are interchangeable: only how often each pattern occurs is drawn, which is
    the same law with little memory.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ValueError(f"expected arrays (seeds, images) of the same images, not {a.shape} and {b.shape}")
    images = a.shape[1]
    patterns, counts = np.unique(np.vstack([a, b]), axis=1, return_counts=True)
    right_a, right_b = patterns[: len(a)].astype(float), patterns[len(a) :].astype(float)
    difference = (right_a.mean(0) - right_b.mean(0)) @ counts / images
    drawn = []
    for start in range(0, n, step := max(1, 2_000_000 // len(counts))):  # 16 MB an array
        size = min(step, n - start)
        weights = rng.multinomial(images, counts / images, size) / images
        gain = draw_seeds(len(a), size, rng) @ right_a - draw_seeds(len(b), size, rng) @ right_b
        drawn.append((weights * gain).sum(1))
    low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5))
    return 100 * float(difference), 100 * float(low), 100 * float(high)


def paired_bootstrap_map(
    label: NDArray, a: NDArray, b: NDArray, rng: np.random.Generator, n: int = 1000
) -> tuple[float, float, float]:
    """``paired_bootstrap`` of mAP, where an image may have several labels.

    ``label`` (images, K) of 0 and 1; ``a`` and ``b`` (seeds, images, K) probabilities. The mAP of a resample is over
    the classes that have images in it.
    """
    if label.ndim != 2 or any(found.shape[1:] != label.shape for found in (a, b)) or not a.size or not b.size:
        raise ValueError(f"expected arrays (seeds, images, K) of the same images, not {a.shape} and {b.shape}")
    images = len(label)
    once = np.ones((1, images))
    difference = sum(weighted_map(label, s, once)[0] / len(a) for s in a)
    difference -= sum(weighted_map(label, s, once)[0] / len(b) for s in b)
    drawn = []
    for start in range(0, n, step := max(1, 1_000_000 // images)):  # 8 MB an array
        size = min(step, n - start)
        weights = rng.multinomial(images, np.full(images, 1 / images), size).astype(float)
        of_a, of_b = (np.stack([weighted_map(label, s, weights) for s in found], 1) for found in (a, b))
        gain = (draw_seeds(len(a), size, rng) * of_a).sum(1) - (draw_seeds(len(b), size, rng) * of_b).sum(1)
        drawn.append(gain)
    low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5))
    return 100 * float(difference), 100 * float(low), 100 * float(high)


def weighted_map(label: NDArray, score: NDArray, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R,) mean average precision where each image counts ``weights`` (R, images) times; 0 without any label."""
    total, classes = np.zeros(len(weights)), np.zeros(len(weights))
    for k in np.flatnonzero(label.any(0)):
        order = np.argsort(-score[:, k], kind="stable")
        ordered, drawn = score[order, k], weights[:, order]
        last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(order) - 1)  # of each different score
        right, seen = np.cumsum(drawn * label[order, k], 1)[:, last], np.cumsum(drawn, 1)[:, last]
        precision = np.divide(right, seen, out=np.zeros_like(right), where=seen > 0)
        area, there = (np.diff(right, axis=1, prepend=0.0) * precision).sum(1), right[:, -1]
        total += np.divide(area, there, out=np.zeros_like(area), where=there > 0)
        classes += there > 0
    return total / classes.clip(min=1)


def draw_seeds(seeds: int, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Weights (size, seeds) of the runs in each resample; a single run keeps its weight."""
    draws = max(1, seeds - 1)
    return rng.multinomial(draws, np.full(seeds, 1 / seeds), size) / draws
