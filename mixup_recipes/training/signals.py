"""SIGTERM and SIGUSR1 ask a run to save and leave; all processes leave at the same update."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from mixup_recipes.training.job import STOPPED

PATIENCE = 30.0  # seconds that a loader has for its next batch once a signal has asked to stop
T = TypeVar("T")


class Stop:
    """A flag that a signal sets and that all processes agree on."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self.group: Any = None
        self.waiting: float | None = None  # since when a batch is waited for
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.request)

    def request(self, number: int, _frame: Any) -> None:
        """The signal handler."""
        if self.requested is None:
            threading.Thread(target=self.watch, daemon=True).start()
        self.requested = signal.Signals(number).name

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches. One that is late after a signal ends the process; the last checkpoint is kept."""
        while True:
            self.waiting = time.monotonic()
            batch = next(batches, None)
            self.waiting = None
            if batch is None:
                return
            yield batch

    def watch(self) -> None:
        """Leave when images have kept the run waiting for too long: a disk that hangs cannot be asked to stop."""
        asked = time.monotonic()
        while True:
            time.sleep(0.2)
            if (since := self.waiting) is not None and time.monotonic() - max(since, asked) > PATIENCE:
                print(
                    f"{self.requested}: no images for {PATIENCE:.0f} s, left without a new checkpoint; continue with "
                    "--resume_from_checkpoint auto",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STOPPED)

    def agreed(self, accelerator: Any) -> bool:
        """Whether all processes leave now: a host-side all-reduce of one number. Every process must call it."""
        if accelerator.num_processes == 1:
            return self.requested is not None
        if self.group is None:  # gloo, so that the device is never waited for
            self.group = torch.distributed.new_group(backend="gloo")
        flag = torch.tensor(int(self.requested is not None))
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)
