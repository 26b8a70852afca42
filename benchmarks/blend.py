"""Cost of mixing a batch, ours beside timm's and torchvision's, as ratios to the least memory traffic possible.

    python benchmarks/blend.py --threads 1

The limit is ``torch.lerp(a, b, w, out=)`` into memory that is already there: two reads, one write. Ours, like every
peer but timm (which writes into the caller's batch), returns a fresh tensor, and on a CPU most of the remaining
cost is the operating system handing out its pages. All of a row is measured in turns within one run.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import numpy as np
import timm.data
import torch
from torchvision.transforms import v2

from mixers import build


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {args.threads} thread(s), median of {args.repeats}\n")
    print("| batch | limit, ms | mixup | cutmix | timm mixup | timm cutmix | torchvision mixup | torchvision cutmix |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in ((128, 3, 224, 224), (64, 3, 64, 64), (128, 3, 32, 32)):
        times = measure(contestants(shape), args.repeats)
        limit = times.pop("limit")
        ratios = " | ".join(f"{t / limit:.1f}x" for t in times.values())
        print(f"| {'x'.join(map(str, shape))} | {limit * 1e3:.2f} | {ratios} |")


def contestants(shape: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    """What is timed, by name. The images are float32, the labels those of 1,000 classes."""
    x, other, out = torch.randn(shape), torch.randn(shape), torch.empty(shape)
    labels = torch.randint(1000, (shape[0],))
    y = torch.nn.functional.one_hot(labels, 1000).float()
    weight = torch.full((shape[0], 1, 1, 1), 0.3)
    rng = np.random.default_rng(0)

    def ours(name: str) -> Callable[[], object]:
        mixer = build(name)
        return lambda: mixer.mix(x, y, **mixer.plan(x, y, rng))

    made: dict[str, Callable[[], object]] = {"limit": lambda: torch.lerp(other, x, weight, out=out)}
    made |= {name: ours(name) for name in ("mixup", "cutmix")}
    for name, alphas in (("mixup", (1.0, 0.0)), ("cutmix", (0.0, 1.0))):
        theirs = timm.data.Mixup(*alphas, label_smoothing=0.0, num_classes=1000)
        made[f"timm {name}"] = functools.partial(theirs, x, labels)
    for name, transform in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)):
        made[f"torchvision {name}"] = functools.partial(transform(num_classes=1000), x, labels)
    return made


def measure(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turns so that a slow moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if turn >= 2:  # warm-up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
