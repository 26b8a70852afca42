"""Cost of a whole training step with every mixer, relative to the step without mixing.

    python benchmarks/step.py                    # FLOPs and memory, counted
    python benchmarks/step.py --repeats 5 --models resnet50 deit_small_patch16_224      # and time on what is at hand

FLOPs are counted by torch over forward and backward on the meta device, where tensors have shapes and no values, with 8
images of 224 pixels: exact, and the same on every machine. Memory is the most that autograd keeps for backward passes
at one time, counted likewise; on a GPU the peak that its allocator saw stands beside it. Both are means over
``--updates`` updates, so that methods that switch between branches are counted as they run.

Times are those of ``--repeats`` of the same updates at 224 pixels, each as a multiple of the steps without mixing that
ran right before and after it; on a CPU the process's own time, in which other programs count little. What is shown is
the median, and the range, over the updates of ``time / FLOPs`` of an update times the mean of the FLOPs: so a method
that switches is not judged by which branches came up. Vanilla's own row says how far two equal steps lie apart.

Prints Markdown; ``--csv model_cards/costs.csv`` brings the columns up to date that model cards quote.
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
from statistics import fmean

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # beside this file "mixers" would mean mixers.py

import numpy as np
import timm
import torch
from timm.models import save_for_hf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mixers import MIXERS, Step, build
from mixup_recipes.training.launch import keep_freed_memory

MODELS = ("resnet50", "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny")
TEACHER = "resnet18"  # of AttentiveMix+, with random weights
COUNTED = (8, 224)  # images, pixels
TIMED = {"cuda": 64, "cpu": 4}  # images


def main() -> None:
    """A table for each thing measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS.rows), choices=list(MIXERS.rows), metavar="MIXER")
    parser.add_argument("--updates", type=int, default=12, help="over which FLOPs and memory are averaged")
    parser.add_argument("--repeats", type=int, default=0, help="timed updates; 0 leaves the time out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="write the rows here too; rows of other models and mixers stay")
    args = parser.parse_args()
    if unknown := [model for model in args.models if not timm.is_model(model)]:
        parser.error(f"timm has no model {unknown[0]!r}")
    if args.updates < 1 or args.repeats < 0:
        parser.error("--updates must be at least 1, --repeats at least 0")
    if args.csv and not args.csv.parent.is_dir():
        parser.error(f"--csv {args.csv}: there is no folder {args.csv.parent}")
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    print(f"`python {' '.join(sys.argv)}`: torch {torch.__version__}, timm {timm.__version__}; {name}.")
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(timm.create_model(TEACHER), folder, safe_serialization=True)
        found = {}
        for model in args.models:
            found[model] = measured(model, args.mixers, args.updates, args.repeats, device, folder)
            if args.csv:
                write(args.csv, model, found[model], f"{name}, {TIMED[device.type]} images")
    show(found)


def measured(
    model: str, mixers: list[str], updates: int, repeats: int, device: torch.device, teacher: str
) -> dict[str, str | dict[str, float]]:
    """What each mixer costs on one model, as multiples of ``vanilla``; why not, where it does not work with it."""
    create = functools.partial(timm.create_model, model, num_classes=1000)
    mixers = list(dict.fromkeys(("vanilla", *mixers)))
    times, peaks = timed(create, mixers, repeats, device, teacher) if repeats else ({}, {})
    rows: dict[str, str | dict[str, float]] = {}
    base: list[float] = []
    for mixer in mixers:
        step = made(create, mixer, teacher)
        if isinstance(step, str):
            rows[mixer] = step
            continue
        each = counted(step, max(updates, repeats))
        base = base or each[0]  # all of vanilla's updates cost the same
        flops, kept = (fmean(values[:updates]) / one for values, one in zip(zip(*each, strict=True), base, strict=True))
        cost = {"FLOPs": flops, "kept for backward": kept}
        if repeats:
            ratios = [time * base[0] / own * flops for time, (own, _) in zip(times[mixer], each, strict=False)]
            cost |= {"time": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        if mixer in peaks:
            cost["peak memory"] = peaks[mixer] / peaks["vanilla"]
        rows[mixer] = {head: round(value, 3) for head, value in cost.items()}
    return rows


def show(found: dict[str, dict[str, str | dict[str, float]]]) -> None:
    """Print a table for each thing counted, a row per mixer, a column per model; and one of times for each model."""
    for head in next(iter(found.values()))["vanilla"]:
        if head not in ("time", "least", "most"):
            print(f"\n| {head} | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
            for mixer in next(iter(found.values())):
                costs = [rows[mixer] for rows in found.values()]
                cells = ["-" if isinstance(cost, str) else f"{cost[head]:.2f}x" for cost in costs]
                print(f"| {mixer} | {' | '.join(cells)} |")
    for model, rows in found.items():
        if "time" in rows["vanilla"]:
            print(f"\n| {model} | counted | measured | measured / counted |\n|---|---:|---:|---:|")
        for mixer, cost in rows.items():
            if not isinstance(cost, str) and "time" in cost:
                flops, time, least, most = (cost[key] for key in ("FLOPs", "time", "least", "most"))
                print(f"| {mixer} | {flops:.2f}x | {time:.2f}x ({least:.2f} to {most:.2f}) | {time / flops:.2f} |")
    for model, rows in found.items():
        for mixer, why in rows.items():
            if isinstance(why, str):
                print(f"\n{mixer} on {model}: {why}.")


def write(path: Path, model: str, rows: dict[str, str | dict[str, float]], timed_on: str) -> None:
    """Put the rows into the CSV file that `mixup-recipes card` quotes; a time that was not measured now stays."""
    old = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    lines = {(row["model"], row["mixer"]): row for row in old if row["mixer"] in MIXERS.rows}
    names = {"flops": "FLOPs", "kept": "kept for backward", "time": "time", "least": "least", "most": "most"}
    for mixer, cost in rows.items():
        row = lines.pop((model, mixer), {})
        if isinstance(cost, dict):
            row |= {"model": model, "mixer": mixer}
            row |= {name: f"{cost[head]:.3f}" for name, head in names.items() if head in cost}
            row |= {"timed_on": timed_on} if "time" in cost else {}
            lines[model, mixer] = row
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ["model", "mixer", *names, "timed_on"], lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(lines.values(), key=lambda row: (row["model"], list(MIXERS.rows).index(row["mixer"]))))
    path.write_text(text.getvalue())


def made(create: Callable[[], torch.nn.Module], mixer: str, teacher: str) -> Step | str:
    """A step; why not, when the mixer does not work with the model. What a teacher has learned costs nothing."""
    args = {"teacher": teacher} if mixer == "attentivemix" else {}
    try:
        return Step(create(), build(mixer, **args), torch.nn.CrossEntropyLoss(reduction="none"))
    except ValueError as error:
        return str(error).split(";")[0].replace("|", "/")


def counted(step: Step, updates: int) -> list[list[float]]:
    """FLOPs of each of some updates, and the most bytes that autograd held at a time, on the meta device."""
    step = copy.deepcopy(step).to("meta").train()
    parameters = {p.untyped_storage()._cdata for p in step.parameters()}
    size, pixels = COUNTED
    x, y = torch.empty(size, 3, pixels, pixels, device="meta"), torch.empty(size, 1000, device="meta")
    found: list[list[float]] = []
    for update in range(updates + 1):
        held = Held(parameters)
        with Counter() as counter:
            with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda kept: kept.tensor):
                loss = step(x, y, np.random.default_rng((0, update))).loss
            loss.backward()
        step.zero_grad(set_to_none=True)
        step.mixer.after_step(step.model, 0.5)
        found.append([counter.total, held.most])
    return found[1:]  # the first one has no history


class Held:
    """What autograd holds for a backward pass, and lets go: each storage once, without the parameters."""

    def __init__(self, parameters: set[int]):
        self.parameters = parameters
        self.times: dict[int, int] = {}
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> "Kept":
        """Called for each tensor that is saved."""
        return Kept(self, tensor)


class Kept:
    """One saved tensor, as long as autograd holds it."""

    def __init__(self, held: Held, tensor: torch.Tensor):
        self.held, self.tensor = held, tensor
        storage = tensor.untyped_storage()
        self.key, self.size = storage._cdata, 0 if storage._cdata in held.parameters else storage.nbytes()
        before = held.times.get(self.key, 0)
        held.times[self.key] = before + 1
        held.now += 0 if before else self.size
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self.held.times[self.key] -= 1
        self.held.now -= 0 if self.held.times[self.key] else self.size


class Counter(TorchDispatchMode):
    """Counts FLOPs by torch's formulas, also inside ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """``paired`` times of forward and backward by mixer, and on a GPU the peak of allocated bytes."""
    size, pixels = TIMED[device.type], COUNTED[1]
    x, labels = torch.randn(size, 3, pixels, pixels, device=device), torch.randint(1000, (size,), device=device)
    y = torch.nn.functional.one_hot(labels, 1000).float()
    model = create()  # one for all: thirty of them with their gradients would not fit
    calls: dict[str, Callable[[int], None]] = {}
    peaks: dict[str, float] = {}
    for mixer in mixers:
        step = made(lambda: model, mixer, teacher)
        if isinstance(step, str):
            continue
        calls[mixer] = functools.partial(train_once, step.to(device).train(), x, y)
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        calls[mixer](0)  # warms up, and leaves a history
        if device.type == "cuda":
            peaks[mixer] = float(torch.cuda.max_memory_allocated() - before)

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    return paired(calls, repeats, clock), peaks


def paired(calls: dict[str, Callable[[int], None]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Time of each call, for updates from 1 on, over the mean of the calls of ``vanilla`` right before and after it.

    So a slow moment of the machine hits both, and a machine that slows down favours neither.
    """

    def seconds(mixer: str, update: int) -> float:
        began = clock()
        calls[mixer](update)
        return clock() - began

    found: dict[str, list[float]] = {mixer: [] for mixer in calls}
    before = seconds("vanilla", 1)
    for update in range(1, repeats + 1):
        for mixer in calls:
            own, after = seconds(mixer, update), seconds("vanilla", update)
            found[mixer].append(own / ((before + after) / 2))
            before = after
    return found


def train_once(step: Step, x: torch.Tensor, y: torch.Tensor, update: int) -> None:
    """Forward and backward, and what the mixer does after an update."""
    step(x, y, np.random.default_rng((0, update))).loss.backward()
    step.mixer.after_step(step.model, 0.5)
    step.zero_grad()


if __name__ == "__main__":
    main()
