"""Methods that blend or cut a box without looking, and the switches between both."""

import collections
import contextlib
import dataclasses
import functools
import time
import typing
from collections.abc import Iterator
from typing import Any
from unittest import mock

import timm.data.mixup
import timm.utils
import torch
from torch import Tensor, nn

from mixers import build
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.update import one_hot
from originals import Checkout, Gap, Numpy, beside
from originals.same_draws import (
    CLASSES,
    OPENMIXUP,
    Again,
    Mixed,
    batch,
    beside_each_other,
    farthest,
    keeping,
    loader,
    on_cpu,
    openmixup,
    redrawn,
    seen,
    sgd,
    small,
    space,
    trained,
    twenty_updates,
    weights,
)


@beside(
    "mixup",
    "facebookresearch/mixup-cifar10",
    "train.py",
    held="test_parity.py::test_mixup_equals_timm_for_the_same_lambda_and_partner",
)
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


@beside(
    "mixup",
    "Westlake-AI/openmixup",
    f"{OPENMIXUP}/mixup.py",
    held="test_parity.py::test_mixup_equals_timm_for_the_same_lambda_and_partner",
)
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


@beside(
    "cutmix",
    "Westlake-AI/openmixup",
    f"{OPENMIXUP}/cutmix.py",
    held="test_parity.py::test_cutmix_mask_is_the_box_of_the_paper",
)
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


@beside(
    "deit",
    "huggingface/pytorch-image-models",
    "timm/data/mixup.py",
    held="test_laws.py::test_switch_chooses_with_its_probabilities",
)
def deit_timm(original: Checkout) -> Iterator[Gap]:
    """Mixed images, smoothed targets, laws, partners, and the box of the timm that is installed."""
    yield from switched(original, "deit", 0.8, 0.1)
    yield rounded_up()


@beside(
    "rsb",
    "huggingface/pytorch-image-models",
    "timm/data/mixup.py",
    held="test_laws.py::test_switch_chooses_with_its_probabilities",
)
def rsb_timm(original: Checkout) -> Iterator[Gap]:
    """Mixed images, targets, laws and partners."""
    yield from switched(original, "rsb", 0.1, 0.0)


class Task:
    """timm's task of classification, as its training loop asks for it."""

    def __init__(self, original: Checkout, model: nn.Module, loss: nn.Module):
        given = {"torch": torch, "Dict": dict}
        self.run = original.method("timm/task/classification.py", "ClassificationTask", "forward", **given)
        self.trainable_module, self.criterion = model, loss
        self.get_trainable_module = lambda: model
        self.update_ema = lambda step: None

    def __call__(self, x: Tensor, target: Tensor) -> Any:
        return self.run(self, x, target)


def switched_updates(original: Checkout, name: str, mixup_alpha: float, setting: str, loss: nn.Module) -> Iterator[Gap]:
    """timm's training loop, its ``Mixup`` and ``loss`` beside our step, with the loss and smoothing of a setting."""
    again, reverse = Again(), torch.arange(8).flip(0)
    recipe = dataclasses.replace(load_recipe(f"{setting}_{name}"), num_classes=CLASSES)
    needed = ("mixup_target", "one_hot", "cutmix_bbox_and_lam", "rand_bbox")
    made, *_ = original.names("timm/data/mixup.py", "Mixup", *needed, np=Numpy(again), torch=torch)
    mixed = made(mixup_alpha, 1.0, label_smoothing=recipe.smoothing, num_classes=CLASSES)
    given = {"torch": torch, "suppress": contextlib.nullcontext, "utils": timm.utils, "time": time}
    loop = original.names("train.py", "train_one_epoch", **given, OrderedDict=collections.OrderedDict)
    off = dict.fromkeys(("mixup_off_epoch", "prefetcher", "channels_last", "distributed", "synchronize_step"), False)
    args = space(**off, grad_accum_steps=1, clip_grad=None, clip_mode="", log_interval=10**9, rank=1)

    def chosen(kept: dict[str, list[Any]]) -> None:  # timm mixes below 1, by CutMix below 0.5
        values = [share for _, choice in kept["choice"] for share in (0.0, 0.25 if choice == 1 else 0.75)]
        again.given["rand"] = functools.partial(next, iter(values))

    def theirs(model: nn.Module) -> None:
        cpu = torch.device("cpu")
        loop(0, model, loader(20), sgd(model), args, Task(original, model, loss), cpu, mixup_fn=mixed)

    with mock.patch("mixers.ops.partners", lambda *_: reverse):
        how = f", timm's partners, the loss of {setting}"
        yield from twenty_updates(build(name), theirs, again, how, recount=chosen, recipe=recipe)
    yield again.gap()


LOOP = ("train.py", "timm/task/classification.py", "timm/data/mixup.py")


@beside(
    "deit",
    "huggingface/pytorch-image-models",
    *LOOP,
    "timm/loss/cross_entropy.py",
    held="test_laws.py::test_switch_chooses_with_its_probabilities",
)
def deit_updates(original: Checkout) -> Iterator[Gap]:
    """Images and weights of timm's loop with its cross entropy of soft targets, which are smoothed."""
    kind = original.names("timm/loss/cross_entropy.py", "SoftTargetCrossEntropy", torch=torch, nn=nn, F=nn.functional)
    yield from switched_updates(original, "deit", 0.8, "deit_s_official", kind())


@beside(
    "rsb",
    "huggingface/pytorch-image-models",
    *LOOP,
    "timm/loss/binary_cross_entropy.py",
    held="test_laws.py::test_switch_chooses_with_its_probabilities",
)
def rsb_updates(original: Checkout) -> Iterator[Gap]:
    """Images and weights of timm's loop with its binary cross entropy of targets above a threshold."""
    given = {"torch": torch, "nn": nn, "F": nn.functional, "Optional": typing.Optional, "Union": typing.Union}
    kind = original.names("timm/loss/binary_cross_entropy.py", "BinaryCrossEntropy", **given)
    yield from switched_updates(original, "rsb", 0.1, "r50_rsb_a3_original", kind(0.0, 0.2))
