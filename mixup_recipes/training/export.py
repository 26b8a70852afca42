"""What a run exports after an evaluation: at the folder's root a model repository in timm's format."""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from timm.models import save_for_hf
from torch import nn

from mixup_recipes.files import file_hash, write, write_json, writing
from mixup_recipes.recipe import Recipe, to_yaml
from mixup_recipes.training.format import OF_SEVERAL, PREDICTIONS
from mixup_recipes.training.log import Line, evaluations, reported, summary_csv


def export_epoch(
    folder: Path,
    nets: dict[str, nn.Module],
    columns: dict[str, dict[str, np.ndarray]],
    recipe: Recipe,
    classes: list[str],
    log: Sequence[Line],
    epoch: int,
) -> None:
    """After an evaluation: bring the folder's root up to date, so that it is usable whenever the run ends.

    The exported weights are the last ones, or those of the best epoch where the protocol reports that; with them
    goes what they say of each image. ``nets``: the classifiers that were evaluated, by name; the reported one is
    exported at the root, the others under ``models/<name>`` (``raw`` beside an average that is reported).
    ``columns``: by the same names, see ``evaluation.predict``. ``log``: all lines so far.
    """
    main = "ema" if recipe.report_ema else ""
    numbers = reported(log, recipe)
    lines = {e: {k: v for k, v in x.items() if k not in ("mode", "perf")} for e, x in evaluations(log).items()}
    results = folder / "eval_results.json"
    exported = json.loads(results.read_text())["exported"] if results.exists() else None
    # after going back to an earlier checkpoint the folder may hold weights that the log no longer knows
    if recipe.protocol == "median" or numbers["reported"]["epoch"] == epoch or exported not in lines.values():
        for name, net in nets.items():
            place = folder if name == main else folder / "models" / (name or "raw")
            with writing(place / "model.safetensors"):
                place.mkdir(parents=True, exist_ok=True)
                export(net, place, recipe, classes)
                if place != folder:
                    write(place / "recipe.yaml", to_yaml(recipe))
        write_predictions(folder / "predictions.safetensors", columns[main])
        exported = lines[epoch]
    write(folder / "summary.csv", summary_csv(log))
    weights = file_hash(folder / "model.safetensors")  # tells a later push that all of this belongs together
    write_json(results, {"exported": exported, **numbers, "weights_sha256": weights})


def write_predictions(path: Path, columns: dict[str, np.ndarray], notes: dict[str, str] | None = None) -> None:
    """What a model says of each image, whole or not at all: columns of ``evaluation.predict``, one row per image.

    ``index`` (N,), ``label`` (N,), ``top`` (N, up to 5) int32; ``confidence`` (N,), ``nll`` (N,) float32. Where an
    image may have several labels: ``index`` (N,) int32, ``label`` (N, K) uint8, ``score`` (N, K) float32. ``notes``:
    metadata of the file.
    """
    types = {k: kind for k, (kind, _) in (OF_SEVERAL if "score" in columns else PREDICTIONS).items()}
    rows = {k: np.ascontiguousarray(columns[k], kind) for k, kind in types.items()}
    write(path, safetensors.numpy.save(rows, notes))


def export(model: nn.Module, folder: Path, recipe: Recipe, classes: list[str]) -> None:
    """``config.json`` and ``model.safetensors`` that timm (``local-dir:``) and transformers load alike.

    Two traps of timm 1.0.31 are mended: the provenance of timm's own pretrained weights is not claimed for
    weights trained here, and ``num_classes`` does not stand among the model's arguments, where transformers
    would receive it twice.
    """
    aside = folder / ".export.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    size = (3, recipe.eval_size, recipe.eval_size)
    said: dict[str, Any] = {name: True for name in ("exif_orientation", "multi_label") if getattr(recipe, name)}
    if recipe.multi_label:  # by which transformers knows to take a sigmoid
        said["problem_type"] = "multi_label_classification"
    ours = {
        "tag": f"{recipe.mixer}_e{recipe.epochs}",
        "license": None,
        "origin_url": None,
        "paper_ids": None,
        "paper_name": None,
        "notes": None,
    }
    save_for_hf(
        copy.deepcopy(model).to(memory_format=torch.contiguous_format),  # safetensors takes no other layout
        str(aside),
        safe_serialization=True,
        model_config={"pretrained_cfg": ours, "label_names": classes, "recipe": recipe.name} | said,
        data_config={
            "input_size": size,
            "crop_pct": recipe.eval_size / recipe.eval_resize,
            "interpolation": recipe.interpolation,
            "mean": recipe.mean,
            "std": recipe.std,
            "crop_mode": "center",
        },
    )
    config = json.loads((aside / "config.json").read_text())
    config.get("model_args", {}).pop("num_classes", None)
    config["pretrained_cfg"] = {k: v for k, v in config["pretrained_cfg"].items() if v is not None}
    write_json(aside / "config.json", config)
    shutil.copymode(aside / "config.json", aside / "model.safetensors")  # safetensors writes for the owner alone
    for name in ("model.safetensors", "config.json"):
        os.replace(aside / name, folder / name)
    shutil.rmtree(aside)
