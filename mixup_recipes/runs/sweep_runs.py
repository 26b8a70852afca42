"""The runs of a sweep, one after another or several at a time, each a process of its own.

What is finished is skipped, what was interrupted goes on, what fails does not stop the others. The same command
started again continues.
"""

import contextlib
import fcntl
import os
import re
import shlex
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

import torch

from mixup_recipes.recipe import differences
from mixup_recipes.runs.run import RECIPE, Run, Summary
from mixup_recipes.runs.sweep import Planned
from mixup_recipes.training.folder import check_folder
from mixup_recipes.training.job import STOPPED
from mixup_recipes.training.launch import cores
from mixup_recipes.training.protocols import NAMES
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
GRACE = 60  # seconds that processes have which outlive their launcher, once they are asked to leave


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


def held(path: Path, lock: Callable[[IO[bytes], int], object]) -> bool:
    """Whether another process holds a lock on the file. A shared lock tells, for which it need not be writable."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


class Relay:
    """Signals to the sweep go to the running process groups as SIGTERM, which all launchers pass on; a second kills."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.children: set[int] = set()  # their groups
        self.before = {n: signal.getsignal(n) for n in SIGNALS}
        for number, handler in self.before.items():
            if number != signal.SIGHUP or handler is not signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self.request)

    def request(self, number: int, _frame: Any) -> None:
        """The signal handler."""
        self.asked.append(signal.Signals(number).name)
        self.send()

    def send(self) -> None:
        """Pass on what was asked for."""
        for group in [*self.children] if self.asked else []:
            kill_group(group, signal.SIGTERM if len(self.asked) == 1 else signal.SIGKILL)

    def restore(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def kill_group(pid: int, number: int) -> None:
    """Send a signal to a process group, if there still is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def launch(run: Planned, stop: Relay, environment: dict[str, str]) -> int | None:
    """Run to the end; its exit status, negative for the signal that killed it, or None if another process is at it.

    The child has a process group of its own, so that a Ctrl-C reaches it as SIGTERM only. It shares the lock on its
    output: who starts the sweep a second time sees that it still runs, even if this process was killed.
    """
    with run.output.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        file.write(f"$ {shlex.join(run.command)}\n".encode())
        file.flush()
        child = subprocess.Popen(
            run.command,
            env=os.environ | environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        stop.children.add(child.pid)
        if stop.asked:  # meanwhile
            kill_group(child.pid, signal.SIGTERM)
        status = child.wait()
    # A launcher may leave before its processes: accelerate does on SIGTERM. They save; the next run needs their memory.
    deadline, asked = time.monotonic() + GRACE, False
    while status and held(run.output, fcntl.flock) and time.monotonic() < deadline + 5:
        if not asked or time.monotonic() > deadline:
            kill_group(child.pid, signal.SIGKILL if asked else signal.SIGTERM)
        asked = True
        time.sleep(0.1)
    stop.children.discard(child.pid)
    return status


def last_lines(path: Path, start: int) -> list[str]:
    """The last lines of a file that aren't empty, at most five, from byte ``start`` on."""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 20_000))
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    return [line for line in lines if line.strip() and not line.startswith("$ ")][-5:]


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
        status = None if now == "running" else launch(run, stop, environment)
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
        say(f"\n{stop.asked[0]}: stopped; the same command goes on")
        return STOPPED
    if failures:
        say(f"\n{len(failures)} of {many(len(runs), 'run')} failed; the same command tries them again")
        return 1
    return STOPPED if unfinished else 0
