"""Methods that cut and blend without looking: boxes, grids, masks, constants, features that are aligned."""

import contextlib
import functools
import itertools
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
from torchvision.ops import roi_align

from mixers import build
from mixers.alignmix import AlignMix, align, transport_plan
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.update import criterion, one_hot
from originals import Checkout, Gap, Numpy, beside

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

    def __init__(self, **given: Callable[..., Any]):
        self.given = given
        self.kept: dict[str, list[Any]] = {}
        self.asked = self.other = 0
        self.answers: Iterator[int] = iter(())

    def answering(self) -> Any:
        """Python's ``random``, whose integers are the ``answers``."""
        return space(randint=lambda *_: next(self.answers))

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
        """Whether the original asked for the laws that ours drew from, since the last time."""
        gap = Gap(f"the laws that are drawn from, {self.asked:,} draws", self.other / self.asked, "share")
        self.asked = self.other = 0
        return gap


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
    return x, labels, F.one_hot(labels, CLASSES).to(x.dtype)


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


def small() -> nn.Module:
    """A transformer of four blocks for 64 pixels, always the same."""
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=CLASSES)
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


def trained(mixer: Any, model: nn.Module, kept: dict[str, list[Any]], updates: int, size: int = 64) -> list[Tensor]:
    """Updates of a model by our step, on the batches 0, 1, 2, ...; the gradients of the last one."""
    loss = criterion(Recipe(num_classes=CLASSES))
    both = nn.ModuleList([model, mixer])
    optimizer = sgd(both)
    for seed in range(updates):
        x, _, y = batch(seed, size)
        optimizer.zero_grad()
        mixer(model, loss, x, y, keeping(seed, kept)).loss.backward()
        optimizer.step()
        mixer.after_step(model, (seed + 1) / updates)
    return gradients(both)


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


@beside("mixup", "facebookresearch/mixup-cifar10", "train.py", held="test_parity.py::test_mixup_equals_timm_for_the_same_lambda_and_partner")  # fmt: skip  # noqa: E501
def mixup_cifar(original: Checkout) -> Iterator[Gap]:
    """Mixed images, label weights, and the weights of a network after 20 updates."""
    again = Again()
    mix, loss = original.names("train.py", "mixup_data", "mixup_criterion", np=Numpy(again), torch=torch)

    def theirs(x: Tensor, y: Tensor) -> Mixed:
        mixed, *labels = mix(x, y, 1.0, use_cuda=False)
        return mixed, tuple(labels)

    yield from beside_each_other(build("mixup"), theirs, again, 200, 64)
    again.kept, ours, model = {}, small(), small()
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
    given = {"np": Numpy(again), "torch": torch, "args": args, "time": space(time=lambda: 0.0)}
    given["print"] = lambda *_: None
    given["accuracy"] = lambda *_, topk: torch.zeros(2)  # its own fails on the strides of today; it is only logged
    needed = ("AverageMeter", "get_learning_rate")
    loop, rand_bbox, *_ = original.names("train.py", "train", "rand_bbox", *needed, **given)
    x, y = torch.zeros(2, 3, 224, 160), torch.eye(2)
    for seed in range(20_000):
        again.kept = {}
        mask = build("cutmix").plan(x, y, keeping(seed, again.kept))["mask"][0, 0]
        top, left, bottom, right = rand_bbox(x.shape, again.beta(1.0, 1.0))
        theirs = torch.ones(224, 160)
        theirs[top:bottom, left:right] = 0
        differing += int(not torch.equal(mask, theirs))
    yield Gap("the box, 20,000 draws of lambda and centre, 224 x 160 pixels", differing / 20_000, "share")
    yield again.gap()
    again.kept, ours, model = {}, small(), small()
    images = seen(ours), seen(model)
    trained(build("cutmix"), ours, again.kept, 20)
    with on_cpu(again):
        loop(loader(20), model, nn.CrossEntropyLoss(), sgd(model), 0)
    yield Gap("mixed images, 20 batches, 64 x 64 pixels", farthest(*map(torch.stack, images)))
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


def switched(original: Checkout, name: str, mixup_alpha: float, smoothing: float) -> Iterator[Gap]:
    """A switch of Mixup and CutMix beside timm's ``Mixup``, on timm's pairs; then the pairs."""
    again, images, labels, elsewhere = Again(), 0.0, 0.0, 0
    needed = ("mixup_target", "one_hot", "cutmix_bbox_and_lam", "rand_bbox")
    made, *_ = original.names("timm/data/mixup.py", "Mixup", *needed, np=Numpy(again), torch=torch)
    theirs = made(mixup_alpha, 1.0, label_smoothing=smoothing, num_classes=CLASSES)
    mixer, recipe = build(name), Recipe(num_classes=CLASSES, smoothing=smoothing)
    for seed in range(400):
        x, hard, _ = batch(seed, (64, 96))
        y = one_hot(hard, recipe)
        again.kept = {}
        plan = mixer.plan(x, y, keeping(seed, again.kept))
        chosen = 0.25 if plan["choice"] == 1 else 0.75  # timm: CutMix below 0.5
        again.given["rand"] = functools.partial(next, iter([0.0, chosen]))
        reverse = torch.arange(len(x)).flip(0)
        elsewhere += int((plan["index"] != reverse).sum())
        ours = mixer.mix(x, y, **plan | {"index": reverse})
        mixed, target = theirs(x.clone(), hard)
        images, labels = max(images, farthest(ours[0], mixed)), max(labels, farthest(ours[1], target))
    yield Gap("mixed images for timm's partners, 400 batches, 64 x 96 pixels", images)
    yield Gap("smoothed and mixed targets for timm's partners, 400 batches", labels)
    yield again.gap()
    why = "timm pairs a batch with its reverse, here by a random permutation"
    yield Gap("partners, 400 batches of 8", elsewhere / 3200, "share", why)


def rounded_up() -> Gap:
    """The boxes of CutMix beside those of the timm that is installed."""
    again, differing, x = Again(), 0, torch.zeros(2, 3, 224, 224)
    with mock.patch.object(timm.data.mixup, "np", Numpy(again)):
        for seed in range(2000):
            again.kept = {}
            mask = build("cutmix").plan(x, torch.eye(2), keeping(seed, again.kept))["mask"][0, 0]
            top, bottom, left, right = timm.data.mixup.rand_bbox(x.shape, again.beta(1.0, 1.0))
            theirs = torch.ones(224, 224)
            theirs[top:bottom, left:right] = 0
            differing += int(not torch.equal(mask, theirs))
    why = "this release rounds the far corner up, the code that is checked out does not"
    return Gap(f"the box of timm {timm.__version__}, 2,000 draws, 224 x 224 pixels", differing / 2000, "share", why)


@beside("deit", "huggingface/pytorch-image-models", "timm/data/mixup.py", held="test_laws.py::test_switch_chooses_with_its_probabilities")  # fmt: skip  # noqa: E501
def deit_timm(original: Checkout) -> Iterator[Gap]:
    """Mixed images, smoothed targets, laws, partners, and the box of the timm that is installed."""
    yield from switched(original, "deit", 0.8, 0.1)
    yield rounded_up()


@beside("rsb", "huggingface/pytorch-image-models", "timm/data/mixup.py", held="test_laws.py::test_switch_chooses_with_its_probabilities")  # fmt: skip  # noqa: E501
def rsb_timm(original: Checkout) -> Iterator[Gap]:
    """Mixed images, targets, laws and partners."""
    yield from switched(original, "rsb", 0.1, 0.0)


@beside("smoothmix", "Westlake-AI/openmixup", f"{OPENMIXUP}/smoothmix.py", held="test_parity.py::test_smoothmix_mask_is_one_minus_the_gaussian_and_swapped_labels_differ_in_the_label_only")  # fmt: skip  # noqa: E501
def smoothmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images and, with the labels swapped as there, label weights; then the labels as they are here."""
    again = Again()
    mix = openmixup(original, "smoothmix", again)

    def theirs(x: Tensor, y: Tensor) -> Mixed:
        return mix(x, y, lam=0.5)  # what it would draw instead is overwritten

    def randint(low: int, high: int, _size: tuple[int]) -> Tensor:
        return torch.tensor([again.integers(-(high // 2), high - high // 2) + high // 2])

    functions: dict[str, Any] = {
        "randint": randint,
        "rand": lambda _: torch.tensor([again.uniform(0.25, 0.5) * 4 - 1]),
    }
    yield from beside_each_other(
        build("smoothmix", swapped_label=True),
        theirs,
        again,
        200,
        64,
        lambda kept: kept["integers"].reverse(),  # columns before rows
        **functions,
    )
    differing = 0.0
    for seed in range(200):
        x, _, y = batch(seed)
        plans = [build("smoothmix", swapped_label=s).plan(x, y, np.random.default_rng(seed)) for s in (False, True)]
        differing = max(differing, farthest(plans[0]["lam"], plans[1]["lam"]))
    why = "OpenMixup swaps the labels of a pair, here they follow the pixels unless swapped_label=True"
    yield Gap("label weights as they are by default, 200 batches", differing, why=why)


def inclusive(again: Again) -> Any:
    """Python's ``random``, whose integers include the last one."""
    return space(randint=lambda low, high: again.integers(low, high + 1), random=lambda: again.random())


@beside("gridmix", "IlyaDobrynin/GridMixup", "gridmix/gridmix_pytorch.py", held="test_parity.py::test_gridmix_mask_is_its_holes")  # fmt: skip  # noqa: E501
def gridmix_dobrynin(original: Checkout) -> Iterator[Gap]:
    """Mixed images, label weights and laws, on square images and on others."""
    again = Again()
    given = {"np": Numpy(again), "torch": torch, "nn": nn, "t": typing, "math": math, "random": inclusive(again)}
    made = original.names("gridmix/gridmix_pytorch.py", "GridMixupLoss", **given)
    grid = made(alpha=0.2, n_holes_x=(2, 6), crop_area_ratio=(0.5, 1.0), crop_aspect_ratio=(0.5, 2.0))

    def theirs(x: Tensor, y: Tensor) -> Mixed:
        mixed, (own, other, lam) = grid.get_sample(x, y.argmax(1, keepdim=True))
        return mixed, (*(F.one_hot(labels.long(), CLASSES).float() for labels in (own, other)), lam[:, None])

    for size in (64, (224, 160)):
        yield from beside_each_other(build("gridmix"), theirs, again, 200, size)


@beside("gridmix", "Westlake-AI/openmixup", f"{OPENMIXUP}/gridmix.py", held="test_parity.py::test_gridmix_mask_is_its_holes")  # fmt: skip  # noqa: E501
def gridmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images, label weights and laws."""
    again = Again()

    def pair(value: Any) -> tuple[Any, Any]:
        return value if isinstance(value, tuple) else (value, value)

    mix = openmixup(original, "gridmix", again, random=inclusive(again), to_2tuple=pair)
    published = {"n_holes": (2, 6), "cut_area_ratio": (0.5, 1.0), "cut_aspect_ratio": (0.5, 2.0)}
    yield from beside_each_other(build("gridmix"), lambda x, y: mix(x, y, 0.2, **published), again, 200, 224)


FMIX = ("sample_mask", "sample_lam", "make_low_freq_image", "binarise_mask", "get_spectrum", "fftfreqnd")


def fourier(again: Again) -> dict[str, Any]:
    """What FMix's functions need. They look at two rows of the random spectrum, and ours draws no other."""

    more = np.random.default_rng(0)

    def randn(*shape: int) -> np.ndarray:
        values = more.standard_normal(shape)
        (_, rows), *_ = again.kept["standard_normal"]
        again.standard_normal(rows.shape)
        values[0, :2, : rows.shape[1]] = rows  # of an odd width they draw one more frequency
        return values

    again.given["randn"] = randn
    rounding = space(random=lambda: 1 - again.random())  # theirs rounds up above one half, ours below
    return {"np": Numpy(again), "torch": torch, "math": math, "beta": again, "random": rounding}


def fourier_masks(original: Checkout, options: dict[str, float], size: tuple[int, int], why: str = "") -> Iterator[Gap]:
    """Masks and label weights of 200 draws."""
    again, differing, label = Again(), 0, 0.0
    sample, *_ = original.names("fmix.py", *FMIX, **fourier(again))
    x = torch.zeros(2, 3, *size)
    for seed in range(200):
        again.kept = {}
        plan = build("fmix", **options).plan(x, torch.eye(2), keeping(seed, again.kept))
        lam, mask = sample(1.0, 3.0, size, **options)
        differing += int(((plan["mask"][0] - torch.from_numpy(mask)).abs() > 1e-6).sum())
        label = max(label, abs(float(plan["lam"][0]) - lam))
    what = f"{'soft' if options else 'hard'} masks, 200 draws, {size[0]} x {size[1]} pixels"
    yield Gap(f"pixels of {what}", differing / x[0, 0].numel() / 200, "share", why)
    why = "the published label is the lambda that was drawn, here the mean of the mask"
    yield Gap(f"label weight of {what}", label, why=why)
    yield again.gap()


@beside("fmix", "ecs-vlc/FMix", "fmix.py", held="test_parity.py::test_fmix_mask_is_the_brightest_pixels_of_the_given_spectrum")  # fmt: skip  # noqa: E501
def fmix_harris(original: Checkout) -> Iterator[Gap]:
    """The mask, hard and soft, for even widths and an odd one, and the label weight."""
    yield from fourier_masks(original, {}, (224, 160))
    why = "the image is made in float32, so that a few pixels of nearly one brightness change places"
    yield from fourier_masks(original, {"max_soft": 0.2}, (64, 64), why)
    why = "for an odd width the published code transforms one more row of the spectrum"
    yield from itertools.islice(fourier_masks(original, {}, (64, 63), why), 1)


@beside("fmix", "Westlake-AI/openmixup", f"{OPENMIXUP}/fmix.py", held="test_parity.py::test_fmix_mask_is_the_brightest_pixels_of_the_given_spectrum")  # fmt: skip  # noqa: E501
def fmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images and label weights for our partners, and how often OpenMixup's redraw changes them."""
    again, images, labels = Again(), 0.0, 0.0
    mix, *_ = original.names(f"{OPENMIXUP}/fmix.py", "fmix", "_no_repeat_shuffle_idx", *FMIX, **fourier(again))
    for seed in range(200):
        x, _, y = batch(seed)
        again.kept = {}
        mixer = build("fmix", alpha=0.2)
        plan = mixer.plan(x, y, keeping(seed, again.kept))
        again.kept["permutation"] *= 11  # each redraw gives the same partners, so that they stay
        with on_cpu(again):
            mixed, (y_a, y_b, lam) = mix(x.clone(), y, 0.2, size=(64, 64))
        ours = mixer.mix(x, y, **plan)
        images = max(images, farthest(ours[0], mixed))
        labels = max(labels, farthest(ours[1], lam * y_a + (1 - lam) * y_b))
    yield Gap("mixed images, 200 batches, 64 x 64 pixels", images)
    why = "the published label is the lambda that was drawn, here the mean of the mask"
    yield Gap("label weights, 200 batches", labels, why=why)
    yield again.gap()
    yield redrawn(original, "fmix")


@beside("resizemix", "Westlake-AI/openmixup", f"{OPENMIXUP}/resizemix.py", held="test_parity.py::test_resizemix_pastes_the_whole_partner_shrunk")  # fmt: skip  # noqa: E501
def resizemix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images, label weights and laws, with a scale from the Beta law as in OpenMixup's tables, and without."""
    again = Again()
    mix = openmixup(original, "resizemix", again, interpolate=F.interpolate)

    def columns_first(kept: dict[str, list[Any]]) -> None:
        (_, (row, column)), *_ = kept["integers"]
        kept["integers"] = [((0, 64), column), ((0, 64), row)]

    for use_alpha in (True, False):
        theirs = functools.partial(mix, use_alpha=use_alpha)
        yield from beside_each_other(build("resizemix", use_alpha=use_alpha), theirs, again, 400, 64, columns_first)


class Bias(nn.Module):
    """A classifier that keeps the images it is given and says the same of all: a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        self.images.append(x.clone())
        return self.bias.expand(len(x), -1)


@beside("resizemix", "JayQine/ResizeMix", "run_apis/trainer.py", "tools/utils.py", held="test_parity.py::test_resizemix_pastes_the_whole_partner_shrunk")  # fmt: skip  # noqa: E501
def resizemix_qin(original: Checkout) -> Iterator[Gap]:
    """What the published loop gives a network in 200 updates, also when it shrinks as we do, and what labels teach."""

    def by_sizes(x: Tensor, scale_factor: float) -> Tensor:
        return F.interpolate(x, scale_factor=scale_factor, recompute_scale_factor=True)

    why = "it hands the scale itself to the interpolation, here the source pixel follows from the sizes"
    for shrink, said in ((F.interpolate, why), (by_sizes, "")):
        again, ours, theirs = Again(rand=lambda _: 0.0), Bias(), Bias()
        trained(build("resizemix", placement="inside", use_alpha=False), ours, again.kept, 200)
        drawn = [value for _, value in again.kept["integers"]]
        again.kept["integers"] = [((0, 64, 8), value[:, axis]) for value in drawn for axis in (0, 1)]
        with on_cpu(again):
            qin_loop(original, again, space(interpolate=shrink), theirs, 200)
        apart = (torch.stack(ours.images) != torch.stack(theirs.images)).float().mean()
        what = "" if said else ", the scale taken from the sizes there too"
        yield Gap(f"pixels of mixed images, 200 batches, 64 x 64 pixels{what}", float(apart), "share", said)
    yield weights(ours, theirs, "200 updates of a bias, which sees the labels alone")
    yield again.gap()


def qin_loop(original: Checkout, again: Again, functional: Any, model: nn.Module, updates: int) -> None:
    """ResizeMix's own loop over an epoch."""
    needed = ("AverageMeter", "accuracy", "getbox_new")
    meter, accuracy, boxes = original.names("tools/utils.py", *needed, np=Numpy(again), torch=torch)
    given = {"np": Numpy(again), "torch": torch, "F": functional, "random": again, "getbox_new": boxes}
    given |= {"utils": space(AverageMeter=meter, accuracy=accuracy), "time": space(time=lambda: 0.0)}
    loop = original.method("run_apis/trainer.py", "Trainer", "train", **given, logging=space(info=lambda *_: None))
    trainer = space(
        train_data=iter([{"data": x, "label": labels[:, None]}] for x, labels in loader(updates)),
        use_dali=True,
        scheduler=space(step=lambda: None),
        optimizer=sgd(model),
        criterion=nn.CrossEntropyLoss(),
        augment=space(
            cutmix=space(beta=1.0, prob=0.0), resizemix=space(if_use=True, alpha=0.1, beta=0.8), batch_aug=False
        ),
        config=space(optim=space(use_grad_clip=False)),
        report_freq=10**9,
        distributed=False,
    )
    loop(trainer, model, 0)


class Norm(nn.GroupNorm):
    """In place of BatchNorm, which blows up the rounding of sums on maps as small as these."""

    def __init__(self, channels: int, **options: Any):
        super().__init__(8, channels, **options)


def kinkless(model: nn.Module) -> nn.Module:
    """Without units that are switched on or off, by which rounding grows to a large gap in some updates."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, 2, 1))
    return model


YANG = ("main.py", "utils.py", "models_imagenet/resnet.py", "loss/label_smooth_loss.py")


@beside("recursivemix", "implus/RecursiveMix-pytorch", *YANG, held="test_recursivemix.py::test_a_step_is_the_formula")
def recursivemix_yang(original: Checkout) -> Iterator[Gap]:
    """What the published loop gives a ResNet, its gradients and weights; the box as it was once; a new epoch."""
    what = "smooth ResNet-10 with GroupNorm, 96 pixels"
    with earlier(original, "6364e11", *YANG) as before:
        for n, swapped, code, when in ((20, False, original, ""), (3, True, before, ", swapped_roi, code of 2022")):
            ours, theirs = recursive(code, n, swapped)
            yield Gap(f"mixed images, {n} updates{when}", farthest(*(torch.stack(run[0]) for run in (ours, theirs))))
            gap = relative(ours[1], theirs[1])
            yield Gap(f"gradients of all parameters, last of {n} updates, {what}{when}", gap, "relative")
            yield Gap(f"weights after {n} updates, {what}{when}", relative(ours[2], theirs[2]), "relative")
        ours, theirs = recursive(original, 5, epochs=5)
    apart = (torch.stack(ours[0]) != torch.stack(theirs[0])).float().mean()
    why = "the published loop forgets the history at the start of an epoch, here it is kept"
    yield Gap("pixels of mixed images, 5 epochs of 1 update", float(apart), "share", why)


def recursive(
    original: Checkout, updates: int, swapped: bool = False, epochs: int = 1
) -> Iterator[tuple[list[Tensor], ...]]:
    """Our updates and the published loop's: the images, the gradients of the last one, the weights.

    ``swapped``: the code before April 2023, which draws the row first.
    """
    torch.manual_seed(0)
    args: dict[str, Any] = {"layers": [1, 1, 1, 1], "num_classes": CLASSES, "norm_layer": Norm}
    basic: Any = timm.models.resnet.BasicBlock
    ours = kinkless(timm.models.resnet.ResNet(basic, **args, zero_init_last=False))
    mixer: Any = build("recursivemix", swapped_roi=swapped)
    mixer.setup(ours)
    given: dict[str, Any] = {"nn": nn, "torch": torch, "roi_align": roi_align}
    made, block, *_ = original.names(YANG[2], "ResNet", "BasicBlock", "conv1x1", "conv3x3", **given)
    theirs = kinkless(made(block, **args))
    second = {f"fc_roi.{name}": value for name, value in mixer.roi_classifier.state_dict().items()}
    theirs.load_state_dict(ours.state_dict() | second)
    images, again = (seen(ours), seen(theirs)), Again()
    yield images[0], trained(mixer, ours, again.kept, updates, 96), [*ours.parameters(), *mixer.parameters()]
    order = slice(None, None, 1 if swapped else -1)
    drawn = again.kept["integers"][2:]  # the first update draws nothing there
    centres = [drawn[first : first + 2][order] for first in range(0, len(drawn), 2)]
    again.kept = {"integers": [*itertools.chain(*centres)], "random": again.kept["random"][1:]}
    share = space(uniform=lambda low, high: low + (high - low) * again.random())
    given = {"np": Numpy(again), "torch": torch, "F": F, "random": share}
    mix, smooth, meter = original.names(YANG[1], "recursive_mix", "smooth_one_hot", "AverageMeter", **given)
    optimizer, loss = sgd(theirs), original.names(YANG[3], "LabelSmoothingLoss", nn=nn, torch=torch)(CLASSES)
    loop = original.names(
        YANG[0],
        "train",
        recursive_mix=mix,
        smooth_one_hot=smooth,
        AverageMeter=meter,
        autocast=contextlib.nullcontext,
        scaler=space(scale=lambda loss: loss, step=lambda optimizer: optimizer.step(), update=lambda: None),
        adjust_learning_rate=lambda *_: 0.0,
        accuracy=lambda *_, topk: torch.zeros(2),
        reduce_value=lambda value: value,
        sys=space(stdout=space(flush=lambda: None)),
    )
    said = space(num_classes=CLASSES, smoothing=0.0, aug="recursive_mix", aug_alpha=0.5, aug_omega=0.5)
    said.interpolate_mode, said.share_fc, said.print_freq, said.epoch = "nearest", False, 10**9, 0
    batches = loader(updates, 96)
    with on_cpu(again):
        for epoch in range(epochs):
            loop(0, theirs, optimizer, loss, batches[epoch::epochs], space(info=lambda *_: None), said)
    yield images[1], gradients(theirs), list(theirs.parameters())


VERMA = "supervised/models"


@beside("manifoldmix", "vikasverma1077/manifold_mixup", f"{VERMA}/preresnet.py", f"{VERMA}/utils.py", "supervised/utils.py", held="test_hidden.py::test_hidden_mixing_is_running_the_stages_mixing_or_aligning_and_running_the_rest")  # fmt: skip  # noqa: E501
def manifoldmix_verma(original: Checkout) -> Iterator[Gap]:
    """Logits, targets, loss and gradients of the published ResNet, mixed by itself and by our hooks."""
    again, gaps = Again(), dict.fromkeys(("logits", "targets", "loss", "gradients of all parameters"), 0.0)
    given: dict[str, Any] = {"np": Numpy(again), "torch": torch, "nn": nn, "Variable": lambda value: value}
    given["F"] = space(relu=F.gelu, avg_pool2d=F.avg_pool2d)  # no kinks, see above
    one, process = original.names(f"{VERMA}/utils.py", "to_one_hot", "mixup_process", **given)
    given |= {"to_one_hot": one, "mixup_process": process, "random": inclusive(again)}
    given["get_lambda"] = original.names("supervised/utils.py", "get_lambda", **given)
    needed = ("PreActBlock", "PreActResNet", "preactresnet18")
    *_, made = original.names(f"{VERMA}/preresnet.py", *needed, **given)
    torch.manual_seed(0)
    net, mixer = made(CLASSES).train(), build("manifoldmix")
    net.feature_info = [{"module": f"layer{n}", "reduction": 2**n} for n in (1, 2, 3, 4)]
    mixer.setup(net)
    layers = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        """That of the published loop."""
        return nn.BCELoss()(nn.Softmax(dim=1)(logits), target)

    for seed in range(12):
        x, labels, y = batch(seed, 32)
        found = []
        for own in (True, False):
            net.zero_grad()
            if own:
                again.kept = {}
                out = mixer(net, loss, x, y, keeping(seed, again.kept))
                logits, target, value = out.logits, out.target, out.loss
                layers.append(out.plan["layer"])
            else:
                with on_cpu(again):
                    logits, target = net(x, labels, mixup_hidden=True, mixup_alpha=2.0)
                value = loss(logits, target)
            value.backward()
            found.append(([logits], [target], [value], gradients(net)))
        for name, ours, theirs in zip(gaps, *found, strict=True):
            gaps[name] = max(gaps[name], relative(ours, theirs))
    assert set(layers) == {0, 1, 2}
    for name, gap in gaps.items():
        yield Gap(f"{name}, 12 batches, smooth PreActResNet-18, 32 pixels", gap, "relative")
    yield again.gap()


ALIGN = ("imagenet/models/resnet50_classifier.py", "imagenet/utils/OT.py")


@beside("alignmix", "shashankvkt/AlignMixup_CVPR22", *ALIGN, held="test_hidden.py::test_alignment_and_its_gradient_are_those_of_the_formula")  # fmt: skip  # noqa: E501
def alignmix_venkataramanan(original: Checkout) -> Iterator[Gap]:
    """The transport plan, aligned features, and logits, loss, gradients and weights with the published classifier."""
    again = Again()
    sinkhorn = original.names(ALIGN[1], "SinkhornDistance", torch=torch, nn=nn)
    given: dict[str, Any] = {"np": Numpy(again), "torch": torch, "nn": nn, "F": F, "random": again.answering()}
    needed = ("mixup_aligned", "mixup_process", "Resnet_classifier")
    aligned, *_ = original.names(ALIGN[0], *needed, SinkhornDistance=sinkhorn, **given)
    apart = plans_and_features(sinkhorn(0.1, 100), again, lambda f, y, lam: aligned(f, y, lam)[0])
    yield from apart
    yield again.gap()
    classifier = original.names(ALIGN[0], *needed, SinkhornDistance=sinkhorn, ResNet=body, **given)[2]
    yield from classified(classifier, again)


def body() -> nn.Module:
    """A ResNet without kinks that makes 7 x 7 features of 56 pixels, always the same; its classifier is left out."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"norm_layer": Norm, "output_stride": 8, "zero_init_last": False}
    made = timm.create_model("resnet10t", num_classes=0, global_pool="", **options)
    return kinkless(made)


def classified(made: Any, again: Again) -> Iterator[Gap]:
    """The published method, half of it Mixup, with the published classifier."""
    theirs, ours, mixer = made(CLASSES, z_dim=512), body(), build("alignmix")
    ours.reset_classifier(CLASSES, "avg")  # type: ignore[operator]
    ours.fc.load_state_dict(theirs.classifier.state_dict())  # type: ignore[union-attr]
    mixer.setup(ours)
    again.kept = {}
    slopes = trained(mixer, ours, again.kept, 20, 56)
    again.answers = answers(again.kept)
    optimizer = sgd(theirs)
    for x, labels in loader(20, 56):
        with on_cpu(again):
            logits, y_a, y_b = theirs(x, labels, lam := again.beta(2.0, 2.0), "train")
        optimizer.zero_grad()
        (lam * F.cross_entropy(logits, y_a) + (1 - lam) * F.cross_entropy(logits, y_b)).backward()
        optimizer.step()
    what = "smooth ResNet-10, 56 pixels, half of the updates Mixup"
    yield Gap(f"gradients of all parameters, 20th update, {what}", relative(slopes, gradients(theirs)), "relative")
    gap = relative(list(ours.parameters()), list(theirs.parameters()))
    yield Gap(f"weights after 20 updates, {what}", gap, "relative")


def answers(kept: dict[str, list[Any]]) -> Iterator[int]:
    """What python's ``random`` is to say: which of both methods, if there are two, then 0 for the partner laid over."""
    directions = [1 - value for _, value in kept["integers"]]
    for chosen in [value for _, value in kept.get("choice", [])] or [None]:
        yield from [] if chosen is None else [int(chosen)]
        yield from [] if chosen == 0 else [directions.pop(0)]


def plans_and_features(sinkhorn: Any, again: Again, align_theirs: Callable[..., Tensor]) -> Iterator[Gap]:
    """The plan, the aligned features and their gradients, for small and for large features."""
    rounded = "costs in the tens of thousands are rounded before they are divided by 0.1"
    for scale, wide, why in ((0.1, False, ""), (1.0, False, ""), (10.0, False, rounded), (10.0, True, "")):
        plan = features = slopes = 0.0
        for seed in range(10):
            x, _, y = batch(seed)
            generator = torch.Generator().manual_seed(seed)
            f = scale * F.relu(torch.randn(8, 64, 7, 7, generator=generator))
            f = f.double() if wide else f
            towards = torch.randn(8, 49, 64, generator=generator)
            again.kept = {}
            made = AlignMix().plan(x, y, keeping(seed, again.kept))
            again.answers = answers(again.kept)
            map_, tokens = f.clone().requires_grad_(), f.flatten(2).transpose(1, 2).clone().requires_grad_()
            with on_cpu(again):
                other = sinkhorn(tokens.detach(), tokens.detach()[made["index"]])
                theirs = align_theirs(map_, y, again.beta(2.0, 2.0)).flatten(2).transpose(1, 2)
            ours = align(tokens, **made)
            mine = torch.autograd.grad((ours * towards).sum(), tokens)
            slope = torch.autograd.grad((theirs * towards).sum(), map_)[0].flatten(2).transpose(1, 2)
            plan = max(plan, relative([transport_plan(tokens, tokens[made["index"]])], [other]))
            features, slopes = max(features, relative([ours], [theirs])), max(slopes, relative([*mine], [slope]))
        what = f"10 batches of 49 positions, features of size {scale:g}{', 64 bits' if wide else ''}"
        yield Gap(f"Sinkhorn plan, {what}", plan, "relative", why)
        yield Gap(f"aligned features, {what}", features, "relative", why)
        yield Gap(f"their gradients, {what}", slopes, "relative", why)


@beside("alignmix", "Westlake-AI/openmixup", f"{OPENMIXUP}/alignmix.py", held="test_hidden.py::test_alignment_and_its_gradient_are_those_of_the_formula")  # fmt: skip  # noqa: E501
def alignmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """The transport plan and aligned features."""
    again = Again()
    given: dict[str, Any] = {"torch": torch, "nn": nn, "random": again.answering()}
    file = f"{OPENMIXUP}/alignmix.py"
    sinkhorn, mix, _ = original.names(file, "SinkhornDistance", "alignmix", "mixup_aligned", np=Numpy(again), **given)
    yield from plans_and_features(sinkhorn(0.1, 100), again, lambda f, y, lam: mix(f, y, lam=lam)[0])
    yield again.gap()
