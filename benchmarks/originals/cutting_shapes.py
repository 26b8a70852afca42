"""Methods that cut along a shape: Gaussians, grids, blobs, shrunk images."""

import functools
import itertools
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import FMix, build
from originals import Checkout, Gap, Numpy, beside
from originals.openmixup_step import HARD, STEP, Listed, classifier, head, run
from originals.same_draws import (
    CLASSES,
    OPENMIXUP,
    Again,
    Mixed,
    batch,
    beside_each_other,
    farthest,
    inclusive,
    keeping,
    loader,
    on_cpu,
    openmixup,
    redrawn,
    sgd,
    space,
    trained,
    twenty_updates,
    weights,
)


def gaussian(again: Again) -> dict[str, Any]:
    """torch's random functions that give the centre and the spread of our Gaussian."""

    def randint(low: int, high: int, _size: tuple[int]) -> Tensor:
        return torch.tensor([again.integers(-(high // 2), high - high // 2) + high // 2])

    return {"randint": randint, "rand": lambda _: torch.tensor([again.uniform(0.25, 0.5) * 4 - 1])}


@beside(
    "smoothmix",
    "Westlake-AI/openmixup",
    f"{OPENMIXUP}/smoothmix.py",
    held="test_parity.py::test_smoothmix_mask_is_one_minus_the_gaussian_and_swapped_labels_differ_in_the_label_only",
)
def smoothmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images and, with the labels swapped as there, label weights; then the labels as they are here."""
    again = Again()
    mix = openmixup(original, "smoothmix", again)

    def theirs(x: Tensor, y: Tensor) -> Mixed:
        return mix(x, y, lam=0.5)  # what it would draw instead is overwritten

    yield from beside_each_other(
        build("smoothmix", swapped_label=True),
        theirs,
        again,
        200,
        64,
        lambda kept: kept["integers"].reverse(),  # columns before rows
        **gaussian(again),
    )
    differing = 0.0
    for seed in range(200):
        x, _, y = batch(seed)
        plans = [build("smoothmix", swapped_label=s).plan(x, y, np.random.default_rng(seed)) for s in (False, True)]
        differing = max(differing, farthest(plans[0]["lam"], plans[1]["lam"]))
    why = "OpenMixup swaps the labels of a pair, here they follow the pixels unless swapped_label=True"
    yield Gap("label weights as they are by default, 200 batches", differing, why=why)


@beside(
    "smoothmix",
    "Westlake-AI/openmixup",
    f"{OPENMIXUP}/smoothmix.py",
    *STEP,
    HARD,
    held="test_parity.py::test_smoothmix_mask_is_one_minus_the_gaussian_and_swapped_labels_differ_in_the_label_only",
)
def smoothmix_updates(original: Checkout) -> Iterator[Gap]:
    """OpenMixup's whole step beside ours, with the labels swapped as there and as they are here."""
    again = Again(beta=lambda *_: 0.5)  # what it would draw is overwritten
    mix = openmixup(original, "smoothmix", again)
    functions = gaussian(again)

    def theirs(model: nn.Module) -> None:
        step = classifier(original, "smoothmix", 0.2, Listed(model), head(original), function=mix)
        run(step, again, **functions)

    def columns_first(kept: dict[str, list[Any]]) -> None:
        drawn = kept["integers"]
        kept["integers"] = [*itertools.chain(*zip(drawn[1::2], drawn[::2], strict=True))]

    why = "OpenMixup swaps the labels of a pair, here they follow the pixels unless swapped_label=True"
    for swapped, said in ((True, ""), (False, why)):
        mixer, how = build("smoothmix", swapped_label=swapped), f", swapped_label={swapped}"
        yield from twenty_updates(mixer, theirs, again, how, said, columns_first)
    yield again.gap()


@beside(
    "gridmix",
    "IlyaDobrynin/GridMixup",
    "gridmix/gridmix_pytorch.py",
    held="test_parity.py::test_gridmix_mask_is_its_holes",
)
def gridmix_dobrynin(original: Checkout) -> Iterator[Gap]:
    """Mixed images, label weights and laws, on square images and on others."""
    again = Again()
    given = {"np": Numpy(again), "torch": torch, "nn": nn, "t": typing, "math": math, "random": inclusive(again)}
    made = original.names("gridmix/gridmix_pytorch.py", "GridMixupLoss", **given)
    grid = made(alpha=0.2, n_holes_x=(2, 6), crop_area_ratio=(0.5, 1.0), crop_aspect_ratio=(0.5, 2.0))

    def learn(model: nn.Module) -> None:
        optimizer = sgd(model)
        for x, labels in loader(20):
            with on_cpu(again):
                mixed, targets = grid.get_sample(x, labels[:, None])
            optimizer.zero_grad()
            grid(model(mixed), targets).backward()
            optimizer.step()

    def theirs(x: Tensor, y: Tensor) -> Mixed:
        mixed, (own, other, lam) = grid.get_sample(x, y.argmax(1, keepdim=True))
        return mixed, (*(F.one_hot(labels.long(), CLASSES).float() for labels in (own, other)), lam[:, None])

    for size in (64, (224, 160)):
        yield from beside_each_other(build("gridmix"), theirs, again, 200, size)
    yield from twenty_updates(build("gridmix"), learn, again)


@beside(
    "gridmix",
    "Westlake-AI/openmixup",
    f"{OPENMIXUP}/gridmix.py",
    *STEP,
    HARD,
    held="test_parity.py::test_gridmix_mask_is_its_holes",
)
def gridmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images, label weights and laws."""
    again = Again()

    def pair(value: Any) -> tuple[Any, Any]:
        return value if isinstance(value, tuple) else (value, value)

    mix = openmixup(original, "gridmix", again, random=inclusive(again), to_2tuple=pair)
    published = {"n_holes": (2, 6), "cut_area_ratio": (0.5, 1.0), "cut_aspect_ratio": (0.5, 2.0)}
    yield from beside_each_other(build("gridmix"), lambda x, y: mix(x, y, 0.2, **published), again, 200, 224)

    def theirs(model: nn.Module) -> None:
        run(classifier(original, "gridmix", 0.2, Listed(model), head(original), function=mix, **published), again)

    yield from twenty_updates(build("gridmix"), theirs, again)


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


@beside(
    "fmix",
    "ecs-vlc/FMix",
    "fmix.py",
    held="test_parity.py::test_fmix_mask_is_the_brightest_pixels_of_the_given_spectrum",
)
def fmix_harris(original: Checkout) -> Iterator[Gap]:
    """The mask, hard and soft, for even widths and an odd one, and the label weight."""
    yield from fourier_masks(original, {}, (224, 160))
    why = "the image is made in float32, so that a few pixels of nearly one brightness change places"
    yield from fourier_masks(original, {"max_soft": 0.2}, (64, 64), why)
    why = "for an odd width the published code transforms one more row of the spectrum"
    yield from itertools.islice(fourier_masks(original, {}, (64, 63), why), 1)


class DrawnLabel(FMix):
    """Ours, labelled by the lambda that was drawn, as the published code does."""

    def plan(self, x: Tensor, y: Tensor, rng: Any, *look: Any) -> dict[str, Any]:
        """The plan with another ``lam``."""
        plan = super().plan(x, y, rng, *look)
        return plan | {"lam": torch.full((len(x),), rng.kept["beta"][-1][1])}


def fmix_twenty(theirs: Callable[[nn.Module], None], again: Again, alpha: float) -> Iterator[Gap]:
    """Updates labelled by the lambda that was drawn in both, then by the mask in ours."""
    why = "the published label is the lambda that was drawn, here the mean of the mask"
    own = (DrawnLabel(alpha), ", labels by the drawn lambda in both", ""), (build("fmix", alpha=alpha), "", why)
    for mixer, how, said in own:
        yield from twenty_updates(mixer, theirs, again, how, said)
    yield again.gap()


@beside(
    "fmix",
    "ecs-vlc/FMix",
    "implementations/lightning.py",
    "fmix.py",
    held="test_parity.py::test_fmix_mask_is_the_brightest_pixels_of_the_given_spectrum",
)
def fmix_updates(original: Checkout) -> Iterator[Gap]:
    """Images and weights with the authors' class for Lightning and its loss."""
    again = Again()
    parts = dict(zip(("FMixBase", *FMIX), original.names("fmix.py", "FMixBase", *FMIX, **fourier(again)), strict=True))
    kind, _ = original.names("implementations/lightning.py", "FMix", "fmix_loss", torch=torch, F=F, **parts)

    def theirs(model: nn.Module) -> None:
        mix, optimizer = kind(size=(64, 64)), sgd(model)
        for x, labels in loader(20):
            with on_cpu(again):
                logits = model(mix(x))
            optimizer.zero_grad()
            mix.loss(logits, labels).backward()
            optimizer.step()

    yield from fmix_twenty(theirs, again, 1.0)


@beside(
    "fmix",
    "Westlake-AI/openmixup",
    f"{OPENMIXUP}/fmix.py",
    *STEP,
    HARD,
    held="test_parity.py::test_fmix_mask_is_the_brightest_pixels_of_the_given_spectrum",
)
def fmix_openmixup_updates(original: Checkout) -> Iterator[Gap]:
    """Images and weights of OpenMixup's whole step, for our partners."""
    again = Again()
    mix, *_ = original.names(f"{OPENMIXUP}/fmix.py", "fmix", "_no_repeat_shuffle_idx", *FMIX, **fourier(again))

    def theirs(model: nn.Module) -> None:
        own = {"decay_power": 3, "size": (64, 64), "max_soft": 0.0, "reformulate": False}
        run(classifier(original, "fmix", 0.2, Listed(model), head(original), function=mix, **own), again)

    yield from fmix_twenty(theirs, again, 0.2)


@beside(
    "fmix",
    "Westlake-AI/openmixup",
    f"{OPENMIXUP}/fmix.py",
    held="test_parity.py::test_fmix_mask_is_the_brightest_pixels_of_the_given_spectrum",
)
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


@beside(
    "resizemix",
    "Westlake-AI/openmixup",
    f"{OPENMIXUP}/resizemix.py",
    held="test_parity.py::test_resizemix_pastes_the_whole_partner_shrunk",
)
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


@beside(
    "resizemix",
    "JayQine/ResizeMix",
    "run_apis/trainer.py",
    "tools/utils.py",
    held="test_parity.py::test_resizemix_pastes_the_whole_partner_shrunk",
)
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
