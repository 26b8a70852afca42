"""Python code in processes that have everything imported already: the Hub's clients read their settings at import.

with Forks({"HF_ENDPOINT": url}) as forks:
    done = forks.run("print(sys.argv[1])", "a word", env={"HF_TOKEN": ""})
    done.returncode, done.output
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GRACE = 20.0  # seconds that the others have after one of several processes has failed


class Done(NamedTuple):
    """How a process ended, and what it printed."""

    returncode: int
    output: str


class Forks:
    """A server of such processes. ``env`` is what they are imported with, ``imports`` what."""

    def __init__(self, env: dict[str, str], imports: str = ""):
        fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.folder, self.count = tempfile.TemporaryDirectory(), 0
        command = [sys.executable, __file__, imports]
        self.process = subprocess.Popen(command, env=os.environ | fixed | env, text=True, stdin=-1, stdout=-1)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.wait_for([])  # it answers when all is imported

    def __enter__(self) -> "Forks":
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

    def start(
        self, code: str, *args: object, env: dict[str, str] | None = None, out: Path | None = None
    ) -> tuple[int, Path]:
        """Start a process; returns its id and the file that it prints into."""
        self.count += 1
        out = out or Path(self.folder.name) / str(self.count)
        return self.ask(code=code, args=[*map(str, args)], env=env or {}, out=str(out)), out

    def wait_for(self, pids: list[int], timeout: float = 120.0) -> list[int]:
        """Exit statuses of processes. Who is late, or left behind for a while by one that failed, is killed."""
        return self.ask(pids=pids, timeout=timeout)

    def wait(self, started: tuple[int, Path], timeout: float = 120.0) -> Done:
        """Wait for a process."""
        return Done(self.wait_for([started[0]], timeout)[0], started[1].read_text())

    def run(self, code: str, *args: object, env: dict[str, str] | None = None, timeout: float = 120.0) -> Done:
        """Start and wait."""
        return self.wait(self.start(code, *args, env=env), timeout)


def fork(args: list[str], env: dict[str, str], out: str) -> int:
    """Fork a process; 0 in it."""
    pid = os.fork()
    if pid == 0:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # leave with the server
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (file, 1), (file, 2)):
            os.dup2(source, target)
        os.environ.update(env)
        sys.argv = ["fork", *args]
    return pid


def wait(pids: list[int], timeout: float) -> list[int]:
    """The exit statuses of processes."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while left := [pid for pid in pids if pid not in statuses]:
        for pid in left:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done and (code := statuses.setdefault(pid, os.waitstatus_to_exitcode(status))):
                deadline = min(deadline, time.monotonic() + (0 if code == -signal.SIGKILL else GRACE))
            elif not done and time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def serve() -> str:
    """Answer requests; the code to run in a forked process, nothing when there are no more."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        code = request.pop("code", "")
        answer = fork(**request) if code else wait(**request)
        if answer == 0:
            return code
        print(json.dumps(answer), flush=True)
    return ""


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        import torch

        torch.set_num_threads(1)
        exec(sys.argv[1])
    exec(serve(), {"__name__": "__main__", "sys": sys})
