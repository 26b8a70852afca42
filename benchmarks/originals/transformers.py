"""What the comparisons of methods on transformers share: images, networks with the same weights, a loop's diary."""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import mixers.tokenmix
from mixers import Mixer, Step
from originals import Gap

CLASSES, IMAGES, UPDATES = 10, 8, 20
REVERSE = torch.arange(IMAGES).flip(0)
CYCLE = torch.arange(IMAGES).roll(3)
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
    model: Any = timm.create_model("deit_tiny_patch16_224", img_size=size, depth=4, num_classes=CLASSES)
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


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """One loss per sample."""
    return (-target * logits.log_softmax(-1)).sum(-1)


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
    return finite(torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in pairs]).max())


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{tuple(ours.shape)} cannot be compared with {tuple(theirs.shape)}")
    return finite((ours.double() - theirs.double()).abs().max())


def finite(gap: Tensor) -> float:
    """The number, which no other would be larger than if it were none."""
    if not gap.isfinite():
        raise ValueError("a result is infinite or no number, so that nothing was compared")
    return gap.item()


def learned(ours: Trained, theirs: Trained) -> Iterator[Gap]:
    """What is compared of every training loop."""
    on = f"{UPDATES} batches of {IMAGES}, DeiT of 4 blocks, {ours.images.shape[-1]} pixels"
    yield Gap(f"mixed images, {on}", apart(ours.images, theirs.images))
    if ours.targets is not None and theirs.targets is not None:
        yield Gap("targets of the first batch", apart(ours.targets[0], theirs.targets[0]))
        yield Gap(f"targets of all {UPDATES} updates", apart(ours.targets, theirs.targets))
    yield Gap(f"losses of {UPDATES} updates", relative([ours.losses], [theirs.losses]), "relative")
    yield Gap("gradients of all parameters, first update", relative(ours.gradients, theirs.gradients), "relative")
    yield Gap(f"all weights after {UPDATES} updates", relative(ours.weights, theirs.weights), "relative")


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
