"""The data of a run: opened, and held against what it was trained on before."""

from pathlib import Path
from typing import Any

from mixup_recipes.data.identity import difference
from mixup_recipes.data.splits import Splits, load_splits
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.training.folder import noted
from mixup_recipes.training.format import PLACE
from mixup_recipes.typed import UserError


def open_data(folder: Path, recipe: Recipe, checkpoint: Path | None, accept: bool, say: Any) -> Splits:
    """The recipe's data, those of the run in the folder if it goes on from a checkpoint; what to know of them is said.

    They are looked for where the run found them, and keep its order of classes. Raises ``UserError`` when they are not
    what the run was trained on, saying what changed; ``accept``: the record says so instead.
    """
    before, place = noted(folder, "data.json"), noted(folder, PLACE).get("path")
    saved = noted(checkpoint, "state.json").get("data", {}) if checkpoint else {}
    then, classes = saved.get("splits") or before.get("splits"), saved.get("classes") or before.get("classes")
    if checkpoint and not (then and classes) and not accept:
        raise UserError(
            f"{folder / 'data.json'} is missing or damaged, so what the run was trained on is not known; put it back, "
            "or go on all the same with --accept_changed_data"
        )
    then = then or {}
    moved = before.get("dataset", recipe.dataset) != recipe.dataset
    there = not moved and isinstance(place, str) and Path(place).exists()
    splits = load_splits(changed(recipe, dataset=place) if there else recipe, classes or ())
    splits.record["dataset"] = recipe.dataset
    now = splits.record
    traced = any("fingerprint" in found for found in then.values())
    if then and moved and not traced:
        raise UserError(f"{folder} says no fingerprint of its data, so dataset must stay {before['dataset']!r}")
    words = []
    for split, found in now["splits"].items():
        if split in then and (change := difference(then[split], found, classes or splits.classes, splits.classes)):
            words.append(f"split {split!r}: {change}")
    if before.get("commit") not in (None, now["commit"]):
        words.append(f"commit {before['commit']} then, {now['commit']} now")
    if words and not accept:
        raise UserError(
            f"dataset {recipe.dataset!r} is not what {folder} was trained on: {'; '.join(words)}; put the old data "
            "back, train anew into another --output_dir, or go on all the same with --accept_changed_data"
        )
    update = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    now["changed"] = [c for c in before.get("changed", []) if c.get("update", 0) < update]
    notes = splits.notes
    if words:
        now["changed"].append({"update": update, "changed": "; ".join(words)})
        notes = [*notes, f"goes on over other images: {'; '.join(words)}"]
    elif then and not traced:
        notes = [*notes, "the run has no fingerprint of its data: they were compared by their number and labels"]
    for note in notes:
        say(note)
    return splits
