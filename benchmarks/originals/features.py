"""Methods that swap parts of hidden features: PatchUp, hard and soft."""

import copy
import enum
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import build
from originals import Checkout, Gap, Numpy, beside
from originals.same_draws import (
    CLASSES,
    Again,
    batch,
    farthest,
    gradients,
    inclusive,
    keeping,
    on_cpu,
    relative,
    sgd,
    space,
    trained,
    weights,
)

PATCHUP = ("main.py", "models/preresnet.py", "modules/patchup.py", "modules/cutmix.py", "utility/utils.py")
HELD = "test_feature_mixers.py::test_patchup_is_a_forward_whose_feature_has_its_blocks_replaced"


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of the published loop."""
    return nn.BCELoss()(nn.Softmax(dim=1)(logits), target)


class Loop:
    """The published loop and its ResNet, without kinks, with our draws. ``said``: what its command line would."""

    def __init__(self, original: Checkout, **said: Any):
        self.again = Again(rand=lambda n: np.array([self.chosen.pop(0)]))
        self.chosen: list[float] = []
        given: dict[str, Any] = {"np": Numpy(self.again), "torch": torch, "nn": nn, "F": F, "device": "cpu"}
        given |= {
            "Variable": lambda value, **options: value,
            "Enum": enum.Enum,
            "time": time,
            "random": inclusive(self.again),
        }
        one, meter = original.names(PATCHUP[4], "to_one_hot", "AverageMeter", **given)
        kind, self.module = original.names(PATCHUP[2], "PatchUpMode", "PatchUp", **given)
        given |= {"to_one_hot": one, "AverageMeter": meter, "PatchUpMode": kind, "PatchUp": self.module}
        given["CutMix"] = original.names(PATCHUP[3], "CutMix", **given)
        given["DropBlock"] = lambda **options: nn.Identity()
        smooth = given | {"F": space(relu=F.gelu, avg_pool2d=F.avg_pool2d)}
        self.made = original.names(PATCHUP[1], "PreActBlock", "PreActResNet", "preactresnet18", **smooth)[-1]
        given |= {"bce_loss": nn.BCELoss(), "softmax": nn.Softmax(dim=1), "loss_alpha": 1, "loss_beta": 1}
        given |= {"accuracy": lambda *_, topk: torch.zeros(2), "print_log": lambda *_: None, "time_string": str}
        self.train = original.names(PATCHUP[0], "train", **given)
        self.said = space(train="patchup", k=2, print_freq=10**9, **said)
        self.said.patchup_type = self.kind = kind(said["patchup_type"])

    def net(self, gamma: float) -> Any:
        """Its ResNet, as our mixers take a model."""
        torch.manual_seed(0)
        net = self.made(CLASSES, gamma=gamma)
        net.feature_info = [{"module": f"layer{n}", "reduction": 2 ** (n - 1)} for n in (1, 2, 3, 4)]
        return net

    def bernoulli(self, p: Tensor) -> Tensor:
        """The centres that ours drew, as how many and then which, where the original draws each by itself."""
        (size, probability), _ = self.again.kept["binomial"].pop(0)
        places = torch.from_numpy(self.again.kept["choice"].pop(0)[1])
        self.again.asked += 1
        self.again.other += int(size != p.numel() or abs(p.flatten()[0].item() / probability - 1) > 1e-6)
        return torch.zeros(p.numel()).index_fill(0, places, 1.0).view_as(p)

    def recount(self, kept: dict[str, list[Any]], layers: list[int | None]) -> None:
        """Our draws in the original's order. ``layers``: of each update; None where nothing is mixed."""
        self.chosen = [1.0 if layer is None else 0.0 for layer in layers]
        kept["choice"] = [draw for draw in kept.get("choice", []) if isinstance(draw[1], np.ndarray)]
        if self.kind.value == "hard":  # where it draws a share, too, that it does not use
            beta = iter(kept.get("beta", []))
            kept["beta"] = [next(beta) if layer == 0 else ((2.0, 2.0), 0.5) for layer in layers if layer is not None]
        self.again.kept = kept

    def run(self, net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Updates by the loop; the mean of their losses."""
        with on_cpu(self.again, bernoulli=self.bernoulli):
            loss: float = self.train(batches, net, optimizer, 0, self.said, None)[2]
        return loss


def patchup(original: Checkout, name: str, **said: Any) -> Iterator[Gap]:
    """Features, losses, gradients and weights of one of the two forms. ``said``: the command line of its CIFAR runs."""
    loop, mixer = Loop(original, **said), build(name)
    net = loop.net(said["gamma"])
    mixer.setup(net)
    yield from features(loop, mixer, said["gamma"])
    gaps, seen = dict.fromkeys(("loss", "gradients of all parameters"), 0.0), set()
    for seed in range(24):
        x, labels, y = batch(seed, 32)
        kept: dict[str, list[Any]] = {}
        net.zero_grad()
        out = mixer(net, bce, x, y, keeping(seed, kept))
        out.loss.backward()
        ours = gradients(net)
        seen.add(out.plan.get("layer"))
        loop.recount(kept, [out.plan.get("layer")])
        net.zero_grad()
        loss = loop.run(net, torch.optim.SGD(net.parameters(), lr=0.0), [(x, labels)])
        gaps["loss"] = max(gaps["loss"], abs(out.loss.item() - loss) / loss)
        gaps["gradients of all parameters"] = max(gaps["gradients of all parameters"], relative(ours, gradients(net)))
    assert seen == ({0, 1, 2, None} if name == "patchup" else {0, 1, 2})
    for what, gap in gaps.items():
        yield Gap(f"{what}, 24 batches, smooth PreActResNet-18, 32 pixels", gap, "relative")
    yield loop.again.gap()
    other, optimizer, layers = copy.deepcopy(net), sgd(net), list[int | None]()
    mixer.setup(other)
    drawn: dict[str, list[Any]] = {}
    trained(noting(mixer, layers), other, drawn, 20, 32, loss=bce)
    loop.recount(drawn, layers)
    loop.run(net, optimizer, [batch(seed, 32)[:2] for seed in range(20)])
    yield weights(other, net, "20 updates, smooth PreActResNet-18, 32 pixels")
    yield loop.again.gap()


def noting(mixer: Any, layers: list[int | None]) -> Any:
    """The mixer, which notes where each step mixed."""
    step = type(mixer).forward

    def forward(self: Any, *args: Any) -> Any:
        out = step(self, *args)
        layers.append(out.plan.get("layer"))
        return out

    mixer.forward = types.MethodType(forward, mixer)
    return mixer


def features(loop: Loop, mixer: Any, gamma: float) -> Iterator[Gap]:
    """What the published module makes of a feature and of its targets."""
    one = next(part for part in mixer.modules() if hasattr(part, "block_size"))
    found: Callable[..., Any] = loop.module(block_size=one.block_size, gamma=gamma).train()
    gap = labels = 0.0
    for seed in range(200):
        x, _, y = batch(seed, 16)
        feature = torch.randn(len(x), 12, 16, 16, generator=torch.Generator().manual_seed(seed))
        kept: dict[str, list[Any]] = {}
        plan = one.plan(x, y, keeping(seed, kept), 1, (12, 16, 16))
        weight = plan["mask"] + (1 - plan["mask"]) * plan["share"].view(-1, 1, 1, 1)
        loop.recount(kept, [1])
        with on_cpu(loop.again, bernoulli=loop.bernoulli):
            *_, target, mixed, part = found(feature, y, patchup_type=loop.kind)
        gap = max(gap, farthest(torch.lerp(feature[plan["index"]], feature, weight), mixed))
        labels = max(labels, farthest(one.mix(x, y, **plan | {"layer": 1})[1], target))
        labels = max(labels, farthest(plan["uncovered"], part.expand(len(x))))
    yield Gap("mixed features, 200 of 12 channels and 16 x 16 positions", gap)
    yield Gap("targets and the part that no block covers, 200 batches", labels)
    yield loop.again.gap()


@beside("patchup", "chandar-lab/PatchUp", *PATCHUP, held=HELD)
def patchup_hard(original: Checkout) -> Iterator[Gap]:
    """The hard form, in seven batches of ten."""
    yield from patchup(original, "patchup", patchup_type="hard", patchup_prob=0.7, gamma=0.5)


@beside("softpatchup", "chandar-lab/PatchUp", *PATCHUP, held=HELD)
def patchup_soft(original: Checkout) -> Iterator[Gap]:
    """The soft form, in every batch."""
    yield from patchup(original, "softpatchup", patchup_type="soft", patchup_prob=1.0, gamma=0.75)
