"""ConvNeXt-T for images of 32 pixels: a 3 x 3 stem of stride 1, all else as in timm.

A ConvNet for the 2020s, Liu et al., CVPR 2022, https://arxiv.org/abs/2201.03545; this stem is that of OpenMixup's
tables of CIFAR-100, https://github.com/Westlake-AI/openmixup. Registered with timm as ``convnext_tiny_cifar``, so that
``timm.create_model`` builds and reloads it once ``mixup_recipes.training.backbones`` is imported.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from torch import nn

default_cfgs = generate_default_cfgs(
    {
        "convnext_tiny_cifar": {
            "num_classes": 100,
            "input_size": (3, 32, 32),
            "pool_size": (4, 4),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2023, 0.1994, 0.2010),
            "first_conv": "stem.0",
            "classifier": "head.fc",
        }
    }
)


class ConvNeXtCifar(ConvNeXt):
    """timm's ConvNeXt with the small stem."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        replaced: Any = self.stem[0]
        conv = nn.Conv2d(replaced.in_channels, replaced.out_channels, 3, padding=1)
        nn.init.trunc_normal_(conv.weight, std=0.02)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.stem[0] = conv
        stages: Any = self.feature_info
        for info in stages:
            info["reduction"] //= 4


@register_model
def convnext_tiny_cifar(pretrained: bool = False, **kwargs: Any) -> ConvNeXt:
    """ConvNeXt-T with the small stem, 27.9 M parameters for 100 classes."""
    features = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(ConvNeXtCifar, "convnext_tiny_cifar", pretrained, feature_cfg=features, **kwargs)
