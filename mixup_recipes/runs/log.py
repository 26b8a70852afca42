"""``log.jsonl`` of a run as typed rows."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from mixup_recipes.runs.shapes import COUNT, NUMBER, TEXT, UPDATE, check, check_validation, read_text
from mixup_recipes.typed import UserError


class TrainRow(NamedTuple):
    """What was logged about some updates of training."""

    where: str
    """File and line, for errors."""
    epoch: int
    """From 1."""
    update: int
    """Updates done."""
    loss: float
    """Mean over the updates since the last row, on mixed targets."""
    seconds: float
    """Wall time since the run began, over all resumes."""
    img_per_s: float
    """Over all processes."""
    line: dict[str, Any]
    """Everything that the row says, as it was logged."""


class ValRow(NamedTuple):
    """What was logged about one evaluation."""

    where: str
    epoch: int
    update: int
    seconds: float
    line: dict[str, Any]
    """As it was logged: metrics of every classifier, ``top1``, ``ema_top1``, ``mix_k_nll``, ..."""

    def metric(self, name: str) -> float:
        """A metric by its name in the log. Raises ``UserError`` if it is not there."""
        check(self.line, {name: NUMBER}, self.where)
        return self.line[name]

    @property
    def result(self) -> dict[str, Any]:
        """What is reproducible of it: all but the speed. ``eval_results.json`` holds that of the exported weights."""
        return {k: v for k, v in self.line.items() if k not in ("mode", "perf")}


class Rows(NamedTuple):
    """A log, ordered by epoch and update, each epoch and update once."""

    train: list[TrainRow]
    val: list[ValRow]


PERF = {"perf": {"seconds": NUMBER}}
TRAIN = {"loss": NUMBER, "perf": {"seconds": NUMBER, "img_per_s": NUMBER}}


def read_rows(path: Path) -> Rows:
    """The rows of a ``log.jsonl``.

    A resumed run may have logged an epoch twice: the last line counts. A last line cut off by a kill is left out.
    Raises ``UserError`` for a missing file, for a damaged line elsewhere, and for values that cannot be.
    """
    train: dict[tuple[int, int], TrainRow] = {}
    val: dict[int, ValRow] = {}
    for where, line in our_lines(path, read_text(path)):
        epoch, update = line["epoch"], line["update"]
        if line["mode"] == "val":
            check(line, PERF, where)
            val[epoch] = ValRow(where, epoch, update, line["perf"]["seconds"], line)
        elif line["mode"] == "train":
            check(line, TRAIN, where)
            perf = line["perf"]
            train[epoch, update] = TrainRow(
                where, epoch, update, line["loss"], perf["seconds"], perf["img_per_s"], line
            )
    return Rows([train[key] for key in sorted(train)], [val[key] for key in sorted(val)])


def our_lines(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a ``log.jsonl``, each with its place, and checked. Raises ``UserError`` naming line and key."""
    lines = json_lines(path, text)
    for where, line in lines:
        check(line, {"mode": TEXT, "epoch": COUNT, "update": UPDATE}, where)
        if line["mode"] == "val":
            check_validation(line, where)
    return lines


def json_lines(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of a text, one a line, each with its place; a last line cut off by a kill is left out.

    Raises ``UserError`` naming the line for damage elsewhere.
    """
    rows = text.split("\n")
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row) if row.strip() else None
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            lines.append((f"{path}, line {number}", line))
        elif row.strip() and number < len(rows):
            raise UserError(f"{path}, line {number}: expected a JSON object")
    return lines
