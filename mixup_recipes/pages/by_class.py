"""The page of one run: scores by class, which classes are taken for which, the most confident errors, and calibration.

All of it is of the exported weights, whose predictions the run keeps; percent as elsewhere.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixup_recipes import files
from mixup_recipes.data.folder import shown
from mixup_recipes.metrics.calibration.formula import calibration
from mixup_recipes.pages import diagrams, errors
from mixup_recipes.pages.markdown import code, escaped, markdown_table, prose
from mixup_recipes.runs.compare import exported_predictions
from mixup_recipes.runs.per_class import PerClass, confusions, matrix, per_class
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

NEEDED = ("predictions.safetensors", "eval_results.json", "data.json")
LISTED = 20  # pairs of classes, and classes, that a page names


@dataclass(frozen=True)
class Scored:
    """What the exported weights of a run say of the images that it was evaluated on, and how right that is."""

    run: Run
    title: str
    """What the run is called."""
    classes: list[str]
    columns: dict[str, NDArray]
    """See ``format.PREDICTIONS``."""
    scores: PerClass
    confusions: NDArray[np.int64]
    """See ``per_class.confusions``."""
    ece: float

    @property
    def right(self) -> NDArray[np.bool_]:
        """(N,) whether the best class is the label."""
        return self.columns["top"][:, 0] == self.columns["label"]

    @property
    def sure(self) -> diagrams.Sure:
        """What a reliability diagram shows."""
        return diagrams.Sure(self.title, self.columns["confidence"], self.right, self.ece)


def lacks(run: Run) -> str | None:
    """The file without which a run has no scores by class; None where all are there."""
    return next((name for name in NEEDED if not (run.folder / name).is_file()), None)


def scored(run: Run, title: str) -> Scored:
    """The scores of a run that lacks nothing. Raises ``UserError`` for predictions that are damaged."""
    columns, classes = exported_predictions(run), run.data.classes
    label, best = columns["label"], columns["top"][:, 0]
    try:
        found = per_class(label, best, len(classes))
        ece = calibration(columns["confidence"], best == label, columns["nll"])["ece"]
        if not (columns["index"].min() >= 0 and columns["index"].max() < run.data.images[run.recipe.eval_split]):
            raise ValueError("index names images that the split does not have")
    except ValueError as e:
        path = run.folder / NEEDED[0]
        raise UserError(f"{path} is damaged ({e}); make it with evaluate_mixup.py {run.folder} --predictions {path}") \
            from None  # fmt: skip
    return Scored(run, title, classes, columns, found, confusions(label, best, len(classes)), ece)


def scores_table(found: list[Scored]) -> str:
    """Macro scores beside top-1 as a Markdown table, a row per run, and what they are."""
    head = ["run", "epoch", "top-1", "balanced accuracy", "macro precision", "macro F1", "classes", "never predicted"]
    rows = []
    for run in found:
        s = run.scores
        numbers = [s.top1, *map(s.macro, (s.recall, s.precision, s.f1))]
        counts = [int((s.images > 0).sum()), int(((s.images > 0) & (s.predicted == 0)).sum())]
        rows.append([escaped(run.title), f"{run.run.exported['epoch']}", *(f"{n:.2f}" for n in numbers),
                     *(f"{n:,}" for n in counts)])  # fmt: skip
    note = (
        "The scores are those of the weights that the runs export, in percent. Balanced accuracy (macro recall), "
        "precision and F1 are means over the classes that have images, and each class counts the same. The "
        "precision of a class that is never predicted counts as 0."
    )
    return f"{markdown_table(head, rows, right=1)}\n\n{note}\n"


# --------------------------------------------------------------------------------------------- files


def as_csv(head: list[str], rows: list[list[object]]) -> str:
    """Rows as CSV; a name that is no UTF-8 is escaped."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([[shown(cell) if isinstance(cell, str) else cell for cell in row] for row in rows])
    return text.getvalue()


def classes_csv(found: Scored) -> str:
    """A row per class, in the order of the data set."""
    most = {int(true): (found.classes[other], int(times)) for true, other, times in found.confusions[::-1]}
    s = found.scores
    columns = zip(s.images.tolist(), s.predicted.tolist(), s.precision, s.recall, s.f1, strict=True)
    rows = [
        [name, images, predicted, *(f"{v:.2f}" for v in values), *most.get(k, ("", 0))]
        for k, (name, (images, predicted, *values)) in enumerate(zip(found.classes, columns, strict=True))
    ]
    head = ["class", "images", "predicted", "precision", "recall", "f1", "most_confused_with", "times"]
    return as_csv(head, rows)


def confusions_csv(found: Scored) -> str:
    """A row per pair of classes of which the first was taken for the second, the most frequent first."""
    images, names = found.scores.images.tolist(), found.classes
    rows = [[names[a], names[b], times, images[a], f"{100 * times / images[a]:.2f}"]
            for a, b, times in found.confusions.tolist()]  # fmt: skip
    return as_csv(["class", "taken_for", "times", "images", "percent"], rows)


def write_page(found: Scored, folder: Path) -> str:
    """Write the tables and pictures of a run into a folder; returns what its page says, as Markdown."""
    files.write_into(folder / "classes.csv", classes_csv(found))
    files.write_into(folder / "confusions.csv", confusions_csv(found))
    label, best = found.columns["label"], found.columns["top"][:, 0]
    if len(found.classes) <= diagrams.LARGEST:
        counts = matrix(label, best, len(found.classes))
        title = f"{found.title}: {many(len(label), 'image')} of {found.run.recipe.eval_split}"
        diagrams.confusion(counts, found.classes, title, folder / "confusion.png")
    diagrams.reliability([found.sure], folder / "reliability.png")
    worst, note = errors.sheet(found.run, found.title, errors.most_confident(found.columns, found.classes), folder)
    parts = [scores_part(found), confusions_part(found), errors_part(found, worst, note), calibration_part(found)]
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------- the page


def worst_pairs(found: Scored, most: int) -> list[str]:
    """The classes that are most often taken for one another, in words."""
    images = found.scores.images
    return [
        f"{found.classes[a]} taken for {found.classes[b]}: {times:,} of {images[a]:,}"
        for a, b, times in found.confusions[:most].tolist()
    ]


def scores_part(found: Scored) -> str:
    """The classes with the lowest F1."""
    s = found.scores
    there = np.flatnonzero(s.images + s.predicted)
    lowest = there[np.argsort(s.f1[there], kind="stable")][:LISTED]
    rows = [
        [prose(found.classes[k]), f"{s.images[k]:,}", f"{s.predicted[k]:,}",
         *(f"{v[k]:.2f}" for v in (s.precision, s.recall, s.f1))]
        for k in lowest
    ]  # fmt: skip
    table = markdown_table(["class", "images", "predicted", "precision", "recall", "F1"], rows, right=1)
    which = "All classes" if len(lowest) == len(found.classes) else f"The {len(lowest)} classes with the lowest F1"
    count, split = len(found.right), code(found.run.recipe.eval_split)
    text = (
        f"{which}, ordered by F1 with the lowest first, over {many(count, 'image')} of {split}, in percent. "
        "`predicted` is the number of images that are taken for the class. Precision is 0 for a class that is never "
        "predicted, and recall is 0 for a class without images."
    )
    return f"## Scores by class\n\n{text} All classes are in [classes.csv](classes.csv).\n\n{table}"


def confusions_part(found: Scored) -> str:
    """The worst pairs, and the picture."""
    head = "## Classes taken for others"
    if not len(found.confusions):
        return f"{head}\n\nNone: every image is right."
    lines = [f"* {prose(words)}" for words in worst_pairs(found, LISTED)]
    text = "The most frequent pairs" if len(found.confusions) > LISTED else "All pairs"
    drawn = len(found.classes) <= diagrams.LARGEST
    none = f"There is no picture, because {many(len(found.classes), 'class')} are too many for one."
    picture = "![Confusion matrix](confusion.png)" if drawn else none
    return f"{head}\n\n{text}, as a table in [confusions.csv](confusions.csv):\n\n" + "\n".join([*lines, "", picture])


def errors_part(found: Scored, worst: list[errors.Error], note: str) -> str:
    """The most confident errors as a table, and as a sheet where the images are at hand."""
    head = "## The most confident errors"
    if not worst:
        return f"{head}\n\nNone: every image is right."
    rows = [[code(e.file) if e.file else "", f"{e.row}", prose(e.true), prose(e.said), f"{100 * e.confidence:.2f}"]
            for e in worst]  # fmt: skip
    count = len(found.right) - int(found.right.sum())
    text = (
        f"The table shows {len(worst)} of {many(count, 'error')}, with the highest confidence first. Confidence is "
        "in percent, and rows count from 0."
    )
    table = markdown_table(["file", "row", "class", "taken for", "confidence"], rows)
    return f"{head}\n\n{text}\n\n{note}\n\n{table}"


def calibration_part(found: Scored) -> str:
    """The reliability diagram."""
    text = (
        f"The diagram shows the accuracy by confidence, in the bins of the calibration error (ECE {found.ece:.2f} "
        "%), and the number of images in each bin."
    )
    return f"## Calibration\n\n{text}\n\n![Reliability diagram](reliability.png)"
