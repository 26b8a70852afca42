"""Where a table comes from, and the files that its rows name instead of holding an image.

A row is a stranger's. It may name files of its own data set only: of its folder, or of its repository on the Hub at the
commit that is read. Such a name is relative to the folder of the table, else to that of the data set; a whole address
of the repository is one too. No other file is opened, whatever a row says.
"""

import contextlib
import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import hf_hub_url
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from mixup_recipes.data import zips
from mixup_recipes.data.decoding import LARGEST_FILE, BadImage, open_regular, read
from mixup_recipes.hub_errors import reason
from mixup_recipes.typed import RankError

REPOSITORY = re.compile(r"hf://datasets/([^@\n]+)@([0-9a-f]{40})(?=/|$)")
LONGEST = 4096  # characters of a path
TIMEOUT = 10.0  # seconds without a byte, after which the client asks again


class Opened(NamedTuple):
    """A split as it was found."""

    table: Any
    fingerprint: str | None
    notes: list[str]
    ours: bool = False
    """Whether images are the paths or addresses of files that we, or ``datasets``, found ourselves."""
    whole: bool = False
    """Whether these are the rows of all data, which have one split."""


class Origin(NamedTuple):
    """A data set's own place. Rows may name what is in it."""

    root: str
    """Its folder, or its repository at one commit: ``hf://datasets/owner/name@commit``."""
    beside: str
    """The folder of the split's tables, ``root`` where they are in several."""


def note_files(table: Any, files: Iterable[str], folder: str | None = None) -> None:
    """Note in a table's info what files it was made from; ``folder``: of a data set on this machine.

    It stays there when rows and columns are chosen.
    """
    table.info.download_checksums = dict.fromkeys(([] if folder is None else [f"{folder}/"]) + [str(f) for f in files])


def with_column(table: datasets.Dataset, name: str, values: Any, feature: Any) -> datasets.Dataset:
    """A table with other values in a column; the order of its columns and what ``note_files`` noted stay."""
    files, order = files_of(table), table.column_names
    table = table.remove_columns(name).add_column(name, values, feature=feature).select_columns(order)
    note_files(table, files)
    return table


def files_of(table: Any) -> list[str]:
    """What ``note_files`` noted; ends with a slash: a folder."""
    return list(table.info.download_checksums or ())


def commit(table: Any) -> str | None:
    """The commit of the Hub that a table was read from."""
    files = files_of(table)
    found = REPOSITORY.match(files[0]) if files else None
    return found[2] if found else None


def origin(table: Any) -> Origin | None:
    """The place that a table comes from; None for one that was made in memory."""
    files = files_of(table)
    if not files:
        return None
    repository = REPOSITORY.match(files[0])
    root = repository[0] if repository else files[0].removesuffix("/")
    folders = {posixpath.dirname(file) for file in files if not file.endswith("/")}
    return Origin(root, folders.pop() if len(folders) == 1 else root)


def encoded(image: str | dict[str, Any] | None, at: Origin | None = None) -> bytes:
    """The bytes of a row's image, of the file that a table of our own names, or of one that is in the data set.

    ``at``: see ``origin``; without it no file that a row names is opened. Raises ``BadImage``, and ``RankError`` where
    the Hub cannot be reached.
    """
    if isinstance(image, str):
        if member := zips.ADDRESS.fullmatch(image):
            first, end, size = (int(member[part]) for part in ("first", "end", "size"))
            return zips.unpacked(content_between(member["zip"], first, end), size)
        return fetched(image) if REPOSITORY.match(image) else read(image)
    content: bytes | None = (image or {}).get("bytes")
    if content is not None:
        return content
    name = (image or {}).get("path")
    if not name:
        raise BadImage("no image")
    if at is None:
        raise BadImage("the row names a file instead of holding an image")
    return named(name, at)


def named(name: str, at: Origin) -> bytes:
    """The content of a file of the data set that a row names. Raises ``BadImage``, ``RankError``; see ``encoded``."""
    remote = REPOSITORY.match(at.root)
    if remote and name.startswith(f"{at.root}/"):
        places, name = [at.root], name.removeprefix(f"{at.root}/")
    else:
        places = list(dict.fromkeys((at.beside, at.root)))
    if not inside(name):
        raise BadImage("the row names a file outside of the data set")
    for place in places:
        address = f"{place}/{posixpath.normpath(name)}"
        if remote:
            with contextlib.suppress(FileNotFoundError):
                return content_of(address)
        else:
            real, root = os.path.realpath(address), os.path.realpath(at.root)
            if os.path.commonpath((real, root)) != root:
                raise BadImage("the row names a file outside of the data set, by a link")
            if os.path.lexists(real):
                return read(real)
    raise BadImage(f"the row names a file that is not there: {ascii(name)[:200]}")


def inside(name: str) -> bool:
    """Whether a name is a path that leads nowhere but down, and of a length that systems take."""
    parts = {*name.split("/")} - {"", "."}
    strange = name.startswith("/") or "://" in name or "\0" in name or ".." in parts or len(name) > LONGEST
    return bool(parts) and not strange


def within(path: str | None, root: str) -> bool:
    """Whether a path or address lies in a folder or repository."""
    return path is not None and path.startswith(f"{root}/") and inside(path.removeprefix(f"{root}/"))


def fetched(address: str) -> bytes:
    """The content of a file of the Hub. Raises ``BadImage``, and ``RankError`` where the Hub cannot be reached."""
    try:
        return content_of(address)
    except FileNotFoundError:
        raise BadImage("no such file in the repository") from None


def content_between(path: str, first: int, end: int) -> bytes:
    """Some bytes of a file, or of a file of the Hub. Raises as ``fetched``."""
    if not 0 < end - first <= LARGEST_FILE:
        raise BadImage(f"{end - first:,} bytes of a zip; expected 1 to {LARGEST_FILE:,}")
    try:
        if REPOSITORY.match(path):
            return content_of(path, first, end - 1)
        with open_regular(path) as file:
            file.seek(first)
            return file.read(end - first)
    except OSError as e:
        raise BadImage(f"{path}: {e.strerror or 'no such file in the repository'}") from None


def content_of(address: str, first: int = 0, last: int = LARGEST_FILE) -> bytes:
    """The bytes of a file of the Hub, of one range. Raises as ``fetched``, and ``FileNotFoundError``."""
    place = REPOSITORY.match(address)
    assert place is not None
    url = hf_hub_url(place[1], address[place.end() + 1 :], repo_type="dataset", revision=place[2])
    headers = build_hf_headers() | {"Range": f"bytes={first}-{last}"}
    try:  # one request, where HfFileSystem would list the folder first
        answer = http_backoff("GET", url, headers=headers, timeout=TIMEOUT)
        if answer.status_code == 416:  # there is no first byte
            return b""
        hf_raise_for_status(answer)
        content = answer.content
    except RemoteEntryNotFoundError:
        raise FileNotFoundError(address) from None
    except Exception as e:  # of one of the libraries below, after its own retries
        raise RankError(
            f"cannot continue reading {address}: {reason(e)}; continue later with --resume_from_checkpoint auto"
        ) from None
    if len(content) > LARGEST_FILE:
        raise BadImage(f"more than {LARGEST_FILE:,} bytes")
    return content


def named_files(images: pa.ChunkedArray) -> Sequence[str]:
    """The names in those rows of a column of bytes and path that hold no image."""
    without = pc.is_null(pc.struct_field(images, "bytes"))
    return [name for name in pc.struct_field(images, "path").filter(without).to_pylist() if name]


def with_named(fingerprint: str | None, table: Any, column: str) -> str | None:
    """A local table's fingerprint, which is also that of the names and sizes of the files that its rows name."""
    at = origin(table)
    if not isinstance(table, datasets.Dataset) or at is None or REPOSITORY.match(at.root):
        return fingerprint
    names = named_files(table.data.column(column))
    if not names:
        return fingerprint
    digest = hashlib.sha256((fingerprint or "").encode())
    for name in names:
        digest.update(f"{name}\0{named_size(name, at)}\n".encode(errors="replace"))
    return digest.hexdigest()


def named_size(name: str, at: Origin) -> int | None:
    """The bytes of a file of a local data set that a row names; None where there is none."""
    sizes = [size(f"{place}/{name}") for place in (at.beside, at.root)] if inside(name) else []
    return next((s for s in sizes if s is not None), None)


def size(path: str) -> int | None:
    """The bytes of a file, packed ones of one in a zip; None where there is none."""
    if member := zips.ADDRESS.fullmatch(path):
        return int(member["size"])
    try:
        return os.stat(path).st_size
    except OSError:
        return None
