"""What a timm model says of itself: its stages, by module path and stride, and its classifier."""

import math
from typing import Any

from torch import nn


def stages(model: nn.Module) -> list[str]:
    """Module paths of the model's published stages, in order of depth, e.g. ``["layer1", ..., "layer4"]``.

    Leaves out an entry that is not a stage of residual blocks or tokens but the stem's activation.
    Raises ``ValueError`` when the model does not publish its stages.
    """
    return list(reductions(model))


def reductions(model: nn.Module) -> dict[str, int]:
    """The published stages, and how much coarser than the image each one's output is. Raises like ``stages``."""
    info = getattr(model, "feature_info", None)
    if info is None:
        raise ValueError(
            f"{type(model).__name__} does not publish its stages (feature_info); use a timm model such as "
            "resnet50, deit_small_patch16_224, swin_tiny_patch4_window7_224 or convnext_tiny"
        )
    found = {entry["module"]: entry["reduction"] for entry in (info.info if hasattr(info, "info") else info)}
    stems = (nn.ReLU, nn.SiLU, nn.GELU)
    return {name: by for name, by in found.items() if not isinstance(model.get_submodule(name), stems)}


def parts(model: nn.Module) -> list[str]:
    """Return module paths at whose outputs the parts of a network end, four as a rule: its last published stages.

    A network whose stages all have one resolution, such as a ViT, is taken as four equal parts. Raises like ``stages``.
    """
    found = reductions(model)
    names = list(found)
    if len(names) > 1 and len(set(found.values())) == 1:
        return [names[math.ceil(k * len(names) / 4) - 1] for k in (1, 2, 3, 4)]
    return names[-4:]


def first_convolution(model: nn.Module) -> str:
    """Module path of the convolution that sees the images. Raises ``ValueError`` when the model has none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name
    raise ValueError(f"{type(model).__name__} has no convolution; models that have: resnet50, deit_small_patch16_224")


def early_stages(model: nn.Module, number: int, method: str) -> list[str]:
    """Return module paths of the first ``number`` of the model's last four stages.

    A ``method`` mixes features after these stages. Where all stages are of one resolution, as in a ViT, the four
    quarters of the network stand for the four stages. Raises ``ValueError`` for a model that publishes fewer stages. A
    model of a single resolution is excepted: its quarters may be of less than a block.
    """
    found = reductions(model)
    names, flat = list(found), len(set(found.values())) == 1
    if len(names) < (min(number, 2) if flat else number):
        raise ValueError(f"{method} needs {number} stages, {type(model).__name__} publishes {len(names)}; use resnet50")
    return parts(model)[:number]


def compile_stages(model: nn.Module, **options: Any) -> None:
    """Compile every stage by itself, in place: hooks between the stages keep working, state-dict keys stay.

    ``options`` are those of ``torch.compile``, e.g. ``backend``.
    """
    for name in stages(model):
        model.get_submodule(name).compile(**options)


def classifier(model: nn.Module) -> nn.Linear:
    """The linear layer that turns the pooled last feature into logits. Raises ``ValueError`` when there is none."""
    get = getattr(model, "get_classifier", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear classifier (get_classifier() gives {type(head).__name__}); models "
            "that have: resnet50, deit_small_patch16_224, swin_tiny_patch4_window7_224, convnext_tiny"
        )
    return head
