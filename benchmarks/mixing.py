"""Cost of every mixer beside timm's and torchvision's, as ratios to the least memory traffic possible.

    python benchmarks/mixing.py --threads 1

The floor is ``torch.lerp(a, b, w, out=)`` into memory that is already there: two reads, one write. On a CPU a fresh
tensor of 77 MB costs several times the mixing, since the operating system hands out its pages anew each time: so that
the methods are compared and not the page faults, all run under glibc settings that keep freed memory
(``--system_malloc`` leaves them out). OpenCV's saliency, on one thread and on bytes, is timed where the extra
``oracle`` is installed. All of a table is measured in turns within one process. Prints Markdown.
"""

# ruff: noqa: E402
import os
import sys
from pathlib import Path

# glibc reads its settings once, when a process starts. -P and the path: beside this file "mixers" would mean itself.
KEEP = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
if "MIXERS_BENCHMARK" not in os.environ:
    settings = {} if "--system_malloc" in sys.argv else KEEP
    paths = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | settings | {"MIXERS_BENCHMARK": "1", "PYTHONPATH": paths}
    os.execve(sys.executable, [sys.executable, "-P", *sys.argv], environment)

import argparse
import functools
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import timm
import timm.data
import torch
import torchvision
from torchvision.transforms import v2

try:
    import cv2
except ImportError:
    cv2 = None

from mixers import MIXERS, Mixer, Step, build
from mixers.base import plan_alone

Function = Callable[[], object]
SHAPES = ((128, 3, 224, 224), (128, 3, 64, 64), (128, 3, 32, 32))
MODEL, STEP_SHAPE = "resnet10t", (32, 3, 64, 64)
COMPILED_STEPS = 20
WARM_UP = 2  # turns


def main() -> None:
    """Two tables: mixing a batch alone, and whole training steps of a small model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS.rows), choices=list(MIXERS.rows), metavar="MIXER")
    parser.add_argument("--system_malloc", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if cv2:
        cv2.setNumThreads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    malloc = "the system's" if args.system_malloc else ", ".join(f"{k}={v}" for k, v in KEEP.items())
    versions = f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}"
    print(f"`python {' '.join(sys.argv)}`: {versions}; {name}; median of {args.repeats}; malloc settings: {malloc}.\n")

    skipped = alone(args.mixers, args.repeats, device)
    print(f"\nNot timed alone, since they look at the model or mix inside it: {', '.join(skipped) or 'none'}.\n")
    whole_steps(args.mixers, args.repeats, device)


def alone(names: list[str], repeats: int, device: torch.device) -> list[str]:
    """Print the milliseconds of ``plan`` and ``mix``; returns the mixers of which only whole steps tell the cost."""
    columns, faults = [], []
    skipped: list[str] = []
    for shape in SHAPES:
        made, skipped = contestants(names, shape, device)
        measure(made, 1, device)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        columns.append(measure(made, repeats, device))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        faults.append(str((after - before) // ((repeats + WARM_UP) * len(made))))
    print("| milliseconds (times the floor) |", " | ".join("x".join(map(str, shape)) for shape in SHAPES), "|")
    print("|---|" + "---:|" * len(SHAPES))
    for name in columns[0]:
        cells = [f"{1e3 * times[name]:.3g} ({times[name] / times['floor']:.1f}x)" for times in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| page faults of a call, on average | {' | '.join(faults)} |")
    return skipped


def contestants(
    names: list[str], shape: tuple[int, ...], device: torch.device
) -> tuple[dict[str, Function], list[str]]:
    """What is timed, by name, and what needs a model. The images are float32, the labels those of 1,000 classes."""
    x, other, out = (
        torch.randn(shape, device=device),
        torch.randn(shape, device=device),
        torch.empty(shape, device=device),
    )
    labels = torch.randint(1000, shape[:1], device=device)
    y = torch.nn.functional.one_hot(labels, 1000).float()
    weight = torch.full((shape[0], 1, 1, 1), 0.3, device=device)
    made: dict[str, Function] = {"floor": lambda: torch.lerp(other, x, weight, out=out)}
    skipped = []
    for name in names:
        step = new_step(name)
        mixer = step.mixer.to(device) if isinstance(step, Step) else None
        if mixer is None or inside_the_model(mixer, x[:4], y[:4]):
            skipped.append(name)
        else:
            made[name] = functools.partial(mix_once, mixer, x, y, np.random.default_rng(0))
            without_waiting(made[name], device, name)
    for name, alphas in (("mixup", (1.0, 0.0)), ("cutmix", (0.0, 1.0))):
        theirs = timm.data.Mixup(*alphas, label_smoothing=0.0, num_classes=1000)
        made[f"timm {name}, in place"] = functools.partial(theirs, x.clone(), labels)
    for name, transform in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)):
        made[f"torchvision {name}"] = functools.partial(transform(num_classes=1000), x, labels)
    if "saliencymix" in made:
        detector_of_ours = build("saliencymix")
        made["saliencymix, salient pixels alone"] = lambda: detector_of_ours.salient_pixel(x)  # type: ignore[operator]
    if cv2 and hasattr(cv2, "saliency"):
        images = torch.randint(256, (shape[0], *shape[2:], 3), dtype=torch.uint8).numpy()
        detector = cv2.saliency.StaticSaliencyFineGrained_create()
        made["opencv saliency maps alone"] = lambda: [detector.computeSaliency(image) for image in images]
    return made, skipped


def new_step(name: str) -> Step | str:
    """A mixer on a small model; why not, when it does not work with it."""
    model = timm.create_model(MODEL, num_classes=1000)
    try:
        return Step(model, build(name), torch.nn.CrossEntropyLoss(reduction="none"))
    except ValueError as error:
        return str(error)


def inside_the_model(mixer: Mixer, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether a mixer looks at the model, or mixes features instead of images: then only whole steps tell its cost."""
    for update in range(10):
        plan = plan_alone(mixer, x, y, np.random.default_rng(update))
        if plan is None:
            return True
        mixed, target = mixer.mix(x, y, **plan)
        if torch.equal(mixed, x) and not torch.allclose(target, y, atol=0.01):
            return True
    return False


def mix_once(mixer: Mixer, x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> object:
    """Decide and do."""
    return mixer.mix(x, y, **mixer.plan(x, y, rng))


def without_waiting(function: Function, device: torch.device, name: str) -> None:
    """Raise an error when ours makes the host wait for a GPU."""
    if device.type != "cuda":
        return
    for _ in range(3):
        function()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(COMPILED_STEPS):
            function()
    except RuntimeError as error:
        raise SystemExit(f"{name} waits for the device: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def whole_steps(names: list[str], repeats: int, device: torch.device) -> None:
    """Print the milliseconds of forward and backward through a small model, and the graphs of a compiled ``mix``."""
    x, labels = torch.randn(STEP_SHAPE, device=device), torch.randint(1000, STEP_SHAPE[:1], device=device)
    y = torch.nn.functional.one_hot(labels, 1000).float()
    steps = {name: new_step(name) for name in ["vanilla", *names]}
    ready = {name: step.to(device).train() for name, step in steps.items() if isinstance(step, Step)}
    for step in ready.values():
        rng = np.random.default_rng(0)  # goes on from call to call, so that every branch is taken
        without_waiting(functools.partial(train_once, step, x, y, rng), device, step.mixer._get_name())
    made: dict[str, Function] = {
        name: functools.partial(train_once, step, x, y, np.random.default_rng(0)) for name, step in ready.items()
    }
    times = measure(made, repeats, device)
    head = f"whole step of {MODEL}, {'x'.join(map(str, STEP_SHAPE))}"
    print(f"| {head} | milliseconds | times vanilla | graphs in {COMPILED_STEPS} steps (branches) |")
    print("|---|---:|---:|---:|")
    for name in names:
        if name not in times:
            print(f"| {name} | not on {MODEL}: {steps[name]} | | |")
            continue
        graphs, branches = compiled_graphs(ready[name], x, y)
        print(f"| {name} | {1e3 * times[name]:.1f} | {times[name] / times['vanilla']:.2f}x | {graphs} ({branches}) |")


def train_once(step: Step, x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> None:
    """Forward and backward."""
    step.zero_grad()
    step(x, y, rng).loss.backward()


def compiled_graphs(step: Step, x: torch.Tensor, y: torch.Tensor) -> tuple[int, int]:
    """How many graphs torch compiles for ``mix`` in some steps, and how many different branches the plans took."""
    graphs, branches = 0, set()

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    mix = torch.compile(step.mixer.mix, backend=count)
    for update in range(COMPILED_STEPS):
        plan = step(x, y, np.random.default_rng((0, update))).plan
        tensors = {k: v.shape if isinstance(v, torch.Tensor) else v for k, v in plan.items()}
        branches.add(repr(tensors))
        mix(x, y, **plan)
    return graphs, len(branches)


def measure(functions: dict[str, Function], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, measured in turns, so that a slow moment of the machine hits all alike, and each turn in
    another order, so that no row always pays for the caches that the same one has emptied."""
    order = np.random.default_rng(0)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + WARM_UP):
        for name in order.permutation(list(functions)):
            wait()
            began = time.perf_counter()
            functions[name]()
            wait()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
