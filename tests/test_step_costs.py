"""What benchmarks/step.py counts, against counting by hand: the numbers that model cards quote."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from mixers import Mixer, Out, Step

B, SIDE, C, K = 8, 224, 4, 1000
PIXELS = B * SIDE**2


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script, which is no part of a package."""
    path = Path(__file__).parent.parent / "benchmarks/step.py"
    spec = importlib.util.spec_from_file_location("step_costs", path)
    module = importlib.util.module_from_spec(spec)
    first = sys.path[0]
    spec.loader.exec_module(module)
    sys.path[0] = first
    return module


class Net(nn.Module):
    """A convolution in groups, a mean over pixels, a linear layer. ``twice``: a tensor that two operations keep."""

    def __init__(self, groups: int = 1, twice: bool = False):
        super().__init__()
        self.twice = twice
        self.lift = nn.Conv2d(3, C, 1)
        self.conv = nn.Conv2d(C, C, 3, padding=1, groups=groups, bias=False)
        self.head = nn.Linear(C, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lifted = self.lift(x)
        hidden = lifted.square() + lifted.square() if self.twice else lifted.square()
        return self.head(self.conv(hidden).mean((2, 3)))


class Looks(Mixer):
    """Asks for the input's gradient ``times`` times before the step."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def forward(self, model, criterion, x, y, rng) -> Out:
        for _ in range(self.times):
            images = x.clone().requires_grad_()
            torch.autograd.grad(criterion(model(images), y).mean(), images)
        logits = model(x)
        return Out(criterion(logits, y).mean(), logits, y, {}, {})


def counted(bench: ModuleType, net: nn.Module, times: int) -> tuple[float, float]:
    return bench.counted(Step(net, Looks(times), nn.CrossEntropyLoss(reduction="none")), 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flops_of_grouped_convolutions_forward_and_backward(bench: ModuleType, groups: int) -> None:
    lift, conv, head = 2 * PIXELS * 3 * C, 2 * PIXELS * 9 * C * C // groups, 2 * B * C * K
    flops, _ = counted(bench, Net(groups), 0)
    assert flops == 2 * lift + 3 * conv + 3 * head  # images need no gradient
    looked, _ = counted(bench, Net(groups), 1)
    assert looked == flops + 2 * lift + 2 * conv + 2 * head  # forward, and backward to the images alone


def test_memory_is_the_most_that_is_held_at_a_time_and_each_storage_once(bench: ModuleType) -> None:
    _, once = counted(bench, Net(), 0)
    hidden, image = 4 * C * PIXELS, 4 * 3 * PIXELS
    small = 4 * (3 * B * K + 2 * B * C)  # logits' softmax, targets, and the head's input
    assert 2 * hidden + image <= once <= 2 * hidden + image + small  # lift's output, its square, and the images
    _, again = counted(bench, Net(), 3)
    assert once <= again <= once + image + small  # a look is over, and its memory free, before the next begins
    _, twice = counted(bench, Net(twice=True), 0)
    assert twice == once
    wide = Net()
    wide.head.weight = nn.Parameter(torch.empty(K, C * 500)[:, :C])  # a storage far larger than all that is kept
    assert wide.head.weight.untyped_storage().nbytes() > 0.5 * hidden
    assert counted(bench, wide, 0)[1] == once


def test_a_time_that_was_not_measured_again_stays_in_the_file(bench: ModuleType, tmp_path: Path) -> None:
    path, cost = tmp_path / "costs.csv", {"FLOPs": 1.0, "kept for backward": 1.0}
    bench.write(path, "a", {"vanilla": cost | {"time": 1.0}, "mixup": cost | {"time": 1.5}}, "CPU")
    bench.write(path, "b", {"vanilla": cost, "transmix": "no attention"}, "GPU")
    bench.write(path, "a", {"vanilla": cost, "mixup": cost | {"FLOPs": 2.0}}, "GPU")
    assert path.read_text().splitlines() == [
        "model,mixer,flops,kept,time,timed_on",
        "a,vanilla,1.000,1.000,1.00,CPU",
        "a,mixup,2.000,1.000,1.50,CPU",
        "b,vanilla,1.000,1.000,,",
    ]
