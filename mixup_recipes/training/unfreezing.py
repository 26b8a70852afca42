"""Gradual unfreezing: what a recipe freezes thaws stage by stage, from the classifier down to the images.

Universal Language Model Fine-tuning for Text Classification. Howard and Ruder. ACL 2018,
https://arxiv.org/abs/1801.06146, section 3.3: there one layer more at every epoch, here one of timm's stages, or what
of it is frozen, at every ``unfreeze_epochs``. A stage is a coarse group of timm's ``group_matcher``: ``layer4`` of a
ResNet, a block of a ViT. What lies between the last of them and the classifier, such as a norm, goes with that stage.

While a stage is frozen its parameters take no gradient, so that momentum and weight decay leave them alone too, and its
BatchNorm layers use their running statistics and do not count. The optimiser has all groups from the start.
"""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import frozen, layers
from mixup_recipes.words import many


class Unfreezing:
    """When each part of a model thaws: a function of the update alone."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        assert recipe.freeze is not None and recipe.unfreeze_epochs is not None
        self.every = recipe.unfreeze_epochs
        kept, stage = frozen(model, recipe.freeze), layers(model, stages=True)
        last = max(stage.values()) - 1
        order = sorted({min(stage[name], last) for name in kept}, reverse=True)
        self.turns = {name: order.index(min(stage[name], last)) + 1 if name in kept else 0 for name in stage}
        self.stages = len(order)
        self.parameters = [(p, self.turns[name]) for name, p in model.named_parameters()]
        counting = ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm))
        self.norms = [(m, self.turn(name)) for name, m in counting if m.running_mean is not None]

    def turn(self, name: str) -> int:
        """When a layer thaws, in stages: as the last of its parameters, or of those around it if it has none."""
        within = [turn for p, turn in self.turns.items() if p.startswith(f"{name}." if name else "")]
        return max(within) if within else self.turn(name.rpartition(".")[0])

    def begin(self, update: int, updates_per_epoch: int) -> None:
        """Freeze what is frozen in an update, counted from 0; the rest of the model is in training mode."""
        thawed = math.floor(update / (self.every * updates_per_epoch) + 1e-9)
        for p, turn in self.parameters:
            p.requires_grad_(turn <= thawed)
        for norm, turn in self.norms:
            norm.train(turn <= thawed)

    def __str__(self) -> str:
        """What thaws when, in words."""
        turn = "epoch" if self.every == 1 else f"{self.every:g} epochs"
        return f"{many(self.stages, 'stage')}, one every {turn}; all learn after {self.stages * self.every:g}"
