"""Methods that look at where images are salient before they mix them."""

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import Step, build
from originals import Checkout, Gap, Numpy, beside

CLASSES = 10
UPDATES = 20
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
space = types.SimpleNamespace


class Drawn:
    """A generator that keeps what it gave, and with which arguments, so that the original can be given the same."""

    def __init__(self, seed: int, kept: dict[str, list[Any]]):
        self.rng, self.kept = np.random.default_rng(seed), kept

    def __getattr__(self, kind: str) -> Any:
        def draw(*args: Any, **options: Any) -> Any:
            value = getattr(self.rng, kind)(*args, **options)
            self.kept.setdefault(kind, []).append((args, value))
            return value

        return draw


class Again:
    """The random functions of the originals: what ``kept`` holds, in turn; ``other`` counts draws of other laws."""

    def __init__(self, kept: dict[str, list[Any]], **given: Callable[..., Any]):
        self.kept, self.given = kept, given
        self.asked = self.other = 0

    def __getattr__(self, name: str) -> Any:
        def draw(*args: Any) -> Any:
            expected, value = self.kept["integers" if name == "randint" else name].pop(0)
            self.asked += 1
            self.other += int(expected != args)
            return value

        return self.given.get(name, draw)

    def gap(self) -> Gap:
        """Whether the original asked for the laws that ours drew from."""
        return Gap(f"the laws that are drawn from, {self.asked:,} draws", self.other / self.asked, "share")


class Meter:
    """What the originals' loops count with."""

    val = avg = sum = 0.0

    def __init__(self, *args: Any):
        self.update = self.add = self.display = lambda *args: None


class Sgd(torch.optim.SGD):
    """Plain steps, which keep the gradients of the first."""

    def __init__(self, model: nn.Module):
        super().__init__(model.parameters(), lr=0.01, momentum=0.9)
        self.weights = list(model.parameters())
        self.first: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        """One update."""
        self.first = self.first or [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.weights]
        return super().step(closure)


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


def batch(seed: int, size: int = 64, count: int = 8, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a few bright or dark blobs on a smooth ground, labels, and the labels as targets."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 16, size // 16, generator=generator)
    blobs = F.interpolate(torch.randn(count, 1, size // 8, size // 8, generator=generator) ** 3 / 3, (size, size))
    x = 0.5 * F.interpolate(coarse, (size, size), mode="bicubic") + 0.4 * blobs
    x += 0.05 * torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return x.clamp(-2, 2), labels, F.one_hot(labels, classes).float()


def network(name: str, classes: int = CLASSES, **options: Any) -> Any:
    """A timm model of seed 0."""
    torch.manual_seed(0)
    if name.startswith("vit"):
        options["img_size"] = 64
    return timm.create_model(name, num_classes=classes, **options)


def farthest(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference."""
    return float((ours.detach().double() - theirs.detach().double()).abs().max())


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of all tensors, relative to the largest value of the original's."""
    return max(map(farthest, ours, theirs)) / max(float(t.detach().abs().max()) for t in theirs)


def updated(mixer: Any, model: nn.Module, batches: list[Any], kept: dict[str, list[Any]], criterion: Any) -> Sgd:
    """The optimiser of a model that ours trained, a step for each of the batches."""
    step = Step(model.train(), mixer, criterion)
    optimizer = Sgd(model)
    for seed, (x, _, y) in enumerate(batches):
        optimizer.zero_grad()
        step(x.clone(), y, Drawn(seed, kept)).loss.backward()  # type: ignore[arg-type]
        optimizer.step()
    return optimizer


def both_updated(ours: Sgd, theirs: Sgd, what: str, why: str = "") -> Iterator[Gap]:
    """The gradients of the first update, and the weights after the last."""
    yield Gap(f"gradients of all parameters, first update, {what}", relative(ours.first, theirs.first), "relative", why)
    gap = relative(ours.weights, theirs.weights)  # type: ignore[arg-type]
    yield Gap(f"weights after {UPDATES} updates, {what}", gap, "relative", why)


def peak(x: Any) -> Any:
    """A detector for the originals: a map that is 1 at the pixel that ours finds, of an image (H, W, 3)."""
    image = torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None]
    row, column = build("saliencymix").salient_pixel(image)[0]
    found = np.zeros(x.shape[:2], dtype=np.float32)
    found[row, column] = 1
    return True, found


DETECTOR = space(computeSaliency=peak)


@beside(
    "saliencymix",
    "SaliencyMix/SaliencyMix",
    "SaliencyMix-ImageNet/train.py",
    held="test_parity.py::test_saliencymix_pastes_a_box_around_the_salient_pixel_of_the_partner",
)
def saliencymix_loop(original: Checkout) -> Iterator[Gap]:
    """The published loop for ImageNet, with our detector in place of OpenCV's, on the box of the first partner."""
    kept: dict[str, list[Any]] = {}
    again = Again(kept, rand=np.zeros)
    bbox, train = original.names(
        "SaliencyMix-ImageNet/train.py",
        "saliency_bbox",
        "train",
        np=Numpy(again),
        torch=torch,
        time=mock.MagicMock(),
        AverageMeter=Meter,
        accuracy=lambda *args, **options: (torch.zeros(1),) * 2,
        get_learning_rate=lambda optimizer: [0],
        print=lambda *args: None,
        cv2=space(saliency=space(StaticSaliencyFineGrained_create=lambda: DETECTOR)),
        args=space(beta=1.0, salmix_prob=1.0, print_freq=1, verbose=False, epochs=1),
    )
    mixer, boxes = build("saliencymix", box_from="first"), 0
    for seed in range(500):
        x, _, y = batch(seed, count=2)
        plan = mixer.plan(x, y, Drawn(seed, kept))
        theirs = torch.ones(64, 64)
        lam = again.beta(1.0, 1.0)
        top, left, bottom, right = bbox(x[again.permutation(2)[0]], lam)
        theirs[top:bottom, left:right] = 0
        boxes += int(not torch.equal(plan["mask"][0, 0], theirs))
    yield Gap("the box around the pixel that our detector finds, 500 draws, 64 x 64 pixels", boxes / 500, "share")
    batches, model = [batch(seed) for seed in range(UPDATES)], network("resnet18")
    theirs_model = copy.deepcopy(model).train()
    optimizer = Sgd(theirs_model)
    ours = updated(mixer, model, batches, kept, CROSS_ENTROPY)
    with on_cpu(again):
        train([(x.clone(), labels) for x, labels, _ in batches], theirs_model, nn.CrossEntropyLoss(), optimizer, 0)
    yield from both_updated(ours, optimizer, "ResNet-18, 64 x 64 pixels, our detector in both")
    yield again.gap()


@beside(
    "saliencymix",
    "Westlake-AI/openmixup",
    "openmixup/models/augments/saliencymix.py",
    held="test_parity.py::test_saliencymix_pastes_a_box_around_the_salient_pixel_of_the_partner",
)
def saliencymix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images and label weights of OpenMixup's function, with our detector in place of OpenCV's."""
    kept: dict[str, list[Any]] = {}
    again = Again(kept)
    given = {"np": Numpy(again), "torch": torch, "StaticSaliencyFineGrained_create": lambda: DETECTOR}
    function = original.names("openmixup/models/augments/saliencymix.py", "saliencymix", **given)
    for first, why in ((True, ""), (False, "Every sample has its own box, around the peak of its own partner.")):
        images = weights = 0.0
        mixer = build("saliencymix", box_from="first" if first else "each")
        for seed in range(200):
            x, _, y = batch(seed)
            mixed, target = mixer.mix(x, y, **mixer.plan(x, y, Drawn(seed, kept)))
            with on_cpu(again):
                theirs, (y_a, y_b, lam) = function(x.clone(), y)
            images, weights = max(images, farthest(mixed, theirs)), max(weights, farthest(target, y_a * lam + y_b * (1 - lam)))
        how = f'box_from="{mixer.box_from}", 200 batches of 8, our detector in both'
        yield Gap(f"mixed images, 64 x 64 pixels, {how}", images, why=why)
        yield Gap(f"label weights, {how}", weights, why=why)
    yield again.gap()
