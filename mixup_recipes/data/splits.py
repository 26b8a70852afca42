"""Datasets by name: the two tables that a run needs, opened and checked, with encoded images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from mixup_recipes.data import holdout, keys, multi_label, streams
from mixup_recipes.data import labels as label_rule
from mixup_recipes.data.classes import among, places, subset
from mixup_recipes.data.opening import open_split
from mixup_recipes.data.origin import Opened, files_of, with_column, with_named
from mixup_recipes.data.prepare import PREPARED
from mixup_recipes.data.repository import one_commit
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

IMAGES = (datasets.Image, datasets.Value, dict)  # columns that may hold encoded images: no lists of numbers


class Split(NamedTuple):
    """The images of one split, still encoded."""

    table: Any
    """A ``datasets`` table or stream of the recipe's two columns: images as a table of bytes and path, or, of a folder
    or repository of images, as the path or address of a file; labels as places in ``classes``."""
    classes: list[str]
    identity: dict[str, Any]
    """See ``identity_of``."""
    notes: list[str]
    """What the user should know: what was left out, how classes were told."""
    sides: holdout.Sides | None = None
    """Of data with one split: which rows of them are trained on, and which are held out."""


class Splits(NamedTuple):
    """The two tables a run needs, with encoded images, and their identity.

    Streams of the same rows for a recipe that says ``streaming``.
    """

    train: Any
    eval: Any
    classes: list[str]
    identity: dict[str, Any]
    notes: list[str]
    place: Path | None
    """The folder, of data that are on this machine under a path of the user's."""
    held_out: list[str]
    """Names of the images that are held out, of data with one split; empty for all others."""
    per_class: list[int]
    """Training images of each class, (K,); empty for a stream."""


def load_splits(recipe: Recipe, like: Sequence[str] = ()) -> Splits:
    """Open the recipe's dataset and check everything that can be checked without decoding an image.

    ``like``: the classes of a run that goes on, whose order is kept where they are the same. Raises ``UserError`` with
    one clear line: unknown or gated dataset, missing split or column, classes that do not fit, empty split.
    """
    opened = open_split(recipe, recipe.train_split, recipe.streaming)
    train = prepared(opened, recipe, recipe.train_split, recipe.max_train_samples, like)
    other = opened if opened.whole else open_split(recipe, recipe.eval_split, recipe.streaming)
    evaluation = prepared(other, recipe, recipe.eval_split, recipe.max_eval_samples, train.classes, train.sides)
    what = f"dataset {recipe.dataset!r}"
    among(train.classes, evaluation.classes, f"{what}, split {recipe.eval_split!r},", f"{recipe.train_split!r}")
    if recipe.num_classes and len(train.classes) != recipe.num_classes:
        raise UserError(
            f"{what} has {many(len(train.classes), 'class')}, but the recipe has num_classes {recipe.num_classes}; "
            f"pass --num_classes {len(train.classes)} if that is meant"
        )
    identity: dict[str, Any] = {
        "dataset": recipe.dataset,
        "config": recipe.dataset_config,
        "revision": recipe.dataset_revision,
        "commit": one_commit(recipe, train.table, evaluation.table),
        "splits": {recipe.train_split: train.identity, recipe.eval_split: evaluation.identity},
        "classes": train.classes,
    }
    if opened.whole:
        identity["holdout"] = {"of": recipe.train_split, "share": recipe.holdout, "seed": recipe.holdout_seed}
    notes = [
        f"{name}: {n}" for name, s in ((recipe.train_split, train), (recipe.eval_split, evaluation)) for n in s.notes
    ]
    per_class = train.identity.get("per_class", [])
    folder = Path(recipe.dataset).expanduser().absolute()
    place = folder if recipe.dataset not in PREPARED and folder.exists() else None
    names = []
    if (sides := evaluation.sides) is not None:
        rows = sides.held_out[chosen(len(sides.held_out), recipe.max_eval_samples)]
        names = [sides.names[row] for row in rows.tolist()]
    return Splits(train.table, evaluation.table, train.classes, identity, notes, place, names, per_class)


def load_split(
    recipe: Recipe, split: str, limit: int | None, streaming: bool = False, like: Sequence[str] = ()
) -> Split:
    """One split with encoded images: its first ``limit`` images of a fixed shuffle.

    ``like``: class names that those of the split are to be placed among, where all of them are there.
    """
    return prepared(open_split(recipe, split, streaming), recipe, split, limit, like)


def prepared(
    opened: Opened,
    recipe: Recipe,
    split: str,
    limit: int | None,
    like: Sequence[str] = (),
    sides: holdout.Sides | None = None,
) -> Split:
    """A split as it was found, as ``load_split`` gives it. ``sides``: of the same data, where they are known."""
    table, fingerprint, notes, ours, _ = opened
    image, label = recipe.image_column, recipe.label_column
    for column in (image, label):
        if column not in table.column_names:
            raise UserError(
                f"dataset {recipe.dataset!r}, split {split!r}: no column {column!r}; "
                f"{nearest(column, table.column_names)} (set image_column or label_column)"
            )
    if not count(table):
        raise UserError(f"dataset {recipe.dataset!r}: split {split!r} is empty")
    table = in_numbers(table.select_columns(list(dict.fromkeys((image, label)))), recipe, split)
    classes = split_classes(recipe, split, table)
    if not ours:  # images stay encoded
        try:
            if not isinstance(table.features[image], IMAGES):
                raise TypeError
            table = table.cast_column(image, datasets.Image(decode=False))
        except (KeyError, TypeError, ValueError, NotImplementedError):
            raise UserError(
                f"dataset {recipe.dataset!r}: column {image!r} does not hold images (set image_column)"
            ) from None
        fingerprint = with_named(fingerprint, table, image)
    if opened.whole and len(classes) < 2 and not recipe.multi_label:
        raise UserError(
            f"dataset {recipe.dataset!r} has one class, {classes[0]!r}; expected "
            f"{'<class>/<image> with ' * ours}two or more"
        )
    said = ""
    if like and classes != list(like) and (order := arranged(classes, list(like))):
        said = subset(len(classes), len(like), f"split {split!r}", "the model")
        table, classes = relabelled(table, label, among(order, classes, "", ""), order), order
    if opened.whole:
        sides = sides or holdout.divide(table, labels_of(table, label), classes, recipe)
        table, fingerprint, more = side(table, recipe, split, classes, sides)
        notes = notes + more
    table, notes = first(table, limit), notes + [said] * bool(said)
    return Split(table, classes, identity_of(table, label, classes, fingerprint), notes, sides)


def side(
    table: datasets.Dataset, recipe: Recipe, split: str, classes: list[str], sides: holdout.Sides
) -> tuple[datasets.Dataset, str, list[str]]:
    """The images of a data set with one split that are trained on, or held out; their fingerprint, and what to say.

    No image is copied.
    """
    labels = labels_of(table, recipe.label_column)
    words = multi_label.class_words(labels, len(table), classes)
    evaluated = split != recipe.train_split
    rows = sides.held_out if evaluated else sides.train
    if not len(rows):
        images = f"{many(len(table), 'image')} of {many(len({*sides.names}), 'name')}"
        what = "none is held out; add images, or pass another" if evaluated else "all are held out; pass a lower"
        raise UserError(f"dataset {recipe.dataset!r} has {images}, of which {what} --holdout")
    digest = hashlib.sha256()
    for row, size in zip(rows.tolist(), sides.sizes[rows].tolist(), strict=True):
        digest.update(f"{words[row]}/{sides.names[row]}\0{size}\n".encode(errors="replace"))
    notes = holdout.notes_of(sides, labels, classes) if evaluated else []
    return table.select(rows), digest.hexdigest(), notes


def in_numbers(table: Any, recipe: Recipe, split: str) -> Any:
    """A table whose labels are words with classes in their place, sorted, or whole numbers; see ``labels``.

    With ``multi_label`` the classes of each image, see ``multi_label.in_lists``. A stream is as it was.
    """
    label = recipe.label_column
    if recipe.multi_label:
        return multi_label.in_lists(table, recipe, split)
    if multi_label.is_many(table.features[label]):
        raise UserError(f"dataset {recipe.dataset!r}: column {label!r} holds lists: {multi_label.PASS}")
    if not isinstance(table, datasets.Dataset):
        return table
    column = table.data.column(label)
    if label_rule.is_whole(table.features[label]) and not column.null_count:
        return table
    where = f"dataset {recipe.dataset!r}, split {split!r}: column {label!r}"
    values = label_rule.checked(label_rule.cells_of(column, where), where)
    if label_rule.are_whole(values, recipe.dataset, label):
        return with_column(table, label, np.array(values, np.int64), datasets.Value("int64"))
    found, names = multi_label.named([(str(value),) for value in values])
    return with_column(table, label, found.place, datasets.ClassLabel(names=names))


def count(table: Any) -> int:
    """Images of a table, or those that a stream says to have."""
    return len(table) if isinstance(table, datasets.Dataset) else table.info.splits[str(table.split)].num_examples


def identity_of(table: Any, column: str, classes: list[str], fingerprint: str | None) -> dict[str, Any]:
    """The identity of a split, see ``data/identity.py``.

    A stream's labels have not been read: the hash is that of its files' addresses.
    """
    if isinstance(table, datasets.IterableDataset):
        addresses = "\n".join(files_of(table))
        images = table.info.splits[str(table.split)].num_examples
        found = {"images": images, "labels_sha256": hashlib.sha256(addresses.encode()).hexdigest()}
    elif isinstance(labels := labels_of(table, column), multi_label.Pairs):
        found = {"images": len(table), **multi_label.identity_of(labels, len(table), len(classes))}
    else:
        labels = labels.astype(np.int64)
        found = {"images": len(table), "labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest()}
        found["per_class"] = np.bincount(labels, minlength=len(classes)).tolist()
    return found | ({"fingerprint": fingerprint} if fingerprint else {})


def labels_of(table: datasets.Dataset, column: str) -> np.ndarray | multi_label.Pairs:
    """A column of whole numbers, all at once: one by one it would take seconds; of lists each label of each image."""
    if multi_label.is_many(table.features[column]):
        return multi_label.pairs(table, column)
    return np.asarray(table.select_columns([column]).with_format("arrow")[:][column].to_numpy())


def split_classes(recipe: Recipe, split: str, table: Any) -> list[str]:
    """The class names of a split, after checking that its labels are among them (those of a stream: when read)."""
    feature = table.features[recipe.label_column]
    if multi_label.is_many(feature):
        return list(feature.feature.names)
    if isinstance(table, datasets.IterableDataset):
        return list(getattr(feature, "names", map(str, range(recipe.num_classes))))
    whole = label_rule.is_whole(feature)
    used = np.unique(np.asarray(labels_of(table, recipe.label_column))) if whole else np.empty(0)
    if used.dtype.kind not in "iu":  # an integer column with gaps becomes one of floats
        raise UserError(f"dataset {recipe.dataset!r}: label column {recipe.label_column!r} does not hold whole numbers")
    return multi_label.class_names(feature, used, recipe, f"dataset {recipe.dataset!r}, split {split!r}")


def arranged(classes: list[str], like: list[str]) -> list[str] | None:
    """The classes in the order of others where all are among them; of as many, new ones take the place of lost ones."""
    if not {*classes} - {*like}:
        return like
    new = iter([name for name in classes if name not in {*like}])
    return [name if name in {*classes} else next(new) for name in like] if len(classes) == len(like) else None


def relabelled(table: Any, column: str, where: Sequence[int], names: list[str]) -> Any:
    """The table or stream with each label moved to its place, among classes of these names."""
    if isinstance(table, datasets.IterableDataset):
        return streams.relabelled_stream(table, column, {str(k): place for k, place in enumerate(where)}, names)
    if isinstance(labels := labels_of(table, column), multi_label.Pairs):
        moved = labels._replace(place=np.asarray(where)[labels.place])
        return multi_label.with_labels(table, column, moved, names)
    return with_column(table, column, np.asarray(where)[labels], datasets.ClassLabel(names=names))


def placed(split: Split, recipe: Recipe, name: str, model: Any) -> Split:
    """The split with its labels as outputs of a timm model, told by the names of classes; see ``classes.places``.

    ``name``: of the model, for errors.
    """
    known, outputs = model.pretrained_cfg.get("label_names"), model.num_classes
    found, note = places(known, outputs, split.classes, f"dataset {recipe.dataset!r}", name)
    notes = split.notes + [note] * bool(note)
    if found == list(range(outputs)):
        return split._replace(notes=notes)
    names = list(known) if known and len({*known}) == outputs else [str(i) for i in range(outputs)]
    return split._replace(table=relabelled(split.table, recipe.label_column, found, names), classes=names, notes=notes)


def first(table: Any, size: int | None) -> Any:
    """The first ``size`` images of a shuffle that never changes, so that a small subset has all classes."""
    return table if size is None or size >= count(table) else table.select(chosen(len(table), size))


def chosen(images: int, size: int | None) -> np.ndarray:
    """The rows of ``first``, of as many images."""
    return np.sort(keys.rng(keys.SUBSET, 0, 0).permutation(images)[:size])
