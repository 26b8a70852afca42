"""The published numbers that belong to runs."""

from mixup_recipes.benchmark.cells import select
from mixup_recipes.resolve import split_name
from mixup_recipes.runs.records import overrides
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError


def published(runs: list[Run]) -> dict[str, float]:
    """Mixer -> published top-1 for the setting that runs belong to.

    Raises ``UserError`` if it has none, or for runs that changed the published recipe.
    """
    if not runs:
        raise UserError("no run folders given")
    for run in runs:
        pairs = overrides(run.recipe)
        if pairs is None:
            raise UserError(
                f"{run.folder} is not a run of a published recipe: {run.recipe.name!r} is not published; leave out "
                "--published"
            )
        if pairs:
            changed = ", ".join(f"{k} {b} instead of {a}" for k, (a, b) in pairs.items())
            raise UserError(f"{run.folder} is not a run of a published recipe: {changed}; leave out --published")
    setting, _ = split_name(runs[0].recipe.name)
    return {c.mixer: c.top1 for c in select(setting=setting, numbered=True) if c.top1 is not None}
