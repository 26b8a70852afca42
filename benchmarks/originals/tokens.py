"""Methods that look at where a transformer looks: each beside the training loop of its authors, and OpenMixup's lines.

The loops run whole, on small DeiTs with the weights of ours, for twenty updates; what they mix, aim at, lose and learn
is compared. They pair a batch with its reverse or by a permutation; ours is handed the same partners.
"""

import contextlib
import copy
import datetime
import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional
from unittest import mock

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import mixers.tokenmix
from mixers import CutMix, Mixer, MixPro, SMMix, Step, TLAlign, TokenMix, TransMix, taps
from originals import Checkout, Draws, Gap, Numpy, beside

OPENMIXUP = "Westlake-AI/openmixup"
AUGMENTS = "openmixup/models/augments"
CLASSES, IMAGES, UPDATES = 10, 8, 20
REVERSE = torch.arange(IMAGES).flip(0)
CYCLE = torch.arange(IMAGES).roll(3)
ROUNDING = "32 bits are rounded in another order"
PARTS = {  # of timm and torch, as the originals import them
    "torch": torch, "nn": nn, "F": functional, "math": math, "partial": partial, "OrderedDict": OrderedDict,
    "to_2tuple": timm.layers.to_2tuple, "trunc_normal_": timm.layers.trunc_normal_, "Mlp": timm.layers.Mlp,
    "DropPath": timm.layers.DropPath, "PatchEmbed": timm.layers.PatchEmbed,
}  # fmt: skip


class Trained(NamedTuple):
    """What training left."""

    images: Tensor
    """The mixed images of all updates."""
    targets: Tensor | None
    """Where the loop makes some."""
    losses: Tensor
    gradients: list[Tensor]
    """Of every parameter in the first update."""
    weights: list[Tensor]
    """After the last update."""


def batches(size: int = 112) -> list[tuple[Tensor, Tensor]]:
    """Smooth images, each with blobs of its own, and their classes."""
    draw = torch.Generator().manual_seed(1)
    coarse = torch.randn(UPDATES, IMAGES, 3, 8, 8, generator=draw)
    rng = np.random.default_rng(2)
    labels = [torch.from_numpy(rng.permutation(CLASSES)[:IMAGES]) for _ in range(UPDATES)]
    images = [functional.interpolate(c, size=(size, size), mode="bicubic") for c in coarse]
    return list(zip(images, labels, strict=True))


def smoothed(labels: Tensor) -> Tensor:
    """One-hot targets with the published smoothing of 0.1."""
    return 0.9 * functional.one_hot(labels, CLASSES).float() + 0.1 / CLASSES


def deit(size: int = 112) -> Any:
    """A small one whose attention is far from even."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=size, depth=4, num_classes=CLASSES)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.1)
    return model.train()


def as_theirs(model: Any, kind: Any, size: int = 112, **options: Any) -> Any:
    """The same network with the same weights in their class."""
    shape = {"img_size": size, "patch_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3, "num_classes": CLASSES}
    theirs = kind(**shape, **options)
    lacking = theirs.load_state_dict(model.state_dict(), strict=False)
    new = {name.split(".")[0] for name in lacking.missing_keys}
    if lacking.unexpected_keys or not new <= {"head1", "mask_token", "token_head"}:
        raise LookupError(f"their network has other weights: {lacking}")
    return theirs.train()


@contextlib.contextmanager
def here() -> Iterator[None]:
    """Code that asks for a GPU by name runs on the CPU, without a change of precision."""

    def place(to: Callable[..., Any]) -> Callable[..., Any]:
        def on_cpu(*args: Any, **options: Any) -> Any:
            args = tuple("cpu" if isinstance(a, str) and a == "cuda" else a for a in args)
            return to(*args, **{k: "cpu" if k == "device" else v for k, v in options.items()})

        return on_cpu

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.Tensor, "cuda", lambda self, *_, **__: self),
            (nn.Module, "cuda", lambda self, *_: self),
            (torch.Tensor, "to", place(torch.Tensor.to)),
            (torch, "full", place(torch.full)),
            (torch.cuda, "synchronize", lambda: None),
            (torch.cuda.amp, "autocast", plain),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def plain() -> torch.autocast:
    """What stands for ``autocast``, around a block or a function."""
    return torch.autocast("cpu", enabled=False)


@contextlib.contextmanager
def pairing(index: Tensor) -> Iterator[None]:
    """Ours, and theirs where it draws a permutation, gets these partners."""
    with (
        mock.patch("mixers.ops.partners", lambda *_: index.clone()),
        mock.patch("torch.randperm", lambda *_: index.clone()),
    ):
        yield


class Diary:
    """Stands for the loops' logger, gradient scaler, criterion and scheduler, and writes down what passes by."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.targets: list[Tensor] = []
        self.gradients: list[Tensor | None] = []
        self.inputs: list[Tensor] = []
        self.meters: dict[str, Any] = {}

    def log_every(self, loader: Iterable[Any], *_: Any) -> Iterable[Any]:
        return loader

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked for does nothing."""
        return lambda *_, **__: None

    def scale(self, loss: Tensor, optimizer: Any, parameters: Iterable[Tensor], **_: Any) -> None:
        """What timm's scaler does without scaling."""
        self.losses.append(loss.item())
        loss.backward()
        self.keep(parameters)
        optimizer.step()

    def keep(self, parameters: Iterable[Tensor]) -> float:
        """Write down the first gradients."""
        if not self.gradients:
            self.gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        return 0.0

    def criterion(self, *args: Tensor) -> Tensor:
        """Cross-entropy of ``(images, logits, target)`` or ``(logits, target)``."""
        self.targets.append(args[-1].detach().clone())
        return cross_entropy(args[-2], args[-1]).mean()

    def watch(self, model: nn.Module) -> None:
        """Write down what the model is trained on."""

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                self.inputs.append(args[0].clone())

        model.register_forward_pre_hook(note)

    def trained(self, model: nn.Module, names: Iterable[str]) -> Trained:
        """What was written down, and the weights as they are now, in the order of ``names``."""
        position = {name: i for i, (name, _) in enumerate(model.named_parameters())}
        gradients = [self.gradients[position[name]] for name in names]
        weights = [model.get_parameter(name).detach() for name in names]
        found = [g if g is not None else torch.zeros_like(w) for g, w in zip(gradients, weights, strict=True)]
        targets = torch.stack(self.targets) if self.targets else None
        return Trained(torch.stack(self.inputs), targets, torch.tensor(self.losses), found, weights)


def optimizer_of(module: nn.Module) -> torch.optim.SGD:
    """The optimiser of both."""
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def train(mixer: Mixer, model: nn.Module, size: int = 112) -> tuple[Trained, list[str], list[dict[str, Any]]]:
    """Twenty updates of ours: what they left, the order of the parameters as theirs names them, the plans."""
    step, diary = Step(model, mixer, cross_entropy), Diary()
    optimizer, plans = optimizer_of(step), []
    diary.watch(step.model)
    for seed, (x, labels) in enumerate(batches(size)):
        out = step(x, smoothed(labels), np.random.default_rng(seed))
        optimizer.zero_grad()
        diary.scale(out.loss, optimizer, step.parameters())
        diary.targets.append(out.target)
        plans.append(out.plan)
    names = [name for name, _ in step.named_parameters()]
    theirs = [name.replace("mixer.head", "token_head").removeprefix("model.") for name in names]
    return diary.trained(step, names), theirs, plans


def relative(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference, each tensor's relative to its own largest value."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for a, b in pairs)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{tuple(ours.shape)} cannot be compared with {tuple(theirs.shape)}")
    return (ours.double() - theirs.double()).abs().max().item()


def learned(ours: Trained, theirs: Trained) -> Iterator[Gap]:
    """What is compared of every training loop."""
    on = f"{UPDATES} batches of {IMAGES}, DeiT of 4 blocks, {ours.images.shape[-1]} pixels"
    rows = [(f"mixed images, {on}", apart(ours.images, theirs.images), "absolute")]
    if ours.targets is not None and theirs.targets is not None:
        rows.append(("targets of the first batch", apart(ours.targets[0], theirs.targets[0]), "absolute"))
        rows.append((f"targets of all {UPDATES} updates", apart(ours.targets, theirs.targets), "absolute"))
    rows += [
        (f"losses of {UPDATES} updates", relative([ours.losses], [theirs.losses]), "relative"),
        ("gradients of all parameters, first update", relative(ours.gradients, theirs.gradients), "relative"),
        (f"all weights after {UPDATES} updates", relative(ours.weights, theirs.weights), "relative"),
    ]
    for compared, gap, unit in rows:
        yield Gap(compared, gap, unit, ROUNDING if gap else "")


def box(mask: Tensor) -> tuple[int, int, int, int]:
    """Rows and columns of the rectangle of zeros in a mask (H, W), ends left out; nothing where there is none."""
    rows, columns = ((mask == 0).any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if rows else (0, 0, 0, 0)


def whole_attention(model: Any, x: Tensor) -> Tensor:
    """The last layer's attention (B, heads, N, N), as timm computes it when it does not fuse it."""
    layer, found = model.blocks[-1].attn, []
    hook = layer.attn_drop.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with mock.patch.object(layer, "fused_attn", False), torch.no_grad():
        model(x)
    hook.remove()
    return found[0]


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
            OrderedDict=OrderedDict, AverageMeter=Diary, reduce_tensor=lambda loss, _: loss, model_parameters=lambda m, **_: m.parameters(),
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
    "transmix",
    OPENMIXUP,
    f"{AUGMENTS}/transmix.py",
    "openmixup/models/heads/cls_mixup_head.py",
    "openmixup/models/losses/cross_entropy_loss.py",
    held="test_attention_mixers.py::test_transmix_averages_the_shares_of_area_and_attention",
)
def transmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Its labels and loss, for the boxes and the attention of ours."""
    theirs = original.names(f"{AUGMENTS}/transmix.py", "transmix", np=np, torch=torch, nn=nn)
    shares, losses, mean_losses = [], [], []
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
        loss = head_loss(original, out.logits, found)
        losses.append(relative([out.loss.detach()], [loss]))
        lam = out.plan["lam"].mean()
        meant = cross_entropy(out.logits.detach(), lam * y + (1 - lam) * y[CYCLE]).mean()
        mean_losses.append(relative([meant], [loss]))
    yield Gap(f"the share of each sample, {UPDATES} batches of {IMAGES}", max(shares), "absolute", ROUNDING)
    why = "its loss is averaged over the batch before it is weighted, which replaces every share by their mean"
    yield Gap("loss", max(losses), "relative", why)
    yield Gap("loss, with the mean share for every sample in ours", max(mean_losses), "relative", ROUNDING)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """One loss per sample."""
    return (-target * logits.log_softmax(-1)).sum(-1)


def head_loss(original: Checkout, logits: Tensor, labels: tuple[Any, ...], **options: Any) -> Tensor:
    """OpenMixup's loss of a mixed batch with its published criterion, averaged as its training loop does."""
    weigh = original.names("openmixup/models/losses/utils.py", "weight_reduce_loss", torch=torch, F=functional)
    criterion = original.names(
        "openmixup/models/losses/cross_entropy_loss.py", "cross_entropy",
        torch=torch, F=functional, weight_reduce_loss=weigh,
    )  # fmt: skip
    accuracies = {"accuracy": lambda *_: 0, "accuracy_mixup": lambda *_: 0}
    loss = original.method(
        "openmixup/models/heads/cls_mixup_head.py", "ClsMixupHead", "loss", torch=torch, F=functional, **accuracies
    )
    head = SimpleNamespace(multi_label=False, criterion=criterion)
    return loss(head, [logits.detach()], labels, **options)["loss"].mean()


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
    yield Gap("the share of each sample, theirs divided by the sum of both weights", max(shares), "absolute", ROUNDING)
    why = "its two weights do not sum to 1, and it takes half of the smoothing from each, whatever it weighs"
    yield Gap("targets with label smoothing 0.1", max(whole), "absolute", why)


class Same:
    """The module ``random`` of theirs, drawing what ours draws from ``rng``."""

    def __init__(self, rng: np.random.Generator | None = None):
        self.rng = rng or np.random.default_rng(0)

    def uniform(self, low: float, high: float) -> float:
        """A number."""
        return self.rng.uniform(low, high)

    def randint(self, low: int, high: int) -> int:
        """A whole number, ``high`` included."""
        return low + int(self.rng.integers(high - low + 1))


def same_blocks(find: Callable[[], np.ndarray], space: dict[str, Any], count: int) -> Iterator[Gap]:
    """Masks of ``count`` of 14 x 14 cells; ``space`` holds the ``random`` that ``find`` draws from."""
    differing = short = outside = 0
    for seed in range(2000):
        space["random"] = Same(np.random.default_rng(seed))
        theirs, ours = find(), mixers.tokenmix.blocks(14, 14, count, np.random.default_rng(seed))
        full = theirs.sum() == count
        short += not full
        differing += full and not np.array_equal(theirs, ours)
        outside += bool((theirs & ~ours).any())
    yield Gap(f"blocks of {count} of 14 x 14 cells, 2,000 masks: a full one differs", differing / 2000, "share")
    yield Gap("the same masks: theirs has a cell that ours lacks", outside / 2000, "share")
    why = "after ten refusals theirs stops with fewer cells than asked for, where ours draws the rest uniformly"
    yield Gap("the same masks: theirs has fewer cells", short / 2000, "share", why)


def dense_labels(content: Tensor, labels: Tensor) -> Tensor:
    """The dense labels that TokenMix loads: values, classes, and where the crop lies and what it shows."""
    maps = torch.zeros(IMAGES, 3, 1, *content.shape[1:])
    maps[:, 0, 0], maps[:, 1, 0] = content, labels[:, None, None]
    maps[:, 2, 0, 0, 2:4], maps[:, 2, 0, 0, 5] = 1.0, labels.float()
    return maps


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
        why = "it adds 14 cells to every count and rounds it down"
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
    yield Gap(compared, max(swapped), "absolute", ROUNDING)


def given_blocks(
    mixer: TokenMix, model: nn.Module, x: Tensor, cells: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    """Ours with the cells of the partner given."""
    with mock.patch("mixers.tokenmix.blocks", lambda *_: cells):
        return mixer.plan(x, x.new_zeros(len(x), CLASSES), rng, model)


def epoch(original: Checkout, function: str, diary: Diary, model: nn.Module, method: Any) -> None:
    """The loop of ``engine.py`` that DeiT's descendants share."""
    loop = original.names(
        "engine.py", function, torch=torch, math=math, F=functional, Iterable=Iterable, Optional=Optional,
        DistillationLoss=object, ModelEma=object, Mixup=object, print=lambda *_: None,
        utils=SimpleNamespace(MetricLogger=lambda **_: diary, SmoothedValue=lambda **_: None),
    )  # fmt: skip
    diary.watch(model)
    loader = [(x.clone(), labels) for x, labels in batches()]
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
    yield Gap("its lambda", max(lams), "absolute", ROUNDING if max(lams) else "")


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


@beside(
    "smmix",
    OPENMIXUP,
    f"{AUGMENTS}/smmix.py",
    held="test_token_mixers.py::test_smmix_pastes_the_partners_most_attended_square_over_the_least_attended_one",
)
def smmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Its squares, for the sides and the attention of ours."""
    sides = Draws(choice=[])
    theirs = original.names(
        f"{AUGMENTS}/smmix.py", "smmix", np=np, torch=torch, nn=nn, F=functional, random=sides
    )
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
    yield Gap(f"pixels, the class token's attention in both, {UPDATES} batches of {IMAGES}", max(shown["class"]), "share")
    why = "it looks where the class token does, ours as the authors' code where the patches do"
    yield Gap("pixels, ours with its own attention", float(np.mean(shown["patches"])), "share", why)
    yield Gap("lambda", max(lams), "absolute", ROUNDING if max(lams) else "")
