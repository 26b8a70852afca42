"""PuzzleMix against its definition: loops over blocks and boundaries, brute force, and a graph cut."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixers import CoMixup, PuzzleMix, Step, grids, taps
from mixers.grids import block_saliency, mosaic, places, saliency_map
from mixers.puzzlemix import transported
from mixers.testing import batch, tiny_step

CRITERION = nn.CrossEntropyLoss(reduction="none")


def random_problem(count: int, grid: int, levels: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Costs of the size that PuzzleMix has: saliency of sum 1, weights of about beta/16b, a binomial prior."""
    rng = np.random.default_rng((seed, grid, levels))
    saliency = rng.dirichlet(np.full(grid**2, 0.5), (2, count)).reshape(2, count, grid, grid)
    lam, top = rng.uniform(0.001, 0.999), levels - 1
    chance = [math.comb(top, n) * lam ** (top - n) * (1 - lam) ** n for n in range(levels)]
    scale = 1.2 / 16 / grid / top**2
    down, right = (scale * rng.uniform(0.5, 1.5, (count, grid - a, grid - b)) for a, b in ((1, 0), (0, 1)))
    prior = -0.2 / grid**2 * np.log(chance)
    return tuple(torch.from_numpy(v).float() for v in ((saliency[0] - saliency[1]) / top, prior, down, right))


def energy(labels: Tensor, slope: Tensor, prior: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The sum that is minimised, (B,), in float64."""
    slope, prior, down, right, level = (t.double() for t in (slope, prior, down, right, labels))
    alone = (slope * level + prior[labels]).sum((1, 2))
    return alone + (down * level.diff(dim=1) ** 2).sum((1, 2)) + (right * level.diff(dim=2) ** 2).sum((1, 2))


@pytest.mark.parametrize(("grid", "levels"), [(2, 2), (2, 3), (2, 4), (3, 2), (3, 3)])
def test_masks_of_small_grids_have_the_least_energy_of_all_labellings(grid: int, levels: int) -> None:
    problem = random_problem(40, grid, levels, seed=0)
    found = energy(grids.descent(*problem), *problem)
    every = torch.tensor(list(itertools.product(range(levels), repeat=grid**2))).view(-1, grid, grid)
    slope, prior, down, right = problem
    for i in range(40):
        one = slope[i : i + 1], prior, down[i : i + 1], right[i : i + 1]
        assert found[i] == pytest.approx(energy(every, *one).min().item(), abs=1e-6)


def test_one_step_of_the_descent_is_optimal_for_any_weights() -> None:
    rng = torch.Generator().manual_seed(0)
    gain, down, right = (torch.randn(30, *s, generator=rng) for s in ((3, 4), (2, 4), (3, 3)))
    flat = torch.zeros(2)
    found = energy(grids.binary(gain, down, right), gain, flat, down, right)
    every = torch.tensor(list(itertools.product(range(2), repeat=12))).view(-1, 3, 4)
    for i in range(30):
        best = energy(every, gain[i : i + 1], flat, down[i : i + 1], right[i : i + 1]).min()
        assert found[i] == pytest.approx(best.item(), abs=1e-5)


@pytest.mark.parametrize("grid", [4, 8])
def test_no_graph_cut_finds_a_mask_of_less_energy(grid: int) -> None:
    gco = pytest.importorskip("gco", reason="gco-wrapper, of the extra oracle, is not installed")
    slope, prior, down, right = problem = random_problem(64, grid, 3, seed=1)
    unary = slope[..., None] * torch.arange(3) + prior
    units = 2**18  # integers: with floating-point labels gco overflows
    costs, below, beside = ((units * t).round().int().numpy() for t in (unary, down, right))
    between = np.array([[0, 1, 4], [1, 0, 1], [4, 1, 0]], dtype=np.int32)
    cuts = [gco.cut_grid_graph(costs[i], between, below[i], beside[i], algorithm="swap") for i in range(64)]
    cut = torch.from_numpy(np.stack(cuts)).long().view(64, grid, grid)
    labels = grids.descent(*problem)
    assert (energy(labels, *problem) <= energy(cut, *problem) + 1e-6).all()
    assert (labels == cut).float().mean() > 0.95


@pytest.mark.parametrize(("grid", "levels"), [(2, 2), (3, 3), (4, 4), (5, 3), (8, 3)])
def test_what_a_device_computes_without_reading_values_is_the_same(grid: int, levels: int, monkeypatch) -> None:
    slope, prior, down, right = problem = random_problem(30, grid, levels, seed=3)
    level = torch.arange(float(levels))
    field = slope[..., None] * level + prior, (level[:, None] - level)[None] ** 2
    moved = slope.abs(), slope > 0, 0.1

    def everything() -> list[Tensor]:
        solved = [grids.descent(*problem), grids.sweeps(*field), grids.sweeps(*field, down, right)]
        return [*solved, transported(*moved)]

    here = everything()
    monkeypatch.setattr(grids, "at_hand", lambda tensor: False)
    for one, other in zip(here, everything(), strict=True):
        assert torch.equal(one, other)


def test_sweeps_come_close_to_the_optimum_and_never_below() -> None:
    slope, prior, down, right = problem = random_problem(64, 8, 3, seed=2)
    level = torch.arange(3.0)
    labels = grids.sweeps(slope[..., None] * level + prior, (level[:, None] - level)[None] ** 2, down, right)
    least = energy(grids.descent(*problem), *problem)
    found = energy(labels, *problem)
    assert (found >= least - 1e-6).all()
    assert (found < least + 0.01 * least.abs() + 0.005).all()
    assert (labels == grids.descent(*problem)).float().mean() > 0.9


def energy_by_definition(
    z: np.ndarray, x: Tensor, s: Tensor, i: int, j: int, b: int, lam: float, mixer: PuzzleMix
) -> float:
    """Of one sample, from the paper's formula: what is lost, prior, and the four kinds of boundary."""
    pixels = [x[n].double().numpy() * np.array(mixer.std)[:, None, None] for n in (i, j)]
    height, width = x.shape[2] // b, x.shape[3] // b
    shares = []
    for n in (i, j):
        cells = s[n].double().numpy().reshape(b, height, b, width).mean((1, 3))
        shares.append(cells / cells.sum())
    total = (z * shares[1] + (1 - z) * shares[0]).sum()
    top = mixer.n_labels - 1
    for value in z.ravel():
        shown = round(top * value)
        total -= mixer.eta / b**2 * math.log(math.comb(top, shown) * lam**shown * (1 - lam) ** (top - shown))
    scale = mixer.beta / b / 16

    def strips(image: np.ndarray, r: int, c: int, where: str) -> np.ndarray:
        block = image[:, r * height : (r + 1) * height, c * width : (c + 1) * width]
        if where in ("left", "right"):
            block = block.transpose(0, 2, 1)
        depth, along = min(mixer.neigh_size, block.shape[1]), min(mixer.neigh_size, block.shape[2])
        rows = block[:, -depth:] if where in ("bottom", "right") else block[:, :depth]
        return rows.mean(1).reshape(3, -1, along).mean(2)

    edges = [((r, c), (r + 1, c), "bottom", "top") for r in range(b - 1) for c in range(b)]
    edges += [((r, c), (r, c + 1), "right", "left") for r in range(b) for c in range(b - 1)]
    for first, second, before, behind in edges:
        d = {
            (m, n): np.abs(strips(pixels[m], *first, before) - strips(pixels[n], *second, behind)).mean()
            for m in (0, 1)
            for n in (0, 1)
        }
        u, v = z[first], z[second]
        spread = mixer.gamma * scale
        total += spread * (u * (d[0, 0] + d[0, 1]) + (1 - u) * (d[1, 0] + d[1, 1])) / 2
        total += spread * (v * (d[0, 0] + d[1, 0]) + (1 - v) * (d[0, 1] + d[1, 1])) / 2
        weight = spread * (d[0, 1] + d[1, 0] - d[0, 0] - d[1, 1]) / 2 + scale
        total += weight * (u - v) ** 2
    return total


@pytest.mark.parametrize("mixer", [PuzzleMix(), PuzzleMix(n_labels=4, neigh_size=2, gamma=1.0, beta=3.0, eta=0.5)])
@pytest.mark.parametrize("grid", [2, 4])
def test_costs_are_those_of_the_definition(mixer: PuzzleMix, grid: int) -> None:
    """Energies of random labellings differ by what the formula says, up to a constant per sample."""
    rng = torch.Generator().manual_seed(grid)
    x, s = torch.rand(4, 3, 32, 48, generator=rng), torch.rand(4, 32, 48, generator=rng)
    index = torch.tensor([2, 0, 3, 1])
    problem = mixer.costs(x, s, index, grid, 0.3)
    top = mixer.n_labels - 1
    for i in range(4):
        one = problem[0][i : i + 1], problem[1], problem[2][i : i + 1], problem[3][i : i + 1]
        labels = torch.randint(0, top + 1, (5, grid, grid), generator=rng)
        found = energy(labels, *one)
        expected = [
            energy_by_definition(1 - row.numpy() / top, x, s, i, int(index[i]), grid, 0.3, mixer) for row in labels
        ]
        torch.testing.assert_close(
            found - found[0], torch.tensor(expected).double() - expected[0], atol=2e-6, rtol=1e-4
        )


def transported_slowly(saliency: Tensor, shown: Tensor, cost: float) -> list[int]:
    """The rule as loops over the blocks of one image: whose block ends where, its own where nobody claims."""
    side = len(saliency)
    spots = np.array(list(np.ndindex(side, side)))
    price = cost * ((spots[:, None] - spots) ** 2).sum(2) / (side - 1) ** 2
    price -= (saliency.view(-1, 1) * shown.view(1, -1)).numpy()
    for _ in range(side):
        claims: dict[int, list[int]] = {}
        for i, j in enumerate(price.argmin(1).tolist()):
            claims.setdefault(j, []).append(i)
        holders = {j: min(rivals, key=lambda i: price[i, j]) for j, rivals in claims.items()}
        for j, rivals in claims.items():
            price[[i for i in rivals if i != holders[j]], j] += 1
    return [holders.get(j, j) for j in range(len(spots))]


@pytest.mark.parametrize("side", [2, 4, 8])
def test_blocks_move_as_the_rule_says_and_every_shown_place_is_claimed_once(side: int) -> None:
    rng = np.random.default_rng(side)
    saliency = torch.from_numpy(rng.dirichlet(np.full(side**2, 0.5), 40)).view(40, side, side)
    shown = torch.from_numpy(rng.random((40, side, side)) < 0.5)
    for cost in (0.8, 0.01):
        found = transported(saliency, shown, cost)
        for i in range(40):
            assert found[i].flatten().tolist() == transported_slowly(saliency[i], shown[i], cost)
            sources = found[i][shown[i]].tolist()
            assert len(set(sources)) == len(sources)
    assert (found != torch.arange(side**2).view(side, side)).any()


def test_moved_blocks_are_whole_and_where_they_belong() -> None:
    x = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    cells = torch.stack([torch.arange(16).flip(0).view(4, 4), torch.arange(16).roll(3).view(4, 4)])
    found = mosaic(x, torch.arange(2)[:, None, None], cells)
    for n, r, c in itertools.product(range(2), range(4), range(4)):
        p, q = divmod(int(cells[n, r, c]), 4)
        expected = x[n, :, 2 * p : 2 * p + 2, 3 * q : 3 * q + 3]
        assert torch.equal(found[n, :, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3], expected)


@pytest.mark.parametrize(("height", "width"), [(150, 150), (8, 8), (31, 45), (10, 100)])
def test_images_that_the_grid_does_not_divide_keep_their_size_and_labels_count_pixels(height: int, width: int) -> None:
    x = torch.rand(3, 3, height, width)
    still = torch.arange(64).view(1, 8, 8).expand(3, -1, -1)
    assert torch.equal(mosaic(x, torch.arange(3)[:, None, None], still), x)
    for line in places(height, 8):
        assert all(0 <= p < height for p in line)
    y, makers = torch.eye(3), (lambda: PuzzleMix(blocks=(8, 5)), CoMixup)
    for make, seed in itertools.product(makers, range(3)):
        step = tiny_step(make, classes=3)
        plan = step.mixer.plan(x, y, np.random.default_rng(seed), step.model, CRITERION)
        constant = torch.eye(3)[:, :, None, None].expand(3, 3, height, width)
        mixed, target = step.mixer.mix(constant, y, **plan)
        torch.testing.assert_close(mixed.mean((2, 3)), target, atol=1e-4, rtol=0)


def test_masks_have_the_levels_blocks_and_share_that_were_drawn_also_at_the_ends(monkeypatch) -> None:
    step, (x, y) = tiny_step(PuzzleMix), batch(size=6, height=32, width=48)
    seen: list[int] = []
    drawn, found = [], []
    for seed in range(60):
        drawn.append(np.random.default_rng(seed).beta(1.0, 1.0))
        plan = step.mixer.plan(x, y, np.random.default_rng(seed), step.model, CRITERION)
        assert set(plan["mask"].unique().tolist()) <= {0.0, 0.5, 1.0}
        grid = plan["own"].shape[1]
        seen.append(grid)
        cells = plan["mask"][:, 0].unflatten(2, (grid, -1)).unflatten(1, (grid, -1))
        assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))
        found.append(plan["mask"].mean().item())
    assert set(seen) == {2, 4, 8} and min(map(seen.count, (2, 4, 8))) >= 10
    assert np.corrcoef(drawn, found)[0, 1] > 0.85
    for lam in (0.0, 1.0):
        monkeypatch.setattr("mixers.ops.beta", lambda a, b, rng, lam=lam: lam)
        plan = step.mixer.plan(*batch(), np.random.default_rng(0), step.model, CRITERION)
        assert abs(plan["mask"].mean().item() - lam) < 0.1
        assert step.mixer.mix(*batch(), **plan)[0].isfinite().all()


def test_saliency_is_the_root_mean_square_and_survives_tiny_constant_and_broken_gradients() -> None:
    gradient = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = block_saliency(gradient.square().mean(1).sqrt(), 4)
    torch.testing.assert_close(block_saliency(saliency_map(gradient * 1e-30), 4), whole)
    gradient[0], gradient[1, 0, 0, 0], gradient[2] = 0, math.nan, math.inf
    found = block_saliency(saliency_map(gradient), 4)
    torch.testing.assert_close(found[:3], torch.full((3, 4, 4), 1 / 16))
    torch.testing.assert_close(found[3:], whole[3:])
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(5))


@pytest.mark.parametrize("make", [lambda: PuzzleMix(clean_lam=0.7), lambda: CoMixup(clean_lam=0.7)])
def test_the_clean_loss_is_learned_like_a_loss_of_its_own_and_gives_the_saliency_of_training_mode(make) -> None:
    x, y = batch()
    step, plain = (tiny_step(make) for _ in range(2))
    expected = taps.saliency(plain.model, CRITERION, x, y, training=True)
    loss, gradient = taps.clean_pass(plain.model, CRITERION, x, y)
    torch.testing.assert_close(gradient, expected)
    assert all(p.grad is None for p in plain.model.parameters())

    plain = tiny_step(PuzzleMix)
    out = step(x, y, np.random.default_rng(0))
    out.loss.backward()
    clean = CRITERION(plain.model(x), y).mean()  # first the clean batch: its statistics come first
    mixed = CRITERION(plain.model(step.mixer.mix(x, y, **out.plan)[0]), out.target).mean()
    (0.7 * clean + mixed).backward()
    assert set(out.logs) == {"mix", "clean"}
    torch.testing.assert_close(out.logs["clean"], 0.7 * clean.detach())
    torch.testing.assert_close(loss.detach(), clean.detach())
    for (name, p), q in zip(step.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name, rtol=1e-4, atol=1e-6)
    for (name, p), q in zip(step.model.named_buffers(), plain.model.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_a_criterion_that_returns_the_mean_gives_the_same_gradients() -> None:
    x, y = batch()
    found = []
    for criterion in (CRITERION, nn.CrossEntropyLoss()):
        step = tiny_step(lambda: PuzzleMix(clean_lam=0.7))
        step.criterion = criterion
        assert torch.equal(taps.saliency(step.model, criterion, x, y), taps.saliency(step.model, CRITERION, x, y))
        step(x, y, np.random.default_rng(0)).loss.backward()
        found.append([p.grad for p in step.model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_adversarial_noise_stays_within_its_size_and_the_range_of_images() -> None:
    std, mean = (torch.tensor(v)[:, None, None] for v in ((0.229, 0.224, 0.225), (0.485, 0.456, 0.406)))
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x, y = (pixels - mean) / std, torch.eye(5)[:4]
    step = tiny_step(lambda: PuzzleMix(adv_p=1.0, adv_eps=0.1, transport=False))
    plan = step.mixer.plan(x, y, np.random.default_rng(0), step.model, CRITERION)
    assert plan["noisy"] == [True, True]
    assert 0 < plan["noise"].abs().max() <= 0.1
    mixed = step.mixer.mix(x, y, **plan)[0] * std + mean
    assert mixed.min() >= -1e-5 and mixed.max() <= 1 + 1e-5
    blend = plan["mask"] * pixels + (1 - plan["mask"]) * pixels[plan["index"]]
    assert 0 < (mixed - blend).abs().max() <= 0.1 + 1e-5
    often = tiny_step(lambda: PuzzleMix(adv_p=0.3, blocks=(2,), transport=False))
    flags = [often.mixer.plan(x, y, np.random.default_rng(i), often.model, CRITERION)["noisy"] for i in range(100)]
    assert 0.15 < np.mean([a for a, _ in flags]) < 0.45 and 0.15 < np.mean([b for _, b in flags]) < 0.45


def test_without_transport_the_step_is_a_blend_by_the_mask() -> None:
    step, (x, y) = tiny_step(lambda: PuzzleMix(transport=False)), batch()
    plan = step.mixer.plan(x, y, np.random.default_rng(3), step.model, CRITERION)
    assert plan["own"] is None and plan["partner"] is None
    mixed, target = step.mixer.mix(x, y, **plan)
    m, index = plan["mask"], plan["index"]
    torch.testing.assert_close(mixed, m * x + (1 - m) * x[index])
    lam = m.mean((1, 2, 3))[:, None]
    torch.testing.assert_close(target, lam * y + (1 - lam) * y[index])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": ()}, "blocks must be integers of at least 2"),
        ({"blocks": (1, 2)}, "blocks must be integers of at least 2"),
        ({"n_labels": 5}, "n_labels must be one of 2, 3, 4"),
        ({"gamma": 1.5}, "gamma must be a number of at least 0 and at most 1"),
        ({"t_size": 0}, "t_size must be a whole number of pixels, at least 1, got 0"),
        ({"neigh_size": True}, "neigh_size must be a whole number of pixels, at least 1, got True"),
        ({"alpha": 0.0}, "alpha must be a number above 0"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be a number of at least"),
        ({"adv_p": 2.0}, "adv_p must be"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PuzzleMix(**arguments)


def test_only_rgb_and_only_with_a_look(model: nn.Module) -> None:
    step = Step(model, PuzzleMix(), CRITERION)
    with pytest.raises(ValueError, match="needs RGB images"):
        step(torch.zeros(2, 1, 32, 32), torch.eye(5)[:2], np.random.default_rng(0))
    with pytest.raises(ValueError, match="needs a look at the model"):
        step.mixer.plan(torch.zeros(2, 3, 32, 32), torch.eye(5)[:2], np.random.default_rng(0))
