"""A folder of images as a table: one scan, in which every file is taken or counted by its reason.

- A folder's first level is splits, ``<split>/<class>/<image>``, when each of its folders is called like a split
  (``SPLITS``, or the recipe's own names) and holds folders, or when the recipe's own splits are among them.
- It is classes, ``<class>/<image>``, when none of its folders is called like a split and holds folders. Such a data
  set has one split, as has one with a folder for training alone, or with one for tests beside it.
- Below a split the first level is classes, links included; every image below a class belongs to it, however deep.
- An image is a regular file with a suffix of ``SUFFIXES``, in any case, or one without a suffix that begins like an
  image. Everything else is left out and named; litter of operating systems and notebooks is not counted.
- Classes are sorted as text, as in torchvision and ``datasets``, and as numbers where all of them are. Images are
  sorted by their path.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from mixup_recipes.data.cache import cache_dir
from mixup_recipes.data.classes import natural
from mixup_recipes.data.identity import some
from mixup_recipes.files import write_into
from mixup_recipes.typed import UserError, nearest, printable

SPLITS = {"train", "val", "valid", "validation", "test"}
"""What the folder of a split is called, beside the names that the recipe says."""
SAME = {"validation": ("val", "valid"), "val": ("validation", "valid"), "valid": ("validation", "val")}
SAME |= {"test": ("val", "validation")}
"""Split -> folders that are taken where it has none of its own name; then the user is told."""
LITTER = {".ipynb_checkpoints", "__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini", ".git", ".cache"}
"""Of operating systems and notebooks, beside ``._*``: neither taken nor counted."""
SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".avif", ".tif", ".tiff", ".jp2", ".ppm",
    ".pgm", ".pbm", ".pnm",
}  # fmt: skip
"""Of the formats that ``decoding.decode`` opens."""
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|BM|II\*\0|MM\0\*|\0\0\0\x0cjP  |P[1-6]\s|RIFF....WEBP|....ftypavif", re.DOTALL
)


DAY = 86400
NOWHERE = (0, 0)


class Listing(NamedTuple):
    """The images of one split."""

    table: datasets.Dataset
    """Columns ``image``, the absolute path as text, and ``label``, whose feature has the names of the classes."""
    fingerprint: str
    """SHA-256 of relative paths and sizes in order."""
    notes: list[str]
    """What was left out, a line for each reason."""


class Entry(NamedTuple):
    """Something in a folder. ``kind``: folder, file, or why it is neither."""

    order: str
    """Its name, of a folder with the slash that follows in the paths below it: entries sort as those whole paths."""
    name: str
    path: str
    kind: str
    size: int
    place: tuple[int, int]
    """Device and inode of a folder: tells a link to one above."""


def is_litter(name: str) -> bool:
    """Whether a file or folder is there for an operating system or a notebook."""
    return name in LITTER or name.startswith("._")


def entries(folder: str | Path) -> list[Entry]:
    """What a folder holds but for litter, in the order of the whole paths below it. Links are what they lead to."""
    found = []
    with os.scandir(folder) as inside:
        for entry in inside:
            name = entry.name
            if is_litter(name):
                continue
            try:
                status = entry.stat()
            except OSError as e:
                why = "a broken link" if entry.is_symlink() else str(e.strerror).lower()
                found.append(Entry(name, name, entry.path, why, 0, NOWHERE))
                continue
            order, kind, place = name, "not a regular file", NOWHERE
            if stat.S_ISREG(status.st_mode):
                kind = "file"
            elif stat.S_ISDIR(status.st_mode):
                order, kind, place = f"{name}/", "folder", (status.st_dev, status.st_ino)
            found.append(Entry(order, name, entry.path, kind, status.st_size, place))
    return sorted(found)


def listing(directory: Path) -> Listing:
    """``scan``, once for all processes of a machine: the first one leaves its table in a file that the others map.

    Who finds no such file scans: the first process of a launch must have been here before the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return scan(directory)
    launch = [os.environ.get(k) for k in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
    key = hashlib.sha256(f"{os.path.abspath(directory)} {launch} {os.getppid()}".encode()).hexdigest()[:16]
    shared = cache_dir() / f"scan-{key}.arrow"
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK")) == "0":
        found = scan(directory)
        said = {"fingerprint": found.fingerprint, "notes": found.notes}
        table, sink = found.table.data.table, pa.BufferOutputStream()
        schema = table.schema.with_metadata(table.schema.metadata | {b"scan": json.dumps(said).encode()})
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(table)
        with contextlib.suppress(UserError, OSError):  # without it the others scan for themselves
            for old in cache_dir().glob("scan-*.arrow"):
                if time.time() - old.stat().st_mtime > DAY:  # of a process that was killed
                    old.unlink()
            write_into(shared, sink.getvalue())
            atexit.register(shared.unlink, missing_ok=True)
        return found
    if not shared.is_file():
        return scan(directory)
    table = datasets.Dataset.from_file(str(shared))
    said = json.loads(pa.ipc.open_stream(pa.memory_map(str(shared))).schema.metadata[b"scan"])
    return Listing(table, **said)


def split_folder(folder: Path, split: str, own: tuple[str, ...]) -> Path:
    """The folder of a split; ``own``: the recipe's splits. Raises ``UserError`` where there is none."""
    found = {e.name: e.path for e in entries(folder) if e.kind == "folder"}
    named = [name for name in found if name in SPLITS | {*own}]
    splits = [name for name in named if any(e.kind == "folder" for e in entries(found[name]))]

    def called(wanted: str) -> str | None:
        return next((name for name in (wanted, *SAME.get(wanted, ())) if name in splits), None)

    if (name := called(split)) and (len(splits) == len(found) or all(map(called, own))):
        return Path(found[name])
    if split in named and split not in splits:
        raise UserError(f"{found[split]} has no class folders; expected {split}/<class>/<image>")
    raise UserError(
        f"{folder} has no folder for split {split!r}; {nearest(split, found)} (expected <split>/<class>/<image>)"
    )


def undivided(folder: Path, own: tuple[str, str]) -> Path | None:
    """The folder of classes of a data set with one split, from which a hold-out is made; None for any other.

    ``own``: the recipe's splits, for training and evaluation. A split for tests may lie beside, unless it is evaluated
    on. Raises ``UserError`` for a folder whose data set lies one level deeper, and for one of classes alone where the
    evaluation split has a name of its own, which nothing there bears.
    """
    train, _ = own
    inside = [e for e in entries(folder) if e.kind == "folder"]
    below = {e.name: folders_in(e.path) for e in inside}
    splits = {name for name, folders in below.items() if name in SPLITS | {*own} and folders}
    if splits:
        return folder / train if splits == {*below} and alone(splits, own) else None
    if sets := [name for name, folders in below.items() if folders and {*folders} <= SPLITS]:
        place = folder / sets[0]
        raise UserError(f"{folder} holds data sets with splits of their own; pass one of them: --dataset {place}")
    if not has_images(folder):
        return None
    check_name(folder, own[1])
    return folder


def alone(splits: set[str], own: tuple[str, str]) -> bool:
    """Whether a data set has one split, for training, from which a hold-out is made; see ``undivided``.

    An evaluation split of a name of its own must be there.
    """
    train, evaluation = own
    return evaluation in SPLITS and train in splits and splits - {train} <= {"test"} - {evaluation}


def check_name(place: Path, split: str) -> None:
    """Raise ``UserError`` unless a split that is made of data without splits is called like one."""
    if split not in SPLITS:
        raise UserError(f"{place} has no split {split!r} and no folders for splits; {nearest(split, SPLITS)}")


def folders_in(path: str) -> list[str]:
    """The names of the folders in a folder, without a look at its files."""
    with os.scandir(path) as inside:
        return sorted(entry.name for entry in inside if entry.is_dir() and not is_litter(entry.name))


def beside(folder: Path, own: tuple[str, ...]) -> list[str]:
    """A note of the folders that are no split, where a folder has some beside its splits."""
    names = SPLITS | {*own}
    others = [shown(entry.name) for entry in entries(folder) if entry.kind == "folder" and entry.name not in names]
    return [f"{len(others):,} left out (folders that are not a split): {some(others)}"] if others else []


def scan(directory: Path) -> Listing:
    """The images of a split's folder. Raises ``UserError`` for one without classes, and for a class without images."""
    left_out: dict[str, list[str]] = {}
    classes, parts, digest = [], [], hashlib.sha256()
    root = os.path.abspath(directory)
    status = os.stat(root)
    for entry in entries(root):
        if entry.kind != "folder":
            left_out.setdefault("beside the class folders", []).append(shown(entry.name))
            continue
        if not encodable(entry.name):
            raise UserError(f"{directory}: the class folder {entry.name!a} has a name that is not UTF-8")
        inside = list(images_below(entry, entry.name, {entry.place, (status.st_dev, status.st_ino)}, left_out))
        digest.update("".join(f"{path}\0{size}\n" for path, size in inside).encode())
        classes.append(entry.name)
        parts.append(pa.array([f"{root}/{path}" for path, _ in inside], pa.large_string()))
    if not classes:
        raise UserError(f"{directory} has no class folders; expected {directory.name}/<class>/<image>")
    if not any(map(len, parts)):
        raise UserError(f"{directory} has no images; expected {directory.name}/<class>/<image>")
    if empty := [name for name, part in zip(classes, parts, strict=True) if not len(part)]:
        raise UserError(f"{directory}: class folders without an image: {some(empty)}; add images or remove the folders")
    names = sorted(classes, key=natural(classes))
    number = {name: i for i, name in enumerate(names)}
    labels = np.repeat([number[name] for name in classes], [len(part) for part in parts])
    features = datasets.Features({"image": datasets.Value("large_string"), "label": datasets.ClassLabel(names=names)})
    table = pa.table({"image": pa.concat_arrays(parts), "label": labels}, schema=features.arrow_schema)
    notes = [f"{len(found):,} left out ({why}): {some(found)}" for why, found in sorted(left_out.items())]
    return Listing(datasets.Dataset(table), digest.hexdigest(), notes)


def images_below(
    folder: Entry, name: str, seen: set[tuple[int, int]], left_out: dict[str, list[str]]
) -> Iterator[tuple[str, int]]:
    """Path, relative to the split, and bytes of each image; what is none is noted in ``left_out`` by its reason."""
    levels = [(name, iter(entries(folder.path)))]  # of our own: folders may lie deeper than Python calls functions
    while levels:
        above, inside = levels[-1]
        for entry in inside:
            path = f"{above}/{entry.name}"
            if not (path.isascii() or encodable(path)):
                left_out.setdefault("names that are not UTF-8", []).append(ascii(path))
            elif entry.kind == "folder" and entry.place in seen:
                left_out.setdefault("links to a folder that is read already", []).append(path)
            elif entry.kind == "folder":
                seen.add(entry.place)
                levels.append((path, iter(entries(entry.path))))
                break
            elif entry.kind != "file":
                left_out.setdefault(entry.kind, []).append(path)
            elif (suffix := suffix_of(entry.name)) in SUFFIXES or (not suffix and is_image(entry.path)):
                yield path, entry.size
            else:
                why = f"{printable(suffix)} files" if suffix else "not images by their content"
                left_out.setdefault(why, []).append(path)
        else:
            levels.pop()


def suffix_of(name: str) -> str:
    """``.jpg`` of ``1.JPG``, nothing of ``.jpg``: as ``os.path.splitext``, which takes five times as long."""
    head, dot, end = name.rpartition(".")
    return dot + end.lower() if head.strip(".") else ""


def has_images(directory: Path) -> bool:
    """Whether there is an image in a class folder."""
    folders = [entry for entry in entries(directory) if entry.kind == "folder"]
    return any(True for entry in folders for _ in images_below(entry, "", {entry.place}, {}))


def shown(name: str) -> str:
    """A file's name as text that can be printed."""
    return name if encodable(name) else ascii(name)


def encodable(path: str) -> bool:
    """Whether a name is text: Linux takes any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_image(path: str) -> bool:
    """Whether a file begins like an image."""
    try:
        with open(path, "rb") as file:
            return MAGIC.match(file.read(16)) is not None
    except OSError:
        return False
