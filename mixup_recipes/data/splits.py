"""Datasets by name: the two tables that a run needs, opened and checked, with encoded images."""

import hashlib
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from mixup_recipes.data import folder as image_folder
from mixup_recipes.data import holdout, keys, multi_label, parquet
from mixup_recipes.data import table as files_table
from mixup_recipes.data.classes import among, natural, places, subset
from mixup_recipes.data.origin import Opened, files_of, note_files, with_named
from mixup_recipes.data.prepare import PREPARED, find_prepared
from mixup_recipes.data.repository import SMALL, announce_copy, one_commit, open_hub
from mixup_recipes.hub_errors import innermost, is_network
from mixup_recipes.hub_errors import reason as hub_reason
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, nearest

# What the libraries below raise for files of other forms than they expect.
WRONG = (
    ValueError, OSError, RecursionError, NotImplementedError, TypeError, LookupError, AttributeError, struct.error,
    pa.ArrowException,
)  # fmt: skip
IMAGES = (datasets.Image, datasets.Value, dict)  # columns that may hold encoded images: no lists of numbers


class Split(NamedTuple):
    """The images of one split, still encoded."""

    table: Any
    """A ``datasets`` table or stream of the recipe's two columns: images as a table of bytes and path, or, of a folder
    or repository of images, as the path or address of a file; labels as places in ``classes``."""
    classes: list[str]
    record: dict[str, Any]
    """See ``split_record``."""
    notes: list[str]
    """What the user should know: what was left out, how classes were told."""


class Splits(NamedTuple):
    """The two tables a run needs, with encoded images, and what is recorded about them.

    Streams of the same rows for a recipe that says ``streaming``.
    """

    train: Any
    eval: Any
    classes: list[str]
    record: dict[str, Any]
    notes: list[str]
    place: Path | None
    """The folder, of data that are on this machine under a path of the user's."""
    held_out: list[str]
    """Names of the images that are held out, of data with one split; empty for all others."""


def load_splits(recipe: Recipe, like: Sequence[str] = ()) -> Splits:
    """Open the recipe's dataset and check everything that can be checked without decoding an image.

    ``like``: the classes of a run that goes on, whose order is kept where they are the same. Raises ``UserError`` with
    one clear line: unknown or gated dataset, missing split or column, classes that do not fit, empty split.
    """
    opened = open_split(recipe, recipe.train_split, recipe.streaming)
    train = prepared(opened, recipe, recipe.train_split, recipe.max_train_samples, like)
    other = opened if opened.whole else open_split(recipe, recipe.eval_split, recipe.streaming)
    evaluation = prepared(other, recipe, recipe.eval_split, recipe.max_eval_samples, train.classes)
    what = f"dataset {recipe.dataset!r}"
    among(train.classes, evaluation.classes, f"{what}, split {recipe.eval_split!r},", f"{recipe.train_split!r}")
    if evaluation.classes != train.classes:
        raise UserError(f"{what}: {recipe.eval_split!r} has its classes in another order; leave out --streaming")
    if recipe.num_classes and len(train.classes) != recipe.num_classes:
        raise UserError(
            f"{what} has {len(train.classes)} classes, the recipe says num_classes {recipe.num_classes}; pass "
            f"--num_classes {len(train.classes)} if that is meant"
        )
    record: dict[str, Any] = {
        "dataset": recipe.dataset,
        "config": recipe.dataset_config,
        "revision": recipe.dataset_revision,
        "commit": one_commit(recipe, train.table, evaluation.table),
        "splits": {recipe.train_split: train.record, recipe.eval_split: evaluation.record},
        "classes": train.classes,
    }
    if opened.whole:
        record["holdout"] = {"of": recipe.train_split, "share": recipe.holdout, "seed": recipe.holdout_seed}
    notes = [
        f"{name}: {n}" for name, s in ((recipe.train_split, train), (recipe.eval_split, evaluation)) for n in s.notes
    ]
    folder = Path(recipe.dataset).expanduser().absolute()
    place = folder if recipe.dataset not in PREPARED and folder.exists() else None
    names = holdout.names_of(evaluation.table.data.column(recipe.image_column)) if opened.whole else []
    return Splits(train.table, evaluation.table, train.classes, record, notes, place, names)


def load_split(
    recipe: Recipe, split: str, limit: int | None, streaming: bool = False, like: Sequence[str] = ()
) -> Split:
    """One split with encoded images: its first ``limit`` images of a fixed shuffle.

    ``like``: class names that those of the split are to be placed among, where all of them are there.
    """
    return prepared(open_split(recipe, split, streaming), recipe, split, limit, like)


def prepared(opened: Opened, recipe: Recipe, split: str, limit: int | None, like: Sequence[str] = ()) -> Split:
    """A split as it was found, as ``load_split`` gives it."""
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
    classes = class_names(recipe, split, table)
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
            f"dataset {recipe.dataset!r} has one class, {classes[0]!r}; expected <class>/<image> with two or more"
        )
    if opened.whole:
        table, fingerprint, said = side(table, recipe, split, classes)
        notes = notes + said
    read = isinstance(table, datasets.Dataset)
    if read and like and classes != list(like) and (order := arranged(classes, list(like))):
        notes = notes + [n for n in [subset(len(classes), len(like), f"split {split!r}", "the run")] if n]
        table, classes = relabelled(table, label, among(order, classes, "", ""), order), order
    table = first(table, limit)
    return Split(table, classes, split_record(table, label, classes, fingerprint), notes)


def side(
    table: datasets.Dataset, recipe: Recipe, split: str, classes: list[str]
) -> tuple[datasets.Dataset, str, list[str]]:
    """The images of a data set with one split that are trained on, or held out; their fingerprint, and what to say."""
    images, labels = table.data.column(recipe.image_column), labels_of(table, recipe.label_column)
    words = multi_label.in_words(labels, len(table), classes)
    sides = holdout.divide(images, labels, classes, recipe.holdout, recipe.holdout_seed)
    evaluated = split != recipe.train_split
    rows = sides.held_out if evaluated else sides.train
    if not len(rows):
        raise UserError(f"dataset {recipe.dataset!r} has {len(table)} images, of which none is held out; add images")
    digest = hashlib.sha256()
    for row, size in zip(rows.tolist(), sides.sizes[rows].tolist(), strict=True):
        digest.update(f"{words[row]}/{sides.names[row]}\0{size}\n".encode(errors="replace"))
    notes = holdout.notes_of(sides, labels, classes) if evaluated else []
    return datasets.Dataset(table.data.table.take(pa.array(rows)), info=table.info), digest.hexdigest(), notes


def in_numbers(table: Any, recipe: Recipe, split: str) -> Any:
    """A table whose labels are words with classes in their place, sorted; any other as it is.

    With ``multi_label`` the classes of each image, see ``multi_label.in_lists``.
    """
    label = recipe.label_column
    if recipe.multi_label:
        return multi_label.in_lists(table, recipe, split)
    if multi_label.is_many(table.features[label]):
        raise UserError(f"dataset {recipe.dataset!r}: column {label!r} holds lists: {multi_label.PASS}")
    if not isinstance(table, datasets.Dataset) or "string" not in str(getattr(table.features[label], "dtype", "")):
        return table
    words = table.data.column(label).to_pylist()
    if missing := [i for i, word in enumerate(words) if not word]:
        rows = f"{len(missing):,} rows have no label in column {label!r}, the first is row {missing[0]}"
        raise UserError(f"dataset {recipe.dataset!r}: {rows}")
    names = sorted({*words}, key=natural(sorted({*words})))
    number = {name: i for i, name in enumerate(names)}
    files, feature = files_of(table), datasets.ClassLabel(names=names)
    table = table.remove_columns(label).add_column(label, np.array([number[w] for w in words]), feature=feature)
    note_files(table, files)
    return table


def open_split(recipe: Recipe, split: str, streaming: bool = False) -> Opened:
    """One split of a prepared set, a local folder or a Hub dataset, or a stream of the latter."""
    name = recipe.dataset
    folder = Path(name).expanduser()
    if len(name) > 4096 or any(len(part) > 255 for part in folder.parts):  # which the system would not look for
        raise UserError(f"dataset {name[:40]!r}... is too long for the name of a folder")
    if streaming and (name in PREPARED or folder.exists()):
        raise UserError(f"streaming is for datasets of the Hub, and {name!r} is on this machine; leave it out")
    if name in PREPARED:
        if (found := find_prepared(name)) is None:
            raise UserError(f"dataset {name!r} is not prepared on this machine; run: mixup-recipes prepare {name}")
        folder = found
    elif is_path(name) and not folder.exists():
        raise UserError(f"dataset {name!r} is neither a folder, a Hub id (owner/name), nor one of {sorted(PREPARED)}")
    try:
        return open_folder(recipe, folder, split) if folder.exists() else open_hub(recipe, split, streaming)
    except Exception as e:
        known = isinstance(e, (*WRONG, datasets.exceptions.DatasetsError))
        if isinstance(e, UserError) or not (known or is_network(innermost(e))):  # of the HTTP library's own kinds
            raise
        reason = " ".join(str(e).split()) if known else hub_reason(e)
        if "gated" in reason.lower():
            reason = (
                f"access is gated: accept the terms on its page on the Hub, then `hf auth login` or set HF_TOKEN "
                f"({reason[:160]})"
            )
        if "reach" in reason or "offline" in reason.lower():
            reason += "; check the network and `hf auth login` (ImageNet is gated), or pass --dataset FOLDER"
        raise UserError(f"cannot open dataset {name!r}, split {split!r}: {reason[:400]}") from None


def open_folder(recipe: Recipe, folder: Path, split: str) -> Opened:
    """A folder of parquet files in the Hub's layout, or of images by classes, or a table of paths and labels."""
    if recipe.dataset_revision is not None:
        raise UserError(f"dataset_revision is a commit of the Hub, and {folder} is on this machine; leave it out")
    own = (recipe.train_split, recipe.eval_split)
    held_out = recipe.holdout > 0 and recipe.train_split != recipe.eval_split
    if not folder.is_dir():
        if folder.suffix.lower() not in files_table.SUFFIXES:
            words = ", ".join(files_table.SUFFIXES)
            raise UserError(f"dataset {str(folder)!r} is a file; expected a folder, or a table of paths ({words})")
        (table, fingerprint, notes), whole = files_table.listing(folder, split, recipe)
        return Opened(table, fingerprint, notes, ours=True, whole=whole and held_out)
    try:
        directory = image_folder.split_folder(folder, split, own)
    except UserError as e:
        directory, why = None, e
    files = None
    if directory is None or not image_folder.has_images(directory):
        files = parquet.parquet_files(folder, split, recipe.dataset_config, own)
    if files is None:
        all_of_it = image_folder.undivided(folder, own) if recipe.holdout else None
        directory = all_of_it or directory
        if directory is None:
            tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in files_table.SUFFIXES)
            raise (
                UserError(f"{why}; a table of paths is read by its own name: --dataset {tables[0]}") if tables else why
            )
        if recipe.dataset_config is not None:
            raise UserError(f"{folder} is a folder of images, which has no configurations; leave out dataset_config")
        table, fingerprint, notes = image_folder.listing(directory)
        if all_of_it is None:
            notes += image_folder.beside(folder, own) + [f"read from {directory}"] * (directory.name != split)
        return Opened(table, fingerprint, notes, ours=True, whole=all_of_it is not None and held_out)
    parquet.check_schemas(files.paths)
    size = sum(path.stat().st_size for path in files.paths)
    if size <= SMALL:  # reading it is quicker than the Arrow copy that load_dataset would write
        table = datasets.concatenate_datasets([datasets.Dataset(parquet.read_table(path)) for path in files.paths])
    else:
        announce_copy(size, "parquet")
        # load_dataset takes a path for a pattern
        names = [re.sub(r"([\[\]*?])", r"[\1]", str(path.absolute())) for path in files.paths]
        table = datasets.load_dataset("parquet", data_files={split: names}, split=split)
    note_files(table, [str(path.absolute()) for path in files.paths], str(folder.absolute()))
    return Opened(table, parquet.fingerprint(files.paths), files.notes)


def is_path(dataset: str) -> bool:
    """Whether the name of a dataset can be none of the Hub."""
    return dataset.startswith((".", "/", "~")) or dataset.count("/") != 1


def is_here(recipe: Recipe) -> bool:
    """Whether opening the recipe's dataset downloads nothing: it is a folder, is prepared, or was copied before."""
    name = recipe.dataset
    try:
        if name in PREPARED or is_path(name) or Path(name).expanduser().exists():
            return True  # if it is not there, ``open_split`` says so
        builder = datasets.load_dataset_builder(name, name=recipe.dataset_config, revision=recipe.dataset_revision)
    except (*WRONG, datasets.exceptions.DatasetsError):
        return False
    return os.path.isdir(builder.cache_dir)


def count(table: Any) -> int:
    """Images of a table, or those that a stream says to have."""
    return len(table) if isinstance(table, datasets.Dataset) else table.info.splits[str(table.split)].num_examples


def split_record(table: Any, column: str, classes: list[str], fingerprint: str | None) -> dict[str, Any]:
    """What is recorded of a split. A stream's labels have not been read: the hash is that of its files' addresses."""
    if isinstance(table, datasets.IterableDataset):
        addresses = "\n".join(files_of(table))
        images = table.info.splits[str(table.split)].num_examples
        found = {"images": images, "labels_sha256": hashlib.sha256(addresses.encode()).hexdigest()}
    elif isinstance(labels := labels_of(table, column), multi_label.Pairs):
        found = {"images": len(table), **multi_label.labels_record(labels, len(table), len(classes))}
    else:
        labels = labels.astype(np.int64)
        found = {"images": len(table), "labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest()}
        found["per_class"] = np.bincount(labels, minlength=len(classes)).tolist()
    return found | ({"fingerprint": fingerprint} if fingerprint else {})


def labels_of(table: datasets.Dataset, column: str) -> np.ndarray | multi_label.Pairs:
    """A column of whole numbers, all at once: one by one it would take seconds; of lists each label of each image."""
    if multi_label.is_many(table.features[column]):
        return multi_label.pairs(table, column)
    return np.asarray(table.select_columns([column]).with_format("numpy")[:][column])


def class_names(recipe: Recipe, split: str, table: Any) -> list[str]:
    """The class names of a split, after checking that its labels are among them (those of a stream: when read)."""
    feature = table.features[recipe.label_column]
    if multi_label.is_many(feature):
        return list(feature.feature.names)
    if isinstance(table, datasets.IterableDataset):
        return list(getattr(feature, "names", map(str, range(recipe.num_classes))))
    whole = "int" in str(getattr(feature, "dtype", ""))
    used = np.unique(np.asarray(labels_of(table, recipe.label_column))) if whole else np.empty(0)
    if used.dtype.kind not in "iu":  # an integer column with gaps becomes one of floats
        raise UserError(f"dataset {recipe.dataset!r}: label column {recipe.label_column!r} is not of whole numbers")
    if used.min() < 0:
        raise UserError(f"dataset {recipe.dataset!r}, split {split!r} has unlabelled images (label {used.min()})")
    if hasattr(feature, "names"):
        names = [str(name) for name in feature.names]
        if odd := [name for name in names if not image_folder.encodable(name)]:
            raise UserError(f"dataset {recipe.dataset!r}, split {split!r} has a class name that is no text: {odd[0]!a}")
    elif used.max() >= multi_label.MOST_CLASSES:
        raise UserError(f"dataset {recipe.dataset!r}, split {split!r}: label {used.max()} is too large for a class")
    else:
        names = [str(i) for i in range(max(recipe.num_classes, int(used.max()) + 1))]
    if used.max() >= len(names):
        raise UserError(
            f"dataset {recipe.dataset!r}, split {split!r} has label {used.max()}, but only {len(names)} class names"
        )
    return names


def arranged(classes: list[str], like: list[str]) -> list[str] | None:
    """The classes in the order of others where all are among them; of as many, new ones take the place of lost ones."""
    if not {*classes} - {*like}:
        return like
    new = iter([name for name in classes if name not in {*like}])
    return [name if name in {*classes} else next(new) for name in like] if len(classes) == len(like) else None


def relabelled(table: datasets.Dataset, column: str, where: Sequence[int], names: list[str]) -> datasets.Dataset:
    """The table with each label moved to its place, among classes of these names."""
    if isinstance(labels := labels_of(table, column), multi_label.Pairs):
        moved = labels._replace(place=np.asarray(where)[labels.place])
        return multi_label.with_labels(table, column, moved, names)
    labels = np.asarray(where)[labels]
    order, files = table.column_names, files_of(table)
    feature = datasets.ClassLabel(names=names)
    table = table.remove_columns(column).add_column(column, labels, feature=feature).select_columns(order)
    note_files(table, files)
    return table


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
    return split._replace(table=relabelled(split.table, recipe.label_column, found, names), notes=notes)


def first(table: Any, size: int | None) -> Any:
    """The first ``size`` images of a shuffle that never changes, so that a small subset has all classes."""
    if size is None or size >= count(table):
        return table
    return table.select(np.sort(keys.rng(keys.SUBSET, 0, 0).permutation(len(table))[:size]))
