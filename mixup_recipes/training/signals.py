"""SIGTERM and SIGUSR1 ask a run to save and leave; all processes leave at the same update."""

import signal
from typing import Any

import torch


class Stop:
    """A flag that a signal sets and that all processes agree on."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self.group: Any = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.request)

    def request(self, number: int, _frame: Any) -> None:
        """The signal handler."""
        self.requested = signal.Signals(number).name

    def agreed(self, accelerator: Any) -> bool:
        """Whether all processes leave now: a host-side all-reduce of one number. Every process must call it."""
        if accelerator.num_processes == 1:
            return self.requested is not None
        if self.group is None:  # gloo, so that the device is never waited for
            self.group = torch.distributed.new_group(backend="gloo")
        flag = torch.tensor(int(self.requested is not None))
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)
