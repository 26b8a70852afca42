"""Originals that are one script: its function that trains an epoch runs as it stands, with what the script defines."""

import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from originals import Checkout, Numpy
from torch import Tensor, nn

from acid_originals import Acid, Epochs, seeded
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import create_model
from mixup_recipes.training.optimisation import learning_rate

RATES = (
    "The learning rate follows a cosine by epochs on both sides, because the script's own steps need more epochs. The "
    "network is ours on both sides."
)


def quiet(*_: Any) -> None:
    """In place of what prints."""


def sgd(model: nn.Module, recipe: Recipe, nesterov: bool = False) -> torch.optim.Optimizer:
    """The optimiser as both scripts make it."""
    args = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay, "nesterov": nesterov}
    return torch.optim.SGD(model.parameters(), recipe.lr, **args)  # type: ignore[arg-type]


def set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: int, updates: int) -> None:
    """The rate of an epoch, which the scripts set between epochs too."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, epoch * updates, updates)


def mixup_cifar10(original: Checkout, recipe: Recipe, epochs: Epochs) -> dict[str, nn.Module]:
    """``train`` of mixup-cifar10's train.py, with its ``mixup_data`` and ``mixup_criterion``."""
    model = create_model(recipe)
    optimizer = sgd(model, recipe)
    # The script reads a loss as loss.data[0], as torch of its time had it, so its criterion gives one number in a row.
    criterion = lambda logits, target: F.cross_entropy(logits, target).reshape(1)  # noqa: E731
    args = SimpleNamespace(alpha=recipe.mixer_args["mixup"].get("alpha", 1.0))
    given: dict[str, Any] = {
        "np": np, "torch": torch, "Variable": torch.autograd.Variable, "use_cuda": False, "args": args, "net": model,
        "trainloader": epochs, "criterion": criterion, "optimizer": optimizer, "progress_bar": quiet, "print": quiet,
    }  # fmt: skip
    train, *_ = original.names("train.py", "train", "mixup_data", "mixup_criterion", **given)
    seeded(recipe.seed)
    for epoch in range(recipe.epochs):
        set_rate(optimizer, recipe, epoch, len(epochs))
        train(epoch)
    return {"": model}


def cutmix_pytorch(original: Checkout, recipe: Recipe, epochs: Epochs) -> dict[str, nn.Module]:
    """``train`` of CutMix-PyTorch's train.py, with its ``rand_bbox``."""
    model = create_model(recipe)
    optimizer = sgd(model, recipe, nesterov=True)
    beta = recipe.mixer_args["cutmix"].get("alpha", 1.0)
    args = SimpleNamespace(beta=beta, cutmix_prob=recipe.mix_prob, epochs=recipe.epochs, print_freq=1, verbose=False)
    # What it logs of the training images needs an older torch, and is not read here.
    nothing = lambda *_, **__: (torch.zeros(1), torch.zeros(1))  # noqa: E731
    given: dict[str, Any] = {
        "np": Numpy(), "torch": torch, "time": time, "args": args, "print": quiet, "accuracy": nothing
    }  # fmt: skip
    names = ("train", "rand_bbox", "AverageMeter", "get_learning_rate")
    train, *_ = original.names("train.py", *names, **given)
    seeded(recipe.seed)
    with mock.patch.object(Tensor, "cuda", lambda tensor: tensor):
        for epoch in range(recipe.epochs):
            set_rate(optimizer, recipe, epoch, len(epochs))
            train(epochs, model, nn.CrossEntropyLoss(), optimizer, epoch)
    return {"": model}


SCRIPTS = (
    Acid(
        "mixup by mixup-cifar10",
        "facebookresearch/mixup-cifar10",
        ("train.py",),
        {"mixer": "mixup", "mixer_args": {"mixup": {"alpha": 1.0}}, "opt": "momentum"},
        mixup_cifar10,
        "`train`, `mixup_data` and `mixup_criterion` of train.py run for each epoch, with its optimiser.",
        RATES,
    ),
    Acid(
        "cutmix by CutMix-PyTorch",
        "clovaai/CutMix-PyTorch",
        ("train.py",),
        {"mixer": "cutmix", "mixer_args": {"cutmix": {"alpha": 1.0}}, "mix_prob": 0.5, "opt": "sgd"},
        cutmix_pytorch,
        "`train` and `rand_bbox` of train.py run for each epoch, with its optimiser, which is Nesterov's. Half of the "
        "updates mix, as in its command for CIFAR-10.",
        RATES,
    ),
)
