"""Labelling solvers of PuzzleMix and Co-Mixup beside one graph cut per image, on one CPU thread.

    python benchmarks/solvers.py

PuzzleMix: masks of 128 pairs, 8 x 8 blocks, three labels, on random saliency, and how their blocks move; gco's
alpha-beta swap labels the same pairs one by one. Co-Mixup: 100 images in parts of 20, 4 x 4 cells, four rounds; gco
labels one by one the 400 mosaics that come up. Only the cuts count, not what the reference codes do around them. All
is timed in turns within one process, each right after a call of its own that is not timed; ``--cold`` leaves that call
out, so that caches hold what others left there, as in a training step. Times are the thread's own, without the moments
in which other processes had the core. Kernels: what a GPU would be asked to run, counted on the meta device without
views. Prints Markdown; the column of gco needs the extra ``oracle``.
"""

# ruff: noqa: E402
import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # beside this file "mixers" would mean mixers.py

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import gco
except ImportError:
    gco = None

from mixers import CoMixup, grids
from mixers.puzzlemix import transported

PAIRS, GRID, LABELS = 128, 8, 3
PARTS, PART, CELLS = 5, 20, 4
UNITS = 2**18  # of energy, per 1: gco overflows with floating-point numbers
Function = Callable[[], Any]


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    saliency, problem = pairs()
    labels = grids.descent(*problem)
    both = saliency, torch.cat([labels < LABELS - 1, labels > 0])
    parts = mosaics()

    def puzzle(*args: torch.Tensor) -> None:
        *solved, saliency, shown = args
        grids.descent(*solved)
        transported(saliency, shown, 0.8)

    step = problem[0], *problem[2:]
    calls: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
        "PuzzleMix, masks": (grids.descent, problem),
        "PuzzleMix, masks and moves": (puzzle, (*problem, *both)),
        "one binary step of the masks, 128 pairs": (grids.binary, step),
        "one binary step of the masks, 8 pairs": (grids.binary, tuple(t[:8] for t in step)),
        "Co-Mixup": (CoMixup().solve, parts),
        "one part of Co-Mixup's five": (CoMixup().solve, tuple(t[:1] for t in parts)),
    }
    ours = {name: functools.partial(function, *inputs) for name, (function, inputs) in calls.items()}
    cuts: dict[str, Function] = {}
    if gco:
        cuts["gco, PuzzleMix"] = functools.partial(cut_all, puzzle_cuts(*problem))
        cuts["gco, Co-Mixup"] = functools.partial(cut_all, mosaic_cuts(parts))
    times = measure(ours | cuts, args.repeats, args.cold)
    versions = f"torch {torch.__version__}, numpy {np.__version__}"
    print(f"`python {' '.join(sys.argv)}`: {versions}; CPU time, 1 thread; median (least) of {args.repeats}.\n")
    print("| | milliseconds | gco, one by one | times faster | kernels on a GPU |")
    print("|---|---:|---:|---:|---:|")
    for name, (function, inputs) in calls.items():
        mine, cut = times[name], times.get("gco, " + name.split(",")[0])
        theirs = f"{shown(cut)} | {cut[0] / mine[0]:.1f} ({cut[1] / mine[1]:.1f})" if cut else "| "
        print(f"| {name} | {shown(mine)} | {theirs} | {kernels(function, *inputs)} |")


def shown(seconds: tuple[float, float]) -> str:
    """Median and least, in milliseconds."""
    return f"{1e3 * seconds[0]:.3g} ({1e3 * seconds[1]:.3g})"


def pairs() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Saliency of both images of each pair, and costs of the size that PuzzleMix makes of it with its defaults."""
    rng = np.random.default_rng(0)
    saliency = rng.dirichlet(np.full(GRID**2, 0.5), (2, PAIRS)).reshape(2, PAIRS, GRID, GRID)
    top, lam = LABELS - 1, 0.4
    chance = [math.comb(top, n) * lam ** (top - n) * (1 - lam) ** n for n in range(LABELS)]
    scale = 1.2 / 16 / GRID / top**2
    down, right = (scale * rng.uniform(0.75, 1.25, (PAIRS, GRID - a, GRID - b)) for a, b in ((1, 0), (0, 1)))
    problem = (saliency[0] - saliency[1]) / top, -0.2 / GRID**2 * np.log(chance), down, right
    return torch.from_numpy(np.concatenate(saliency)).float(), tuple(torch.from_numpy(v).float() for v in problem)


def mosaics() -> tuple[torch.Tensor, ...]:
    """Costs, compatibility and first labels of Co-Mixup's parts."""
    rng = np.random.default_rng(0)
    costs = -rng.dirichlet(np.full(CELLS**2, 0.5), (PARTS, PART)).reshape(PARTS, PART, CELLS, CELLS)
    costs -= 0.05 / CELLS**2 * np.log(rng.dirichlet(np.full(PART, 2.0), PARTS) + 1e-8)[:, :, None, None]
    labels = torch.from_numpy(rng.integers(PART, size=costs.shape))
    return torch.from_numpy(costs).float(), torch.eye(PART).expand(PARTS, -1, -1), labels


def puzzle_cuts(slope: torch.Tensor, prior: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> list[tuple]:
    """The arguments of gco for each pair."""
    level = torch.arange(LABELS)
    alone, below, beside = (whole(t) for t in (slope[..., None] * level + prior, down, right))
    between = ((level[:, None] - level) ** 2).int().numpy()
    return [(alone[i], between, below[i], beside[i]) for i in range(PAIRS)]


def mosaic_cuts(parts: tuple[torch.Tensor, ...]) -> list[tuple]:
    """The arguments of gco for each mosaic that Co-Mixup labels on its way."""
    made = []
    solve = grids.swept

    def record(on: Any, grid: Any, costs: Any, pairwise: Any, *rest: Any) -> Any:
        for one, between in zip(costs, pairwise, strict=True):
            used = np.isfinite(one).all((0, 1))  # the others stand for halves that this mosaic does not have
            finite = torch.from_numpy(one[..., used]), torch.from_numpy(between[used][:, used])
            ones = np.ones((CELLS, CELLS), np.int32)
            made.append((*map(whole, finite), ones[1:], np.ascontiguousarray(ones[:, 1:])))
        return solve(on, grid, costs, pairwise, *rest)

    with mock.patch.object(grids, "swept", record):
        CoMixup().solve(*parts)
    return made


def whole(values: torch.Tensor) -> np.ndarray:
    """Energies as integers."""
    return np.ascontiguousarray((UNITS * values).round().int().numpy())


def cut_all(problems: list[tuple]) -> None:
    """Label them one by one."""
    for problem in problems:
        gco.cut_grid_graph(*problem, algorithm="swap")


class Count(TorchDispatchMode):
    """Counts operations that are no views."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += not function.is_view
        return function(*args, **(kwargs or {}))


def kernels(function: Callable[..., Any], *args: torch.Tensor) -> int:
    """How many kernels a call runs on a device whose values cannot be read."""
    with Count() as count:
        function(*(tensor.to("meta") for tensor in args))
    return count.found


def measure(functions: dict[str, Function], repeats: int, cold: bool) -> dict[str, tuple[float, float]]:
    """Median and least seconds of each, in turns so that a slow moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            if not cold:
                function()
            began = time.thread_time()
            function()
            if turn > 1:
                times[name].append(time.thread_time() - began)
    return {name: (statistics.median(values), min(values)) for name, values in times.items()}


if __name__ == "__main__":
    main()
