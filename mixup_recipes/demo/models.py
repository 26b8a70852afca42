"""The model that the page asks, and the photos that it starts with."""

import re
from pathlib import Path
from typing import NamedTuple

from timm.data import ImageNetInfo
from torch import nn

from mixup_recipes.data.images import EvalTransform
from mixup_recipes.data.prepare import find_prepared
from mixup_recipes.pages import preview
from mixup_recipes.pages.method_facts import TRAINED, fruit
from mixup_recipes.recipe import Recipe
from mixup_recipes.runs.models import eval_transform, evaluation_recipe, open_model, output_names
from mixup_recipes.training.known_weights import find_weights
from mixup_recipes.typed import UserError

SIDE = 224  # pixels of a photo where no model says another size
MOST = 4  # photos
SYNSET = re.compile(r"n\d{8}")


class Model(NamedTuple):
    """A trained model, and how it sees photos."""

    name: str
    net: nn.Module
    """In evaluation mode."""
    recipe: Recipe
    transform: EvalTransform
    classes: list[str]
    """What its outputs are called, as people say it."""


def open_named(name: str | None) -> Model | None:
    """The model of a run folder, timm name or ``hf-hub:owner/name``; without a name the prepared weights, or None.

    Raises ``UserError``.
    """
    if name is None:
        try:
            find_weights(TRAINED)
        except UserError:
            return None
        name = TRAINED
    net, run = open_model(name)
    recipe = evaluation_recipe(net, name, run, {})
    title = Path(name).resolve().name if run and Path(name).is_dir() else name
    return Model(title, net.eval(), recipe, eval_transform(net, recipe, own=run is None), readable(output_names(net)))


def readable(names: list[str]) -> list[str]:
    """Names of classes as people say them: ImageNet's synsets become their first words."""
    if not all(SYNSET.fullmatch(name) for name in names):
        return names
    info = ImageNetInfo("imagenet-22k")
    return [info.label_name_to_description(name).split(",")[0] for name in names]


def recipe_of(model: Model | None) -> Recipe:
    """The recipe whose settings the page starts from: that of the run, or none in particular."""
    return model.recipe if model else Recipe(dataset=preview.SYNTHETIC, model="test_resnet", image_size=SIDE)


def examples(model: Model | None, photos: str | None) -> preview.Photos:
    """Photos to start with: of a folder, else of the run's data, else of the prepared groceries, else drawn ones.

    Raises ``UserError`` for a folder without photos.
    """
    recipe = recipe_of(model)
    if photos is not None:
        return preview.find_photos(recipe, photos, MOST)
    if recipe.dataset and Path(recipe.dataset).expanduser().exists():
        try:
            return preview.find_photos(recipe, None, MOST)
        except (UserError, OSError):  # images of several labels, or data that have changed
            pass
    return fruit() if find_prepared("groceries") else preview.shapes(MOST)
