"""OpenMixup: its registered models, optimiser, hooks and runner, as its own `train_model` puts them together on a CPU.

It needs mmcv 1.7 and what that needs. Its other imports, such as seaborn, stand in where they are missing: nothing of
them runs here.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import timm
import torch
from originals import Checkout
from torch import Tensor, nn

from acid_originals import Acid, Epochs
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import create_model
from mixup_recipes.training.update import new_step

MAY_LACK = ("seaborn", "sklearn", "pandas", "einops", "matplotlib", "scipy", "six", "tensorboard", "skimage", "faiss")
"""What OpenMixup imports for pictures, tables and other tasks."""
CLASSIFIERS, HEADS, HOOKS = (f"openmixup/{part}" for part in ("models/classifiers", "models/heads", "core/hooks"))
LOSS = {"type": "CrossEntropyLoss", "loss_weight": 1.0}


class Absent(types.ModuleType):
    """A module that is not installed: each name in it is an empty class."""

    __path__: list[str] = []  # noqa: RUF012  a package, whatever is imported from it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Absents(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives ``Absent`` modules for what is not installed."""

    def __init__(self, names: Sequence[str]):
        self.names = {name for name in names if importlib.util.find_spec(name) is None}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """For missing packages and all in them."""
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        """The stand-in."""
        return Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to do."""


def imported(original: Checkout) -> types.SimpleNamespace:
    """OpenMixup and mmcv's runner. mmcv registers an Adafactor of its own, so torch's is hidden from it."""
    if str(original.folder) not in sys.path:
        sys.path.insert(0, str(original.folder))
        sys.meta_path.insert(0, Absents(MAY_LACK))
        hidden = torch.optim.__dict__.get("Adafactor")
        if hidden is not None:
            del torch.optim.Adafactor
        try:
            importlib.import_module("mmcv.runner")
        finally:
            if hidden is not None:
                torch.optim.Adafactor = hidden  # type: ignore[misc]
    names = {
        "runner": "mmcv.runner", "parallel": "mmcv.parallel", "apis": "openmixup.apis", "core": "openmixup.core",
        "models": "openmixup.models", "registry": "openmixup.models.registry",
    }  # fmt: skip
    found = types.SimpleNamespace(**{name: importlib.import_module(module) for name, module in names.items()})
    if found.registry.BACKBONES.get("TimmStages") is None:
        found.registry.BACKBONES.register_module()(TimmStages)
    return found


class TimmStages(nn.Module):
    """A timm model as OpenMixup has its backbones: a list of the map that masks are made from, and the last map."""

    def __init__(self, model: str, model_args: dict[str, Any], index: int | None = None):
        super().__init__()
        self.net: Any = timm.create_model(model, num_classes=0, **model_args)
        self.index = index

    def init_weights(self, pretrained: Any = None) -> None:
        """Weights are copied from our model."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w), unpooled."""
        if self.index is None:
            return [self.net.forward_features(x)]
        last, (hidden,) = self.net.forward_intermediates(x, indices=[self.index])
        return [hidden, last]


class Loader:
    """Our batches as OpenMixup's loader gives them."""

    def __init__(self, epochs: Epochs):
        self.epochs = epochs

    def __len__(self) -> int:
        return len(self.epochs)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for x, labels in self.epochs:
            yield {"img": x, "gt_label": labels}


class Scored(nn.Module):
    """One of the classifiers of an OpenMixup model, as a network that gives logits."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.head([self.backbone(x)[-1]])[0]
        return logits


def copied(model: nn.Module, ours: dict[str, Tensor], places: dict[str, str]) -> None:
    """Give a model our first weights. ``places``: beginnings of our names -> of theirs, the first that fits counts.

    Raises ``LookupError`` where a tensor of theirs gets none or one of ours has no place.
    """
    state = {}
    for name, tensor in ours.items():
        place = next((place for place in places if name.startswith(place)), None)
        if place is not None:
            state[places[place] + name.removeprefix(place)] = tensor
    left = model.load_state_dict(state, strict=False)
    missing = [n for n in left.missing_keys if not n.startswith(("backbone.", "head."))]  # second names of others
    if missing or left.unexpected_keys:
        raise LookupError(f"no counterpart for {missing}, {left.unexpected_keys}")


def trained(
    found: types.SimpleNamespace, model: nn.Module, recipe: Recipe, epochs: Epochs, hooks: list[dict[str, Any]]
) -> None:
    """The part of ``train_model`` between the model and the end: optimiser, parallel wrapper, runner, hooks."""
    assert recipe.opt == "momentum"
    config = {"type": "SGD", "lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = found.core.build_optimizer(model, config)
    found.apis.set_random_seed(recipe.seed)
    logger = logging.getLogger("acid")
    logger.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Tensor, "cuda", lambda tensor: tensor):
        wrapped = found.parallel.MMDataParallel(model, device_ids=[])
        common = {"model": wrapped, "optimizer": optimizer, "work_dir": folder, "logger": logger, "meta": None}
        runner = found.runner.build_runner({"type": "EpochBasedRunner", "max_epochs": recipe.epochs}, common)
        for hook in hooks:
            runner.register_hook(found.core.build_hook(hook, {"dist_mode": False}))
        rates = {"policy": "CosineAnnealing", "min_lr": recipe.min_lr}
        runner.register_training_hooks(rates, {"grad_clip": None}, None, None, None)
        runner.run([Loader(epochs)], [("train", 1)])


def automix(original: Checkout, recipe: Recipe, epochs: Epochs) -> dict[str, nn.Module]:
    """``AutoMixup`` with ``PixelMixBlock``, as OpenMixup's file of CIFAR-100 sets it."""
    found = imported(original)
    step = new_step(create_model(recipe), recipe)
    mixer: Any = step.mixer
    backbone = {"type": "TimmStages", "model": recipe.model, "model_args": recipe.model_args}
    width, hidden = step.model.num_features, mixer.encoder.channels
    head = {"with_avg_pool": True, "in_channels": width, "num_classes": recipe.num_classes, "loss": LOSS}
    block = {
        "type": "PixelMixBlock", "in_channels": hidden, "reduction": 2, "use_scale": True,
        "unsampling_mode": [mixer.block.upsample], "lam_concat": mixer.block.lam_concat, "lam_concat_v": False,
        "lam_mul": False, "lam_residual": False, "lam_mul_k": -1, "value_neck_cfg": None, "x_qk_concat": False,
        "x_v_concat": False, "mask_loss_mode": "L1", "mask_loss_margin": 0.1, "frozen": False,
    }  # fmt: skip
    model = found.models.build_model(
        {
            "type": "AutoMixup", "pretrained": None, "alpha": mixer.alpha, "momentum": mixer.momentum, "mask_layer": 2,
            "mask_loss": mixer.mask_loss, "mask_adjust": 0, "lam_margin": mixer.margin, "mask_up_override": None,
            "debug": False, "backbone": {**backbone, "index": mixer.encoder.index}, "mix_block": block,
            "head_one": {"type": "ClsHead", **head}, "head_mix": {"type": "ClsMixupHead", **head},
            "head_weights": {"head_mix_q": 1, "head_one_q": 1, "head_mix_k": 1, "head_one_k": 1},
        }
    )  # fmt: skip
    state = {name: tensor for name, tensor in step.state_dict().items() if name != "mixer.gamma"}
    places = {
        "model.fc.": "head_mix_q.fc.", "model.": "backbone_q.net.", "mixer.one_hot.": "head_one_q.fc.",
        "mixer.encoder.model.fc.": "head_mix_k.fc.", "mixer.encoder.model.": "backbone_k.net.",
        "mixer.encoder.one_hot.": "head_one_k.fc.", "mixer.block.query_key.": "mix_block.query.conv.",
        "mixer.block.value.": "mix_block.value.",
    }  # fmt: skip
    copied(model, state, places)
    scope = [mixer.momentum_delay, 1.0]
    hook = {"type": "CosineScheduleHook", "end_momentum": mixer.momentum_end, "adjust_scope": scope}
    trained(found, model, recipe, epochs, [hook | {"warming_up": "constant", "update_interval": 1}])
    k = Scored(model.backbone_k, model.head_mix_k)
    return {"": k, "q": Scored(model.backbone_q, model.head_mix_q)}


def classified(name: str) -> Callable[[Checkout, Recipe, Epochs], dict[str, nn.Module]]:
    """``MixUpClassification`` with a method of this name."""

    def train(original: Checkout, recipe: Recipe, epochs: Epochs) -> dict[str, nn.Module]:
        found = imported(original)
        step = new_step(create_model(recipe), recipe)
        head = {"type": "ClsHead", "with_avg_pool": True, "in_channels": step.model.num_features, "loss": LOSS}
        backbone = {"type": "TimmStages", "model": recipe.model, "model_args": recipe.model_args}
        model = found.models.build_model(
            {
                "type": "MixUpClassification", "pretrained": None, "alpha": recipe.mixer_args[name]["alpha"],
                "mix_mode": name, "backbone": backbone, "head": {**head, "num_classes": recipe.num_classes},
            }
        )  # fmt: skip
        copied(model, step.state_dict(), {"model.fc.": "head.fc.", "model.": "backbone.net."})
        trained(found, model, recipe, epochs, [])
        return {"": Scored(model.backbone, model.head)}

    return train


MMCV = ("mmcv", "addict", "yapf", "cv2")
NETWORK = "The network is ours on both sides; it is wrapped as one of OpenMixup's backbones."
OPENMIXUP = (
    Acid(
        "automix by openmixup",
        "Westlake-AI/openmixup",
        (f"{CLASSIFIERS}/automix.py", f"{HEADS}/pmix_block.py", f"{HEADS}/cls_mixup_head.py", f"{HEADS}/cls_head.py",
         f"{HOOKS}/momentum_hook.py"),
        {
            "mixer": "automix", "opt": "momentum", "min_lr": 0.05,
            "mixer_args": {"automix": {
                "lam_concat": False, "momentum": 0.95, "momentum_end": 0.99, "mask_loss_end": 0.1, "block_min_lr": 0.05,
            }},
        },
        automix,
        "The model `AutoMixup` is built from the values of its file "
        "cifar100/automix/basic/r18_l2_a2_near_L1_01_mlr5e_2.py. It is trained by its optimiser and its momentum hook, "
        "and by mmcv's runner and hooks.",
        NETWORK + " The momentum of the second encoder goes from 0.95 to 0.99, because 0.999 needs more updates.",
        MMCV,
    ),
    Acid(
        "cutmix by openmixup",
        "Westlake-AI/openmixup",
        (f"{CLASSIFIERS}/mixup_classification.py", "openmixup/models/augments/cutmix.py", f"{HEADS}/cls_head.py"),
        {"mixer": "cutmix", "mixer_args": {"cutmix": {"alpha": 1.0}}, "opt": "momentum"},
        classified("cutmix"),
        "The model `MixUpClassification` is built from the values of its file "
        "cifar10/mixups/basic/r18_mixups_CE_none.py, with CutMix. It is trained by its optimiser, and by mmcv's runner "
        "and hooks.",
        NETWORK,
        MMCV,
    ),
)  # fmt: skip
