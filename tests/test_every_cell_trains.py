"""Every setting x every mixer builds its model, mixer, optimiser and schedule from the recipe, and trains two steps.

The full recipe is resolved and validated; what does not fit two cores (depth, width, resolution, batch) is made smaller
here. The slow version trains full-size models for one step. A new setting or mixer joins both without being named.
"""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from mixers import MIXERS, Step, build
from recipes import Recipe, load, settings
from training import backbones, microbatch, optimisation
from training.dryrun import KNOWN_SIZES

CELLS = list(itertools.product(settings(), MIXERS))

# By the beginning of the model's name: arguments that keep the family's structure and shrink its depth and width.
SMALLER = {
    "resnet": {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)},
    "resnext": {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)},
    "deit": {"depth": 2, "embed_dim": 48, "img_size": 64},
    "swin": {"depths": (1, 1, 2, 1), "embed_dim": 24, "img_size": 64},
    "convnext": {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)},
    "pvt": {"img_size": 64},
    "moganet": {},
    "tf_efficientnet": {},
    "mobilenetv2": {},
}


def smaller(recipe: Recipe) -> Recipe:
    """The recipe at 64 pixels or less, four images at a time, with a small model of the same family."""
    (family,) = [name for name in SMALLER if recipe.model.startswith(name)]
    return dataclasses.replace(
        recipe,
        model_args=recipe.model_args | SMALLER[family],
        image_size=min(recipe.image_size, 64),
        batch_size=4,
        per_device_train_batch_size=4,
    )


def train(recipe: Recipe, updates: int) -> tuple[Step, torch.nn.Module]:
    """A few updates from the middle of the recipe's schedule on, as in the training job; the step and its start."""
    mixer = build(recipe.mixer, **recipe.mixer_args[recipe.mixer])
    step = Step(backbones.create_model(recipe), mixer, optimisation.criterion(recipe)).train()
    start = copy.deepcopy(step)
    optimizer = optimisation.optimizer(step, recipe)
    per_epoch = -(-KNOWN_SIZES[recipe.dataset] // load(recipe.name).batch_size)
    middle = per_epoch * recipe.epochs // 2
    rng = np.random.default_rng(0)
    for update in range(middle, middle + updates):
        rate = optimisation.learning_rate(recipe, update, per_epoch)
        assert recipe.min_lr < rate <= recipe.lr
        optimisation.set_learning_rate(optimizer, rate)
        size, batch = recipe.image_size, recipe.batch_size
        pixels = torch.from_numpy(rng.integers(0, 256, (batch, 3, size, size), dtype=np.uint8))
        labels = torch.from_numpy(rng.integers(0, recipe.num_classes, batch))
        inputs = microbatch.inputs(pixels, labels, recipe, update, 0, torch.device("cpu"))
        out = step(*inputs)
        assert out.logits.shape == (batch, recipe.num_classes)
        assert torch.isfinite(out.loss)
        torch.testing.assert_close(out.target.sum(1), torch.ones(batch))
        out.loss.backward()
        if recipe.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(step.parameters(), recipe.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        step.mixer.after_step(step.model, (update + 1) / (per_epoch * recipe.epochs))
    return step, start


def check(step: Step, start: torch.nn.Module, recipe: Recipe) -> None:
    """Everything that may learn has learned something, and stayed finite."""
    before = dict(start.named_parameters())
    trained = [(name, p) for name, p in step.named_parameters() if p.requires_grad]
    assert trained
    assert all(torch.isfinite(p).all() for _, p in trained)
    still = [name for name, p in trained if torch.equal(p, before[name])]
    assert len(still) < 0.2 * len(trained), f"{recipe.name}: {still}"
    assert not any(torch.equal(p, before[n]) for n, p in trained if n.endswith(("fc.weight", "head.weight")))
    assert math.isfinite(sum(float(b.double().sum()) for b in step.buffers()))


def test_the_number_of_cells() -> None:
    """25 published settings, eight variants, two of our own; every mixer that exists."""
    assert len(settings()) == 25 + 8 + 2
    assert len(CELLS) == len(settings()) * len(MIXERS) == 35 * len(MIXERS)
    assert {model_family(load(s)) for s in settings()} == set(SMALLER)


def model_family(recipe: Recipe) -> str:
    """The row of SMALLER that a recipe uses."""
    return next(name for name in SMALLER if recipe.model.startswith(name))


@pytest.mark.parametrize(("setting", "mixer"), CELLS, ids=["_".join(cell) for cell in CELLS])
def test_every_setting_trains_with_every_mixer(setting: str, mixer: str) -> None:
    recipe = smaller(load(f"{setting}_{mixer}"))
    check(*train(recipe, updates=2), recipe)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "mixer"), CELLS, ids=["_".join(cell) for cell in CELLS])
def test_every_full_size_model_trains_a_step(setting: str, mixer: str) -> None:
    recipe = dataclasses.replace(load(f"{setting}_{mixer}"), batch_size=2, per_device_train_batch_size=2)
    check(*train(recipe, updates=1), recipe)
