"""Datasets by name: the two tables that a run needs, opened and checked, with encoded images."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.parquet as pq

from mixup_recipes.data import keys
from mixup_recipes.data.identity import labels_hash, one_commit
from mixup_recipes.data.prepare import PREPARED, find_prepared
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, nearest

SMALL = 2**30  # bytes of parquet that are read into memory instead of being copied to Arrow files


class Splits(NamedTuple):
    """The two tables a run needs, with encoded images, and what is recorded about them.

    Streams of the same rows for a recipe that says ``streaming``.
    """

    train: datasets.Dataset | datasets.IterableDataset
    eval: datasets.Dataset | datasets.IterableDataset
    classes: list[str]
    record: dict[str, Any]


def load_splits(recipe: Recipe) -> Splits:
    """Open the recipe's dataset and check everything that can be checked without decoding an image.

    Raises ``UserError`` with one clear line: unknown or gated dataset, missing split or column, classes that do
    not fit, empty split.
    """
    train, classes = load_split(recipe, recipe.train_split, recipe.max_train_samples, recipe.streaming)
    evaluation, others = load_split(recipe, recipe.eval_split, recipe.max_eval_samples, recipe.streaming)
    if classes != others:
        only = sorted(set(classes) ^ set(others))
        raise UserError(
            f"dataset {recipe.dataset!r}: classes of {recipe.train_split!r} and {recipe.eval_split!r} differ: "
            f"{', '.join(only[:5])}{' ...' if len(only) > 5 else ''} in one of them only"
        )
    if len(classes) != recipe.num_classes:
        raise UserError(
            f"dataset {recipe.dataset!r} has {len(classes)} classes, the recipe says num_classes "
            f"{recipe.num_classes}; pass --num_classes {len(classes)} if that is meant"
        )
    record = {
        "dataset": recipe.dataset,
        "config": recipe.dataset_config,
        "revision": recipe.dataset_revision,
        "commit": one_commit(recipe, train, evaluation),
        "splits": {
            split: {"images": count(table), "labels_sha256": labels_hash(table, recipe.label_column)}
            for split, table in ((recipe.train_split, train), (recipe.eval_split, evaluation))
        },
        "classes": classes,
    }
    return Splits(train, evaluation, classes, record)


def load_split(recipe: Recipe, split: str, limit: int | None, streaming: bool = False) -> tuple[Any, list[str]]:
    """One split with encoded images, its first ``limit`` images of a fixed shuffle, and its class names."""
    table = open_split(recipe, split, streaming)
    for column in (recipe.image_column, recipe.label_column):
        if column not in table.column_names:
            raise UserError(
                f"dataset {recipe.dataset!r}, split {split!r}: no column {column!r}; "
                f"{nearest(column, table.column_names)} (set image_column or label_column)"
            )
    if not count(table):
        raise UserError(f"dataset {recipe.dataset!r}: split {split!r} is empty")
    classes = class_names(recipe, split, table)
    try:  # images stay encoded, and only the two columns that are read are kept
        table = table.select_columns([recipe.image_column, recipe.label_column])
        table = table.cast_column(recipe.image_column, datasets.Image(decode=False))
    except (KeyError, TypeError, ValueError, NotImplementedError):
        raise UserError(
            f"dataset {recipe.dataset!r}: column {recipe.image_column!r} does not hold images (set image_column)"
        ) from None
    return subset(table, limit), classes


def open_split(recipe: Recipe, split: str, streaming: bool = False) -> Any:
    """One split of a prepared set, a local folder or a Hub dataset, or a stream of the latter."""
    name = recipe.dataset
    folder = Path(name).expanduser()
    if streaming and (name in PREPARED or folder.exists()):
        raise UserError(f"streaming is for datasets of the Hub, and {name!r} is on this machine; leave it out")
    if name in PREPARED:
        if (found := find_prepared(name)) is None:
            raise UserError(f"dataset {name!r} is not prepared on this machine; run: mixup-recipes prepare {name}")
        folder = found
    elif not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(f"dataset {name!r} is neither a folder, a Hub id (owner/name), nor one of {sorted(PREPARED)}")
    try:
        if folder.exists():
            return open_folder(folder, split)
        return open_hub(recipe, split, streaming)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as e:
        if isinstance(e, UserError):
            raise
        reason = " ".join(str(e).split())
        if "gated" in reason.lower():
            reason = (
                f"access is gated: accept the terms on its page on the Hub, then `hf auth login` or set HF_TOKEN "
                f"({reason[:160]})"
            )
        if "reach" in reason or "offline" in reason.lower():
            reason += "; check the network and `hf auth login` (ImageNet is gated), or pass --dataset FOLDER"
        raise UserError(f"cannot open dataset {name!r}, split {split!r}: {reason[:400]}") from None


def open_folder(folder: Path, split: str) -> datasets.Dataset:
    """A folder of parquet files in the Hub's layout, or of ``<split>/<class>/<image>`` files."""
    parquet = sorted(p for p in folder.rglob("*.parquet") if p.name.startswith(split + "-") or p.stem == split)
    if parquet:
        size = sum(p.stat().st_size for p in parquet)
        if size <= SMALL:  # reading it is quicker than the Arrow copy that load_dataset would write
            return datasets.concatenate_datasets([datasets.Dataset(pq.read_table(p)) for p in parquet])
        announce_copy(size, "parquet")
        return datasets.load_dataset("parquet", data_files={split: [str(p) for p in parquet]}, split=split)
    if any(folder.rglob("*.parquet")):
        names = sorted({p.name.split("-")[0].removesuffix(".parquet") for p in folder.rglob("*.parquet")})
        raise UserError(f"{folder} has no split {split!r}; {nearest(split, names)}")
    found = {p.name: p for p in folder.iterdir() if p.is_dir()}
    alias = {"validation": ("val", "valid"), "val": ("validation", "valid"), "test": ("val", "validation")}
    directory = next((found[n] for n in (split, *alias.get(split, ())) if n in found), None)
    if directory is None:
        raise UserError(f"{folder} has no folder for split {split!r}; {nearest(split, found)}")
    if not any(p.is_dir() for p in directory.iterdir()):
        raise UserError(f"{directory} has no class folders; expected {directory.name}/<class>/<image>")
    if not any(p.is_file() for p in directory.rglob("*")):
        raise UserError(f"{directory} has no images; expected {directory.name}/<class>/<image>")
    # "**" is all files: left alone, datasets sorts files into splits by words in their names, such as _val_
    files = {"train": "**"}
    return datasets.load_dataset(
        "imagefolder", data_dir=str(directory), data_files=files, split="train", drop_labels=False
    )


def open_hub(recipe: Recipe, split: str, streaming: bool) -> Any:
    """A Hub dataset; its size is announced before anything large is written. A stream writes nothing."""
    builder = datasets.load_dataset_builder(
        recipe.dataset, name=recipe.dataset_config, revision=recipe.dataset_revision
    )
    info = builder.info
    if info.splits and split not in info.splits:
        raise UserError(f"dataset {recipe.dataset!r} has no split {split!r}; {nearest(split, info.splits)}")
    if streaming and not (info.splits and info.features and info.splits[split].num_examples):
        raise UserError(
            f"dataset {recipe.dataset!r} does not say what columns and how many images it has; leave out --streaming"
        )
    if streaming:
        stream = builder.as_streaming_dataset(split=split)
        stream.info.download_checksums = {str(f): None for f in (builder.config.data_files or {}).get(split, ())}
        return stream
    announce_copy((info.download_size or 0) + (info.dataset_size or 0), recipe.dataset.replace("/", "___"))
    builder.download_and_prepare()
    table = builder.as_dataset(split=split)
    table.info.download_checksums = {f"hf://datasets/{recipe.dataset}@{builder.hash}/": None}  # its files' beginning
    return table


def announce_copy(size: int, kept: str) -> None:
    """Say how much disk ``datasets`` is about to fill; refuse when it is not there. ``size`` in bytes.

    ``kept``: the name under which the cache keeps the copy, if it was made before.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if size > SMALL and int(os.environ.get("RANK", "0")) == 0:
        print(f"datasets keeps up to {size / 1e9:.0f} GB in {cache} (once); {free / 1e9:.0f} GB are free there")
    if size > free and not (cache / kept).exists():
        raise UserError(f"{cache}: {size / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free; set HF_HOME to a larger disk")


def count(table: datasets.Dataset | datasets.IterableDataset) -> int:
    """Images of a table, or those that a stream says to have."""
    return len(table) if isinstance(table, datasets.Dataset) else table.info.splits[str(table.split)].num_examples


def class_names(recipe: Recipe, split: str, table: Any) -> list[str]:
    """The class names of a split, after checking that its labels are among them (those of a stream: when read)."""
    feature = table.features[recipe.label_column]
    if isinstance(table, datasets.IterableDataset):
        return list(getattr(feature, "names", map(str, range(recipe.num_classes))))
    whole = "int" in str(getattr(feature, "dtype", ""))
    used = np.unique(np.asarray(table.with_format("numpy")[recipe.label_column])) if whole else np.empty(0)
    if used.dtype.kind not in "iu":  # an integer column with gaps becomes one of floats
        raise UserError(f"dataset {recipe.dataset!r}: label column {recipe.label_column!r} is not of whole numbers")
    if used.min() < 0:
        raise UserError(f"dataset {recipe.dataset!r}, split {split!r} has unlabelled images (label -1)")
    if hasattr(feature, "names"):
        names = list(feature.names)
    else:
        names = [str(i) for i in range(max(recipe.num_classes, int(used.max()) + 1))]
    if used.max() >= len(names):
        raise UserError(
            f"dataset {recipe.dataset!r}, split {split!r} has label {used.max()}, but only {len(names)} class names"
        )
    return names


def subset(table: Any, size: int | None) -> Any:
    """The first ``size`` images of a shuffle that never changes, so that a small subset has all classes."""
    if size is None or size >= count(table):
        return table
    return table.select(np.sort(keys.rng(keys.SUBSET, 0, 0).permutation(len(table))[:size]))
