"""Every backbone of the published tables, small, and what tests of taps ask of them."""

import contextlib
import copy
import functools

import pytest
import timm
import torch
from torch import Tensor, nn

from mixers.testing import batch, differences, footprint, global_rngs
from mixup_recipes.training.backbones import moganet

# Every backbone of the published tables but PVT-S, as narrow and shallow as it can be made by arguments.
CNN: dict = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
DEIT, SWIN = "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
VIT: dict = {"depth": 4, "embed_dim": 48, "img_size": 64}
CONVNEXT: dict = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}
BACKBONES: dict[str, dict] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet18_cifar"), CNN),
    **dict.fromkeys(("resnext101_32x4d", "resnext50_32x4d_cifar"), CNN | {"base_width": 16}),
    **dict.fromkeys((DEIT, "deit_small_patch16_224", "deit_base_patch16_224"), VIT),
    "tf_efficientnet_b0": {}, "mobilenetv2_100": {}, "moganet_tiny": {}, "pvt_tiny": {"img_size": 64},
    SWIN: {"depths": (1, 1, 2, 1), "embed_dim": 24, "img_size": 64},
    "convnext_tiny": CONVNEXT, "convnext_tiny_cifar": CONVNEXT,
    "wide_resnet28_8_cifar": {"depth": 1, "widths": (16, 32, 64)},
}  # fmt: skip
FAMILIES = ["resnet18", "tf_efficientnet_b0", DEIT, "pvt_tiny", SWIN, "convnext_tiny", "moganet_tiny"]  # one of each
ATTENTIVE = [name for name in BACKBONES if name.startswith(("deit", "pvt", "swin"))]
CRITERION = nn.CrossEntropyLoss(reduction="none")
X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)

# The compiler itself reads .grad of what it traces.
traced = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@functools.cache
def built(name, **args):
    """A model that nothing has run yet, and the state of torch's generator once its weights were drawn."""
    torch.manual_seed(0)
    drop = {} if name.startswith(("mobile", "tf_", "wide")) else {"drop_path_rate": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moganet, "DEPTHS", (1, 1, 2, 1))  # its depth is no argument
        return timm.create_model(name, num_classes=5, **(BACKBONES[name] | drop | args)), torch.get_rng_state()


def backbone(name: str, **args: object) -> nn.Module:
    """A small one with 5 classes, the same weights each time, in training mode, drop path on where there is some."""
    model, drawn = built(name, **args)
    torch.set_rng_state(drawn)
    return copy.deepcopy(model)


def photos() -> tuple[Tensor, Tensor]:
    """Four images of 64 pixels, one-hot targets of 5 classes."""
    return batch(4, 64, 64)


def state(model: nn.Module) -> dict:
    """All that may not change on a model: modes, hooks, flags, gradients, parameters and buffers."""
    found = footprint(model) | {name: value.clone() for name, value in model.state_dict().items()}
    return found | {f"{name} track": getattr(m, "track_running_stats", None) for name, m in model.named_modules()}


@contextlib.contextmanager
def unchanged(model):
    """The block moves nothing on the model and no global generator."""
    before, generators = state(model), global_rngs()
    yield
    assert not differences(before, state(model)) and not differences(generators, global_rngs())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


DROPOUTS = {"deit": "blocks.3.attn.attn_drop", "swin": "layers.3.blocks.0.attn.attn_drop"}
DROPOUTS["pvt"] = "stages.3.layers.1.attention.self.dropout"


def attention_unfused(model, x, path):
    """The attention that a copy of the model multiplies its values by, in front of the dropout at ``path``."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    seen = []
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    return seen[0]
