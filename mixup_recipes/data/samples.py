"""Tars and archives of the Hub as ``datasets`` reads them, with the columns and by the rules of this project."""

import contextlib
import functools
import itertools
from collections.abc import Container, Iterable, Iterator
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext
from fsspec.compression import compr

from mixup_recipes.data.decoding import LARGEST_FILE
from mixup_recipes.data.identity import some
from mixup_recipes.data.labels import whole_number
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, printable

PICTURES = ("jpg", "jpeg", "png", "webp")
"""What a sample of a tar calls its image, see ``tars``."""


LONGEST = 2**20  # bytes of a label
PACKED = {
    "bz2": "bz2", "gz": "gzip", "gzip": "gzip", "lz4": "lz4", "xz": "xz", "zst": "zstd", "zstd": "zstd"
}  # fmt: skip
"""Endings of packed members, and what fsspec calls them."""
DECODERS = WebDataset.DECODERS | {"cls": whole_number}
"""What the members of a sample are read by. ``cls`` is a number in digits, as in ``tars``; int would take 1_0 too."""


def mended(builder: Any) -> Any:
    """A builder of ``datasets`` that reads tars by our rules, and image folders in archives at all.

    Version 5.2 takes the folder of an archive for the class of all images in it, and fails. They go by their own.
    """
    if isinstance(builder, WebDataset):
        builder._get_pipeline_from_tar = samples_of
    if isinstance(builder, ImageFolder):
        examples = builder._generate_examples

        def by_own_folder(files: Any, **rest: Any) -> Any:
            return examples(files=[(None, *f[1:]) if len(f) == 3 and f[1] else f for f in files], **rest)

        builder._generate_examples = by_own_folder
    return builder


def samples_of(
    path: str, members: Iterable[tuple[str, Any]], wanted: Container[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The samples of a tar, in place of ``WebDataset._get_pipeline_from_tar``, which reads members of any size.

    ``members``: name and open file of each. ``wanted``: the members that are read, of labels; all where it is None.
    What is not wanted or too large is None.
    """
    most = LARGEST_FILE if wanted is None else LONGEST
    named = ((*base_plus_ext(name), name, file) for name, file in members)
    for key, found in itertools.groupby((row for row in named if row[0] is not None), lambda row: row[0]):
        sample: dict[str, Any] = {}
        for _, field, name, file in found:
            if field in sample:
                raise ValueError(f"{path}: the sample {key!a} has two members .{field}; expected one")
            sample[field] = value_of(name, file, most) if wanted is None or field in wanted else None
        yield sample | {"__key__": key, "__url__": path}


def value_of(name: str, file: Any, most: int) -> Any:
    """What a member says; None for one of more than ``most`` bytes, which are not read further."""
    *_, kind = parts = name.lower().split(".")
    if kind in PACKED:
        unpack = compr.get(PACKED[kind])
        if unpack is None:
            library = {"lz4": "lz4", "zstd": "zstandard"}.get(PACKED[kind], "fsspec")
            raise UserError(f"{printable(name)} in a tar is compressed by {PACKED[kind]}: pip install {library}")
        kind = parts[-2]
        with unpack(file, mode="rb") as unpacked:
            content = unpacked.read(most + 1)
    else:
        content = file.read(most + 1)
    return None if len(content) > most else DECODERS.get(kind, bytes)(content)


@contextlib.contextmanager
def labels_alone(builder: Any, column: str) -> Iterator[None]:
    """Within it, streams of a builder read no more of tars than their labels."""
    if not isinstance(builder, WebDataset):
        yield
        return
    builder._get_pipeline_from_tar = functools.partial(samples_of, wanted=("cls", "json", column))
    try:
        yield
    finally:
        builder._get_pipeline_from_tar = samples_of


def of_samples(table: Any, recipe: Recipe) -> Any:
    """A table or stream that ``datasets`` made of tars, with the recipe's columns in place of ``jpg``, ``cls`` or a key
    of ``json``, by the rules of ``tars``; any other as it is."""
    image, label = recipe.image_column, recipe.label_column
    if not {"__key__", "__url__"} <= {*table.column_names}:
        return table
    streamed = isinstance(table, datasets.IterableDataset)
    if streamed:  # else an image would be decoded and saved anew when a column is renamed
        table = encoded_only(table)
    found = [name for name in PICTURES if name in table.column_names]
    if image not in table.column_names and image == Recipe.image_column and found:
        if len(found) > 1:
            raise UserError(f"dataset {recipe.dataset!r} has images in {some(found)}; choose one by --image_column")
        table = table.rename_column(found[0], image)
    if label not in table.column_names and label == Recipe.label_column and "cls" in table.column_names:
        table = table.rename_column("cls", label)
    feature = table.features.get("json")
    if label not in table.column_names and isinstance(feature, dict) and label in feature:
        if streamed:
            features = datasets.Features({**table.features, label: feature[label]})
            return table.map(lambda row: {label: (row["json"] or {}).get(label)}, features=features)
        values = pc.struct_field(table.data.column("json"), label).to_pylist()
        table = table.add_column(label, values, feature=feature[label])
    return table


def encoded_only(table: datasets.IterableDataset) -> datasets.IterableDataset:
    """A stream whose images are not decoded."""
    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table
