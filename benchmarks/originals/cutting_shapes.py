"""Methods that cut along a shape: Gaussians, grids, blobs, shrunk images."""

import functools
import itertools
import math
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import build
from originals import Checkout, Gap, Numpy, beside
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
    weights,
)


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

    def theirs(x: Tensor, y: Tensor) -> Mixed:
        mixed, (own, other, lam) = grid.get_sample(x, y.argmax(1, keepdim=True))
        return mixed, (*(F.one_hot(labels.long(), CLASSES).float() for labels in (own, other)), lam[:, None])

    for size in (64, (224, 160)):
        yield from beside_each_other(build("gridmix"), theirs, again, 200, size)


@beside(
    "gridmix", "Westlake-AI/openmixup", f"{OPENMIXUP}/gridmix.py", held="test_parity.py::test_gridmix_mask_is_its_holes"
)
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
