"""One label per cell of small grids: the sum of costs per cell and per pair of neighbours is minimised, a batch at a time.

What a graph cut does image by image on the CPU; here on the device, without a loop over samples and without reading a
value. B grids of h x w cells with L labels each. ``down`` (B, h-1, w) weighs a cell and the one below it, ``right``
(B, h, w-1) a cell and the one right of it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
    from the top end in a minimum, each lowering by 1 the best set of cells, which is a binary problem. (Murota. Discrete
    Convex Analysis. 2003; one step: Kolmogorov and Shioura. Discrete Optimization 6, 2009.)
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
    down: Float[Tensor, "#B h-1 w"],
    right: Float[Tensor, "#B h w-1"],
    rounds: int = 4,
) -> Int[Tensor, "B h w"]:
    """Labels that make ``sum costs[l] + sum weight*pairwise[l, l']`` over neighbours small; ``pairwise`` is symmetric.

    From the best label of each cell alone, in ``rounds`` rounds: all even rows at once, each the best that it can be
    given the others, then all odd rows, even columns, odd columns. The sum never rises; where it ends need not be the
    minimum. For grids and numbers of labels that are too large for more.
    """
    labels = costs.argmin(3)
    for _ in range(rounds):
        labels = relabel_rows(labels, costs, pairwise, down, right)
        labels, swapped = labels.transpose(1, 2), costs.transpose(1, 2)
        labels = relabel_rows(labels, swapped, pairwise, right.transpose(1, 2), down.transpose(1, 2)).transpose(1, 2)
    return labels


def relabel_rows(labels: Tensor, costs: Tensor, pairwise: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """One half of a round: even rows, then odd rows."""
    sample = torch.arange(len(pairwise), device=labels.device)[:, None, None]
    for first in range(min(2, labels.shape[1])):
        imposed = pairwise[sample, labels]  # on a neighbour, by its label
        field = costs.clone()
        field[:, 1:] += down[..., None] * imposed[:, :-1]
        field[:, :-1] += down[..., None] * imposed[:, 1:]
        labels = labels.clone()
        labels[:, first::2] = best_lines(field[:, first::2], pairwise, right[:, first::2])
    return labels


def best_lines(
    costs: Float[Tensor, "B n w L"], pairwise: Float[Tensor, "#B L L"], weight: Float[Tensor, "#B n w-1"]
) -> Int[Tensor, "B n w"]:
    """The best labels of lines of w cells, each by itself. (Viterbi. IEEE Transactions on Information Theory, 1967.)"""
    best, origins = costs[:, :, 0], []
    for column in range(1, costs.shape[2]):
        link = weight[:, :, column - 1, None, None] * pairwise[:, None]
        best, origin = (best[..., None] + link).min(2)
        best = best + costs[:, :, column]
        origins.append(origin)
    label = best.argmin(2)
    labels = [label]
    for origin in reversed(origins):
        label = origin.gather(2, label[..., None])[..., 0]
        labels.append(label)
    return torch.stack(labels[::-1], 2)
