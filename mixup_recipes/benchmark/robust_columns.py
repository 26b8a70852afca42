"""What the suite of robustness found of recorded runs, as columns of the table of a setting."""

import statistics
from typing import Any, NamedTuple

Seeds = dict[str, dict[str, Any]]
"""The seeds of a record by number."""


class Column(NamedTuple):
    """A column: its head, its number in ``robustness`` of a seed, whether that is an error, and what it is in words."""

    head: str
    keys: tuple[str, ...]
    error: bool
    words: str


COLUMNS = (
    Column("corrupted", ("corruptions", "mean"), True, "on corrupted images, over 15 corruptions of 5 severities"),
    Column("occluded", ("occlusion", "auc"), False, "over shares from 0 to 90 % of the image that are hidden"),
    Column("FGSM", ("attacks", "fgsm", "1"), False, "under FGSM with 1 level of 255"),
)


def measured(found: dict[str, Seeds]) -> list[dict[str, Any]]:
    """What the suite found of every seed of a table that it was run on."""
    return [seed["robustness"] for seeds in found.values() for seed in seeds.values() if "robustness" in seed]


def alike(found: dict[str, Seeds]) -> bool:
    """Whether all was measured on the same images, prepared alike, with the same budgets."""
    runs: list[dict[str, Any]] = measured(found)
    budgets: dict[str, Any] = {}
    kinds = [[run["data"], run.get("transform"), run.get("mixed_precision")] for run in runs]
    same = all(budgets.setdefault(part, budget) == budget for run in runs for part, budget in run["budgets"].items())
    return same and all(kind == kinds[0] for kind in kinds)


def columns(found: dict[str, Seeds]) -> list[Column]:
    """The columns that a table of these seeds has: none where the suite was not run, or not on all alike."""
    there = measured(found) if alike(found) else []
    return [column for column in COLUMNS if any(column.keys[0] in one for one in there)]


def cell(seeds: Seeds, column: Column) -> str:
    """Mean and spread of top-1 over the seeds that it was measured for; "-" without any."""
    values = []
    for seed in seeds.values():
        value: Any = seed.get("robustness", {})
        for key in column.keys:
            value = value.get(key, {}) if isinstance(value, dict) else {}
        if isinstance(value, int | float):
            values.append(100 - value if column.error else float(value))
    if not values:
        return "-"
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def note(found: dict[str, Seeds]) -> str:
    """What the columns are, in sentences, with a space in front; empty without any."""
    if not alike(found):
        return " Robustness was not measured alike for all runs, so it is left out."
    if not (shown := columns(found)):
        return ""
    counts = {sum("robustness" in seed for seed in seeds.values()) for seeds in found.values()}
    runs = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    meanings = "; ".join(f'"{column.head}": {column.words}' for column in shown)
    images = measured(found)[0]["data"]["images"]
    return f" Robustness is top-1 of {runs} runs of each mixer on {images} images ({meanings})."
