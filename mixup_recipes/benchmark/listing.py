"""Published cells as text: one in full, many as a list, two side by side."""

from typing import Any

from mixup_recipes.benchmark.cells import (
    MARKS,
    MEANING,
    NEW_INIT,
    UPSTREAM,
    Cell,
    cells,
    hours,
    known,
    number,
    protocol,
    source,
)
from mixup_recipes.benchmark.verdicts import status
from mixup_recipes.recipe import differences
from mixup_recipes.resolve import resolve, shipped_recipe
from mixup_recipes.runs.records import published_recipe
from mixup_recipes.training.protocols import rule_in_words
from mixup_recipes.words import many


def describe(cell: Cell, record: dict[str, Any] | None = None) -> str:
    """All that is known about a cell, for ``cells show``; ``record`` is our own (``runs/records.py``)."""
    return "\n".join(f"{key:10} {text}" for key, text in known_lines(cell, record))


def known_lines(cell: Cell, record: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """What ``describe`` says, line by line: key and text. The key is empty where a line goes on from the one before."""
    recipe, origin = shipped_recipe(cell.name) or resolve(cell.name)  # the first is kept once it was read
    plain = published_recipe(f"{cell.setting}_vanilla")
    changed = differences(plain, recipe, ignore=("name", "mixer", "mixer_args"))
    args = recipe.mixer_args.get(cell.mixer, {})
    own = [f"{k} {v} ({origin[f'mixer_args.{cell.mixer}.{k}']})" for k, v in args.items()]
    low, mid, high = hours(cell)
    seeds = ", ".join(map(str, range(recipe.trials)))
    seen = f"first seen {cell.first_seen}" if cell.first_seen else ""
    if cell.first_seen > NEW_INIT and cell.trained_upstream:
        seen += ", after OpenMixup changed its initialisation"
    published = "no number" if cell.top1 is None else f"{number(cell)} top-1"
    published += f", alpha {cell.alpha} as printed" if cell.alpha else ""
    cost = [f"{cell.published_gb} GB"] * bool(cell.published_gb)
    cost += [f"{cell.published_hours} hours"] * bool(cell.published_hours)
    wrong = [*known(cell), *(text for text in cell.note.split("; ") if text != cell.obstacle)]
    lines = [
        ("cell", f"{cell.name}: {cell.method} on {cell.backbone}, benchmark {cell.benchmark}"),
        ("published", published),
        ("measured", MEANING[cell.source] if cell.top1 is not None else ""),
        ("", seen),
        ("source", source(cell)),
        ("protocol", protocol(cell, rule_in_words(recipe))),
        ("config", f"upstream: {UPSTREAM[cell.upstream_config]}"),
        ("cost", f"{', '.join(cost)} as published, on hardware that is not named" if cost else ""),
        ("run", cell.obstacle or f"accelerate launch train_mixup.py --recipe {cell.name}"),
        ("", f"once with each --seed {seeds}" if recipe.trials > 1 and not cell.obstacle else ""),
        ("hours", f"{brief(mid)} on one H200 ({brief(low)} to {brief(high)}), an estimate, not measured"),
        ("mixer", "; ".join(own)),
        *(("deviation", f"{k} is {b}, and {a} in the rest of {cell.setting}") for k, (a, b) in changed.items()),
        ("status", ": ".join(status(cell, record))),
        *(("known", text) for text in wrong),
    ]
    return [(key, text) for key, text in lines if text]


def brief(hours: float) -> str:
    """Hours to a tenth, and what is below one to a hundredth."""
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"


def listing(chosen: list[Cell], found: dict[str, dict[str, Any]]) -> str:
    """One line per cell: name, published number with its mark, status; ``found``: our records by name."""
    width = max([26, *(len(c.name) for c in chosen)])
    lines = [f"{c.name:{width}} {number(c):>7}  {': '.join(status(c, found.get(c.name)))}" for c in chosen]
    numbered = sum(c.top1 is not None for c in chosen)
    marks = "; ".join(f"{mark} {MEANING[source]}" for source, mark in MARKS.items() if mark)
    return "\n".join([*lines, f"{many(len(lines), 'cell')}, {numbered} with a published number. {marks}."])


def difference(first: str, second: str) -> str:
    """What differs between two cells or recipes: recipe fields, mixer arguments, published numbers."""
    (a, _), (b, _) = resolve(first), resolve(second)
    pairs = differences(a, b, ignore=("name", "mixer_args"))
    left, right = (r.mixer_args.get(r.mixer, {}) for r in (a, b))
    for key in dict.fromkeys([*left, *right]):
        if left.get(key) != right.get(key):
            pairs[f"mixer.{key}"] = (left.get(key, "-"), right.get(key, "-"))
    published = tuple(number(cells()[n]) if n in cells() else "no published cell" for n in (first, second))
    lines = [("", first, second), *((k, *v) for k, v in pairs.items()), ("published top-1", *published)]
    tops = [top1 for n in (first, second) if n in cells() and (top1 := cells()[n].top1) is not None]
    if len(tops) == 2:
        lines.append(("difference", "", f"{tops[1] - tops[0]:+.2f}"))
    return "\n".join(f"{key:32} {x!s:36} {y}".rstrip() for key, x, y in lines)
