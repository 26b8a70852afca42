"""Models by timm name. What timm lacks is registered with timm from here, one file per family."""

import math

import timm
import torch
from torch import nn

from recipes import Recipe, UserError
from recipes.typed import nearest

from . import resnet_cifar  # noqa: F401  registers resnet18_cifar and others


def create_model(recipe: Recipe) -> nn.Module:
    """The recipe's model with its initial weights, a function of the seed alone.

    Raises ``UserError`` for a name that timm does not know or arguments that the model does not take.
    """
    if not timm.is_model(recipe.model):
        raise UserError(f"unknown model {recipe.model!r}; {nearest(recipe.model, timm.list_models())}")
    args = dict(recipe.model_args)
    if recipe.drop_path_rate is not None:
        args["drop_path_rate"] = recipe.drop_path_rate
    torch.manual_seed(recipe.seed)
    try:
        model = timm.create_model(recipe.model, pretrained=False, num_classes=recipe.num_classes, **args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise UserError(f"model {recipe.model!r} with {args}: {' '.join(str(e).split())[:300]}") from None
    if recipe.init == "mmcls":
        init_mmcls(model)
    return model


def check_resolution(model: nn.Module, size: int, name: str) -> None:
    """Raise ``UserError`` when the model cannot take images of ``size`` pixels. Runs no arithmetic (meta device)."""
    import copy

    try:
        with torch.no_grad():
            copy.deepcopy(model).to("meta").eval()(torch.empty(2, 3, size, size, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as e:
        raise UserError(
            f"model {name!r} does not take {size} x {size} images: {' '.join(str(e).split())[:200]}; "
            f"pass --model_args.img_size {size}, or another image_size"
        ) from None


def init_mmcls(model: nn.Module) -> None:
    """Start the head and the class token as the published runs did, where timm differs.

    Convolutional networks: head from N(0, 0.01), bias 0. Transformers: class token and head from a normal of
    std 0.02, truncated at two standard deviations.
    """
    head = model.get_classifier()
    token = getattr(model, "cls_token", None)
    if token is None and any(isinstance(m, nn.Conv2d) and m.kernel_size[0] < 4 for m in model.modules()):
        nn.init.normal_(head.weight, std=0.01)
    else:
        for weight in (token, head.weight):
            if weight is not None:
                nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)
    nn.init.zeros_(head.bias)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(math.prod(t.shape) * t.element_size() for t in (*model.parameters(), *model.buffers()))
