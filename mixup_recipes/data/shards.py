"""Encoded images with labels written as parquet files in the Hub's layout, a few of them in memory at a time."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

SHARD = 500 * 10**6  # bytes of images in a file, as ``datasets`` cuts them
ROWS, BYTES = 1000, 2**25  # that are in memory at once, and a row group of the file
PAUSE = 60  # seconds between two lines that say how far it is


class Row(NamedTuple):
    """A row: the name of an image, its place among the classes, and its encoded bytes."""

    name: str
    label: int
    image: bytes


def write_split(folder: Path, split: str, names: Sequence[str], rows: Iterable[Row]) -> int:
    """Write ``folder/data/<split>-00000-of-00001.parquet`` and so on; returns how many rows there were.

    ``names``: of the classes. Columns ``image`` (bytes and path) and ``label``. The schema carries the features, so
    that readers know images and class names without a card. Raises ``OSError``.
    """
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    schema, count, told = features.arrow_schema, 0, time.monotonic()
    parts: list[Path] = []
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rest = groups(rows)
    group = next(rest, None)
    while group:
        parts.append(folder / "data" / f"{split}.{len(parts)}")
        room = SHARD
        with pq.ParquetWriter(parts[-1], schema) as writer:
            while group and room > 0:
                images = [{"bytes": row.image, "path": row.name} for row in group]
                writer.write_table(pa.table({"image": images, "label": [row.label for row in group]}, schema=schema))
                room -= sum(len(row.image) for row in group)
                count += len(group)
                group = next(rest, None)
        os.utime(folder.parent)  # who looks for what killed processes left sees that this one lives
        if time.monotonic() - told > PAUSE:
            told = time.monotonic()
            print(f"{folder.name}: {count:,} images of {split} are written", file=sys.stderr, flush=True)
    for number, part in enumerate(parts):
        part.rename(folder / "data" / f"{split}-{number:05d}-of-{len(parts):05d}.parquet")
    return count


def groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in lists of up to ``ROWS``, shorter where their images have more than ``BYTES``."""
    group: list[Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row.image)
        if len(group) == ROWS or size > BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
