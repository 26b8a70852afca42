"""Whole runs in a second or two: one server process imports torch once and forks a child for each process of a run.

    with Server() as server:
        run = server.start("--recipe", "tiny.yaml", "--output_dir", "out", processes=2)
        run.wait()            # [0, 0]; a negative number is the signal that ended the process
        print(run.output())

A child is what a launcher starts: it has the arguments and the environment variables of torchrun, and runs
``train_mixup.main``. Faults are put into it by name, see ``FAULTS``.
"""

import hashlib
import itertools
import json
import os
import pkgutil
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from forks import ROOT, Forks

IMPORTS = """
import driver, teachers, timm, torch.utils.tensorboard, train_mixup
from timm.models import save_for_hf
from mixup_recipes import flags
from mixup_recipes.data import streaming  # what main imports, once for all runs
from mixup_recipes.hub import publisher
from mixup_recipes.pages import card
from mixup_recipes.training import backbones, dryrun, precise_bn, progress
teachers.stand_in()
backbones.check_input(timm.create_model("test_resnet"), 2, 32, "test_resnet", training=True)  # imports more
"""


class Run:
    """A run that was started: its processes, and what they print."""

    def __init__(self, forks: Forks, pids: list[int], out: Path):
        self.forks, self.pids, self.out = forks, pids, out

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit statuses by rank. When one process fails, the others are killed after a while, as torchrun does it."""
        return self.forks.wait_for(self.pids, timeout)

    def send(self, number: int) -> None:
        """Send a signal to all processes."""
        for pid in self.pids:
            os.kill(pid, number)  # nothing else can have the id before ``wait``

    def output(self, rank: int = 0) -> str:
        """Standard output and error of a process."""
        return self.out.with_suffix(f".{rank}").read_text()


class Server:
    """Starts runs. One at a time. ``env``: environment variables of all its runs, set before anything is imported."""

    def __init__(self, **env: str):
        self.forks, self.runs = Forks({"HF_HUB_OFFLINE": "1"} | env, IMPORTS), 0

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.forks.__exit__()

    def start(self, *args: object, processes: int = 1, faults: Any = (), ranks: Any = None, cwd: Any = None) -> Run:
        """Start train_mixup.py on one or several processes.

        ``faults``: a list of [name in ``FAULTS``, argument ...], put into the processes ``ranks`` (default all).
        """
        self.runs += 1
        out, pids = Path(self.forks.folder.name) / f"run-{self.runs}", []
        world: dict[str, object] = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for rank in range(processes):
            own = json.dumps([cwd and str(cwd), *(faults if ranks is None or rank in ranks else ())])
            env = {k: str(v) for k, v in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()} if processes > 1 else {}
            started = self.forks.start(
                "import driver\ndriver.child()", own, *args, env=env, out=out.with_suffix(f".{rank}")
            )
            pids.append(started[0])
        return Run(self.forks, pids, out)

    def run(self, *args: object, **options: Any) -> tuple[int, str]:
        """Run to the end; returns the worst exit status and what the first process printed."""
        run = self.start(*args, **options)
        return max(run.wait(), key=abs), run.output()


def free_port() -> int:
    """A port for the processes of a run to meet at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child() -> None:
    """One process of a run."""
    import train_mixup
    from mixup_recipes import flags
    from mixup_recipes.training import signals

    cwd, *faults = json.loads(sys.argv[1])
    sys.argv[:2] = ["train_mixup.py"]
    os.chdir(cwd or ROOT)
    signals.BETWEEN = 0  # processes ask each other after every update: where a run stops is no matter of the clock
    for name, *args in faults:
        FAULTS[name](*args)
    flags.run(train_mixup.main)


#
# ``target`` is "module:name" or "module:Class.name" of a function; the fault happens at its call number ``call``,
# counted from 1, in this process.


def wrap(target: str, call: int, before: Callable[[], object]) -> None:
    """Call ``before`` ahead of the given call of a function."""
    module, path = target.split(":")
    parent, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{parent}")
    function, calls = getattr(owner, name), itertools.count(1)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            before()
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)


def receive(target: str, call: int, number: int) -> None:
    """The process sends itself a signal."""
    wrap(target, call, lambda: os.kill(os.getpid(), number))


def kill_parent(target: str, call: int) -> None:
    """A loader process kills its training process."""

    def fail() -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(0.5)

    wrap(target, call, fail)


def no_space(target: str, call: int) -> None:
    """The disk is full."""
    wrap(target, call, Mock(side_effect=OSError(28, "No space left on device")))


def small_disk() -> None:
    """A disk with 1 kB to spare."""
    usage = shutil.disk_usage("/")._replace(free=1000)
    setattr(shutil, "disk_usage", lambda _: usage)  # noqa: B010  its type says that nobody does this


def not_a_number(first: int) -> None:
    """The loss is not a number from a micro-batch on."""
    from mixup_recipes.training import update

    original, calls = update.one_hot, itertools.count()
    update.one_hot = lambda labels, recipe: original(labels, recipe) * (float("nan") if next(calls) >= first else 1)


def weights_hash(folder: str) -> None:
    """Each process writes the SHA-256 of its own parameters, as they are at the end."""
    from accelerate import Accelerator

    original = Accelerator.end_training

    def end_training(accelerator: Any) -> None:
        parameters = [p.detach().numpy().tobytes() for m in accelerator._models for p in m.parameters()]
        digest = hashlib.sha256(b"".join(parameters)).hexdigest()
        (Path(folder) / f"rank-{accelerator.process_index}").write_text(f"{len(parameters)} {digest}")
        original(accelerator)

    Accelerator.end_training = end_training


FAULTS: dict[str, Callable[..., object]] = {
    fault.__name__: fault for fault in (receive, kill_parent, no_space, small_disk, not_a_number, weights_hash)
} | {"script": runpy.run_path}
