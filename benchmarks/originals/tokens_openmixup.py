"""Methods on transformers beside OpenMixup's code, which the tables take their numbers from."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mixers import CutMix, MixPro, Out, SMMix, Step, TLAlign, TokenMix, TransMix, taps
from originals import Checkout, Draws, Gap, Numpy, beside
from originals.transformers import (
    CLASSES,
    CYCLE,
    IMAGES,
    REVERSE,
    UPDATES,
    Same,
    apart,
    batches,
    cross_entropy,
    deit,
    here,
    pairing,
    relative,
    same_blocks,
    smoothed,
    whole_attention,
)

OPENMIXUP = "Westlake-AI/openmixup"
AUGMENTS = "openmixup/models/augments"


@beside(
    "transmix",
    OPENMIXUP,
    f"{AUGMENTS}/transmix.py",
    "openmixup/models/heads/vision_transformer_head.py",
    "openmixup/models/losses/cross_entropy_loss.py",
    held="test_attention_mixers.py::test_transmix_averages_the_shares_of_area_and_attention",
)
def transmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Its labels and loss, for the boxes and the attention of ours."""
    theirs = original.names(f"{AUGMENTS}/transmix.py", "transmix", np=np, torch=torch, nn=nn)
    shares, losses = [], []
    for seed, (x, labels) in enumerate(batches()):
        model, y = deit(), functional.one_hot(labels, CLASSES).float()
        with pairing(CYCLE), here():
            out = Step(model, TransMix(CutMix()), cross_entropy)(x, y, np.random.default_rng(seed))
            mask = out.plan["mask"]
            mixed = torch.where(mask > 0, x, x[CYCLE])
            area = mask[0].mean().item()
            attention = whole_attention(model, mixed)
            _, found = theirs(mixed, labels, lam=area, mask=1 - mask, attn=attention, patch_shape=(7, 7))
        shares.append(apart(out.plan["lam"], found[2]))
        losses.append(two_losses(original, out, y, CYCLE, found))
    yield Gap(f"the share of each sample, {UPDATES} batches of {IMAGES}", max(shares))
    yield from loss_gaps(losses)


def two_losses(original: Checkout, out: Out, y: Tensor, index: Tensor, labels: tuple[Any, ...]) -> tuple[float, float]:
    """How far our loss is from OpenMixup's of ``labels``: as it is, and with the mean share for every sample."""
    loss, lam = head_loss(original, out.logits, labels), out.plan["lam"].mean()
    by_mean = cross_entropy(out.logits.detach(), lam * y + (1 - lam) * y[index]).mean()
    return relative([out.loss.detach()], [loss]), relative([by_mean], [loss])


def loss_gaps(losses: list[tuple[float, float]]) -> Iterator[Gap]:
    """What ``two_losses`` found over several batches."""
    own, by_mean = (max(values) for values in zip(*losses, strict=True))
    why = "its loss is averaged over the batch before it is weighted, which replaces every share by their mean"
    yield Gap("loss", own, "relative", why)
    yield Gap("loss, with the mean share for every sample in ours", by_mean, "relative")


def head_loss(original: Checkout, logits: Tensor, labels: tuple[Any, ...], **options: Any) -> Tensor:
    """OpenMixup's loss of a mixed batch with its published criterion, averaged as its training loop does."""
    weigh = original.names("openmixup/models/losses/utils.py", "weight_reduce_loss", torch=torch, F=functional)
    criterion = original.names(
        "openmixup/models/losses/cross_entropy_loss.py", "cross_entropy",
        torch=torch, F=functional, weight_reduce_loss=weigh,
    )  # fmt: skip
    accuracies = {"accuracy": lambda *_: 0, "accuracy_mixup": lambda *_: 0}
    loss = original.method(
        "openmixup/models/heads/vision_transformer_head.py", "VisionTransformerClsHead", "loss",
        torch=torch, F=functional, **accuracies,
    )  # fmt: skip
    head = SimpleNamespace(multi_label=False, criterion=criterion)
    return loss(head, [logits.detach()], labels, **options)["loss"].mean()


@beside(
    "tokenmix",
    OPENMIXUP,
    f"{AUGMENTS}/tokenmix.py",
    held="test_token_mixers.py::test_labels_are_the_content_that_shows_normalised_and_the_area_where_none_does_or_it_is_even",
)
def tokenmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Blocks from the same draws, images, and labels by the attention of ours."""
    theirs = original.names(f"{AUGMENTS}/tokenmix.py", "tokenmix", np=np, torch=torch, math=math, random=Same())
    space, dots = theirs.__wrapped__.__globals__, torch.zeros(IMAGES, 3, 14, 14)

    def cells(lam: float) -> np.ndarray:
        nowhere = torch.zeros(IMAGES, 1, 197, 197)
        return theirs(dots, torch.arange(IMAGES), nowhere, lam=lam, return_mask=True)[0][1][0, 0].numpy() > 0

    model, mixer = deit(224), TokenMix()
    mixer.setup(model)
    with pairing(CYCLE), here():
        yield from same_blocks(lambda: cells(0.5), space, 112)
        counts = []
        for lam in np.linspace(0, 1, 197):
            space["random"] = Same()
            counts.append(abs(int(cells(lam).sum()) - round((1 - lam) * 196)) / 196)
        why = "it adds 14 cells to every count, rounds it down, and stops early as the authors' code does"
        yield Gap("the share of cells from the partner, for the same lambda", max(counts), "absolute", why)

        shown, shares, swapped = [], [], []
        for seed, (x, labels) in enumerate(batches(224)[:5]):
            attention = whole_attention(model.eval(), x)
            lam = np.random.default_rng(seed).beta(1.0, 1.0)
            space["random"] = Same(np.random.default_rng(seed))
            (images, mask), found = theirs(x, labels, attention, lam=lam, return_mask=True)
            pasted = mask[0, 0].numpy() > 0
            plan, other = (
                given_blocks(mixer, model, x, blocks, np.random.default_rng(seed)) for blocks in (pasted, ~pasted)
            )
            shown.append(apart(mixer.mix(x, smoothed(labels), **plan)[0], images))
            shares.append(apart(plan["lam"], found[2] / (found[2] + found[3])))
            even = attention / attention[:, :, :1, 1:].sum(3, keepdim=True).mean(1, keepdim=True)
            space["random"] = Same(np.random.default_rng(seed))
            _, found = theirs(x, labels, even, lam=lam)
            swapped.append(apart(other["lam"], found[2] / (found[2] + found[3])))
    yield Gap("mixed images with its cells, 5 batches of 8, 224 pixels", max(shown))
    why = "it weighs each image by the cells where it is hidden, by attention that does not sum to 1"
    yield Gap("the share of each sample, theirs divided by the sum of both weights", max(shares), "absolute", why)
    compared = "the same, with attention that sums to 1 in both and hidden cells for shown ones in ours"
    yield Gap(compared, max(swapped))


def given_blocks(
    mixer: TokenMix, model: nn.Module, x: Tensor, cells: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    """Ours with the cells of the partner given."""
    with mock.patch("mixers.tokenmix.blocks", lambda *_: cells):
        return mixer.plan(x, x.new_zeros(len(x), CLASSES), rng, model)


@beside(
    "tlalign",
    OPENMIXUP,
    f"{AUGMENTS}/tla.py",
    held="test_attention_mixers.py::test_tlalign_cuts_cutmix_boxes_of_whole_patches",
)
def tlalign_openmixup(original: Checkout) -> Iterator[Gap]:
    """Its images and shares, for the lambdas and centres of ours, and what becomes of the shares in ours."""
    draws, model = Draws(randint=[]), deit()
    theirs = original.names(f"{AUGMENTS}/tla.py", "tla", np=Numpy(draws), torch=torch)
    shown, areas, aligned = [], [], []
    for seed, (x, labels) in enumerate(batches()):
        rng = np.random.default_rng(seed)
        lam = rng.beta(1.0, 1.0)
        draws.values["randint"] += [int(rng.integers(7)), int(rng.integers(7))]
        with pairing(CYCLE), here():
            images, (_, _, area) = theirs(x.clone(), labels, lam=lam)
            plan = TLAlign().plan(x, smoothed(labels), np.random.default_rng(seed), model)
            out = Step(model, TLAlign(), cross_entropy)(x, smoothed(labels), np.random.default_rng(seed))
        shown.append(apart(TLAlign().mix(x, smoothed(labels), **plan)[0], images))
        areas.append((plan["lam"] - area).abs().max().item())
        aligned.append((out.plan["lam"] - area).abs().max().item())
    yield Gap(f"mixed images, {UPDATES} batches of {IMAGES}", max(shown))
    yield Gap("the share of the area", max(areas))
    why = "it aligns nothing: its shares are those of the area, and only its images are those of this method"
    yield Gap("the share of each sample in the target", max(aligned), "absolute", why)


@beside(
    "mixpro",
    OPENMIXUP,
    f"{AUGMENTS}/mixpro.py",
    "openmixup/models/classifiers/mixup_classification.py",
    "openmixup/models/heads/vision_transformer_head.py",
    "openmixup/models/losses/cross_entropy_loss.py",
    held="test_attention_mixers.py::test_maskmix_keeps_one_count_of_cells_in_a_uniform_subset_of_each_sample_with_their_exact_area",
)
def mixpro_openmixup(original: Checkout) -> Iterator[Gap]:
    """Its images and labels, for the lambdas, cells and attention of ours."""
    draws = Draws(permutation=[])
    theirs = original.names(f"{AUGMENTS}/mixpro.py", "mixpro", np=Numpy(draws), torch=torch, math=math)
    label = original.method(
        "openmixup/models/classifiers/mixup_classification.py", "MixUpClassification", "forward_vit_based_mix",
        F=functional, torch=torch,
    )  # fmt: skip
    head = SimpleNamespace(head=SimpleNamespace(loss=lambda _, labels, **__: labels))
    shown, areas, losses = [], [], []
    shares: list[float] = []
    raw: list[float] = []
    for seed, (x, labels) in enumerate(batches(128)):
        model, y = deit(128), smoothed(labels)
        x, labels, y = (torch.cat([v, v[:2]]) for v in (x, labels, y))  # it runs only for as many images as classes
        index = torch.arange(len(x)).roll(3)
        with pairing(index), here():
            out = Step(model, MixPro(cell=32), cross_entropy)(x, y, np.random.default_rng(seed))
            mixed = MixPro().mix(x, y, **out.plan)[0]
            area = out.plan["mask"].mean((1, 2, 3))
            for found, seen in ((shares, mixed), (raw, x)):
                draws.values["permutation"] += [
                    np.argsort(-cells.flatten().numpy()) for cells in out.plan["mask"][:, 0, ::32, ::32]
                ]
                images, given, attended, target = theirs(
                    x, labels, whole_attention(model, seen), lam=np.random.default_rng(seed).beta(1.0, 1.0),
                    num_classes=CLASSES, mask_patch_size=32,
                )  # fmt: skip
                weighed = label(head, [out.logits], given, extra_var=(attended, target), mode="mixpro")
                found.append(apart(out.plan["lam"], weighed[2]))
                if seen is mixed:
                    losses.append(two_losses(original, out, MixPro().labels(y), index, weighed))
        shown.append(apart(mixed, images))
        areas.append(apart(area, given[2]))
    yield Gap(f"mixed images, {UPDATES} batches of 10, 128 pixels, cells of 32", max(shown))
    yield Gap("the share of the area", max(areas))
    yield Gap("the share of each sample, its attention from the mixed images", max(shares))
    yield from loss_gaps(losses)
    why = "it looks at the unmixed images, in another forward"
    yield Gap("the share of each sample, as it is", max(raw), "absolute", why)


@beside(
    "smmix",
    OPENMIXUP,
    f"{AUGMENTS}/smmix.py",
    held="test_token_mixers.py::test_smmix_pastes_the_partners_most_attended_square_over_the_least_attended_one",
)
def smmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Its squares, for the sides and the attention of ours."""
    sides = Draws(choice=[])
    theirs = original.names(f"{AUGMENTS}/smmix.py", "smmix", np=np, torch=torch, nn=nn, F=functional, random=sides)
    model, mixer = deit(), SMMix()
    model.eval()
    shown: dict[str, list[float]] = {"class": [], "patches": []}
    lams = []
    for seed, (x, labels) in enumerate(batches()):
        with torch.no_grad(), taps.attention(model) as look:
            model(x)
        for asked, attention in (("class", look.of_class_token()), ("patches", look.of_patches())):
            with pairing(REVERSE), here():
                plan = mixer.plan(x, smoothed(labels), np.random.default_rng(seed), attention)
                side = round(((plan["mask"][0] == 0).sum().item() / 16**2) ** 0.5)
                sides.values["choice"].append((side, side))
                images, (_, _, lam) = theirs(x.clone(), labels, whole_attention(model, x), side=7)
            mixed = mixer.mix(x, smoothed(labels), **plan)[0]
            shown[asked].append((mixed != images).any(1).float().mean().item())
            lams.append(abs(plan["lam"][0].item() - lam))
    yield Gap(
        f"pixels, the class token's attention in both, {UPDATES} batches of {IMAGES}", max(shown["class"]), "share"
    )
    why = "it looks where the class token does, ours as the authors' code where the patches do"
    yield Gap("pixels, ours with its own attention", float(np.mean(shown["patches"])), "share", why)
    yield Gap("lambda", max(lams))
