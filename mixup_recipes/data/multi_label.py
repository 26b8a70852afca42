"""Images with several labels, or none: how their column is read, and the form in which it stands in a table.

In a table of ours the column is ``datasets.List(ClassLabel)``: the places of an image's classes, ascending, each once.
It is read from lists of words or numbers, or of a column with one label to a row: a number, or words of which ``|``
separates several. An image without labels has an empty list or cell; a null is no answer and is refused.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mixup_recipes.data import labels
from mixup_recipes.data.classes import natural
from mixup_recipes.data.folder import encodable
from mixup_recipes.data.origin import with_column
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

BETWEEN = "|"
"""Separates the labels of an image in one cell of text."""
LISTS = (datasets.List, datasets.LargeList)
PASS = "an image may have several labels there; to train on them pass --multi_label"
MOST_CLASSES = 2**20  # of labels without names


class Pairs(NamedTuple):
    """Each label of each image, by image and then by class."""

    row: np.ndarray
    """(M,) the image, as a row of the table."""
    place: np.ndarray
    """(M,) the class."""


def is_many(feature: Any) -> bool:
    """Whether a column holds lists."""
    return isinstance(feature, LISTS)


def several(cell: Any) -> tuple[str, ...]:
    """The labels of a cell as text, in order, each once: of a list, or of a text; none of an empty one."""
    values = cell if isinstance(cell, list) else str(cell).split(BETWEEN)
    words = (str(value).strip() for value in values)
    return tuple(dict.fromkeys(word for word in words if word))


def check_cells(cells: Sequence[Any], where: str) -> None:
    """Raise ``UserError`` for cells of lists or texts that say nothing, or are rows of zeros and ones."""
    lists = [cell if isinstance(cell, list) else str(cell).split(BETWEEN) for cell in cells if cell is not None]
    if len(lists) < len(cells) or any(None in found for found in lists):
        row = next(i for i, cell in enumerate(cells) if cell is None or (isinstance(cell, list) and None in cell))
        raise UserError(
            f"{where}: row {row + 1} has a null; an image without labels needs an empty list or an empty text there"
        )
    said = {str(value) for found in lists for value in found}
    if len({len(found) for found in lists}) == 1 < len(lists[0]) and (said <= {"0", "1"} or said <= {"false", "true"}):
        raise UserError(f"{where} holds zeros and ones; expected the names or numbers of an image's classes")


def named(cells: list[tuple[str, ...]]) -> tuple[Pairs, list[str]]:
    """Labels as words, of each image, and the classes that they are: sorted as everywhere."""
    words = list(itertools.chain.from_iterable(cells))
    names = sorted({*words}, key=natural(sorted({*words})))
    number = {name: k for k, name in enumerate(names)}
    rows = np.repeat(np.arange(len(cells)), [len(cell) for cell in cells])
    return Pairs(rows, np.array([number[word] for word in words], np.int64)), names


def column_of(found: Pairs, size: int, names: list[str]) -> tuple[pa.Array, datasets.List]:
    """The column of a table with ``size`` images, and its feature."""
    once = np.unique(found.row * len(names) + found.place) if names else np.empty(0, np.int64)
    ends = np.concatenate([[0], np.bincount(once // max(1, len(names)), minlength=size).cumsum()])
    places = pa.array(once % max(1, len(names)), pa.int64())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), places), datasets.List(datasets.ClassLabel(names=names))


def with_labels(table: datasets.Dataset, column: str, found: Pairs, names: list[str]) -> datasets.Dataset:
    """The table with other labels."""
    return with_column(table, column, *column_of(found, len(table), names))


def pairs(table: datasets.Dataset, column: str) -> Pairs:
    """The labels of a table of ours."""
    values = table.select_columns([column]).with_format("arrow")[:][column]
    lengths = pc.list_value_length(values).to_numpy()
    return Pairs(np.repeat(np.arange(len(lengths)), lengths), pc.list_flatten(values).to_numpy().astype(np.int64))


def in_lists(table: datasets.Dataset, recipe: Recipe, split: str) -> datasets.Dataset:
    """A table with its label column in our form. Raises ``UserError`` for labels that cannot be read."""
    column = recipe.label_column
    where = f"dataset {recipe.dataset!r}, split {split!r}"
    feature, values = table.features[column], table.data.column(column)
    kind: Any = feature.feature if is_many(feature) else feature
    whole = labels.is_whole(kind)
    if is_many(feature) or values.null_count or not whole:
        said = f"{where}: column {column!r}"
        cells = labels.checked(labels.cells_of(values, said), said)
        check_cells(cells, said)
    if not whole:
        found, names = named([several(cell) for cell in cells])
    else:
        lengths = pc.list_value_length(values).to_numpy() if is_many(feature) else np.ones(len(values), np.int64)
        flat = pc.list_flatten(values) if is_many(feature) else values
        numbers = flat.to_numpy().astype(np.int64)
        names = class_names(kind, numbers, recipe, where)
        found = Pairs(np.repeat(np.arange(len(lengths)), lengths), numbers)
    if not len(found.row):
        raise UserError(f"{where}: no image has a label in column {column!r}")
    return with_labels(table, column, found, names)


def class_names(kind: Any, numbers: np.ndarray, recipe: Recipe, where: str) -> list[str]:
    """The names of classes that a column holds by number: its own, or the numbers."""
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    if low < 0:
        raise UserError(f"{where} has unlabelled images (label {low})")
    if high >= MOST_CLASSES:
        raise UserError(f"{where}: label {high} is too large for a class")
    if not hasattr(kind, "names"):
        return [str(k) for k in range(max(recipe.num_classes, high + 1))]
    names = [str(name) for name in kind.names]
    if odd := [name for name in names if not encodable(name)]:
        raise UserError(f"{where} has a class name that is not text: {odd[0]!a}")
    if len(numbers) and high >= len(names):
        raise UserError(f"{where} has label {high}, but only {many(len(names), 'class name')}")
    return names


def class_words(labels: np.ndarray | Pairs, size: int, classes: list[str]) -> list[str]:
    """The class of each of ``size`` images, or its classes in one text."""
    if isinstance(labels, np.ndarray):
        return [classes[k] for k in labels.tolist()]
    found: list[list[str]] = [[] for _ in range(size)]
    for row, place in zip(labels.row.tolist(), labels.place.tolist(), strict=True):
        found[row].append(classes[place])
    return [BETWEEN.join(words) for words in found]


def identity_of(found: Pairs, size: int, classes: int) -> dict[str, Any]:
    """The identity of the labels of ``size`` images.

    ``labels_sha256``: of int64, the places of each image in order and -1 behind each image. ``per_class``: the images
    that have a class. ``without_label``: those that have none.
    """
    ends = np.bincount(found.row, minlength=size).cumsum()
    return {
        "labels_sha256": hashlib.sha256(np.insert(found.place, ends, -1).tobytes()).hexdigest(),
        "per_class": np.bincount(found.place, minlength=classes).tolist(),
        "without_label": size - len(np.unique(found.row)),
    }


def multi_hot(places: list[int], classes: int) -> Tensor:
    """An image's target, float (K,): 1 for each of its classes."""
    target = torch.zeros(classes)
    target[places] = 1
    return target
