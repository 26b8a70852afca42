"""Whole runs in a second or two: one server process imports torch once and forks a child for each process of a run.

    with Server() as server:
        run = server.start("--recipe", "tiny.yaml", "--output_dir", "out", processes=2)
        run.wait()            # [0, 0]; a negative number is the signal that ended the process
        print(run.output())

A child is what a launcher starts: it has the arguments and the environment variables of torchrun, and runs
``train_mixup.main``. Faults are put into it by name, see ``FAULTS``.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE = 20.0  # seconds that the others have after one process of a run has failed

# --------------------------------------------------------------------------------------------- the tests' side


class Run:
    """A run that was started: its processes, and what they print."""

    def __init__(self, server: "Server", pids: list[int], out: Path):
        self.server, self.pids, self.out = server, pids, out

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit statuses by rank. When one process fails, the others are killed after a while, as torchrun does it."""
        return self.server.ask(do="wait", pids=self.pids, timeout=timeout)

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to some or (without ranks) all processes."""
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)  # nothing else can have the id before ``wait``

    def output(self, rank: int = 0) -> str:
        """Standard output and error of a process."""
        return self.out.with_suffix(f".{rank}").read_text()


class Server:
    """Starts runs. One at a time. ``env``: environment variables of all its runs, set before anything is imported."""

    def __init__(self, **env: str) -> None:
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | fixed | env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.runs = 0
        self.ask(do="wait", pids=[], timeout=0)  # it answers when all is imported

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()
        self.process.wait(30)
        self.answers.close()
        self.folder.cleanup()

    def ask(self, **request: Any) -> Any:
        """One request, one answer."""
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        return json.loads(self.answers.readline())

    def start(self, *args: object, processes: int = 1, faults: Any = (), ranks: Any = None, cwd: Any = None) -> Run:
        """Start train_mixup.py on one or several processes.

        ``faults``: a list of [name in ``FAULTS``, argument ...], put into the processes ``ranks`` (default all).
        """
        self.runs += 1
        out = Path(self.folder.name) / f"run-{self.runs}"
        request = {"args": [*map(str, args)], "processes": processes, "out": str(out), "cwd": str(cwd or ROOT)}
        return Run(self, self.ask(do="start", faults=list(faults), ranks=ranks, **request), out)

    def run(self, *args: object, **options: Any) -> tuple[int, str]:
        """Run to the end; returns the worst exit status and what the first process printed."""
        run = self.start(*args, **options)
        statuses = run.wait()
        return max(statuses, key=abs), run.output()


# --------------------------------------------------------------------------------------------- faults
#
# ``target`` is "module:name" or "module:Class.name" of a function; the fault happens at its call number ``call``,
# counted from 1, in this process.


def wrap(target: str, call: int, before: Callable[[], object]) -> None:
    """Call ``before`` ahead of the given call of a function."""
    module, path = target.split(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, name)
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
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

    def fail() -> None:
        raise OSError(28, "No space left on device")

    wrap(target, call, fail)


def small_disk() -> None:
    """A disk with 1 kB to spare."""
    usage = shutil.disk_usage("/")._replace(free=1000)
    setattr(shutil, "disk_usage", lambda _: usage)  # noqa: B010  its type says that nobody does this


def not_a_number(first: int) -> None:
    """The loss is not a number from a micro-batch on."""
    from mixup_recipes.training import update

    original, calls = update.one_hot, 0

    def one_hot(labels: Any, recipe: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(labels, recipe) * (float("nan") if calls > first else 1)

    update.one_hot = one_hot


def weights_hash(folder: str) -> None:
    """Each process writes the SHA-256 of its own parameters, as they are at the end."""
    import hashlib

    from accelerate import Accelerator

    original = Accelerator.end_training

    def end_training(accelerator: Any) -> None:
        parameters = [p.detach().numpy().tobytes() for m in accelerator._models for p in m.parameters()]
        digest = hashlib.sha256(b"".join(parameters)).hexdigest()
        (Path(folder) / f"rank-{accelerator.process_index}").write_text(f"{len(parameters)} {digest}")
        original(accelerator)

    Accelerator.end_training = end_training


def script(path: str) -> None:
    """Run a Python file first."""
    runpy.run_path(path)


FAULTS: dict[str, Callable[..., None]] = {
    "receive": receive,
    "kill_parent": kill_parent,
    "no_space": no_space,
    "small_disk": small_disk,
    "not_a_number": not_a_number,
    "weights_hash": weights_hash,
    "script": script,
}

# --------------------------------------------------------------------------------------------- the server's side


def free_port() -> int:
    """A port for the processes of a run to meet at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork(request: dict[str, Any]) -> list[int] | None:
    """Fork the processes of a run; returns their ids, or None in each of them."""
    port, pids, world = free_port(), [], request["processes"]
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        if sys.platform == "linux":  # leave with the server
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        out = os.open(f"{request['out']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        sys.argv = ["train_mixup.py", *request["args"]]
        if world > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ.update({k: str(v) for k, v in numbers.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        if request["ranks"] is None or rank in request["ranks"]:
            for name, *args in request["faults"]:
                FAULTS[name](*args)
        return None
    return pids


def wait(pids: list[int], timeout: float) -> list[int]:
    """Wait until all have left. Whoever is late, or left behind by one that failed, is killed."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    if statuses[pid]:
                        killed = statuses[pid] == -signal.SIGKILL
                        deadline = min(deadline, time.monotonic() + (0 if killed else GRACE))
        if time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def requests() -> Iterator[dict[str, Any]]:
    """Requests, one a line."""
    while line := sys.stdin.readline():
        yield json.loads(line)


def serve() -> bool:
    """Answer requests until there are no more; True in a forked child."""
    for request in requests():
        answer = fork(request) if request.pop("do") == "start" else wait(request["pids"], request["timeout"])
        if answer is None:
            return True
        print(json.dumps(answer), flush=True)
    return False


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        import teachers
        import torch
        import torch.utils.tensorboard
        from timm.models import save_for_hf  # noqa: F401

        import train_mixup
        from mixup_recipes import flags
        from mixup_recipes.data import streaming  # noqa: F401  what main imports, once for all runs
        from mixup_recipes.hub import publisher  # noqa: F401
        from mixup_recipes.pages import card  # noqa: F401
        from mixup_recipes.training import dryrun, precise_bn, progress  # noqa: F401

        torch.set_num_threads(1)
        teachers.stand_in()
    if serve():
        flags.run(train_mixup.main)
