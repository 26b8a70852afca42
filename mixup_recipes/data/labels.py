"""What may be a label: one rule for tables of every form, and for the documents of tars.

Words and whole numbers are labels, also one that is written as 3.0; false and true are the words ``false`` and
``true``. A word is taken without the spaces around it. Nothing else is a label: a date, a table, bytes and any other
number are refused, also a float so large that it may have been another whole number. What a CSV or TSV file says is
text, and so a word as it stands there.
"""

import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from mixup_recipes.data.folder import encodable
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

EXPECTED = "expected a word or a whole number"
LARGEST = 2**63
EXACT = 2.0**53  # from here on a float stands for several whole numbers
CLASS = re.compile(r"[0-9]+|-[1-9][0-9]*")


def label(value: Any) -> str | int | None:
    """A value as a label; None for a null and for nan. Raises ``ValueError`` for what is no label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if not encodable(value):
            raise ValueError(f"{value!a} is not text")
        return value.strip()
    if value is None or value != value:
        return None
    if isinstance(value, float) and abs(value) >= EXACT:
        raise ValueError(f"{EXPECTED}, but the float {value!r} may stand for several of them")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise ValueError(f"{EXPECTED}, got {str(value)[:60]}")
    if abs(value) >= LARGEST:
        raise ValueError(f"{EXPECTED} below 2 ** 63")
    return value


def checked(values: Iterable[Any], where: str) -> list[Any]:
    """The labels of a column, of lists too. Raises ``UserError`` that names the row and the value of what is none.

    ``where``: which column, for errors.
    """
    found = []
    for row, value in enumerate(values, 1):
        try:
            found.append([label(inner) for inner in value] if isinstance(value, list) else label(value))
        except ValueError as e:
            raise UserError(f"{where}, row {row}: {e}") from None
    return found


def is_whole(feature: Any) -> bool:
    """Whether a column is of whole numbers, those of named classes too."""
    return "int" in str(getattr(feature, "dtype", ""))


def are_whole(values: list[Any], dataset: str, column: str) -> bool:
    """Whether all labels of ``checked`` are whole numbers. Raises ``UserError`` where a row has none."""
    if missing := [row for row, value in enumerate(values, 1) if value in (None, "")]:
        rows = many(len(missing), "row has", "rows have")
        raise UserError(f"dataset {dataset!r}: {rows} no label in column {column!r}, the first is row {missing[0]}")
    return all(isinstance(value, int) for value in values)


def cells_of(column: pa.ChunkedArray, where: str) -> list[Any]:
    """The values of a column. Raises ``UserError`` for a type whose values Python lacks, such as dates far away."""
    try:
        return list(column.to_pylist())
    except (ArithmeticError, ValueError, pa.ArrowException) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{where}: {EXPECTED}, but the column holds {str(column.type)[:60]}: {reason}") from None


def text(cell: Any) -> Any:
    """A label as text, None for none. A list stays one, of its texts."""
    if isinstance(cell, list):
        return [text(inner) for inner in cell]
    return None if cell is None else str(cell)


def whole_number(text: str | bytes) -> int:
    """What ``cls`` says: digits, and no more than a line break behind them. Raises ``ValueError`` for anything else."""
    found = text.decode() if isinstance(text, bytes) else text
    digits = found.removesuffix("\n").removesuffix("\r")
    if not CLASS.fullmatch(digits):
        raise ValueError(f"expected a whole number in digits, got {digits[:60]!r}")
    return int(digits)
