"""Methods that cut and blend without looking: boxes, grids, masks, constants, features that are aligned."""

import contextlib
import copy
import itertools
import math
import random
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import build
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.update import criterion, one_hot
from originals import Checkout, Gap, Numpy, beside

CLASSES = 10
OPENMIXUP = "openmixup/models/augments"
Mixed = tuple[Tensor, tuple[Tensor, Tensor, Any]]
space = types.SimpleNamespace


class Drawn:
    """A generator that keeps what it gave, and of which law, so that the original can be given the same."""

    def __init__(self, seed: int, kept: dict[str, list[Any]]):
        self.rng, self.kept = np.random.default_rng(seed), kept

    def __getattr__(self, kind: str) -> Any:
        def draw(*args: Any, **options: Any) -> Any:
            value = getattr(self.rng, kind)(*args, **options)
            self.kept.setdefault(kind, []).append((law(kind, args), value))
            return value

        return draw


class Again:
    """The random functions of the originals: they give what ``kept`` holds, in turn, and count draws of other laws."""

    kinds: typing.ClassVar = {"randint": "integers", "rvs": "beta"}

    def __init__(self, **given: Callable[..., Any]):
        self.given = given
        self.kept: dict[str, list[Any]] = {}
        self.asked = self.other = 0

    def __getattr__(self, name: str) -> Any:
        def draw(*args: Any, size: int | None = None) -> Any:
            kind = self.kinds.get(name, name)
            if kind == "uniform" and args[0] == args[1]:  # a range of one number, which ours does not draw
                return args[0]
            expected, value = self.kept[kind].pop(0)
            self.asked += 1
            self.other += int(expected != law(kind, args))
            return value

        return self.given.get(name, draw)

    def gap(self) -> Gap:
        """Whether the original asked for the laws that ours drew from."""
        return Gap(f"the laws that are drawn from, {self.asked:,} draws", self.other / self.asked, "share")


def law(kind: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a draw, a range of integers always from 0."""
    return (0, *args) if kind == "integers" and len(args) == 1 else args


@contextlib.contextmanager
def on_cpu(draws: Any, **also: Callable[..., Any]) -> Iterator[None]:
    """Originals stay on the CPU, and pair a batch as ours did; ``also`` replaces other functions of torch."""
    permuted = {"randperm": lambda n: torch.from_numpy(draws.permutation(n))} | also
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
    return x, labels, F.one_hot(labels, CLASSES).float()


def farthest(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference."""
    return float((ours.detach().double() - theirs.detach().double()).abs().max())


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
        plan = mixer.plan(x, y, Drawn(seed, again.kept))
        ours = mixer.mix(x, y, **plan)
        recount(again.kept)
        with on_cpu(again, **torch_functions):
            mixed, (y_a, y_b, lam) = theirs(x.clone(), y)
        images, labels = max(images, farthest(ours[0], mixed)), max(labels, farthest(ours[1], lam * y_a + (1 - lam) * y_b))
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


def small() -> nn.Module:
    """A transformer of four blocks for 64 pixels, always the same."""
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=CLASSES)
    return made.train()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimiser of all short runs here."""
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def trained(mixer: Any, model: nn.Module, kept: dict[str, list[Any]], updates: int, size: int = 64) -> None:
    """Updates of a model by our step, on the batches 0, 1, 2, ..."""
    loss = criterion(Recipe(num_classes=CLASSES))
    optimizer = sgd(nn.ModuleList([model, mixer]))
    for seed in range(updates):
        x, _, y = batch(seed, size)
        optimizer.zero_grad()
        mixer(model, loss, x, y, Drawn(seed, kept)).loss.backward()
        optimizer.step()
        mixer.after_step(model, (seed + 1) / updates)


def loader(updates: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """The same batches as an original's loop takes them."""
    return [batch(seed, size)[:2] for seed in range(updates)]


def weights(ours: nn.Module, theirs: nn.Module, what: str, why: str = "") -> Gap:
    """All weights of both."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    gap = relative([mine[name] for name in other], list(other.values()))
    return Gap(f"weights after {what}", gap, "relative", why)


@beside("mixup", "facebookresearch/mixup-cifar10", "train.py", held="test_parity.py::test_mixup_equals_timm_for_the_same_lambda_and_partner")  # fmt: skip  # noqa: E501
def mixup_cifar(original: Checkout) -> Iterator[Gap]:
    """Mixed images, label weights, and the weights of a network after 20 updates."""
    again = Again()
    mix, loss = original.names("train.py", "mixup_data", "mixup_criterion", np=Numpy(again), torch=torch)

    def theirs(x: Tensor, y: Tensor) -> Mixed:
        mixed, *labels = mix(x, y, 1.0, use_cuda=False)
        return mixed, tuple(labels)  # type: ignore[return-value]

    yield from beside_each_other(build("mixup"), theirs, again, 200, 64)
    ours = small()
    model = copy.deepcopy(ours)
    again.kept = {}
    trained(build("mixup"), ours, again.kept, 20)
    optimizer = sgd(model)
    for x, labels in loader(20):
        with on_cpu(again):
            mixed, y_a, y_b, lam = mix(x, labels, 1.0, use_cuda=False)
        optimizer.zero_grad()
        loss(nn.CrossEntropyLoss(), model(mixed), y_a, y_b, lam).backward()
        optimizer.step()
    yield weights(ours, model, "20 updates, ViT of 4 blocks, 64 pixels")


@beside("mixup", "Westlake-AI/openmixup", f"{OPENMIXUP}/mixup.py", held="test_parity.py::test_mixup_equals_timm_for_the_same_lambda_and_partner")  # fmt: skip  # noqa: E501
def mixup_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images and label weights."""
    again = Again()
    mix = openmixup(original, "mixup", again)
    yield from beside_each_other(build("mixup", alpha=0.2), lambda x, y: mix(x, y, 0.2), again, 200, 64)


@beside(
    "cutmix",
    "clovaai/CutMix-PyTorch",
    "train.py",
    held="test_parity.py::test_cutmix_mask_is_the_box_of_the_paper",
)
def cutmix_clova(original: Checkout) -> Iterator[Gap]:
    """The box, and, with the published loop, mixed images and the weights of a network after 20 updates."""
    again, differing = Again(rand=lambda *_: 0.0), 0
    args = space(beta=1.0, cutmix_prob=1.0, print_freq=10**9, verbose=False, epochs=1)
    given = {"np": Numpy(again), "torch": torch, "args": args, "time": space(time=lambda: 0.0), "print": lambda *_: None}
    given["accuracy"] = lambda *_, topk: torch.zeros(2)  # its own fails on the strides of today; it is only logged
    needed = ("AverageMeter", "get_learning_rate")
    loop, rand_bbox, *_ = original.names("train.py", "train", "rand_bbox", *needed, **given)
    x, y = torch.zeros(2, 3, 224, 160), torch.eye(2)
    for seed in range(20_000):
        again.kept = {}
        mask = build("cutmix").plan(x, y, Drawn(seed, again.kept))["mask"][0, 0]  # type: ignore[arg-type]
        top, left, bottom, right = rand_bbox(x.shape, again.beta(1.0, 1.0))
        theirs = torch.ones(224, 160)
        theirs[top:bottom, left:right] = 0
        differing += int(not torch.equal(mask, theirs))
    yield Gap("the box, 20,000 draws of lambda and centre, 224 x 160 pixels", differing / 20_000, "share")
    yield again.gap()
    again.kept, ours, seen = {}, small(), ([], [])  # type: ignore[var-annotated]
    model = copy.deepcopy(ours)
    for network, images in zip((ours, model), seen, strict=True):
        network.register_forward_pre_hook(lambda _, inputs, images=images: images.append(inputs[0].clone()))
    trained(build("cutmix"), ours, again.kept, 20)
    with on_cpu(again):
        loop(loader(20), model, nn.CrossEntropyLoss(), sgd(model), 0)
    yield Gap("mixed images, 20 batches, 64 x 64 pixels", farthest(torch.stack(seen[0]), torch.stack(seen[1])))
    yield weights(ours, model, "20 updates, ViT of 4 blocks, 64 pixels")


@beside("cutmix", "Westlake-AI/openmixup", f"{OPENMIXUP}/cutmix.py", held="test_parity.py::test_cutmix_mask_is_the_box_of_the_paper")  # fmt: skip  # noqa: E501
def cutmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images and label weights for our partners, and how often OpenMixup's redraw changes them."""
    again = Again()
    mix = openmixup(original, "cutmix", again, "_no_repeat_shuffle_idx")
    ours = build("cutmix", alpha=0.2)

    def repeated(kept: dict[str, list[Any]]) -> None:  # each redraw gives the same partners, so that they stay
        kept["permutation"] *= 11

    yield from beside_each_other(ours, lambda x, y: mix(x, y, 0.2), again, 200, (64, 96), repeated)
    yield redrawn(original, "cutmix")
