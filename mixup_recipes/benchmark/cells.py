"""The published cells as objects: what was published, under which protocol, and what it takes to run it here.

``published.csv`` holds a row for each cell of a published table, table by table and row by row: OpenMixup's, and what
two other lists say of the same settings. ``page`` says which page it was read from (``pages.csv``), ``benchmark`` which
table it belongs to (``benchmarks.csv``, in the order in which they are shown). ``source`` is the mark of the tables:
``own`` none, ``arxiv`` (*) a method known from an arXiv pre-print and trained by OpenMixup, ``official`` (a book) made
by the method's official code. OpenMixup trained no official row.
``upstream_config``: ``yes``, a public config or what a public generator script writes from one; ``base``, only a base
config that has to be edited; ``no``. ``first_seen`` is when the number entered OpenMixup's git, of another page the day
of the commit that was read. ``published_gb`` and ``published_hours`` are what the page says of a whole training, on
hardware that it does not name. ``known.csv`` says what is known to be wrong with the numbers of a benchmark or a mixer.
``hours.csv`` holds GPU hours per run on one H200, all estimates, and what each mixer multiplies them by. What is taken
"by images" from another setting counts the evaluated images at a third of a trained one, and is at least 8 ms (6 to 12)
for each update: small batches of small images leave a GPU waiting.

Nothing here needs torch, so that listing is instant.
"""

import csv
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

from mixup_recipes.files import shipped
from mixup_recipes.typed import UserError, nearest

FOLDER = shipped("model_cards")
MARKS = {"own": "", "arxiv": "†", "official": "‡"}
MEANING = {
    "own": "trained by OpenMixup",
    "arxiv": "method known from an arXiv pre-print, trained by OpenMixup",
    "official": "result of the method's official code, not trained by OpenMixup",
}
UPSTREAM = {"yes": "public", "base": "only a base config is public, which has to be edited", "no": "none is public"}
NEW_INIT = "2022-12-25"
"""After this day OpenMixup's code starts ResNets and position embeddings otherwise."""
NOT_STATED = "not stated by its source"
"""The protocol of a number from a page that does not say how it was taken."""
CANNOT = "cannot run here"
"""What a note begins with that says why a cell is no command here."""


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
    page: str
    published_gb: str
    published_hours: str
    note: str

    @property
    def stated(self) -> bool:
        """Whether the page of the number says how it was taken; OpenMixup's pages do, for each table."""
        return pages()[self.page]["protocol"] != "not stated"

    @property
    def obstacle(self) -> str:
        """Why this cell's recipe cannot run here, in words; empty for a command."""
        return next((text for text in self.note.split("; ") if text.startswith(CANNOT)), "")


@functools.cache
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


def titles() -> dict[str, str]:
    """The benchmarks, each with its title, in their order."""
    return {row["benchmark"]: row["title"] for row in rows("benchmarks.csv")}


def pages() -> dict[str, dict[str, str]]:
    """The rows of ``pages.csv`` by their page."""
    return {row["page"]: row for row in rows("pages.csv")}


def source(cell: Cell) -> str:
    """The page that a cell was read from, with its commit and day."""
    return pages()[cell.page]["source"]


def protocol(cell: Cell, rule: str) -> str:
    """How the published number was taken; ``rule``: the rule of its table, in words."""
    return rule if cell.stated else NOT_STATED


def trials(cell: Cell, planned: int) -> int:
    """Runs that the published number counts as: those of its table's protocol, and one where no protocol is stated."""
    return planned if cell.stated else 1


def known(cell: Cell) -> list[str]:
    """What is known to be wrong with a number, beside the cell's own note; ``trained``: whose runs it is true of."""
    if cell.top1 is None:
        return []
    trained = "upstream" if cell.trained_upstream else "official"
    fits = [r for r in rows("known.csv") if r["benchmark"] in ("", cell.benchmark) and r["mixer"] in ("", cell.mixer)]
    return [row["known"] for row in fits if row["trained"] == trained]


def hours(cell: Cell) -> tuple[float, float, float]:
    """Estimated hours of one run on one H200: low, middle, high. Nothing of it was measured."""
    table = {(r["kind"], r["name"]): tuple(float(r[k]) for k in ("low", "mid", "high")) for r in rows("hours.csv")}
    factors = table.get(("mixer", cell.mixer)) or table["mixer", "other"]
    low, mid, high = (h * f for h, f in zip(table["setting", cell.setting], factors, strict=True))
    return low, mid, high


def number(cell: Cell) -> str:
    """The published number as it is shown: ``80.94†``, or a dash."""
    return "-" if cell.top1 is None else f"{cell.top1:.2f}{MARKS[cell.source]}"
