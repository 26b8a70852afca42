"""How long a data set takes to open, the first time and again, and what memory it takes, also in loader processes.

    python benchmarks/opening.py                       # a folder of 100,000 files in 100 classes, beside torchvision
    python benchmarks/opening.py --images 1281167 --classes 1000
    python benchmarks/opening.py --parquet --images 1281167 --classes 1000

The files hold the same tiny JPEG, or the rows of parquet files do: opening decodes none of them. They have just been
written, so that the file system has them in memory, also the first time. Best of ``--repeats``, interleaved; peak
memory is that of the process itself. Then ``--workers`` loader processes read ``--batches`` batches of 64 images, here
and there in the whole set; what each of them holds is the memory that it has written itself (private and dirty),
without pages that it shares with the process that trains, and without those of mapped files, which the system takes
back.
"""

import argparse
import io
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from mixup_recipes.data import images
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.splits import load_splits
from mixup_recipes.resolve import load_recipe

BATCH, SHARD = 64, 25_000  # rows of a parquet file


def main() -> None:
    """Print a line for each thing measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parquet", action="store_true", help="parquet files in place of a folder per class")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        datasets.config.HF_DATASETS_CACHE = Path(root) / "cache"
        folder = Path(root) / "data"
        (make_parquet if args.parquet else make)(folder, args.images, args.classes)
        sizes = {"image_size": 32, "batch_size": BATCH, "per_device_train_batch_size": BATCH}
        recipe = load_recipe(
            "finetune_vanilla", dataset=str(folder), eval_split="val", num_classes=args.classes, **sizes
        )
        first = seconds(lambda: load_splits(recipe))
        ours, theirs = [], []
        for _ in range(args.repeats):
            if not args.parquet:
                theirs.append(seconds(lambda: [ImageFolder(f"{folder}/{split}") for split in ("train", "val")]))
            ours.append(seconds(lambda: load_splits(recipe)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        said = f"{args.images:,} images in {args.classes:,} classes, seconds: first {first:.2f}, again {min(ours):.2f}"
        print(f"{said}; peak {peak:.2f} GB")
        if theirs:
            print(f"torchvision's ImageFolder {min(theirs):.2f} (ratio {min(ours) / min(theirs):.2f})")
        samples = Samples(load_splits(recipe).train, recipe, images.TrainTransform(recipe))
        held = memory(samples, TrainOrder(len(samples), recipe, 0, 1), args.workers, args.batches)
        words = ", ".join(f"{after / 1e6:.0f} ({before / 1e6:.0f} after the first batch)" for before, after in held)
        print(f"memory of each loader process after {args.batches} batches, in MB: {words}")


def picture() -> bytes:
    """A JPEG of 16 x 16 pixels."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 60)).save(content, "jpeg")
    return content.getvalue()


def make(folder: Path, number: int, classes: int) -> None:
    """``<split>/<class>/<image>``: all images to train on, and one of each class to evaluate on."""
    content = picture()
    for split, n in (("train", number), ("val", classes)):
        for k in range(classes):
            place = folder / split / f"class{k:04}"
            place.mkdir(parents=True)
            for i in range(k, n, classes):
                (place / f"{i:08}.jpg").write_bytes(content)


def make_parquet(folder: Path, number: int, classes: int) -> None:
    """The same as files of the Hub's layout, ``data/train-00000-of-00052.parquet``, with a kilobyte for each image."""
    (folder / "data").mkdir(parents=True)
    names = datasets.ClassLabel(names=[f"class{k:04}" for k in range(classes)])
    schema = datasets.Features({"image": datasets.Image(), "label": names}).arrow_schema
    content = picture().ljust(1000, b"\0")  # what stands behind the end of a JPEG is no part of it
    for split, n in (("train", number), ("val", classes)):
        starts = range(0, n, SHARD)
        for shard, start in enumerate(starts):
            rows = range(start, min(start + SHARD, n))
            struct = [{"bytes": content + i.to_bytes(8), "path": f"{i:08}.jpg"} for i in rows]  # no two are equal
            table = pa.table({"image": struct, "label": [i % classes for i in rows]}, schema=schema)
            name = f"{split}-{shard:05}-of-{len(starts):05}.parquet"
            pq.write_table(table, folder / "data" / name, row_group_size=100, compression="none")


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memory(samples: Samples, order: TrainOrder, workers: int, batches: int) -> np.ndarray:
    """Bytes that each loader process has written after its first batch and after all, (workers, 2)."""
    found = {}
    children = psutil.Process().children
    before = {child.pid for child in children()}
    for number, _ in enumerate(samples.train_batches(order, workers, torch.device("cpu"))):
        if number in (workers - 1, batches - 1):
            own = [child for child in children() if child.pid not in before]
            found[number] = [sum(part.private_dirty for part in child.memory_maps()) for child in own]
        if number == batches - 1:
            break
    return np.array([found[workers - 1], found[batches - 1]]).T


if __name__ == "__main__":
    main()
