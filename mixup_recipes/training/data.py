"""The data of a run: opened, and held against what it was trained on before."""

import os
from pathlib import Path
from typing import Any

from mixup_recipes.data.identity import counted, difference
from mixup_recipes.data.order import updates_per_epoch
from mixup_recipes.data.splits import Splits, count, load_splits
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.training.folder import noted, trained
from mixup_recipes.training.format import PLACE
from mixup_recipes.training.optimisation import learning_rate
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


def listed(content: Any) -> list[Any]:
    """A list, empty for anything else."""
    return content if isinstance(content, list) else []


def told(content: Any) -> tuple[dict[str, Any], list[str]] | None:
    """Splits and classes of ``data.json`` or of a checkpoint; None for what holds none, or is damaged."""
    splits, classes = (content.get(key) if isinstance(content, dict) else None for key in ("splits", "classes"))
    if not isinstance(splits, dict) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        return None
    rows = [found if isinstance(found, dict) else {} for found in splits.values()]
    whole = [{type(row.get("images")), type(row.get("labels_sha256"))} == {int, str} for row in rows]
    return (splits, classes) if whole and all(whole) else None


def open_data(folder: Path, recipe: Recipe, checkpoint: Path | None, accept: bool, say: Any) -> Splits:
    """The recipe's data, those of the run in the folder if it goes on from a checkpoint; what to know of them is said.

    They are looked for where the run found them, and keep its order of classes. Raises ``UserError`` when they are not
    what the run was trained on, saying what changed; ``accept``: ``data.json`` says so instead.
    """
    before, where = (noted(folder, name) if trained(folder) else {} for name in ("data.json", PLACE))
    place = where.get("path")
    saved = noted(checkpoint, "state.json").get("data") if checkpoint else None
    then, classes = told(saved) or told(before) or (None, None)
    if checkpoint and not (then and classes) and not accept:
        raise UserError(
            f"{folder / 'data.json'} is missing or damaged, so it is not known what the run was trained on; put it "
            "back, or pass --accept_changed_data to continue anyway"
        )
    then = then or {}
    moved = before.get("dataset", recipe.dataset) != recipe.dataset
    there = not moved and isinstance(place, str) and os.path.exists(place)
    splits = load_splits(changed(recipe, dataset=place) if there else recipe, classes or ())
    splits.identity["dataset"] = recipe.dataset
    now = splits.identity
    traced = any(found.get("fingerprint") for found in then.values())
    if then and moved and not traced:
        raise UserError(f"{folder} has no fingerprint of its data, so dataset must stay {before['dataset']!r}")
    words = []
    for split, found in now["splits"].items():
        if split in then and (change := difference(then[split], found, classes or splits.classes, splits.classes)):
            words.append(f"split {split!r}: {change}")
    if before.get("commit") not in (None, now["commit"]):
        words.append(f"commit {before['commit']} then, {now['commit']} now")
    if words and not accept:
        raise UserError(
            f"dataset {recipe.dataset!r} is not what {folder} was trained on: {'; '.join(words)}; put the old data "
            "back, train again into another --output_dir, or pass --accept_changed_data to continue anyway"
        )
    update = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    kept = [c for c in listed(before.get("changed")) if isinstance(c, dict) and type(c.get("update")) is int]
    now["changed"] = [change for change in kept if change["update"] < update]
    notes = splits.notes
    if words:
        now["changed"].append({"update": update, "changed": "; ".join(words)})
        notes = [*notes, f"the run continues on other images: {'; '.join(words)}"]
        images, here = then.get(recipe.train_split, {}).get("images"), count(splits.train)
        if checkpoint and images and updates_per_epoch(images, recipe) != updates_per_epoch(here, recipe):
            raise UserError(
                f"{folder}: the training split had {many(images, 'image')} and now has {here:,}, so its epochs have "
                "another length and the run cannot continue; train again into another --output_dir"
            )
    elif then and not traced:
        notes = [
            *notes,
            "the run has no fingerprint of its data, so only the number and the labels of the images were compared",
        ]
    check_rates(recipe, count(splits.train))
    for line in split_lines(splits) + notes:
        say(line)
    return splits


def check_rates(recipe: Recipe, images: int) -> None:
    """Raise ``UserError`` for a run that would learn nothing: its only update is the start of the warm-up."""
    per_epoch = updates_per_epoch(images, recipe)
    if per_epoch * recipe.epochs == 1 and learning_rate(recipe, 0, per_epoch) == 0:
        raise UserError(
            f"{many(images, 'image')} make a single update, and the warm-up starts at a learning rate of 0, so "
            "nothing would be learnt; pass --warmup_epochs 0, or more --epochs"
        )


def split_lines(splits: Splits) -> list[str]:
    """How many images of how many classes the splits have, a line each."""
    return [f"{split}: {counted(found, splits.classes)}" for split, found in splits.identity["splits"].items()]
