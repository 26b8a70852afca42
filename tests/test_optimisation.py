"""Losses against slow formulas, who is decayed, and the learning rate of every update."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from mixers import Mixup, Step, Vanilla
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe, settings
from mixup_recipes.training.optimisation import learning_rate, optimizer, set_learning_rates
from mixup_recipes.training.update import criterion, ema_decay, one_hot
from mixup_recipes.typed import UserError


def recipe(**changes: Any) -> Recipe:
    return Recipe(**({"num_classes": 5} | changes))


def slow_cross_entropy(logits: list[float], target: list[float]) -> float:
    total = sum(math.exp(v) for v in logits)
    return -sum(t * math.log(math.exp(v) / total) for v, t in zip(logits, target, strict=True))


def slow_binary(logits: list[float], target: list[float]) -> float:
    shares = [1 / (1 + math.exp(-v)) for v in logits]
    return -sum(t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in zip(shares, target, strict=True))


@pytest.mark.parametrize(
    ("changes", "formula"),
    [
        ({"loss": "ce"}, slow_cross_entropy),
        ({"loss": "bce_sum"}, slow_binary),
        ({"loss": "bce_mean"}, lambda v, t: slow_binary(v, t) / 5),
        ({"loss": "bce_sum", "bce_target_thresh": 0.2}, lambda v, t: slow_binary(v, [float(s > 0.2) for s in t])),
        ({"loss": "bce_mean", "bce_target_thresh": 0.0}, lambda v, t: slow_binary(v, [float(s > 0) for s in t]) / 5),
    ],
)
def test_a_loss_is_its_formula_one_number_per_sample(changes, formula):
    rng, loss = np.random.default_rng(0), criterion(recipe(**changes))
    target = torch.from_numpy(rng.dirichlet(np.ones(5), 6)).float()
    target[0] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    logits = torch.from_numpy(rng.normal(0, 3, (6, 5))).float()
    before, found = (logits.clone(), target.clone()), loss(logits, target)
    expected = [formula(v, t) for v, t in zip(logits.tolist(), target.tolist(), strict=True)]
    assert found.shape == (6,) and found.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(logits, before[0]) and torch.equal(target, before[1])
    half = loss(logits.bfloat16(), target)  # half precision logits give a full precision loss
    assert half.dtype == torch.float32 and torch.equal(half, loss(logits.bfloat16().float(), target))


def test_targets_are_smoothed_once_by_the_formula_and_give_the_smoothed_loss_of_torch():
    labels, logits = torch.tensor([0, 1, 4, 1]), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for smoothing in (0.0, 0.1, 1.0):
        y = one_hot(labels, recipe(smoothing=smoothing))
        assert (y.shape, y.dtype) == ((4, 5), torch.float32)
        for row, label in zip(y.tolist(), labels.tolist(), strict=True):
            assert row == pytest.approx([(1 - smoothing) * (k == label) + smoothing / 5 for k in range(5)])
        theirs = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(criterion(recipe(smoothing=smoothing))(logits, y), theirs)


class Plain(Vanilla):
    """A toy mixer with a parameter that leaves its settings to the recipe."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


class Learned(Plain):
    """A toy mixer with settings of its own."""

    def param_groups(self, lr, weight_decay):
        return [{"params": [self.weight], "lr": 0.25 * lr, "min_lr": 0.1 * lr, "warmup_epochs": 0, "weight_decay": 0.5}]


def make_step(name="test_resnet", mixer=None):
    torch.manual_seed(0)
    return Step(timm.create_model(name, num_classes=5), mixer or Mixup(), criterion(recipe()))


def decayed(step: Step, **changes: Any) -> dict[str, float]:
    """Name of each parameter -> its weight decay; every parameter that learns stands in one group."""
    names = {id(p): n for n, p in step.named_parameters() if p.requires_grad}
    groups = optimizer(step, recipe(**changes)).param_groups
    found = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(n for n, _ in found) == sorted(names.values())
    return dict(found)


def test_everything_is_decayed_or_weights_alone_and_no_token_or_position_and_nothing_frozen():
    for name in ("test_resnet", "test_vit"):
        assert set(decayed(make_step(name), decay_bias_and_norm=True, weight_decay=1e-4).values()) == {1e-4}
    step = make_step("test_resnet")
    found = decayed(step, weight_decay=0.05)
    weights = {f"model.{n}.weight" for n, m in step.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert found == {n: 0.05 if n in weights else 0 for n in found}
    assert any(".bn" in n for n in set(found) - weights)
    step.model.fc.weight.requires_grad_(False)
    for everything in (True, False):
        assert "model.fc.weight" not in decayed(step, decay_bias_and_norm=everything)

    found = decayed(make_step("test_vit"), opt="adamw", weight_decay=0.05)
    assert found["model.pos_embed"] == found["model.cls_token"] == 0
    assert found["model.patch_embed.proj.weight"] == found["model.blocks.0.attn.qkv.weight"] == 0.05
    assert not any(v for n, v in found.items() if n.endswith("bias") or ".norm" in n)


def test_a_mixer_may_bring_settings_of_its_own_or_takes_those_of_the_recipe():
    own = {"lr": 0.2, "min_lr": 0.08, "warmup_epochs": 0}
    cases = [(Learned(), True, 0.5, own), (Learned(), False, 0.5, own), (Plain(), True, 0.05, {})]
    for mixer, everything, decay, schedule in (*cases, (Plain(), False, 0.0, {})):  # a tensor of one dimension
        r = recipe(lr=0.8, weight_decay=0.05, decay_bias_and_norm=everything, epochs=10, warmup_epochs=2, warmup_lr=0.0)
        made = optimizer(make_step(mixer=mixer), r)
        (group,) = [g for g in made.param_groups if any(p is mixer.weight for p in g["params"])]
        assert (group["weight_decay"], group["schedule"]) == (decay, pytest.approx(schedule))
        # half way, a cosine is half way between its ends; the model's warm-up is not the mixer's
        for epoch, rate, other in ((0, 0.0, 0.2), (5, 0.4, 0.14), (10, 0.0, 0.08)):
            set_learning_rates(made, r, epoch * 7, 7)
            assert group["lr"] == pytest.approx(other if schedule else rate)
            assert all(g["lr"] == pytest.approx(rate) for g in made.param_groups if g is not group)
    r = recipe(lr=0.8, min_lr=0.2, warmup_lr=0.1, warmup_epochs=2, epochs=10)
    for update in range(70):  # a rate alone is that of the recipe times a constant
        assert learning_rate(r, update, 7, lr=0.2) == pytest.approx(0.25 * learning_rate(r, update, 7))


def stepped(name, **changes):
    """The optimiser after three steps on one weight with gradients 1, 2 and 3, and the weight."""
    step, r = make_step(mixer=Plain()), recipe(opt=name, lr=0.1, sched="constant", **changes)
    made = optimizer(step, r)
    for gradient in (1.0, 2.0, 3.0):
        step.mixer.weight.grad = torch.full((2,), gradient)
        set_learning_rates(made, r, 0, 1)
        made.step()
    return made, step.mixer.weight.detach()


def test_momentum_is_plain_momentum_and_not_nesterov_and_the_usual_optimisers_step():
    made, weight = stepped("momentum", momentum=0.5, weight_decay=0.0)
    velocities = itertools.accumulate((1.0, 2.0, 3.0), lambda velocity, gradient: 0.5 * velocity + gradient)
    assert weight.tolist() == pytest.approx([1.0 - 0.1 * sum(velocities)] * 2)
    assert all(g["momentum"] == 0.5 and not g["nesterov"] for g in made.param_groups)
    for name in ("lamb", "adamw", "sgd", "adam", "lion", "rmsprop"):
        _, weight = stepped(name)
        assert torch.isfinite(weight).all() and (weight != 1).all(), name


def test_betas_and_epsilon_reach_the_optimiser_only_when_given_and_what_cannot_be_made_is_explained():
    given = {"opt_betas": (0.8, 0.95), "opt_eps": 1e-5}
    for changes, expected in (({}, ((0.9, 0.999), 1e-8)), (given, ((0.8, 0.95), 1e-5))):
        groups = optimizer(make_step(), recipe(opt="adamw", **changes)).param_groups
        assert {(g["betas"], g["eps"]) for g in groups} == {expected}
    cases = [({"opt": "momentun"}, "unknown optimiser 'momentun'; did you mean 'momentum'?")]
    cases += [({"opt": "adamw", "opt_betas": (1.5, 0.9)}, "optimiser 'adamw': Invalid beta parameter at index 0: 1.5")]
    if not torch.cuda.is_available():  # such a machine may have what this optimiser needs
        cases += [({"opt": "fusedsgd"}, "optimiser 'fusedsgd': ")]
    for changes, says in cases:
        with pytest.raises(UserError) as caught:
            optimizer(make_step(), recipe(**changes))
        assert str(caught.value).startswith(says)


def openmixup_rate(r: Recipe, update: int, per_epoch: int) -> float:
    """The hooks of mmcv, written down: an annealed rate, scaled down linearly while warming up."""
    progress, end = (update, r.epochs * per_epoch) if r.sched_on_updates else (update // per_epoch, r.epochs)
    regular = r.min_lr + 0.5 * (math.cos(math.pi * progress / end) + 1) * (r.lr - r.min_lr)
    warmup = r.warmup_epochs * per_epoch
    return regular if update >= warmup else regular * (1 - (1 - update / warmup) * (1 - r.warmup_lr / r.lr))


SCHEDULES = [
    recipe(epochs=10),
    recipe(epochs=10, sched_on_updates=False),
    recipe(epochs=12, lr=1e-3, min_lr=1e-5, warmup_epochs=5, warmup_lr=1e-8),
    recipe(epochs=12, lr=8e-3, min_lr=1e-6, warmup_epochs=5, warmup_lr=8e-8, sched_on_updates=False),
    recipe(epochs=4, warmup_epochs=2.5, warmup_lr=0.01),
    recipe(epochs=1),
]
PREFIXED = recipe(epochs=9, lr=0.4, min_lr=0.01, warmup_epochs=3, warmup_lr=0.1, warmup_prefix=True)


def test_the_learning_rate_and_the_decay_of_the_average_are_those_of_the_published_runs():
    for r, per_epoch in itertools.product(SCHEDULES, (1, 7, 100)):
        for update in range(r.epochs * per_epoch):
            assert learning_rate(r, update, per_epoch) == pytest.approx(openmixup_rate(r, update, per_epoch), rel=1e-12)
    assert learning_rate(recipe(lr=0.4, epochs=20, warmup_epochs=5), 0, 10) == 0  # starts at 0 where nothing is said
    for constant in ({"sched": "constant"}, {"min_lr": 0.4}):
        assert [learning_rate(recipe(lr=0.4, **constant), update, 10) for update in (0, 199)] == [0.4, 0.4]
    for name in settings():
        r = load_recipe(name)
        rates = [learning_rate(r, update, 3) for update in range(3 * r.epochs)]
        assert min(rates) >= 0 and max(rates) <= r.lr, name
    r = recipe(epochs=9, ema_decay=0.5, ema_warmup_epochs=2)  # the average's decay grows while it warms up
    decays = [ema_decay(r, update, 10) for update in (0, 5, 10, 20, 30)]
    assert decays == pytest.approx([0.45, 0.4625, 0.475, 0.5, 0.5])
    assert ema_decay(recipe(ema_decay=0.5), 0, 10) == 0.5


@pytest.mark.parametrize("r", [*SCHEDULES, PREFIXED, dataclasses.replace(PREFIXED, sched_on_updates=False)])
def test_the_learning_rate_is_that_of_timm_after_a_warm_up_or_with_one_ahead_of_the_cosine(r):
    scale = 7 if r.sched_on_updates else 1
    warmup = int(r.warmup_epochs) if r.warmup_prefix else 0
    dummy = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=r.lr)
    theirs = CosineLRScheduler(
        dummy, t_initial=(r.epochs - warmup) * scale, lr_min=r.min_lr, warmup_t=warmup * scale,
        warmup_lr_init=r.warmup_lr, warmup_prefix=r.warmup_prefix, t_in_epochs=not r.sched_on_updates,
    )  # fmt: skip
    for update in range(0 if r.warmup_prefix and r.sched_on_updates else math.ceil(r.warmup_epochs * 7), r.epochs * 7):
        theirs.step_update(update) if r.sched_on_updates else theirs.step(update // 7)
        assert learning_rate(r, update, 7) == pytest.approx(dummy.param_groups[0]["lr"], rel=1e-9)
