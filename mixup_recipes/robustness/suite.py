"""The suite of robustness: which parts are asked for, what they found, and of what."""

import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from mixup_recipes.data.classes import synsets
from mixup_recipes.data.identity import some
from mixup_recipes.data.multi_label import is_many
from mixup_recipes.data.opening import is_path, open_split
from mixup_recipes.data.origin import Opened, files_of, note_files
from mixup_recipes.data.prepare import PREPARED
from mixup_recipes.data.splits import Split, labels_of, prepared
from mixup_recipes.fetch import is_hub
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.robustness import corruptions, occlusion, parts
from mixup_recipes.robustness.passes import SEED, Bench, Columns
from mixup_recipes.robustness.subsets import outputs_of, thousand
from mixup_recipes.runs import robustness_file
from mixup_recipes.runs.run import Run
from mixup_recipes.training.evaluation import score
from mixup_recipes.training.folder import PACKAGES, git_commit
from mixup_recipes.training.format import FORMAT
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


def chosen(asked: tuple[str, ...], second: str | None) -> tuple[str, ...]:
    """The parts that are measured, in their order: those asked for, or all that can be where none is.

    ``second``: the name of a second data set, which ``ood`` needs. Raises ``UserError``.
    """
    if "ood" in asked and second is None:
        raise UserError(
            "the part ood needs a second data set, whose classes the model does not know; pass --ood DATASET"
        )
    if asked and "ood" not in asked and second is not None:
        raise UserError(f"--ood {second} needs the part ood, which is not among --parts {' '.join(asked)}")
    wanted = {*(asked or robustness_file.PARTS)} - ({"ood"} if second is None else set())
    return tuple(part for part in robustness_file.PARTS if part in wanted)


def target(recipe: Recipe, name: str, output: Path | None, run: Run | None, asked: tuple[str, ...]) -> Path:
    """The JSON file to write: ``output``, or that of the run folder ``name``.

    Raises ``UserError`` where there is neither, and for a model of images that may have several labels: each part that
    is ``asked`` for means one.
    """
    if recipe.multi_label:
        raise UserError(
            f"{name}: its images may have several labels, and {', '.join(asked)} need one label per image; evaluate "
            "without --suite reports mAP, F1 and NLL"
        )
    if output is not None:
        if output.suffix != ".json":
            raise UserError(f"--output {output}: expected a name that ends in .json; a .png is written beside it")
        return output
    if run is None or is_hub(name):
        raise UserError(
            f"{name} is not a run folder on this machine, so the results have no place there; pass --output FILE.json"
        )
    return run.folder / robustness_file.NAME


class Second(NamedTuple):
    """A second data set, and the recipe by which its images are read."""

    split: Split
    recipe: Recipe
    notes: list[str]


def second_set(recipe: Recipe, name: str, split: str | None, classes: list[str]) -> Second:
    """All images of a data set, read as those of the evaluation are. ``split``: default that of the evaluation.

    ``classes``: of the model, which these images should not be of. Its own labels are not needed.
    """
    split = split or recipe.eval_split
    own = {"dataset_config": None, "dataset_revision": None, "holdout": recipe.holdout or 0.2}  # 0 wants two splits
    there = changed(recipe, dataset=name, train_split=split, eval_split=split, num_classes=0, **own)
    opened, there, labelled = in_columns(there, split)
    found = prepared(opened, there, split, recipe.max_eval_samples)
    notes = [] if labelled else [f"no column {there.label_column!r}, so nothing is known of its classes"]
    same = [one for one in found.classes if one in {*classes}] if labelled else []
    if same:
        notes.append(f"the model knows {many(len(same), 'class')} of it by name: {some(same)}")
    return Second(found, there, [f"second data set: {note}" for note in (*found.notes, *notes)])


def in_columns(recipe: Recipe, split: str) -> tuple[Opened, Recipe, bool]:
    """A data set as it was found, the recipe with its columns, and whether it has one label for each image.

    The columns are the recipe's own where they are there, else the usual ones, or the only one of images. Where there
    are no labels, all images get the same: none is looked at.
    """
    usual = changed(recipe, image_column=Recipe.image_column, label_column=Recipe.label_column)
    try:
        opened = open_split(recipe, split)
    except UserError:  # a table of paths, or tars, with other columns
        if usual == recipe:
            raise
        recipe, opened = usual, open_split(usual, split)
    features = opened.table.features
    images = [column for column in (recipe.image_column, usual.image_column) if column in features]
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    image = [*images, *pictures[: len(pictures) == 1], usual.image_column][0]
    labels = [c for c in (recipe.label_column, usual.label_column) if c in features and not is_many(features[c])]
    label = [*labels, usual.label_column][0]
    if (found := changed(recipe, image_column=image, label_column=label)) != recipe:
        opened = open_split(found, split)  # which may read images by their column
    if not labels and image in features:
        table, one = opened.table.select_columns([image]), datasets.ClassLabel(names=["an image"])
        table = table.add_column(label, np.zeros(len(table), np.int64), feature=one)
        note_files(table, files_of(opened.table))
        opened = opened._replace(table=table)
    return opened, found, bool(labels)


def identity(recipe: Recipe, split: Split) -> dict[str, Any]:
    """Which images were looked at, without folders of this machine."""
    name = recipe.dataset
    local = name not in PREPARED and (is_path(name) or Path(name).exists())
    told: dict[str, Any] = {"dataset": Path(name).resolve().name if local else name, "split": recipe.eval_split}
    return told | {k: v for k, v in split.identity.items() if k in ("images", "labels_sha256", "fingerprint")}


def about(name: str, bench: Bench, split: Split, run: Run | None) -> dict[str, Any]:
    """What the numbers are of, and what they depend on. ``name``: of the model, without its folders; of ``run``."""
    return {
        "format": FORMAT,
        "model": Path(name).resolve().name if Path(name).exists() else name,
        "weights_sha256": run.weights_hash if run else None,
        "data": identity(bench.recipe, split),
        "transform": str(bench.transform),
        "seed": SEED,
        "device": bench.accelerator.device.type,
        "mixed_precision": bench.recipe.mixed_precision,
        "python": platform.python_version(),
        "packages": {package: metadata.version(package) for package in (*PACKAGES, "scipy")},
        "commit": git_commit(),
    }


def measure(bench: Bench, asked: tuple[str, ...], classes: list[str], second: Second | None = None) -> dict[str, Any]:
    """``clean`` and the parts that are asked for, with the ``budgets`` of these; the same on every process.

    ``classes``: what the data call theirs. ``second``: for ``ood``. Says on the screen what is done next. Raises
    ``UserError`` before any image is read where there are too few of them, or too few pixels.
    """
    if "calibration" in asked and len(bench.table) < 2:
        raise UserError(
            "calibration fits on one half of the images and scores on the other, so it needs at least 2 images, got "
            f"{len(bench.table)}"
        )
    if "occlusion" in asked and min(bench.transform.size) < occlusion.GRID:
        given = " x ".join(map(str, bench.transform.size))
        raise UserError(
            f"occlusion hides cells of {occlusion.GRID} a side, got images of {given} pixels; leave out the part "
            "occlusion"
        )
    bench.net.eval().requires_grad_(False)

    def say(part: str) -> None:
        bench.accelerator.print(f"{part} ...", flush=True)

    say("clean")
    columns = parts.clean(bench, with_logits="calibration" in asked)
    found: dict[str, Any] = {"budgets": {part: parts.BUDGETS[part] for part in asked}, "clean": score(columns)}
    for part in asked:
        say(part)
        found[part] = part_of(part, bench, columns, found["clean"]["top1"], classes, second)
    return found


def part_of(
    part: str, bench: Bench, columns: Columns, top1: float, classes: list[str], second: Second | None
) -> dict[str, Any]:
    """The numbers of one part. ``columns``, ``top1``: of the images as they are."""
    if part == "attacks":
        return parts.attacked(bench)
    if part == "corruptions":
        return parts.corrupt(bench, of_imagenet(bench, classes))
    if part == "occlusion":
        return parts.occlude(bench, top1)
    if part == "calibration":
        return parts.calibrate(bench, columns)
    assert second is not None
    other = replace(bench, table=second.split.table, recipe=second.recipe)
    return {"data": identity(second.recipe, second.split)} | parts.apart(columns, other)


def of_imagenet(bench: Bench, classes: list[str]) -> bool:
    """Whether AlexNet's errors mean something here: the model's classes and those of the data are ImageNet's thousand,
    each of which has images, and corruptions are as strong as ImageNet-C's. ``classes``: what the data call theirs.
    """
    seen = np.unique(np.asarray(labels_of(bench.table, bench.recipe.label_column)))
    told = synsets(classes, len(classes)) or []
    known = outputs_of(bench.net) is not None and sorted(told) == sorted(thousand())
    return known and len(seen) == 1000 and corruptions.reference_side(*bench.transform.size) == 224
