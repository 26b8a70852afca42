"""What the checks are made of: a tiny step, batches, updates, and comparisons bit for bit."""

import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ..base import Mixer, Out, Step

Factory = Callable[[], Mixer]

CLASSES = 5


def expect(holds: bool, expected: str, found: object) -> None:
    """Raise ``AssertionError`` unless ``holds``."""
    if not holds:
        raise AssertionError(f"expected {expected}; found {found}")


def tiny_step(factory: Factory, seed: int = 0, classes: int = CLASSES) -> Step:
    """A new mixer on a tiny convolutional network with BatchNorm, or on a tiny ViT when it refuses the first one.

    Weights depend on ``seed`` only, those that the mixer makes in ``setup`` included.
    """
    refusals = []
    with torch.random.fork_rng(devices=[]):
        for name in ("test_resnet", "test_vit"):
            model, drawn = tiny_model(name, seed, classes)
            torch.set_rng_state(drawn)
            try:
                return Step(copy.deepcopy(model), factory(), nn.CrossEntropyLoss(reduction="none"))
            except ValueError as error:
                refusals.append(f"{name}: {error}")
    raise AssertionError(f"expected a mixer that can be set up on one of two tiny models; found {refusals}")


@functools.cache
def tiny_model(name: str, seed: int, classes: int) -> tuple[nn.Module, Tensor]:
    """A network, which nobody may change, and the state of torch's generator once its weights were drawn."""
    options: dict[str, Any] = {"dynamic_img_size": True, "patch_size": 8} if name == "test_vit" else {}
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes, **options), torch.get_rng_state()


def batch(size: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images ``(B, 3, H, W)`` and one-hot targets ``(B, K)`` in which neighbours differ."""
    images = np.random.default_rng(seed).standard_normal((size, 3, height, width), dtype=np.float32)
    return torch.from_numpy(images), torch.eye(CLASSES)[torch.arange(size) % CLASSES]


def rng_of(step: int) -> np.random.Generator:
    """The generator of one optimiser update, made as the training loop makes it."""
    return np.random.default_rng((0, step))


def train(step: Step, first: int, last: int, total: int) -> list[float]:
    """Updates ``first`` to ``last - 1`` of ``total`` with plain SGD; returns the losses."""
    lr = 0.01
    groups: list[dict[str, Any]] = [{"params": [p for p in step.model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.SGD(groups + step.mixer.param_groups(lr, 0.0), lr=lr)
    losses = []
    for index in range(first, last):
        out = step(*batch(seed=index), rng_of(index))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.mixer.after_step(step.model, (index + 1) / total)
        losses.append(out.loss.item())
    return losses


def updates(step: Step, x: Tensor, y: Tensor, number: int) -> Iterator[Out]:
    """What ``number`` updates on one batch give, without an optimiser: a mixer may keep something for the next one."""
    for index in range(number):
        yield step(x, y, rng_of(index))
        step.mixer.after_step(step.model, (index + 1) / number)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything inside nested dicts, lists and tuples."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


def differences(a: Any, b: Any) -> list[str]:
    """Paths at which two nested values are not the same bit for bit."""
    left, right = dict(leaves(a)), dict(leaves(b))
    paths = list(left) + [path for path in right if path not in left]
    return [path for path in paths if path not in left or path not in right or not equal(left[path], right[path])]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference between two tensors of one shape."""
    return (a - b).abs().max().item()


def global_rngs() -> list[Any]:
    """The states of the global generators of python, numpy and torch, in plain values."""
    state: Any = np.random.get_state()
    return [random.getstate(), [state[1].tolist(), *state[2:]], torch.get_rng_state()]


def expect_global_rngs(before: list[Any], where: str) -> None:
    for name, a, b in zip(("python", "numpy", "torch"), before, global_rngs(), strict=True):
        expect(not differences(a, b), f"the global generator of {name} where it was after {where}", "it moved")


def footprint(model: nn.Module) -> dict[str, Any]:
    """All that a step may not change on a model: modes, hooks, attributes, flags and gradients, but not buffers."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str))
            found[f"{name}.{key}"] = value if plain else len(value) if isinstance(value, dict) else type(value).__name__
    for name, parameter in model.named_parameters():
        found[f"{name}.requires_grad"] = parameter.requires_grad
        found[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
    return found


class Recorder(np.random.Generator):
    """The generator of step 0, which keeps everything that was drawn from it."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64((0, 0)))
        self.draws: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def draw(*args: Any, **options: Any) -> Any:
            result = found(*args, **options)
            self.draws.append(result)
            return result

        return draw
