"""From decoded images to what a step is given; everything random in it is a function of (seed, update, micro)."""

import numpy as np
import torch
from torch import Tensor

from mixup_recipes.data import images, keys
from mixup_recipes.recipe import Recipe
from mixup_recipes.training import optimisation


def inputs(
    pixels: Tensor, labels: Tensor, recipe: Recipe, update: int, micro: int, device: torch.device
) -> tuple[Tensor, Tensor, np.random.Generator]:
    """Normalised, erased images (B, 3, S, S), smoothed one-hot targets (B, K), and the mixer's generator.

    ``pixels`` uint8 (B, 3, S, S), ``labels`` (B,), ``micro``: position of the micro-batch within its update. Seeds
    the global generators too, from which dropout and drop path draw.
    """
    x = images.normalise(pixels, recipe, device)
    if recipe.reprob:
        x = images.erase(x, recipe.reprob, recipe.remode, keys.rng(keys.ERASE, recipe.seed, update, micro))
    y = optimisation.one_hot(labels.to(device, non_blocking=True), recipe)
    keys.seed_everything(keys.STEP, recipe.seed, update, micro)
    return x, y, np.random.default_rng((recipe.seed, update))  # the same for every micro-batch of the update
