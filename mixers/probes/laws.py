"""Probes of the laws of lambda and of the pairing."""

import numpy as np
import torch
from scipy import stats

from .bench import BATCH, HEIGHT, WIDTH, Bench, Finding, entry, noise

LEVEL = 1e-4  # a correct sampler fails a law once in ten thousand seeds; the seeds are fixed


@entry("law of lambda")
def law(bench: Bench) -> Finding:
    """A blend's share against Beta(alpha, alpha), a box's against the paper's law with clipping, where declared."""
    subject = bench.subject
    alphas: list[float | None] = [*subject.alphas] or [None]
    known = bench.kinds == {"blend"} or (bench.kinds == {"box"} and subject.boxes_as_cutmix)
    texts, holds = [], True
    for alpha in alphas:
        lam = lambdas(bench, alpha)
        outside = f"{100 * ((lam < 0.01) | (lam > 0.99)).mean():.1f} % outside [.01, .99]"
        text = f"mean {lam.mean():.3f}, {outside}"
        if bench.kinds == {"blend"} and (lam.min() >= 0.4999 or lam.max() <= 0.5001):
            text += ", folded"
        if alpha is not None and known:
            expected, p = judge(lam, alpha, bench.kinds == {"box"})
            text = f"{text}, p {p:.1g}".replace(",", f" (law: {expected:.3f}),", 1)
            holds = holds and p > LEVEL
        texts.append(text if alpha is None else f"alpha {alpha:g}: {text}")
    return Finding(holds if subject.alphas and known else None, "; ".join(texts))


def lambdas(bench: Bench, alpha: float | None) -> np.ndarray:
    """The own shares of the labels: one per batch when all samples share it, else one per mixed sample."""
    per_batch, per_sample, shared = [], [], True
    for _, target in bench.calls(noise(), bench.subject.draws, alpha):
        own = target.diagonal()
        moved = own[own < 1]
        # a whole batch that stays as it is has lambda 1: that each is its own partner has a chance of 1 in 40,320
        per_batch.append(moved[0].item() if len(moved) else 1.0)
        per_sample += moved.tolist()
        shared = shared and (not len(moved) or (moved - moved[0]).abs().max().item() < 1e-4)
    return np.array(per_batch if shared else per_sample)


def judge(lam: np.ndarray, alpha: float, box: bool) -> tuple[float, float]:
    """Expected mean, and how likely a sample this far from the law is: the lesser p of two tests, doubled.

    Kolmogorov and Smirnov's test of the distribution, and a z test of the mean.
    """
    beta = stats.beta(alpha, alpha)
    lam = np.sort(lam)
    if box:
        points, chance = box_law(HEIGHT, WIDTH, alpha)
        mean = float(points @ chance)
        spread = float(np.sqrt(points**2 @ chance - mean**2))
        gaps = np.searchsorted(lam, points + 1e-6) / len(lam) - chance.cumsum()
    else:
        points = lam[(lam > 1e-6) & (lam < 1 - 1e-6)]  # nearer to the ends float32 rounds to 0 and 1
        mean, spread = 0.5, float(beta.std())
        sides = [np.searchsorted(lam, points, side) / len(lam) for side in ("left", "right")]
        gaps = np.concatenate(sides) - np.tile(beta.cdf(points), 2)
    # for a law of single values, such as the box's, this p is an upper bound
    p = float(stats.kstwo.sf(np.abs(gaps).max(initial=0), len(lam)))
    z = abs(lam.mean() - mean) / (spread / np.sqrt(len(lam)))
    return mean, min(1.0, 2 * min(p, float(2 * stats.norm.sf(z))))


def box_law(height: int, width: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Own shares that CutMix's clipped box leaves, ascending, and the exact chance of each.

    Half sides are ``floor(side*sqrt(1-lam0)) // 2`` with ``lam0 ~ Beta(alpha, alpha)``, the centre is uniform on the
    pixels (Yun et al., https://arxiv.org/abs/1905.04899, and its code).
    """
    halves = {0.0, 1.0} | {2 * k / side for side in (height, width) for k in range(1, side // 2 + 1)}
    steps = np.array(sorted(halves))  # values of sqrt(1-lam0) at which a half side grows
    below = stats.beta(alpha, alpha).sf(1 - steps**2)
    areas = np.zeros(height * width + 1)
    for start, chance in zip(steps[:-1], np.diff(below), strict=True):
        sides = []
        for side in (height, width):
            half, centre = int(side * (start + 1e-9)) // 2, np.arange(side)
            sides.append(np.minimum(centre + half, side) - np.maximum(centre - half, 0))
        np.add.at(areas, np.multiply.outer(*sides).ravel(), chance / (height * width))
    own = 1 - np.arange(height * width + 1) / (height * width)
    return own[::-1], areas[::-1]


@entry("one lambda per")
def shared_lambda(bench: Bench) -> Finding:
    """Whether the samples of a batch share their lambda."""
    for _, target in bench.calls(noise(), 50):
        own = target.diagonal()
        moved = own[own < 1]
        if len(moved) > 1 and (moved - moved[0]).abs().max() > 1e-4:
            return Finding(None, "sample")
    return Finding(None, "batch")


@entry("pairing")
def pairing(bench: Bench) -> Finding:
    """Who is mixed with whom, how many with themselves, and whether every image is used once as a partner."""
    drawn = []
    for _, target in bench.calls(noise(), 300):
        others = target[:, :BATCH].clone().fill_diagonal_(0)
        if others.max() > 0.01:
            share, partner = others.max(1)
            drawn.append(tuple(torch.where(share > 1e-4, partner, torch.arange(BATCH)).tolist()))
    if not drawn:
        return Finding(None, "none")
    own = tuple(range(BATCH))
    rolls = {tuple((i + k) % BATCH for i in own): f"roll by {-k}" for k in (1, -1)}
    known = {own[::-1]: "flip"} | rolls
    if len(set(drawn)) == 1:
        text = known.get(drawn[0], "always the same")
    else:
        text = "random permutation" if all(len(set(d)) == BATCH for d in drawn) else "random, some images used twice"
    fixed = np.mean([sum(a == b for a, b in zip(d, own, strict=True)) for d in drawn])
    return Finding(None, f"{text}, {fixed:.2f} of {BATCH} with themselves")
