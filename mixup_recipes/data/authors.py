"""Data sets as their authors distribute them: which files are a split, and what their classes are called.

Each function reads the lists of one layout and gives a ``Listing``; ``write`` holds it against what the authors publish
and writes it in the Hub's layout, in the order of the authors' lists. Images keep their bytes; those of CIFAR's binary
files, which are bare pixels, become PNG. Names of classes stay the authors'.
"""

import contextlib
import functools
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from mixup_recipes.data.identity import SHOWN, some
from mixup_recipes.data.known import PUBLISHED, Published
from mixup_recipes.data.shards import Row, write_split
from mixup_recipes.data.source import Source, needed
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

Key = TypeVar("Key", bound=Hashable)
CARD = """\
---
pretty_name: {title}
task_categories: [image-classification]
configs:
- config_name: default
  data_files:
{files}
---

# {title}

{counts}; {classes}. {images} The names of the classes are the authors'. The authors' terms hold: {page}

{citation} This set was written by `mixup-recipes prepare {name}`.
"""
KEPT = "Each image is the authors' file, byte for byte, in the order of their lists."
MADE = "Each image is a PNG of the authors' pixels, in their order."


class Listing(NamedTuple):
    """What a data set is by the authors' lists."""

    names: list[str]
    """Of the classes, in the order of their numbers."""
    rows: Mapping[str, Iterable[tuple[str, int]]]
    """Split -> file and label of each image; it is read several times."""
    size: Callable[[str], int | None]
    """The bytes of a file; None where it is missing."""
    read: Callable[[str], bytes]
    """The encoded image of a file."""
    images: str = KEPT
    """What the images are, in words."""


class Authors(NamedTuple):
    """A data set, where its authors have it, and how it is read."""

    title: str
    page: str
    archives: dict[str, str]
    """What is to be downloaded -> its MD5, empty where none is published."""
    layout: Callable[[Source], Listing]
    citation: str


class Lines:
    """A list of files and labels that is too long to be held as anything but its text."""

    def __init__(self, source: Source, list_name: str, root: str, labels: Mapping[str, int]):
        self.text, self.name, self.root, self.labels = source.read(list_name), list_name, root, labels

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for path, label in pairs(self.text, self.name, last=True):
            yield self.root + path, of(self.labels, label, self.name, "class")


def pairs(text: bytes, name: str, last: bool = False) -> Iterator[tuple[str, str]]:
    """The first word of each line and the rest of it; with ``last`` what stands before the last word, and that."""
    for number, line in enumerate(io.BytesIO(text), 1):
        words = line.decode(errors="replace").strip()
        parts = words.rsplit(None, 1) if last else words.split(None, 1)
        if len(parts) == 2:
            yield parts[0], parts[1]
        elif parts:
            raise UserError(f"{name}, line {number}: expected two words, got {words[:80]!r}")


def lines(text: bytes) -> list[str]:
    """The lines of a text that are not empty."""
    return [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]


def of(table: Mapping[Key, int], key: Key, where: str, what: str) -> int:
    """A value of a table. Raises ``UserError`` for a key that is not there."""
    if key not in table:
        raise UserError(f"{where}: unknown {what} {key!r}; {nearest(str(key), map(str, table))}")
    return table[key]


def cub200(source: Source) -> Listing:
    """Caltech-UCSD Birds: tables by the number of an image; the split is 1 for training and 0 for test."""
    root = source.root("images.txt", "", "CUB_200_2011/")
    lists = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    files, labels, split, classes = (dict(pairs(source.read(root + name), name)) for name in lists)
    for name, table in zip(lists[1:], (labels, split), strict=False):
        if lacking := sorted(files.keys() ^ table.keys()):
            raise UserError(f"{source}: images.txt and {name} do not name the same images: {some(lacking)}")
    place = {number: i for i, number in enumerate(classes)}
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for image, path in files.items():
        label = of(place, labels[image], lists[1], "class")
        rows["train" if split[image] == "1" else "test"].append((f"{root}images/{path}", label))
    return Listing([*classes.values()], rows, source.size, source.read)


def aircraft(source: Source) -> Listing:
    """FGVC-Aircraft by its variants, whose names may have spaces and slashes; ``train`` is the authors' trainval."""
    root = source.root("variants.txt", "", "data/", "fgvc-aircraft-2013b/data/")
    names = lines(source.read(f"{root}variants.txt"))
    place = {name: i for i, name in enumerate(names)}
    rows = {}
    for split, part in (("train", "trainval"), ("test", "test")):
        name = f"images_variant_{part}.txt"
        images = pairs(source.read(root + name), name)
        rows[split] = [(f"{root}images/{image}.jpg", of(place, words, name, "variant")) for image, words in images]
    return Listing(names, rows, source.size, source.read)


def inat(year: int, source: Source) -> Listing:
    """iNaturalist: lists in COCO's form; the classes are in the order of the categories' ids.

    Where ``categories.json`` is given too, in which the authors tell the names that the lists of 2018 hide, those of
    2018 are from there. A name that is there twice has its supercategory in front.
    """
    rows: dict[str, list[tuple[str, int]]] = {}
    names: list[str] = []
    places: dict[int, int] = {}
    for split, part in (("train", "train"), ("validation", "val")):
        name = f"{part}{year}.json"
        root = source.root(name, "", f"train_val{year}/")
        try:
            lists = json.loads(source.read(root + name))
            if not names:
                told = source.find("categories.json", f"{root}categories.json") if year == 2018 else None
                known = {c["id"]: c for c in (json.loads(source.read(told)) if told else lists["categories"])}
                kinds = [known[number] for number in sorted(c["id"] for c in lists["categories"])]
                twice = {word for word, times in Counter(kind["name"] for kind in kinds).items() if times > 1}
                names = [f"{k['supercategory']}/{k['name']}" if k["name"] in twice else str(k["name"]) for k in kinds]
                places = {kind["id"]: i for i, kind in enumerate(kinds)}
            label = {a["image_id"]: a["category_id"] for a in lists["annotations"]}
            images = [(i["file_name"], label[i["id"]]) for i in lists["images"]]
        except (ValueError, LookupError, TypeError, RecursionError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f"{source}: {name} is not a list in COCO's form: {type(e).__name__} {e}") from None
        rows[split] = [(path, of(places, number, name, "category")) for path, number in images]
    return Listing(names, rows, source.size, source.read)


def places205(source: Source) -> Listing:
    """Places205: a line is a path and a label; a class is called like the folder of its images, ``a/abbey``."""
    lists = source.root("train_places205.csv", "", "trainvalsplit_places205/")
    name = f"{lists}train_places205.csv"
    folders: dict[int, str] = {}
    first = ""
    for path, label in pairs(source.read(name), name, last=True):
        first = first or path
        if label.isdecimal():
            folders.setdefault(int(label), path.rpartition("/")[0])
    if not first or sorted(folders) != [*range(len(folders))]:
        raise UserError(f"{name}: expected a path and a label, 0 to 204, in each line; some labels never occur")
    deep = "data/vision/torralba/deeplearning/images256/"
    root = source.root(first, deep, "images256/", "", f"imagesPlaces205_resize/{deep}")
    labels = {str(label): label for label in folders}
    splits = (("train", name), ("validation", f"{lists}val_places205.csv"))
    rows = {split: Lines(source, name, root, labels) for split, name in splits}
    return Listing([folders[label] for label in sorted(folders)], rows, source.size, source.read)


def cifar(sheets: dict[str, list[str]], folder: str, head: int, classes: str, source: Source) -> Listing:
    """CIFAR's binary version: records of ``head`` bytes, of which the last is the class, and 3 planes of 32 x 32.

    ``sheets``: the files of a split.
    """
    (first, *_), *_ = sheets.values()
    root = source.root(first, "", f"{folder}/")
    names = lines(source.read(root + classes))
    records: dict[str, np.ndarray] = {}
    rows: dict[str, list[tuple[str, int]]] = {}
    for split, files in sheets.items():
        data, length = b"".join(source.read(root + file) for file in files), head + 3072
        if len(data) % length:
            raise UserError(
                f"{source}: {', '.join(files)} have {len(data):,} bytes, which is not a multiple of {length:,}"
            )
        table = np.frombuffer(data, np.uint8).reshape(-1, length)
        rows[split] = [(f"{split}-{i:05d}.png", int(label)) for i, label in enumerate(table[:, head - 1])]
        if (most := max(table[:, head - 1], default=0)) >= len(names):
            raise UserError(f"{source}: {', '.join(files)} have the label {most}, but {classes} has {len(names)} names")
        records |= {path: pixels for (path, _), pixels in zip(rows[split], table[:, head:], strict=True)}

    def read(path: str) -> bytes:
        return png(records[path].reshape(3, 32, 32).transpose(1, 2, 0))

    return Listing(names, rows, lambda path: records[path].size, read, MADE)


def png(pixels: np.ndarray) -> bytes:
    """Pixels (H, W, 3) as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


TINY = "Alex Krizhevsky. Learning multiple layers of features from tiny images. 2009."
INAT = "Van Horn et al. The iNaturalist Species Classification and Detection Dataset. CVPR 2018."
BATCHES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
BINARY = {"train": ["train.bin"], "test": ["test.bin"]}
AUTHORS = {
    "cifar10": Authors(
        "CIFAR-10", "https://www.cs.toronto.edu/~kriz/cifar.html",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        functools.partial(cifar, BATCHES, "cifar-10-batches-bin", 1, "batches.meta.txt"), TINY,
    ),
    "cifar100": Authors(
        "CIFAR-100", "https://www.cs.toronto.edu/~kriz/cifar.html",
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        functools.partial(cifar, BINARY, "cifar-100-binary", 2, "fine_label_names.txt"), TINY,
    ),
    "cub200": Authors(
        "CUB-200-2011", "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        {"CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78"}, cub200,
        "Wah, Branson, Welinder, Perona, Belongie. The Caltech-UCSD Birds-200-2011 Dataset. CNS-TR-2011-001, 2011.",
    ),
    "aircraft": Authors(
        "FGVC-Aircraft 2013b", "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        {"fgvc-aircraft-2013b.tar.gz": "d4acdd33327262359767eeaa97a4f732"}, aircraft,
        "Maji, Kannala, Rahtu, Blaschko, Vedaldi. Fine-Grained Visual Classification of Aircraft. 2013.",
    ),
    "inat2017": Authors(
        "iNaturalist 2017", "https://github.com/visipedia/inat_comp/tree/master/2017",
        {"train_val_images.tar.gz": "7c784ea5e424efaec655bd392f87301f", "train_val2017.zip": ""},
        functools.partial(inat, 2017), INAT,
    ),
    "inat2018": Authors(
        "iNaturalist 2018", "https://github.com/visipedia/inat_comp/tree/master/2018",
        {
            "train_val2018.tar.gz": "b1c6952ce38f31868cc50ea72d066cc3",
            "train2018.json.tar.gz": "bfa29d89d629cbf04d826a720c0a68b0",
            "val2018.json.tar.gz": "f2ed8bfe3e9901cdefceb4e53cd3775d",
        },
        functools.partial(inat, 2018), INAT,
    ),
    "places205": Authors(
        "Places205", "http://places.csail.mit.edu/downloadData.html",
        {"imagesPlaces205_resize.tar.gz": "", "trainvalsplit_places205.tar.gz": ""}, places205,
        "Zhou, Lapedriza, Xiao, Torralba, Oliva. Learning Deep Features for Scene Recognition using Places Database. "
        "NeurIPS 2014.",
    ),
}  # fmt: skip


def write(name: str, paths: Sequence[Path], work: Path) -> None:
    """Write ``work/name`` from what the authors distribute.

    Raises ``UserError`` before anything of it is written: for other counts than theirs, missing files, too little room.
    """
    with contextlib.ExitStack() as stack:
        source = Source(paths, work, AUTHORS[name].archives, stack)
        listing = AUTHORS[name].layout(source)
        check_counts(name, listing.names, {split: sum(1 for _ in rows) for split, rows in listing.rows.items()})
        size = check_files(name, listing, source)
        needed(work, size)
        print(f"{name}: writing {size / 1e9:.1f} GB to {work.parent}", file=sys.stderr, flush=True)
        for split, rows in listing.rows.items():
            images = (Row(path.rpartition("/")[2], label, listing.read(path)) for path, label in rows)
            write_split(work / name, split, listing.names, images)
        write_card(name, work / name, listing.images)


def check_files(name: str, listing: Listing, source: Source) -> int:
    """The bytes of all images. Raises ``UserError`` unless all of them are there."""
    size, missing = 0, 0
    shown: list[str] = []
    for path, _ in itertools.chain(*listing.rows.values()):
        if (found := listing.size(path)) is None:
            missing += 1
            shown += [path] * (missing <= SHOWN)
        size += found or 0
    if missing:
        words = many(missing, f"image of {name} is", f"images of {name} are")
        more = f", and {missing - SHOWN:,} more" * (missing > SHOWN)
        raise UserError(f"{source}: {words} missing: {', '.join(shown)}{more}")
    return size


def check_counts(name: str, names: Sequence[object], found: dict[str, int]) -> None:
    """Raise ``UserError`` unless there are as many images and classes as published, and class names are names."""
    published = PUBLISHED[name]
    here, wanted = (
        ", ".join([many(classes, "class"), *(many(n, f"image of {k}", f"images of {k}") for k, n in splits.items())])
        for classes, splits in (Published(len(names), found), published)
    )
    if here != wanted:
        raise UserError(f"{name}: expected {wanted}, got {here}; nothing was written; is this copy complete?")
    strange = [n for n in names if not isinstance(n, str) or not n.isprintable() or not n.strip("./ ")]
    if strange := strange or [n for n, times in Counter(names).items() if times > 1]:
        raise UserError(
            f"{name}: names of classes must be words, and each must be there once: {some([repr(n) for n in strange])}"
        )


def write_card(name: str, folder: Path, images: str) -> None:
    """Write ``folder/README.md``. ``images``: what they are, in words."""
    authors, published = AUTHORS[name], PUBLISHED[name]
    text = CARD.format(
        name=name,
        title=authors.title,
        files="\n".join(f"  - {{split: {split}, path: data/{split}-*}}" for split in published.splits),
        counts=", ".join(f"{n:,} images of {split}" for split, n in published.splits.items()),
        classes=many(published.classes, "class"),
        images=images,
        page=authors.page,
        citation=authors.citation,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
