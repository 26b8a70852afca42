"""Two groups of runs on the same images: the difference of their top-1 with its interval."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

import recipes
from recipes import Recipe, UserError
from recipes.typed import nearest
from training import protocols

from .logs import COUNT, PERCENT, check, naming, read_table
from .noise import paired_bootstrap
from .report import load_data, load_run
from .seeds import COMPARED

PLACE = ("dataset", "dataset_config", "dataset_revision", "train_split", "max_train_samples")
"""Recipe fields that decide what is trained on."""
COLUMNS = {"index": ("int32", 1), "label": ("int32", 1), "top": ("int32", 2)}
COLUMNS |= {"confidence": ("float32", 1), "nll": ("float32", 1)}
"""Type and dimensions of the columns of ``training.run.write_predictions``."""


class Run(NamedTuple):
    """A finished run: its recipe, its number by the protocol, and the images it was trained on."""

    path: Path
    recipe: Recipe
    reported: float
    trained_on: dict[str, Any]


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
            f"a - b of the exported weights: {self.difference:+.2f}, 95 % interval {self.low:+.2f} to {self.high:+.2f} "
            f"(paired bootstrap, {self.images:,} images, {self.runs[0]} and {self.runs[1]} runs)"
        )
        if min(self.runs) == 1:
            return numbers + "\nA group of one run: its spread over seeds is not in the interval."
        few = "\nFewer than four runs a group: their spread over seeds is known poorly, and so is the interval."
        return numbers + few * (min(self.runs) < 4)


def compare(runs_a: list[Path], runs_b: list[Path], ignore: tuple[str, ...] = (), seed: int = 0) -> Comparison:
    """Compare finished runs of two methods.

    The runs of a group must be of one recipe but for the seed; the groups may differ in the mixer, its arguments and
    the name, and in the recipe fields of ``ignore``. Raises ``UserError`` listing what else differs, for a seed that a
    group has twice, for a run that is in both groups or unfinished, for runs trained on other images, and where
    predictions are missing, damaged or of other images.
    """
    for field in ignore:
        if field not in (known := recipes.schema(Recipe)):
            raise UserError(f"unknown recipe field {field!r}; {nearest(field, known)}")
    groups = [[load(run) for run in runs] for runs in (runs_a, runs_b)]
    for name, group in zip("ab", groups, strict=True):
        if not group:
            raise UserError(f"no run folders in group {name}")
        seeds = [run.recipe.seed for run in group]
        if again := [s for s in seeds if seeds.count(s) > 1]:
            raise UserError(f"group {name} has seed {again[0]} twice: {', '.join(str(run.path) for run in group)}")
    for group in groups:
        for run in group:
            check_same(group[0], run, ("name", "seed", *ignore))
            check_same(groups[0][0], run, (*COMPARED, *ignore))
    if both := {run.resolve() for run in runs_a} & {run.resolve() for run in runs_b}:
        raise UserError(f"{min(both)} is in both groups; leave it out of one")
    shown: dict[str, np.ndarray] | None = None
    right: list[list[np.ndarray]] = [[], []]
    for group, found in zip(groups, right, strict=True):
        for run in group:
            columns = predictions(run)
            shown = shown or columns
            for column in ("index", "label"):
                if not np.array_equal(columns[column], shown[column]):
                    raise UserError(f"{run.path} was evaluated on other images than {runs_a[0]}: {column} differs")
            found.append(columns["top"][:, 0] == columns["label"])
    a, b = (np.stack(rows) for rows in right)
    difference, low, high = paired_bootstrap(a, b, np.random.default_rng(seed))
    reported = tuple(float(np.mean([run.reported for run in group])) for group in groups)
    top1 = (100 * float(a.mean()), 100 * float(b.mean()))
    return Comparison(reported, top1, difference, low, high, a.shape[1], (len(a), len(b)))


def load(run: Path) -> Run:
    """A finished run folder."""
    recipe, _, val = load_run(run)
    if (done := val[-1]["epoch"]) < recipe.epochs:
        raise UserError(f"{run} is not finished: {done} of {recipe.epochs} epochs")
    trained_on = load_data(run, recipe)["splits"][recipe.train_split]
    with naming(run):
        return Run(run, recipe, protocols.of_run(val, recipe)[0].value, trained_on)


def check_same(one: Run, other: Run, ignore: tuple[str, ...]) -> None:
    """Raise ``UserError`` with the fields in which two recipes differ, or for other training images."""
    if different := recipes.differences(one.recipe, other.recipe, ignore):
        rows = "; ".join(f"{field}: {x} and {y}" for field, (x, y) in different.items())
        raise UserError(
            f"{one.path} and {other.path} differ in {rows}; pass --ignore FIELD to compare them all the same"
        )
    if one.trained_on != other.trained_on and not set(ignore) & set(PLACE):
        raise UserError(
            f"{one.path} and {other.path} were trained on other images: {one.trained_on} and {other.trained_on}; "
            "pass --ignore dataset to compare them all the same"
        )


def predictions(run: Run) -> dict[str, np.ndarray]:
    """What a run's exported weights say of each image; it must agree with the top-1 that the run noted for them."""
    path = run.path / "predictions.safetensors"
    again = f"make it with evaluate_mixup.py --model {run.path} --predictions {path}"
    if not path.is_file():
        raise UserError(f"{run.path} has no {path.name}, without which runs cannot be paired; {again}")
    try:
        columns = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as e:  # the last three: types numpy lacks
        raise UserError(f"{path} is damaged ({e}); {again}") from None
    found = {k: (str(v.dtype), v.ndim) for k, v in columns.items()}
    if found != COLUMNS or len({len(v) for v in columns.values()}) > 1 or not columns["top"].size:
        raise UserError(f"{path} is damaged (expected a row per image in each of {', '.join(COLUMNS)}); {again}")
    prefix = "ema_" if run.recipe.report_ema else ""
    results = read_table(run.path / "eval_results.json")
    shape = {"exported": {f"{prefix}top1": PERCENT, f"{prefix}count": COUNT}}
    check(results, shape, str(run.path / "eval_results.json"))
    top1, count = (results["exported"][key] for key in shape["exported"])
    images = len(columns["label"])
    now = 100 * float((columns["top"][:, 0] == columns["label"]).mean())
    # made anew on other hardware, a prediction may flip
    if count != images or abs(now - top1) > max(0.1, 100 / images) + 1e-9:
        raise UserError(
            f"{path} is not of the exported weights: top-1 {now:.2f} of {images} images, but eval_results.json has "
            f"{top1:.2f} of {count}; {again}"
        )
    return columns
