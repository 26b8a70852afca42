"""Parquet files in a folder, as the Hub lays them out: which of them are a split, and what tells them apart.

- A file ``<split>.parquet`` or ``<split>-00000-of-00001.parquet``, or one in a folder ``<split>/``, is of that very
  split: ``train-extra`` is none of ``train``. A split in two of these forms is refused.
- A configuration is a folder, or what ``configs`` in the head of ``README.md`` says. Where none is named, the files of
  the folder itself or of ``data/`` are read, or those of the only folder that has some.
- All shards that a file's name promises must be there, and have the same columns and class names. A gap in files that
  are merely numbered is noted.
"""

import contextlib
import fnmatch
import functools
import hashlib
import itertools
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mixup_recipes.data.decoding import BadImage, read
from mixup_recipes.data.folder import SAME, SPLITS, alone, entries
from mixup_recipes.data.identity import SHOWN, some
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?")
PROMISE = re.compile(r"(?P<head>(?:.*[-_])?)(?P<number>\d{1,6})-of-(?P<count>\d{1,6})(-[0-9a-f]+)?", re.ASCII)
"""What the name of a file says of shards, whatever its split is."""
LONGEST = 2**20  # bytes of a README that are looked at
SERIES = re.compile(r"(?P<head>.*?)(?P<number>\d+)", re.ASCII)
CARD = re.compile(r"---\r?\n(.*?)\r?\n---", re.DOTALL)
CONFIGS = re.compile(r"^configs:.*?(?=^[^\s#\]}-]|\Z)", re.DOTALL | re.MULTILINE)  # up to the next key
MOST_CONFIGS = 2**17  # characters of it, which take seconds to read
ROOM, SWOLLEN = 2**28, 16  # bytes of memory that the rows of a file may take, and those for each byte of it
MOST_ROWS = 2**20  # of a file that has not a byte for each
BATCH = 64  # rows that are read at once


class Files(NamedTuple):
    """The files of a split, in order."""

    paths: list[Path]
    notes: list[str]
    """What else is in the folder and was left out."""
    whole: bool
    """Whether these are the files of all data, which have one split."""


def parquet_files(
    folder: Path, split: str, config: str | None, own: tuple[str, str], held_out: bool = False
) -> Files | None:
    """The files of a split; None for a folder without parquet files. ``own``: the recipe's splits.

    ``held_out``: whether a data set with one split is taken whole, for both of them. Raises ``UserError`` for a split
    or configuration that is not there, for a choice that only the user can make, and for missing shards.
    """
    found = sorted(tables(folder))
    if not found:
        return None
    return taken(folder, split, divided(folder, found, config, own), found, own, held_out)


def divided(
    folder: Path, found: list[Path], config: str | None, own: tuple[str, str], shard: re.Pattern[str] = SHARD
) -> dict[str, list[Path]]:
    """The files of a folder by split, of the configuration that is meant. ``shard``: what the name of one is like."""
    if (told := configurations(folder, found)) is not None:
        name = only_one(folder, config, list(told), next((k for k, v in told.items() if v[1]), None))
        return told[name][0]
    places = by_place(folder, found, SPLITS | {*own}, shard)
    usual = [place for place in ("", "data") if place in places]
    return places[only_one(folder, config, sorted(places), usual[0] if len(usual) == 1 else None)]


def taken(
    folder: Path, split: str, splits: dict[str, list[Path]], found: list[Path], own: tuple[str, str], held_out: bool
) -> Files:
    """The files of a split, of ``splits``; ``found``: all of the kind that the folder has. See ``parquet_files``."""
    whole = held_out and split in own and alone({*splits}, own)
    name = own[0] if whole else next((s for s in (split, *SAME.get(split, ())) if s in splits), None)
    if name is None:
        raise UserError(f"{folder} has no split {split!r}; {nearest(split, splits)}")
    paths = splits[name]
    if not paths:
        raise UserError(f"{folder}: README.md names no file that is there for split {split!r}")
    check_shards(paths)
    notes = [f"read from the files of {name}"] * (name != split and not whole)
    others = {*found} - {path for files in splits.values() for path in files}
    if others:
        words = some(sorted(path.relative_to(folder).as_posix() for path in others))
        notes.append(f"{len(others):,} left out ({found[0].suffix[1:]} files of other places): {words}")
    notes += gaps(paths)
    return Files(paths, notes, whole)


def tables(folder: Path, suffixes: Sequence[str] = (".parquet",)) -> Iterator[Path]:
    """The files of a kind below a folder but for hidden ones, also behind links; ``suffixes`` in any case.

    No link is followed to a folder above it, and one that lies behind another link only to what was not read yet: a net
    of links comes to an end.
    """
    status = folder.stat()
    read_already: set[tuple[int, int]] = set()

    def below(folder: Path, above: frozenset[tuple[int, int]], linked: bool) -> Iterator[Path]:
        with contextlib.suppress(PermissionError):  # such as lost+found
            for entry in (e for e in entries(folder) if not e.name.startswith(".")):
                path = folder / entry.name
                if entry.kind == "file" and path.suffix.lower() in suffixes:
                    yield path
                link = entry.kind == "folder" and path.is_symlink()
                if entry.kind != "folder" or entry.place in above or (link and linked and entry.place in read_already):
                    continue
                read_already.add(entry.place)
                yield from below(path, above | {entry.place}, linked or link)

    return below(folder, frozenset({(status.st_dev, status.st_ino)}), False)


def by_place(
    folder: Path, found: list[Path], known: set[str], shard: re.Pattern[str] = SHARD
) -> dict[str, dict[str, list[Path]]]:
    """The files by configuration and split; ``known``: what a folder of a split is called."""
    places: dict[str, dict[str, list[Path]]] = {}
    forms: dict[tuple[str, str], str] = {}
    for path in found:
        *above, _ = path.relative_to(folder).parts
        stem = shard.fullmatch(path.stem)
        if above and (above[-1] in known or (not stem and path.stem.isdigit())):
            *above, split = above
            form = "a folder of its own"
        else:
            split, form = (stem["split"], "shards") if stem else (path.stem, "one file")
        place = "/".join(above)
        if forms.setdefault((place, split), form) != form:
            forms_found = f"{forms[place, split]} and {form}"
            raise UserError(f"{folder}: split {split!r} is there twice, as {forms_found}; keep one of them")
        places.setdefault(place, {}).setdefault(split, []).append(path)
    return places


def only_one(folder: Path, config: str | None, names: list[str], default: str | None) -> str:
    """The configuration that is meant. Raises ``UserError`` with the choices."""
    shown = [name or "." for name in names]
    if config is not None:
        for name in (config, f"data/{config}", "" if config == "." else config):
            if name in names:
                return name
        raise UserError(f"{folder} has no configuration {config!r}; {nearest(config, shown)}")
    if default is not None:
        return default
    if "default" in names or len(names) == 1:
        return "default" if "default" in names else names[0]
    raise UserError(
        f"{folder} has {many(len(names), 'configuration')}: {some(shown)}; choose one with --dataset_config"
    )


def configurations(folder: Path, tables: list[Path]) -> dict[str, tuple[dict[str, list[Path]], bool]] | None:
    """What the head of ``README.md`` says: configuration -> ``tables`` by split, and whether it is the default one."""
    try:
        head = CARD.match(read(folder / "README.md")[:LONGEST].decode(errors="replace"))
    except BadImage:  # there is none
        return None
    text = CONFIGS.search(head[1]) if head else None
    if text is None:
        return None
    if len(text[0]) > MOST_CONFIGS:
        raise UserError(
            f"{folder}: README.md has configs of {len(text[0]):,} characters, more than {MOST_CONFIGS:,}; shorten them"
        )
    try:
        configs = yaml.load(text[0], yaml.BaseLoader)["configs"]  # all scalars are text: 2019 is the name of a split
    except (yaml.YAMLError, RecursionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{folder}: the configs of README.md cannot be read: {reason}; fix them") from None
    if not isinstance(configs, list):
        return None
    found = {}
    for config in configs:
        files = config.get("data_files") if isinstance(config, dict) else None
        if isinstance(files, str):
            files = {"train": files}
        if isinstance(files, list):
            rows = [row for row in files if isinstance(row, dict) and isinstance(row.get("split"), str)]
            files = {row["split"]: row.get("path") for row in rows}
        name = config.get("config_name", "default") if isinstance(config, dict) else None
        if isinstance(files, dict) and isinstance(name, str):
            splits = {split: matching(folder, tables, patterns) for split, patterns in files.items()}
            found[name] = splits, config.get("default") in ("true", "True")
    return found or None


def matching(folder: Path, tables: list[Path], patterns: Any) -> list[Path]:
    """The tables of a folder that patterns such as ``data/train-*`` name, each once."""
    texts = [p for p in (patterns if isinstance(patterns, list) else [patterns]) if isinstance(p, str)]
    wanted = [[part for part in text.split("/") if part not in ("", ".")] for text in texts]
    return list(dict.fromkeys(t for w in wanted for t in tables if fits(t.relative_to(folder).parts, w)))


def fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path is one that a pattern means, where ``**`` stands for any number of folders."""

    @functools.cache
    def rest(name: int, part: int) -> bool:
        if part == len(pattern):
            return name == len(names)
        if pattern[part] == "**":
            return rest(name, part + 1) or (name < len(names) and rest(name + 1, part))
        return name < len(names) and fnmatch.fnmatchcase(names[name], pattern[part]) and rest(name + 1, part + 1)

    return rest(0, 0)


def check_shards(paths: Iterable[Path]) -> None:
    """Raise ``UserError`` unless all shards are there that the files' names promise, each once."""
    numbers: dict[tuple[Path, str], dict[int, list[int]]] = {}
    for path in paths:
        if stem := PROMISE.fullmatch(path.stem):
            series = numbers.setdefault((path.parent, stem["head"]), {})
            series.setdefault(int(stem["count"]), []).append(int(stem["number"]))
    for (parent, _), sets in numbers.items():
        if len(sets) > 1:
            raise UserError(
                f"{parent}: the shards belong to {many(len(sets), 'set')}, of {some([str(n) for n in sets])} files"
            )
        ((count, there),) = sets.items()
        if missing := sorted({*range(count)} - {*there}):
            raise UserError(f"{parent}: shards {some([str(n) for n in missing])} of {count} are missing")
        if len(there) > count:
            raise UserError(f"{parent}: {many(len(there), 'file')} for {many(count, 'shard')}")


def gaps(paths: Iterable[Path]) -> list[str]:
    """A note for each series of numbered files that lacks some in between.

    Its numbers begin at 0 or 1, or with a zero: others, such as dates, may have gaps.
    """
    series: dict[tuple[Path, str], dict[int, str]] = {}
    for path in paths:
        stem = SERIES.fullmatch(path.stem)
        if stem and not PROMISE.fullmatch(path.stem):
            series.setdefault((path.parent, stem["head"]), {})[int(stem["number"])] = path.name
    notes = []
    for (parent, head), names in series.items():
        numbers = sorted(names)
        first, last = names[numbers[0]], names[numbers[-1]]
        count = numbers[-1] - numbers[0] + 1 - len(numbers)
        if count and (numbers[0] <= 1 or first[len(head)] == "0"):
            width = len((parent / first).stem) - len(head)
            between = (n for a, b in itertools.pairwise(numbers) for n in range(a + 1, b))
            lacking = [f"{head}{n:0{width}}" for n in itertools.islice(between, SHOWN)]
            more = f", and {count - SHOWN:,} more" * (count > SHOWN)
            notes.append(f"the files {first} to {last} have gaps: {', '.join(lacking)}{more}")
    return notes


def check_schemas(paths: list[Path]) -> None:
    """Raise ``UserError`` unless all files have the same columns and class names."""
    first, *rest = (schema_of(path) for path in paths)
    for path, schema in zip(paths[1:], rest, strict=True):
        if not schema.equals(first, check_metadata=True) and features(schema) != features(first):
            raise UserError(f"{path} does not have the same columns and class names as {paths[0].name}")


def schema_of(path: Path) -> pa.Schema:
    """The columns of a file. Raises ``OSError`` that names a file that has none."""
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as e:
        raise OSError(f"{path.name}: {e}") from None


def features(schema: pa.Schema) -> datasets.Features:
    """The columns as ``datasets`` sees them."""
    return datasets.Features.from_arrow_schema(schema)


def read_table(path: Path) -> pa.Table:
    """The rows of a file, in pieces, since a few kilobytes can say the same image a million times.

    Raises ``UserError`` when they take far more memory than the file is large.
    """
    size = path.stat().st_size
    most = ROOM + SWOLLEN * size
    room, parts = most, []
    with pq.ParquetFile(path) as file:
        schema = pa.schema(map(spelled_out, file.schema_arrow), file.schema_arrow.metadata)
        if file.metadata.num_rows > MOST_ROWS + size:
            raise UserError(f"{path} has {many(file.metadata.num_rows, 'row')} in {size:,} bytes; expected images")
        for number in range(file.metadata.num_row_groups):
            largest = file.metadata.row_group(number).total_byte_size  # that a row of the group can be
            for batch in file.iter_batches(min(BATCH, 1 + room // (1 + largest)), [number]):
                parts.append(batch.cast(schema))
                room -= parts[-1].nbytes
                if room < 0:
                    raise UserError(f"{path}: {size:,} bytes become more than {most:,} in memory; expected images")
        table = pa.Table.from_batches(parts, schema)
    table.validate(full=True)  # text that is none
    return table


def spelled_out(field: pa.Field) -> pa.Field:
    """The column without a dictionary in whose place its values stand."""
    if pa.types.is_struct(field.type):
        return field.with_type(pa.struct(map(spelled_out, field.type)))
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def fingerprint(paths: list[Path]) -> str:
    """SHA-256 of names, sizes and footers of parquet files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            (length,) = struct.unpack("<I4x", file.read(8))
            file.seek(max(0, size - 8 - length))
            digest.update(f"{path.name}\0{size}\0".encode() + file.read())
    return digest.hexdigest()
