"""Where a published cell stands: what our runs say about its number."""

from pathlib import Path
from typing import Any

from mixup_recipes.benchmark.cells import Cell, cells, trials
from mixup_recipes.runs.noise import Verdict, verdict
from mixup_recipes.runs.records import all_records, excluded, finished_top1, in_short
from mixup_recipes.typed import UserError


def status(cell: Cell, content: dict[str, Any] | None) -> tuple[str, str]:
    """Where a cell stands, and why, in words.

    ``published`` (a number, no run that counts), ``not run`` (neither), ``run`` (runs, but nothing to compare with),
    ``too early to say``, ``reproduced within the band``, ``off``. Only the seeds that ran to the end without overrides
    count. A published number that OpenMixup did not train is said to be one. Where its source states no protocol, it
    counts as one run.
    """
    foreign = "" if cell.trained_upstream or cell.top1 is None else "; OpenMixup did not train the published number"
    foreign += "" if cell.stated or cell.top1 is None else ", and its source states no protocol"
    none = ("not run", "no published number") if cell.top1 is None else ("published", cell.obstacle or "not run here")
    if content is None:
        return none[0], none[1] + foreign
    if content["recipe"] != cell.name:
        raise UserError(f"a record of {content['recipe']} cannot be used for the cell {cell.name}")
    if why := excluded(content):
        return none[0], f"{none[1]}; {why}{foreign}"
    values = finished_top1(content)
    if not values:
        progress = ", ".join(
            f"seed {k} at epoch {s['epochs']} of {s['epochs_planned']}" for k, s in content["seeds"].items()
        )
        return "too early to say", f"no run has finished: {progress}{foreign}"
    if cell.top1 is None:
        return "run", f"{in_short(content)}, no published number to compare with"
    judged = judged_by(cell, content, cell.top1, values)
    text = f"{in_short(content)}, {judged.difference:+.2f} from {cell.top1:.2f}, band ±{judged.band:.2f}"
    return judged.status, text + foreign


def judged_by(cell: Cell, content: dict[str, Any], published: float, values: list[float]) -> Verdict:
    """The top-1 of finished runs of a cell's record against its published number, all in percent."""
    return verdict(values, published, trials(cell, content["fields"]["trials"]), content["images"])


def of_cells(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The records that speak for a published cell, by the cell's name."""
    return {name: content for name, content in all_records(folder).items() if name in cells()}
