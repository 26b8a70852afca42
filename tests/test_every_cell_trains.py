"""Every setting x every mixer builds its model, mixer, optimiser and schedule from the recipe, and trains two steps.

The full recipe is resolved and validated; what does not fit two cores (depth, width, resolution, batch) is made smaller
here. Each setting takes every sixteenth mixer, in turn, of those on CIFAR one of each network; the slow versions do the
rest, and train full-size models for one step. A new setting or mixer joins without being named.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from mixers import MIXERS, Step, build
from mixup_recipes.data.known import KNOWN_SIZES
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe, settings
from mixup_recipes.training import backbones, optimisation
from mixup_recipes.training.update import criterion, inputs

# By the beginning of the model's name: arguments that keep the family's structure and shrink its depth and width.
# ``img_size`` is set to the size of the images.
SMALLER: dict[str, dict] = {
    "resnet": {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)},
    "resnext": {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)},
    "deit": {"depth": 2, "embed_dim": 48, "img_size": None},
    "vit": {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": None},
    "swin": {"depths": (1, 1, 2, 1), "embed_dim": 24, "img_size": None},
    "convnext": {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)},
    "pvt": {"img_size": None, "depths": (2, 2, 2, 2)},
    "wide_resnet": {"depth": 1, "widths": (16, 32, 64)},
    "moganet": {},
    "tf_efficientnet": {},
    "mobilenetv2": {},
}
# Their depth is no argument: small models of the same class, and of MogaNet a constant.
SMALLER_MODEL = {"tf_efficientnet": "test_efficientnet", "mobilenetv2": "mobilenetv2_035"}
MOGANET = (1, 1, 2, 1)

# By mixer: the families of models that it cannot train; the error names some that it can.
WITHOUT_ATTENTION = {"resnet", "resnext", "wide_resnet", "convnext", "moganet", "tf_efficientnet", "mobilenetv2"}
UNSUPPORTED = dict.fromkeys(("transmix", "tokenmix", "smmix", "mixpro"), WITHOUT_ATTENTION)
UNSUPPORTED["tlalign"] = UNSUPPORTED["tokenmixup"] = UNSUPPORTED["mergemix"] = WITHOUT_ATTENTION | {"swin", "pvt"}
UNSUPPORTED["mixtoken"] = WITHOUT_ATTENTION | {"pvt"}


def family(recipe: Recipe) -> str:
    """The row of SMALLER that a recipe uses."""
    (name,) = [name for name in SMALLER if recipe.model.startswith(name)]
    return name


def smaller(recipe):
    """The recipe at 32 pixels, four images at a time, with a small model of the same family."""
    size = min(recipe.image_size, 32)
    args = recipe.model_args | SMALLER[family(recipe)]
    args |= {"img_size": size} if "img_size" in args else {}
    model = SMALLER_MODEL.get(family(recipe), recipe.model)
    few = {"batch_size": 4, "per_device_train_batch_size": 4}
    return dataclasses.replace(recipe, model=model, model_args=args, image_size=size, **few)


MADE: dict[str, torch.nn.Module] = {}  # the last model as it was made, by its recipe


def create_model(recipe: Recipe) -> torch.nn.Module:
    """The recipe's model, made anew where more than the mixer differs from the recipe before; a copy of it."""
    key = repr(dataclasses.asdict(recipe) | {"name": "", "mixer": "", "mixer_args": {}})
    if key not in MADE:
        MADE.clear()
        MADE[key] = backbones.create_model(recipe)
    return copy.deepcopy(MADE[key])


def train(recipe, updates):
    """A few updates from the middle of the recipe's schedule on, as in the training job.

    The whole model is reached by a gradient; what felt one worth a movement in float32 has moved (a block's last scale
    starts at 0: nothing is felt before it at first), the classifier too; everything stays finite.
    """
    step = Step(create_model(recipe), build(recipe.mixer, **recipe.mixer_args[recipe.mixer]), criterion(recipe)).train()
    start = {name: p.detach().clone() for name, p in step.named_parameters()}
    optimizer = optimisation.optimizer(step, recipe)
    per_epoch = -(-KNOWN_SIZES[recipe.dataset] // load_recipe(recipe.name).batch_size)
    middle = per_epoch * recipe.epochs // 2
    reached, felt, rng = set(), set(), np.random.default_rng(0)
    for update in range(middle, middle + updates):
        assert recipe.min_lr < optimisation.learning_rate(recipe, update, per_epoch) <= recipe.lr
        optimisation.set_learning_rates(optimizer, recipe, update, per_epoch)
        size, batch = recipe.image_size, recipe.batch_size
        pixels = torch.from_numpy(rng.integers(0, 256, (batch, 3, size, size), dtype=np.uint8))
        labels = torch.from_numpy(rng.integers(0, recipe.num_classes, batch))
        out = step(*inputs(pixels, labels, recipe, update, 0, torch.device("cpu")))
        assert out.logits.shape == (batch, recipe.num_classes) and torch.isfinite(out.loss)
        torch.testing.assert_close(out.target.sum(1), torch.ones(batch))
        out.loss.backward()
        if recipe.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(step.parameters(), recipe.clip_grad)
        gradients = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
        reached |= gradients.keys()
        felt |= {name for name, gradient in gradients.items() if gradient.abs().max() > 1e-4}
        optimizer.step()
        optimizer.zero_grad()
        step.mixer.after_step(step.model, (update + 1) / (per_epoch * recipe.epochs))
    after = dict(step.named_parameters())
    assert felt and reached >= {f"model.{name}" for name, p in step.model.named_parameters() if p.requires_grad}
    (head,) = [name for name, p in after.items() if p is step.model.get_classifier().weight]
    assert not [name for name in (*felt, head) if torch.equal(after[name], start[name])], recipe.name
    assert all(torch.isfinite(tensor).all() for tensor in (*after.values(), *step.buffers()))


def test_the_settings_are_60_published_ones_eight_variants_and_ten_of_our_own_and_use_every_row_above() -> None:
    assert len(settings()) == 60 + 8 + 10
    assert {family(load_recipe(s)) for s in settings()} == set(SMALLER)


def in_turn(setting: str, mixer: str) -> bool:
    """Whether a cell is trained each time, and not by the slow version alone."""
    if setting.startswith("cifar10") and not setting.endswith(("r18_200e", "rx50_200e", "wrn288_400e", "_t_200e")):
        return False  # longer, or DeiT-S on enlarged images: nothing here tells them from another one
    return ([*settings()].index(setting) + [*MIXERS].index(mixer)) % 16 == 0


@pytest.mark.parametrize("size", ["small", *(pytest.param(s, marks=pytest.mark.slow) for s in ("small, rest", "full"))])
@pytest.mark.parametrize("setting", settings())
def test_every_setting_trains_with_every_mixer(setting, size, subtests, monkeypatch):
    if size != "full":
        monkeypatch.setattr(backbones.moganet, "DEPTHS", MOGANET)
    for mixer in MIXERS:
        if size != "full" and in_turn(setting, mixer) != (size == "small"):
            continue
        with subtests.test(mixer=mixer):
            full = load_recipe(f"{setting}_{mixer}")
            two = dataclasses.replace(full, batch_size=2, per_device_train_batch_size=2)
            recipe, updates = (two, 1) if size == "full" else (smaller(full), 2)
            if family(full) not in UNSUPPORTED.get(mixer, ()):
                train(recipe, updates)
                continue
            with pytest.raises(ValueError, match="deit_small_patch16_224"):
                train(recipe, updates)
