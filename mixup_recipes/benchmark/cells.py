"""The published cells as objects: what was published, under which protocol, and what it takes to run it here.

``published.csv`` holds the 329 cells of OpenMixup's "Mixup ImageNet Benchmarks" and its Tiny-ImageNet table at commit
1fb74ee (2023-08-16), table by table and row by row. ``source`` is the mark of the published tables: ``own`` none,
``arxiv`` (*) a method known from an arXiv pre-print and trained by OpenMixup, ``official`` (a book) made by the
method's official code. OpenMixup trained no official row: Co-Mixup, SuperMix, Grafting, AlignMix and TokenMix.
``upstream_config``: ``yes``, a config or what OpenMixup's generator script writes from one; ``base``, only a base
config whose mixer has to be edited (the RSB rows); ``no``. ``first_seen`` is when the number entered OpenMixup's git.
``hours.csv`` holds GPU hours per run on one H200, all estimates, and what each mixer multiplies them by.

Nothing here needs torch, so that listing is instant.
"""

import csv
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

from mixup_recipes.files import shipped
from mixup_recipes.typed import UserError, nearest

FOLDER = shipped("model_cards")
SOURCE = "OpenMixup, Mixup ImageNet benchmarks and Tiny-ImageNet table, commit 1fb74ee (2023-08-16)"
MARKS = {"own": "", "arxiv": "†", "official": "‡"}
MEANING = {
    "own": "trained by OpenMixup",
    "arxiv": "method known from an arXiv pre-print, trained by OpenMixup",
    "official": "result of the method's official code, not trained by OpenMixup",
}
UPSTREAM = {"yes": "yes", "base": "only a base config, whose mixer has to be edited", "no": "none"}
NEW_INIT = "2022-12-25"
"""After this day OpenMixup's code starts ResNets and position embeddings otherwise; 21 numbers are younger."""


class Cell(NamedTuple):
    """One cell of a published table. ``top1`` in percent, None where the table has no number; ``alpha`` as printed."""

    name: str
    benchmark: str
    setting: str
    backbone: str
    method: str
    mixer: str
    alpha: str
    top1: float | None
    source: str
    trained_upstream: bool
    first_seen: str
    upstream_config: str
    note: str


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a table that comes with this package."""
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def cells() -> dict[str, Cell]:
    """All published cells by name, ``<setting>_<mixer>``, in the order of the published tables."""
    found: dict[str, Cell] = {}
    for row in rows("published.csv"):
        name = f"{row['setting']}_{row['mixer']}"
        assert name not in found, name
        typed: dict[str, Any] = {"top1": float(row["top1"]) if row["top1"] else None}
        typed["trained_upstream"] = {"yes": True, "no": False}[row["trained_upstream"]]
        found[name] = Cell(**row | {"name": name} | typed)
    return found


def find(name: str) -> Cell:
    """The cell of this name. Raises ``UserError`` with the nearest name."""
    if name not in cells():
        raise UserError(f"unknown cell {name!r}; {nearest(name, cells())}")
    return cells()[name]


def select(numbered: bool | None = None, **wanted: Any) -> list[Cell]:
    """The cells whose fields have the given values, in the order of the tables; None selects everything.

    ``numbered``: only cells with (or without) a published number. ``select(setting="deit_s", source="arxiv")``.
    Raises ``UserError`` for a value that no cell has.
    """
    chosen: Iterable[Cell] = cells().values()
    if numbered is not None:
        chosen = [c for c in chosen if (c.top1 is not None) == numbered]
    for field, value in wanted.items():
        if value is None:
            continue
        values = list(dict.fromkeys(getattr(c, field) for c in cells().values()))
        if value not in values:
            raise UserError(f"no published cell has {field} {value!r}; {nearest(str(value), map(str, values))}")
        chosen = [c for c in chosen if getattr(c, field) == value]
    return list(chosen)


def hours(cell: Cell) -> tuple[float, float, float]:
    """Estimated hours of one run on one H200: low, middle, high. Nothing of it was measured."""
    table = {(r["kind"], r["name"]): tuple(float(r[k]) for k in ("low", "mid", "high")) for r in rows("hours.csv")}
    factors = table.get(("mixer", cell.mixer)) or table["mixer", "other"]
    low, mid, high = (h * f for h, f in zip(table["setting", cell.setting], factors, strict=True))
    return low, mid, high


def number(cell: Cell) -> str:
    """The published number as it is shown: ``80.94†``, or a dash."""
    return "-" if cell.top1 is None else f"{cell.top1:.2f}{MARKS[cell.source]}"
