"""A step of ours and one of OpenMixup's on the same weights and draws.

OpenMixup is built on mmcv, which is not installed: what its networks take of it is written here, from mmcv's manual.
Networks are timm's on both sides; mix blocks, heads, losses, steps and schedules are the original's.
"""

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator
from numbers import Number
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import Step, ops, taps
from originals import Checkout, Draws, Numpy

OPENMIXUP = "Westlake-AI/openmixup"
CLASSIFIERS, HEADS, HOOKS, LOSSES = (
    f"openmixup/{folder}" for folder in ("models/classifiers", "models/heads", "core/hooks", "models/losses")
)
STEP = (
    f"{CLASSIFIERS}/automix.py", f"{HEADS}/pmix_block.py", f"{HEADS}/cls_mixup_head.py", f"{HEADS}/cls_head.py",
    f"{LOSSES}/cross_entropy_loss.py",
)  # fmt: skip
SCHEDULES = (f"{HOOKS}/momentum_hook.py", f"{HOOKS}/addtional_scheduler.py")
CRITERION = nn.CrossEntropyLoss(reduction="none")
CLASSES, UPDATES = 5, 20
CHANNELS = 192  # of the map that masks are made from, in both networks here


class BaseModule(nn.Module):
    """mmcv's module: it keeps the configuration of its first weights. They are copied from ours, none are drawn."""

    def __init__(self, init_cfg: Any = None):
        super().__init__()
        self.init_cfg = init_cfg

    def init_weights(self, **kwargs: Any) -> None:
        """Nothing to do."""


class ConvModule(nn.Module):
    """mmcv's convolution with norm and activation: without a norm it has a bias, and it ends in a ReLU unless told."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, groups: int = 1,
        bias: Any = "auto", conv_cfg: Any = None, norm_cfg: Any = None, act_cfg: Any = {"type": "ReLU"},  # noqa: B006
    ):  # fmt: skip
        super().__init__()
        has_bias = norm_cfg is None if bias == "auto" else bool(bias)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=has_bias)
        self.bn = nn.BatchNorm2d(out_channels) if norm_cfg else nn.Identity()
        self.activate = getattr(nn, act_cfg["type"])() if act_cfg else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activate(self.bn(self.conv(x)))
        return out


class Backbone(BaseModule):
    """A timm model without its classifier: the map that masks are made from, and the last features, pooled."""

    def __init__(self, model: str, index: int, **args: Any):
        super().__init__()
        self.net: Any = timm.create_model(model, num_classes=0, **args)
        self.index = index

    def forward(self, x: Tensor) -> list[Tensor]:
        features, (hidden,) = self.net.forward_intermediates(x, indices=[self.index])
        return [hidden, self.net.forward_head(features, pre_logits=True)]


class Scripted(nn.Module):
    """Dropout by the factors that ours drew."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor | None] = []

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factors.pop(0)
        return x if factor is None else x * factor


class Recorded:
    """A generator that notes what was drawn from it, by the name of the function."""

    def __init__(self, seed: int):
        self.rng, self.drawn = np.random.default_rng(seed), dict[str, list[Any]]()

    def __getattr__(self, name: str) -> Any:
        def draw(*args: Any) -> Any:
            value = getattr(self.rng, name)(*args)
            self.drawn.setdefault(name + "s" * bool(name == "random" and args), []).append(value)
            return value

        return draw


class Original:
    """What is read of OpenMixup, or of code that is laid over it, with the draws that it is to make."""

    def __init__(self, checkout: Checkout, beneath: Checkout | None = None):
        self.checkout, self.beneath = checkout, beneath or checkout
        self.numpy = Draws(np.random, beta=[], rand=[])
        self.torch: Any = Draws(torch, randperm=[])
        register = SimpleNamespace(register_module=lambda cls=None, **kwargs: cls or (lambda later: later))
        nothing = lambda *args, **kwargs: None  # noqa: E731
        self.given: dict[str, Any] = {
            "Number": Number, "math": math, "random": random, "nn": nn, "F": F,
            "torch": self.torch, "np": Numpy(self.numpy),
            "ABCMeta": type(BaseModule), "abstractmethod": lambda method: method,
            "BaseModule": BaseModule, "ConvModule": ConvModule, "Hook": Hook, "cos": math.cos, "pi": math.pi,
            "builder": SimpleNamespace(build_head=self.build, build_backbone=self.build, build_neck=self.build),
            "build_loss": self.build, "PlotTensor": lambda **kwargs: SimpleNamespace(plot=nothing),
        }  # fmt: skip
        self.given |= dict.fromkeys(("MODELS", "HEADS", "NECKS", "LOSSES", "HOOKS"), register)
        self.given |= dict.fromkeys(("auto_fp16", "force_fp32"), lambda **kwargs: lambda method: method)
        drawn = ("normal_init", "constant_init", "kaiming_init", "trunc_normal_init")
        self.given |= dict.fromkeys((*drawn, "print_log"), nothing) | {"Backbone": Backbone}

    def read(self, file: str, *names: str) -> None:
        """Names of a file, for what is read after them; of the code beneath where that laid over it has none."""
        where = self.checkout if (self.checkout.folder / file).is_file() else self.beneath
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of "\*" in docstrings
            found = where.names(file, *names, **self.given)
        self.given |= dict(zip(names, found if len(names) > 1 else (found,), strict=True))

    def heads(self) -> "Original":
        """Losses and classifiers."""
        self.read("openmixup/models/utils/accuracy.py", "accuracy", "accuracy_mixup", "accuracy_co_mixup")
        self.read("openmixup/models/losses/utils.py", "weight_reduce_loss", "convert_to_one_hot")
        functions = ("cross_entropy", "soft_cross_entropy", "soft_mix_cross_entropy", "binary_cross_entropy")
        self.read(f"{LOSSES}/cross_entropy_loss.py", *functions, "CrossEntropyLoss")
        self.read(f"{HEADS}/cls_mixup_head.py", "ClsMixupHead")
        self.read(f"{HEADS}/cls_head.py", "BaseClsHead", "ClsHead")
        return self

    def build(self, config: dict[str, Any]) -> Any:
        """An object by its configuration, as mmcv's registries build it."""
        return self.given[config["type"]](**{key: value for key, value in config.items() if key != "type"})


class Hook:
    """mmcv's hook."""

    def every_n_iters(self, runner: Any, n: int) -> bool:
        """Whether the running update is an n-th one."""
        return n > 0 and (runner.iter + 1) % n == 0


def batch(seed: int = 0, count: int = 5, size: int = 80) -> tuple[Tensor, Tensor]:
    """Smooth random images, and labels."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 16, size // 16, generator=rng)
    return F.interpolate(coarse, size=(size, size), mode="bicubic"), torch.randint(CLASSES, (count,), generator=rng)


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference, in parts of the largest value of the original; of lists of tensors as of one."""
    ours, theirs = (torch.cat([t.detach().flatten() for t in ts]) for ts in (ours, theirs))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def absolute(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference."""
    return float((ours.detach() - theirs.detach()).abs().max())


def send64(values: np.ndarray, like: Tensor) -> Tensor:
    """``ops.send`` for a step in float64."""
    return torch.from_numpy(values).to(torch.float64 if values.dtype.kind == "f" else torch.int64)


def per_sample64(lam: float, x: Tensor) -> Tensor:
    """``ops.per_sample`` for a step in float64."""
    return torch.full((len(x),), lam, dtype=torch.float64)


@contextlib.contextmanager
def ours64(wanted: bool = True) -> Iterator[None]:
    """Shares that ours sends to a device, and what it casts to float32, are float64 inside."""
    with contextlib.ExitStack() as stack:
        for owner, name, double in (
            (ops, "send", send64), (ops, "per_sample", per_sample64), (Tensor, "float", Tensor.double)
        ):  # fmt: skip
            if wanted:
                stack.enter_context(mock.patch.object(owner, name, double))
        yield


@contextlib.contextmanager
def float64(wanted: bool = True) -> Iterator[None]:
    """A share times a whole number is float64 inside, as the original's targets are made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if wanted else before)
    yield
    torch.set_default_dtype(before)


def watch(owner: Any, name: str) -> list[Any]:
    """What calls of a method return, from now on."""
    seen, inner = [], getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(inner(*args, **kwargs))
        return seen[-1]

    setattr(owner, name, call)
    return seen


class Pair:
    """Our step and the original's on the same weights.

    ``layers``: what the layers of our mix block are called there. ``feed`` hands over what ours drew. ``double``: in
    float64, with the original's casts to float32 made to float64 too.
    """

    def __init__(
        self, original: Original, file: str, kind: str, mixer: Any, layers: dict[str, str],
        feed: Callable[["Pair", Recorded], None], block: dict[str, Any], soft: dict[str, Any] | None = None,
        model: str = "test_resnet", size: dict[str, Any] | None = None, double: bool = True, **args: Any,
    ):  # fmt: skip
        torch.manual_seed(0)
        self.original, self.feed, self.mixer = original, feed, mixer
        self.step = Step(timm.create_model(model, num_classes=CLASSES, **(size or {})), mixer, CRITERION)
        width, stage = self.step.model.num_features, mixer.encoder.index
        original.heads().read("openmixup/models/classifiers/base_model.py", "BaseModel")
        original.read(file, kind)
        loss = {"type": "CrossEntropyLoss"}
        fc = {"with_avg_pool": False, "loss": loss, "in_channels": width, "num_classes": CLASSES}
        self.theirs = original.build(
            {
                "type": kind, "backbone": {"type": "Backbone", "model": model, "index": stage, **(size or {})},
                "mix_block": block, "head_one": {"type": "ClsHead", **fc}, "head_mix": {"type": "ClsMixupHead", **fc},
                "head_mix_k": {"type": "ClsMixupHead", **fc, **(soft or {})}, "alpha": mixer.alpha,
                "lam_margin": mixer.margin, "momentum": mixer.momentum, "save_name": "none.png", **args,
            }
        )  # fmt: skip
        (classifier,) = (n for n, m in self.step.model.named_modules() if m is taps.classifier(self.step.model))
        self.places = {
            f"model.{classifier}.": "head_mix_q.fc.", "model.": "backbone_q.net.", "mixer.one_hot.": "head_one_q.fc.",
            f"mixer.encoder.model.{classifier}.": "head_mix_k.fc.", "mixer.encoder.model.": "backbone_k.net.",
            "mixer.encoder.one_hot.": "head_one_k.fc.",
        } | {f"mixer.block.{ours}.": f"mix_block.{name}." for ours, name in layers.items()}  # fmt: skip
        self.double, self.noise = double, list[Any]()
        if double:
            self.step.double(), self.theirs.double()
            original.torch.float32 = torch.float64
            if hasattr(mixer, "gamma"):
                mixer.gamma.fill_(mixer.mask_loss)
        self.wake()

    def wake(self) -> None:
        """Weights with which masks have structure and no two classifiers are alike, the same on both sides."""
        with torch.no_grad():
            for p in self.mixer.block.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
            for p in (*self.mixer.one_hot.parameters(), *self.mixer.encoder.parameters()):
                p.add_(torch.randn_like(p), alpha=0.01)
        state = {self.name(n): t for n, t in self.step.state_dict().items() if n not in ("mixer.gamma", "mixer.steps")}
        left = self.theirs.load_state_dict(state, strict=False)
        lacking = [n for n in left.missing_keys if not n.startswith(("backbone.", "head."))]  # other names of k's
        if left.unexpected_keys or lacking:
            raise LookupError(f"no counterpart for {lacking}, {left.unexpected_keys}")

    def name(self, ours: str) -> str:
        """What a tensor is called in the original."""
        place = next(place for place in self.places if ours.startswith(place))
        return self.places[place] + ours.removeprefix(place)

    def parts(self) -> dict[str, list[tuple[nn.Parameter, nn.Parameter]]]:
        """Parameters side by side, by what they belong to."""
        theirs, found = dict(self.theirs.named_parameters(remove_duplicate=False)), dict[str, list[Any]]()
        for name, parameter in self.step.named_parameters():
            part = next(p for p in ("model", "mixer.encoder", "mixer.one_hot", "mixer.block") if name.startswith(p))
            found.setdefault(part, []).append((parameter, theirs[self.name(name)]))
        return found

    def run(self, x: Tensor, labels: Tensor, seed: int) -> tuple[Any, dict[str, Any]]:
        """One step of both: what ours and what theirs returns."""
        rng, y = Recorded(seed), F.one_hot(labels, CLASSES).float()
        if self.double:
            x, y = x.double(), y.double()
        with ours64(self.double):
            out = self.step(x, y, rng)
        self.feed(self, rng)
        with mock.patch.object(Tensor, "cuda", lambda tensor: tensor), float64(self.double):
            theirs = self.theirs.forward_train(x, labels)
        return out, theirs

    def gradients(self) -> float:
        """The largest gap of the gradients that both have, over model, second classifier and block."""
        gaps = []
        for pairs in self.parts().values():
            grads = [(ours.grad, theirs.grad) for ours, theirs in pairs]
            if any((a is None) != (b is None) for a, b in grads):
                raise LookupError("one side has a gradient where the other has none")
            if grads[0][0] is not None:
                gaps.append(relative(*zip(*grads, strict=True)))
        return max(gaps)

    def train(self, hooks: list[Any], again: int = 0) -> None:
        """Updates with SGD, on new images and draws each; the original's schedules by its own hooks.

        So many times ``again`` our momentum encoder sees the clean batch, for its statistics alone.
        """
        both = self.step, self.theirs
        sgds = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.02, 0.9) for m in both]
        runner = SimpleNamespace(iter=0, max_iters=UPDATES, model=SimpleNamespace(module=self.theirs))
        for runner.iter in range(UPDATES):
            for hook in hooks:
                hook.before_train_iter(runner)
            out, theirs = self.run(*batch(runner.iter), runner.iter)
            for loss, sgd in zip((out.loss, theirs["loss"].sum()), sgds, strict=True):
                sgd.zero_grad()
                loss.backward()
                sgd.step()
            for _ in range(again):
                with torch.no_grad():
                    self.mixer.encoder.model(batch(runner.iter)[0].to(out.loss.dtype))
            self.theirs.momentum_update()
            self.mixer.after_step(self.step.model, (runner.iter + 1) / UPDATES)

    def weights(self) -> float:
        """The largest gap of the weights, over model, momentum encoder, second classifier and block."""
        return max(relative(*zip(*pairs, strict=True)) for pairs in self.parts().values())

    def statistics(self) -> float:
        """The largest gap of the running means and variances of the momentum encoder."""
        theirs = self.theirs.state_dict()
        kept = {n: t for n, t in self.step.state_dict().items() if n.startswith("mixer.encoder") and "running" in n}
        return relative(list(kept.values()), [theirs[self.name(n)] for n in kept])
