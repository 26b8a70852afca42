"""The cache folder, where data sets and weights are written once, whole or not at all.

A folder is built beside its final place and renamed, so processes may write at once and may be killed anywhere.
"""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mixup_recipes.typed import UserError

Writer = Callable[[Path], None]
"""Writes a folder into a temporary folder."""
STALE = 24 * 3600  # seconds after which an unfinished folder is taken for a killed process's


def cache_dir() -> Path:
    """Where prepared sets live: ``MIXUP_RECIPES_CACHE``, or ``~/.cache/mixup-recipes``."""
    given = os.environ.get("MIXUP_RECIPES_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "mixup-recipes"


def whole(name: str, files: tuple[str, ...]) -> Path | None:
    """The folder of that name in the cache; None unless all files are there.

    ``files``: names, or patterns such as ``data/train-*.parquet`` of shards, whose names say how many there are.
    """
    folder = cache_dir() / name
    return folder if all(there(folder, file) for file in files) else None


def there(folder: Path, pattern: str) -> bool:
    """Whether a folder has a file, or all shards of a pattern."""
    found = [path.name for path in folder.glob(pattern) if path.is_file()]
    shards = re.search(r"-of-(\d+)\.", found[0]) if found else None
    return len(found) == (int(shards[1]) if shards else 1)


def write_once(name: str, writer: Writer, files: tuple[str, ...]) -> Path:
    """Let a function write a folder of that name into the cache, unless it is there; returns the folder.

    Raises ``UserError`` (no network, no pip, wrong checksum, no space, ...) and then leaves nothing behind.
    """
    if found := whole(name, files):
        return found
    folder = cache_dir() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        with tempfile.TemporaryDirectory(prefix=f"{name}.tmp-{os.getpid()}-", dir=folder.parent) as work:
            writer(Path(work))
            put_in_place(Path(work, name), folder, files)
    except OSError as e:
        reason = f"cannot write {name} to {folder.parent}: {e.strerror or e}"
        raise UserError(f"{reason}; make room there, or set MIXUP_RECIPES_CACHE to another folder") from None
    return folder


def remove_stale(folder: Path) -> None:
    """Remove what killed processes left beside ``folder``; younger work may belong to a live process."""
    for old in folder.parent.glob(f"{folder.name}.tmp-*"):
        with contextlib.suppress(OSError):  # another process cleans up too, or the folder is another user's
            if time.time() - old.stat().st_mtime > STALE:
                shutil.rmtree(old)


def put_in_place(new: Path, folder: Path, files: tuple[str, ...]) -> None:
    """Rename ``new`` to ``folder`` atomically; a complete ``folder`` of another process wins."""
    for attempt in range(3):
        try:
            new.rename(folder)
            return
        except OSError:
            if whole(folder.name, files):
                return
            if not folder.exists():
                raise
            # Parts of it were deleted: out of the way, into the temporary folder, unless another process did that
            with contextlib.suppress(FileNotFoundError):
                folder.rename(new.with_name(f"incomplete-{attempt}"))
    raise UserError(f"cannot replace the incomplete {folder}; delete it and try again")
