"""Methods that learn to mix, and the loss that decouples: whole steps and runs, of the same weights and draws.

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
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import DecoupleMix, Mixup, Step, base, build, ops, taps
from mixers.adautomix import mix_many
from originals import Checkout, Draws, Gap, Numpy, beside

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


def feed_automix(pair: Pair, rng: Recorded) -> None:
    """Lambdas, partners, the draw of switching off and what dropout leaves."""
    pair.original.numpy.values["beta"].append(np.array(rng.drawn["beta"][::-1]))
    pair.original.numpy.values["rand"] = [
        0.5,
        *rng.drawn.get("random", []),
    ]  # the first is of mask_adjust, which is off
    pair.original.torch.values["randperm"] += map(torch.from_numpy, rng.drawn["permutation"])
    if isinstance(dropout := getattr(pair.theirs.mix_block.value, "dropout", None), Scripted):
        dropout.factors = pair.noise[-2:][::-1]


def automix_pair(original: Checkout, **args: Any) -> Pair:
    """AutoMix as it is set for ImageNet; ``args`` of the mixer, or ``model`` and ``size``."""
    network = {key: args.pop(key) for key in ("model", "size", "double") if key in args}
    mixer: Any = build("automix", **{"mask_loss_law": "compounded", "momentum": 0.9, "momentum_end": 0.9} | args)
    code = Original(original)
    code.read(f"{HEADS}/pmix_block.py", "PixelMixBlock")
    block = {
        "type": "PixelMixBlock", "in_channels": CHANNELS, "unsampling_mode": [mixer.block.upsample],
        "lam_concat": mixer.block.lam_concat, "mask_loss_margin": 0.1,
    }  # fmt: skip
    layers = {"query_key": "query.conv", "value": "value"}
    own = {"mask_loss": mixer.mask_loss, "switch_off": mixer.switch_off}
    return Pair(code, f"{CLASSIFIERS}/automix.py", "AutoMixup", mixer, layers, feed_automix, block, **network, **own)


def samix_pair(original: Checkout, neg_weight: float = 1, **args: Any) -> Pair:
    """SAMix as it is set for ImageNet; ``args`` of the mixer."""
    mixer: Any = build("samix", **{"mask_loss_law": "compounded", "momentum": 0.9, "momentum_end": 0.9} | args)
    code = Original(original)
    code.read("openmixup/models/necks/conv_necks.py", "ConvNeck")
    code.read(f"{HEADS}/pmix_block.py", "PixelMixBlock")
    neck = {
        "type": "ConvNeck",
        "in_channels": CHANNELS,
        "hid_channels": CHANNELS // 2,
        "out_channels": 1,
        "num_layers": 2,
    }
    neck["with_last_dropout"] = mixer.block.dropout
    block = {
        "type": "PixelMixBlock", "in_channels": CHANNELS, "unsampling_mode": [mixer.block.upsample], "lam_mul": True,
        "lam_residual": True, "lam_mul_k": mixer.block.lam_mul_k, "value_neck_cfg": neck, "x_qk_concat": True,
        "mask_loss_mode": "L1+Variance", "mask_loss_margin": 0.1,
    }  # fmt: skip
    soft = {"loss": {"type": "CrossEntropyLoss", "use_soft": True}, "multi_label": True, "neg_weight": neg_weight}
    layers = {"query": "query.conv", "key": "key.conv", "value.0": "value.conv.0.conv", "value.1": "value.conv.0.bn"}
    layers["value.3"] = "value.conv.1.conv"
    own = {"mask_loss": mixer.mask_loss, "switch_off": mixer.switch_off}
    pair = Pair(code, f"{CLASSIFIERS}/automix.py", "AutoMixup", mixer, layers, feed_automix, block, soft, **own)
    if pair.theirs.mix_block.value.dropout.p != mixer.block.dropout:
        raise LookupError("another rate of dropout")
    pair.theirs.mix_block.value.dropout, pair.noise = Scripted(), watch(mixer.block, "noise")
    return pair


def automix_step(pair: Pair, of: str, seed: int = 3) -> Iterator[Gap]:
    """Masks, images, losses and gradients of one step."""
    (x, labels), precision = batch(), "float64" if pair.double else "float32"
    of = f"{of}, {precision}"
    masks, images, k, q = (watch(*at) for at in (
        (pair.mixer, "mask"), (pair.theirs, "pixel_mixup"), (pair.theirs, "forward_k"), (pair.theirs, "forward_q")
    ))  # fmt: skip
    blocks = watch(pair.theirs.mix_block, "forward")
    out, theirs = pair.run(x, labels, seed)
    x, y, plan = x.to(out.loss.dtype), F.one_hot(labels, CLASSES).to(out.loss.dtype), out.plan
    their_masks = [result["mask"][:, :1] for result in blocks[::-1]][-len(masks) :]
    yield Gap(f"masks, {of}", max(map(absolute, masks, their_masks)))
    given = {key: plan["generator"][key] for key in ("index", "lam")}
    generated = base.Mixer.mix(pair.mixer, x, y, mask=masks[-1], **given)[0]
    found = pair.mixer.mix(x, y, **plan)[0], generated
    yield Gap(
        f"mixed images of classifier and mix block, {of}",
        max(map(absolute, found, (images[0]["img_mix_bb"], images[0]["img_mix_mb"]))),
    )
    one, mix = q[0]
    losses = {"mix": mix, "one_hot": one, "generator": k[0], "mask": {"loss": images[0]["mask_loss"]}}
    gap = max(absolute(out.logs[name], losses[name]["loss"]) for name in out.logs)
    yield Gap(f"the {len(out.logs)} losses, {of}", max(gap, absolute(out.loss, theirs["loss"])))
    out.loss.backward()
    theirs["loss"].sum().backward()
    yield Gap(f"gradients of all weights, {of}", pair.gradients(), "relative")


def run_gaps(pair: Pair, of: str, code: Original, why: str = "", again: int = 0) -> Iterator[Gap]:
    """Weights and statistics after a run, the original's schedules by its hooks."""
    code.read(f"{HOOKS}/momentum_hook.py", "CosineScheduleHook")
    code.read(f"{HOOKS}/addtional_scheduler.py", "annealing_cos", "CustomSchedulerHook", "CustomCosineAnnealingHook")
    hooks = [code.given["CosineScheduleHook"](0.9, [0.1, 1.0], "constant")]
    if hasattr(pair.theirs, "mask_loss"):
        settings = {"attr_name": "mask_loss", "attr_base": 0.1, "min_attr": 0.0, "by_epoch": False}
        hooks.append(code.given["CustomCosineAnnealingHook"](**settings))
    pair.train(hooks, again)
    weights = f"weights after {UPDATES} updates with SGD, the momentum encoder's included, {of}, float64"
    statistics = f"BatchNorm statistics of the momentum encoder after {UPDATES} updates, {of}, float64"
    yield Gap(weights, pair.weights(), "relative")
    yield Gap(statistics, pair.statistics(), "relative", why)


@beside("automix", OPENMIXUP, *STEP, *SCHEDULES, held="test_automix.py::test_the_step_is_the_sum_of_its_four_losses")
def automix_steps(original: Checkout) -> Iterator[Gap]:
    """One step on a residual network and on a transformer, near an end of lambda too, and a run."""
    yield from automix_step(automix_pair(original), "small ResNet, 80 pixels")
    transformer = {"model": "vit_tiny_patch16_224", "size": {"img_size": 80}, "double": False}
    yield from automix_step(automix_pair(original, **transformer), "ViT-Ti/16, 80 pixels")
    yield from automix_step(automix_pair(original, margin=0.5), "small ResNet, where the margin makes plain Mixup")
    yield from automix_step(automix_pair(original, lam_concat=False), "small ResNet, without a channel of lambda")
    pair = automix_pair(original, switch_off=0.8)
    yield from run_gaps(pair, "small ResNet, switch_off 0.8, mask_loss_law compounded", pair.original)


def schedule_gaps(code: Original, name: str) -> Iterator[Gap]:
    """The momentum of the encoder over 1,000 updates, and of AutoMix the weight of the mask's loss."""
    total = 1000
    code.read(f"{HOOKS}/momentum_hook.py", "CosineScheduleHook")
    code.read(f"{HOOKS}/addtional_scheduler.py", "annealing_cos", "CustomSchedulerHook", "CustomCosineAnnealingHook")
    settings = {"attr_name": "mask_loss", "attr_base": 0.1, "min_attr": 0.0, "by_epoch": False}
    hook = code.given["CosineScheduleHook"](0.99999, [0.25, 1.0], "constant")
    weight = code.given["CustomCosineAnnealingHook"](**settings)
    module = SimpleNamespace(momentum=0.999, base_momentum=0.999, mask_loss=0.1)
    runner = SimpleNamespace(iter=0, max_iters=total, model=SimpleNamespace(module=module))
    theirs, cosine = [], []
    for runner.iter in range(total):
        hook.before_train_iter(runner)
        weight.before_train_iter(runner)
        theirs.append((module.momentum, module.mask_loss))
        cosine.append(weight.get_attr(runner, 0.1))

    def ours(shift: int, **args: Any) -> tuple[list[float], list[float]]:
        mixer: Any = build(name, momentum_delay=0.25, **args)
        model = timm.create_model("test_resnet", num_classes=CLASSES)
        mixer.setup(model.double())
        momenta, weights = list[float](), list[float]()
        mixer.encoder.follow = lambda model, one_hot, momentum: momenta.append(momentum)
        if hasattr(mixer, "gamma"):
            mixer.double().gamma.fill_(0.1)
        for update in range(total):
            weights.append(float(getattr(mixer, "gamma", torch.zeros(()))))
            mixer.after_step(model, (update + shift) / total)
        return momenta, weights

    def gap(a: Any, b: Any) -> float:
        return float(np.abs(np.array(a) - np.array(b)).max())

    momenta, weights = zip(*theirs, strict=True)
    of = f"over {total:,} updates, delay 0.25"
    yield Gap(f"momentum of the encoder {of}, of the same progress", gap(ours(0)[0], momenta))
    late = "ours takes the progress behind an update, OpenMixup that before it"
    yield Gap(f"momentum of the encoder {of}, update by update", gap(ours(1)[0], momenta), why=late)
    if name == "adautomix":
        return
    yield Gap(f"weight of the mask's loss {of}, compounded", gap(ours(1, mask_loss_law="compounded")[1], weights))
    yield Gap(
        f"weight of the mask's loss {of}, cosine, beside the hook's formula of its start", gap(ours(1)[1], cosine)
    )
    why = "the hook multiplies its factor onto what the last update left; mask_loss_law compounded is that"
    yield Gap(f"weight of the mask's loss {of}, cosine, beside the hook as it runs", gap(ours(1)[1], weights), why=why)


@beside(
    "automix", OPENMIXUP, *SCHEDULES,
    held="test_automix.py::test_the_schedules_are_monotone_and_end_where_they_should",
)  # fmt: skip
def automix_schedules(original: Checkout) -> Iterator[Gap]:
    """The momentum of k and the weight of the mask's loss over a run."""
    yield from schedule_gaps(Original(original), "automix")


class RanError(Exception):
    """The mix block is trained."""


def drawn_plan(mixer: Any, x: Tensor, seed: int, look: Any) -> tuple[dict[str, Any], Recorded]:
    """A plan, and what was drawn for it, where masks are 0.5."""
    rng = Recorded(seed)
    return mixer.plan(x, torch.eye(len(x)), rng, look), rng


@beside(
    "automix", OPENMIXUP, f"{CLASSIFIERS}/automix.py",
    held="test_automix.py::test_the_margin_is_met_and_the_generator_switched_off_as_often_as_the_law_says",
)  # fmt: skip
def automix_laws(original: Checkout) -> Iterator[Gap]:
    """For which draws the margin makes plain Mixup, and for which the mix block is switched off."""
    code, file = Original(original), f"{CLASSIFIERS}/automix.py"
    methods = (original.method(file, "AutoMixup", name, **code.given) for name in ("pixel_mixup", "forward_k"))
    pixel_mixup, forward_k = methods

    def runs(*args: Any) -> None:
        raise RanError

    x, half, draws = torch.zeros(3, 1, 1, 1), {"mask": torch.full((3, 2, 1, 1), 0.25)}, 10000
    for switch_off in (0.8, 0.0):
        mixer: Any = build("automix", switch_off=switch_off)
        mixer.setup(timm.create_model("test_resnet"))
        mixer.mask = lambda *args: torch.full((3, 1, 1, 1), 0.25)
        look = mixer.block.project(torch.zeros(3, mixer.encoder.channels, 1, 1))
        this = SimpleNamespace(
            mask_layer=0, mix_block=lambda *args, **kwargs: half, debug=False, mask_up_override=None, pre_one_loss=0,
            mask_adjust=0.0, lam_margin=0.08, mask_loss=0, switch_off=switch_off, cos_annealing=1.0, weight_mix_k=1,
            backbone_k=runs,
        )  # fmt: skip
        constant, run = 0, 0
        for seed in range(draws):
            plan, rng = drawn_plan(mixer, x, seed, look)
            lams, index = rng.drawn["beta"][::-1], torch.zeros(2, 3, dtype=torch.int64)
            code.numpy.values["rand"] = [0.5, *rng.drawn.get("random", [])]
            mixed = pixel_mixup(this, torch.tensor([1.0, 0, 0])[:, None, None, None], None, lams, 2 * [[1, 1, 1]], None)
            theirs = float(mixed["img_mix_bb"][0]) != 0.25
            constant += theirs != (float(plan["mask"][0]) != 0.25)
            try:
                forward_k(this, x, None, index, lams[0])
                trains = False
            except RanError:
                trains = True
            run += trains != plan["generator"]["run"]
        if switch_off:
            yield Gap(f"steps of plain Mixup by the margin, {draws:,} draws", constant / draws, "share")
        yield Gap(f"steps that train the mix block, switch_off {switch_off}, {draws:,} draws", run / draws, "share")


@beside(
    "samix", OPENMIXUP, *STEP, "openmixup/models/necks/conv_necks.py", *SCHEDULES,
    held="test_automix.py::test_the_block_of_samix_is_its_formula",
)  # fmt: skip
def samix_steps(original: Checkout) -> Iterator[Gap]:
    """One step with the straight line and the curve of lambda, with dropout and a neg_weight, and a run."""
    yield from automix_step(samix_pair(original), "small ResNet, dropout 0.1")
    curve = samix_pair(original, 0.5, lam_mul_k=0.25, dropout=0.2, upsample="nearest")
    yield from automix_step(curve, "small ResNet, lam_mul_k 0.25, OpenMixup's neg_weight 0.5")
    pair = samix_pair(original)
    yield from run_gaps(pair, "small ResNet, dropout 0.1, mask_loss_law compounded", pair.original)
    theirs, ours = pair.theirs.state_dict(), pair.step.state_dict()
    kept = [n for n in ours if n.startswith("mixer.block") and "running" in n]
    why = "OpenMixup makes both masks in another order, and one that the margin discards; training does not read them"
    gap = relative([ours[n] for n in kept], [theirs[pair.name(n)] for n in kept])
    yield Gap(
        f"BatchNorm statistics of the mix block after {UPDATES} updates, small ResNet, float64", gap, "relative", why
    )


ADAUTOMIX = "JinXins/Adversarial-AutoMixup"


def feed_adautomix(pair: Pair, rng: Recorded) -> None:
    """Lambdas and partners; of three samples the first is the image itself, which there is a partner too."""
    partners = [torch.from_numpy(p) for p in rng.drawn["permutation"]]
    if pair.mixer.samples == 2:
        pair.original.numpy.values["beta"].append(np.array(rng.drawn["beta"][::-1]))
        pair.original.torch.values["randperm"] += partners
        return
    own, (first, second, first_k, second_k) = torch.arange(len(partners[0])), partners
    pair.original.numpy.values["beta"].append(np.array(rng.drawn["beta"]))
    pair.original.torch.values["randperm"] += [first_k, own, second_k, own, first, second]


def adautomix_pair(original: Checkout, **args: Any) -> Pair:
    """AdAutoMix of the reference code, laid over OpenMixup, or of OpenMixup; ``args`` of the mixer."""
    mixer: Any = build("adautomix", **{"momentum": 0.9, "momentum_end": 0.9} | args)
    own = (original.folder / f"{CLASSIFIERS}/AdAutoMix.py").is_file()
    code = Original(original, Checkout(original.folder.parent / OPENMIXUP.split("/")[1]))
    code.read(f"{HEADS}/{'Ada_mix_pine' if own else 'adaptive_mask'}.py", "AdaptiveMask")
    block = {
        "type": "AdaptiveMask", "in_channel": CHANNELS, "lam_concat": mixer.lam_concat,
        "unsampling_mode": mixer.upsample, "scale_factor": 16, "att_norm_cfg": {"type": "BN"} if mixer.norm else None,
    }  # fmt: skip
    layers = {f"{ours}.0": f"conv_{ours[0]}.conv" for ours in ("query", "key")} | {"value": "conv_v"}
    layers |= {f"{ours}.1": f"conv_{ours[0]}.bn" for ours in ("query", "key")}
    settings = {"mix_samples": mixer.samples, "beta_radio": mixer.beta, "mixup_radio": mixer.mixup_share, "save": False}
    file = f"{CLASSIFIERS}/{'AdAutoMix' if own else 'adautomix'}.py"
    return Pair(code, file, "AdAutoMix", mixer, layers, feed_adautomix, block, **settings)


def adautomix_gaps(pair: Pair, of: str, why: str = "") -> Iterator[Gap]:
    """Masks, images, losses and gradients of an adversarial step and of the one that follows it."""
    x, labels = batch()
    mixing = "mixup" if pair.mixer.samples == 2 else "co_mixup"
    masks, images, k, q, blocks_ = (watch(*at) for at in (
        (pair.mixer, "masks"), (pair.theirs, mixing), (pair.theirs, "forward_k"), (pair.theirs, "forward_q"),
        (pair.theirs.mix_block, "forward"),
    ))  # fmt: skip
    gaps = {"masks": 0.0, "mixed images": 0.0, "losses": 0.0, "gradients of all weights": 0.0}
    for seed in (3, 4):
        out, theirs = pair.run(x, labels, seed)
        if len(masks) != 2:
            raise LookupError("this draw is within the margin")
        gaps["masks"] = max(gaps["masks"], *map(absolute, masks, [result["mask"] for result in blocks_[::-1]]))
        plan, y = out.plan, F.one_hot(labels, CLASSES).double()
        generator, last = plan["generator"], masks[-1]
        generated = mix_many(x.double(), y, generator["index"], last, generator["lam"])[0]
        found = pair.mixer.mix(x.double(), y, **plan)[0], generated
        theirs_found = images[-1]["img_mix_bb"], images[-1]["img_mix_mb"]
        gaps["mixed images"] = max(gaps["mixed images"], *map(absolute, found, theirs_found))
        clean = out.logs["one_hot"] + out.logs.get("mixup", 0)
        losses = (clean, q[-1][0]), (out.logs["mix"], q[-1][1]), (out.logs["generator"], k[-1][1])
        gaps["losses"] = max(gaps["losses"], *(absolute(ours, there["loss"]) for ours, there in losses))
        pair.step.zero_grad()
        pair.theirs.zero_grad()
        out.loss.backward()
        theirs["loss"].sum().backward()
        gaps["gradients of all weights"] = max(gaps["gradients of all weights"], pair.gradients())
        pair.mixer.after_step(pair.step.model, 0.0)
        pair.theirs.momentum_update()
        masks.clear()
        blocks_.clear()
    for what, gap in gaps.items():
        unit = "relative" if what.startswith("gradients") else "absolute"
        yield Gap(f"{what}, an adversarial step and the next, {of}, float64", gap, unit, why if gap > 1e-9 else "")


STATISTICS = "ours runs the momentum encoder once on the clean batch, the original {} times: mixed images weigh less"


@beside(
    "adautomix", ADAUTOMIX, f"{CLASSIFIERS}/AdAutoMix.py", f"{HEADS}/Ada_mix_pine.py", f"{HEADS}/cls_mixup_head.py",
    held="test_automix.py::"
    "test_every_second_step_of_adautomix_is_adversarial_and_three_samples_share_pixels_and_labels",
)  # fmt: skip
def adautomix_steps(original: Checkout) -> Iterator[Gap]:
    """Steps and runs of two samples and of three, the settings of ImageNet and of Tiny-ImageNet."""
    two = {"norm": True}
    three = {"samples": 3, "beta": 0.4, "lam_concat": False}
    for args, of, times in ((two, "small ResNet, 2 samples", 3), (three, "small ResNet, 3 samples", 4)):
        yield from adautomix_gaps(adautomix_pair(original, **args), of)
        for again in (0, times - 1):
            pair = adautomix_pair(original, **args)
            seen = f", where ours saw the clean batch {times} times too" if again else ""
            why = "" if again else STATISTICS.format(times)
            yield from run_gaps(pair, of + seen, Original(pair.original.beneath), why, again)


@beside(
    "adautomix", OPENMIXUP, f"{CLASSIFIERS}/adautomix.py", f"{HEADS}/adaptive_mask.py", f"{HOOKS}/momentum_hook.py",
    held="test_automix.py::test_the_generator_of_adautomix_is_its_formula",
)  # fmt: skip
def adautomix_openmixup(original: Checkout) -> Iterator[Gap]:
    """OpenMixup's own version of the step, and the momentum of k."""
    yield from adautomix_gaps(adautomix_pair(original), "small ResNet, 2 samples")
    three = adautomix_pair(original, samples=3, beta=0.4, lam_concat=False)
    why = "its condition on the margin is turned round: it mixes by constants where the reference code mixes by masks"
    yield from adautomix_gaps(three, "small ResNet, 3 samples", why)
    yield from schedule_gaps(Original(original), "adautomix")


@beside(
    "adautomix", ADAUTOMIX, f"{CLASSIFIERS}/AdAutoMix.py",
    held="test_automix.py::test_the_margin_is_met_and_the_generator_switched_off_as_often_as_the_law_says",
)  # fmt: skip
def adautomix_laws(original: Checkout) -> Iterator[Gap]:
    """For which draws the margin makes plain Mixup."""
    code, draws, x = Original(original), 10000, torch.zeros(3, 1, 1, 1)
    for samples, name in ((2, "mixup"), (3, "co_mixup")):
        mix = original.method(f"{CLASSIFIERS}/AdAutoMix.py", "AdAutoMix", name, **code.given)
        mixer: Any = build("adautomix", samples=samples)
        mixer.masks = lambda *args, n=samples: torch.full((3, n, 1, 1), -1.0)
        made = {"mask": torch.full((3, samples, 1, 1), -1.0)}
        this = SimpleNamespace(mix_block=lambda *args, made=made: made, debug=False, lam_margin=0.03, co_mix=samples)
        differ = 0
        for seed in range(draws):
            plan, rng = drawn_plan(mixer, x, seed, torch.zeros(3, 1, 1, 1))
            lam, index = np.array(rng.drawn["beta"]), torch.arange(3)
            same = [[index] * samples] * 2
            given = (lam[::-1], [index] * 2) if samples == 2 else ([*(lam / lam.sum())], *same)
            mixed = mix(this, x + 1, *given, torch.zeros(3, 1, 1, 1))["img_mix_bb"]
            differ += (float(mixed[0]) < 0) != (float(plan["mask"][0].flatten()[0]) < 0)
        yield Gap(f"steps of plain Mixup by the margin, {samples} samples, {draws:,} draws", differ / draws, "share")


class Decoupled(NamedTuple):
    """One batch of random logits."""

    ordered: bool
    """Whether the first pair of two classes has the lower one first."""
    alike: bool
    """Whether a pair is of one class."""
    loss: float
    gradient: float


def decoupled(original: Original, rng: Any, mixer: DecoupleMix, seed: int, **head: Any) -> Decoupled:
    """The gaps of one batch of random logits."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(16, 10, generator=generator, dtype=torch.float64).mul_(3).requires_grad_()
    labels = torch.randint(10, (16,), generator=generator)
    soft = mixer.two_hot is None

    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        if soft:
            return F.cross_entropy(logits, target, reduction="none")
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)

    x, y = torch.zeros(16, 1, 1, 1, dtype=torch.float64), F.one_hot(labels, 10).double()
    with ours64():
        out = mixer(lambda images: z, criterion, x, y, rng)
    partners = labels[out.plan["index"]]
    lam = float(rng.drawn["beta"][0])
    loss = {"type": "CrossEntropyLoss", "use_soft": soft, "use_sigmoid": not soft, "use_mix_decouple": soft}
    judge = original.given["ClsMixupHead"](loss=loss, in_channels=1, num_classes=10, multi_label=True, **head)
    with float64(), ours64():
        theirs = judge.loss([z], (labels, partners, lam))["loss"]
    (ours_grad,), (their_grad,) = (torch.autograd.grad(value, z) for value in (out.loss, theirs))
    differ = labels != partners
    ordered = bool((labels < partners)[differ][0])
    return Decoupled(ordered, not differ.all(), absolute(out.loss, theirs), relative([ours_grad], [their_grad]))


def worst(found: list[Decoupled], of: str, why: str = "") -> Iterator[Gap]:
    """The largest gaps of many batches."""
    yield Gap(f"loss, {of}, float64", max(one.loss for one in found), why=why)
    yield Gap(f"gradient of the logits, {of}, float64", max(one.gradient for one in found), "relative", why)


class Fixed(Recorded):
    """A generator whose lambda is given."""

    def __init__(self, lam: float):
        super().__init__(0)
        self.lam = lam

    def beta(self, a: float, b: float) -> float:
        """The lambda."""
        self.drawn["beta"] = [self.lam]
        return self.lam


@beside(
    "decouplemix", OPENMIXUP, f"{HEADS}/cls_mixup_head.py", f"{LOSSES}/cross_entropy_loss.py",
    held="test_decouplemix.py::test_the_terms_are_softmax_without_the_partner_s_class",
)  # fmt: skip
def decouplemix_losses(original: Checkout) -> Iterator[Gap]:
    """Loss and gradient of the logits, over Mixup: soft cross entropy, and binary cross entropy of two-hot targets."""
    code, draws = Original(original).heads(), 300
    eta = {"eta_weight": {"eta": 0.1, "mode": "both", "thr": 0.5}}
    by_share = eta | {"lam_scale_mode": "pow", "lam_thr": 1, "lam_idx": 1}
    plain, shared = DecoupleMix(Mixup(1.0), 0.1), DecoupleMix(Mixup(1.0), 0.1, power=1.0)

    found = [decoupled(code, Recorded(seed), plain, seed, **eta) for seed in range(draws)]
    yield from worst(found, f"both terms alike, {draws} batches")
    found = [decoupled(code, Recorded(seed), shared, seed, **by_share) for seed in range(draws)]
    order = [one for one in found if one.ordered]
    yield from worst(order, f"terms by their shares, the {len(order)} of {draws} batches whose first pair is in order")
    other = [one for one in found if not one.ordered]
    why = "OpenMixup orders both weights by the class numbers of the first pair, so that each gets the other's"
    yield from worst(other, f"terms by their shares, the other {len(other)} batches", why)
    for lam, why in (
        (0.5, "OpenMixup leaves the regulariser out where lambda is 0.5"),
        (0.0008, "OpenMixup leaves the regulariser out where a share is at most 0.001"),
    ):
        yield from worst([decoupled(code, Fixed(lam), plain, 0, **eta)], f"both terms alike, lambda {lam}", why)


@beside(
    "decouplemix", OPENMIXUP, f"{HEADS}/cls_mixup_head.py", f"{LOSSES}/cross_entropy_loss.py",
    held="test_decouplemix.py::test_two_hot_lifts_the_shares_of_both_classes_for_a_binary_cross_entropy",
)  # fmt: skip
def decouplemix_binary(original: Checkout) -> Iterator[Gap]:
    """Two-hot targets of the binary cross entropy: batches without a pair of one class, and all."""
    code, draws = Original(original).heads(), 300
    for xi in (1.0, 2.0):
        head = {"two_hot": True, "lam_scale_mode": "pow", "lam_thr": 0.8, "lam_idx": xi}
        mixer = DecoupleMix(Mixup(1.0), 0.0, two_hot=0.8, xi=xi)
        found = [decoupled(code, Recorded(seed), mixer, seed, **head) for seed in range(draws)]
        two = [one for one in found if not one.alike]
        yield from worst(two, f"two_hot 0.8, xi {xi:g}, the {len(two)} of {draws} batches without a pair of one class")
        why = "where both are of one class the original's target is the sum of both lifted shares, 1.25 at most, here 1"
        yield from worst([one for one in found if one.alike], f"two_hot 0.8, xi {xi:g}, the other batches", why)
