"""The runs of a sweep as jobs of a queue, through the library submitit: what each one is, and how it is submitted.

The queue is Slurm, or ``local``: submitit's own processes on this machine, for a try. The state of a run is in its
folder (``queued.py``), so that a sweep that was killed, or called twice, submits nothing again.
"""

import difflib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from mixup_recipes.runs.processes import last_lines
from mixup_recipes.runs.queued import NOTE, TIMES, QueuedRun, claim, noted, submitit
from mixup_recipes.runs.slurm import check_options, job_name
from mixup_recipes.runs.sweep import Planned
from mixup_recipes.runs.sweep_runs import state
from mixup_recipes.training.job import STOPPED
from mixup_recipes.typed import UserError

WARNING = 120  # seconds before its time is up in which a run saves
FOREVER = 1e6  # minutes
OURS = {
    "array": "--jobs N says how many run at a time",
    "clusters": "squeue is asked about the jobs of the cluster at hand",
    **dict.fromkeys(("error", "open_mode", "output", "parsable", "requeue"), "the sweep sets it"),
    **dict.fromkeys(
        ("nodes", "ntasks", "ntasks_per_node", "tasks_per_node"),
        "a run is one task on one node; launcher: slurm torchrun --standalone --nproc_per_node gpu uses all its GPUs",
    ),
}
"""Options of sbatch that cannot be given here, and why."""
STARTED: list[Any] = []  # submitit's jobs, held: Python complains of processes, those of ``local``, that nobody holds


class Standing(NamedTuple):
    """What a run is."""

    state: str
    """finished, running, queued, failed, resumable or new."""
    job: str = ""
    """The id of the job that has it, or had it when it failed."""
    why: str = ""
    """How it failed."""
    lines: Sequence[str] = ()
    """The last lines of its output."""


# --------------------------------------------------------------------------------------------- what each run is


def standings(runs: list[Planned], out: Path) -> list[Standing]:
    """What each run is. Asks the queues about the jobs that the run folders name. Raises ``UserError``."""
    notes = [noted(run.folder) for run in runs]
    jobs = {(note["queue"], note["job"]) for note in notes if note}
    alive = {("local", job): "running" for queue, job in jobs if queue == "local" and is_controller(job)}
    if asked := sorted(job for queue, job in jobs if queue == "slurm"):
        alive |= {("slurm", job): now for job, now in in_slurm(asked).items()}
    return [standing(run, note.get("job"), alive, out) for run, note in zip(runs, notes, strict=True)]


def standing(run: Planned, asked: str | None, alive: dict[tuple[str, str], str], out: Path) -> Standing:
    """What a run is: its files come first, then the queue, then what its last job noted.

    ``asked``: the job that ``alive`` knows about. The note is read after the queue was asked: a job notes its end
    before it leaves the queue.
    """
    note, found = noted(run.folder), state(run)
    if found == "finished" or not note:
        return Standing(found)
    key, job, status = (note["queue"], note["job"]), note["job"], note.get("status")
    if found == "running":
        return Standing(found, job if key in alive else "")
    if job != asked:  # another sweep has submitted it meanwhile
        return Standing("queued", job)
    if key in alive and status in (None, STOPPED):
        begun = alive[key] == "running" and "start" in note and status is None
        return Standing("running" if begun else "queued", job)
    if status == STOPPED:
        return Standing(found)
    if status is None and "start" not in note:  # cancelled while it waited, say
        return Standing(found)
    log = out / f"submitit/{job}_0_log.out"
    lines = last_lines(run.output, note["start"]) if "start" in note and run.output.exists() else []
    why = f"job {job} ended, but epoch {run.recipe.epochs} was not evaluated"
    if status is None:
        why = f"job {job} was killed: it ended and left no result"
    elif status:
        why = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
    return Standing("failed", job, why, lines or (last_lines(log, 0) if log.exists() else []))


def is_controller(job: str) -> bool:
    """Whether a job of ``local`` goes on: its id is that of the process that sees to it."""
    try:
        return "submitit.local._local" in psutil.Process(int(job)).cmdline()
    except (psutil.Error, ValueError):
        return False


def in_slurm(jobs: list[str]) -> dict[str, str]:
    """Those of the jobs that wait or run, by id: ``queued`` or ``running``. squeue knows that without accounting."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={','.join(jobs)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise UserError(f"cannot ask Slurm about job {jobs[0]}: squeue: {e.strerror}") from None
    if done.returncode and "nvalid job id" not in done.stderr:  # which it says of one that is long gone
        raise UserError(f"cannot ask Slurm about job {jobs[0]}: {' '.join(done.stderr.split())}")
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: "queued" if row[1] == "PENDING" else "running" for row in rows if len(row) == 2 and row[0] in jobs}


# --------------------------------------------------------------------------------------------- submission


class Options(NamedTuple):
    """What was asked of the queue."""

    minutes: float | None
    """Until a run is saved and queued again; None: not given."""
    warning: int
    """Seconds before that in which it saves."""
    others: dict[str, str | bool]
    """Of sbatch, as they were given."""


def read_options(options: list[str], queue: str) -> Options:
    """Options of sbatch, read. Raises ``UserError`` for what the sweep sets, and for Slurm without a time."""
    check_options(options)
    given: dict[str, str | bool] = {}
    for option in options:
        name, equals, value = option.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in OURS:
            raise UserError(f"slurm_options: {option!r} cannot be set here; {OURS[name]}")
        if name in given:
            raise UserError(f"slurm_options: {name} is given twice")
        near = difflib.get_close_matches(name.lower(), ("time", "signal"), 1, 0.7)
        if near and name not in (near[0], "time_min"):
            raise UserError(f"slurm_options: unknown option {name!r}; did you mean {near[0]}?")
        given[name] = value if equals else True
    time, warning = given.pop("time", None), given.pop("signal", f"USR1@{WARNING}")
    if queue == "slurm" and time is None:
        raise UserError(
            "slurm_options: time is missing; it says when a run is saved and queued again, as in --slurm_options "
            "time=12:00:00"
        )
    if not (before := re.fullmatch(r"(?:B:)?(?:SIG)?USR1@(\d+)", str(warning))):
        raise UserError(f"slurm_options: signal: expected USR1@SECONDS, as in signal=USR1@300, got {warning!r}")
    limit = None if time is None else minutes(str(time))
    if limit is not None and limit * 60 <= int(before[1]):
        raise UserError(
            f"slurm_options: time={time}: expected more than the {before[1]} seconds that a run takes to save before "
            "its end; pass a longer time, or a shorter signal=USR1@SECONDS"
        )
    return Options(limit, int(before[1]), given)


def minutes(text: str) -> float:
    """sbatch's way to write a time: ``90``, ``1:30:00``, ``2-12``. Raises ``UserError``."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise UserError(f"slurm_options: time: expected minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, got {text!r}")
    days, *parts = (int(part or 0) for part in found.groups())
    if found[1]:
        return days * 1440 + parts[0] * 60 + parts[1] + parts[2] / 60
    return parts[0] * 60 + parts[1] + parts[2] / 60 if found[4] else parts[0] + parts[1] / 60


def executor(queue: str, out: Path, options: Options, jobs: int | None) -> Any:
    """submitit's executor; its files are in ``out/submitit``. ``jobs``: how many at a time. Raises ``UserError``."""
    library, others = submitit(), dict(options.others)
    if queue == "local":
        gpus = str(others.get("gpus_per_node", "0"))
        if not gpus.isdigit():
            raise UserError(f"slurm_options: gpus_per_node: expected a number with the launcher local, got {gpus!r}")
        made = library.LocalExecutor(out / "submitit", max_num_timeout=TIMES)
        limit = {"timeout_min": options.minutes or FOREVER, "gpus_per_node": int(gpus)}
        made.update_parameters(signal_delay_s=options.warning, stderr_to_stdout=True, **limit)
        return made
    missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"the launcher slurm needs a machine of a Slurm cluster, and {missing[0]} is not in PATH; --slurm FILE "
            "writes a script for a cluster, and --launcher local runs the jobs on this machine"
        )
    made = library.SlurmExecutor(out / "submitit", max_num_timeout=TIMES)
    made.update_parameters(
        job_name=job_name(out),
        time=math.ceil(options.minutes or 0),
        signal_delay_s=options.warning,
        stderr_to_stdout=True,
        array_parallelism=jobs or 100_000,
        wckey=None,
        additional_parameters={"requeue": True} | others,
        # what sbatch is told of it does not reach srun from Slurm 22.05 on
        srun_args=[f"--cpus-per-task={others['cpus_per_task']}"] if "cpus_per_task" in others else None,
    )
    return made


def submit(runs: list[Planned], queue: str, made: Any, over: list[Any]) -> None:
    """Submit the runs, in Slurm as one array, and note in the folder of each which job has it. Raises ``UserError``.

    ``over``: for each run the note of its last job, which is over.
    """
    for run, note in zip(runs, over, strict=True):
        if noted(run.folder).get("job") == note.get("job"):  # no other sweep has submitted it meanwhile
            (run.folder / NOTE).unlink(missing_ok=True)
    for group in [runs] if queue == "slurm" else [[run] for run in runs]:
        calls = [QueuedRun(queue, run.command, run.output, run.folder, os.getcwd()) for run in group]
        try:
            jobs = made.submit_array(calls)
        except RuntimeError as e:  # what sbatch says
            raise UserError(f"cannot submit: {' '.join(str(e).split())}") from e
        for run, job in zip(group, jobs, strict=True):
            STARTED.append(job)
            claim(run.folder, queue, str(job.job_id))
