"""Co-Mixup against the loop that its paper describes, one mosaic and one cell at a time."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixers import CoMixup, grids, taps
from mixers.comixup import pushed
from mixers.testing import batch, tiny_step

CRITERION = nn.CrossEntropyLoss(reduction="none")


def random_problem(parts: int, m: int, grid: int, seed: int, flat: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Costs, compatibility and first labels like Co-Mixup's, in float64, without ties. ``flat``: of the saliency."""
    rng = np.random.default_rng((seed, m, grid))
    costs = -rng.dirichlet(np.full(grid**2, flat), (parts, m)).reshape(parts, m, grid, grid)
    costs -= 0.05 / grid**2 * np.log(rng.dirichlet(np.full(m, 2.0), parts) + 1e-8)[:, :, None, None]
    distance = rng.uniform(0, 50, (parts, m, m))
    distance = (distance + distance.transpose(0, 2, 1)) * (1 - np.eye(m))
    compatible = 0.999 * np.eye(m) + 0.001 * m * distance / distance.sum((1, 2), keepdims=True).clip(1)
    labels = rng.integers(m, size=(parts, m, grid, grid))
    return torch.from_numpy(costs), torch.from_numpy(compatible), torch.from_numpy(labels)


def prices_of_boundaries(halves: list[tuple[int, int]], m: int) -> np.ndarray:
    """Between labels: 0 for the same, a quarter between a half and one of its two images, 1 otherwise."""
    price = 1 - np.eye(m + len(halves))
    for i, members in enumerate(halves):
        for j in members:
            price[m + i, j] = price[j, m + i] = 0.25
    return price


def energy(labels: np.ndarray, costs: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Of mosaics (..., g, g): costs (g, g, L) of what is shown, and prices of boundaries."""
    rows, columns = np.indices(labels.shape[-2:])
    down = price[labels[..., 1:, :], labels[..., :-1, :]].sum((-2, -1))
    across = price[labels[..., 1:], labels[..., :-1]].sum((-2, -1))
    return costs[rows, columns, labels].sum((-2, -1)) + down + across


def serial(solve, mixer: CoMixup, costs: np.ndarray, compatible: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """One part as the paper has it: shares (m, g, g, m) of the images in the cells of the mosaics."""
    m, grid = labels.shape[:2]
    cells = grid * grid
    shares = np.eye(m)[labels]
    push = np.zeros((m, m))
    for turn in range(mixer.niter):
        for i in range(m):
            crowd = compatible @ (sum(shares[o].sum((0, 1)) for o in range(m) if o != i) + np.zeros(m))
            over = crowd > mixer.thres * cells
            excess = crowd - mixer.thres * cells if mixer.thres_type == "soft" else crowd
            price = (costs + (mixer.gamma / cells * (2 * excess * over + push[i]))[:, None, None]).transpose(1, 2, 0)
            used = shares[i].sum((0, 1))
            who = sorted(range(m), key=lambda j: -used[j])[:3]
            halves = list(itertools.combinations([j for j in who if used[j] > 0], 2)) if turn else []
            for a, b in halves:
                price = np.concatenate([price, ((price[:, :, a] + price[:, :, b]) / 2 - 5e-4)[:, :, None]], 2)
            meaning = np.eye(m)[[[j, j] for j in range(m)] + [list(pair) for pair in halves]].mean(1)
            shares[i] = meaning[solve(price, mixer.beta / cells * prices_of_boundaries(halves, m), turn > 0)]
        if turn == mixer.niter - 2 and mixer.set_resolve:
            sets = [tuple(np.flatnonzero(s.sum((0, 1)))) for s in shares]
            for a, b in itertools.combinations(range(m), 2):
                if sets[a] == sets[b] and len(sets[a]) > 1:
                    push[a, sets[a][0]] = push[b, sets[b][1]] = 1
    return shares


def by_sweeps(costs: np.ndarray, price: np.ndarray, twice: bool) -> np.ndarray:
    """From the best label of each cell, and from the best one for all: those of less energy, else the first."""
    starts = [costs.argmin(2), np.full(costs.shape[:2], costs.sum((0, 1)).argmin())][: 1 + twice]
    found = [by_sweeps_from(labels, costs, price) for labels in starts]
    return min(found, key=lambda labels: energy(labels, costs, price) + 1e-6 * (labels is not found[0]))


def by_sweeps_from(labels: np.ndarray, costs: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Rows and columns in turn, each solved by trying every labelling of a line through a table."""
    size = len(labels)
    for _, axis, first in itertools.product(range(2), (0, 1), (0, 1)):
        grid, field = (labels, costs) if axis == 0 else (labels.T, costs.transpose(1, 0, 2))
        lines = {}
        for row in range(first, size, 2):
            local = field[row] + sum(price[grid[r]] for r in (row - 1, row + 1) if 0 <= r < size)
            least, paths = local[0], [[label] for label in range(len(price))]
            for own in local[1:]:
                total = least[:, None] + price
                least, paths = total.min(0) + own, [[*paths[j], k] for k, j in enumerate(total.argmin(0))]
            lines[row] = paths[least.argmin()]
        for row, line in lines.items():
            grid[row] = line  # a view of labels
    return labels


SOFT = CoMixup(thres_type="soft", set_resolve=False, thres=0.4)
SOLVED = [(CoMixup(), 20, 4), (CoMixup(niter=3), 16, 4), (SOFT, 5, 3), (CoMixup(beta=1.0, gamma=0.3), 6, 2)]
SOLVED += [(CoMixup(), 2, 4), (CoMixup(), 1, 4)]


@pytest.mark.parametrize(("mixer", "m", "grid"), SOLVED)
def test_all_parts_at_once_give_what_the_loop_gives_part_by_part_also_unread(mixer, m, grid, monkeypatch):
    for seed in range(2):
        problem = random_problem(3, m, grid, seed)
        solved = mixer.solve(*problem)
        with monkeypatch.context() as patch:
            patch.setattr(grids, "at_hand", lambda tensor: False)  # what a device computes
            assert all(map(torch.equal, mixer.solve(*problem), solved))
        found = sum(np.eye(m)[labels] for labels in solved) / 2
        for part in range(3):
            assert np.array_equal(found[part], serial(by_sweeps, mixer, *(t[part].numpy() for t in problem)))


def swept(costs: np.ndarray, price: np.ndarray, twice: bool = True) -> np.ndarray:
    return np.asarray(grids.swept(np, np.zeros((1, 1, 1), int), costs[None], price[None], (), 2, twice))[0]


def test_labels_of_small_mosaics_are_those_of_least_energy():
    rng, price = np.random.default_rng(0), 0.32 / 6 * prices_of_boundaries([(0, 1)], 3)
    every = np.array(list(itertools.product(range(4), repeat=6))).reshape(-1, 2, 3)
    same = 0
    for _ in range(30):
        costs = -rng.dirichlet(np.full(6, 0.5), 3).reshape(3, 2, 3).transpose(1, 2, 0)
        costs = np.concatenate([costs, costs[:, :, :2].mean(2, keepdims=True) - 5e-4], 2)
        same += energy(swept(costs, price), costs, price) < energy(every, costs, price).min() + 1e-9
    assert same >= 28


def test_a_graph_cut_finds_the_same_labels_and_rarely_better_ones():
    """On the first problems the same; of those along the way, where swaps stop early, the sum of energies is less."""
    gco = pytest.importorskip("gco", reason="gco-wrapper, of the extra oracle, is not installed")
    gaps = []

    def both(costs: np.ndarray, price: np.ndarray, twice: bool = True) -> np.ndarray:
        side = len(costs)
        weights = [np.ones((side - 1, side), np.int32), np.ones((side, side - 1), np.int32)]
        whole = [np.ascontiguousarray((2**20 * v).round().astype(np.int32)) for v in (costs, price)]
        cut, found = (
            gco.cut_grid_graph(*whole, *weights, algorithm="swap").reshape(side, side),
            swept(costs, price, twice),
        )
        same = np.array_equal(cut, found)
        gaps.append(0 if same else energy(found, costs, price) - energy(cut, costs, price))
        return found

    for seed in range(30):
        both(random_problem(1, 20, 4, seed)[0][0].movedim(0, 2).numpy(), 0.02 * prices_of_boundaries([], 20))
    assert gaps.count(0) >= 28 and max(gaps) < 1e-5
    gaps.clear()
    for flat, more in ((0.5, 0.05), (2, 0.07), (30, 0.05)):  # the saliency of a photo; the last almost as flat as noise
        gaps.clear()
        for problem in zip(*random_problem(2, 20, 4, seed=5, flat=flat), strict=True):
            serial(lambda *given: both(*given[:2]), CoMixup(), *(t.numpy() for t in problem))
        assert len(gaps) == 160 and gaps.count(0) >= 0.65 * 160
        assert sum(gap > 1e-5 for gap in gaps) <= more * 160 and sum(gaps) < 0


def test_equal_mosaics_of_several_images_are_pushed_apart():
    used = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0]]]).bool()
    assert pushed(used)[0].int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("stride", [1, 8])
def test_compatibility_is_the_distance_of_the_most_salient_windows(stride):
    mixer = CoMixup(omega=0.1, stride=stride)
    saliency = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    found = mixer.compatibility(saliency)
    tops = list(itertools.product(range(0, 24 - 7, stride), range(0, 32 - 7, stride)))
    for part in range(2):
        best = [max(tops, key=lambda t, s=s: s[t[0] : t[0] + 8, t[1] : t[1] + 8].sum().item()) for s in saliency[part]]
        spots = torch.tensor(best) // stride
        d = (spots[:, None] - spots).abs().sum(2)
        torch.testing.assert_close(found[part], 0.9 * torch.eye(3) + 0.1 * 3 * d / d.sum())
    torch.testing.assert_close(mixer.compatibility(torch.zeros(1, 2, 16, 16))[0], 0.9 * torch.eye(2))


def test_costs_are_saliency_and_a_dirichlet_prior_and_first_labels_and_grids_are_drawn(monkeypatch):
    (x, y), given, rng = batch(size=5), [], np.random.default_rng(3)
    step = tiny_step(lambda: CoMixup(part=3, clean_lam=0.0, alpha=0.7, eta=0.3))
    monkeypatch.setattr(CoMixup, "solve", lambda mixer, *problem: given.append(problem) or (problem[2], problem[2]))
    step.mixer.plan(x, y, np.random.default_rng(3), step.model, CRITERION)
    gradient = taps.saliency(step.model, CRITERION, x, y).double().square().mean(1).sqrt()
    for (costs, _, labels), images in zip(given, ((0, 1, 2), (3, 4)), strict=True):
        m = len(images)
        prior, drawn = rng.dirichlet(np.full(m, 0.7), 1), rng.integers(m, size=(1, m, 4, 4))
        assert np.array_equal(labels, drawn)
        for k, i in enumerate(images):
            cells = gradient[i].unflatten(1, (4, -1)).unflatten(0, (4, -1)).mean((1, 3))
            expected = -cells / cells.sum() - 0.3 / 16 * math.log(prior[0, k] + 1e-8)
            torch.testing.assert_close(costs[0, k].double(), expected, rtol=1e-4, atol=1e-6)
    mixer, gradient = CoMixup(block_num=None, clean_lam=0.0), torch.ones_like
    seen = [mixer.plan(x[:2], y[:2], np.random.default_rng(i), gradient)["first"].shape[1] for i in range(40)]
    assert set(seen) == {2, 4, 8, 16} and min(map(seen.count, (2, 4, 8, 16))) >= 4


@pytest.mark.parametrize(("size", "part"), [(7, 3), (4, 20), (1, 20), (6, 3), (5, 4)])
def test_mosaics_show_halves_of_images_of_their_part_and_labels_count_cells(size, part):
    (x, _), y = batch(size, 32, 48), torch.eye(8)[:size]
    step = tiny_step(lambda: CoMixup(part=part, beta=0.1), classes=8)
    plan = step(x, y, np.random.default_rng(0)).plan
    mixed, target = step.mixer.mix(x, y, **plan)
    for n in range(size):
        both, start = [plan[which][n].flatten() for which in ("first", "second")], n - n % part
        assert all(images.min() >= start and images.max() < min(size, start + part) for images in both)
        torch.testing.assert_close(target[n], sum(y[images].mean(0) for images in both) / 2)
        for r, c in np.ndindex(4, 4):
            here = (slice(None), slice(8 * r, 8 * r + 8), slice(12 * c, 12 * c + 12))
            shown = sum(x[images[4 * r + c]][here] for images in both) / 2
            torch.testing.assert_close(mixed[n][here], shown)
    assert size > 1 or torch.equal(mixed, x)
