"""Files: where those of this project lie, and how files are written: whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from mixup_recipes.typed import UserError, printable

ROOT = Path(__file__).parent.parent
LOCKS: list[IO[str]] = []  # open as long as the process lives


def shipped(name: str) -> Path:
    """``recipes`` or ``model_cards``: beside this package in a checkout, inside of it where it was installed."""
    installed = Path(__file__).parent / "shipped" / name
    return installed if installed.is_dir() else ROOT / name


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk becomes one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        # a process that holds a run folder is a training run, and can be resumed
        advice = "; make room, then pass --resume_from_checkpoint auto" if LOCKS else ""
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}{advice}") from e


def aside(path: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


OF_A_RUN = {
    "README.md", "config.json", "data.json", "env.json", "eval_results.json", "log.jsonl", "model.safetensors",
    "predictions.safetensors", "recipe.yaml", "robustness.json", "soup.json", "summary.csv",
}  # fmt: skip


def check_output(path: Path, *allowed: str) -> None:
    """Raise ``UserError`` for an output that would replace a file of a run folder, but for those that are allowed."""
    if path.name in OF_A_RUN - {*allowed} and (path.parent / "recipe.yaml").exists():
        raise UserError(f"{path} is a file of the run in {path.parent}, which would be lost; name another file")


def is_stream(path: Path) -> bool:
    """Whether a path leads to what is written into and never replaced: a pipe, a device, anything in /dev."""
    special = path.exists() and not path.is_file() and not path.is_dir()
    return special or path.absolute().parent == Path("/dev")


def write(path: Path, text: str | bytes) -> None:
    """Write a file whole or not at all; into a pipe or device directly. Raises ``UserError``."""
    first, content = aside(path), text.encode() if isinstance(text, str) else text
    try:
        with writing(path):
            if is_stream(path):
                sys.stdout.flush()  # what was printed comes first
                with path.open("ab") as stream:
                    stream.write(content)
                return
            first.write_bytes(content)
            os.replace(first, path)
    finally:
        with contextlib.suppress(OSError):
            first.unlink()  # there only if something failed


def write_into(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, and its folder if need be. Raises ``UserError``."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write(path, json.dumps(content, indent=1) + "\n")


def lock(folder: Path) -> None:
    """Hold the folder until this process ends. Raises ``UserError`` when another run holds it."""
    file = (folder / ".lock").open("a")
    if not locked(fcntl.lockf, file, fcntl.LOCK_EX):  # this process's own: loader workers do not inherit it
        raise UserError(f"another run is writing to {folder}; wait for it, or choose another --output_dir")
    LOCKS.append(file)


def locked(lock: Callable[[IO[Any], int], object], file: IO[Any], kind: int) -> bool:
    """Take a lock on an open file, without waiting; False where another process holds one.

    ``lock``: ``fcntl.flock`` or ``fcntl.lockf``. Raises ``UserError`` for storage that has no locks.
    """
    try:
        lock(file, kind | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            raise UserError(f"{file.name}: this storage has no file locks ({e.strerror}); use another folder") from None
        return False
    return True


class Notes:
    """A list of lines in a file that several processes add to; each line stands there once."""

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what  # ``what`` stands in front of each line
        self.told: set[str] = set()

    def __call__(self, text: str) -> None:
        """Add a line, unless it is there."""
        line = f"{self.what}: {printable(text)}"
        if line in self.told:
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)  # on a machine without the main process
            file = self.path.open("a+")
        with writing(self.path), file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self.told |= {*file.read().splitlines()}
            if line not in self.told:
                file.write(f"{line}\n")
                self.told.add(line)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Ask the disk to really have it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
