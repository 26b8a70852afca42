"""Images as grids of cells: their saliency, one label per cell, images put together from cells.

Labels minimise a sum of costs per cell and per pair of neighbours: what a graph cut does image by image on the CPU,
here a batch at a time on the device, without a loop over samples and without reading a value. B grids of h x w cells, L
labels. ``down`` (B, h-1, w) weighs a cell and the one below it, ``right`` (B, h, w-1) a cell and the one on its right.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out


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


def binary(
    gain: Float[Tensor, "B h w"], down: Float[Tensor, "B h-1 w"], right: Float[Tensor, "B h w-1"]
) -> Int[Tensor, "B h w"]:
    """The y in {0, 1} that minimises ``sum gain*y + sum weight*|y - y'|`` over neighbours. Exact.

    Dynamic programming over cells in reading order. The state is the last label of each column, so there are ``2**w``
    of them; per cell half as many numbers are kept to walk back.
    """
    batch, height, width = gain.shape
    own = torch.stack([torch.zeros_like(gain), gain], 3)  # by the cell's label, and by that of the cell on its left
    pair = torch.stack([own, own], 3)
    pair[:, :, 1:, 0, 1] += right
    pair[:, :, 1:, 1, 0] += right
    pair, down = (t.flatten(1, 2).movedim(0, -1).contiguous() for t in (pair, down))  # batch last: long runs in memory
    least = gain.new_zeros(2**width, batch)  # the least cost so far, by state
    worse = gain.new_empty(
        (height - 1) * width, 2 ** (width - 1), batch
    )  # by how much 1 above a cell costs more than 0
    for cell, costs in enumerate(pair.unbind()):
        row, column = divmod(cell, width)
        zero, one = least.view(2**column, 2, -1, batch).unbind(1)
        if row:  # forget the label above: the better one counts
            above = down[cell - width]
            torch.sub(one, zero, out=worse[cell - width].view_as(one))
            from_zero = zero + above
            torch.minimum(zero, one + above, out=zero)
            torch.minimum(one, from_zero, out=one)
        else:
            one.copy_(zero)
        if column:
            least.view(2 ** (column - 1), 2, 2, -1, batch).add_(costs[:, :, None])
        else:
            one += costs[0, 1]
    state = least.argmin(0)
    labels = []
    for cell in reversed(range(height * width)):
        bit = width - 1 - cell % width
        shifted = state >> bit
        label = shifted & 1
        labels.append(label)
        if cell >= width:
            above = down[cell - width]
            rest = state - (shifted + 1 >> 1 << bit)  # the state without this column
            one = worse[cell - width].gather(0, rest[None])[0] < torch.where(label == 1, above, -above)
            state = state + (one.long() - label << bit)
    return torch.stack(labels[::-1], 1).view(batch, height, width)


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
    """
    labels = torch.full_like(slope, len(prior) - 1, dtype=torch.int64)
    step = prior.roll(1) - prior  # lowering from l changes the prior by step[l]
    for _ in range(len(prior) - 1):
        gain = step[labels] - slope
        pull = 2 * down * labels.diff(dim=1)  # what lowering the lower cell, not the upper one, saves
        gain[:, 1:] -= pull
        gain[:, :-1] += pull
        pull = 2 * right * labels.diff(dim=2)
        gain[:, :, 1:] -= pull
        gain[:, :, :-1] += pull
        labels = labels - binary(gain, down, right)
    return labels


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
    turned = costs.transpose(1, 2)
    down_turned, right_turned = (None if t is None else t.transpose(1, 2) for t in (down, right))
    pairwise = pairwise.expand(len(costs), -1, -1)
    labels = costs.argmin(3)
    for _ in range(rounds):
        labels = relabel_rows(labels, costs, pairwise, down, right)
        labels = relabel_rows(labels.transpose(1, 2), turned, pairwise, right_turned, down_turned).transpose(1, 2)
    return labels


def relabel_rows(labels: Tensor, costs: Tensor, pairwise: Tensor, down: Tensor | None, right: Tensor | None) -> Tensor:
    """One half of a round: even rows, then odd rows."""
    (batch, height), levels = labels.shape[:2], costs.shape[3]
    by_label = pairwise.flatten(0, 1)
    offset = torch.arange(0, batch * levels, levels, device=labels.device).view(-1, 1, 1)
    labels = labels.clone()
    for first in range(min(2, height)):
        imposed = F.pad(by_label[labels + offset], (0, 0, 0, 0, 1, 1))  # on a neighbour, by its label; none at the rim
        above, below = imposed[:, first:height:2], imposed[:, first + 2 :: 2]
        if down is not None:
            weights = F.pad(down, (0, 0, 1, 1))[..., None]
            above, below = weights[:, first:height:2] * above, weights[:, first + 1 :: 2] * below
        weight = right if right is None else right[:, first::2]
        labels[:, first::2] = best_lines(costs[:, first::2] + above + below, pairwise[:, None], weight)
    return labels


def best_lines(
    costs: Float[Tensor, "B n w L"], pairwise: Float[Tensor, "B 1 L L"], weight: Float[Tensor, "#B n w-1"] | None
) -> Int[Tensor, "B n w"]:
    """The best labels of lines of w cells, each by itself. (Viterbi. IEEE Transactions on Information Theory, 1967.)"""
    best, *others = costs.unbind(2)
    arrivals = []
    for column, own in enumerate(others):
        link = pairwise if weight is None else weight[:, :, column, None, None] * pairwise
        arrivals.append(best[:, :, None] + link)  # by the label arrived at, then by that before it
        best = arrivals[-1].amin(3) + own
    label = best.argmin(2, keepdim=True)
    labels = [label]
    for arrival in reversed(arrivals):
        arrived = label[..., None].expand(-1, -1, 1, arrival.shape[3])
        label = arrival.gather(2, arrived)[:, :, 0].argmin(2, keepdim=True)
        labels.append(label)
    return torch.cat(labels[::-1], 2)


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
