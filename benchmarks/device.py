"""Images a second of whole training updates on the device at hand, beside a loop of timm's parts.

    python benchmarks/device.py                                                 # on a GPU: ResNet-50 and DeiT-S
    python benchmarks/device.py --models resnet10t --size 64 --batch 8 --updates 2 --precision no    # tries it anywhere

An update takes uint8 images, which a side stream has copied from pinned memory during the one before, normalises and
mixes them, goes forward and backward in bf16 with channels last, and steps SGD with momentum. timm's parts are its
Mixup class and its loss for soft targets, where timm has the method; all else is the same. All take turns; a ratio is
that of the medians. ``syncs`` counts how often an update waits for the GPU, ``memory`` is the peak of torch's
allocator. Prints Markdown.
"""

import argparse
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from mixers import Step, build
from mixup_recipes.data import images
from mixup_recipes.data.loading import Loaded, on_device
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.update import criterion

MODELS = ("resnet50", "deit_small_patch16_224")
MIXERS = ("vanilla", "mixup", "cutmix", "puzzlemix", "automix", "samix")
TIMMS = {"mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 0.0}, "cutmix": {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}}
CLASSES = 1000
Update = Callable[[int], None]


def main() -> None:
    """A table for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--updates", type=int, default=20, help="in each turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp16", "no"), default="bf16")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"`python {' '.join(sys.argv)}`: torch {torch.__version__}, timm {timm.__version__}; {name}.")
    for model in args.models:
        print(f"\n| {model}, images/s | ours | timm's parts | ours / timm | syncs | memory, MB |")
        print("|---|---:|---:|---:|---:|---:|")
        for mixer in args.mixers:
            ways = {"ours": ours(model, mixer, args, device)}
            if mixer == "vanilla" or mixer in TIMMS:
                ways["timm"] = timms(model, mixer, args, device)
            for update in ways.values():
                update(0), update(1)  # algorithms are chosen, memory is taken
            syncs, memory = waits(ways["ours"], device), peak(ways["ours"], device)
            speeds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(args.repeats):
                for way, update in ways.items():
                    seconds = timed(update, range(2 + turn * args.updates, 2 + (turn + 1) * args.updates), device)
                    speeds[way].append(args.batch * args.updates / seconds)
            middle = {way: statistics.median(found) for way, found in speeds.items()}
            cells = [f"{v:.0f} ({min(speeds[w]):.0f} to {max(speeds[w]):.0f})" for w, v in middle.items()]
            ratio = f"{middle['ours'] / middle['timm']:.2f}" if "timm" in middle else "-"
            shown = [*cells, *["-"] * (2 - len(cells)), ratio, *(("-", "-") if syncs is None else (syncs, memory))]
            print(f"| {mixer} | {' | '.join(map(str, shown))} |", flush=True)


def ours(model: str, mixer: str, args: argparse.Namespace, device: torch.device) -> Update:
    """Update number n of this project's step."""
    recipe = Recipe(channels_last=True)
    net = network(model, args, device)
    step = Step(net, build(mixer), criterion(recipe)).to(device).train()
    learn = learner(step, args, device)
    given = batches(args, device)

    def update(number: int) -> None:
        pixels, labels, *_ = next(given)
        x = images.normalise(pixels, recipe, device)
        y = nn.functional.one_hot(labels, CLASSES).float()
        learn(lambda: step(x, y, np.random.default_rng((0, number))).loss)
        step.mixer.after_step(step.model, number / 1000)

    return update


def timms(model: str, mixer: str, args: argparse.Namespace, device: torch.device) -> Update:
    """The same update of timm's parts."""
    recipe, net = Recipe(channels_last=True), network(model, args, device)
    mix = Mixup(**TIMMS[mixer], num_classes=CLASSES, label_smoothing=0.0) if mixer in TIMMS else None
    loss = SoftTargetCrossEntropy() if mix else nn.CrossEntropyLoss()
    learn = learner(net, args, device)
    given = batches(args, device)

    def update(_number: int) -> None:
        pixels, labels, *_ = next(given)
        x = images.normalise(pixels, recipe, device)
        y = labels
        if mix:
            x, y = mix(x, y)
        learn(lambda: loss(net(x), y))

    return update


def network(model: str, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model, channels last; of another size than its own where it has one."""
    sized = {"img_size": args.size} if "vit" in model or "deit" in model or "swin" in model else {}
    torch.manual_seed(0)
    net: nn.Module = timm.create_model(model, num_classes=CLASSES, **sized)
    return net.to(device).to(memory_format=torch.channels_last).train()


def learner(
    module: nn.Module, args: argparse.Namespace, device: torch.device
) -> Callable[[Callable[[], Tensor]], None]:
    """Forward in the asked precision, backward, and a step of SGD."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[args.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    def learn(forward: Callable[[], Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = forward()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return learn


def batches(args: argparse.Namespace, device: torch.device) -> Iterator[Loaded]:
    """One batch of uint8 images and labels again and again, as loaders hand it out: pinned for a GPU."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, CLASSES, (args.batch,), generator=draw)
    pixels, labels = (part.pin_memory() if device.type == "cuda" else part for part in (pixels, labels))
    return on_device(itertools.repeat((pixels, labels, labels, labels)), device)


def timed(update: Update, numbers: range, device: torch.device) -> float:
    """Seconds of some updates, until the device is done with them."""
    began = time.perf_counter()
    for number in numbers:
        update(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def waits(update: Update, device: torch.device) -> int | None:
    """How often an update waits for the GPU, as torch warns of it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        update(2)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def peak(update: Update, device: torch.device) -> int | None:
    """MB that torch's allocator held at most during an update; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    update(3)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() // 2**20


if __name__ == "__main__":
    main()
