"""What the comparisons of methods that look at images share: images, draws, networks, updates."""

from collections.abc import Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import Step, build
from originals import Gap
from originals.same_draws import CLASSES, keeping, relative

UPDATES = 20
RATE = 1e-3
# A ReLU or a maximum turns a rounding into a jump of the gradient; blocks that start at 0 leave pixels without any.
SMOOTH = {"act_layer": nn.SiLU, "zero_init_last": False}
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
LABEL = {"resnet18": "ResNet-18 of SiLU and mean pooling", "vit_tiny_patch16_224": "ViT-Ti/16"}


class Meter:
    """What the originals' loops count with."""

    val = avg = sum = 0.0

    def __init__(self, *args: Any, **options: Any):
        self.update = self.add = self.display = self.value = lambda *args: 0.0


class Sgd(torch.optim.SGD):
    """Plain steps, which keep the gradients of the first."""

    def __init__(self, model: nn.Module):
        super().__init__(model.parameters(), lr=RATE, momentum=0.9)
        self.weights = list(model.parameters())
        self.first: list[Tensor] = []
        self.losses: list[float] = []

    def step(self, closure: Any = None) -> Any:
        """One update."""
        self.first = self.first or [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.weights]
        return super().step(closure)


def batch(seed: int, size: int = 64, count: int = 8, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Images with bright or dark blobs on a smooth ground, without equal pixels, labels, and the labels as targets."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 16, size // 16, generator=generator)
    blobs = F.interpolate(torch.randn(count, 1, size // 8, size // 8, generator=generator) ** 3 / 3, (size, size))
    x = 0.5 * F.interpolate(coarse, (size, size), mode="bicubic") + 0.4 * blobs
    x += 0.05 * torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return 2 * (x / 2).tanh(), labels, F.one_hot(labels, classes).float()


def network(name: str, classes: int = CLASSES, **options: Any) -> Any:
    """A timm model of seed 0, whose BatchNorm has seen some images: else it would blow up in evaluation mode."""
    torch.manual_seed(0)
    options |= {"img_size": 64} if name.startswith("vit") else SMOOTH | options
    model = timm.create_model(name, num_classes=classes, **options).train()
    if options.get("act_layer") is nn.SiLU:
        model.maxpool = nn.AvgPool2d(3, 2, 1)
    with torch.no_grad():
        for seed in range(20):
            model(batch(1000 + seed)[0])
    return model


def made(name: str, **options: Any) -> Any:
    """A mixer of ours."""
    return build(name, **options)


def updated(mixer: Any, model: nn.Module, batches: list[Any], kept: dict[str, list[Any]], criterion: Any) -> Sgd:
    """The optimiser of a model that ours trained, a step for each of the batches."""
    step = Step(model.train(), mixer, criterion)
    optimizer = Sgd(model)
    for seed, (x, _, y) in enumerate(batches):
        optimizer.zero_grad()
        loss = step(x.clone(), y, keeping(seed, kept)).loss
        loss.backward()
        optimizer.losses.append(float(loss.detach()))
        optimizer.step()
    return optimizer


def both_updated(ours: Sgd, theirs: Sgd, what: str, why: str = "") -> Iterator[Gap]:
    """The gradients of the first update, and the weights after the last."""
    yield Gap(f"gradients of all parameters, first update, {what}", relative(ours.first, theirs.first), "relative", why)
    gap = relative(ours.weights, theirs.weights)  # type: ignore[arg-type]
    yield Gap(f"weights after {UPDATES} updates, {what}", gap, "relative", why)


class Head(nn.Module):
    """OpenMixup's head as its classifier calls it, of a network that gives logits itself."""

    def forward(self, x: Any) -> list[Tensor]:
        """The logits, in a list."""
        return x if isinstance(x, list) else [x]

    def loss(self, logits: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The mean cross entropy."""
        return {"loss": F.cross_entropy(logits[0], labels)}


class OnCpu:
    """torch for code that names a device: its new tensors are on the CPU. Of equal values ``topk`` takes the first."""

    @staticmethod
    def topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """torch leaves open which of equal values it takes."""
        found, order = values.sort(descending=True, stable=True)
        return found[:k], order[:k]

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("zeros", "ones", "tensor", "eye"):
            return found
        return lambda *args, device=None, **options: found(*args, **options)
