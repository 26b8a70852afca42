"""The published cells as objects: what was published, under which protocol, and what it takes to run it here.

``published.csv`` holds the 329 cells of OpenMixup's "Mixup ImageNet Benchmarks" and its Tiny-ImageNet table at commit
1fb74ee (2023-08-16), table by table and row by row. ``source`` is the mark of the published tables: ``own`` none,
``arxiv`` (*) a method known from an arXiv pre-print and trained by OpenMixup, ``official`` (a book) made by the
method's official code. OpenMixup trained no official row: Co-Mixup, SuperMix, Grafting, AlignMix and TokenMix.
``upstream_config``: ``yes``, a config or what OpenMixup's generator script writes from one; ``base``, only a base
config whose mixer has to be edited (the RSB rows); ``no``. ``first_seen`` is when the number entered OpenMixup's git.
``hours.csv`` holds GPU hours per run on one H200, all estimates, and what each mixer multiplies them by.

Nothing here imports torch until a recipe is resolved, so that listing is instant.
"""

import csv
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import recipes
from recipes import Recipe, UserError
from recipes.typed import nearest

FOLDER = Path(__file__).parent
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
        top1 = float(row["top1"]) if row["top1"] else None
        trained = {"yes": True, "no": False}[row["trained_upstream"]]
        name = f"{row['setting']}_{row['mixer']}"
        assert name not in found, name
        found[name] = Cell(**row | {"name": name, "top1": top1, "trained_upstream": trained})
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


def published(runs: list[Path]) -> dict[str, float]:
    """Mixer -> published top-1 for the setting that the run folders belong to.

    Raises ``UserError`` if it has none, or for runs that changed the published recipe.
    """
    from .records import overrides
    from .report import load_run

    if not runs:
        raise UserError("no run folders given")
    for run in runs:
        recipe = load_run(run)[0]
        pairs = overrides(recipe)
        if pairs is None:
            raise UserError(f"{run} is no run of a published recipe: {recipe.name!r} is none; leave out --published")
        if pairs:
            changed = ", ".join(f"{k} {b} instead of {a}" for k, (a, b) in pairs.items())
            raise UserError(f"{run} is no run of a published recipe: {changed}; leave out --published")
    setting, _ = recipes.split_name(load_run(runs[0])[0].name)
    return {c.mixer: c.top1 for c in select(setting=setting, numbered=True) if c.top1 is not None}


def hours(cell: Cell) -> tuple[float, float, float]:
    """Estimated hours of one run on one H200: low, middle, high. Nothing of it was measured."""
    table = {(r["kind"], r["name"]): tuple(float(r[k]) for k in ("low", "mid", "high")) for r in rows("hours.csv")}
    factors = table.get(("mixer", cell.mixer)) or table["mixer", "other"]
    low, mid, high = (h * f for h, f in zip(table["setting", cell.setting], factors, strict=True))
    return low, mid, high


def resolve(name: str) -> tuple[Recipe, dict[str, str]]:
    """The recipe of a cell, of any other recipe name, or of a recipe file, and the origin of its values.

    Raises ``UserError``, for an unknown name with the nearest cell.
    """
    if name not in cells() and not name.endswith((".yaml", ".yml")) and "/" not in name:
        try:
            return recipes.resolve(name)
        except UserError:
            raise UserError(f"unknown cell or recipe {name!r}; {nearest(name, cells())}") from None
    return recipes.resolve(name)


def protocol(recipe: Recipe) -> str:
    """How the published number of a recipe was taken, in words."""
    text = "best epoch" if recipe.protocol == "best" else f"median of the last {recipe.protocol_epochs} epochs"
    text += f", mean of {recipe.trials} trials" if recipe.trials > 1 else ""
    return text + (", averaged weights (EMA)" if recipe.report_ema else "")


def number(cell: Cell) -> str:
    """The published number as it is shown: ``80.94†``, or a dash."""
    return "-" if cell.top1 is None else f"{cell.top1:.2f}{MARKS[cell.source]}"


def describe(cell: Cell, record: dict[str, Any] | None = None) -> str:
    """All that is known about a cell, for ``cells show``; ``record`` is our own (see ``records``)."""

    from .records import status

    recipe, origin = resolve(cell.name)
    plain, _ = recipes.resolve(f"{cell.setting}_vanilla")
    changed = recipes.differences(plain, recipe, ignore=("name", "mixer", "mixer_args"))
    args = recipe.mixer_args.get(cell.mixer, {})
    own = [f"{k} {v} ({origin[f'mixer_args.{cell.mixer}.{k}']})" for k, v in args.items()]
    low, mid, high = hours(cell)
    seeds = ", ".join(map(str, range(recipe.trials)))
    seen = f"first seen {cell.first_seen}" if cell.first_seen else ""
    if cell.first_seen > NEW_INIT:
        seen += ", after OpenMixup changed its initialisation"
    published = "no number" if cell.top1 is None else f"{number(cell)} top-1"
    published += f", alpha {cell.alpha} as printed" if cell.alpha else ""
    lines = [
        ("cell", f"{cell.name}: {cell.method} on {cell.backbone}, benchmark {cell.benchmark}"),
        ("published", published),
        ("", MEANING[cell.source] if cell.top1 is not None else ""),
        ("", seen),
        ("source", SOURCE),
        ("protocol", protocol(recipe)),
        ("config", f"upstream: {UPSTREAM[cell.upstream_config]}"),
        ("run", f"accelerate launch train_mixup.py --recipe {cell.name}"),
        ("", f"once with each --seed {seeds}" if recipe.trials > 1 else ""),
        ("hours", f"{mid:.1f} on one H200 ({low:.1f} to {high:.1f}), an estimate, not measured"),
        ("mixer", "; ".join(own)),
        *(("deviation", f"{k} {b}, in {cell.setting} otherwise {a}") for k, (a, b) in changed.items()),
        ("status", ": ".join(status(cell, record))),
        *(("note", text) for text in cell.note.split("; ")),
    ]
    return "\n".join(f"{key:10} {text}" for key, text in lines if text)


def listing(chosen: list[Cell], found: dict[str, dict[str, Any]]) -> str:
    """One line per cell: name, published number with its mark, status; ``found``: our records by name."""
    from .records import status

    lines = [f"{c.name:26} {number(c):>7}  {': '.join(status(c, found.get(c.name)))}" for c in chosen]
    numbered = sum(c.top1 is not None for c in chosen)
    marks = "; ".join(f"{mark} {MEANING[source]}" for source, mark in MARKS.items() if mark)
    return "\n".join([*lines, f"{len(lines)} cells, {numbered} with a published number. {marks}."])


def compare(first: str, second: str) -> str:
    """What differs between two cells or recipes: recipe fields, mixer arguments, published numbers."""
    (a, _), (b, _) = resolve(first), resolve(second)
    pairs = recipes.differences(a, b, ignore=("name", "mixer_args"))
    left, right = (r.mixer_args.get(r.mixer, {}) for r in (a, b))
    for key in dict.fromkeys([*left, *right]):
        if left.get(key) != right.get(key):
            pairs[f"mixer.{key}"] = (left.get(key, "-"), right.get(key, "-"))
    published = tuple(number(cells()[n]) if n in cells() else "no published cell" for n in (first, second))
    lines = [("", first, second), *((k, *v) for k, v in pairs.items()), ("published top-1", *published)]
    tops = [cells()[n].top1 for n in (first, second) if n in cells()]
    if len(tops) == 2 and None not in tops:
        lines.append(("difference", "", f"{tops[1] - tops[0]:+.2f}"))
    return "\n".join(f"{key:32} {x!s:36} {y}".rstrip() for key, x, y in lines)
