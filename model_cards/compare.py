"""Two groups of runs on the same images: the difference of their top-1 with its interval."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

import recipes
from recipes import Recipe, UserError
from recipes.typed import nearest
from training import protocols

from .logs import read_log
from .noise import paired_bootstrap

MAY_DIFFER = ("name", "seed", "mixer", "mixer_args")


class Comparison(NamedTuple):
    """Percent and percentage points."""

    reported: tuple[float, float]
    """Mean over the runs of a group of the number by the setting's protocol."""
    top1: tuple[float, float]
    """Mean top-1 of the exported weights, of which the per-image predictions are."""
    difference: float
    """Of ``top1``, first group minus second."""
    low: float
    high: float
    """95 % interval of the difference: paired bootstrap over images, and over the runs of a group of several."""
    images: int
    runs: tuple[int, int]

    def __str__(self) -> str:
        numbers = (
            f"a: {self.reported[0]:.2f}, b: {self.reported[1]:.2f} by the protocol; "
            f"exported weights {self.top1[0]:.2f} and {self.top1[1]:.2f}\n"
            f"a - b: {self.difference:+.2f}, 95 % interval {self.low:+.2f} to {self.high:+.2f} "
            f"(paired bootstrap, {self.images:,} images, {self.runs[0]} and {self.runs[1]} runs)"
        )
        if min(self.runs) > 1:
            return numbers
        return numbers + "\nA group of one run: its spread over seeds is not in the interval."


def compare(runs_a: list[Path], runs_b: list[Path], ignore: tuple[str, ...] = (), seed: int = 0) -> Comparison:
    """Compare finished runs of two methods.

    The runs of a group must be of one recipe but for the seed; the groups may differ in the mixer, its arguments and
    the name, and in the recipe fields of ``ignore``. Raises ``UserError`` listing what else differs, for a seed that a
    group has twice, for an unfinished run, and where predictions are missing or of other images.
    """
    for field in ignore:
        if field not in (known := recipes.schema(Recipe)):
            raise UserError(f"unknown recipe field {field!r}; {nearest(field, known)}")
    groups = [[load(run) for run in runs] for runs in (runs_a, runs_b)]
    for name, runs, group in zip("ab", (runs_a, runs_b), groups, strict=True):
        if not group:
            raise UserError(f"no run folders in group {name}")
        seeds = [recipe.seed for recipe, _ in group]
        if again := [s for s in seeds if seeds.count(s) > 1]:
            raise UserError(f"group {name} has seed {again[0]} twice: {', '.join(map(str, runs))}")
    (first, _), (first_run, *_) = groups[0][0], runs_a
    for runs, group in zip((runs_a, runs_b), groups, strict=True):
        for run, (recipe, _) in zip(runs, group, strict=True):
            check_same(runs[0], group[0][0], run, recipe, ("name", "seed", *ignore))
            check_same(first_run, first, run, recipe, (*MAY_DIFFER, *ignore))
    shown: dict[str, np.ndarray] | None = None
    right: list[list[np.ndarray]] = [[], []]
    for runs, found in zip((runs_a, runs_b), right, strict=True):
        for run in runs:
            columns = predictions(run)
            shown = shown or columns
            for column in ("index", "label"):
                if not np.array_equal(columns[column], shown[column]):
                    raise UserError(f"{run} was evaluated on other images than {first_run}: {column} differs")
            found.append(columns["top"][:, 0] == columns["label"])
    a, b = (np.stack(rows) for rows in right)
    difference, low, high = paired_bootstrap(a, b, np.random.default_rng(seed))
    reported = tuple(float(np.mean([number for _, number in group])) for group in groups)
    top1 = (100 * float(a.mean()), 100 * float(b.mean()))
    return Comparison(reported, top1, difference, low, high, a.shape[1], (len(a), len(b)))


def load(run: Path) -> tuple[Recipe, float]:
    """Recipe and reported top-1 of a finished run folder."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run folder: recipe.yaml is missing")
    recipe, _ = recipes.resolve(str(run / "recipe.yaml"))
    lines = [line for line in read_log(run / "log.jsonl") if line["mode"] == "val"]
    done = max((line["epoch"] for line in lines), default=0)
    if done < recipe.epochs:
        raise UserError(f"{run} is not finished: {done} of {recipe.epochs} epochs")
    return recipe, protocols.of_run(lines, recipe)[0].value


def check_same(one: Path, a: Recipe, other: Path, b: Recipe, ignore: tuple[str, ...]) -> None:
    """Raise ``UserError`` with the fields in which two recipes differ."""
    if different := recipes.differences(a, b, ignore):
        rows = "; ".join(f"{field}: {x} and {y}" for field, (x, y) in different.items())
        raise UserError(f"{one} and {other} differ in {rows}; pass --ignore FIELD to compare them all the same")


def predictions(run: Path) -> dict[str, np.ndarray]:
    """What a run's exported weights say of each image."""
    path = run / "predictions.safetensors"
    again = f"make it with evaluate_mixup.py --model {run} --predictions {path}"
    if not path.is_file():
        raise UserError(f"{run} has no {path.name}, without which runs cannot be paired; {again}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is damaged ({e}); {again}") from None
