"""Two groups of runs on the same images: the difference of their top-1, or mAP, with its interval."""

from typing import NamedTuple

import numpy as np

from mixup_recipes.data.identity import difference
from mixup_recipes.metrics.multi_label.formula import multi_label_scores
from mixup_recipes.recipe import Recipe, differences, schema
from mixup_recipes.runs.noise import paired_bootstrap, paired_bootstrap_map
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.seeds import COMPARED
from mixup_recipes.training.protocols import NAMES, headline
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

TRAINED_ON = ("dataset", "dataset_config", "dataset_revision", "train_split", "max_train_samples")
"""Recipe fields that decide what is trained on."""


class Comparison(NamedTuple):
    """Percent and percentage points."""

    reported: tuple[float, float]
    """Mean over the runs of a group of the number by the setting's protocol."""
    values: tuple[float, float]
    """Mean top-1, or mAP, of the exported weights, of which the per-image predictions are."""
    difference: float
    """Of ``values``, first group minus second."""
    low: float
    high: float
    """95 % interval of the difference: paired bootstrap over images, and over the runs of a group of several."""
    images: int
    runs: tuple[int, int]
    metric: str
    """What is compared, top-1 or mAP."""

    def __str__(self) -> str:
        of_a, of_b = (many(number, "run") for number in self.runs)
        numbers = (
            f"a: {self.reported[0]:.2f}, b: {self.reported[1]:.2f} by the protocol; "
            f"{self.metric} of the exported weights {self.values[0]:.2f} and {self.values[1]:.2f}\n"
            f"a - b of the exported weights: {self.difference:+.2f}, 95 % interval {self.low:+.2f} to {self.high:+.2f} "
            f"(paired bootstrap, {many(self.images, 'image')}, {of_a} and {of_b})"
        )
        if min(self.runs) == 1:
            return numbers + "\nA group has only one run, so the interval does not include its spread over seeds."
        few = "\nA group has fewer than four runs. Their spread over seeds is poorly known, and so is the interval."
        return numbers + few * (min(self.runs) < 4)


def compare(runs_a: list[Run], runs_b: list[Run], ignore: tuple[str, ...] = (), seed: int = 0) -> Comparison:
    """Compare finished runs of two methods.

    The runs of a group must be of one recipe but for the seed; the groups may differ in the mixer, its arguments and
    the name, and in the recipe fields of ``ignore``. Raises ``UserError`` listing what else differs, for a seed that a
    group has twice, for a run that is in both groups or unfinished, for runs trained on other images, and where
    predictions are missing, damaged or of other images.
    """
    for field in ignore:
        if field not in (known := schema(Recipe)):
            raise UserError(f"unknown recipe field {field!r}; {nearest(field, known)}")
    groups = [list(runs_a), list(runs_b)]
    for name, group in zip("ab", groups, strict=True):
        for run in group:
            check_finished(run)
        if not group:
            raise UserError(f"no run folders in group {name}")
        seeds = [run.recipe.seed for run in group]
        if again := [s for s in seeds if seeds.count(s) > 1]:
            raise UserError(f"group {name} has seed {again[0]} twice: {', '.join(str(run.folder) for run in group)}")
    for group in groups:
        for run in group:
            check_same(group[0], run, ("name", "seed", *ignore))
            check_same(groups[0][0], run, (*COMPARED, *ignore))
    places = [{run.folder.resolve() for run in group} for group in groups]
    if both := places[0] & places[1]:
        raise UserError(f"{min(both)} is in both groups; leave it out of one")
    shown: dict[str, np.ndarray] | None = None
    several = runs_a[0].recipe.multi_label
    said: list[list[np.ndarray]] = [[], []]  # which images are right, or the probabilities of labels
    for group, found in zip(groups, said, strict=True):
        for run in group:
            columns = exported_predictions(run)
            shown = shown or columns
            for column in ("index", "label"):
                if not np.array_equal(columns[column], shown[column]):
                    raise UserError(
                        f"{run.folder} and {runs_a[0].folder} were evaluated on different images: {column} differs"
                    )
            found.append(columns["score"] if several else columns["top"][:, 0] == columns["label"])
    assert shown is not None
    (a, b), label = (np.stack(rows) for rows in said), shown["label"]
    rng = np.random.default_rng(seed)
    difference, low, high = paired_bootstrap_map(label, a, b, rng) if several else paired_bootstrap(a, b, rng)
    of_a, of_b = (float(np.mean([run.summary.reading.value for run in group])) for group in groups)
    values = (100 * float(a.mean()), 100 * float(b.mean()))
    if several:
        maps = [[multi_label_scores(label, score)["map"] for score in group] for group in (a, b)]
        values = (float(np.mean(maps[0])), float(np.mean(maps[1])))
    return Comparison(
        (of_a, of_b), values, difference, low, high, a.shape[1], (len(a), len(b)), NAMES[headline(runs_a[0].recipe)]
    )


def check_finished(run: Run) -> None:
    """Raise ``UserError`` unless the run was trained to its end."""
    if not run.finished:
        raise UserError(f"{run.folder} is not finished: {run.log.val[-1].epoch} of {many(run.recipe.epochs, 'epoch')}")


def check_same(one: Run, other: Run, ignore: tuple[str, ...]) -> None:
    """Raise ``UserError`` with the fields in which two recipes differ, or for other images.

    Where the data have fingerprints, these tell whether they are the same, wherever they lie.
    """
    (train, train_now), (shown, shown_now) = (
        [run.data.splits[getattr(run.recipe, field)] for run in (one, other)] for field in ("train_split", "eval_split")
    )
    trained, evaluated = (
        difference(*pair, one.data.classes, other.data.classes) for pair in ((train, train_now), (shown, shown_now))
    )
    traced = all("fingerprint" in found for found in (train, train_now, shown, shown_now))
    own = ("dataset",) if traced and not trained and not evaluated else ()
    if different := differences(one.recipe, other.recipe, (*ignore, *own)):
        rows = "; ".join(f"{field}: {x} and {y}" for field, (x, y) in different.items())
        raise UserError(f"{one.folder} and {other.folder} differ in {rows}; pass --ignore FIELD to compare them anyway")
    if one.data.changes != other.data.changes:
        trained = trained or "one of them continued on changed data"
    if trained and not set(ignore) & set(TRAINED_ON):
        raise UserError(
            f"{one.folder} and {other.folder} were trained on different images: {trained}; pass --ignore dataset to "
            "compare them anyway"
        )
    if evaluated and traced and not set(ignore) & set(TRAINED_ON):
        raise UserError(f"{other.folder} and {one.folder} were evaluated on different images: {evaluated}")


def exported_predictions(run: Run) -> dict[str, np.ndarray]:
    """What a run's exported weights say of each image; it must agree with the headline that the run noted for them."""
    columns, exported, metric = run.predictions, run.exported, headline(run.recipe)
    noted, count = exported[run.prefix + metric], exported[f"{run.prefix}count"]
    images = len(columns["label"])
    path = run.folder / "predictions.safetensors"
    again = f"make it with evaluate_mixup.py {run.folder} --predictions {path}"
    if run.recipe.multi_label:
        try:
            now = multi_label_scores(columns["label"], columns["score"])[metric]
        except ValueError as e:
            raise UserError(f"{path} is damaged ({e}); {again}") from None
    else:
        now = 100 * float((columns["top"][:, 0] == columns["label"]).mean())
    # made anew on other hardware, a prediction may flip
    if count != images or abs(now - noted) > max(0.1, 100 / images) + 1e-9:
        raise UserError(
            f"{path} was not made with the exported weights: it has {NAMES[metric]} {now:.2f} on "
            f"{many(images, 'image')}, but eval_results.json has {noted:.2f} on {count}; {again}"
        )
    return columns
