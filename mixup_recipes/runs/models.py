"""A trained model by its name, and how it wants to see images."""

import math
from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

from mixup_recipes import fetch
from mixup_recipes.data.folder import encodable
from mixup_recipes.data.images import EvalTransform
from mixup_recipes.recipe import MULTI_LABEL, Recipe, changed
from mixup_recipes.resolve import resolve
from mixup_recipes.runs.run import FILES, RECIPE, Run
from mixup_recipes.runs.shapes import read_object
from mixup_recipes.training import backbones
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


def open_model(name: str) -> tuple[nn.Module, Run | None]:
    """The model of a run folder, a timm name or ``hf-hub:owner/name``, and its run, where it is one of ours.

    Its configuration says ``multi_label`` where an image may have several labels. Raises ``UserError``, for an unknown
    name with the nearest.
    """
    folder = fetch.snapshot(name, *FILES) if fetch.is_hub(name) else Path(name)
    run = Run.open(folder) if (folder / RECIPE).is_file() else None
    net = fetch.model_of(folder, name) if fetch.is_hub(name) else backbones.load_model(name)
    saved = folder / "config.json"
    if run.recipe.multi_label if run else saved.is_file() and read_object(saved).get("multi_label") is True:
        backbones.cfg_of(net)["multi_label"] = True  # which timm drops
    return net, run


def is_multi_label(net: nn.Module) -> bool:
    """Whether a model of ``open_model`` was trained on images that may have several labels."""
    return backbones.cfg_of(net).get("multi_label") is True


def output_names(net: nn.Module) -> list[str]:
    """What the outputs of a model are called: numbers where its configuration has no names.

    Raises ``UserError`` for names that are no text, or not as many as outputs.
    """
    outputs: Any = net.num_classes
    names = backbones.cfg_of(net).get("label_names") or [str(number) for number in range(outputs)]
    if not isinstance(names, list | tuple) or len(names) != outputs:
        raise UserError(f"the model's label_names: expected a list of {many(outputs, 'name')}, got {names!r:.60}")
    if wrong := [name for name in names if not isinstance(name, str) or not encodable(name)]:
        raise UserError(f"the model's label_names: expected text, got {wrong[0]!a:.60}")
    return list(names)


def evaluation_recipe(
    net: nn.Module, name: str, run: Run | None, changes: dict[str, Any], source: str | None = None
) -> Recipe:
    """The fields that evaluation reads: of ``source``, of the run's recipe, else of the checkpoint's configuration.

    ``changes``: fields that are given instead.
    """
    changes = changes | {"sync_bn": False, "torch_compile": False}
    if source is not None:
        return resolve(source, changes | ({"multi_label": True} if is_multi_label(net) else {}))[0]
    if run is not None:
        return changed(run.recipe_here, **changes)
    config = resolve_model_data_config(net, use_test_size=True)
    size = config["input_size"][1]
    if config["interpolation"] not in ("bilinear", "bicubic") or config["crop_mode"] != "center":
        raise UserError(
            f"{name} asks for {config['interpolation']} interpolation and crop mode {config['crop_mode']}; "
            "supported: bilinear or bicubic, centre crop (pass --recipe to choose another protocol)"
        )
    fields: dict[str, Any] = {
        "name": name,
        "model": "from checkpoint",
        "num_classes": net.num_classes,
        "eval_size": size,
        "eval_resize": math.floor(size / config["crop_pct"] + 1e-6),  # rounded down, as in timm
        "interpolation": config["interpolation"],
        "pixels": "v2",
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
    }
    several = {"multi_label": True, **MULTI_LABEL} if is_multi_label(net) else {}
    return Recipe(**(fields | several | changes))


def eval_transform(net: nn.Module, recipe: Recipe, own: bool) -> EvalTransform:
    """How a model's images are resized and cropped: as the recipe says, or, for ``own``, also to what is no square."""
    config = resolve_model_data_config(net, use_test_size=True)
    _, height, width = config["input_size"]
    if not own or height == width:
        return EvalTransform.of(recipe)
    cover = tuple(math.floor(side / config["crop_pct"] + 1e-6) for side in (height, width))
    return EvalTransform((cover[0], cover[1]), (height, width), recipe.interpolation, recipe.pixels)
