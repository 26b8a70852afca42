"""Methods that blend two images around a shape, or a batch and its Mixup."""

import argparse
import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import build
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.update import one_hot
from originals import Checkout, Gap, Numpy, beside
from originals.looking import CROSS_ENTROPY, LABEL, UPDATES, Sgd, both_updated, network, updated
from originals.looking import batch as blobs
from originals.same_draws import (
    CLASSES,
    Again,
    batch,
    farthest,
    keeping,
    loader,
    on_cpu,
    relative,
    sgd,
    space,
    twenty_updates,
)

SMOOTHING = 0.1
NAVER = ("mixup.py", "Mixup", "mixup_target", "one_hot", "hmix_bbox_and_lam", "gmix_gaussian_kernel")


def naver(original: Checkout, again: Again, name: str, ratio: float = 1.0, smoothing: float = 0.0) -> Any:
    """The authors' class, which mixes every batch by one method."""
    made, *_ = original.names(*NAVER, np=Numpy(again), torch=torch, math=math)
    return made(0.0, 1.0, label_smoothing=smoothing, num_classes=CLASSES, cutmix_mode=name, hmix_ratio=ratio)


def always() -> Again:
    """Draws of ours, for code that also asks whether to mix."""
    return Again(rand=lambda: 0.0)


def in_reverse() -> contextlib.AbstractContextManager[Any]:
    """Our partners are the batch in reverse, as theirs are."""
    return mock.patch("mixers.ops.partners", lambda x, rng: torch.arange(len(x)).flip(0))


def one_way(original: Checkout, name: str, sizes: list[Any], ratios: list[float]) -> Iterator[Gap]:
    """Mixed images, smoothed targets and laws of a mixer beside the authors' class, on its pairs; then the updates."""
    again, recipe = always(), Recipe(num_classes=CLASSES, smoothing=SMOOTHING)
    for size in sizes:
        for ratio in ratios:
            mixer = build(name, **({"r": ratio} if name == "hmix" else {}))
            theirs, images, labels = naver(original, again, name, ratio, SMOOTHING), 0.0, 0.0
            for seed in range(400):
                x, hard, _ = batch(seed, size)
                again.kept = {}
                y = one_hot(hard, recipe)
                with in_reverse():
                    ours = mixer.mix(x, y, **mixer.plan(x, y, keeping(seed, again.kept)))
                mixed, target = theirs(x.clone(), hard)
                images, labels = max(images, farthest(ours[0], mixed)), max(labels, farthest(ours[1], target))
            sides = f"{size} x {size}" if isinstance(size, int) else "{} x {}".format(*size)
            how = f", r={ratio:g}" if name == "hmix" else ""
            yield Gap(f"mixed images, 400 batches, {sides} pixels, their partners{how}", images)
            yield Gap(f"smoothed and mixed targets, 400 batches, {sides} pixels{how}", labels)
    yield again.gap()
    mixed_by = naver(original, again, name, 0.5)

    def train(model: nn.Module) -> None:
        optimizer = sgd(model)
        for x, hard in loader(20):
            mixed, target = mixed_by(x.clone(), hard)
            optimizer.zero_grad()
            F.cross_entropy(model(mixed), target).backward()
            optimizer.step()

    with in_reverse():
        yield from twenty_updates(build(name), train, again, ", their partners and targets in a loop of ours")
    yield again.gap()
    elsewhere = 0
    for seed in range(400):
        x, _, y = batch(seed)
        elsewhere += int((build(name).plan(x, y, keeping(seed, {}))["index"] != torch.arange(8).flip(0)).sum())
    why = "They pair a batch with its reverse, as timm does; here the partners are a random permutation."
    yield Gap("partners, 400 batches of 8", elsewhere / 3200, "share", why)


@beside(
    "hmix",
    "naver-ai/hmix-gmix",
    "mixup.py",
    held="test_blended.py::test_hmix_mask_is_a_box_of_the_partner_in_a_blend_whose_mean_is_the_drawn_share",
)
def hmix_naver(original: Checkout) -> Iterator[Gap]:
    """Squares and others, three boxes; the authors' repository has no loop."""
    yield from one_way(original, "hmix", [64, (64, 96)], [0.0, 0.5, 1.0])


@beside(
    "gmix",
    "naver-ai/hmix-gmix",
    "mixup.py",
    held="test_blended.py::test_gmix_mask_is_a_gaussian_around_the_smaller_share_and_its_mean_the_label_share",
)
def gmix_naver(original: Checkout) -> Iterator[Gap]:
    """Square images, which theirs is for; the authors' repository has no loop."""
    yield from one_way(original, "gmix", [64, 32], [1.0])


class Trained:
    """What their class extends: the network, of which it wants embeddings too, and its arguments."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.hparams = space(mixup_alpha=20.0, mixup_beta=20.0)

    def __call__(self, x: Tensor) -> tuple[Tensor, None]:
        return self.model(x), None


@beside(
    "regmixup",
    "FrancescoPinto/RegMixup",
    "models/regmixup.py",
    "models/regularizers/mixup.py",
    held="test_blended.py::test_regmixup_averaged_is_the_mean_over_a_batch_of_twice_the_size_as_its_code_has_it",
)
def regmixup_pinto(original: Checkout) -> Iterator[Gap]:
    """Their training step: what the model is shown, losses, gradients, weights, BatchNorm's statistics."""
    again = Again()
    mix = original.names("models/regularizers/mixup.py", "mixup_data", np=Numpy(again), torch=torch)
    given = {"torch": torch, "F": F, "mixup_data": mix, "ArgumentParser": argparse.ArgumentParser}
    extend, _ = original.names("models/regmixup.py", "RegMixup", "regmixup_criterion", **given)

    def steps(model: nn.Module, optimizer: Any, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
        step, losses = extend(Trained)(model), []
        step.build_loss()
        for place, pair in enumerate(batches):
            with on_cpu(again):
                optimizer.zero_grad()
                losses.append(step.training_step(pair, place))
                losses[-1].backward()
                optimizer.step()
        return [float(loss.detach()) for loss in losses]

    train: Callable[[nn.Module], Any] = lambda model: steps(model, sgd(model), loader(20))  # noqa: E731
    yield from twenty_updates(build("regmixup", averaged=True), train, again, ", averaged=True, both halves")
    yield again.gap()
    for averaged in (True, False):
        again.kept, model = {}, network("resnet18")
        batches = [blobs(seed) for seed in range(UPDATES)]
        theirs = Sgd(theirs_model := copy.deepcopy(model))
        ours = updated(build("regmixup", averaged=averaged), model, batches, again.kept, CROSS_ENTROPY)
        losses = steps(theirs_model, theirs, [(x, labels) for x, labels, _ in batches])
        what = f"{LABEL['resnet18']}, averaged={averaged}"
        if not averaged:
            half = abs(ours.losses[0] / 2 - losses[0])
            yield Gap(f"half of the loss of the first update, {what}", half)
            why = "They average over both halves of the batch, so that their loss is half of the sum of both."
            yield from both_updated(ours, theirs, what, why)
            continue
        apart = max(abs(one - other) for one, other in zip(ours.losses, losses, strict=True))
        yield Gap(f"losses of {UPDATES} updates, {what}", apart)
        yield from both_updated(ours, theirs, what)
        statistics = ([b for n, b in net.named_buffers() if "running" in n] for net in (model, theirs_model))
        yield Gap(f"BatchNorm's statistics after {UPDATES} updates, {what}", relative(*statistics), "relative")
        yield again.gap()
