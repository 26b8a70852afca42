"""Splits of the Hub that are read in order: what must be known of them before training, and where it is found.

How many images there are, and of which classes, stands in the footers of parquet files, with which the card's
``dataset_info`` must agree; of other files it stands in the card alone. Where neither says it, as of tars with words
for labels, the labels are read once beforehand, and noted for the next time under the commit's files.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfFileSystem

from mixup_recipes.data import multi_label
from mixup_recipes.data.cache import cache_dir
from mixup_recipes.data.labels import are_whole, cells_of, checked, is_whole, label
from mixup_recipes.data.samples import encoded_only, labels_alone, of_samples
from mixup_recipes.files import write_into
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

FOOTER = 2**16  # bytes that are asked for at once of a file's end
AT_ONCE = 16  # files that are read


def stream(builder: Any, recipe: Recipe, split: str, files: list[str]) -> datasets.IterableDataset:
    """A split that is read in order, with the number of its images and its classes."""
    told, named = (builder.info.splits or {}).get(split), builder.info.features is not None
    table = builder.as_streaming_dataset(split=split)
    if table.features is None:
        raise UserError(f"dataset {recipe.dataset!r} does not say what columns it has; leave out --streaming")
    table = of_samples(table, recipe)
    images = told.num_examples if told else 0
    if isinstance(builder, Parquet):
        rows = count_rows(recipe, files, named)
        if images and images != rows:
            raise UserError(
                f"dataset {recipe.dataset!r}, split {split!r}: the card says {many(images, 'image')}, the files have "
                f"{rows:,}; fix its dataset_info"
            )
        images = rows
    column = recipe.label_column
    feature = table.features.get(column)
    if feature is not None and not multi_label.is_many(feature) and not (images and says_classes(feature, recipe)):
        images, names = learnt(builder, table, recipe, split, files)
        whole = is_whole(feature)  # a class's place then, whatever its name is
        number = {str(k) if whole else name: k for k, name in enumerate(names)}
        table = relabelled_stream(table, column, number, names)
    table.info.splits = datasets.SplitDict({split: datasets.SplitInfo(split, num_examples=images)})
    return table


def says_classes(feature: Any, recipe: Recipe) -> bool:
    """Whether the classes of a stream are known: they have names, or are numbers below the recipe's."""
    whole = is_whole(feature)
    return hasattr(feature, "names") or (whole and recipe.num_classes > 0)


def learnt(
    builder: Any, table: datasets.IterableDataset, recipe: Recipe, split: str, files: list[str]
) -> tuple[int, list[str]]:
    """How many images a stream has, and the names of their classes: those of its copy, by reading all labels once."""
    column = recipe.label_column
    key = json.dumps([files, recipe.dataset_config, split, column, recipe.num_classes])
    place = cache_dir() / f"stream-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if place.is_file():
        noted = json.loads(place.read_text())
        return noted["images"], noted["classes"]
    if int(os.environ.get("RANK", "0")) == 0:
        what = many(len(files), "file is", "files are")
        print(f"{split}: {what} read once for their labels; nothing is copied", flush=True)
    where = f"dataset {recipe.dataset!r}, split {split!r}"
    values = checked(read_labels(builder, table, column, files, where), f"{where}: column {column!r}")
    if are_whole(values, recipe.dataset, column):
        names = multi_label.class_names(table.features[column], np.array(values, np.int64), recipe, where)
    else:
        _, names = multi_label.named([(str(value),) for value in values])
    write_into(place, json.dumps({"images": len(values), "classes": names}))
    return len(values), names


def read_labels(builder: Any, table: datasets.IterableDataset, column: str, files: list[str], where: str) -> list[Any]:
    """The labels of a stream in order. Of parquet files nothing else is asked for, of tars nothing else is kept.

    ``where``: for errors.
    """
    labels, system = table.select_columns([column]), HfFileSystem()

    def of_file(number: int) -> list[Any]:
        if isinstance(builder, Parquet):
            with system.open(files[number], "rb", block_size=FOOTER) as opened:
                found = pq.read_table(opened, columns=[column])[column]
            return cells_of(found, f"{where}: column {column!r}")
        return [value for rows in labels.shard(table.num_shards, number).iter(1000) for value in rows[column]]

    with labels_alone(builder, column), ThreadPoolExecutor(AT_ONCE) as pool:
        parts = list(pool.map(of_file, range(len(files) if isinstance(builder, Parquet) else table.num_shards)))
    return [value for part in parts for value in part]


def relabelled_stream(
    table: datasets.IterableDataset, column: str, place: Mapping[str, int], names: list[str]
) -> datasets.IterableDataset:
    """A stream with each label at its place among classes of these names; None for one that has none.

    ``place``: label, as text -> place.
    """
    table = encoded_only(table)
    features = datasets.Features({**(table.features or {}), column: datasets.ClassLabel(names=names)})
    return table.map(lambda row: {column: place.get(str(label(row[column])))}, features=features)


def count_rows(recipe: Recipe, files: list[str], named: bool) -> int:
    """Rows of parquet files, by their footers. ``named``: the card names the classes, else all files must agree.

    Raises ``UserError`` for files of other classes.
    """
    system = HfFileSystem()

    def footer(file: str) -> pq.FileMetaData:
        with system.open(file, "rb", block_size=FOOTER) as opened:
            return pq.read_metadata(opened)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        footers = list(pool.map(footer, files))
    if not named:
        names = [schema_classes(found.schema.to_arrow_schema(), recipe.label_column) for found in footers]
        if others := [file for file, found in zip(files, names, strict=True) if found != names[0]]:
            raise UserError(f"{others[0]} does not have the same class names as {Path(files[0]).name}")
    return sum(found.num_rows for found in footers)


def schema_classes(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of the classes, where a parquet file's schema has them."""
    return getattr(datasets.Features.from_arrow_schema(schema).get(column), "names", None)
