"""Which images an evaluation scores, and how they stand to those of the run: held out, trained on, or others."""

from collections.abc import Sequence

from mixup_recipes.data.opening import same_place
from mixup_recipes.data.splits import Split, load_split
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many


def load_scored(run: Run | None, recipe: Recipe, like: Sequence[str]) -> Split:
    """The images of ``recipe.eval_split``: one side of a run's own data, wherever they lie by now; all of any others.

    ``like``: see ``load_split``. Of others no second split needs to be there. Raises ``UserError`` for a split that is
    none of a run with a hold-out.
    """
    split, limit = recipe.eval_split, recipe.max_eval_samples
    if run is None or not same_place(recipe.dataset, run.recipe_here.dataset):
        mine = own_side(run, recipe, like) if run is not None else None
        return mine or load_split(changed(recipe, train_split=split), split, limit, like=like)
    trained_on = split == recipe.train_split
    found = load_split(
        changed(recipe, eval_split=run.recipe.eval_split) if trained_on else recipe, split, limit, like=like
    )
    if found.sides is not None and has_holdout(run) and split not in run.data.splits:
        raise UserError(
            f"the data of {run.name} are divided by its hold-out and have no split {split!r}; "
            f"{nearest(split, run.data.splits)}"
        )
    return found


def own_side(run: Run, recipe: Recipe, like: Sequence[str]) -> Split | None:
    """A side of a run's hold-out where the recipe's data are the very images of the run; None for all others."""
    split, own = recipe.eval_split, run.recipe
    if split not in (own.train_split, own.eval_split) or not has_holdout(run):
        return None
    place = changed(
        recipe,
        train_split=own.train_split,
        eval_split=own.eval_split,
        holdout=own.holdout,
        holdout_seed=own.holdout_seed,
    )
    limit = own.max_train_samples if split == own.train_split else own.max_eval_samples
    try:
        found = load_split(place, split, limit, like=run.data.classes)
        others = run.data.difference(split, found.identity, found.classes)
    except UserError:  # not even data of this form
        return None
    return None if others else load_split(place, split, recipe.max_eval_samples, like=like)


def has_holdout(run: Run) -> bool:
    """Whether a run notes that a part of its data was held out."""
    try:
        return "holdout" in run.data.identity
    except UserError:  # it notes nothing of its data
        return False


def other_data(run: Run | None, recipe: Recipe, split: Split) -> list[str]:
    """Says when the images are those that the run was trained on, and when they are others than the run's own."""
    if run is None or not (run.folder / "data.json").is_file():
        return []
    try:
        if recipe.eval_split not in run.data.splits:
            return []
        found = run.data.difference(recipe.eval_split, split.identity, split.classes)
    except UserError as e:
        return [f"it is not known whether these are the images of the run: {e}"]
    trained = recipe.eval_split == run.recipe.train_split
    if found:
        return [
            f"these are other images than those that the run was {'trained' if trained else 'evaluated'} on: {found}"
        ]
    if not run.data.splits[recipe.eval_split].get("fingerprint"):
        return ["the run has no fingerprint of its data, so only the number and the labels of the images were compared"]
    if not trained:
        return []
    held_out = many(len(split.sides.held_out), "image is", "images are") if split.sides else ""
    apart = f"; {held_out} held out and not among them" if held_out else ""
    return [f"these are the images that the run was trained on{apart}"]
