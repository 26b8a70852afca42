"""The suite of robustness: which parts are asked for, what they found, and of what."""

import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixup_recipes.data.identity import some
from mixup_recipes.data.opening import is_path
from mixup_recipes.data.prepare import PREPARED
from mixup_recipes.data.splits import Split, labels_of, load_split
from mixup_recipes.fetch import is_hub
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.robustness import parts
from mixup_recipes.robustness.passes import SEED, Bench, Columns
from mixup_recipes.robustness.subsets import outputs_of
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
        raise UserError("the part ood needs a second data set, whose classes the model does not know: --ood DATASET")
    if asked and "ood" not in asked and second is not None:
        raise UserError(f"--ood {second} is for the part ood, which is not among --parts {' '.join(asked)}")
    wanted = {*(asked or robustness_file.PARTS)} - ({"ood"} if second is None else set())
    return tuple(part for part in robustness_file.PARTS if part in wanted)


def target(recipe: Recipe, name: str, output: Path | None, run: Run | None, asked: tuple[str, ...]) -> Path:
    """The JSON file to write: ``output``, or that of the run folder ``name``.

    Raises ``UserError`` where there is neither, and for a model of images that may have several labels: each part that
    is ``asked`` for means one.
    """
    if recipe.multi_label:
        raise UserError(
            f"{name}: its images may have several labels, and {', '.join(asked)} mean one label per image; without "
            "--suite, evaluate has their mAP, F1 and NLL"
        )
    if output is not None:
        if output.suffix != ".json":
            raise UserError(f"--output {output}: expected a name that ends in .json, beside which a .png goes")
        return output
    if run is None or is_hub(name):
        raise UserError(f"where to write? {name} is no run folder of this machine; pass --output FILE.json")
    return run.folder / robustness_file.NAME


class Second(NamedTuple):
    """A second data set, and the recipe by which its images are read."""

    split: Split
    recipe: Recipe
    notes: list[str]


def second_set(recipe: Recipe, name: str, split: str | None, classes: list[str]) -> Second:
    """All images of a data set, read as those of the evaluation are. ``split``: default that of the evaluation.

    ``classes``: of the model, which these images should not be of.
    """
    split = split or recipe.eval_split
    own = {"image_column": "image", "label_column": "label", "dataset_config": None, "dataset_revision": None}
    there = changed(recipe, dataset=name, train_split=split, eval_split=split, num_classes=0, **own)
    found = load_split(there, split, recipe.max_eval_samples)
    same = [one for one in found.classes if one in {*classes}]
    notes = [f"second data set: {note}" for note in found.notes]
    if same:
        notes.append(f"second data set: the model knows {many(len(same), 'class')} of it by name: {some(same)}")
    return Second(found, there, notes)


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


def measure(bench: Bench, asked: tuple[str, ...], second: Second | None = None) -> dict[str, Any]:
    """``clean`` and the parts that are asked for, with the ``budgets`` of these; the same on every process.

    ``second``: for ``ood``. Says on the screen what is done next.
    """
    bench.net.eval().requires_grad_(False)

    def say(part: str) -> None:
        bench.accelerator.print(f"{part} ...", flush=True)

    say("clean")
    columns = parts.clean(bench, with_logits="calibration" in asked)
    found: dict[str, Any] = {"budgets": {part: parts.BUDGETS[part] for part in asked}, "clean": score(columns)}
    for part in asked:
        say(part)
        found[part] = part_of(part, bench, columns, found["clean"]["top1"], second)
    return found


def part_of(part: str, bench: Bench, columns: Columns, top1: float, second: Second | None) -> dict[str, Any]:
    """The numbers of one part. ``columns``, ``top1``: of the images as they are."""
    if part == "attacks":
        return parts.attacked(bench)
    if part == "corruptions":
        return parts.corrupt(bench, of_imagenet(bench))
    if part == "occlusion":
        return parts.occlude(bench, top1)
    if part == "calibration":
        return parts.calibrate(bench, columns)
    assert second is not None
    other = replace(bench, table=second.split.table, recipe=second.recipe)
    return {"data": identity(second.recipe, second.split)} | parts.apart(columns, other)


def of_imagenet(bench: Bench) -> bool:
    """Whether the classes are ImageNet's thousand, all of which have images: else AlexNet's errors mean nothing."""
    seen = np.unique(np.asarray(labels_of(bench.table, bench.recipe.label_column)))
    return len(seen) == 1000 and outputs_of(bench.net) is not None
