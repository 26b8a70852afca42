"""SIGTERM and SIGUSR1 ask a run to save and leave; all processes leave at the same update.

Before the first update there is nothing to save, and a process leaves at once: while it downloads or lists the data,
fetches weights, or waits for others. Later it has some time for the batch that it waits for. A thread sees to both,
since Python runs a signal handler only between two of its own steps: not while a library or a dead disk keeps it.
"""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from mixup_recipes.training.job import STOPPED

PATIENCE = 25.0  # seconds that a loader has for its next batch once a signal has asked to stop; torchrun kills after 30
WAITING = timedelta(days=1)  # that a process waits for the others, such as for one that downloads the data
BETWEEN, MOST_CALLS = 1.0, 20  # seconds, and calls, between two times that the processes ask each other
NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
T = TypeVar("T")


@dataclass
class Pace:
    """When the processes ask each other next whether to leave."""

    since: float = -math.inf
    """When they did last."""
    calls: int = 0
    """Of ``Stop.agreed`` since then."""
    due: int = 1
    """How many calls after the last time they ask again."""


class Stop:
    """A flag that a signal sets and that all processes agree on."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self.group: Any = None
        self.paces: dict[str, Pace] = {}
        self.begun = False  # the updates, which are worth saving
        self.waiting: float | None = None  # since when a batch is waited for
        for number in NUMBERS:
            signal.signal(number, self.request)
        self.listener, told = socket.socketpair()
        told.setblocking(False)
        self.told = told  # the interpreter writes the number of each signal into it, whatever it is doing
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=forget)
        threading.Thread(target=self.listen, daemon=True).start()

    def request(self, number: int, _frame: Any) -> None:
        """The signal handler."""
        self.requested = signal.Signals(number).name

    def begin(self, accelerator: Any) -> None:
        """From here on a signal means: save and leave. For all processes at once."""
        accelerator.wait_for_everyone()
        self.begun = True

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches. One that is late after a signal ends the process; the last checkpoint is kept."""
        while True:
            self.waiting = time.monotonic()
            batch = next(batches, None)
            self.waiting = None
            if batch is None:
                return
            yield batch

    def listen(self) -> None:
        """Wait for a signal, then see to it that the process leaves."""
        while not (asked := [n for n in self.listener.recv(64) if n in NUMBERS]):
            pass
        self.requested = signal.Signals(asked[0]).name
        if not self.begun:
            leave(f"{self.requested} came before the first update, so the run stopped with nothing to save")
        self.watch()

    def watch(self) -> None:
        """Leave when images have kept the run waiting for too long: a disk that hangs cannot be asked to stop."""
        asked = time.monotonic()
        while True:
            time.sleep(0.2)
            if (since := self.waiting) is not None and time.monotonic() - max(since, asked) > PATIENCE:
                leave(
                    f"{self.requested}: no images came for {PATIENCE:.0f} s, so the run stopped without a new "
                    "checkpoint"
                )

    def agreed(self, accelerator: Any, what: str = "update") -> bool:
        """Whether all processes leave now. Each must call it equally often for each ``what``.

        They ask each other about once a second, by a host-side all-reduce: it also tells all of them how long the
        slowest one takes between two calls, and so after how many calls they ask again.
        """
        if accelerator.num_processes == 1:
            return self.requested is not None
        pace = self.paces.setdefault(what, Pace())
        pace.calls += 1
        if pace.calls < pace.due:
            return False
        now = time.monotonic()
        if self.group is None:  # gloo, so that the device is never waited for
            self.group = torch.distributed.new_group(backend="gloo", timeout=WAITING)
        said = torch.tensor([self.requested is not None, (now - pace.since) / pace.calls], dtype=torch.float64)
        try:
            torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX, group=self.group)
        except RuntimeError:
            if self.requested is None:
                raise
            leave(f"{self.requested}: another process has stopped, so this one stopped without a new checkpoint")
        leaving, slowest = said.tolist()
        self.paces[what] = Pace(since=now, due=max(1, min(MOST_CALLS, int(BETWEEN / slowest))) if slowest else 1)
        return bool(leaving)


def leave(reason: str) -> None:
    """End the process from any thread, whatever the others are doing; all that is on the disk is whole at any time."""
    print(f"{reason}; continue with --resume_from_checkpoint auto", file=sys.stderr, flush=True)
    flushing = threading.Thread(target=sys.stdout.flush, daemon=True)  # who reads it may hang as well
    flushing.start()
    flushing.join(1)
    os._exit(STOPPED)


def forget() -> None:
    """In a loader process: what it is sent is not for its parent."""
    with contextlib.suppress(ValueError):  # forked by another thread than the first
        signal.set_wakeup_fd(-1)
