"""A hold-out: the part of a data set with one split that is kept apart to evaluate on.

An image's side follows from a hash of (seed, class, name of its file) alone, so that adding images moves none of the
others; an image without a file goes by its content. Where images have several labels, which may change, the hash is of
no class. Only a class that would be held out whole keeps one name in training. An image of the training side whose
content is held out too is left out.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixup_recipes.data import zips
from mixup_recipes.data.decoding import BadImage
from mixup_recipes.data.identity import some
from mixup_recipes.data.multi_label import Pairs
from mixup_recipes.data.origin import REPOSITORY, Origin, encoded, named_size, origin, size
from mixup_recipes.recipe import Recipe
from mixup_recipes.words import many


class Sides(NamedTuple):
    """Rows of a table, in order."""

    train: np.ndarray
    held_out: np.ndarray
    left_out: np.ndarray
    """Would be trained on, but their content is held out."""
    names: list[str]
    """Of all images, see ``file_names``."""
    sizes: np.ndarray
    """Bytes of all images."""


def wanted(recipe: Recipe) -> bool:
    """Whether a recipe evaluates on a part of a data set that has one split."""
    return recipe.holdout > 0 and recipe.train_split != recipe.eval_split


def divide(table: datasets.Dataset, labels: np.ndarray | Pairs, classes: Sequence[str], recipe: Recipe) -> Sides:
    """The sides of a table's images: paths of files, or tables of bytes and path.

    No more than one image is in memory at once. Files that rows name are compared where they are on this machine.
    """
    images, at = table.data.column(recipe.image_column), origin(table)
    at = None if at is None or REPOSITORY.match(at.root) else at
    names, sizes = file_names(images, at), sizes_of(images, at)
    held = held_out(names, labels, classes, recipe.holdout, recipe.holdout_seed)
    again = twins(images, sizes, held, at)
    train = ~held
    train[again] = False
    return Sides(np.flatnonzero(train), np.flatnonzero(held), again, names, sizes)


def held_out(
    names: Sequence[str], labels: np.ndarray | Pairs, classes: Sequence[str], share: float, seed: int
) -> np.ndarray:
    """Whether each image is held out."""
    rows, places = labelled(labels)
    heads = [f"{seed}\0{name}\0" for name in classes]
    own_heads = [f"{seed}\0\0"] * len(names) if isinstance(labels, Pairs) else [heads[k] for k in places.tolist()]
    draws = np.array([draw(head + name) for head, name in zip(own_heads, names, strict=True)])
    held = draws < share
    count = np.bincount(places, minlength=len(classes))
    for k in np.flatnonzero((np.bincount(places[held[rows]], minlength=len(classes)) == count) & (count > 0)):
        own = rows[places == k]
        held[own[draws[own] == draws[own].max()]] = False
    return held


def labelled(labels: np.ndarray | Pairs) -> Pairs:
    """Each label of each image, also where each image has one."""
    return labels if isinstance(labels, Pairs) else Pairs(np.arange(len(labels)), labels)


def draw(text: str) -> float:
    """A number in [0, 1) that belongs to a text."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


def file_names(images: pa.ChunkedArray, at: Origin | None = None) -> list[str]:
    """The name of each image's file, without folders; the hash of its content where it has none."""
    if not pa.types.is_struct(images.type):
        return [os.path.basename(zips.name_of(path)) for path in images.to_pylist()]
    names = [path and os.path.basename(path) for path in pc.struct_field(images, "path").to_pylist()]
    for row in [i for i, name in enumerate(names) if not name]:
        names[row] = hashlib.sha256(content(images, row, at)).hexdigest()
    return names


def content(images: pa.ChunkedArray, row: int, at: Origin | None) -> bytes:
    """An image's encoded bytes; none for one that cannot be read."""
    value: Any = images[row].as_py()
    try:
        return encoded(value, at)
    except BadImage:
        return b""


def sizes_of(images: pa.ChunkedArray, at: Origin | None = None) -> np.ndarray:
    """The bytes of each image, 0 for one that cannot be read."""
    if pa.types.is_struct(images.type):
        content, paths = pc.struct_field(images, "bytes"), pc.struct_field(images, "path")
        lengths = np.array(pc.binary_length(content).fill_null(0).to_numpy(), np.int64)
        for row in np.flatnonzero(pc.is_null(content).to_numpy()).tolist() if at else ():
            name = paths[row].as_py()
            lengths[row] = (at and name and named_size(name, at)) or 0
        return lengths
    return np.array([size(path) or 0 for path in images.to_pylist()], np.int64)


def twins(images: pa.ChunkedArray, sizes: np.ndarray, held: np.ndarray, at: Origin | None = None) -> np.ndarray:
    """Rows that are not held out and have the content of one that is. Only files of equal size are read."""
    both = np.intersect1d(sizes[held], sizes[~held])
    alike = np.flatnonzero(np.isin(sizes, both[both > 0]))
    found = {row: hashlib.sha256(content(images, row, at)).digest() for row in alike.tolist()}
    apart = {found[row] for row in alike[held[alike]].tolist()}
    return np.array([row for row in alike[~held[alike]].tolist() if found[row] in apart], np.int64)


def notes_of(sides: Sides, labels: np.ndarray | Pairs, classes: Sequence[str]) -> list[str]:
    """What the user should know of a division."""
    rows, places = labelled(labels)
    without = np.setdiff1d(places, places[np.isin(rows, sides.held_out)])
    verb = "is" if len(sides.held_out) == 1 else "are"
    notes = [f"{len(sides.held_out):,} of {many(len(sides.names), 'image')} {verb} held out to evaluate on"]
    several = isinstance(labels, Pairs)
    alike = {*sides.names} if several else {*zip(places.tolist(), sides.names, strict=True)}
    if len(alike) <= len(sides.names) // 2:
        within = "" if several else " within their classes"
        few = f"{many(len(sides.names), 'image')} share {many(len(alike), 'name of a file', 'names of files')}{within}"
        notes.append(f"{few}, and images with the same name are held out together")
    if len(sides.left_out):
        again = some([sides.names[row] for row in sides.left_out])
        notes.append(f"{len(sides.left_out):,} left out of training because the same content is held out: {again}")
    if len(without):
        notes.append(f"classes with no image held out: {some([classes[k] for k in without])}")
    return notes
