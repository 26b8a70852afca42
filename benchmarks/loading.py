"""Images a second from files to a normalised batch, beside timm's loader, as ratios measured in one run.

    python benchmarks/loading.py
    python benchmarks/loading.py --formats jpeg png webp --out loading.md
    python benchmarks/loading.py --sides 4000 3000 --images 192 --repeats 3 --kinds "crop and flip"

Pictures of 500 x 375 pixels (a JPEG has about 100 KB) are made, in one class folder, and read by one loader process
each: RandomResizedCrop and flip; the same with RandAugment and random erasing; and the evaluation's resize and centre
crop, at 224 pixels. Ours runs with both values of the recipe's ``pixels``. All take turns; a ratio is that of the
medians. Prints Markdown, and writes it to ``--out`` with the command, the day and the processor.
"""

import argparse
import datetime
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image
from timm.data import add_img_extensions, create_dataset, create_loader
from torch import Tensor

from mixup_recipes.data import images, keys
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.splits import load_splits
from mixup_recipes.resolve import load_recipe

BATCH, WORKERS = 64, 1
POLICY = "rand-m9-inc1"  # with a spread timm's posterise asks Pillow 13 for 0 bits, which is an error
FORMATS: dict[str, dict[str, Any]] = {"jpeg": {"quality": 93}, "png": {}, "webp": {"quality": 90}}
"""How pictures are written."""
KINDS = ("crop and flip", "with RandAugment and erasing", "evaluation")
CPU = torch.device("cpu")


def main() -> None:
    """A table for each format, with a row for each kind of transform."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["jpeg"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--sides", nargs=2, type=int, default=[500, 375], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--out", type=Path, help="a file for the record")
    args = parser.parse_args()
    if args.images < 3 * BATCH:
        parser.error(f"--images: expected at least {3 * BATCH}, three batches, got {args.images}")
    torch.set_num_threads(1)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    for format in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            size = make(Path(folder), args.images, format, tuple(args.sides))
            what = f"{args.images} {format.upper()}s of {args.sides[0]} x {args.sides[1]}, {size / 1000:.0f} KB"
            say(f"| {what}, images/s | timm | ours, v1 | ours, v2 | v2 / timm |")
            say("|---|---:|---:|---:|---:|")
            for kind in args.kinds:
                say(row(folder, kind, args.repeats))
            say("")
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    versions += f", Pillow {PIL.__version__}"
    say(f"Median (range) of {args.repeats}; {WORKERS} loader process, batches of {BATCH}; {versions}.")
    if args.out:
        day, machine = datetime.date.today(), f"{processor()}, {os.cpu_count()} cores"
        args.out.write_text("\n".join([f"`{' '.join(['python', *sys.argv])}`, {day}, {machine}:", "", *lines, ""]))


def row(folder: str, kind: str, repeats: int) -> str:
    """The row of a kind of transform."""
    ways = {"timm": timms(folder, kind)} | {p: ours(folder, kind, p) for p in ("v1", "v2")}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, batches in ways.items():
            speed = images_per_second(batches)
            speeds[name] += [speed] if turn else []  # the first turn warms up
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    cells = [f"{v:.0f} ({min(speeds[n]):.0f} to {max(speeds[n]):.0f})" for n, v in middle.items()]
    return f"| {kind} | {' | '.join(cells)} | {middle['v2'] / middle['timm']:.2f} |"


def processor() -> str:
    """The name of this machine's processor."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def make(folder: Path, number: int, format: str, sides: tuple[int, int]) -> float:
    """Smooth random pictures with some noise, half for training and the same for evaluation; bytes of one."""
    rng, sizes = np.random.default_rng(0), []
    for i in range(number):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = np.asarray(small.resize(sides, Image.Resampling.BICUBIC)).astype(np.float32)
        picture += rng.standard_normal(picture.shape, np.float32) * 14
        pixels = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        content = io.BytesIO()
        pixels.save(content, format, **FORMATS[format])
        for split in ("train", "validation"):
            path = folder / split / "one" / f"{i:05}.{format}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.getvalue())
        sizes.append(path.stat().st_size)
    return statistics.fmean(sizes)


def images_per_second(batches: Callable[[], Iterator[Tensor]]) -> float:
    """Of one pass, from the first batch to the last but one.

    What a start of processes costs is not counted. timm's prefetcher hands out a batch when the next one is there, and
    the last one at once: with it timm would be given a batch that took no time.
    """
    times, sizes = [], []
    for x in batches():
        times.append(time.perf_counter())
        sizes.append(len(x))
    return sum(sizes[1:-1]) / (times[-2] - times[0])


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
    add_img_extensions(".webp")  # which its folders leave out
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
