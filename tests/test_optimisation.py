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
from torch import Tensor, nn

from mixers import Mixup, Step, Vanilla
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe, settings
from mixup_recipes.training.optimisation import learning_rate, optimizer, set_learning_rates
from mixup_recipes.training.update import criterion, ema_decay, one_hot
from mixup_recipes.typed import UserError


def recipe(**changes: Any) -> Recipe:
    return Recipe(**({"num_classes": 5} | changes))


# --------------------------------------------------------------------------------------------- losses


@pytest.fixture
def logits_and_target() -> tuple[Tensor, Tensor]:
    """Six samples of five classes: logits, and soft targets that sum to 1."""
    rng = np.random.default_rng(0)
    target = torch.from_numpy(rng.dirichlet(np.ones(5), 6)).float()
    target[0] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    return torch.from_numpy(rng.normal(0, 3, (6, 5))).float(), target


def slow_cross_entropy(logits: list[float], target: list[float]) -> float:
    total = sum(math.exp(v) for v in logits)
    return -sum(t * math.log(math.exp(v) / total) for v, t in zip(logits, target, strict=True))


def slow_binary(logits: list[float], target: list[float]) -> float:
    loss = 0.0
    for v, t in zip(logits, target, strict=True):
        p = 1 / (1 + math.exp(-v))
        loss -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return loss


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
def test_a_loss_is_its_formula_one_number_per_sample(logits_and_target: tuple, changes: dict, formula: Any) -> None:
    logits, target = logits_and_target
    before = logits.clone(), target.clone()
    loss = criterion(recipe(**changes))(logits, target)
    expected = [formula(v, t) for v, t in zip(logits.tolist(), target.tolist(), strict=True)]
    assert loss.shape == (6,)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(logits, before[0]) and torch.equal(target, before[1])
    rounded = logits.bfloat16()  # half precision logits give a full precision loss
    half = criterion(recipe(**changes))(rounded, target)
    assert half.dtype == torch.float32 and torch.equal(half, criterion(recipe(**changes))(rounded.float(), target))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_targets_are_smoothed_once_by_the_formula(smoothing: float) -> None:
    y = one_hot(torch.tensor([0, 4, 2]), recipe(smoothing=smoothing))
    assert (y.shape, y.dtype) == ((3, 5), torch.float32)
    for row, label in zip(y.tolist(), [0, 4, 2], strict=True):
        assert row == pytest.approx([(1 - smoothing) * (k == label) + smoothing / 5 for k in range(5)])
    assert y.sum(1).tolist() == pytest.approx([1, 1, 1])


def test_smoothed_targets_give_the_smoothed_loss_of_torch_and_mix_as_hard_ones_do() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    labels, r, lam = torch.tensor([0, 1, 4, 1]), recipe(smoothing=0.1), 0.3
    smooth, hard = one_hot(labels, r), one_hot(labels, recipe())
    theirs = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(criterion(r)(logits, smooth), theirs)
    mixed_before = lam * smooth + (1 - lam) * smooth.flip(0)
    mixed_after = (lam * hard + (1 - lam) * hard.flip(0)) * 0.9 + 0.1 / 5
    torch.testing.assert_close(mixed_before, mixed_after)


# --------------------------------------------------------------------------------------------- optimiser


class Learned(Vanilla):
    """A toy mixer with parameters and settings of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [self.weight], "lr": 0.25 * lr, "min_lr": 0.1 * lr, "warmup_epochs": 0, "weight_decay": 0.5}]


class Plain(Vanilla):
    """A toy mixer with a parameter that leaves its settings to the recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def make_step(name: str = "test_resnet", mixer: nn.Module | None = None, r: Recipe | None = None) -> Step:
    torch.manual_seed(0)
    return Step(timm.create_model(name, num_classes=5), mixer or Mixup(), criterion(r or recipe()))


def decayed(step: Step, r: Recipe) -> dict[str, float]:
    """Name of each parameter -> its weight decay; every parameter stands in one group."""
    names = {id(p): n for n, p in step.named_parameters()}
    groups = optimizer(step, r).param_groups
    found = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(n for n, _ in found) == sorted(names.values())
    return dict(found)


def test_the_pytorch_style_decays_everything() -> None:
    for name in ("test_resnet", "test_vit"):
        r = recipe(decay_bias_and_norm=True, weight_decay=1e-4)
        assert set(decayed(make_step(name), r).values()) == {1e-4}


def test_otherwise_weights_alone_are_decayed_and_no_token_or_position() -> None:
    step = make_step("test_resnet")
    found = decayed(step, recipe(weight_decay=0.05))
    weights = {f"model.{n}.weight" for n, m in step.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert found == {n: 0.05 if n in weights else 0 for n in found}
    assert any(".bn" in n for n in set(found) - weights)

    found = decayed(make_step("test_vit"), recipe(opt="adamw", weight_decay=0.05))
    assert found["model.pos_embed"] == found["model.cls_token"] == 0
    assert found["model.patch_embed.proj.weight"] == found["model.blocks.0.attn.qkv.weight"] == 0.05
    assert not any(v for n, v in found.items() if n.endswith("bias") or ".norm" in n)


def test_frozen_parameters_are_left_out() -> None:
    for everything in (True, False):
        step = make_step()
        step.model.fc.weight.requires_grad_(False)
        groups = optimizer(step, recipe(decay_bias_and_norm=everything)).param_groups
        assert sum(len(g["params"]) for g in groups) == len(list(step.parameters())) - 1


@pytest.mark.parametrize("everything", [True, False])
def test_a_mixer_may_bring_settings_of_its_own(everything: bool) -> None:
    r = recipe(lr=0.8, weight_decay=0.05, decay_bias_and_norm=everything)
    step = make_step(mixer=Learned())
    made = optimizer(step, r)
    (own,) = [g for g in made.param_groups if any(p is step.mixer.weight for p in g["params"])]
    assert own["weight_decay"] == 0.5
    # half way, a cosine is half way between its ends; the model's warm-up is not the mixer's
    for epoch, rates in ((0, (0.0, 0.2)), (5, (0.4, 0.14)), (10, (0.0, 0.08))):
        set_learning_rates(made, dataclasses.replace(r, epochs=10, warmup_epochs=2, warmup_lr=0.0), epoch * 7, 7)
        assert own["lr"] == pytest.approx(rates[1])
        assert all(g["lr"] == pytest.approx(rates[0]) for g in made.param_groups if g is not own)


def test_a_rate_alone_is_that_of_the_recipe_times_a_constant() -> None:
    r = recipe(lr=0.8, min_lr=0.2, warmup_lr=0.1, warmup_epochs=2, epochs=10)
    for update in range(70):
        assert learning_rate(r, update, 7, lr=0.2) == pytest.approx(0.25 * learning_rate(r, update, 7))


def test_a_mixer_without_settings_takes_those_of_the_recipe() -> None:
    step = make_step(mixer=Plain())
    for everything, weight_decay in ((True, 0.05), (False, 0.0)):  # a tensor of one dimension
        made = optimizer(step, recipe(lr=0.8, weight_decay=0.05, decay_bias_and_norm=everything))
        (own,) = [g for g in made.param_groups if any(p is step.mixer.weight for p in g["params"])]
        assert (own["weight_decay"], own["schedule"]) == (weight_decay, {})


def stepped(name: str, **changes: Any) -> tuple[torch.optim.Optimizer, Tensor]:
    """The optimiser after three steps on one weight with gradients 1, 2 and 3, and the weight."""
    step = make_step(mixer=Plain())
    made = optimizer(step, recipe(opt=name, lr=0.1, **changes))
    for gradient in (1.0, 2.0, 3.0):
        made.zero_grad()
        step.mixer.weight.grad = torch.full((2,), gradient)
        set_learning_rates(made, recipe(opt=name, lr=0.1, sched="constant"), 0, 1)
        made.step()
    return made, step.mixer.weight.detach()


def test_momentum_is_plain_momentum_and_not_nesterov() -> None:
    made, weight = stepped("momentum", momentum=0.5, weight_decay=0.0)
    velocity, expected = 0.0, 1.0
    for gradient in (1.0, 2.0, 3.0):
        velocity = 0.5 * velocity + gradient
        expected -= 0.1 * velocity
    assert weight.tolist() == pytest.approx([expected] * 2)
    assert not any(g["nesterov"] for g in made.param_groups)
    assert all(g["momentum"] == 0.5 for g in made.param_groups)


def test_betas_and_epsilon_reach_the_optimiser_only_when_given() -> None:
    given = optimizer(make_step(), recipe(opt="adamw", opt_betas=(0.8, 0.95), opt_eps=1e-5))
    assert {(g["betas"], g["eps"]) for g in given.param_groups} == {((0.8, 0.95), 1e-5)}
    default = optimizer(make_step(), recipe(opt="adamw"))
    assert {(g["betas"], g["eps"]) for g in default.param_groups} == {((0.9, 0.999), 1e-8)}


def test_the_usual_optimisers_can_be_built_and_stepped() -> None:
    for name in ("lamb", "adamw", "sgd", "adam", "lion", "rmsprop"):
        _, weight = stepped(name)
        assert torch.isfinite(weight).all() and (weight != 1).all(), name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"opt": "momentun"}, "unknown optimiser 'momentun'; did you mean 'momentum'?"),
        ({"opt": "adamw", "opt_betas": (1.5, 0.9)}, "optimiser 'adamw': Invalid beta parameter at index 0: 1.5"),
        ({"opt": "fusedsgd"}, "optimiser 'fusedsgd': "),
    ],
)
def test_an_optimiser_that_cannot_be_made_is_explained(changes: dict, says: str) -> None:
    if changes["opt"] == "fusedsgd" and torch.cuda.is_available():
        pytest.skip("this machine may have what the optimiser needs")
    with pytest.raises(UserError) as caught:
        optimizer(make_step(), recipe(**changes))
    assert str(caught.value).startswith(says)


# --------------------------------------------------------------------------------------------- learning rate


def openmixup_rate(r: Recipe, update: int, per_epoch: int) -> float:
    """The hooks of mmcv, written down: an annealed rate, scaled down linearly while warming up."""
    progress, end = (update, r.epochs * per_epoch) if r.sched_on_updates else (update // per_epoch, r.epochs)
    weight = math.cos(math.pi * progress / end) + 1
    regular = r.min_lr + 0.5 * weight * (r.lr - r.min_lr)
    warmup = r.warmup_epochs * per_epoch
    if update >= warmup:
        return regular
    ratio = r.warmup_lr / r.lr
    k = (1 - update / warmup) * (1 - ratio)
    return regular * (1 - k)


SCHEDULES = [
    recipe(epochs=10),
    recipe(epochs=10, sched_on_updates=False),
    recipe(epochs=12, lr=1e-3, min_lr=1e-5, warmup_epochs=5, warmup_lr=1e-8),
    recipe(epochs=12, lr=8e-3, min_lr=1e-6, warmup_epochs=5, warmup_lr=8e-8, sched_on_updates=False),
    recipe(epochs=4, warmup_epochs=2.5, warmup_lr=0.01),
    recipe(epochs=1),
]


@pytest.mark.parametrize("per_epoch", [1, 7, 100])
@pytest.mark.parametrize("r", SCHEDULES, ids=range(len(SCHEDULES)))
def test_the_learning_rate_is_that_of_the_published_runs(r: Recipe, per_epoch: int) -> None:
    for update in range(r.epochs * per_epoch):
        assert learning_rate(r, update, per_epoch) == pytest.approx(openmixup_rate(r, update, per_epoch), rel=1e-12)


PREFIXED = {"epochs": 9, "lr": 0.4, "min_lr": 0.01, "warmup_epochs": 3, "warmup_lr": 0.1, "warmup_prefix": True}


@pytest.mark.parametrize(
    "r", [*SCHEDULES, *(recipe(**PREFIXED, sched_on_updates=on) for on in (True, False))], ids=range(8)
)
def test_the_learning_rate_is_that_of_timm_after_a_warm_up_or_with_one_ahead_of_the_cosine(r: Recipe) -> None:
    per_epoch = 7
    scale = per_epoch if r.sched_on_updates else 1
    warmup = int(r.warmup_epochs) if r.warmup_prefix else 0
    dummy = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=r.lr)
    theirs = CosineLRScheduler(
        dummy, t_initial=(r.epochs - warmup) * scale, lr_min=r.min_lr, warmup_t=warmup * scale,
        warmup_lr_init=r.warmup_lr, warmup_prefix=r.warmup_prefix, t_in_epochs=not r.sched_on_updates,
    )  # fmt: skip
    begin = 0 if r.warmup_prefix and r.sched_on_updates else math.ceil(r.warmup_epochs * per_epoch)
    for update in range(begin, r.epochs * per_epoch):
        theirs.step_update(update) if r.sched_on_updates else theirs.step(update // per_epoch)
        assert learning_rate(r, update, per_epoch) == pytest.approx(dummy.param_groups[0]["lr"], rel=1e-9)


def test_the_first_and_last_rates_are_known() -> None:
    def rate(update: int, **changes: Any) -> float:
        return learning_rate(recipe(epochs=20, lr=0.4, **changes), update, 10)

    assert rate(0) == 0.4
    assert rate(0, warmup_epochs=5, warmup_lr=1e-6) == pytest.approx(1e-6)
    assert rate(0, warmup_epochs=5) == 0
    assert rate(199) == pytest.approx(0.2 * (1 + math.cos(math.pi * 199 / 200)))
    assert rate(199, sched_on_updates=False) == pytest.approx(0.2 * (1 + math.cos(math.pi * 19 / 20)))
    assert rate(200, min_lr=0.01) == pytest.approx(0.01)
    for constant in ({"sched": "constant"}, {"min_lr": 0.4}):
        assert rate(0, **constant) == rate(199, **constant) == 0.4


def test_the_rate_rises_all_through_the_warm_up_and_falls_afterwards() -> None:
    r = load_recipe("deit_s_mixup")
    rates = [learning_rate(r, update, 50) for update in range(r.epochs * 50)]
    peak = 5 * 50
    assert all(a < b for a, b in itertools.pairwise(rates[:peak]))
    assert all(a > b for a, b in itertools.pairwise(rates[peak:]))
    assert rates[0] == pytest.approx(1e-8) and max(rates) < 1e-3 and rates[-1] > 1e-5


def test_the_decay_of_the_average_grows_while_it_warms_up() -> None:
    r = recipe(epochs=9, ema_decay=0.5, ema_warmup_epochs=2)
    decays = [ema_decay(r, update, 10) for update in (0, 5, 10, 20, 30)]
    assert decays == pytest.approx([0.45, 0.4625, 0.475, 0.5, 0.5])
    assert ema_decay(recipe(ema_decay=0.5), 0, 10) == 0.5


def test_the_rate_of_every_setting_stays_between_nothing_and_the_peak() -> None:
    for name in settings():
        r = load_recipe(name)
        rates = [learning_rate(r, update, 3) for update in range(3 * r.epochs)]
        assert min(rates) >= 0 and max(rates) <= r.lr, name
