"""The page of one run whose images may have several labels: scores by class, and the most confident errors.

All of it is of the exported weights, whose predictions the run keeps; percent as elsewhere. An image is taken for a
class where its probability is at least one half. No class is taken for another one here, as an image may be of both.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixup_recipes import files
from mixup_recipes.metrics.multi_label.formula import average_precisions, counts, multi_label_scores
from mixup_recipes.pages import errors
from mixup_recipes.pages.by_class import LISTED, as_csv
from mixup_recipes.pages.markdown import code, escaped, markdown_table, prose
from mixup_recipes.runs.compare import exported_predictions
from mixup_recipes.runs.per_class import PerClass
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


@dataclass(frozen=True)
class Scored:
    """What the exported weights of a run say of the images that it was evaluated on, and how right that is."""

    run: Run
    title: str
    """What the run is called."""
    classes: list[str]
    columns: dict[str, NDArray]
    """See ``format.OF_SEVERAL``."""
    scores: PerClass
    precision: NDArray[np.float64]
    """(K,) average precision of each class."""

    @property
    def lowest(self) -> NDArray[np.int64]:
        """The classes that have images, the lowest average precision first."""
        there = np.flatnonzero(self.scores.images)
        return there[np.argsort(self.precision[there], kind="stable")]


def scored(run: Run, title: str) -> Scored:
    """The scores of a run that lacks no file. Raises ``UserError`` for predictions that are damaged."""
    columns, classes = exported_predictions(run), run.data.classes
    label, score, index = columns["label"], columns["score"], columns["index"]
    outside = not (index.min() >= 0 and index.max() < run.data.images[run.recipe.eval_split])
    if outside or label.shape[1] != len(classes):
        path = run.folder / "predictions.safetensors"
        raise UserError(f"{path} is damaged; make it with evaluate_mixup.py {run.folder} --predictions {path}")
    found = PerClass(*counts(label, score))
    return Scored(run, title, classes, columns, found, 100 * average_precisions(label, score))


def scores_table(found: list[Scored]) -> str:
    """Scores over all classes as a Markdown table, a row per run, and what they are."""
    head = ["run", "epoch", "mAP", "F1 (micro)", "F1 (macro)", "macro precision", "macro recall", "classes",
            "never predicted"]  # fmt: skip
    rows = []
    for run in found:
        s, whole = run.scores, multi_label_scores(run.columns["label"], run.columns["score"])
        numbers = [*whole.values(), s.macro(s.precision), s.macro(s.recall)]
        never = [int((s.images > 0).sum()), int(((s.images > 0) & (s.predicted == 0)).sum())]
        rows.append([escaped(run.title), f"{run.run.exported['epoch']}", *(f"{n:.2f}" for n in numbers),
                     *(f"{n:,}" for n in never)])  # fmt: skip
    note = (
        "The scores are those of the weights that the runs export, in percent. mAP and the macro scores are means "
        "over the classes that have images. Micro F1 counts each image and class the same. A class is predicted at "
        "a probability of at least one half."
    )
    return f"{markdown_table(head, rows, right=1)}\n\n{note}\n"


def classes_csv(found: Scored) -> str:
    """A row per class, in the order of the data set."""
    s = found.scores
    columns = zip(s.images.tolist(), s.predicted.tolist(), found.precision, s.precision, s.recall, s.f1, strict=True)
    rows: list[list[object]] = [
        [name, images, predicted, *(f"{v:.2f}" for v in values)]
        for name, (images, predicted, *values) in zip(found.classes, columns, strict=True)
    ]
    return as_csv(["class", "images", "predicted", "average_precision", "precision", "recall", "f1"], rows)


def most_confident(columns: dict[str, NDArray], classes: list[str]) -> list[errors.Error]:
    """Up to ``errors.MOST`` images and classes by how far the probability is from the label, without files."""
    label, score = columns["label"], columns["score"]
    rows, places = np.nonzero((score >= 0.5) != (label == 1))
    apart = np.abs(score - label)[rows, places]
    found = []
    for i in np.lexsort((places, rows, -apart))[: errors.MOST].tolist():
        name, row = classes[places[i]], rows[i]
        true, said = (name, f"not {name}") if label[row, places[i]] else (f"not {name}", name)
        found.append(errors.Error(int(columns["index"][row]), true, said, float(apart[i])))
    return found


def worst(found: Scored, most: int) -> list[str]:
    """The classes with the lowest average precision, in words."""
    return [f"AP of {found.classes[k]} {found.precision[k]:.1f}" for k in found.lowest[:most].tolist()]


def write_page(found: Scored, folder: Path) -> str:
    """Write the tables and pictures of a run into a folder; returns what its page says, as Markdown."""
    files.write_into(folder / "classes.csv", classes_csv(found))
    most, note = errors.sheet(found.run, found.title, most_confident(found.columns, found.classes), folder)
    return "\n\n".join([scores_part(found), errors_part(found, most, note)])


def scores_part(found: Scored) -> str:
    """The classes with the lowest average precision."""
    s, lowest = found.scores, found.lowest[:LISTED]
    rows = [
        [prose(found.classes[k]), f"{s.images[k]:,}", f"{s.predicted[k]:,}",
         *(f"{v[k]:.2f}" for v in (found.precision, s.precision, s.recall, s.f1))]
        for k in lowest.tolist()
    ]  # fmt: skip
    table = markdown_table(["class", "images", "predicted", "AP", "precision", "recall", "F1"], rows, right=1)
    which = "All classes" if len(lowest) == len(found.classes) else f"The {len(lowest)} classes with the lowest AP"
    count, split = len(found.columns["label"]), code(found.run.recipe.eval_split)
    text = (
        f"{which}, ordered by average precision (AP) with the lowest first, over {many(count, 'image')} of {split}, "
        "in percent. `predicted` is the number of images with a probability of at least one half. Precision, recall "
        "and F1 follow from these."
    )
    none = "There is no confusion matrix: an image may be of several classes, so no class is taken for another one."
    return f"## Scores by class\n\n{text} All classes are in [classes.csv](classes.csv).\n\n{table}\n\n{none}"


def errors_part(found: Scored, most: list[errors.Error], note: str) -> str:
    """The most confident errors as a table, and as a sheet where the images are at hand."""
    head = "## The most confident errors"
    if not most:
        return f"{head}\n\nNone: every image has the classes that the model says, and no others."
    rows = [[code(e.file) if e.file else "", f"{e.row}", prose(e.true), prose(e.said), f"{100 * e.confidence:.2f}"]
            for e in most]  # fmt: skip
    s = found.scores
    count = int((s.images + s.predicted - 2 * s.right).sum())
    text = (
        f"The table shows {len(most)} of {many(count, 'error')}, each of an image and a class. The probability that "
        "is farthest from the label comes first. Confidence is in percent, and rows count from 0."
    )
    table = markdown_table(["file", "row", "is", "the model says", "confidence"], rows)
    return f"{head}\n\n{text}\n\n{note}\n\n{table}"
