"""Classifiers that are read off frozen features: nearest neighbours and a linear one.

``neighbours``: the weighted k nearest neighbours of Wu et al. 2018, https://arxiv.org/abs/1805.01978, with the figures
that DINO (Caron et al. 2021) made usual: each of the k training images of the largest cosine similarity votes for its
class with exp(similarity / 0.07).

``regression``: multinomial logistic regression on features that are standardised to mean 0 and standard deviation 1
over the training images: the mean cross-entropy plus l2 / 2 times the sum of the squared weights, without the bias,
minimised by L-BFGS. The minimum is unique, so there is no seed in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixup_recipes.runs.features import Features

KS, TEMPERATURE = (10, 20, 100, 200), 0.07
GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The l2 that are tried."""
LARGE = 2**28  # features times images, from which on the regression is in float32
AT_ONCE = 2**27  # similarities
APART = 5  # one of so many training images of a class is kept apart to choose l2


def rates(scores: Tensor, labels: Tensor, votes: bool = False) -> dict[str, float]:
    """Top-1 and top-5 in percent. ``scores`` (N, K); of equal ones the class of the lower number stands first.

    ``votes``: scores are votes, and a class that has none is not among the first five.
    """
    own = scores.gather(1, labels[:, None])
    before = (scores > own) | ((scores == own) & (torch.arange(scores.shape[1]) < labels[:, None]))
    place = before.sum(1)
    if votes:
        place[own[:, 0] <= 0] = scores.shape[1] + 5
    return {f"top{k}": 100 * (place < k).double().mean().item() for k in (1, 5)}


def neighbours(
    train: Features, asked: Features, classes: int, ks: Sequence[int], temperature: float, device: torch.device
) -> dict[int, Tensor]:
    """The votes (N, classes) for each image by its k nearest training images, for each k, at most as many as there are.

    In float64, on the host.
    """
    bank, labels = F.normalize(train.x.to(device)), train.y.to(device)
    ks = list(dict.fromkeys(min(k, len(bank)) for k in ks))
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for some in F.normalize(asked.x).split(max(1, AT_ONCE // len(bank))):
        near = (some.to(device) @ bank.T).topk(max(ks))
        nearest = near.values[:, :1].double()  # as shares of its vote, which a small temperature cannot make infinite
        weights, voted = ((near.values.double() - nearest) / temperature).exp(), labels[near.indices]
        for k in ks:
            sums = torch.zeros(len(some), classes, dtype=torch.float64, device=device)
            votes[k].append(sums.scatter_add_(1, voted[:, :k], weights[:, :k]).cpu())
    return {k: torch.cat(parts) for k, parts in votes.items()}


class Linear(NamedTuple):
    """A linear classifier on features."""

    mean: Tensor
    """(D,)."""
    std: Tensor
    """(D,), 1 where a feature never changes."""
    weight: Tensor
    """(D, K), of standardised features."""
    bias: Tensor
    """(K,)."""

    def __call__(self, x: Tensor) -> Tensor:
        """Features (N, D) on the host to logits (N, K) there."""
        x = x.to(self.mean)
        return ((x - self.mean) / self.std @ self.weight + self.bias).cpu()


def regression(train: Features, classes: int, l2: float, device: torch.device) -> Linear:
    """The linear classifier of the training images, in float64, or in float32 where there are very many numbers."""
    dtype = torch.float32 if train.x.numel() > LARGE else torch.float64
    x, y = train.x.to(device, dtype), train.y.to(device)
    mean, std = x.mean(0), x.std(0, correction=0)
    std = std.where(std > 1e-6 * mean.abs() + 1e-12, 1.0)  # what never changes differs from its mean by rounding
    x = (x - mean) / std
    weight = torch.zeros(x.shape[1], classes, dtype=dtype, device=device, requires_grad=True)
    bias = torch.zeros(classes, dtype=dtype, device=device, requires_grad=True)
    exact = dtype == torch.float64
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        tolerance_grad=1e-7 if exact else 1e-5,
        tolerance_change=1e-14 if exact else 1e-9,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        solver.zero_grad()
        found = F.cross_entropy(x @ weight + bias, y) + l2 / 2 * weight.square().sum()
        found.backward()
        return found.item()

    solver.step(loss)
    return Linear(mean, std, weight.detach(), bias.detach())


def chosen(train: Features, classes: int, device: torch.device) -> float:
    """The l2 of ``GRID`` whose classifier of four fifths of the training images is best on the rest of them.

    Best is the highest top-1, and of equals the lowest cross-entropy. In the middle of the grid where each class has
    one image.
    """
    apart = kept_apart(train.y)
    if not apart.any():
        return GRID[len(GRID) // 2]
    fitted, rest = (Features(train.x[rows], train.y[rows], 0) for rows in (~apart, apart))

    def quality(l2: float) -> tuple[float, float]:
        scores = regression(fitted, classes, l2, device)(rest.x)
        return rates(scores, rest.y)["top1"], -F.cross_entropy(scores, rest.y).item()

    return max(GRID, key=quality)


def kept_apart(labels: Tensor) -> Tensor:
    """Which rows are kept apart, (N,), the same each time: a fifth, and at least one, of each class of two or more."""
    rng, found = np.random.default_rng(0), torch.zeros(len(labels), dtype=torch.bool)
    for k in labels.unique().tolist():
        rows = (labels == k).nonzero()[:, 0].numpy()
        if len(rows) > 1:
            found[rng.permutation(rows)[: max(1, len(rows) // APART)]] = True
    return found
