"""PuzzleMix against its definition: loops over blocks and boundaries, brute force, and a graph cut."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixers import CoMixup, PuzzleMix, grids, taps
from mixers.grids import block_saliency, mosaic, places, saliency_map
from mixers.puzzlemix import transported
from mixers.testing import batch, tiny_step

CRITERION = nn.CrossEntropyLoss(reduction="none")


def random_problem(count: int, grid: int, levels: int, seed: int) -> tuple[Tensor, ...]:
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


def least_energy(levels: int, slope: Tensor, prior: Tensor, down: Tensor, right: Tensor) -> list[float]:
    """Of all labellings, for each of some small problems."""
    every = torch.tensor(list(itertools.product(range(levels), repeat=slope[0].numel()))).view(-1, *slope.shape[1:])
    problems = zip(*(v.split(1) for v in (slope, down, right)), strict=True)
    return [energy(every, s, prior, d, r).min().item() for s, d, r in problems]


def test_masks_of_small_grids_have_the_least_energy_of_all_labellings_and_one_step_has_for_any_weights():
    for grid, levels in ((2, 2), (2, 3), (2, 4), (3, 2), (3, 3)):
        problem = random_problem(40, grid, levels, seed=0)
        found = energy(grids.descent(*problem), *problem).tolist()
        assert found == pytest.approx(least_energy(levels, *problem), abs=1e-6), (grid, levels)
    rng = torch.Generator().manual_seed(0)
    gain, down, right = (torch.randn(30, *s, generator=rng) for s in ((3, 4), (2, 4), (3, 3)))
    found = energy(grids.binary(gain, down, right), gain, torch.zeros(2), down, right).tolist()
    assert found == pytest.approx(least_energy(2, gain, torch.zeros(2), down, right), abs=1e-5)


@pytest.mark.parametrize("grid", [4, 8])
def test_no_graph_cut_finds_a_mask_of_less_energy(grid):
    gco = pytest.importorskip("gco", reason="gco-wrapper, of the extra oracle, is not installed")
    slope, prior, down, right = problem = random_problem(64, grid, 3, seed=1)
    exact = (slope[..., None] * torch.arange(3) + prior, down, right)  # with floating-point labels gco overflows
    costs, below, beside = ((2**18 * t).round().int().numpy() for t in exact)
    between = np.array([[0, 1, 4], [1, 0, 1], [4, 1, 0]], dtype=np.int32)
    cuts = [gco.cut_grid_graph(costs[i], between, below[i], beside[i], algorithm="swap") for i in range(64)]
    cut, labels = torch.from_numpy(np.stack(cuts)).long().view(64, grid, grid), grids.descent(*problem)
    assert (energy(labels, *problem) <= energy(cut, *problem) + 1e-6).all()
    assert (labels == cut).float().mean() > 0.95


@pytest.mark.parametrize(("grid", "levels"), [(2, 2), (3, 3), (4, 4), (5, 3), (8, 3)])
def test_sweeps_come_close_to_the_optimum_and_a_device_computes_the_same_unread(grid, levels, monkeypatch):
    slope, prior, down, right = problem = random_problem(64, grid, levels, seed=2)
    level = torch.arange(float(levels))
    field = slope[..., None] * level + prior, (level[:, None] - level)[None] ** 2

    def everything():
        solved = [grids.descent(*problem), grids.sweeps(*field, down, right), grids.sweeps(*field)]
        return [*solved, transported(slope.abs(), slope > 0, 0.1)]

    here = everything()
    least, found = (energy(labels, *problem) for labels in here[:2])
    assert (found >= least - 1e-6).all() and (found < least + 0.01 * least.abs() + 0.005).all()
    assert (here[0] == here[1]).float().mean() > 0.9
    monkeypatch.setattr(grids, "at_hand", lambda tensor: False)
    assert all(map(torch.equal, here, everything()))


def energy_by_definition(z: np.ndarray, x: Tensor, s: Tensor, pair: list[int], lam: float, mixer: PuzzleMix) -> float:
    """Of one sample, from the paper's formula: what is lost, prior, and the four kinds of boundary."""
    b, top, scale = len(z), mixer.n_labels - 1, mixer.beta / len(z) / 16
    shares = s[pair].double().numpy().reshape(2, b, s.shape[1] // b, b, s.shape[2] // b).mean((2, 4))
    shares /= shares.sum((1, 2), keepdims=True)
    total = (z * shares[1] + (1 - z) * shares[0]).sum()
    for shown in (top * z).round().astype(int).ravel().tolist():
        total -= mixer.eta / b**2 * math.log(math.comb(top, shown) * lam**shown * (1 - lam) ** (top - shown))
    pixels, spread = x[pair].double().numpy() * np.array(mixer.std)[:, None, None], mixer.gamma * scale
    for images, levels in ((pixels, z), (pixels.transpose(0, 1, 3, 2), z.T)):  # across rows, then across columns
        height, width = (side // b for side in images.shape[2:])
        depth, along = min(mixer.neigh_size, height), min(mixer.neigh_size, width)
        for r, c in np.ndindex(b - 1, b):
            border, columns = (r + 1) * height, slice(c * width, (c + 1) * width)
            strips = (images[:, :, border - depth : border, columns], images[:, :, border : border + depth, columns])
            above, below = (strip.mean(2).reshape(2, 3, -1, along).mean(3) for strip in strips)
            d = np.abs(above[:, None] - below).mean((2, 3))
            u, v = levels[r, c], levels[r + 1, c]
            total += spread * (u * d[0].sum() + (1 - u) * d[1].sum() + v * d[:, 0].sum() + (1 - v) * d[:, 1].sum()) / 2
            total += (spread * (d[0, 1] + d[1, 0] - d[0, 0] - d[1, 1]) / 2 + scale) * (u - v) ** 2
    return total


@pytest.mark.parametrize("mixer", [PuzzleMix(), PuzzleMix(n_labels=4, neigh_size=2, gamma=1.0, beta=3.0, eta=0.5)])
@pytest.mark.parametrize("grid", [2, 4])
def test_costs_are_those_of_the_definition(mixer, grid):
    """Energies of random labellings differ by what the formula says, up to a constant per sample."""
    rng = torch.Generator().manual_seed(grid)
    x, s = torch.rand(4, 3, 32, 48, generator=rng), torch.rand(4, 32, 48, generator=rng)
    index, top = [2, 0, 3, 1], mixer.n_labels - 1
    slope, prior, down, right = mixer.costs(x, s, torch.tensor(index), grid, 0.3)
    for i, j in enumerate(index):
        labels = torch.randint(0, top + 1, (5, grid, grid), generator=rng)
        found = energy(labels, slope[[i]], prior, down[[i]], right[[i]])
        expected = [energy_by_definition(1 - row.numpy() / top, x, s, [i, j], 0.3, mixer) for row in labels]
        expected = torch.tensor(expected).double()
        torch.testing.assert_close(found - found[0], expected - expected[0], atol=2e-6, rtol=1e-4)


def transported_slowly(saliency: Tensor, shown: Tensor, cost: float) -> list[int]:
    """The rule as loops over the blocks of one image: whose block ends where, its own where nobody claims."""
    side = len(saliency)
    spots = np.array(list(np.ndindex(side, side)))
    price = cost * ((spots[:, None] - spots) ** 2).sum(2) / (side - 1) ** 2
    price -= (saliency.view(-1, 1) * shown.view(1, -1)).numpy()
    for _ in range(side):
        wanted, holders = price.argmin(1), {}
        for j in set(wanted.tolist()):
            (rivals,) = (wanted == j).nonzero()
            holders[j] = rivals[price[rivals, j].argmin()]
            price[rivals[rivals != holders[j]], j] += 1
    return [holders.get(j, j) for j in range(len(spots))]


@pytest.mark.parametrize("side", [2, 4, 8])
def test_blocks_move_whole_as_the_rule_says_and_every_shown_place_is_claimed_once(side):
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
    x = torch.arange(40 * 3 * 2 * side * 3 * side).view(40, 3, 2 * side, 3 * side).float()
    moved = mosaic(x, torch.arange(40)[:, None, None], found)
    for n, r, c in np.ndindex(40, side, side):
        p, q = divmod(int(found[n, r, c]), side)
        expected = x[n, :, 2 * p : 2 * p + 2, 3 * q : 3 * q + 3]
        assert torch.equal(moved[n, :, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3], expected)


@pytest.mark.parametrize(("height", "width"), [(150, 150), (8, 8), (31, 45), (10, 100)])
def test_images_that_the_grid_does_not_divide_keep_their_size_and_labels_count_pixels(height, width):
    x, y = torch.rand(3, 3, height, width), torch.eye(3)
    still = torch.arange(64).view(1, 8, 8).expand(3, -1, -1)
    assert torch.equal(mosaic(x, torch.arange(3)[:, None, None], still), x)
    assert all(0 <= p < height for line in places(height, 8) for p in line)
    constant = y[:, :, None, None].expand(3, 3, height, width)
    for make, seed in itertools.product((lambda: PuzzleMix(blocks=(8, 5)), CoMixup), range(3)):
        step = tiny_step(make, classes=3)
        plan = step.mixer.plan(x, y, np.random.default_rng(seed), step.model, CRITERION)
        mixed, target = step.mixer.mix(constant, y, **plan)
        torch.testing.assert_close(mixed.mean((2, 3)), target, atol=1e-4, rtol=0)


def test_masks_have_the_levels_blocks_and_share_that_were_drawn_also_at_the_ends(monkeypatch):
    step, (x, y), seen, shares = tiny_step(PuzzleMix), batch(size=6, height=32, width=48), [], []
    for seed in range(60):
        plan = step.mixer.plan(x, y, np.random.default_rng(seed), step.model, CRITERION)
        assert set(plan["mask"].unique().tolist()) <= {0.0, 0.5, 1.0}
        grid = plan["own"].shape[1]
        cells = plan["mask"][:, 0].unflatten(2, (grid, -1)).unflatten(1, (grid, -1))
        assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))
        seen.append(grid)
        shares.append((np.random.default_rng(seed).beta(1.0, 1.0), plan["mask"].mean().item()))
    assert set(seen) == {2, 4, 8} and min(map(seen.count, (2, 4, 8))) >= 10
    assert np.corrcoef(*zip(*shares, strict=True))[0, 1] > 0.85
    for lam in (0.0, 1.0):
        monkeypatch.setattr("mixers.ops.beta", lambda a, b, rng, lam=lam: lam)
        plan = step.mixer.plan(*batch(), np.random.default_rng(0), step.model, CRITERION)
        assert abs(plan["mask"].mean().item() - lam) < 0.1
        assert step.mixer.mix(*batch(), **plan)[0].isfinite().all()


def test_saliency_is_the_root_mean_square_and_survives_tiny_constant_and_broken_gradients():
    gradient = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = block_saliency(gradient.square().mean(1).sqrt(), 4)
    torch.testing.assert_close(block_saliency(saliency_map(gradient * 1e-30), 4), whole)
    gradient[0], gradient[1, 0, 0, 0], gradient[2] = 0, math.nan, math.inf
    found = block_saliency(saliency_map(gradient), 4)
    torch.testing.assert_close(found, torch.cat([torch.full((3, 4, 4), 1 / 16), whole[3:]]))
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(5))


@pytest.mark.parametrize("criterion", [CRITERION, nn.CrossEntropyLoss()], ids=["each", "mean"])
@pytest.mark.parametrize("make", [lambda: PuzzleMix(clean_lam=0.7), lambda: CoMixup(clean_lam=0.7)])
def test_the_clean_loss_is_learned_like_a_loss_of_its_own_and_gives_the_saliency_of_training_mode(make, criterion):
    (x, y), (step, looked), plain = batch(), (tiny_step(make) for _ in range(2)), tiny_step(PuzzleMix)
    step.criterion = criterion
    expected = taps.saliency(looked.model, CRITERION, x, y, training=True)
    loss, gradient = taps.clean_pass(looked.model, CRITERION, x, y)
    torch.testing.assert_close(gradient, expected)
    assert all(p.grad is None for p in looked.model.parameters())
    assert torch.equal(*(taps.saliency(looked.model, of_each, x, y) for of_each in (criterion, CRITERION)))

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
    torch.testing.assert_close(dict(step.model.named_buffers()), dict(plain.model.named_buffers()))


def test_adversarial_noise_stays_within_its_size_and_the_range_of_images_and_without_it_images_are_blended():
    std, mean = (torch.tensor(v)[:, None, None] for v in ((0.229, 0.224, 0.225), (0.485, 0.456, 0.406)))
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x, y = (pixels - mean) / std, torch.eye(5)[:4]
    step = tiny_step(lambda: PuzzleMix(adv_p=1.0, adv_eps=0.1, transport=False))
    plan = step.mixer.plan(x, y, np.random.default_rng(0), step.model, CRITERION)
    assert plan["noisy"] == [True, True] and 0 < plan["noise"].abs().max() <= 0.1
    mixed = step.mixer.mix(x, y, **plan)[0] * std + mean
    assert mixed.min() >= -1e-5 and mixed.max() <= 1 + 1e-5
    blend = plan["mask"] * pixels + (1 - plan["mask"]) * pixels[plan["index"]]
    assert 0 < (mixed - blend).abs().max() <= 0.1 + 1e-5
    assert plan["own"] is None and plan["partner"] is None
    often = tiny_step(lambda: PuzzleMix(adv_p=0.3, blocks=(2,), transport=False))
    flags = [often.mixer.plan(x, y, np.random.default_rng(i), often.model, CRITERION)["noisy"] for i in range(100)]
    assert all(0.15 < share < 0.45 for share in np.mean(flags, 0))
    plan = tiny_step(lambda: PuzzleMix(transport=False))(x, y, np.random.default_rng(3)).plan
    m, index, lam = plan["mask"], plan["index"], plan["mask"].mean((1, 2, 3))[:, None]
    mixed, target = step.mixer.mix(x, y, **plan)
    torch.testing.assert_close(mixed, m * x + (1 - m) * x[index])
    torch.testing.assert_close(target, lam * y + (1 - lam) * y[index])


def test_bad_arguments_and_what_is_not_rgb_or_comes_without_a_look_are_refused_in_words():
    for make, words, given in (
        (PuzzleMix, "integers of at least 2", {"blocks": ()}),
        (PuzzleMix, "integers of at least 2", {"blocks": (1, 2)}),
        (PuzzleMix, "one of 2, 3, 4", {"n_labels": 5}),
        (PuzzleMix, "a number of at least 0 and at most 1", {"gamma": 1.5, "adv_p": 2.0}),
        (PuzzleMix, "a whole number of pixels, at least 1, got", {"t_size": 0, "neigh_size": True}),
        (PuzzleMix, "a number above 0", {"alpha": 0.0}),
        (PuzzleMix, "a number of at least", {"std": (0.0, 1.0, 1.0)}),
        (CoMixup, "a whole number, at least 1, got", {"part": 0, "niter": True, "block_num": 0}),
        (CoMixup, "one of 'hard', 'soft'", {"thres_type": "firm"}),
        (CoMixup, "a number of at least 0 and at most 1", {"omega": 1.5}),
        (CoMixup, "a number above 0", {"alpha": 0.0}),
    ):
        for name, value in given.items():
            with pytest.raises(ValueError, match=f"{name} must be {words}"):
                make(**{name: value})
    step, images, targets = tiny_step(PuzzleMix), torch.zeros(2, 3, 32, 32), torch.eye(5)[:2]
    with pytest.raises(ValueError, match="needs RGB images"):
        step(images[:, :1], targets, np.random.default_rng(0))
    with pytest.raises(ValueError, match="needs a look at the model"):
        step.mixer.plan(images, targets, np.random.default_rng(0))
