"""A run of a sweep as a job of its own, through the library submitit: what the job does, and what it notes.

``.job.json`` in the run folder names the one job that may run it: ``queue`` (slurm, local), ``job`` (its id), ``start``
(bytes of the output before it began), ``times`` (how often it began), ``status`` (of the run, once the job is over).
Imports nothing heavy.
"""

import contextlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixup_recipes import files
from mixup_recipes.runs.processes import SIGNALS, Relay, launch
from mixup_recipes.training.job import STOPPED
from mixup_recipes.typed import UserError

NOTE = ".job.json"
TIMES = 100  # how often a job is queued again
GENTLE = ("SIGINT", "SIGTERM", "SIGHUP")  # cancelled, or preempted: Slurm itself knows whether to queue it again


def submitit() -> Any:
    """The library. Raises ``UserError`` where it is not installed."""
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # read once; a run without this job around it knows USR1
    try:
        import submitit
    except ImportError:
        raise UserError(
            "the launchers slurm and local need submitit: pip install 'mixup-recipes[slurm]', or let --slurm FILE "
            "write a script"
        ) from None
    return submitit


def noted(folder: Path) -> dict[str, Any]:
    """What the note of a run folder says; empty where there is none, or none that names a job."""
    try:
        note = json.loads((folder / NOTE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) and note.keys() >= {"queue", "job"} else {}


def claim(folder: Path, queue: str, job: str) -> str:
    """Note that this job has the run, unless another one has it; returns the id of the one that has it.

    Whoever is first wins: a sweep that has submitted the job, or the job, which may start before its sweep wrote the
    note, or after its sweep was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not noted(folder):  # nor what a full disk has left of one
        (folder / NOTE).unlink(missing_ok=True)
    first = files.aside(folder / NOTE)
    files.write_json(first, {"queue": queue, "job": job})
    try:
        with contextlib.suppress(FileExistsError):
            os.link(first, folder / NOTE)
    finally:
        first.unlink(missing_ok=True)
    return str(noted(folder).get("job"))


@dataclass(frozen=True)
class QueuedRun:
    """What submitit calls within the job."""

    queue: str
    command: list[str]
    output: Path
    folder: Path
    """The run folder; it and ``output`` may be relative to ``cwd``."""
    cwd: str

    def checkpoint(self) -> Any:
        """What submitit queues again: the same, as the run goes on from its own newest checkpoint."""
        return submitit().helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        """Run it, pass signals on, note how it ended; leave with the status of the run, or be queued again."""
        os.chdir(self.cwd)
        environment = submitit().JobEnvironment()
        job, again = environment.job_id, signal.Signals[f"SIG{environment.USR_SIG}"]
        if (holder := claim(self.folder, self.queue, job)) != job:
            print(f"nothing to do: {self.folder} was given to job {holder}", flush=True)
            return
        times = noted(self.folder).get("times", 0) + 1
        start = self.output.stat().st_size if self.output.exists() else 0
        note = {"queue": self.queue, "job": job, "start": start, "times": times}
        files.write_json(self.folder / NOTE, note)
        stop = Relay((*SIGNALS, again), kills=False)  # what does not leave in time is killed by the queue
        try:
            status = launch(self.command, self.output, stop, {})
        finally:
            stop.restore()
        if status is None:
            print(f"nothing to do: another process is running {self.folder}", flush=True)
        stopped = status is None or status == STOPPED or (status != 0 and bool(stop.asked))
        files.write_json(self.folder / NOTE, note | {"status": STOPPED if stopped else status})
        print(f"the run ended with status {status}; signals: {', '.join(stop.asked) or 'none'}", flush=True)
        if stopped and status is not None and times < TIMES and not (stop.asked and {*stop.asked} <= {*GENTLE}):
            signal.raise_signal(again)  # to submitit, which saves what ``checkpoint`` says and queues the job again
        if stopped or status:
            raise SystemExit(STOPPED if stopped or status is None else status if status > 0 else 128 - status)
