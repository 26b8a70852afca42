"""What benchmarks/step.py counts, against counting by hand: the numbers that model cards quote."""

import functools
import itertools
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import ROOT
from torch import nn

from mixers import Mixer, Out, Step

B, SIDE, C, K = 8, 224, 4, 1000
PIXELS = B * SIDE**2


@pytest.fixture(scope="module")
def bench():
    """The script, which is no part of a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        return SimpleNamespace(**runpy.run_path(f"{ROOT}/benchmarks/step.py", run_name="step_costs"))


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


def counted(bench, net: nn.Module, times: int) -> list[float]:
    first, second = bench.counted(Step(net, Looks(times), nn.CrossEntropyLoss(reduction="none")), 2)
    assert first == second
    return first


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flops_of_grouped_convolutions_forward_and_backward(bench, groups):
    lift, conv, head = 2 * PIXELS * 3 * C, 2 * PIXELS * 9 * C * C // groups, 2 * B * C * K
    flops, _ = counted(bench, Net(groups), 0)
    assert flops == 2 * lift + 3 * conv + 3 * head  # images need no gradient
    looked, _ = counted(bench, Net(groups), 1)
    assert looked == flops + 2 * lift + 2 * conv + 2 * head  # forward, and backward to the images alone


def test_memory_is_the_most_that_is_held_at_a_time_and_each_storage_once(bench):
    wide = Net()
    wide.head.weight = nn.Parameter(torch.empty(K, C * 500)[:, :C])  # a storage far larger than all that is kept
    once, again, twice, of_wide = (
        counted(bench, net, looks)[1] for net, looks in ((Net(), 0), (Net(), 3), (Net(twice=True), 0), (wide, 0))
    )
    hidden, image = 4 * C * PIXELS, 4 * 3 * PIXELS
    small = 4 * (3 * B * K + 2 * B * C)  # logits' softmax, targets, and the head's input
    assert 2 * hidden + image <= once <= 2 * hidden + image + small  # lift's output, its square, and the images
    assert once <= again <= once + image + small  # a look is over, and its memory free, before the next begins
    assert once == twice == of_wide


def test_a_step_is_timed_by_its_neighbours_and_judged_by_the_operations_of_its_own_update(bench, monkeypatch):
    """On a machine that gets slower by a fifth with each step, and costs a tenth more than what is counted."""
    now, costs = [0.0], {"vanilla": lambda update: 1.0, "switch": lambda update: [1.0, 3.0][update % 2]}
    slower = itertools.accumulate(itertools.repeat(0.2), initial=1.0)

    def call(mixer, update):
        now[0] += next(slower) * costs[mixer](update) * (1.1 if mixer == "switch" else 1)

    calls = {mixer: functools.partial(call, mixer) for mixer in costs}
    times = bench.paired(calls, 4, lambda: now[0])
    assert times["vanilla"] == pytest.approx([1.0] * 4) and times["switch"] == pytest.approx([3.3, 1.1, 3.3, 1.1])
    inside = bench.measured.__globals__
    monkeypatch.setitem(inside, "made", lambda create, mixer, teacher: costs[mixer])
    monkeypatch.setitem(inside, "timed", lambda *_: (times, {}))
    monkeypatch.setitem(inside, "counted", lambda cost, updates: [[cost(u), 1.0] for u in range(1, updates + 1)])
    row = bench.measured("resnet10t", ["switch"], 3, 4, torch.device("cpu"), "")["switch"]
    assert row["FLOPs"] == round(7 / 3, 3)  # of three updates, of which two are dear
    assert row["least"] == row["time"] == row["most"] == round(1.1 * 7 / 3, 3)


def test_a_time_that_was_not_measured_again_stays_in_the_file(bench, tmp_path):
    path, cost = tmp_path / "costs.csv", {"FLOPs": 1.0, "kept for backward": 1.0}
    time = {"time": 1.5, "least": 1.4, "most": 2.0}
    bench.write(path, "a", {"vanilla": cost | {"time": 1.0}, "mixup": cost | time}, "CPU")
    bench.write(path, "b", {"vanilla": cost, "transmix": "no attention"}, "GPU")
    bench.write(path, "a", {"vanilla": cost, "mixup": cost | {"FLOPs": 2.0}}, "GPU")
    rows = [
        "a,vanilla,1.000,1.000,1.000,,,CPU",
        "a,mixup,2.000,1.000,1.500,1.400,2.000,CPU",
        "b,vanilla,1.000,1.000,,,,",
    ]
    assert path.read_text().splitlines() == ["model,mixer,flops,kept,time,least,most,timed_on", *rows]
