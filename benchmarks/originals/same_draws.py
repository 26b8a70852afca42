"""The draws of ours, handed to an original, and batches, models and short runs that both get."""

import contextlib
import math
import subprocess
import tempfile
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm.data.mixup
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixup_recipes.recipe import Recipe
from mixup_recipes.training.update import criterion, one_hot
from originals import Checkout, Gap, Numpy

CLASSES = 10
OPENMIXUP = "openmixup/models/augments"
Mixed = tuple[Tensor, tuple[Tensor, Tensor, Any]]
space = types.SimpleNamespace


class Keeping:
    """A generator that keeps what it gave, and of which law, so that the original can be given the same."""

    def __init__(self, seed: int, kept: dict[str, list[Any]]):
        self.rng, self.kept = np.random.default_rng(seed), kept

    def __getattr__(self, kind: str) -> Any:
        def draw(*args: Any, **options: Any) -> Any:
            value = getattr(self.rng, kind)(*args, **options)
            self.kept.setdefault(kind, []).append((law(kind, args), value))
            return value

        return draw


def keeping(seed: int, kept: dict[str, list[Any]]) -> Any:
    """A generator, as mixers take it, that keeps its draws in ``kept``."""
    return Keeping(seed, kept)


class Again:
    """The random functions of the originals: they give what ``kept`` holds, in turn, and count draws of other laws."""

    kinds: typing.ClassVar = {"randint": "integers", "rvs": "beta"}

    def __init__(self, kept: dict[str, list[Any]] | None = None, **given: Callable[..., Any]):
        self.given = given
        self.kept: dict[str, list[Any]] = {} if kept is None else kept
        self.asked = self.other = 0
        self.answers: Iterator[int] = iter(())

    def answering(self) -> Any:
        """Python's ``random``, whose integers are the ``answers``."""
        return space(randint=lambda *_: next(self.answers))

    def __getattr__(self, name: str) -> Any:
        def draw(*args: Any, **options: Any) -> Any:
            kind = self.kinds.get(name, name)
            if kind == "uniform" and args[0] == args[1]:  # a range of one number, which ours does not draw
                return args[0]
            expected, value = self.kept[kind].pop(0)
            self.asked += 1
            self.other += int(expected != law(kind, args))
            return value

        return self.given.get(name, draw)

    def gap(self) -> Gap:
        """Whether the original asked for the laws that ours drew from, since the last time."""
        what = f"draws that the original makes from another distribution, of {self.asked:,}"
        gap = Gap(what, self.other / self.asked, "share")
        self.asked = self.other = 0
        return gap


def law(kind: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a draw as they can be compared, a range of integers always from 0."""
    plain = tuple(np.asarray(value).tolist() for value in args)
    return (0, *plain) if kind == "integers" and len(plain) == 1 else plain


@contextlib.contextmanager
def on_cpu(draws: Any, **also: Callable[..., Any]) -> Iterator[None]:
    """Originals stay on the CPU, and pair a batch as ours did; ``also`` replaces other functions of torch."""
    permuted = {"randperm": lambda n, **options: torch.as_tensor(draws.permutation(n))} | also
    with contextlib.ExitStack() as stack:
        for kind in (Tensor, nn.Module):
            stack.enter_context(mock.patch.object(kind, "cuda", lambda self, *args, **options: self))
        for name, function in permuted.items():
            stack.enter_context(mock.patch.object(torch, name, function))
        yield


def batch(seed: int, size: int | tuple[int, int] = 64, count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Images with coarse structure and fine noise, labels, and the labels as targets."""
    sides = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, *(side // 8 for side in sides), generator=generator)
    x = F.interpolate(coarse, sides, mode="bicubic") + 0.1 * torch.randn(count, 3, *sides, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return x, labels, F.one_hot(labels, CLASSES).to(x.dtype)


def farthest(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; infinite where one is not a number."""
    return float((ours.detach().double() - theirs.detach().double()).abs().nan_to_num(math.inf).max())


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of all tensors, relative to the largest value of the original's."""
    return max(map(farthest, ours, theirs)) / max(float(t.detach().abs().max()) for t in theirs)


def beside_each_other(
    mixer: Any,
    theirs: Callable[[Tensor, Tensor], Mixed],
    again: Again,
    batches: int,
    size: int | tuple[int, int],
    recount: Callable[[dict[str, list[Any]]], Any] = lambda kept: None,
    why: str = "",
    **torch_functions: Callable[..., Any],
) -> Iterator[Gap]:
    """Mixed images, label weights and laws of a mixer that plans by itself, beside a function of the original.

    ``recount`` brings what ours drew into the original's order. ``why``: for the images.
    """
    images = labels = 0.0
    for seed in range(batches):
        x, _, y = batch(seed, size)
        again.kept = {}
        plan = mixer.plan(x, y, keeping(seed, again.kept))
        ours = mixer.mix(x, y, **plan)
        recount(again.kept)
        with on_cpu(again, **torch_functions):
            mixed, (y_a, y_b, lam) = theirs(x.clone(), y)
        images = max(images, farthest(ours[0], mixed))
        labels = max(labels, farthest(ours[1], lam * y_a + (1 - lam) * y_b))
    sides = f"{size} x {size}" if isinstance(size, int) else "{} x {}".format(*size)
    yield Gap(f"mixed images, {batches:,} batches, {sides} pixels", images, why=why)
    yield Gap(f"label weights, {batches:,} batches", labels)
    yield again.gap()


def openmixup(original: Checkout, name: str, again: Again, *also: str, **given: Any) -> Callable[..., Mixed]:
    """A mixing function of OpenMixup."""
    found = original.names(f"{OPENMIXUP}/{name}.py", name, *also, np=Numpy(again), torch=torch, math=math, **given)
    function: Callable[..., Mixed] = found[0] if also else found
    return function


def redrawn(original: Checkout, file: str) -> Gap:
    """How often OpenMixup's partners are no longer those of the permutation that was drawn first."""
    redraw = original.names(f"{OPENMIXUP}/{file}.py", "_no_repeat_shuffle_idx", np=np, torch=torch)
    differing = 0
    with mock.patch.object(Tensor, "cuda", lambda self: self):
        for seed in range(2000):
            torch.manual_seed(seed)
            first = torch.randperm(64)
            torch.manual_seed(seed)
            differing += int(not torch.equal(first, redraw(64, ignore_failure=True)))
    why = "since March 2025 OpenMixup draws again while an image is its own partner; its tables are older"
    return Gap("permutations of 64 that the redraw changes, 2,000 draws", differing / 2000, "share", why)


def small(size: int = 64) -> nn.Module:
    """A transformer of four blocks, always the same."""
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=size, depth=4, num_classes=CLASSES)
    return made.train()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimiser of all short runs here."""
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


@contextlib.contextmanager
def earlier(original: Checkout, commit: str, *files: str) -> Iterator[Checkout]:
    """The files as they were at a commit of the checkout's history."""
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            command = ["git", "-C", str(original.folder), "show", f"{commit}:{file}"]
            path = Path(folder) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        yield Checkout(Path(folder))


def trained(
    mixer: Any,
    model: nn.Module,
    kept: dict[str, list[Any]],
    updates: int,
    size: int = 64,
    recipe: Recipe | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Updates of a model by our step, on the batches 0, 1, 2, ...; the gradients of the last one.

    ``recipe``: its loss and smoothing, cross entropy without smoothing by default; ``loss`` in place of its loss.
    """
    recipe = recipe or Recipe(num_classes=CLASSES)
    both = nn.ModuleList([model, mixer])
    optimizer = sgd(both)
    for seed in range(updates):
        x, labels, _ = batch(seed, size)
        optimizer.zero_grad()
        mixer(model, loss or criterion(recipe), x, one_hot(labels, recipe), keeping(seed, kept)).loss.backward()
        optimizer.step()
        mixer.after_step(model, (seed + 1) / updates)
    return gradients(both)


def twenty_updates(
    mixer: Any,
    theirs: Callable[[nn.Module], None],
    again: Again,
    how: str = "",
    why: str = "",
    recount: Callable[[dict[str, list[Any]]], Any] = lambda kept: None,
    recipe: Recipe | None = None,
    size: int = 64,
) -> Iterator[Gap]:
    """What 20 updates show a small transformer, and what they make of its weights, by ours and by ``theirs``.

    ``theirs`` trains the model that it is given, on the batches of ``loader``. ``how`` is of both gaps, ``why`` of the
    second; ``recount`` brings what ours drew into the original's order.
    """
    again.kept, ours, model = {}, small(size), small(size)
    images = seen(ours), seen(model)
    trained(mixer, ours, again.kept, 20, size, recipe)
    recount(again.kept)
    theirs(model)
    yield Gap(f"mixed images of 20 updates, {size} x {size} pixels{how}", farthest(*map(torch.stack, images)))
    yield weights(ours, model, f"20 updates, ViT of 4 blocks, {size} pixels{how}", why)


def gradients(model: nn.Module) -> list[Tensor]:
    """Those of all parameters."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def seen(model: nn.Module) -> list[Tensor]:
    """The images that a model is going to be given."""
    images: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0].clone()))
    return images


def loader(updates: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """The same batches as an original's loop takes them."""
    return [batch(seed, size)[:2] for seed in range(updates)]


def weights(ours: nn.Module, theirs: nn.Module, what: str, why: str = "") -> Gap:
    """All weights of both."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    gap = relative([mine[name] for name in other], list(other.values()))
    return Gap(f"weights after {what}", gap, "relative", why)


def inclusive(again: Again) -> Any:
    """Python's ``random``, whose integers include the last one."""
    return space(randint=lambda low, high: again.integers(low, high + 1), random=lambda: again.random())
