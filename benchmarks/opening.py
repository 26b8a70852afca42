"""How long a folder of images takes to open, the first time and again, beside torchvision's listing of it.

    python benchmarks/opening.py                       # 100,000 files in 100 classes
    python benchmarks/opening.py --images 1281167 --classes 1000

The files hold no more than the first bytes of a JPEG: opening reads none of them. They have just been written, so that
the file system has them in memory, also the first time. Best of ``--repeats``, interleaved; peak memory is that of the
whole process.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torchvision.datasets import ImageFolder

from mixup_recipes.data.splits import load_splits
from mixup_recipes.resolve import load_recipe


def make(folder: Path, images: int, classes: int) -> None:
    """``<split>/<class>/<image>``: all but one image of each class to train on."""
    for split, number in (("train", images), ("val", classes)):
        for k in range(classes):
            place = folder / split / f"class{k:04}"
            place.mkdir(parents=True)
            for i in range(k, number, classes):
                (place / f"{i:08}.jpg").write_bytes(b"\xff\xd8\xff")


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Print a line for each way to open the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.images, args.classes)
        recipe = load_recipe("finetune_vanilla", dataset=folder)
        first = seconds(lambda: load_splits(recipe))
        ours, theirs = [], []
        for _ in range(args.repeats):
            theirs.append(seconds(lambda: [ImageFolder(f"{folder}/{split}") for split in ("train", "val")]))
            ours.append(seconds(lambda: load_splits(recipe)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{args.images:,} images in {args.classes:,} classes, seconds: first {first:.2f}, again {min(ours):.2f};")
    print(f"torchvision's ImageFolder {min(theirs):.2f} (ratio {min(ours) / min(theirs):.2f}); peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
