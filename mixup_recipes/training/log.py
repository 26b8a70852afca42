"""``log.jsonl`` while it is written, and what is computed from its lines: ``summary.csv`` and the reported number.

And ``skipped.txt``, the images that could not be read. The processes of a machine add to one list while they train;
those of several machines, which may not share a disk, are joined at the end.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from mixup_recipes.files import Notes, sync, write, writing
from mixup_recipes.recipe import Recipe
from mixup_recipes.training import protocols
from mixup_recipes.training.format import SKIPPED
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

Line = dict[str, Any]


class Log:
    """``log.jsonl``: one object a line, flushed at once. A resumed run first cuts it back to its checkpoint.

    Every value but those under ``perf`` (seconds, images/s) is reproducible to the bit.
    """

    def __init__(self, path: Path, length: int = 0):
        path.touch()
        kept = path.read_bytes()[:length]
        self.path = path
        self.lines: list[Line] = []
        try:
            self.lines = [json.loads(line) for line in kept.decode().splitlines()]
            whole = len(kept) == length and kept[-1:] in (b"\n", b"")
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"{path} is damaged or shorter than its checkpoint expects; choose another --output_dir")
        os.truncate(path, length)

    def write(self, **values: Any) -> None:
        """Append one row."""
        self.lines.append(values)
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def length(self) -> int:
        """Bytes so far, all of them on the disk: what a checkpoint remembers."""
        sync(self.path)
        return self.path.stat().st_size


class NoLog:
    """What the other processes hold instead of a log."""

    lines: tuple[Line, ...] = ()

    def write(self, **values: Any) -> None:
        """Nothing."""

    def length(self) -> int:
        """Nothing was written."""
        return 0


def skipped(folder: Path, split: str) -> Notes:
    """The list of images that could not be read and were passed over, for those of a split."""
    return Notes(folder / SKIPPED, split)


def forget_skipped(folder: Path, accelerator: Any, found: Path | None) -> None:
    """Remove the list of an earlier run from a machine without the main process, whose ``begin_folder`` does it there.

    ``found``: the checkpoint from which this run goes on; then the list is its own.
    """
    if found is None and accelerator.is_local_main_process and not accelerator.is_main_process:
        (folder / SKIPPED).unlink(missing_ok=True)


def join_skipped(folder: Path, accelerator: Any) -> list[str]:
    """The lists of all machines, which become that of the main process. All processes call it, after training."""
    path = folder / SKIPPED
    mine = path.read_text().splitlines() if accelerator.is_local_main_process and path.exists() else []
    found = list(dict.fromkeys(gather_object(mine)))  # the main process comes first
    if accelerator.is_main_process and len(found) > len(mine):
        write(path, "".join(f"{line}\n" for line in found))
    return found


def done(folder: Path, accelerator: Any) -> str:
    """What is said at the end of a run. All processes call it."""
    number = len(join_skipped(folder, accelerator))
    if not number:
        return f"done: {folder}"
    passed = "was passed over" if number == 1 else "were passed over"
    return f"{many(number, 'image')} could not be read and {passed}: {folder / SKIPPED}\ndone: {folder}"


def evaluations(lines: Iterable[Line]) -> dict[int, Line]:
    """The lines of evaluations by epoch."""
    return {line["epoch"]: line for line in lines if line["mode"] == "val"}


def summary_csv(lines: Sequence[Line]) -> str:
    """``summary.csv`` with timm's columns, one row per evaluated epoch."""
    rows = []
    for epoch, val in evaluations(lines).items():
        train = [x for x in lines if x["mode"] == "train" and x["epoch"] <= epoch]
        seen = [x for x in train if x["epoch"] == epoch]
        loss = sum(x["loss"] * x["images"] for x in seen) / max(1, sum(x["images"] for x in seen))
        metrics = {f"eval_{k}": v for k, v in val.items() if k not in ("mode", "epoch", "update", "perf")}
        rows.append({"epoch": epoch, "train_loss": loss, **metrics, "lr": train[-1]["lr"] if train else 0.0})
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def reported(lines: Sequence[Line], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The run's number by its setting's protocol (``reported``), and as OpenMixup's tools would compute it."""
    number, tool = protocols.of_run(evaluations(lines).values(), recipe)
    metric = protocols.headline(recipe)
    return {
        "reported": {"protocol": number.label, metric: number.value, "epoch": number.epoch},
        "openmixup_tool": {"protocol": tool.label, metric: tool.value},
    }
