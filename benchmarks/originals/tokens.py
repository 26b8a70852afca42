"""Methods on transformers beside the code of their authors, whose training loops run whole for twenty updates.

The loops run on small DeiTs with the weights of ours; what they mix, aim at, lose and learn is compared. They pair a
batch with its reverse or by a permutation; ours is handed the same partners.
"""

import contextlib
import copy
import datetime
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, Optional

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from mixers import CutMix, MixPro, SMMix, TLAlign, TokenMix, TransMix
from originals import Checkout, Draws, Gap, Numpy, beside
from originals.transformers import (
    CLASSES,
    CYCLE,
    IMAGES,
    PARTS,
    REVERSE,
    UPDATES,
    Diary,
    Same,
    apart,
    as_theirs,
    batches,
    box,
    deit,
    here,
    learned,
    optimizer_of,
    pairing,
    plain,
    relative,
    same_blocks,
    smoothed,
    train,
)


@beside(
    "transmix",
    "Beckschen/TransMix",
    "transmix.py",
    "train.py",
    "timm/models/vision_transformer.py",
    held="test_attention_mixers.py::test_transmix_averages_the_shares_of_area_and_attention",
)
def transmix_loop(original: Checkout) -> Iterator[Gap]:
    """The published training loop, with the boxes that ours drew."""
    model, diary = deit(), Diary()
    kind = original.names(
        "timm/models/vision_transformer.py", "VisionTransformer", "Block", "Attention", "_init_vit_weights", **PARTS
    )[0]
    theirs = as_theirs(model, kind, return_attn=True)
    with pairing(REVERSE):
        ours, names, plans = train(TransMix(CutMix()), model)
    boxes = [box(plan["mask"][0, 0]) for plan in plans]
    areas = [1 - (b - t) * (r - left) / 112**2 for t, b, left, r in boxes]
    with here():
        parts = PARTS | {
            "Mixup": timm.data.Mixup,
            "one_hot": lambda *args, device, **values: timm.data.mixup.one_hot(*args, **values),
            "cutmix_bbox_and_lam": Draws(box=list(zip(boxes, areas, strict=True))).box,
        }
        method = original.names("transmix.py", "Mixup_transmix", "mixup_target", **parts)[0](
            cutmix_alpha=1.0, num_classes=CLASSES
        )
        method._params_per_batch = lambda: (0.5, True)
        loop = original.names(
            "train.py", "train_one_epoch", suppress=contextlib.nullcontext, time=time, torch=torch,
            OrderedDict=OrderedDict, AverageMeter=Diary, reduce_tensor=lambda loss, _: loss,
            model_parameters=lambda model, **_: model.parameters(),
        )  # fmt: skip
        asked = dict.fromkeys(("mixup_off_epoch", "prefetcher", "channels_last", "clip_grad"))
        args = SimpleNamespace(
            **asked, transmix=True, distributed=True, clip_mode="", log_interval=9**9, local_rank=1, world_size=1
        )
        diary.watch(theirs)
        loop(0, theirs, [(x.clone(), y) for x, y in batches()], optimizer_of(theirs), diary.criterion, args,
             loss_scaler=diary.scale, mixup_fn=method)  # fmt: skip
    yield from learned(ours, diary.trained(theirs, names))


@beside(
    "tokenmix",
    "Sense-X/TokenMix",
    "tokenmix.py",
    held="test_token_mixers.py::test_blocks_of_tokenmix_are_those_of_the_law_and_exactly_as_many_as_asked_for",
)
def tokenmix_published(original: Checkout) -> Iterator[Gap]:
    """Blocks from the same draws, images, and labels from dense maps that hold the content that ours looked at."""
    rng_of, count = np.random.default_rng, 112
    names = ("generate_mask", "Mixup", "get_labelmaps_with_coords", "get_label", "get_featuremaps", "one_hot")
    parts = {"torch": torch, "math": math, "roi_align": torchvision.ops.roi_align}
    find, kind, *_ = original.names(
        "tokenmix.py", *names, np=Numpy(Draws(rand=[0.0] * 200, beta=[0.3] * 100)), random=Same(), **parts
    )
    space = find.__globals__
    yield from same_blocks(lambda: find(0.5, "cpu", 14)[0][0, 0].numpy() > 0, space, count)

    model, mixer = deit(224), TokenMix(use_alpha=False)
    mixer.setup(model)
    shown, shares, whole = [], [], []
    for seed, (x, labels) in enumerate(batches(224)[:5]):
        y = functional.one_hot(labels, CLASSES).float()
        with pairing(REVERSE), here():
            plan = mixer.plan(x, y, rng_of(seed), model)
            mixed, _ = mixer.mix(x, y, **plan)
            _, target = mixer.mix(x, smoothed(labels), **plan)
            maps = dense_labels(mixer.content(model, x), labels)
            space["random"] = Same(rng_of(seed))
            exact = kind(cutmix_alpha=1.0, switch_prob=1.0, label_smoothing=0.0, num_classes=CLASSES)
            images, found = exact(x.clone(), maps.clone())
            space["random"] = Same(rng_of(seed))
            smooth = kind(cutmix_alpha=1.0, switch_prob=1.0, label_smoothing=0.1, num_classes=CLASSES)
            raw = smooth(x.clone(), maps.clone())[1]
        shown.append(apart(mixed, images))
        own = found[torch.arange(IMAGES), labels]
        shares.append(apart(plan["lam"], own / found.sum(1)))
        whole.append(apart(target, raw))
    yield Gap("mixed images, 5 batches of 8, 224 pixels", max(shown))
    yield Gap("the share of each sample, theirs divided by the sum of both weights", max(shares))
    why = "its two weights do not sum to 1, and it takes half of the smoothing from each, whatever it weighs"
    yield Gap("targets with label smoothing 0.1", max(whole), "absolute", why)


@beside(
    "tokenmix",
    "Sense-X/TokenMix",
    "tokenmix.py",
    "engine.py",
    held="test_token_mixers.py::test_labels_are_the_content_that_shows_normalised_and_the_area_where_none_does_or_it_is_even",
)
def tokenmix_loop(original: Checkout) -> Iterator[Gap]:
    """The published training loop, whose dense labels hold what its model attends to at that update."""
    names = ("Mixup", "generate_mask", "get_labelmaps_with_coords", "get_label", "get_featuremaps", "one_hot")
    parts = {"torch": torch, "math": math, "roi_align": torchvision.ops.roi_align, "random": Same()}
    why = "its two weights do not sum to 1, and it takes half of the smoothing from each, whatever it weighs"
    model, mixer = deit(224), TokenMix(use_alpha=False)
    untouched = copy.deepcopy(model)
    with pairing(REVERSE):
        ours, order, _ = train(mixer, model, 224)
    for smoothing in (0.0, 0.1):
        draws = Draws(rand=[0.0] * 2 * UPDATES, beta=[0.3] * UPDATES)
        kind, mask, *_ = original.names("tokenmix.py", *names, np=Numpy(draws), **parts)
        method = kind(cutmix_alpha=1.0, switch_prob=1.0, label_smoothing=smoothing, num_classes=CLASSES)
        theirs, diary = copy.deepcopy(untouched), Evened() if not smoothing else Diary()

        def dense(theirs: Any = theirs, space: dict[str, Any] = mask.__globals__) -> Iterator[tuple[Tensor, Tensor]]:
            for seed, (x, labels) in enumerate(batches(224)):
                space["random"] = Same(np.random.default_rng(seed))
                yield x.clone(), dense_labels(mixer.content(theirs, x), labels)

        with here():
            epoch(original, "train_one_epoch", diary, theirs, method, dense())
        found = diary.trained(theirs, order)
        if not smoothing:
            for gap in learned(ours, found):
                yield gap._replace(compared=f"{gap.compared}, label weights divided by their sum, then smoothed")
        else:
            apart_by = relative(ours.weights, found.weights)
            yield Gap(f"all weights after {UPDATES} updates, its targets as they are", apart_by, "relative", why)


class Evened(Diary):
    """A criterion that first divides targets by their sum, and smooths them."""

    def criterion(self, *args: Tensor) -> Tensor:
        """Cross-entropy of ``(logits, target)``."""
        *given, target = args
        return super().criterion(*given, 0.9 * target / target.sum(1, keepdim=True) + 0.1 / CLASSES)


def dense_labels(content: Tensor, labels: Tensor) -> Tensor:
    """The dense labels that TokenMix loads: values, classes, and where the crop lies and what it shows."""
    maps = torch.zeros(IMAGES, 3, 1, *content.shape[1:])
    maps[:, 0, 0], maps[:, 1, 0] = content, labels[:, None, None]
    maps[:, 2, 0, 0, 2:4], maps[:, 2, 0, 0, 5] = 1.0, labels.float()
    return maps


def epoch(
    original: Checkout, function: str, diary: Diary, model: nn.Module, method: Any, loader: Iterable[Any] | None = None
) -> None:
    """The loop of ``engine.py`` that DeiT's descendants share, over all batches unless told."""
    loop = original.names(
        "engine.py", function, torch=torch, math=math, F=functional, Iterable=Iterable, Optional=Optional,
        DistillationLoss=object, ModelEma=object, Mixup=object, print=lambda *_: None,
        suppress=contextlib.nullcontext,
        utils=SimpleNamespace(MetricLogger=lambda **_: diary, SmoothedValue=lambda **_: None),
    )  # fmt: skip
    diary.watch(model)
    loader = loader or [(x.clone(), labels) for x, labels in batches()]
    loop(model, diary.criterion, loader, optimizer_of(model), "cpu", 0, diary.scale, mixup_fn=method)


@beside(
    "tlalign",
    "Euphoria16/TL-Align",
    "tla.py",
    "engine.py",
    "timm/models/vision_transformer.py",
    held="test_attention_mixers.py::test_tlalign_is_carrying_the_labels_of_all_tokens_through_all_layers",
)
def tlalign_loop(original: Checkout) -> Iterator[Gap]:
    """The published boxes and training loop, with the same draws."""
    draws = Draws(rand=[0.0] * UPDATES, beta=[], randint=[])
    find, kind, *_ = original.names(
        "tla.py", "rand_token_bbox", "TL_AlignMix", "mixup_target", "token_label", "one_hot",
        np=Numpy(draws), torch=torch,
    )  # fmt: skip
    yield from token_boxes(find, draws)

    model, diary = deit(), Diary()
    network = original.names(
        "timm/models/vision_transformer.py", "VisionTransformer", "Block", "Attention", "_init_vit_weights", **PARTS
    )[0]
    theirs = as_theirs(model, network)
    with pairing(REVERSE):
        ours, names, _ = train(TLAlign(), model)
    for seed in range(UPDATES):
        rng = np.random.default_rng(seed)
        draws.values["beta"].append(rng.beta(1.0, 1.0))
        draws.values["randint"] += [int(rng.integers(7)), int(rng.integers(7))]
    with here():
        method = kind(mixup_alpha=0.0, tokenmix_alpha=1.0, num_classes=CLASSES)
        epoch(original, "train_one_epoch_tla", diary, theirs, method)
    yield from learned(ours, diary.trained(theirs, names))


def token_boxes(find: Callable[..., Any], draws: Draws) -> Iterator[Gap]:
    """Boxes on a grid of tokens; ``find`` draws its centre from ``draws``."""
    model, differing, lams = deit(), 0, []
    x = torch.zeros(2, 3, 224, 160)
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        lam = rng.beta(1.0, 1.0)
        draws.values["randint"] += [int(rng.integers(14)), int(rng.integers(10))]
        (top, bottom, left, right), area = find((14, 10), lam)
        plan = TLAlign().plan(x, torch.eye(2), np.random.default_rng(seed), model)
        expected = torch.ones(14, 10)
        expected[top:bottom, left:right] = 0
        differing += not torch.equal(plan["mask"][0, 0, ::16, ::16], expected)
        lams.append(abs(plan["lam"][0].item() - area))
    yield Gap("the box, 2,000 draws of lambda and centre, 14 x 10 patches", differing / 2000, "share")
    yield Gap("its lambda", max(lams))


@beside(
    "smmix",
    "ChenMnZ/SMMix",
    "smmix.py",
    "engine.py",
    "deit.py",
    held="test_token_mixers.py::test_a_step_of_smmix_is_a_look_and_its_three_losses_and_their_gradients",
)
def smmix_loop(original: Checkout) -> Iterator[Gap]:
    """The published training loop, with the sides of the squares that ours drew."""
    model, diary, sides = deit(), Diary(), Draws(choice=[])
    parts = PARTS | {"np": Numpy(Draws(rand=[0.0] * UPDATES)), "random": sides, "Mixup": timm.data.Mixup}
    parts["one_hot"] = lambda *args, device, **values: timm.data.mixup.one_hot(*args, **values)
    kind = original.names("smmix.py", "SMMix", "mixup_target", "batch_index_generate", **parts)[0]
    differing = 0
    for side in range(4, 33):
        drawn = [1 + i for i in range(side) if max(1, side // 4) <= 1 + i <= max(1, 3 * side // 4)]
        differing += kind(side=side).rectangle_size_list != [(s, s) for s in drawn]
    yield Gap("the sides that a square may have, grids of 4 to 32 cells", differing / 29, "share")

    network = original.names("deit.py", "VisionTransformer", "Block", "Attention", "Mlp", "PatchEmbed", **PARTS)[0]
    theirs = as_theirs(model, network)
    theirs.token_head.load_state_dict(model.head.state_dict())
    with pairing(REVERSE):
        ours, names, plans = train(SMMix(), model)
    for plan in plans:
        side = round(((plan["mask"][0] == 0).sum().item() / 16**2) ** 0.5)
        sides.values["choice"].append((side, side))
    with here():
        epoch(original, "train_one_epoch", diary, theirs, kind(num_classes=CLASSES, side=7))
    diary.targets = diary.targets[::3]  # of the mixed image, of its own tokens, of the partner's
    yield from learned(ours, diary.trained(theirs, names))


class Meter(timm.utils.AverageMeter):  # type: ignore[name-defined]
    """An average that keeps its values."""

    made: ClassVar[list["Meter"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self.made.append(self)

    def update(self, val: float, n: int = 1) -> None:
        """One more."""
        super().update(val, n)
        self.values.append(val)


@beside(
    "mixpro",
    "fistyee/MixPro",
    "utils.py",
    "main.py",
    "models/vit.py",
    held="test_attention_mixers.py::test_mixpro_trusts_the_attention_as_far_as_the_model_is_right_with_a_gradient_only_when_asked",
)
def mixpro_loop(original: Checkout) -> Iterator[Gap]:
    """The published training loop with attention labeling on, with the lambdas and cells that ours drew."""
    network = original.names(
        "models/vit.py", "VisionTransformer", "Block", "Attention", "_init_vit_weights", **PARTS, autocast=plain
    )[0]
    draws = Draws(beta=[], permutation=[])
    mask_mix, *_ = original.names("utils.py", "MaskMix", "mixup_target", "one_hot", np=Numpy(draws), torch=torch)
    model, diary = deit(128), Diary()
    theirs = as_theirs(model, network, size=128, return_attn=True)
    untouched = copy.deepcopy(model)
    with pairing(CYCLE):
        ours, names, plans = train(MixPro(cell=32, detach=False), model, 128)
        detached, _, _ = train(MixPro(cell=32), untouched, 128)
    for seed, plan in enumerate(plans):
        draws.values["beta"].append(np.random.default_rng(seed).beta(1.0, 1.0))
        draws.values["permutation"] += [
            np.argsort(-cells.flatten().numpy()) for cells in plan["mask"][:, 0, ::32, ::32]
        ]
    config = SimpleNamespace(
        DATA=SimpleNamespace(IMG_SIZE=128), TRAIN=SimpleNamespace(ACCUMULATION_STEPS=1, CLIP_GRAD=False, EPOCHS=1),
        MODEL=SimpleNamespace(MASK_PATCH_SIZE=32, PATCH_SIZE=16, NUM_CLASSES=CLASSES, LABEL_SMOOTHING=0.1),
        AUG=SimpleNamespace(MASKMIX_ALPHA=1.0, MASKMIX_PROB=0.5, PAL_ATTN=True), AMP_OPT_LEVEL="O0", PRINT_FREQ=9**9,
    )  # fmt: skip
    loop = original.names(
        "main.py", "train_one_epoch", np=Numpy(Draws(rand=[0.0] * UPDATES)), torch=torch, math=math, time=time,
        F=functional, datetime=datetime, autocast=plain, AverageMeter=Meter, MaskMix=mask_mix, logger=Diary(),
        get_grad_norm=diary.keep,
    )  # fmt: skip
    Meter.made.clear()
    diary.watch(theirs)
    loader = [(x.clone(), labels) for x, labels in batches(128)]
    with pairing(CYCLE), here():
        loop(config, theirs, None, loader, optimizer_of(theirs), 0, None, Diary())
    diary.losses = Meter.made[1].values
    found = diary.trained(theirs, names)
    for gap in learned(ours, found):
        yield gap._replace(compared=f"{gap.compared}, detach=False") if gap.unit == "relative" else gap
    why = "theirs has a gradient through the agreement of prediction and target; the loss itself is the same"
    default = relative(detached.gradients, found.gradients)
    yield Gap("gradients of all parameters, first update, as ours is by default", default, "relative", why)
    yield from partial_cells(mask_mix, draws)


def partial_cells(mask_mix: Callable[..., Any], draws: Draws) -> Iterator[Gap]:
    """Images whose sides are no whole number of cells."""
    shown, areas = [], []
    for seed, (x, labels) in enumerate(batches()):
        with pairing(CYCLE), here():
            plan = MixPro(cell=32).plan(x, smoothed(labels), np.random.default_rng(seed), None)
            draws.values["beta"].append(np.random.default_rng(seed).beta(1.0, 1.0))
            cells = plan["mask"][:, 0, ::32, ::32]
            draws.values["permutation"] += [np.argsort(-c.flatten().numpy()) for c in cells]
            images, _, _, ratio = mask_mix(x, x[CYCLE], 1.0, 4, 2, 32, labels, labels[CYCLE], 0.1, CLASSES)
        shown.append(apart(MixPro().mix(x, smoothed(labels), **plan)[0], images))
        areas.append(apart(plan["lam"], ratio))
    yield Gap("mixed images of 112 pixels, no whole number of cells of 32", max(shown))
    yield Gap("their share by area", max(areas), "absolute", "theirs counts cells, ours the pixels that they show")
