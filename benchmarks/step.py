"""Cost of a whole training step with every mixer, relative to the step without mixing.

    python benchmarks/step.py                    # FLOPs and memory counted at the real size, time on what is at hand
    python benchmarks/step.py --models resnet50 --mixers automix samix

FLOPs are counted by torch over forward and backward on the meta device, where tensors have shapes and no values, at 224
pixels: exact, and the same on every machine. Memory is what autograd keeps for the backward pass, counted likewise;
on a GPU the peak that its allocator saw stands beside it. Both are means over ``--updates`` updates, so that methods
that switch between branches are counted as they run. Milliseconds are medians in one interleaved run, at full size
on a GPU and reduced to 64 pixels and 8 images on a CPU. Prints Markdown; ``--csv model_cards/costs.csv`` brings the
counted columns up to date that model cards quote.
"""

# ruff: noqa: E402
import argparse
import copy
import csv
import functools
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # beside this file "mixers" would mean mixers.py

import numpy as np
import timm
import torch
from timm.models import save_for_hf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mixers import MIXERS, Step, build

MODELS = ("resnet50", "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny")
TEACHER = "resnet18"  # of AttentiveMix+, with random weights
COUNTED = (8, 224)  # images, pixels
TIMED = {"cuda": (64, 224), "cpu": (8, 64)}
WARM_UP = 2  # turns


def main() -> None:
    """A table for each thing measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS), metavar="MIXER")
    parser.add_argument("--updates", type=int, default=12, help="over which FLOPs and memory are averaged")
    parser.add_argument("--repeats", type=int, default=0, help="timed steps; 0 leaves the time out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="write the rows here too; rows of other models and mixers stay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"`python {' '.join(sys.argv)}`: torch {torch.__version__}, timm {timm.__version__}; {name}.")
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(timm.create_model(TEACHER), folder, safe_serialization=True)
        found = {}
        for model in args.models:
            found[model] = measured(model, args.mixers, args.updates, args.repeats, device, folder)
            if args.csv:
                write(args.csv, model, found[model])
    show(found)


def measured(
    model: str, mixers: list[str], updates: int, repeats: int, device: torch.device, teacher: str
) -> dict[str, str | dict[str, float]]:
    """What each mixer costs on one model, as multiples of ``vanilla``; why not, where it does not work with it."""
    size, pixels = TIMED[device.type]
    whole = functools.partial(timm.create_model, model, num_classes=1000)
    small = functools.partial(whole, **({} if pixels == 224 or not takes_size(model) else {"img_size": pixels}))
    mixers = list(dict.fromkeys(("vanilla", *mixers)))
    times = timed(small, mixers, repeats, device, teacher) if repeats else {}
    rows: dict[str, str | dict[str, float]] = {}
    base: dict[str, float] = {}
    for mixer in mixers:
        step = made(whole, mixer, teacher)
        if isinstance(step, str) or (repeats and mixer not in times):
            rows[mixer] = step if isinstance(step, str) else f"not at the {pixels} pixels that are timed"
            continue
        flops, kept = counted(step, updates)
        cost = {"FLOPs": flops, "kept for backward": kept}
        if repeats:
            cost[f"time, {size} x {pixels} px"] = times[mixer][0]
            if device.type == "cuda":
                cost["peak memory"] = times[mixer][1]
        base = base or cost
        rows[mixer] = {head: value / base[head] for head, value in cost.items()}
    return rows


def show(found: dict[str, dict[str, str | dict[str, float]]]) -> None:
    """Print a table for each thing measured: a row per mixer, a column per model."""
    for head in next(iter(found.values()))["vanilla"]:
        print(f"\n| {head} | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
        for mixer in next(iter(found.values())):
            costs = [rows[mixer] for rows in found.values()]
            cells = ["-" if isinstance(cost, str) else f"{cost[head]:.2f}x" for cost in costs]
            print(f"| {mixer} | {' | '.join(cells)} |")
    for model, rows in found.items():
        for mixer, why in rows.items():
            if isinstance(why, str):
                print(f"\n{mixer} on {model}: {why}.")


def write(path: Path, model: str, rows: dict[str, str | dict[str, float]]) -> None:
    """Put the counted rows into a CSV file of model, mixer, FLOPs, memory, which `mixup-recipes card` quotes."""
    old = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    new = [
        {"model": model, "mixer": mixer, "flops": f"{cost['FLOPs']:.3f}", "kept": f"{cost['kept for backward']:.3f}"}
        for mixer, cost in rows.items()
        if isinstance(cost, dict)
    ]
    kept = [row for row in old if row["mixer"] in MIXERS and not (row["model"] == model and row["mixer"] in rows)]
    lines = io.StringIO(newline="")
    table = csv.DictWriter(lines, ["model", "mixer", "flops", "kept"], lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(kept + new, key=lambda row: (row["model"], list(MIXERS).index(row["mixer"]))))
    path.write_text(lines.getvalue())


def takes_size(model: str) -> bool:
    """Whether a model is made for one size of images."""
    return "deit" in model or "swin" in model


def made(create: Callable[[], torch.nn.Module], mixer: str, teacher: str) -> Step | str:
    """A step; why not, when the mixer does not work with the model. What a teacher has learned costs nothing."""
    args = {"teacher": teacher} if mixer == "attentivemix" else {}
    try:
        return Step(create(), build(mixer, **args), torch.nn.CrossEntropyLoss(reduction="none"))
    except ValueError as error:
        return str(error).split(";")[0].replace("|", "/")


def counted(step: Step, updates: int) -> tuple[float, float]:
    """FLOPs of forward and backward, and bytes kept between them, on the meta device: means over some updates."""
    step = copy.deepcopy(step).to("meta").train()
    parameters = {p.untyped_storage()._cdata for p in step.parameters()}
    size, pixels = COUNTED
    x, y = torch.empty(size, 3, pixels, pixels, device="meta"), torch.empty(size, 1000, device="meta")
    flops = kept = 0
    for update in range(updates + 1):
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                seen[storage._cdata] = storage.nbytes()
            return tensor

        with Counter() as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = step(x, y, np.random.default_rng((0, update))).loss
            loss.backward()
        step.zero_grad(set_to_none=True)
        step.mixer.after_step(step.model, 0.5)
        if update:  # the first one has no history
            flops += counter.total
            kept += sum(seen.values())
    return flops / updates, kept / updates


class Counter(TorchDispatchMode):
    """Counts FLOPs by torch's formulas, also inside ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:  # torch's formula takes no notice of groups
            grad, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
            self.total += 2 * (x if transposed else grad).numel() * weight[0].numel() * sum(wanted[:2])
            return out
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def timed(
    create: Callable[[], torch.nn.Module], mixers: list[str], repeats: int, device: torch.device, teacher: str
) -> dict[str, tuple[float, ...]]:
    """Median seconds of forward and backward by mixer, in turns; on a GPU the peak of allocated bytes too."""
    size, pixels = TIMED[device.type]
    x, labels = torch.randn(size, 3, pixels, pixels, device=device), torch.randint(1000, (size,), device=device)
    y = torch.nn.functional.one_hot(labels, 1000).float()
    steps = {mixer: made(create, mixer, teacher) for mixer in mixers}
    calls, peaks = {}, {}
    for mixer, step in steps.items():
        if isinstance(step, str):
            continue
        call = functools.partial(train_once, step.to(device).train(), x, y, np.random.default_rng(0))
        calls[mixer] = call
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            peaks[mixer] = (float(torch.cuda.max_memory_allocated() - before),)
            step.zero_grad(set_to_none=True)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {mixer: [] for mixer in calls}
    for turn in range(repeats + WARM_UP):  # in turns, so that a slow moment of the machine hits all alike
        for mixer, call in calls.items():
            wait()
            began = time.perf_counter()
            call()
            wait()
            if turn >= WARM_UP:
                seconds[mixer].append(time.perf_counter() - began)
    return {mixer: (statistics.median(values), *peaks.get(mixer, ())) for mixer, values in seconds.items()}


def train_once(step: Step, x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> None:
    """Forward and backward, and what the mixer does after an update."""
    step.zero_grad()
    step(x, y, rng).loss.backward()
    step.mixer.after_step(step.model, 0.5)


if __name__ == "__main__":
    main()
