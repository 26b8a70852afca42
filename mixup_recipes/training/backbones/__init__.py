"""Models by timm name. What timm lacks is registered with timm from here, one file per family.

Another program that loads such a model, with timm or as a transformers ``AutoModelForImageClassification`` (whose
wrapper asks timm), imports ``mixup_recipes.training.backbones`` first. Without this import both say that timm does not
know the architecture.
"""

import copy
import math
import os
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixers import taps
from mixup_recipes import fetch
from mixup_recipes.files import file_hash
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import (  # noqa: F401  registers their models with timm
    convnext_cifar,
    moganet,
    pvt,
    resnet_cifar,
    wide_resnet,
)
from mixup_recipes.training.known_weights import WEIGHTS, find_weights
from mixup_recipes.training.weight_files import ENDINGS, Start, is_weight_file, load
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

HEAD_STD = 0.01  # of the weights of a new head


def cfg_of(model: nn.Module) -> dict[str, Any]:
    """What timm notes of a model: its architecture, the names of its head's layers and of its classes, ..."""
    cfg: Any = model.pretrained_cfg
    return cfg


def check_model(name: str) -> None:
    """Raise ``UserError`` unless there is a model of this name."""
    if not timm.is_model(name):
        raise UserError(f"unknown model {name!r}; {nearest(name, timm.list_models())}")


def create_model(recipe: Recipe) -> nn.Module:
    """The recipe's model with its initial weights, a function of the seed alone.

    It has 1000 classes where the recipe leaves their number to the data. Raises ``UserError`` for a name that timm does
    not know, arguments that the model does not take, and arguments that make it no classifier.
    """
    check_model(recipe.model)
    rates = {"drop_rate": recipe.drop_rate, "drop_path_rate": recipe.drop_path_rate}
    args = recipe.model_args | {name: rate for name, rate in rates.items() if rate is not None}
    classes = recipe.num_classes or 1000
    torch.manual_seed(recipe.seed)
    try:
        model = timm.create_model(recipe.model, pretrained=False, num_classes=classes, **args)
    except Exception as e:  # what wrong arguments raise is up to the model
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise UserError(f"model {recipe.model!r} with {args}: {reason}") from None
    if not hasattr(model, "get_classifier") or getattr(model, "num_classes", None) != classes:
        raise UserError(f"model {recipe.model!r} with {args} is not a classifier of {many(classes, 'class')}")
    if recipe.init == "mmcls_vit" and getattr(model, "cls_token", None) is None:
        raise UserError(f"init mmcls_vit needs a model with a class token, such as deit_small; got {recipe.model!r}")
    if recipe.init != "timm":
        init_published(model, recipe.init)
    if recipe.freeze is not None:
        (freeze if recipe.unfreeze_epochs is None else frozen)(model, recipe.freeze)  # thawing is of ``Unfreezing``
    if recipe.grad_checkpointing:
        checkpoint_activations(model, recipe.model)
    return model


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Have the backward pass compute anew what lies inside of the model's blocks, without counting images twice.

    BatchNorm's running statistics move once for a batch, as without it. Raises ``UserError`` for a model that cannot.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise UserError(f"model {name!r} cannot compute its activations again; leave out grad_checkpointing") from None
    count_once(model)


def count_once(model: nn.Module) -> None:
    """Have BatchNorm count a batch in the forward pass alone, not again where a backward pass repeats that."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(hold_statistics)
            # a repetition ends by an exception, as soon as it has all that it needs: maybe within this layer
            module.register_forward_hook(release_statistics, always_call=True)


def hold_statistics(layer: _BatchNorm, _args: Any) -> None:
    """Before a forward pass of BatchNorm within a backward pass: let it see the batch, but not count it."""
    if torch._C._current_graph_task_id() != -1 and layer.training:
        layer.held, layer.momentum = layer.momentum, 0.0  # type: ignore[assignment]


def release_statistics(layer: _BatchNorm, _args: Any, _output: Any) -> None:
    """After it."""
    if torch._C._current_graph_task_id() != -1 and layer.training:
        layer.momentum = layer.held  # type: ignore[assignment]
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.sub_(1)


def layers(model: nn.Module, stages: bool = False) -> dict[str, int]:
    """The number of each parameter's layer, from the images to the classifier, as timm's layer decay counts them.

    ``stages``: those of timm's coarse groups instead, in which a ResNet's ``layer1`` is one. Raises ``UserError`` for a
    model that does not tell its layers.
    """
    if not hasattr(model, "group_matcher"):
        raise UserError(f"{type(model).__name__} does not say which layers it has; leave out layer_decay and freeze")
    found: dict[str, int] = group_parameters(model, model.group_matcher(coarse=stages), reverse=True)  # type: ignore[operator]
    return found


def freeze(model: nn.Module, upto: str) -> None:
    """Leave ``frozen`` parameters as they are. BatchNorm goes on counting its statistics. Raises as that does."""
    kept = frozen(model, upto)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in kept)


def classifier_ids(model: nn.Module) -> set[int]:
    """The ids of the classifier's parameters; a distilled DeiT has two classifiers."""
    head = model.get_classifier()  # type: ignore[operator]
    return {id(p) for part in (head if isinstance(head, tuple) else (head,)) for p in part.parameters()}


def frozen(model: nn.Module, upto: str) -> set[str]:
    """Names of parameters: all but the classifier's (``body``), or those up to a stage.

    Raises ``UserError`` for a name of no stage.
    """
    head, layer = classifier_ids(model), layers(model)
    inside = [number for name, number in layer.items() if name.startswith(f"{upto}.")]
    if upto != "body" and not inside:
        info: Any = model.feature_info
        stages = [row["module"] for row in getattr(info, "info", info)]
        raise UserError(f"freeze {upto!r}: {nearest(upto, ['body', *stages])}")
    last = max(inside, default=max(layer.values()))
    return {name for name, p in model.named_parameters() if id(p) not in head and layer[name] <= last}


def load_model(name: str, **args: Any) -> nn.Module:
    """A trained model: a run folder, ``hf-hub:owner/name[@revision]``, prepared weights, or the name of timm weights.

    ``args`` replace arguments that the weights were saved with; timm adapts the weights where it can. Of folders and
    repositories safetensors alone are read: see ``mixers.weights``. A weight file names no model, so it is refused, and
    is for ``load_start`` alone. Raises ``UserError``.
    """
    if folder := folder_of(name):
        return fetch.model_of(folder, name, **args)
    if is_weight_file(name) or is_other_file(name):
        raise UserError(
            f"{name} is a file of weights, which does not say what model they are of: train starts a run from it with "
            "--pretrained; to score it or predict, save its model with timm.models.save_for_hf and pass that folder"
        )
    if not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"model {name!r} is neither a run folder, hf-hub:owner/name nor in timm; "
            f"{nearest(name, timm.list_models())}"
        )
    try:
        with taps.asking_once():
            return timm.create_model(name, pretrained=True, **args)
    except Exception as e:  # the Hub, timm and safetensors raise some twenty types between them
        raise UserError(f"cannot load model {name!r}: {taps.why(e)}") from None


def folder_of(name: str) -> Path | None:
    """The folder with config.json and model.safetensors of a run, Hub id or prepared weights; None for other names."""
    if fetch.is_hub(name):
        return fetch.snapshot(name)
    if name in WEIGHTS:
        return find_weights(name)
    folder = Path(name)
    if not folder.is_dir():
        return None
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        raise UserError(f"{name} has no config.json and model.safetensors, so it is not a run that was evaluated")
    return folder


def is_other_file(name: str) -> bool:
    """Whether a name is that of a file, and of no weights of timm."""
    return os.path.isfile(name) and not timm.is_model_pretrained(name)


def load_start(recipe: Recipe) -> Start | None:
    """The trained model that the recipe starts from, if any. Raises ``UserError`` when it is of another kind."""
    if recipe.pretrained is None:
        return None
    name = recipe.model if recipe.pretrained == "timm" else recipe.pretrained
    if recipe.pretrained == "timm" and not timm.is_model_pretrained(recipe.model):
        raise UserError(
            f"timm has no weights of {recipe.model!r}; pass --pretrained with a run folder, hf-hub: id or weight file"
        )
    if is_weight_file(name):
        return load(name, create_model(recipe))
    if is_other_file(name):
        raise UserError(f"pretrained: expected a weight file that ends {', '.join(ENDINGS)}, got {name!r}")
    folder = folder_of(name)
    source = fetch.model_of(folder, name, **recipe.model_args) if folder else load_model(name, **recipe.model_args)
    there, here = cfg_of(source).get("architecture"), recipe.model.split(".")[0]
    if there != here:
        raise UserError(
            f"pretrained {name!r} is a {there!r}, and the recipe's model is a {here!r}; pass --model {there}"
        )
    return Start(source, file_hash(folder / "model.safetensors") if folder else None, [])


def start_from(model: nn.Module, source: nn.Module, classes: list[str]) -> str:
    """Copy a trained model's weights, but not the head of other classes; says in words what was done.

    A new head starts small, so that all classes are about as likely: as it was drawn, scaled to ``HEAD_STD``.
    The head is kept when the number of classes is the same and the names, where the source knows them, are too.
    Raises ``UserError`` when the rest does not fit.
    """
    own, given = model.state_dict(), source.state_dict()
    heads = cfg_of(source).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    known = list(cfg_of(source).get("label_names") or classes)
    same = source.num_classes == model.num_classes and known == classes
    taken = {k: v for k, v in given.items() if same or not any(k.startswith(f"{head}.") for head in heads)}
    missing = [k for k in own if k not in taken and not any(k.startswith(f"{head}.") for head in heads)]
    odd = [k for k, v in taken.items() if k not in own or own[k].shape != v.shape]
    if missing or odd:
        raise UserError(
            f"the pretrained weights do not fit the recipe's model: {', '.join((missing + odd)[:3])}; they need the "
            "same model_args"
        )
    model.load_state_dict(taken, strict=False)
    if not same:
        with torch.no_grad():  # what an architecture draws for thousands of classes is far too large for a few
            for name, weight in model.named_parameters():
                if any(name.startswith(f"{head}.") for head in heads):
                    weight.mul_(min(1.0, HEAD_STD / weight.std().item()) if weight.ndim > 1 else 0.0)
    return "with its head" if same else f"with a new head for {many(len(classes), 'class')}"


def check_classes(model: nn.Module, classes: list[str], name: str) -> None:
    """Raise ``UserError`` when a trained model's classes are not those of the data."""
    if model.num_classes != len(classes):
        raise UserError(f"model {name!r} has {model.num_classes} classes, and the data have {len(classes)}")
    known = list(cfg_of(model).get("label_names") or [])
    if sorted(known) == sorted(classes) and known != classes:
        raise UserError(f"model {name!r} and the data number the same classes differently")


def check_input(model: nn.Module, batch: int, size: int | tuple[int, ...], name: str, training: bool) -> None:
    """Raise ``UserError`` when the model cannot take a batch of ``size`` pixels, or gives no logits for it.

    ``size``: of a square, or height and width. Runs no arithmetic (meta device).
    """
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with torch.no_grad():
            empty = copy.deepcopy(model).to("meta").train(training)
            logits = empty(torch.empty(batch, 3, height, width, device="meta"))
    except Exception as e:  # what a wrong size raises is up to the model
        raise UserError(
            f"model {name!r} does not take {many(batch, 'image')} of {height} x {width}"
            f"{' in training' * training}: {' '.join(str(e).split())[:160]}; choose another size or batch "
            f"(some models want --model_args.img_size {height})"
        ) from None
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    expected: Any = (batch, model.num_classes)
    if got != expected:
        raise UserError(f"model {name!r} gives {got} and not logits {expected}; check its model_args")


def init_published(model: nn.Module, init: str) -> None:
    """Start as the published runs did, where timm differs.

    ``mmcls_cnn``: every convolution from torch's kaiming normal (fan-out, ReLU), head from N(0, 0.01). That is timm's
    law for a ResNet's convolutions, but not for depth-wise ones: torch does not divide the fan by the groups.
    BatchNorm stays as timm has it: weight 1, but 0 in the last of a ResNet's block.
    ``mmcls_vit``: class token and head from N(0, 0.02), which the original truncates at 2, so at a hundred standard
    deviations.
    Biases of what is drawn are 0. The published Swin, ConvNeXt, PVT and MogaNet need neither: timm's start, or that
    of the models here, is theirs.
    """
    net: Any = model  # a classifier of timm has more than a module of torch
    head = net.get_classifier()
    if init == "mmcls_cnn":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(head.weight, std=0.01)
    else:
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.trunc_normal_(net.cls_token, std=0.02)
    nn.init.zeros_(head.bias)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(math.prod(t.shape) * t.element_size() for t in (*model.parameters(), *model.buffers()))
