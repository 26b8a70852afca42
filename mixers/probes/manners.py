"""Probes of how a subject behaves: batches it takes, and what it leaves alone."""

import torch
from torch import Tensor

from ..testing import differences, global_rngs
from .bench import BATCH, HEIGHT, WIDTH, Bench, Finding, entry, given, noise, raised


@entry("any batch size")
def batch_sizes(bench: Bench) -> Finding:
    """Batches of 1, 2, 3 and 7 images come back in their shape."""
    refused = []
    for size in (1, 2, 3, 7):
        try:
            mixed, target = bench.one(noise(size))
            right = mixed.shape == (size, 3, HEIGHT, WIDTH) and len(target) == size
            refused += [] if right else [f"{size}: shape {tuple(mixed.shape)}"]
        except Exception as error:
            refused.append(f"{size}: {type(error).__name__}")
    return Finding(not refused, "; ".join(refused) or "1, 2, 3, 7")


@entry("caller's tensors untouched")
def untouched(bench: Bench) -> Finding:
    """Neither images nor labels are written to."""
    bench.subject.seed(1)
    mix, written = bench.subject.make(None), set()
    for _ in range(10):
        x, y = noise(), given(torch.arange(BATCH), bench.forms[0])
        before = {"images": (x, x.clone()), "labels": (y, y.clone())}
        mix(x, y)
        written |= {name for name, (now, then) in before.items() if not torch.equal(now, then)}
    return Finding(not written, f"writes into {' and '.join(sorted(written))}" if written else "yes")


@entry("float64 and bfloat16 kept")
def dtypes(bench: Bench) -> Finding:
    """Images come back in the precision in which they were given."""
    wrong = []
    for dtype in (torch.float64, torch.bfloat16):
        try:
            found = bench.one(noise().to(dtype))[0].dtype
            wrong += [] if found == dtype else [f"{dtype} becomes {found}"]
        except Exception as error:
            wrong.append(f"{dtype}: {type(error).__name__}")
    return Finding(not wrong, "; ".join(wrong).replace("torch.", "") or "yes")


@entry("reads nothing from the device")
def device(bench: Bench) -> Finding:
    """It runs on the meta device, whose tensors have no values, and the result stays there."""
    try:
        mixed, target = bench.one(noise().to("meta"))
        holds, text = mixed.device.type == target.device.type == "meta", "yes"
    except Exception as error:
        holds, text = False, f"no: {raised(error)}"
    return Finding(holds if bench.subject.is_mixer else None, text if holds or "no" in text else "leaves it")


@entry("the same under a seed")
def deterministic(bench: Bench) -> Finding:
    """The same seed gives the same five results, another seed gives others."""
    runs = [list(bench.calls(noise(), 5, seed=seed)) for seed in (3, 3, 4)]

    def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
        return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))

    repeats, ignores = same(runs[0], runs[1]), same(runs[0], runs[2])
    return Finding(repeats, ("yes, whatever the seed" if ignores else "yes") if repeats else "no")


@entry("global generators")
def global_generators(bench: Bench) -> Finding:
    """Which of the global generators it draws from."""
    moved = set()
    bench.subject.seed(1)
    mix = bench.subject.make(None)
    for _ in range(5):
        x, y = noise(), given(torch.arange(BATCH), bench.forms[0])
        before = global_rngs()
        mix(x, y)
        names = zip(("python", "numpy", "torch"), before, global_rngs(), strict=True)
        moved |= {name for name, then, now in names if differences(then, now)}
    text = f"moves {' and '.join(sorted(moved))}" if moved else "left alone"
    return Finding(not moved if bench.subject.is_mixer else None, text)
