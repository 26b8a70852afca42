"""Hidden features, whatever their layout: as tokens, as a map, and as what the classifier is given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def to_tokens(model: nn.Module, feature: Tensor) -> Float[Tensor, "B P C"]:
    """The positions of a hidden feature: a map (B, C, h, w), or (B, h, w, C) as timm's ``output_fmt`` says, or tokens.

    Class and register tokens, which the model counts as ``num_prefix_tokens``, are left out.
    """
    if feature.ndim == 3:
        return feature[:, getattr(model, "num_prefix_tokens", 0) :]
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return feature.flatten(1, 2)
    return feature.flatten(2).transpose(1, 2)


def from_tokens(model: nn.Module, tokens: Float[Tensor, "B P C"], like: Tensor) -> Tensor:
    """The inverse of ``to_tokens``: a feature of the shape of ``like``, with the prefix tokens of ``like``."""
    if like.ndim == 3:
        return torch.cat((like[:, : like.shape[1] - tokens.shape[1]], tokens), dim=1)
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return tokens.reshape(like.shape)
    return tokens.transpose(1, 2).reshape(like.shape)


def channel_axis(model: nn.Module, module: str, feature: Tensor) -> int:
    """Which axis of the output of ``module`` holds the channels: 1 of a map (B, C, h, w), else -1, the last one.

    A convolution's output is such a map in every model, whatever timm's ``output_fmt`` says of the stages.
    """
    first = getattr(model, "output_fmt", "NCHW") == "NCHW" or isinstance(model.get_submodule(module), nn.Conv2d)
    return 1 if first and feature.ndim == 4 else -1


@contextmanager
def last_feature(model: Any) -> Iterator[list[Tensor]]:
    """A list that holds, after one forward in the block, what ``forward_features`` gave, with its graph."""
    found: list[Tensor] = []
    whole = model.forward_features

    def keep(*args: Any, **options: Any) -> Tensor:
        found.append(whole(*args, **options))
        return found[-1]

    model.forward_features = keep  # in front of the class's own, until the block ends
    try:
        yield found
    finally:
        del model.forward_features
    if len(found) != 1:
        raise RuntimeError(f"forward_features of {type(model).__name__} ran {len(found)} times, expected once")


def to_map(model: nn.Module, feature: Tensor, images: Tensor) -> Float[Tensor, "B C h w"]:
    """The positions of a hidden feature (see ``to_tokens``) as a map of the proportions of ``images`` (B, C, H, W)."""
    if feature.ndim == 4:
        return feature.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else feature
    tokens = to_tokens(model, feature)
    return tokens.transpose(1, 2).unflatten(2, grid(tokens.shape[1], images.shape[-2:]))


def grid(positions: int, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of ``positions`` patches on images of ``size``, height first. Raises when there is no grid."""
    height, width = size
    down = max(1, round((positions * height / width) ** 0.5))
    if positions % down:
        raise RuntimeError(f"{positions} patches are no grid on images of {height} x {width}")
    return down, positions // down


def before_classifier(model: Any, vectors: Float[Tensor, "n C"], feature: Tensor) -> Float[Tensor, "n D"]:
    """What the classifier is given when each of ``vectors`` is the last feature at every position: its head's norm.

    ``feature``: one of the model, whose layout is taken.
    """
    if feature.ndim == 3:  # as class token, and as the one patch
        alone = vectors[:, None].expand(-1, 1 + getattr(model, "num_prefix_tokens", 0), -1)
    elif getattr(model, "output_fmt", "NCHW") == "NHWC":
        alone = vectors[:, None, None]
    else:
        alone = vectors[:, :, None, None]
    return model.forward_head(alone, pre_logits=True)
