"""From runs to run records: what is written to ``model_cards/results``."""

import contextlib
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixup_recipes.files import write_json
from mixup_recipes.runs import robustness_file
from mixup_recipes.runs.records import FOLDER, as_json, fields_of, file_name, merge, overrides, read_record, validate
from mixup_recipes.runs.run import Run
from mixup_recipes.training import protocols
from mixup_recipes.training.format import FORMAT
from mixup_recipes.typed import UserError

NOTED = ("commit", "python", "packages", "platform", "device", "processes", "mixed_precision", "laws")
"""What a record keeps of ``env.json``, and ``mixers`` where one came from another package."""
MEASURED = ("data", "transform", "seed", "device", "mixed_precision", "budgets", "clean", *robustness_file.PARTS)
"""What a record keeps of ``robustness.json``."""


def of_run(run: Run) -> dict[str, Any]:
    """A record of one run, finished or not. Raises ``UserError`` naming what is missing."""
    recipe, summary = run.recipe, run.summary
    if not re.fullmatch(r"\w[\w.-]*", recipe.name) or recipe.name.endswith((".yaml", ".yml")):
        raise UserError(
            f"{run.folder}: recipe name {recipe.name!r} cannot name a record; expected letters, digits and _ . -"
        )
    if recipe.multi_label:
        raise UserError(
            f"{run.folder}: its images may have several labels, and a record holds top-1; make a report of the run "
            "instead"
        )
    packages, robustness = run.environment.get("mixers"), run.robustness
    numbers = ("epochs", "epochs_planned", "seconds", "img_per_s")
    seed = {
        "top1": summary.reading.value,
        "reading": summary.reading._asdict(),
        "tool": summary.tool._asdict(),
        **{k: summary.scores[k] for k in ("top5", "nll", "ece")},
        **{k: getattr(summary, k) for k in numbers},
        "env": {k: run.environment.get(k) for k in NOTED} | ({"mixers": packages} if packages else {}),
    }
    there = (run.folder / "model.safetensors").exists()  # without its weights, nobody knows what was measured
    if robustness and there and robustness.get("weights_sha256") == run.weights_hash:
        seed["robustness"] = {k: robustness[k] for k in MEASURED if k in robustness}
    content = {
        "format": FORMAT,
        "recipe": recipe.name,
        "fields": fields_of(recipe),
        "overrides": overrides(recipe),
        "protocol": protocols.rule_in_words(recipe),
        "images": summary.count,
        "dataset": run.data.identity,
        "seeds": {str(recipe.seed): seed},
    }
    content = as_json(content)
    validate(content, str(run.folder))
    return content


def of_runs(runs: list[Run]) -> dict[str, Any]:
    """One record of runs of the same recipe but for the seed. Raises ``UserError``."""
    if not runs:
        raise UserError("no run folders given")
    content = of_run(runs[0])
    for run in runs[1:]:
        content = merge(content, of_run(run), str(run.folder))
    return content


def save(runs: list[Run], folder: Path | None = None) -> Path:
    """Record runs in a folder, together with the seeds recorded there before. Returns the file.

    Raises ``UserError`` for runs that don't belong together or contradict the record; then nothing is written.
    """
    folder = folder or FOLDER
    content = of_runs(runs)
    path = folder / file_name(content)
    with locked(folder):
        if path.exists():
            content = merge(read_record(path), content, str(path))
        write_json(path, content)
    return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder if need be and wait until no other process records into it, so that no seed is lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
