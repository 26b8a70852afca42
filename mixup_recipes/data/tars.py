"""Tars of samples in a folder, as WebDataset lays them out: ``key.jpg`` beside ``key.cls`` or ``key.json``.

- The members of a sample have one name up to the first dot, and stand together. Its image is a member of ``PICTURES``
  or the one that ``image_column`` names; its label is ``cls``, a whole number in digits, or what ``json`` says of
  ``label_column``, see ``labels``, or the text of the member that ``label_column`` names. Words become classes.
- Which tars are a split is told as for parquet files, where ``train-0000.tar`` is a shard too. Where none is called
  like a split, all of them are one, which a note says; names that say more than one split are refused.
- The headers are read first, then the images from the places that they say: no member gets a name on the disk. What is
  no regular file, and a sample without an image or a label, is left out and counted. A tar that is damaged and a sample
  that is there twice are refused.
"""

import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from mixup_recipes.data import parquet
from mixup_recipes.data.decoding import LARGEST_FILE
from mixup_recipes.data.folder import SPLITS, encodable, has_images, is_litter
from mixup_recipes.data.holdout import wanted
from mixup_recipes.data.identity import some
from mixup_recipes.data.labels import label, whole_number
from mixup_recipes.data.multi_label import BETWEEN
from mixup_recipes.data.origin import Opened, note_files
from mixup_recipes.data.repository import SMALL, announce_copy
from mixup_recipes.data.samples import LONGEST, PICTURES
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, nearest

SHARD = re.compile(r"(?P<split>.+?)[-_]\d+(-of-\d+)?")
MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # kinds of headers that say more of the member behind them
LARGEST_HEADER = 2**14
BLOCK = 2**20  # bytes behind the end of a tar that are looked at at once


class Member(NamedTuple):
    """Where a file of a tar is: its bytes are ``size`` ones from ``offset`` on."""

    name: str
    offset: int
    size: int


class Row(NamedTuple):
    """The image and the label of a sample; ``tar`` is the number of its tar."""

    tar: int
    image: Member
    label: str | int | list[str]


def open_tars(recipe: Recipe, folder: Path, split: str, tables: bool) -> Opened | None:
    """A split of a folder of tars; None for a folder without any, or with images by classes. Raises ``UserError``.

    ``tables``: whether the folder has parquet files.
    """
    if has_images(folder):
        return None
    found = sorted(parquet.tables(folder, (".tar",)))
    packed = [] if tables else sorted(path for path in parquet.tables(folder, PACKED) if is_packed(path))
    if packed:  # also beside others, of whose split it may be a shard
        raise UserError(f"{packed[0]} is compressed, and its images cannot be reached one by one; unpack it to .tar")
    if not found:
        return None
    if tables:
        raise UserError(
            f"{folder} holds parquet files and tars, such as {found[0].name}; leave files of one kind there"
        )
    own = (recipe.train_split, recipe.eval_split)
    splits = parquet.divided(folder, found, recipe.dataset_config, own, SHARD)
    said: list[str] = []
    if not (SPLITS | {*own}) & {*splits}:
        splits, said = one_split(folder, splits, own)
    files = parquet.taken(folder, split, splits, found, own, wanted(recipe))
    rows, notes = scan(files.paths, recipe)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.image.name}\0{row.image.size}\0{row.label}\n".encode(errors="replace"))
    table = add_labels(images(files.paths, rows, recipe.image_column), [row.label for row in rows], recipe)
    note_files(table, [str(path.absolute()) for path in files.paths], str(folder.absolute()))
    return Opened(table, digest.hexdigest(), said + files.notes + notes, whole=files.whole)


def is_packed(path: Path) -> bool:
    """Whether a file is called like a tar that is compressed."""
    return path.suffix.lower() == ".tgz" or path.stem.lower().endswith(".tar")


def one_split(
    folder: Path, splits: dict[str, list[Path]], own: tuple[str, str]
) -> tuple[dict[str, list[Path]], list[str]]:
    """All tars, of which none is called like a split, as the split to train on, and a note of which they are.

    Raises ``UserError`` for a split of the user's own that is not there, and where a name says more than that it is of
    training: ``in1k-train``, ``val2017``, or ``train2017`` beside others.
    """
    for name in own:
        if name not in SPLITS:
            raise UserError(f"{folder} has no split {name!r}; {nearest(name, splits)}")
    words = {name: SPLITS & {*re.findall("[a-z]+", name.casefold())} for name in splits}
    alone = len(splits) == 1 and not any(SPLITS & {*re.split("[-_.]", name)} for name in splits)
    if any(words.values()) and not (alone and {"train"} in words.values()):
        more = min((name for name in splits if words[name]), key=lambda name: ("train" not in words[name], name))
        raise UserError(
            f"{folder} has tars called {some(sorted(splits))}; name those to train and to evaluate on: "
            f"--train_split {more} --eval_split ..."
        )
    series = [[paths[0].name] + [f"to {paths[-1].name}"] * (len(paths) > 1) for _, paths in sorted(splits.items())]
    note = f"all tars are one split, {own[0]}: {some([' '.join(names) for names in series])}"
    return {own[0]: sorted(path for paths in splits.values() for path in paths)}, [note]


def scan(paths: list[Path], recipe: Recipe) -> tuple[list[Row], list[str]]:
    """The images and labels of tars, in order, and what was left out. Raises ``UserError`` where there are none."""
    rows: list[Row] = []
    left_out: dict[str, list[str]] = {}
    suffixes: set[str] = set()
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            for key, members in samples(path, file, left_out):
                suffixes |= {*members}
                image, label = image_of(members, path, key, recipe), label_of(members, file, path, key, recipe)
                if image is None or label is None:
                    left_out.setdefault(f"samples without {'an image' if image is None else 'a label'}", []).append(key)
                elif image.size > LARGEST_FILE:
                    left_out.setdefault(f"images of more than {LARGEST_FILE:,} bytes", []).append(image.name)
                else:
                    rows.append(Row(number, image, label))
    if not rows:
        raise UserError(
            f"{paths[0]}: no sample has an image and a label; samples have {some(sorted(suffixes)) or 'no members'} "
            "(set image_column or label_column)"
        )
    return rows, [f"{len(names):,} left out ({why}): {some(names)}" for why, names in sorted(left_out.items())]


def samples(path: Path, file: BinaryIO, left_out: dict[str, list[str]]) -> Iterator[tuple[str, dict[str, Member]]]:
    """The key of each sample of a tar with its members by suffix. Raises ``UserError`` for a tar that is damaged."""
    seen: set[str] = set()
    for key, found in itertools.groupby(members_of(path, file, left_out), lambda pair: pair[0][0]):
        members: dict[str, Member] = {}
        for (_, suffix), member in found:
            if suffix in members:
                raise UserError(f"{path}: the sample {key!a} has two members .{suffix}; expected one")
            members[suffix] = member
        if key in seen:
            raise UserError(f"{path}: the sample {key!a} is there twice; the members of one must stand together")
        seen.add(key)
        yield key, members


def members_of(path: Path, file: BinaryIO, left_out: dict[str, list[str]]) -> Iterator[tuple[tuple[str, str], Member]]:
    """The key and suffix of each file of a tar, and where it is."""
    try:
        size = path.stat().st_size
        check_header(file, 0)
        file.seek(0)
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  the file is closed by who opened it
        while check_header(file, tar.offset) and (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # kept by tarfile: millions would take gigabytes
            if tar.offset <= info.offset:
                raise tarfile.ReadError(f"{info.name!a} says that it ends before it begins")
            regular = info.isreg() and not info.issparse()
            if info.size < 0 or (regular and info.size > size - info.offset_data):
                raise tarfile.ReadError(f"{info.name!a} says that it has {info.size:,} bytes, which are not there")
            name = MEMBER.fullmatch(info.name)
            last = info.name.rsplit("/", 1)[-1]
            if info.isdir() or is_litter(last):
                continue
            if last.startswith((".", "__")):
                left_out.setdefault("names that begin with . or __", []).append(info.name)
            elif not encodable(info.name):
                left_out.setdefault("names that are not UTF-8", []).append(ascii(info.name))
            elif not regular:
                left_out.setdefault("not a regular file", []).append(info.name)
            elif name is None:
                left_out.setdefault("members without a suffix", []).append(info.name)
            else:
                yield (name[1], name[2].lower()), Member(info.name, info.offset_data, info.size)
        file.seek(tar.offset)  # tarfile takes for an end what is no header
        end = file.read(BLOCK)
        if not end:
            raise tarfile.ReadError("its end is missing")
        while end:
            if end.strip(b"\0"):
                raise tarfile.ReadError(f"expected a header at byte {tar.offset:,}, found other data")
            end = file.read(BLOCK)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise UserError(f"{path} is not a whole tar: {reason}; write it or copy it again") from None


def check_header(file: BinaryIO, offset: int) -> bool:
    """Raise ``tarfile.ReadError`` for headers of a member that are large themselves: reading them would take hours."""
    file.seek(offset)
    while (block := file.read(tarfile.BLOCKSIZE))[156:157] in EXTENDED and len(block) == tarfile.BLOCKSIZE:
        size = int(block[124:135].strip(b" \0") or b"0", 8)
        if size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes, more than {LARGEST_HEADER:,}")
        file.seek(-size % tarfile.BLOCKSIZE + size, 1)
    return True


def image_of(members: dict[str, Member], path: Path, key: str, recipe: Recipe) -> Member | None:
    """The image of a sample. Raises ``UserError`` where there are two."""
    column = recipe.image_column
    usual = PICTURES if column == Recipe.image_column and column not in members else (column,)
    found = [name for name in usual if name in members]
    if len(found) > 1:
        raise UserError(f"{path}: the sample {key!a} has images {', '.join(found)}; choose one by --image_column")
    return members[found[0]] if found else None


def label_of(
    members: dict[str, Member], file: BinaryIO, path: Path, key: str, recipe: Recipe
) -> str | int | list[str] | None:
    """The label of a sample, with ``multi_label`` all of them; None for one that has none.

    Raises ``UserError`` for one that is none.
    """
    column = recipe.label_column
    field = "cls" if column == Recipe.label_column and column not in members and "cls" in members else column
    field = field if field in members or "json" not in members else "json"
    if field not in members:
        return None
    try:
        text = content(members[field], file, LONGEST).decode()
        value: Any = whole_number(text) if field == "cls" else text.strip()
        if field == "json":
            document = json.loads(text)
            value = document.get(column)
            if column not in document:
                return None
        several = recipe.multi_label and isinstance(value, str | list)
        parts = [value] if not several else value.split(BETWEEN) if isinstance(value, str) else value
        values = [label(part) for part in parts]
        if values == [None] and not recipe.multi_label:
            return None
        if None in values:
            raise ValueError("expected words or whole numbers, got a null; a sample without labels needs an empty list")
    except (ValueError, AttributeError, RecursionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path}: the label of the sample {key!a}, its {field}, cannot be read: {reason}") from None
    if recipe.multi_label:
        return [str(part) for part in values]
    return values[0] if values != [""] else None


def content(member: Member, file: BinaryIO, most: int) -> bytes:
    """The bytes of a member. Raises ``ValueError`` for more than ``most``."""
    if member.size > most:
        raise ValueError(f"{member.size:,} bytes, more than {most:,}")
    file.seek(member.offset)
    return file.read(member.size)


def images(paths: list[Path], rows: list[Row], column: str) -> datasets.Dataset:
    """The images as a table of one column, in memory or, of large tars, in a copy that ``datasets`` keeps."""
    features = datasets.Features({column: datasets.Image()})
    given: dict[str, Any] = {
        "column": column,
        "paths": tuple(str(path.absolute()) for path in paths),
        "names": tuple(row.image.name for row in rows),
        "places": np.array([(row.tar, row.image.offset, row.image.size) for row in rows], np.int64),
    }
    size = sum(row.image.size for row in rows)
    if size > SMALL:
        announce_copy(size, "generator")
        times = tuple(path.stat().st_mtime_ns for path in paths)  # so that a tar that was changed is copied again
        return datasets.Dataset.from_generator(pictures, features=features, gen_kwargs=given | {"_times": times})
    schema, found, parts = features.arrow_schema, pictures(**given), []
    while part := list(itertools.islice(found, parquet.BATCH)):
        parts.append(pa.RecordBatch.from_pylist(part, schema))
    return datasets.Dataset(pa.Table.from_batches(parts, schema))


def pictures(
    column: str, paths: tuple[str, ...], names: tuple[str, ...], places: np.ndarray, _times: Any = None
) -> Iterator[dict[str, Any]]:
    """A row for each image; ``places``: number of the tar, offset and size of each."""
    rows: Iterable[tuple[str, list[int]]] = zip(names, places.tolist(), strict=True)
    for tar, found in itertools.groupby(rows, lambda row: row[1][0]):
        with open(paths[tar], "rb") as file:
            for name, (_, offset, size) in found:
                yield {column: {"bytes": content(Member(name, offset, size), file, size), "path": name}}


def add_labels(table: datasets.Dataset, labels: list[str | int | list[str]], recipe: Recipe) -> datasets.Dataset:
    """A table with the column of labels: whole numbers where all of them are, else words, or lists of words."""
    if recipe.multi_label:
        return table.add_column(recipe.label_column, labels, feature=datasets.List(datasets.Value("string")))
    if all(isinstance(label, int) for label in labels):
        return table.add_column(recipe.label_column, np.array(labels, np.int64))
    return table.add_column(recipe.label_column, [str(label) for label in labels], feature=datasets.Value("string"))
