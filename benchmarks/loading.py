"""Images a second from files to a normalised batch, beside timm's loader, as ratios measured in one run.

    python benchmarks/loading.py

JPEGs of 500 x 375 pixels and about 100 KB are made, in one class folder, and read by one loader process each:
RandomResizedCrop and flip; the same with RandAugment and random erasing; and the evaluation's resize and centre crop,
at 224 pixels. Ours runs with both values of the recipe's ``pixels``. All take turns; a ratio is that of the medians.
Prints Markdown.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor

from mixup_recipes.data import images, keys
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.splits import load_splits
from mixup_recipes.resolve import load_recipe

BATCH, WORKERS = 64, 1
POLICY = "rand-m9-inc1"  # with a spread timm's posterise asks Pillow 13 for 0 bits, which is an error
KINDS = ("crop and flip", "with RandAugment and erasing", "evaluation")
CPU = torch.device("cpu")


def main() -> None:
    """A row for each kind of transform."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        size = make(Path(folder), args.images)
        print(f"| {args.images} JPEGs of {size / 1000:.0f} KB, images/s | timm | ours, v1 | ours, v2 | v2 / timm |")
        print("|---|---:|---:|---:|---:|")
        for kind in KINDS:
            ways = {"timm": timms(folder, kind)} | {p: ours(folder, kind, p) for p in ("v1", "v2")}
            speeds: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(args.repeats + 1):
                for name, batches in ways.items():
                    speed = images_per_second(batches)
                    speeds[name] += [speed] if turn else []  # the first turn warms up
            middle = {name: statistics.median(found) for name, found in speeds.items()}
            cells = [f"{v:.0f} ({min(speeds[n]):.0f} to {max(speeds[n]):.0f})" for n, v in middle.items()]
            print(f"| {kind} | {' | '.join(cells)} | {middle['v2'] / middle['timm']:.2f} |", flush=True)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    print(f"\nMedian (range) of {args.repeats}; {WORKERS} loader process, batches of {BATCH}; {versions}.")


def make(folder: Path, number: int) -> float:
    """Smooth random pictures with some noise, half for training and the same for evaluation; bytes of one."""
    rng, sizes = np.random.default_rng(0), []
    for i in range(number):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(float)
        pixels = (picture + rng.normal(0, 14, picture.shape)).clip(0, 255).astype(np.uint8)
        for split in ("train", "validation"):
            path = folder / split / "one" / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=93)
        sizes.append(path.stat().st_size)
    return statistics.fmean(sizes)


def images_per_second(batches: Callable[[], Iterator[Tensor]]) -> float:
    """Of one pass, from the first batch to the last: what a start of processes costs is not counted."""
    found, began, seen = batches(), 0.0, 0
    for i, x in enumerate(found):
        if i == 0:
            began = time.perf_counter()
        else:
            seen += len(x)
    return seen / (time.perf_counter() - began)


def ours(folder: str, kind: str, pixels: str) -> Callable[[], Iterator[Tensor]]:
    """The product's own loader, normalising and erasing."""
    aa, reprob = (POLICY, 0.25) if "RandAugment" in kind else (None, 0.0)
    given: dict[str, Any] = {"aa": aa, "reprob": reprob, "pixels": pixels, "num_classes": 1, "drop_last": True}
    sizes = {"batch_size": BATCH, "per_device_train_batch_size": BATCH, "epochs": 1, "warmup_epochs": 0}
    recipe = load_recipe("r50_100e_vanilla", dataset=folder, **given, **sizes)
    splits = load_splits(recipe)

    def train() -> Iterator[Tensor]:
        samples = Samples(splits.train, recipe, images.TrainTransform(recipe))
        order = TrainOrder(len(samples), recipe, 0, 1)
        for number, batch in enumerate(samples.train_batches(order, WORKERS, CPU)):
            x = images.normalise(batch[0], recipe, CPU)
            rng = keys.rng(0, number)
            yield images.erase(x, recipe.reprob, recipe.remode, rng, recipe.pixels) if recipe.reprob else x

    def evaluation() -> Iterator[Tensor]:
        samples = Samples(splits.eval, recipe, images.EvalTransform.of(recipe))
        for batch in samples.eval_batches(0, 1, BATCH, WORKERS, CPU):
            yield images.normalise(batch[0], recipe, CPU)

    return evaluation if kind == "evaluation" else train


def timms(folder: str, kind: str) -> Callable[[], Iterator[Tensor]]:
    """timm's loader as its training script calls it, with its prefetcher."""
    train = kind != "evaluation"
    dataset = create_dataset("", f"{folder}/{'train' if train else 'validation'}")
    augmented: dict[str, Any] = {"auto_augment": POLICY, "re_prob": 0.25, "re_mode": "pixel"}

    def batches() -> Iterator[Tensor]:
        loader = create_loader(
            dataset, (3, 224, 224), BATCH, is_training=train, num_workers=WORKERS, device=CPU, interpolation="bicubic",
            crop_pct=0.875, color_jitter=0.0, persistent_workers=False,
            **(augmented if "RandAugment" in kind else {}),
        )  # fmt: skip
        for x, _ in loader:
            yield x

    return batches


if __name__ == "__main__":
    main()
