"""How good a frozen model's features are: what classifiers that are read off them score, see ``runs/readout.py``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mixers import taps
from mixup_recipes import files
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.splits import Split, load_splits
from mixup_recipes.runs import features, readout
from mixup_recipes.runs.features import Features, UpToClassifier
from mixup_recipes.runs.models import eval_transform, evaluation_recipe, open_model
from mixup_recipes.runs.scored import other_data
from mixup_recipes.training import backbones, launch
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


def probe(
    name: str,
    methods: Sequence[str],
    changes: dict[str, Any],
    source: str | None = None,
    ks: Sequence[str] | None = None,
    temperature: float = readout.TEMPERATURE,
    on_bad_image: str = "stop",
    workers: int | None = None,
    keep: Path | None = None,
    output: Path | None = None,
) -> str:
    """``mixup-recipes probe``: score a frozen model by ``methods``, of knn and linear; returns the scores, in lines.

    ``name``: a run folder, timm name, ``hf-hub:owner/name`` or prepared weights. ``changes``: fields of its recipe, or
    of ``source``, that are given instead. ``ks``: numbers of neighbours; None: the usual ones. ``keep``: the file for
    the features, which are read where it is there. ``output``: the file for the scores, JSON. Raises ``UserError``.
    """
    numbers = counts(ks)
    check_arguments(temperature, keep, output)
    net, run = open_model(name)
    if "dataset" not in changes and source is None and run is None:
        raise UserError(f"{name} comes without a recipe, so the data are not known; pass --dataset or --recipe")
    # as many classes as the data have; float32, so that features are the same whatever the training's precision was
    changes = changes | {"num_classes": 0, "streaming": False, "mixed_precision": "no"}
    recipe = evaluation_recipe(net, name, run, changes, source)
    if recipe.multi_label:
        raise UserError(f"{name}: a probe needs images with one class each, and these may have several labels")
    if recipe.train_split == recipe.eval_split:
        raise UserError(
            f"a probe cannot learn from and score the same split {recipe.eval_split!r}; pass another --split"
        )
    transform = eval_transform(net, recipe, own=run is None and source is None)
    frozen = UpToClassifier(net)
    wide = features.width(frozen, tuple(transform.size), name)
    splits = load_splits(recipe)
    held_out = Split(splits.eval, splits.classes, splits.identity["splits"][recipe.eval_split], [])
    for note in (*splits.notes, *other_data(run, recipe, held_out)):
        print(note, flush=True)

    seen: dict[str, Any] = {"eval": str(transform), "pixels": recipe.pixels, "upright": recipe.exif_orientation}
    seen |= {"mean": list(recipe.mean), "std": list(recipe.std)}
    data = splits.identity
    of: dict[str, Any] = {"weights_sha256": taps.fingerprint(net), "model": built(net), "images": seen}
    of |= {key: data[key] for key in ("splits", "classes")}
    found = features.kept(keep, of) if keep else None
    accelerator = launch.accelerator(recipe, Path("."))
    if found is None:
        frozen = launch.on_device(frozen, recipe, accelerator)
        loaders = launch.workers(workers, accelerator, recipe)
        found = {}
        for split, table in ((recipe.train_split, splits.train), (recipe.eval_split, splits.eval)):
            print(f"{split}: {wide} features of {many(len(table), 'image')}, {transform}", flush=True)
            samples = Samples(table, recipe, transform, on_bad_image)
            found[split] = features.of_images(frozen, samples, recipe, accelerator.device, loaders)
        if keep:
            features.keep(keep, found, of)
    else:
        print(f"{keep} has the features of these images", flush=True)

    train, held = found[recipe.train_split], found[recipe.eval_split]
    # float64 is not on every accelerator
    device = accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")
    scores = scored(train, held, len(splits.classes), methods, numbers, temperature, device)
    images = {recipe.train_split: len(train.y), recipe.eval_split: len(held.y)}
    scores |= {"features": wide, "counts": images, "bad_images": train.bad + held.bad}
    if output:
        of |= {"model": name} | {key: data[key] for key in ("dataset", "config", "commit")}
        files.write_json(output, of | scores)
    return lines(scores)


def counts(ks: Sequence[str] | None) -> Sequence[int]:
    """The numbers of neighbours. Raises ``UserError`` for what is none."""
    if wrong := [k for k in ks or () if not k.isdecimal() or not int(k)]:
        raise UserError(f"k: expected integers at least 1, got {wrong[0]!r}")
    return [int(k) for k in ks] if ks else readout.KS


def built(net: Any) -> dict[str, str]:
    """What of a model's features its weights do not tell."""
    architecture = backbones.cfg_of(net).get("architecture") or type(net).__name__
    return {"architecture": str(architecture), "pool": str(getattr(net, "global_pool", ""))}


def check_arguments(temperature: float, keep: Path | None, output: Path | None) -> None:
    """Raise ``UserError`` for what can be told before anything is opened."""
    if not temperature > 0:
        raise UserError(f"temperature: expected a number above 0, got {temperature:g}")
    for file in (keep, output):
        if file and not file.parent.is_dir():
            raise UserError(f"cannot write {file}: there is no folder {file.parent}")


def scored(
    train: Features,
    held_out: Features,
    classes: int,
    methods: Sequence[str],
    ks: Sequence[int],
    temperature: float,
    device: torch.device,
) -> dict[str, Any]:
    """What the classifiers score that are read off the features of the training images."""
    scores: dict[str, Any] = {}
    if "knn" in methods:
        votes = readout.neighbours(train, held_out, classes, ks, temperature, device)
        by_k = {str(k): readout.rates(found, held_out.y, votes=True) for k, found in votes.items()}
        scores["knn"] = {"temperature": temperature, "k": by_k}
    if "linear" in methods:
        l2 = readout.chosen(train, classes, device)
        logits = readout.regression(train, classes, l2, device)(held_out.x)
        scores["linear"] = {"l2": l2, "tried": list(readout.GRID), **readout.rates(logits, held_out.y)}
    return scores


def lines(scores: dict[str, Any]) -> str:
    """The scores for people."""
    rows = [(f"knn k={k}", said(found)) for k, found in scores.get("knn", {}).get("k", {}).items()]
    if linear := scores.get("linear"):
        edge = ", the first or last value that was tried" * (linear["l2"] in (linear["tried"][0], linear["tried"][-1]))
        rows.append(("linear", f"{said(linear)}  (l2 {linear['l2']:g}{edge})"))
    rows.append(("bad_images", str(scores["bad_images"])))
    return "\n".join(f"{name:14}{value}" for name, value in rows)


def said(found: dict[str, float]) -> str:
    """Top-1 and top-5."""
    return f"top1 {found['top1']:.4f}  top5 {found['top5']:.4f}"
