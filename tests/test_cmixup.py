"""C-Mixup draws partners of near values, in a loop of one's own; a recipe, whose targets are classes, refuses it."""

import math
from bisect import bisect_right
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from mixers import REGRESSION, CMixup, Step, build
from mixers.testing import batch, tiny_step
from mixup_recipes.pages import preview
from mixup_recipes.resolve import load_recipe
from mixup_recipes.typed import UserError


def kernel(values, bandwidth):
    """The probability of each partner of each sample, pair by pair."""
    weights = [[math.exp(-(math.dist(a, b) ** 2) / (2 * bandwidth**2)) for b in values] for a in values]
    return [[weight / sum(row) for weight in row] for row in weights]


@pytest.mark.parametrize(("size", "columns", "bandwidth"), [(1, 1, 1.0), (7, 1, 0.2), (32, 3, 0.7)])
def test_a_partner_is_the_one_that_a_loop_over_the_kernel_finds(size, columns, bandwidth):
    rng, mixer = np.random.default_rng(0), CMixup(bandwidth=bandwidth)
    for seed in range(20):
        x, y = torch.randn(size, 3, 2, 2), torch.from_numpy(rng.normal(5, 1, (size, columns))).float()
        plan = mixer.plan(x, y, np.random.default_rng(seed))
        again = np.random.default_rng(seed)
        lam, draws = again.beta(2.0, 2.0), again.integers(2**24, size=size) / 2**24
        rows = kernel(y.tolist(), bandwidth)
        found = [bisect_right(list(accumulate(row)), draw) for row, draw in zip(rows, draws, strict=True)]
        assert plan["index"].tolist() == found
        assert plan["mask"].flatten().tolist() == [np.float32(lam)] * size
        mixed, target = mixer.mix(x, y, **plan)
        torch.testing.assert_close(mixed, lam * x + (1 - lam) * x[found])
        torch.testing.assert_close(target, lam * y + (1 - lam) * y[found])


def test_values_of_any_size_and_missing_ones_find_a_partner():
    y = torch.tensor([[0.0], [1e30], [-1e30], [math.inf], [math.nan], [1e-30]])
    for seed in range(50):
        index = CMixup().plan(torch.zeros(6, 3, 2, 2), y, np.random.default_rng(seed))["index"].tolist()
        assert index[1:5] == [1, 2, 3, 4] and {index[0], index[5]} <= {0, 5}


def test_values_of_64_bits_are_not_rounded_before_their_differences_are_taken():
    y = 1e8 + 2 * torch.arange(8, dtype=torch.float64)[:, None]  # float32 knows each eighth number there
    for seed in range(20):
        plan = CMixup(bandwidth=0.2).plan(torch.zeros(8, 3, 2, 2), y, np.random.default_rng(seed))
        assert plan["index"].tolist() == [*range(8)]


def test_a_regressor_trains_on_near_pairs_in_a_loop_of_ones_own():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    step = Step(model, build("cmixup", bandwidth=0.3), lambda out, y: mse_loss(out, y, reduction="none").mean(1))
    optimizer, rng = torch.optim.SGD(step.parameters(), lr=0.02), torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 8, generator=rng)
    y = x.flatten(1)[:, :2] * 2 - 1  # values below 0 and above 1
    losses, apart = [], []
    for update in range(30):
        out = step(x, y, np.random.default_rng((0, update)))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        apart.append((y - y[out.plan["index"]]).norm(dim=1).mean().item())
    assert losses[-1] < losses[0] / 3
    assert max(apart) < torch.cdist(y, y).mean() / 3


@pytest.mark.parametrize("name", REGRESSION)
def test_a_recipe_for_classes_refuses_it_by_name_wherever_it_stands(name, console):
    says = f"mixer '{name}' is for regression and compares values, but a recipe's targets are classes; "
    nested = {"mixer_args": {"base": {"switch": {"mixers": ["cutmix", name]}}}}
    for make in (
        lambda: load_recipe(f"quickstart_{name}"),
        lambda: load_recipe("quickstart", mixer=name),
        lambda: preview.chosen([], [name]),
        lambda: load_recipe("quickstart_decouplemix", **nested),
    ):
        with pytest.raises(UserError, match="is for regression and compares values") as caught:
            make()
        assert "\n" not in str(caught.value)
    status, out, error = console("train", "--recipe", f"quickstart_{name}")
    assert (status, out) == (2, "") and error.startswith(f"error: {says}")


def test_a_probability_is_the_kernel_of_the_distance_between_the_targets_and_not_of_the_images():
    step, (x, _) = tiny_step(lambda: CMixup(bandwidth=0.5)), batch()
    y = torch.arange(len(x) * 5).view(len(x), 5).float() / 10
    with torch.autocast("cpu", torch.bfloat16):
        coarse = step.mixer.plan(x.bfloat16(), y, np.random.default_rng(3))["index"]
    assert torch.equal(coarse, step.mixer.plan(x * 100, y, np.random.default_rng(3))["index"])
