"""A file of paths and labels as a table: CSV, TSV, JSON lines or parquet.

Paths are relative to the file's folder and stay inside it, links included. Labels, see ``labels``, become classes by
their text; with ``multi_label`` a cell is a list of them, or text in which ``|`` separates them. A column
``split`` is optional. What is left out is counted by its reason.
"""

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from mixup_recipes.data import labels as label_rule
from mixup_recipes.data import multi_label
from mixup_recipes.data.folder import SAME, SPLITS, Listing, check_name
from mixup_recipes.data.identity import some
from mixup_recipes.data.parquet import read_table
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
SPLIT = "split"
"""The optional column with the name of each row's split."""


def columns(path: Path, wanted: tuple[str, ...]) -> dict[str, list[Any]]:
    """Some columns of a file as text, those that are there; nulls are None, lists of labels are lists of texts.

    ``wanted``: the column of paths, that of labels, and others. Raises ``UserError``.
    """
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            parse = pa.csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",", newlines_in_values=True)
            with pa.csv.open_csv(path, parse_options=parse) as head:
                types = {name: pa.string() for name in head.schema.names if bare(name) in wanted}
            text = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
            table = pa.csv.read_csv(path, convert_options=text, parse_options=parse)
        elif kind == ".jsonl":
            table = read_lines(path, wanted)
        else:
            table = read_table(path)
            kind = table.schema.field(wanted[0]).type if wanted[0] in table.column_names else pa.string()
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(
                    f"column {wanted[0]!r} holds no paths; for a file that holds the images, pass its folder"
                )
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UserError(f"cannot read the table {path}: {' '.join(str(e).split())[:300]}") from None
    names = [bare(name) for name in table.column_names]
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}")
    table = table.rename_columns(names)
    for name in wanted[:2]:
        if name not in names:
            raise UserError(f"{path}: no column {name!r}; {nearest(name, names)} (set image_column or label_column)")
    said = {name: f"{path}: column {name!r}" for name in wanted}
    cells = {name: label_rule.cells_of(table[name], said[name]) for name in wanted if name in names}
    labels = label_rule.checked(cells.pop(wanted[1]), said[wanted[1]])
    texts = {name: [as_text(value) for value in found] for name, found in cells.items()}
    return texts | {wanted[1]: [label_rule.text(cell) for cell in labels]}


def read_lines(path: Path, wanted: tuple[str, ...]) -> pa.Table:
    """The rows of JSON lines, where text that looks like a date is text in the wanted columns."""
    table = pa.json.read_json(path)
    types = {field.name: str(field.type) for field in table.schema if bare(field.name) in wanted}
    dates = {name: kind for name, kind in types.items() if "timestamp" in kind and "struct" not in kind}
    if not dates:
        return table
    text = [(name, pa.list_(pa.string()) if kind.startswith("list") else pa.string()) for name, kind in dates.items()]
    return pa.json.read_json(path, parse_options=pa.json.ParseOptions(explicit_schema=pa.schema(text)))


def bare(name: str) -> str:
    """The name of a column without what an editor may put around it."""
    return name.lstrip("\ufeff").strip()


def as_text(value: Any) -> Any:
    """A cell as text, None for a null: 3.0 and 3 are the same number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or value != value else str(value).strip()


def listing(path: Path, split: str, recipe: Recipe) -> tuple[Listing, bool]:
    """The rows of a split, and whether the file says no split, so that they are all of the data.

    Raises ``UserError`` for a file without the columns or the split, without images, or with two labels for an image.
    """
    image, label = recipe.image_column, recipe.label_column
    found = columns(path, (image, label, SPLIT))
    if not recipe.multi_label and any(isinstance(cell, list) for cell in found[label]):
        raise UserError(f"{path}: column {label!r} holds lists: {multi_label.PASS}")
    if recipe.multi_label:
        multi_label.check_cells(found[label], f"{path}: column {label!r}")
    rows = list(range(len(found[image])))
    divided = SPLIT in found and any(found[SPLIT])
    if not divided:
        check_name(path, recipe.eval_split)
    notes = []
    if divided:
        names = sorted({name for name in found[SPLIT] if name})
        taken = next((s for s in (split, *SAME.get(split, ())) if s in names), None)
        own_name = recipe.eval_split not in SPLITS
        if taken is None and (own_name or not (split == recipe.eval_split and names == [recipe.train_split])):
            raise UserError(f"{path}: its column {SPLIT!r} has no {split!r}; {nearest(split, names)}")
        divided = names != [recipe.train_split]
        notes += [f"read from the rows of {taken}"] * (divided and taken != split)
        known = {*SAME.get(split, ()), *SAME.get(recipe.eval_split, ()), split, recipe.train_split, recipe.eval_split}
        others = [name for name in found[SPLIT] if name not in known]
        rows = [i for i in rows if found[SPLIT][i] == (taken or recipe.train_split)]
        if others:
            which = some(sorted({*map(str, others)}))
            notes.append(f"{many(len(others), 'row belongs', 'rows belong')} to no split that is read: {which}")
    paths, labels, digest = [], [], hashlib.sha256()
    left_out: dict[str, list[str]] = {}
    seen: dict[str, tuple[str, ...]] = {}
    root = os.path.realpath(path.parent)
    for i in rows:
        name, cell = found[image][i], found[label][i]
        if "\n" in f"{name}{cell}":
            raise UserError(f"{path}: row {i + 1} has a line break in its path or label; is a quote not closed?")
        words = multi_label.several(cell) if recipe.multi_label else (cell,) * bool(cell)
        word = multi_label.BETWEEN.join(words)
        whole = name and (words or recipe.multi_label)  # no label is an answer where there may be several
        where, why, size = row_file(root, name)
        if whole and {*seen.get(where, words)} != {*words}:
            before = multi_label.BETWEEN.join(seen[where])
            all_of_them = multi_label.BETWEEN.join(dict.fromkeys(seen[where] + words))
            one = f"; write them into one row, as {all_of_them}" * recipe.multi_label
            raise UserError(f"{path}: {name} is there with two labels, {before!r} and {word!r}{one}")
        if not whole or why or where in seen:
            why = why if whole else "rows without a path" + " or a label" * (not recipe.multi_label)
            said = name if whole else f"row {i + 1}"
            left_out.setdefault(why or "rows that are there twice", []).append(said)
            continue
        seen[where] = words
        digest.update(f"{name}\0{size}\0{word}\n".encode(errors="replace"))
        paths.append(where)
        labels.append(words)
    notes += [f"{len(names):,} left out ({why}): {some(names)}" for why, names in sorted(left_out.items())]
    if not paths:
        raise UserError(f"{path} names no image for split {split!r}" + (f"; {notes[-1]}" if left_out else ""))
    pairs, classes = multi_label.named(labels)
    kind: Any = datasets.ClassLabel(names=classes)
    codes: Any = pairs.place
    if recipe.multi_label:
        codes, kind = multi_label.column_of(pairs, len(labels), classes)
    features = datasets.Features({image: datasets.Value("large_string"), label: kind})
    table = datasets.Dataset(pa.table({image: paths, label: codes}, schema=features.arrow_schema))
    return Listing(table, digest.hexdigest(), notes), not divided


def row_file(root: str, name: str | None) -> tuple[str, str | None, int]:
    """The file that a row names, why it is not taken, and its size in bytes."""
    if not name:
        return "", None, 0
    where = os.path.join(root, name)
    try:
        where = os.path.realpath(where)
        if not where.startswith(root + os.sep):
            return where, "files outside of the table's folder", 0
        status = os.stat(where)
    except (OSError, ValueError):
        return where, "files that are not there", 0
    return where, None if stat.S_ISREG(status.st_mode) else "not a regular file", status.st_size
