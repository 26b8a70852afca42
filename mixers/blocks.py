"""Pieces of the methods that learn to mix: momentum encoder, second classifier, the map that a mask is made from."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import ops, taps


class MomentumEncoder(nn.Module):
    """A copy of the model, and of a second classifier, that follows both slowly. No gradient moves its parameters.

    For ``stage``, ``index`` and ``channels`` see ``mixed_stage``. Parameters are averaged (``follow``). Buffers are
    not: the BatchNorm statistics are its own, of what it sees itself.
    """

    def __init__(self, model: nn.Module, one_hot: nn.Module, stage: str, index: int, channels: int):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.one_hot = copy.deepcopy(one_hot).requires_grad_(False)
        self.stage, self.index, self.channels = stage, index, channels
        # without running statistics, what lies behind the stage leaves no trace: it need not run
        norms = (m for m in model.modules() if isinstance(m, _NormBase))
        self.stop_early = not any(norm.track_running_stats for norm in norms)

    @torch.no_grad()
    def look(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """The hidden map of clean images, in the precision of the model, in training mode."""
        if self.stop_early:
            options = {"indices": [self.index], "stop_early": True, "intermediates_only": True}
            return self.model.forward_intermediates(x, **options)[0]  # type: ignore[operator]
        return self.look_and_classify(x)[0]

    @torch.no_grad()
    def look_and_classify(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B K"]]:
        """The hidden map and the logits of clean images, from one forward."""
        if self.stop_early:
            features, (hidden,) = self.model.forward_intermediates(x, indices=[self.index])  # type: ignore[operator]
            return hidden, self.model.forward_head(features)  # type: ignore[operator]
        with taps.record(self.model, self.stage) as seen:
            logits = self.model(x)
        return seen[self.stage], logits

    def classifiers(self, model: nn.Module, one_hot: nn.Module) -> dict[str, nn.Module]:
        """Encoder and model, each with both classifiers; the encoder's for mixed images (``""``) is reported."""
        k, k_one = self.model, with_classifier(self.model, self.one_hot)
        return {"": k, "k_one": k_one, "q": model, "q_one": with_classifier(model, one_hot)}

    @torch.no_grad()
    def follow(self, model: nn.Module, one_hot: nn.Module, momentum: float) -> None:
        """``k <- momentum*k + (1-momentum)*q`` for every parameter."""
        for own, other in ((self.model, model), (self.one_hot, one_hot)):
            torch._foreach_lerp_(list(own.parameters()), list(other.parameters()), 1 - momentum)


def mixed_stage(model: nn.Module) -> tuple[str, int, int]:
    """Where masks are made: module path, position among the published features, and channels.

    The last stage before the coarsest one (stride 16 of 32: ``layer3`` of a ResNet); the middle block of a model of one
    resolution (block 6 of 12). Raises ``ValueError`` for a model without such a stage.
    """
    reductions = taps.reductions(model)
    names = list(reductions)
    finer = [name for name in names if reductions[name] < max(reductions.values())]
    if not finer and len(names) < 2:
        raise ValueError(f"a mask is made from a stage before the last, {type(model).__name__} has one; use resnet50")
    name = finer[-1] if finer else names[len(names) // 2 - 1]
    info = model.feature_info
    entries = list(info.info if hasattr(info, "info") else info)  # type: ignore[arg-type]
    ((index, entry),) = [(i, entry) for i, entry in enumerate(entries) if entry["module"] == name]
    return name, index, entry["num_chs"]


def with_classifier(model: nn.Module, classifier: nn.Module) -> nn.Module:
    """The model with another classifier: all else is shared, the model itself stays as it is.

    Of the same class and with the same names of parameters, so that it is saved and loaded like the model.
    """
    (path,) = [name for name, module in model.named_modules() if module is taps.classifier(model)]
    *outer, last = path.split(".")
    twin = node = shallow(model)
    for name in outer:
        node._modules[name] = shallow(node.get_submodule(name))
        node = node.get_submodule(name)
    node._modules[last] = classifier
    return twin


def shallow(module: nn.Module) -> nn.Module:
    """A module with a table of submodules of its own, and the same submodules in it."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def excess(mask: Float[Tensor, "B 1 H W"], lam: Float[Tensor, " B"]) -> Tensor:
    """How far the mean of all masks is from the mean of lambda, beyond a tolerance of 0.1."""
    return ((mask.mean() - lam.mean()).abs() - 0.1).clamp(min=0)


def learning_groups(
    one_hot: nn.Module, block: nn.Module, start: float, end: float | None, momentum: float | None
) -> list[dict[str, Any]]:
    """Optimiser groups: the second classifier like the model's own; what makes masks on a cosine without warm-up.

    ``end`` None: a hundredth of ``start``. ``momentum`` None: the recipe's.
    """
    group: dict[str, Any] = {"params": list(block.parameters()), "lr": start, "warmup_epochs": 0}
    group["min_lr"] = start / 100 if end is None else end
    return [{"params": list(one_hot.parameters())}, group | ({} if momentum is None else {"momentum": momentum})]


def check_rates(
    momentum: float,
    momentum_end: float,
    momentum_delay: float,
    block_lr: float | None,
    block_min_lr: float | None,
    block_momentum: float | None,
) -> None:
    """Raise ``ValueError`` for a momentum or delay outside [0, 1] or a negative rate, by the name of the argument."""
    shares = {"momentum": momentum, "momentum_end": momentum_end, "momentum_delay": momentum_delay}
    for name, value in (shares | {"block_momentum": block_momentum}).items():
        ops.check_between(name, 0.0 if value is None else value, 0.0, 1.0)
    for name, value in {"block_lr": block_lr, "block_min_lr": block_min_lr}.items():
        ops.check_between(name, 0.0 if value is None else value, 0.0)


def momentum_at(progress: float, start: float, end: float, delay: float) -> float:
    """The encoder's momentum: constant until ``delay``, then on the cosine over the whole training, as in OpenMixup."""
    return cosine(start, end, progress) if progress >= delay else start


def pointwise(channels: int, out: int, bias: bool = True) -> nn.Conv2d:
    """A 1x1 convolution, drawn from N(0, 0.01^2), bias 0, as in OpenMixup."""
    layer = nn.Conv2d(channels, out, 1, bias=bias)
    nn.init.normal_(layer.weight, std=0.01)
    if bias:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def project(z: Float[Tensor, "B c h w"], *weights: Tensor) -> list[Tensor]:
    """1x1 convolutions of a map with several weights (d, c, 1, 1), without bias: a map (B, d, h, w) for each."""
    return list(F.conv2d(z, torch.cat(weights)).split([len(weight) for weight in weights], 1))


def attend(
    query: Float[Tensor, "B d h w"], key: Float[Tensor, "B d h w"], value: Float[Tensor, "B 1 h w"]
) -> Float[Tensor, "B 1 h w"]:
    """``softmax(query^T key / sqrt(d)) value`` over the positions."""
    score = query.flatten(2).transpose(1, 2) @ key.flatten(2) / math.sqrt(query.shape[1])
    return (score.softmax(2) @ value.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, query.shape[2:])


def resized(logits: Float[Tensor, "B n h w"], size: tuple[int, int], mode: str) -> Float[Tensor, "B n H W"]:
    """Logits of a mask at the size of the images, ``mode`` "nearest" or "bilinear"."""
    return F.interpolate(logits, size=size, mode=mode, align_corners=False if mode == "bilinear" else None)


def up_cast(z: Tensor, block: nn.Module) -> Tensor:
    """The type of the block's weights: float32 but where all of a model was made bfloat16.

    Products of features without a norm overflow in float16, which autocast would give them.
    """
    return z.to(torch.promote_types(z.dtype, next(block.parameters()).dtype))


def cosine(start: float, end: float, progress: float) -> float:
    """From ``start`` at progress 0 to ``end`` at 1."""
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2


def as_column(lam: Float[Tensor, " B"], z: Float[Tensor, "B c h w"]) -> Float[Tensor, "B 1 1 1"]:
    """Lambda in the shape and type of a map."""
    return lam.to(z.dtype)[:, None, None, None]
