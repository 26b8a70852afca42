"""Processes that runs are in: how they are started, asked to leave and waited for. Imports nothing heavy."""

import contextlib
import fcntl
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from mixup_recipes import files

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
GRACE = 60  # seconds that processes have which outlive their launcher, once they are asked to leave


def held(path: Path, lock: Callable[[IO[bytes], int], object]) -> bool:
    """Whether another process holds a lock on the file. A shared lock tells, for which it need not be writable."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return not files.locked(lock, file, fcntl.LOCK_SH)


class Relay:
    """Signals to this process go to the running process groups as SIGTERM, which all launchers pass on.

    A second one kills them, unless ``kills`` is false.
    """

    def __init__(self, numbers: Sequence[signal.Signals] = SIGNALS, kills: bool = True) -> None:
        self.asked: list[str] = []
        self.children: set[int] = set()  # their groups
        self.kills = kills
        self.before = {n: signal.getsignal(n) for n in numbers}
        for number, handler in self.before.items():
            if number != signal.SIGHUP or handler is not signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self.request)

    def request(self, number: int, _frame: Any) -> None:
        """The signal handler."""
        self.asked.append(signal.Signals(number).name)
        first = len(self.asked) == 1
        for group in [*self.children] if first or self.kills else []:
            kill_group(group, signal.SIGTERM if first else signal.SIGKILL)

    def restore(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def kill_group(pid: int, number: int) -> None:
    """Send a signal to a process group, if there still is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def launch(command: list[str], output: Path, stop: Relay, environment: dict[str, str]) -> int | None:
    """Run to the end; its exit status, negative for the signal that killed it, or None if another process is at it.

    The child has a process group of its own, so that a Ctrl-C reaches it as SIGTERM only. It shares the lock on its
    output: who starts the sweep a second time sees that it still runs, even if this process was killed.
    """
    with output.open("ab") as file:
        if not files.locked(fcntl.flock, file, fcntl.LOCK_EX):
            return None
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        child = subprocess.Popen(
            command,
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
    while status and held(output, fcntl.flock) and time.monotonic() < deadline + 5:
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
