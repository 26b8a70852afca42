"""ResNets for images of 32 and 64 pixels: a 3 x 3 stem of stride 1 and no max-pooling, all else as in timm.

Deep Residual Learning for Image Recognition, He et al., https://arxiv.org/abs/1512.03385; this stem is the
usual one for CIFAR and Tiny-ImageNet, e.g. https://github.com/kuangliu/pytorch-cifar. Registered with timm, so
that ``timm.create_model`` builds and reloads them once ``mixup_recipes.training.backbones`` is imported.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

CFG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs({"resnet18_cifar": CFG, "resnext50_32x4d_cifar": CFG})


class ResNetCifar(ResNet):
    """timm's ResNet with the small stem."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        replaced: Any = self.conv1
        stem = nn.Conv2d(3, replaced.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        stages: Any = self.feature_info
        for info in stages:
            info["reduction"] = max(1, info["reduction"] // 4)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with the small stem."""
    layers: dict[str, Any] = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return build_model_with_cfg(ResNetCifar, "resnet18_cifar", pretrained, **(layers | kwargs))


@register_model
def resnext50_32x4d_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d with the small stem."""
    layers: dict[str, Any] = {"block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4}
    return build_model_with_cfg(ResNetCifar, "resnext50_32x4d_cifar", pretrained, **(layers | kwargs))
