"""The runs of a sweep, one after another or several at a time, each a process of its own.

What is finished is skipped, what was interrupted goes on, what fails does not stop the others. The same command
started again continues.
"""

import fcntl
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from mixup_recipes.data.opening import is_large, is_path
from mixup_recipes.data.prepare import PREPARED, find_prepared
from mixup_recipes.data.splits import count, load_splits
from mixup_recipes.recipe import Recipe, differences, schema
from mixup_recipes.runs.processes import Relay, held, last_lines, launch
from mixup_recipes.runs.run import RECIPE, Run, Summary
from mixup_recipes.runs.sweep import Planned
from mixup_recipes.training.data import check_rates
from mixup_recipes.training.folder import check_folder
from mixup_recipes.training.job import STOPPED
from mixup_recipes.training.launch import cores
from mixup_recipes.training.protocols import NAMES
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


def state(run: Planned) -> str:
    """``finished``, ``running`` (another process is at it), ``resumable`` or ``new``.

    Raises ``UserError`` when the folder holds something else, with the fields that differ, or cannot be read.
    """
    try:
        check_folder(run.folder, run.recipe, resume=True)
        if held(run.output, fcntl.flock) or held(run.folder / ".lock", fcntl.lockf):
            return "running"
        if finished(run):
            return "finished"
        return "resumable" if (run.folder / RECIPE).exists() else "new"
    except OSError as e:  # its name is too long for the disk, its output is a folder
        raise UserError(f"cannot read {e.filename or run.folder}: {e.strerror}") from None


def finished(run: Planned) -> bool:
    """Whether the last epoch is evaluated, and what was exported is up to date (summary.csv is written last)."""
    if not (run.folder / RECIPE).is_file():
        return False
    there, last = Run.open(run.folder), run.recipe.epochs
    rows = (there.summary_csv or "").splitlines()
    return bool(rows) and rows[-1].startswith(f"{last},") and last in [row.epoch for row in there.log.val]


def check_data(runs: list[Planned], elsewhere: bool = False) -> None:
    """Open the data sets of this machine that the runs train on, so that what is wrong with them is said at once.

    ``elsewhere``: the runs start on other machines, so that what is missing here may be there. Large shards are not
    opened, of which a run makes a copy first. Raises ``UserError`` for data that a run would refuse.
    """
    names = list(schema(Recipe))
    names = names[names.index("dataset") : names.index("max_eval_samples") + 1]  # what data are opened by
    sizes: dict[str, int] = {}
    for recipe in (run.recipe for run in runs):
        name, prepared = recipe.dataset, recipe.dataset in PREPARED
        there = find_prepared(name) is not None if prepared else Path(name).expanduser().exists()
        if is_large(recipe) if there else elsewhere or not (prepared or is_path(name)):
            continue
        said = repr([getattr(recipe, field) for field in names])
        if said not in sizes:
            sizes[said] = count(load_splits(recipe).train)
        check_rates(recipe, sizes[said])


def duration(seconds: float) -> str:
    """Time for people."""
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"


def short(row: Summary) -> str:
    """How much of the protocol a run covers, where it is not all: ``: 2 of 5 epochs``."""
    used, wanted = row.epochs_used, row.epochs_wanted
    return f": {used} of {wanted} epochs" if used < wanted else ""


def time_left(done: list[Planned], left: list[Planned], jobs: int = 1) -> str:
    """The time that the rest takes if it goes on as before: a run takes as long as its other seeds did, or as all."""
    took = [(run.recipe, Run.open(run.folder).summary.seconds) for run in done]
    total = 0.0
    for run in left:
        alike = [s for other, s in took if not differences(other, run.recipe, ignore=("name", "seed"))]
        total += statistics.fmean(alike or [s for _, s in took])
    return f"; about {duration(total / jobs)} left" if left else ""


def environments(jobs: int) -> list[dict[str, str]]:
    """The environment of each of ``jobs`` places: a GPU in turn, or an equal share of the cores as threads."""
    if jobs == 1:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    devices = [name for name in visible.split(",") if name and not name.startswith("-")]  # -1 means none
    if devices:
        return [{"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} for place in range(jobs)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // jobs))
    return [{"OMP_NUM_THREADS": threads}] * jobs


def keep_to_share(place: int, jobs: int) -> None:
    """Keep this thread, and the runs that it starts, to a share of the cores: by these they count their loaders."""
    if hasattr(os, "sched_setaffinity") and jobs > 1:
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, mine[place::jobs] or mine)


def run_all(runs: list[Planned], say: Callable[[str], object] = print, jobs: int = 1) -> int:
    """Run what isn't finished, ``jobs`` at a time.

    Returns the exit status of the sweep: 0, 1 (a run failed) or 75 (start it again).
    """
    stop, failures, unfinished = Relay(), list[tuple[Planned, str, list[str]]](), list[Planned]()
    done = [run for run in runs if state(run) == "finished"]
    jobs = max(1, min(jobs, len(runs) - len(done)))
    waiting, taking, broken = iter(enumerate(runs, 1)), threading.Lock(), threading.Event()

    def attend(place: int, environment: dict[str, str]) -> None:
        """Run what comes next, until there is nothing left, a signal asks to stop, or another place met an error."""
        keep_to_share(place, jobs)
        try:
            take_turns(environment)
        except BaseException:
            broken.set()
            raise

    def take_turns(environment: dict[str, str]) -> None:
        """The runs of one place."""
        while not broken.is_set():
            with taking:
                number, run = next(waiting, (0, None))
                if run is None:
                    return
                now = state(run)  # anew: another sweep may have been here
            if now == "finished":
                say(f"[{number}/{len(runs)}] {run.name}: finished before")
            elif stop.asked:
                return
            else:
                run_one(number, run, now, environment)

    def run_one(number: int, run: Planned, now: str, environment: dict[str, str]) -> None:
        """Run it and say what became of it."""
        head, began = f"[{number}/{len(runs)}] {run.name}", time.monotonic()
        start = run.output.stat().st_size if run.output.exists() else 0
        if now != "running":
            say(f"{head}: {'resumed' if now == 'resumable' else 'started'}")
        status = None if now == "running" else launch(run.command, run.output, stop, environment)
        took = duration(time.monotonic() - began)
        if status is None:
            say(f"{head}: another process is running it; skipped")
            unfinished.append(run)
        elif status == 0 and finished(run):
            done.append(run)
            row = Run.open(run.folder).summary
            rest = time_left(done, [r for r in runs[number:] if r not in done], jobs)
            say(f"{head}: {took}, {NAMES[row.metric]} {row.reading.value:.2f} ({row.protocol}{short(row)}){rest}")
        elif status == STOPPED or stop.asked:
            say(f"{head}: {took}, stopped")
            unfinished.append(run)
        else:
            what = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            if status == 0:
                what = f"exit status 0, but epoch {run.recipe.epochs} was not evaluated"
            say(f"{head}: {took}, failed: {what}")
            failures.append((run, what, last_lines(run.output, start)))

    try:
        with ThreadPoolExecutor(jobs) as pool:
            left = {pool.submit(attend, *each) for each in enumerate(environments(jobs))}
            while left:  # Python handles a signal in this thread, so it must not sleep for long
                ended, left = wait(left, timeout=0.2)
                for attended in ended:
                    attended.result()
    finally:
        stop.restore()
    for run, what, lines in failures:
        say("\n".join((f"\n{run.name} failed: {what}; its output is in {run.output}", *(f"    {x}" for x in lines))))
    if stop.asked:
        say(f"\n{stop.asked[0]}: stopped; run the same command again to continue")
        return STOPPED
    if failures:
        say(f"\n{len(failures)} of {many(len(runs), 'run')} failed; run the same command again to retry them")
        return 1
    return STOPPED if unfinished else 0
