"""The whole job beside timm's train.py on the same photos: from the command to its end, as a ratio.

    python benchmarks/job.py --timm pytorch-image-models

``--timm``: a checkout of timm, of the version that is installed. Both train ResNet-10-T at 64 pixels for a few epochs
on JPEGs of 500 x 375 pixels in class folders, evaluate after each epoch and write checkpoints; without mixing, and with
Mixup and CutMix in turn. Each pair of commands is run several times in turns; ours with the loader processes that it
takes by itself, timm's with each number of ``--workers``, of which the fastest counts. Both run with PYTHONSAFEPATH, so
that timm's script takes the timm that is installed; so this project must be installed too. Prints Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from loading import make

BATCH, CLASSES = 64, 2
OURS = Path(__file__).parents[1] / "train_mixup.py"
MIXERS = {"vanilla": [], "deit": ["--mixup", "0.8", "--cutmix", "1.0"]}
"""Ours, and what timm's train.py calls the same."""


def main() -> None:
    """A row for each mixer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timm", type=Path, required=True, help="a checkout of timm, with its train.py")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        data, out = Path(root) / "data", Path(root) / "out"
        photos(data, args.images)
        print("| mixer | timm, s | ours, s | timm / ours | memory, timm / ours in MB |\n|---|---:|---:|---:|---:|")
        for mixer, flags in MIXERS.items():
            ways = {f"timm {n}": timms(args.timm, data, out, args.epochs, n, flags) for n in args.workers}
            ways |= {"ours": ours(data, out, args.epochs, mixer)}
            spent: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
            for turn in range(args.repeats):
                for name, command in ways.items():
                    spent[name].append(run([*command, str(out / f"{mixer}{name}{turn}".replace(" ", "-"))]))
            seconds = {name: statistics.median(s for s, _ in found) for name, found in spent.items()}
            theirs = min((name for name in ways if name != "ours"), key=seconds.__getitem__)
            cells = [f"{seconds[n]:.1f} ({min(spent[n])[0]:.1f} to {max(spent[n])[0]:.1f})" for n in (theirs, "ours")]
            memory = " / ".join(f"{max(m for _, m in spent[n])}" for n in (theirs, "ours"))
            ratio = seconds[theirs] / seconds["ours"]
            print(f"| {mixer} | {cells[0]}, {theirs[5:]} loaders | {cells[1]} | {ratio:.2f} | {memory} |", flush=True)
    print(
        f"\n`python {' '.join(sys.argv)}`: {args.images} photos, {args.epochs} epochs; "
        f"median (range) of {args.repeats}; torch {torch.__version__}, timm {timm.__version__}."
    )


def photos(folder: Path, number: int) -> None:
    """Pictures of ``loading.make`` in two classes, a quarter of them to evaluate on."""
    make(folder, number, "jpeg", (500, 375))
    for path in sorted(folder.glob("*/one/*.jpeg")):
        place = int(path.stem)
        split = path.parents[1]
        if split.name == "validation" and place % 4:
            path.unlink()
        elif place % CLASSES:
            (split / "two").mkdir(exist_ok=True)
            path.rename(split / "two" / path.name)


def run(command: list[str]) -> tuple[float, int]:
    """Seconds from start to end, and the most memory of its largest process in MB."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:  # PYTHONSAFEPATH: timm's script with the timm that is installed
        process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"PYTHONSAFEPATH": "1"})
        _, status, used = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode()[-2000:]}")
    return time.perf_counter() - began, used.ru_maxrss // 1024


def ours(data: Path, out: Path, epochs: int, mixer: str) -> list[str]:
    """The command but for its folder."""
    flags = {
        "dataset": data, "eval_split": "validation", "num_classes": CLASSES, "pixels": "v2", "epochs": epochs,
        "batch_size": BATCH, "per_device_train_batch_size": BATCH, "warmup_epochs": 0, "mixed_precision": "no",
        "channels_last": json.dumps(False),
    }  # fmt: skip
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(OURS), "--recipe", f"quickstart_{mixer}", *given, "--output_dir"]


def timms(checkout: Path, data: Path, out: Path, epochs: int, workers: int, flags: list[str]) -> list[str]:
    """The command but for its folder."""
    given = {
        "data-dir": data, "model": "resnet10t", "num-classes": CLASSES, "img-size": 64, "batch-size": BATCH,
        "epochs": epochs, "opt": "momentum", "lr": 0.2, "weight-decay": 5e-4, "sched": "cosine", "warmup-epochs": 0,
        "cooldown-epochs": 0, "workers": workers, "device": "cpu", "color-jitter": 0, "crop-pct": 1.0,
        "train-interpolation": "bilinear", "interpolation": "bilinear", "smoothing": 0.0, "val-split": "validation",
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    scale = ["--scale", "0.35", "1.0"]
    return [sys.executable, str(checkout / "train.py"), *words, *scale, *flags, "--output"]


if __name__ == "__main__":
    main()
