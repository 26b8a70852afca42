"""How pretrained weights want to see images: what a recipe with ``data_config: pretrained`` takes from them."""

import json
import math
from typing import Any

import timm
from timm.data import resolve_data_config

from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import check_model, folder_of


def of_weights(recipe: Recipe, origin: dict[str, str]) -> dict[str, Any]:
    """The fields of a recipe that come from the weights which it starts from: those that were not given.

    ``origin``: of every value, see ``resolve``. Raises ``UserError`` for weights that are not there.
    """
    if recipe.data_config != "pretrained" or recipe.pretrained is None:
        return {}
    config = resolve_data_config(pretrained_cfg=configuration(recipe))
    size = config["input_size"][-1] if origin["image_size"] == "default" else recipe.image_size
    evaluated = size if origin["eval_size"] == "default" else recipe.eval_size
    fields = {
        "image_size": size,
        "eval_size": evaluated,
        "eval_resize": math.floor(evaluated / config["crop_pct"] + 1e-6),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
    }
    if config["interpolation"] in ("bilinear", "bicubic"):
        fields["interpolation"] = config["interpolation"]
    return {name: value for name, value in fields.items() if origin[name] == "default"}


def configuration(recipe: Recipe) -> dict[str, Any]:
    """timm's configuration of the weights that a recipe starts from."""
    name = recipe.pretrained or ""
    folder = folder_of(name)
    if folder is not None:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text()).get("pretrained_cfg") or {}
        return found
    check_model(recipe.model)
    cfg = timm.get_pretrained_cfg(name if timm.is_model_pretrained(name) else recipe.model)
    return cfg.to_dict() if cfg else {}
