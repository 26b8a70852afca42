"""What the authors of a data set distribute, as it was downloaded: folders and archives, read file by file.

Nothing is unpacked: members of an archive are read from the places that it says, so that none gets a name on the disk.
A tar that is packed is first written as a plain one into a temporary folder, since its members cannot be reached one
by one.
"""

import bz2
import contextlib
import errno
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from mixup_recipes.data import tars
from mixup_recipes.data.decoding import LARGEST_FILE
from mixup_recipes.typed import UserError, nearest

UNPACK: dict[bytes, Callable[[Path], IO[bytes]]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # type: ignore[dict-item]
"""How a packed file begins -> what reads it."""
ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip")
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, NotImplementedError)


class Part(Protocol):
    """A folder or an archive: files by their names below it, with slashes."""

    def size(self, name: str) -> int | None:
        """The bytes of a regular file; None where there is none of that name."""

    def read(self, name: str) -> bytes:
        """The content of a file that is there."""


class Folder:
    """A folder; links are followed, since it is the user's own."""

    def __init__(self, path: Path):
        self.path = path

    def size(self, name: str) -> int | None:
        """See ``Part``."""
        try:
            status = os.stat(os.path.join(self.path, name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, name: str) -> bytes:
        """See ``Part``."""
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read()


class Tar:
    """A plain tar, of which the regular files are members."""

    def __init__(self, path: Path, stack: contextlib.ExitStack):
        self.file = stack.enter_context(path.open("rb"))
        self.members: dict[str, tars.Member] = {}
        for _, member in tars.members_of(path, self.file, {}):
            self.members[inside(member.name.removeprefix("./"), path)] = member

    def size(self, name: str) -> int | None:
        """See ``Part``."""
        member = self.members.get(name)
        return None if member is None else member.size

    def read(self, name: str) -> bytes:
        """See ``Part``."""
        member = self.members[name]
        return tars.content(member, self.file, member.size)


class Zip:
    """A zip, of which the regular files are members."""

    def __init__(self, path: Path, stack: contextlib.ExitStack):
        self.zip = stack.enter_context(zipfile.ZipFile(path))
        files = [m for m in self.zip.infolist() if not m.is_dir() and not stat.S_ISLNK(m.external_attr >> 16)]
        self.members = {inside(member.filename.removeprefix("./"), path): member for member in files}

    def size(self, name: str) -> int | None:
        """See ``Part``."""
        member = self.members.get(name)
        return None if member is None else member.file_size

    def read(self, name: str) -> bytes:
        """See ``Part``."""
        return self.zip.read(self.members[name])


class Source:
    """Folders and archives as one tree. Everything raises ``UserError`` for what is damaged or cannot be read.

    ``work``: a temporary folder for plain tars. ``archives``: the names of what the authors distribute -> MD5, where it
    is known; a file of such a name must have it. ``stack`` closes what is opened.
    """

    def __init__(self, paths: Sequence[Path], work: Path, archives: Mapping[str, str], stack: contextlib.ExitStack):
        self.paths, self.archives = paths, archives
        self.parts: list[Part] = []
        for path in paths:
            with told(path):
                self.parts.append(opened(path, work, archives.get(path.name, ""), stack))

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    def size(self, name: str) -> int | None:
        """The bytes of a file; None where there is none of that name."""
        inside(name, self)
        with told(f"{self}: {name}"):
            return next((size for part in self.parts if (size := part.size(name)) is not None), None)

    def read(self, name: str) -> bytes:
        """The content of a file that is there."""
        with told(f"{self}: {name}"):
            for part in self.parts:
                if (size := part.size(inside(name, self))) is not None:
                    if size > LARGEST_FILE:
                        raise UserError(f"{name} has {size:,} bytes, more than {LARGEST_FILE:,}")
                    return part.read(name)
        raise UserError(f"{name} is not in {self}")

    def find(self, *names: str) -> str | None:
        """The first of the names that is there."""
        return next((name for name in names if self.size(name) is not None), None)

    def root(self, name: str, *roots: str) -> str:
        """The first of ``roots`` (``"data/"``, or ``""``) that has a file. Raises ``UserError`` where none does."""
        if found := self.find(*(root + name for root in roots)):
            return found.removesuffix(name)
        expected = f"expected {', '.join(self.archives)}, or a folder with what they hold"
        packed = [p for path in self.paths if path.is_dir() for p in sorted(path.iterdir()) if p.suffix in ARCHIVES]
        hint = f"; pass an archive by its own name: --from {packed[0]}" if packed else ""
        raise UserError(f"{name} is not in {self}; {expected}{hint}")


def opened(path: Path, work: Path, md5: str, stack: contextlib.ExitStack) -> Part:
    """A folder or an archive. Raises ``UserError`` for anything else, and for an archive of another checksum."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        raise UserError(f"{path} is neither a folder nor a file; {nearest(path.name, os.listdir(folder))}")
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        if md5 and (found := hashlib.file_digest(file, "md5").hexdigest()) != md5:
            raise UserError(f"{path} has the MD5 {found}, expected {md5}: download it again; nothing was written")
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return Zip(path, stack)
    for head, unpack in UNPACK.items():
        if start.startswith(head):
            needed(work, path.stat().st_size)  # images hardly shrink, so it is about as large when unpacked
            plain = Path(tempfile.mkdtemp(dir=work), f"{path.name}.tar")
            with unpack(path) as packed, plain.open("wb") as file:
                shutil.copyfileobj(packed, file, 2**20)
            return Tar(plain, stack)
    return Tar(path, stack)


@contextlib.contextmanager
def told(what: object) -> Iterator[None]:
    """What goes wrong with a source becomes one line; a full disk stays the ``OSError`` that it is."""
    try:
        yield
    except DAMAGED as e:
        raise UserError(f"{what} is damaged or cut short ({e or type(e).__name__}); download it again") from None
    except RuntimeError as e:  # of a zip with a password
        raise UserError(f"{what} cannot be read: {e}") from None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{what} cannot be read: {e.strerror or e}") from None


def inside(name: str, where: object) -> str:
    """The name of a file. Raises ``UserError`` for one that leads out of the data set."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise UserError(f"{where} names the file {name!a}, which is outside of the data set, so nothing of it is read")
    return name


def needed(work: Path, size: int) -> None:
    """Raise ``UserError`` unless ``size`` bytes are free where ``work`` is."""
    free = shutil.disk_usage(work).free
    if size > free:
        raise UserError(
            f"{work.parent}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; set MIXUP_RECIPES_CACHE to a folder "
            "on a larger disk"
        )
