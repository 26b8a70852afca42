"""What a JSON value must be: kinds, shapes of tables, and errors that name the file and the key."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mixup_recipes.typed import UserError


class Kind(NamedTuple):
    """What a JSON value must be."""

    words: str
    fits: Callable[[Any], bool]


COUNT = Kind("a positive integer", lambda v: type(v) is int and 0 < v < 2**53)
UPDATE = Kind("an integer, 0 or more", lambda v: type(v) is int and 0 <= v < 2**53)
NUMBER = Kind("a finite number", lambda v: type(v) in (int, float) and abs(v) < 1e300)  # compares false with nan
PERCENT = Kind("a number from 0 to 100", lambda v: type(v) in (int, float) and 0 <= v <= 100)
TEXT = Kind("text", lambda v: type(v) is str)
OBJECT = Kind("a table", lambda v: type(v) is dict)
SPLIT = {"images": COUNT, "labels_sha256": TEXT}
"""What a run says of the images of a split."""
METRICS = {"top1": PERCENT, "top5": PERCENT, "ece": PERCENT, "nll": NUMBER, "count": COUNT}
METRICS |= {"map": PERCENT, "f1": PERCENT, "f1_macro": PERCENT}
"""Of a validation line, each also with the name of a classifier or ``ema`` in front."""


def check(value: Any, shape: Any, where: str, key: str = "") -> None:
    """Raise ``UserError`` unless a JSON value is of a ``Kind``, or a table with the keys of ``shape``, each as there.

    ``where`` and ``key`` are for the error: the file, and the keys that lead to the value.
    """
    kind = OBJECT if isinstance(shape, dict) else shape
    if not kind.fits(value):
        raise UserError(f"{where}: {f'{key}: ' if key else ''}expected {kind.words}, got {value!r:.60}")
    for name, inner in shape.items() if isinstance(shape, dict) else ():
        path = f"{key}.{name}" if key else name
        if name not in value:
            raise UserError(f"{where}: {path} is missing")
        check(value[name], inner, where, path)


def check_validation(line: dict[str, Any], where: str) -> None:
    """Raise ``UserError`` for a validation line without an epoch, or with one or a metric that can't be."""
    kinds = {k: kind for k in line for n, kind in METRICS.items() if k == n or k.endswith(f"_{n}")}
    check(line, {"epoch": COUNT} | kinds, where)


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Errors of what is read from a run or file name it."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark. Raises ``UserError`` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def read_card(path: Path) -> str | None:
    """A model card to the letter, but for a byte order mark; None without a file. Raises ``UserError``."""
    try:
        return path.read_bytes().decode("utf-8-sig") if path.exists() else None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ``UserError`` when it is missing, damaged or something else."""
    return object_in(read_text(path), path)


def object_in(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in the text of a file. Raises ``UserError`` for anything else."""
    try:
        content: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON") from None
    check(content, OBJECT, str(path))
    return content
