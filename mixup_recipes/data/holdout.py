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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixup_recipes.data.decoding import BadImage, read
from mixup_recipes.data.identity import some
from mixup_recipes.data.multi_label import Pairs
from mixup_recipes.data.origin import size


class Sides(NamedTuple):
    """Rows of a table, in order."""

    train: np.ndarray
    held_out: np.ndarray
    left_out: np.ndarray
    """Would be trained on, but their content is held out."""
    names: list[str]
    """Of all images, see ``names_of``."""
    sizes: np.ndarray
    """Bytes of all images."""


def divide(
    images: pa.ChunkedArray, labels: np.ndarray | Pairs, classes: Sequence[str], share: float, seed: int
) -> Sides:
    """The sides of a table's images: paths of files, or tables of bytes and path. ``share``: of each class."""
    names, sizes = names_of(images), sizes_of(images)
    held = held_out(names, labels, classes, share, seed)
    again = twins(images, sizes, held)
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


def names_of(images: pa.ChunkedArray) -> list[str]:
    """The name of each image's file, without folders; the hash of its content where it has none."""
    if not pa.types.is_struct(images.type):
        return [os.path.basename(path) for path in images.to_pylist()]
    names = [path and os.path.basename(path) for path in pc.struct_field(images, "path").to_pylist()]
    for row in [i for i, name in enumerate(names) if not name]:
        names[row] = hashlib.sha256(content(images, row)).hexdigest()
    return names


def content(images: pa.ChunkedArray, row: int) -> bytes:
    """An image's encoded bytes; none for one that cannot be read."""
    value: Any = images[row].as_py()
    try:
        return read(value) if isinstance(value, str) else (value or {}).get("bytes") or b""
    except BadImage:
        return b""


def sizes_of(images: pa.ChunkedArray) -> np.ndarray:
    """The bytes of each image, 0 for one that cannot be read."""
    if pa.types.is_struct(images.type):
        lengths = pc.binary_length(pc.struct_field(images, "bytes")).fill_null(0)
        return np.asarray(lengths.to_numpy(), np.int64)
    return np.array([size(path) or 0 for path in images.to_pylist()], np.int64)


def twins(images: pa.ChunkedArray, sizes: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Rows that are not held out and have the content of one that is. Only files of equal size are read."""
    both = np.intersect1d(sizes[held], sizes[~held])
    alike = np.flatnonzero(np.isin(sizes, both[both > 0]))
    found = {row: hashlib.sha256(content(images, row)).digest() for row in alike.tolist()}
    apart = {found[row] for row in alike[held[alike]].tolist()}
    return np.array([row for row in alike[~held[alike]].tolist() if found[row] in apart], np.int64)


def notes_of(sides: Sides, labels: np.ndarray | Pairs, classes: Sequence[str]) -> list[str]:
    """What the user should know of a division."""
    rows, places = labelled(labels)
    without = np.setdiff1d(places, places[np.isin(rows, sides.held_out)])
    notes = [f"{len(sides.held_out):,} of {len(sides.names):,} images are held out to evaluate on"]
    if len(sides.left_out):
        again = some([sides.names[row] for row in sides.left_out])
        notes.append(f"{len(sides.left_out):,} left out of training, their content is held out: {again}")
    if len(without):
        notes.append(f"classes with no image held out: {some([classes[k] for k in without])}")
    return notes
