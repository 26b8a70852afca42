"""What the suite of robustness found of recorded runs, as columns of the table of a setting."""

from typing import Any, NamedTuple

from mixup_recipes.runs.robustness_file import Keys, at
from mixup_recipes.words import over_seeds

Seeds = dict[str, dict[str, Any]]
"""The seeds of a record by number."""


class Column(NamedTuple):
    """A column: its head, its number in ``robustness`` of a seed, whether that is an error, and what it is in words."""

    head: str
    keys: Keys
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


def alike(column: Column, found: dict[str, Seeds]) -> bool:
    """Whether a column was measured on the same images, prepared alike, with the same budget, where it was."""
    part = column.keys[0]
    kinds = [
        [[run["data"].get(key) for key in ("images", "labels_sha256", "fingerprint")], run.get("transform"),
         run.get("mixed_precision"), run["budgets"].get(part)]
        for run in measured(found) if part in run
    ]  # fmt: skip
    return all(kind == kinds[0] for kind in kinds)


def there(found: dict[str, Seeds]) -> list[Column]:
    """The columns that have a number."""
    return [column for column in COLUMNS if any(cell(seeds, column) != "-" for seeds in found.values())]


def columns(found: dict[str, Seeds]) -> list[Column]:
    """The columns that a table of these seeds has: those with a number, unless it was not measured alike for all."""
    return [column for column in there(found) if alike(column, found)]


def cell(seeds: Seeds, column: Column) -> str:
    """Mean and spread of top-1 over the seeds that it was measured for; "-" without any."""
    found = [at(seed.get("robustness"), column.keys) for seed in seeds.values()]
    values = [100 - value if column.error else value for value in found if value is not None]
    return over_seeds(values) if values else "-"


def note(found: dict[str, Seeds]) -> str:
    """What the columns are, in sentences, each with a space in front; empty without any."""
    shown, text = columns(found), ""
    if apart := [column.head for column in there(found) if column not in shown]:
        text = f" Not measured alike for all runs, and so left out: {', '.join(apart)}."
    if not shown:
        return text
    counts = {
        sum(shown[0].keys[0] in seed.get("robustness", {}) for seed in seeds.values()) for seeds in found.values()
    }
    runs = f"at most {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
    meanings = "; ".join(f'"{column.head}": {column.words}' for column in shown)
    images = next(run["data"]["images"] for run in measured(found) if shown[0].keys[0] in run)
    return f" Robustness is top-1 of {runs} of the seeds of each mixer, on {images} images ({meanings}).{text}"
