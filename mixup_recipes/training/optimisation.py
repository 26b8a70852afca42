"""The optimiser with its groups, and the learning rate as a pure function of the update."""

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from mixers import Step
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import classifier_ids, layers
from mixup_recipes.typed import UserError, nearest

FUSED = ("momentum", "sgd", "adam", "adamw")
"""Optimisers that are torch's own, and have a kernel for all tensors at once on a GPU."""


def check_optimizer(name: str) -> None:
    """Raise ``UserError`` unless there is an optimiser of this name."""
    known = [str(known) for known in list_optimizers()]
    if name not in known:
        raise UserError(f"unknown optimiser {name!r}; {nearest(name, known)}")


def optimizer(step: Step, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser over the model's and the mixer's parameters.

    Every group records, as ``schedule``, where its learning rate differs from the recipe's. Without
    ``decay_bias_and_norm``, tensors of one dimension and what the model lists in ``no_weight_decay`` are not decayed.
    Raises ``UserError`` for an unknown name and for values that the optimiser refuses.
    """
    check_optimizer(recipe.opt)
    exempt: set[str] = getattr(step.model, "no_weight_decay", set)()
    spared = {id(p) for name, p in step.named_parameters() if p.ndim <= 1 or name.removeprefix("model.") in exempt}
    groups = []
    for group in (*own_groups(step.model, recipe), *step.mixer.param_groups(recipe.lr, recipe.weight_decay)):
        group["schedule"] = {key: group.pop(key) for key in ("lr", "min_lr", "warmup_epochs") if key in group}
        if "weight_decay" in group or recipe.decay_bias_and_norm:
            groups.append({"weight_decay": recipe.weight_decay} | group)
            continue
        for weight_decay, decayed in ((0.0, False), (recipe.weight_decay, True)):
            params = [p for p in group["params"] if (id(p) not in spared) == decayed]
            groups += [group | {"params": params, "weight_decay": weight_decay}] if params else []
    args: dict[str, Any] = {"betas": recipe.opt_betas, "eps": recipe.opt_eps}
    given = {k: v for k, v in args.items() if v is not None}
    # On a CPU its last digits are others, and records were made without it; of tensors in pieces it was never tried.
    if recipe.opt in FUSED and all(type(p) is nn.Parameter and p.is_cuda for p in step.parameters()):
        given["fused"] = True
    try:
        return create_optimizer_v2(
            groups, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum, **given
        )
    except Exception as e:  # a package or GPU it needs, a beta of 1.5: what they raise is up to the optimiser
        raise UserError(f"optimiser {recipe.opt!r}: {e}") from None


def own_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The model's parameters that are trained, by their learning rate.

    Layers are those of timm's ``group_matcher``, as in its own layer decay: the classifier is the last one.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if recipe.layer_decay is None and recipe.head_lr is None:
        return [{"params": [p for _, p in trained]}]
    rates = dict.fromkeys((name for name, _ in trained), recipe.lr)
    if recipe.layer_decay is not None:
        layer = layers(model)
        last = max(layer.values())
        rates = {name: recipe.lr * recipe.layer_decay ** (last - layer[name]) for name in rates}
    head = classifier_ids(model)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in trained:
        rate = recipe.head_lr if recipe.head_lr is not None and id(p) in head else rates[name]
        groups.setdefault(rate, []).append(p)
    return [{"params": params, "lr": rate} for rate, params in groups.items()]


def learning_rate(
    recipe: Recipe,
    update: int,
    updates_per_epoch: int,
    lr: float | None = None,
    min_lr: float | None = None,
    warmup_epochs: float | None = None,
) -> float:
    """The learning rate of an update, counted from 0.

    A cosine from ``lr`` to ``min_lr`` over all epochs, moved per update or per epoch, multiplied by a linear
    warm-up per update that starts at ``warmup_lr`` (the schedule of the published runs; timm's schedulers
    replace the cosine during the warm-up instead of multiplying it). With ``warmup_prefix`` the cosine begins when the
    warm-up ends. ``lr``, ``min_lr``, ``warmup_epochs``: other than the recipe's; with ``lr`` alone, its rate times a
    constant.
    """
    share = 1.0 if lr is None else lr / recipe.lr
    lr = recipe.lr if lr is None else lr
    min_lr = recipe.min_lr * share if min_lr is None else min_lr
    warmup_epochs = recipe.warmup_epochs if warmup_epochs is None else warmup_epochs
    position: float = update / updates_per_epoch
    span: float = recipe.epochs
    if recipe.warmup_prefix:
        position, span = max(0.0, position - warmup_epochs), recipe.epochs - warmup_epochs
    if not recipe.sched_on_updates:
        position = math.floor(position)
    rate = lr
    if recipe.sched == "cosine" and span:
        rate = min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * position / span))
    warmup = warmup_epochs * updates_per_epoch
    if update < warmup:
        start = recipe.warmup_lr / recipe.lr
        rate *= start + (1 - start) * update / warmup
    return rate


def set_learning_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, update: int, updates_per_epoch: int) -> None:
    """Give every group its rate for an update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, update, updates_per_epoch, **group["schedule"])
