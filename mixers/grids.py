"""Images as grids of cells: their saliency, one label per cell, images put together from cells.

Labels minimise a sum of costs per cell and per pair of neighbours. A graph cut does this image by image on the CPU.
Here it is done a batch at a time on the device, without a loop over samples and, but on a CPU, without reading a value.
There are B grids of h x w cells and L labels. ``down`` (B, h-1, w) weighs a cell and the one below it, ``right`` (B, h,
w-1) a cell and the one on its right.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out

TIE = 1e-6  # sums that are nearer are equal
BOUNDS = 8  # rounds of narrowing the labels: more close few gaps


def learn_and_mix(
    mixer: Mixer,
    clean_lam: float,
    model: nn.Module,
    criterion: Criterion,
    x: Float[Tensor, "B C H W"],
    y: Float[Tensor, "B K"],
    rng: np.random.Generator,
) -> Out:
    """A step whose look at the clean batch is learned from too, ``clean_lam`` times its loss."""
    ops.check_batch(x, y)
    clean: list[Tensor] = []

    def look(images: Tensor) -> Tensor:
        loss, gradient = taps.clean_pass(model, criterion, images, y)
        clean.append(clean_lam * loss)
        return gradient

    plan = mixer.plan(x, y, rng, look)
    mixed, target = mixer.mix(x, y, **plan)
    logits = model(mixed)
    return Out.of(logits, target, plan, mix=criterion(logits, target), clean=clean[0])


def at_hand(tensor: Tensor) -> bool:
    """Whether values can be read, and what they say be left out, without waiting for a device."""
    return tensor.device.type == "cpu"


def quick(*tensors: Tensor) -> tuple[Any, ...]:
    """``numpy`` and arrays on a CPU, where its calls take a third of the time of torch's, else ``torch`` and tensors.

    For code in words that both know, such as ``less``, ``minimum`` and ``add`` with ``out``, ``take`` and ``argmin``.
    """
    return (np, *(t.numpy() for t in tensors)) if at_hand(tensors[0]) else (torch, *tensors)


def binary(
    gain: Float[Tensor, "B h w"], down: Float[Tensor, "B h-1 w"], right: Float[Tensor, "B h w-1"]
) -> Int[Tensor, "B h w"]:
    """The y in {0, 1} that minimises ``sum gain*y + sum weight*|y - y'|`` over neighbours. Exact.

    Dynamic programming over cells in reading order, of the upper half and of the lower one upside down, at once. The
    state is the labels of the last w cells as the digits of a number, the newest last. Per cell, state and label it is
    kept which label of the cell above was the better one, to walk back.
    """
    batch, height, width = gain.shape
    if height % 2:  # a row more, where nothing costs anything
        gain, down, right = (F.pad(t, (0, 0, 0, 1)) for t in (gain, down, right))
    rows, half, lefts = gain.shape[1] // 2, 2 ** (width - 1), min(2, width)
    gain, down, right = (t.movedim(0, -1).contiguous() for t in (gain, down, right))  # batch last: long runs in memory
    own = gain[:, :, None].repeat(1, 1, lefts, 1)  # by the label on the left, what a 1 costs more than a 0
    for dim, weight in ((0, down), (1, right)):  # w*|y - y'| = w*y + w*y' - 2w*y*y'
        own.narrow(dim, 0, weight.shape[dim]).add_(weight[:, :, None])
        own.narrow(dim, 1, weight.shape[dim]).add_(weight[:, :, None])
    own[:, 1:, -1] -= 2 * right
    own, bonds = (torch.cat([torch.cat([t[k], t[-1 - k]], -1) for k in range(rows)]) for t in (own, 2 * down))
    middle, bonds = bonds[-width:, :batch], bonds[:-width]
    tables = gain.new_empty(2, 2 * half, 2 * batch)  # the least cost so far by state, before a cell and after it
    spare = gain.new_empty(half, 2 * batch)
    choice = torch.empty((rows - 1) * width, half, 2, 2 * batch, dtype=torch.bool, device=gain.device)
    meeting = torch.empty(width, half, 2, batch, dtype=torch.bool, device=gain.device)
    sample = torch.arange(2 * batch, device=gain.device)
    on, own, bonds, middle, tables, spare, choice, meeting, sample = quick(
        own, bonds, middle, tables, spare, choice, meeting, sample
    )
    least, other = tables
    least[0] = 0
    for cell in range(width):  # the first row: nothing above, so the states become more
        shape = (-1, min(2, 2**cell), 2 * batch)
        known, cost = least[: 2**cell].reshape(shape), own[cell, : shape[1]]
        states = other[: 2 ** (cell + 1)].reshape(-1, shape[1], 2, 2 * batch)
        states[:, :, 0] = known
        on.add(known, cost, out=states[:, :, 1])
        least, other = other, least
    for bond, cost, better in zip(bonds, own[width:], choice, strict=True):
        zero, one = least[:half], least[half:]  # by the label above
        states = other.reshape(half, 2, -1)
        on.subtract(one, bond, out=spare)
        on.less(one, zero, out=better[:, 0])
        on.less(spare, zero, out=better[:, 1])
        on.minimum(one, zero, out=states[:, 0])
        on.minimum(spare, zero, out=spare)
        on.add(spare.reshape(-1, lefts, 2 * batch), cost, out=states.reshape(-1, lefts, 2, 2 * batch)[:, :, 1])
        least, other = other, least
    upper, lower = least[:, :batch] + 0, least[:, batch:]
    for bond, better in zip(middle, meeting, strict=True):  # the upper half, by the labels of the first row below it
        zero, one = upper[:half], upper[half:]
        near = one - bond
        on.less(one, zero, out=better[:, 0])
        on.less(near, zero, out=better[:, 1])
        upper = on.stack([on.minimum(one, zero), on.minimum(near, zero)], 1).reshape(2 * half, batch)
    below = state = (upper + lower).argmin(0)
    for better in reversed(meeting):
        state = (state >> 1) + half * better.take(state * batch + sample[:batch])
    state = on.concatenate([state, below])
    states = []
    for better in reversed(choice):
        states.append(state)
        state = (state >> 1) + half * better.take(state * (2 * batch) + sample)
    states += [state >> place for place in range(width)]
    labels = torch.as_tensor(on.stack(states[::-1]) & 1).view(rows, width, 2, batch)
    return torch.cat([labels[:, :, 0], labels[:, :, 1].flip(0)])[:height].movedim(-1, 0)


def descent(
    slope: Float[Tensor, "B h w"],
    prior: Float[Tensor, " L"],
    down: Float[Tensor, "B h-1 w"],
    right: Float[Tensor, "B h w-1"],
) -> Int[Tensor, "B h w"]:
    """The labels l in 0 ... L-1 that minimise ``sum (slope*l + prior[l]) + sum weight*(l - l')^2`` over neighbours.

    Exact for a convex prior and weights of at least 0: the energy is L-natural convex, so L-1 steps of steepest descent
    from the top end in a minimum, each lowering by 1 the best set of cells, which is a binary problem. (Murota.
    Discrete Convex Analysis. 2003; one step: Kolmogorov and Shioura. Discrete Optimization 6, 2009.)

    On a CPU, where values may be read, bounds on the labels come first: from an upper bound a sample takes as many
    steps as its bounds are apart.
    """
    top, on_cpu = len(prior) - 1, at_hand(slope)
    step = prior.roll(1) - prior  # lowering from l changes the prior by step[l]
    step[0] = torch.inf
    lowest, labels = bounds(slope, prior, down, right) if on_cpu else (0, torch.full_like(slope, top).long())
    apart = (labels - lowest).amax((1, 2))
    for turn in range(top):
        left: Any = (apart > turn).nonzero()[:, 0] if on_cpu else slice(None)  # samples that are not done
        if on_cpu and not len(left):
            break
        now, below, beside = labels[left], down[left], right[left]
        gain = step[now] - slope[left]
        pull = 2 * below * now.diff(dim=1)  # what lowering the lower cell, not the upper one, saves
        gain[:, 1:] -= pull
        gain[:, :-1] += pull
        pull = 2 * beside * now.diff(dim=2)
        gain[:, :, 1:] -= pull
        gain[:, :, :-1] += pull
        labels[left] = now - binary(gain, below, beside)
    return labels


def bounds(slope: Tensor, prior: Tensor, down: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Labels between which the least minimiser of ``descent`` lies: what suits each cell best beside such neighbours.

    Higher neighbours never make a lower label better, so bounds on the neighbours give bounds on the cell. On a CPU.
    """
    pull, below, beside = (t.movedim(0, -1).repeat(1, 1, 2).numpy() for t in (slope / -2, down, right))
    total = np.zeros_like(pull)
    for end in (slice(1, None), slice(-1)):
        total[end] += below
        total[:, end] += beside
    ups = [(rise + (2 * label + 1) * total) / 2 for label, rise in enumerate(np.diff(prior.numpy()))]
    labels = np.zeros_like(pull)  # the lower bounds, then the upper ones
    labels[:, :, len(slope) :] = len(ups)
    for _ in range(BOUNDS):
        sums = pull.copy()
        sums[1:] += below * labels[:-1]
        sums[:-1] += below * labels[1:]
        sums[:, 1:] += beside * labels[:, :-1]
        sums[:, :-1] += beside * labels[:, 1:]
        labels = sum((sums > up).astype(sums.dtype) for up in ups)
    low, high = torch.from_numpy(labels).long().movedim(-1, 0).chunk(2)
    return low, high


def sweeps(
    costs: Float[Tensor, "B h w L"],
    pairwise: Float[Tensor, "#B L L"],
    down: Float[Tensor, "#B #h-1 #w"] | None = None,
    right: Float[Tensor, "#B #h #w-1"] | None = None,
    rounds: int = 4,
) -> Int[Tensor, "B h w"]:
    """Labels that make ``sum costs[l] + sum weight*pairwise[l, l']`` over neighbours small; ``pairwise`` is symmetric.

    From the best label of each cell alone, in ``rounds`` rounds: all even rows at once, each the best that it can be
    given the others, then all odd rows, even columns, odd columns. The sum never rises; where it ends need not be the
    minimum. For grids and numbers of labels that are too large for more. Weights are 1 where none are given.
    """
    batch = len(costs)
    between = [weight.expand(batch, -1, -1) for weight in (down, right) if weight is not None]
    grid = torch.arange(batch, device=costs.device)[:, None, None]
    on, grid, costs, pairwise, *weights = quick(grid, costs, pairwise.expand(batch, -1, -1), *between)
    return torch.as_tensor(swept(on, grid, costs, pairwise, weights, rounds))


def swept(
    on: Any, grid: Any, costs: Any, pairwise: Any, weights: Sequence[Any], rounds: int, twice: bool = False
) -> Any:
    """``sweeps`` in words of ``quick``: ``grid`` counts the grids, (B, 1, 1), ``weights`` are none or two.

    ``twice``, without weights: also from the one label that is best for the whole grid, and of each grid the labels of
    the smaller sum are taken. numpy leaves out labels that cannot win anywhere, as others cost less by more than all
    boundaries of a cell could, and stops when nothing changes.
    """
    able = None
    if on is np and not weights:
        wins = (costs <= costs.min(3, keepdims=True) + 4 * np.ptp(pairwise)).any((1, 2))
        able = (~wins).argsort(1, kind="stable")[:, : wins.sum(1).max()]  # in order, as ties go to the first
        costs = costs[grid[:, 0], :, :, able].transpose(0, 2, 3, 1).copy()
        pairwise = pairwise[grid, able[:, :, None], able[:, None]]
    labels = costs.argmin(3)
    size = len(labels)
    if twice:
        one = labels * 0 + costs.sum((1, 2)).argmin(1)[:, None, None]
        labels, costs, pairwise = (on.concatenate(pair) for pair in ((labels, one), (costs, costs), (pairwise,) * 2))
        grid = on.concatenate((grid, grid + size))
    halves = []  # of a round: even rows, odd rows, even columns, odd columns
    for turn in (False, True):
        field, own, *between = (t.swapaxes(1, 2) if turn else t for t in (labels, costs, *weights))
        across, along = (between[::-1] if turn else between) or (None, None)
        for first in range(min(2, field.shape[1])):
            weight = None if along is None else along[:, first::2]
            touching = neighbours(field.shape[1], first)
            halves.append((field[:, first::2], field[:, 1 - first :: 2], own[:, first::2], touching, across, weight))
    settled = 0  # so many of the last would change nothing now
    for lines, others, own, touching, across, along in halves * rounds:
        imposed, local = pairwise[grid, others], own + 0
        for here, there, boundary in touching:
            local[:, here] += times(None if across is None else across[:, boundary], imposed[:, there])
        found = lines + 0
        best_lines(on, grid, local, pairwise, along, found)
        if on is np:
            settled = 1 if (found != lines).any() else settled + 1
        lines[:] = found
        if settled == len(halves):
            break
    if twice:
        total = sums(grid, costs, pairwise, labels)
        better = total[size:] + TIE < total[:size]
        grid, labels = grid[:size], on.where(better[:, None, None], labels[size:], labels[:size])
    return labels if able is None else able[grid, labels]


def sums(grid: Any, costs: Any, pairwise: Any, labels: Any) -> Any:
    """What ``swept`` makes small, of each grid (B,), without weights."""
    rows, columns = np.indices(labels.shape[1:])
    down = pairwise[grid, labels[:, 1:], labels[:, :-1]].sum((1, 2))
    return (
        costs[grid, rows, columns, labels].sum((1, 2))
        + down
        + pairwise[grid, labels[:, :, 1:], labels[:, :, :-1]].sum((1, 2))
    )


@functools.cache
def neighbours(height: int, first: int) -> list[tuple[slice, slice, slice]]:
    """Of every second line: which have a line above them, which of the other lines that is, and the boundary between.

    Then the same for the line below. ``first``: where the lines begin, 0 or 1.
    """
    lines, others, found = len(range(first, height, 2)), len(range(1 - first, height, 2)), []
    for shift in (first - 1, first):
        start, stop = max(0, -shift), min(lines, others - shift)
        boundary = slice(2 * start + shift, 2 * stop + shift, 2)
        found.append((slice(start, stop), slice(start + shift, stop + shift), boundary))
    return found


def best_lines(on: Any, grid: Any, costs: Any, pairwise: Any, weights: Any, found: Any) -> None:
    """Write the best labels of lines of w cells, each by itself, into ``found``: from both ends to the middle and back.

    (Viterbi. IEEE Transactions on Information Theory, 1967.)
    """
    width, levels = costs.shape[2:]
    half = width // 2
    if not half:
        found[:] = costs.argmin(3)
        return
    least = np.minimum.reduce if on is np else torch.amin
    two = ends_of(width)
    best = [costs[:, :, two[0]]]
    for k in range(1, half):
        link = times(weights, pairwise[:, None, None], slice(k - 1, width - k, width - 2 * k))
        # numpy reduces fastest over the dimension that is outermost in memory
        room = np.empty((levels, *best[-1].shape), costs.dtype).transpose(1, 2, 3, 0, 4) if on is np else None
        best.append(least(on.add(best[-1][..., None], link, out=room), 3) + costs[:, :, two[k]])
    left, right = best[-1][:, :, 0], best[-1][:, :, 1]
    if width % 2:
        left = least(left[..., None] + times(weights, pairwise[:, None], half - 1), 2) + costs[:, :, half]
    total = left[..., None] + times(weights, pairwise[:, None], width - 1 - half)
    total += right[:, :, None]
    both = total.reshape(*found.shape[:2], levels * levels).argmin(2)
    found[:, :, (width - 1) // 2], found[:, :, width - half] = both // levels, both % levels
    if width % 2:
        link = times(weights, pairwise[grid[:, 0], found[:, :, half]], half - 1)
        found[:, :, half - 1] = (best[-1][:, :, 0] + link).argmin(2)
    for k in reversed(range(half - 1)):
        link = times(weights, pairwise[grid, found[:, :, two[k + 1]]], slice(k, width - 1 - k, width - 2 - 2 * k))
        found[:, :, two[k]] = (best[k] + link).argmin(3)


@functools.cache
def ends_of(width: int) -> list[slice]:
    """The first and the last column, the second and the last but one, ..."""
    return [slice(k, width - k, width - 1 - 2 * k) for k in range(width // 2)]


def times(weights: Any, prices: Any, where: Any = slice(None)) -> Any:
    """Prices (B, n, ...) times the weights (B, n, w) ``where`` in their last dimension, if there are any."""
    if weights is None:
        return prices
    weights = weights[:, :, where]
    return weights.reshape(*weights.shape, *(1,) * (prices.ndim - weights.ndim)) * prices


def saliency_map(gradient: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
    """The root mean square over channels, up to a factor per image that keeps squares from vanishing."""
    largest = torch.maximum(gradient.amax((1, 2, 3)), -gradient.amin((1, 2, 3)))
    return (gradient / largest[:, None, None, None]).square().mean(1).sqrt().nan_to_num(0.0, 0.0, 0.0).float()


def block_saliency(s: Float[Tensor, "B H W"], grid: int) -> Float[Tensor, "B b b"]:
    """Saliency of blocks, of sum 1 per image; an image without any has the same everywhere."""
    cells = F.adaptive_avg_pool2d(s[:, None], grid)[:, 0]
    total = cells.sum((1, 2), keepdim=True)
    return torch.where(total > 0, cells / total.clamp(min=torch.finfo(cells.dtype).tiny), 1 / grid**2)


def mosaic(x: Float[Tensor, "n C H W"], image: Int[Tensor, "#B #g #g"], cells: Int[Tensor, "#B g g"]) -> Tensor:
    """Images (B, C, H, W) put together from blocks: at each place block ``cells`` of x[image], counted row by row."""
    grid = cells.shape[1]
    height, width = x.shape[2:]
    even = height % grid == 0 and width % grid == 0
    if not even:  # blocks of one size, the smaller ones with their last pixels twice
        rows, columns = (places(length, grid) for length in (height, width))
        x = x[:, :, ops.send(rows.ravel(), x)][:, :, :, ops.send(columns.ravel(), x)]
    blocks = x.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).permute(0, 2, 4, 1, 3, 5)
    which = image * grid**2 + cells
    found = ops.gather(blocks.flatten(1, 2).flatten(0, 1), which.flatten()).unflatten(0, which.shape)
    found = found.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    if not even:
        found = found[:, :, ops.send(inside(rows), x)][:, :, :, ops.send(inside(columns), x)]
    return found


def cell_of(length: int, grid: int) -> np.ndarray:
    """Which of ``grid`` cells each of ``length`` places lies in."""
    return np.arange(length) * grid // length


def places(length: int, grid: int) -> np.ndarray:
    """The places of each cell (grid, p): p is that of the largest cell, others repeat their last place."""
    cells = cell_of(length, grid)
    first = np.searchsorted(cells, np.arange(grid))
    last = np.searchsorted(cells, np.arange(grid), side="right") - 1
    return np.minimum(first[:, None] + np.arange((last - first).max() + 1), last[:, None])


def inside(places: np.ndarray) -> np.ndarray:
    """Where in the raveled ``places`` each place comes first."""
    return np.unique(places.ravel(), return_index=True)[1]
