"""Wide ResNet-28-8 for images of 32 pixels, in the form that OpenMixup's tables of CIFAR-100 were trained with.

Wide Residual Networks, Zagoruyko and Komodakis, BMVC 2016, https://arxiv.org/abs/1605.07146; the form is that of code
for semi-supervised learning, https://github.com/google-research/mixmatch, as
https://github.com/Westlake-AI/openmixup has it. Registered with timm as ``wide_resnet28_8_cifar`` (timm has wide
networks for ImageNet only), so that ``timm.create_model`` and the image classification models of transformers build and
reload it once ``mixup_recipes.training.backbones`` is imported.

It differs from the paper's network: convolutions have biases, the activation is a LeakyReLU of slope .1, BatchNorm has
eps .001 and a momentum of .001, so that its statistics are a mean over some thousand batches, and the shortcut of the
very first block starts behind its activation. There is no dropout.

Initial weights: Kaiming normal (fan out), biases 0, BatchNorm 1 and 0; the head as in torch (``init: mmcls_cnn`` draws
it from N(0, .01)).
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

default_cfgs = generate_default_cfgs(
    {
        "wide_resnet28_8_cifar": {
            "num_classes": 100,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2023, 0.1994, 0.2010),
            "first_conv": "stem",
            "classifier": "head",
        }
    }
)


def norm(width: int) -> nn.BatchNorm2d:
    """BatchNorm whose statistics move slowly."""
    return nn.BatchNorm2d(width, eps=0.001, momentum=0.001)


def act(x: Tensor) -> Tensor:
    """The activation."""
    return F.leaky_relu(x, 0.1)


class Block(nn.Module):
    """Two convolutions, each behind norm and activation, and a shortcut: of the activation where ``first``."""

    def __init__(self, width: int, to: int, stride: int, first: bool):
        super().__init__()
        self.first = first
        self.norm1 = norm(width)
        self.conv1 = nn.Conv2d(width, to, 3, stride=stride, padding=1)
        self.norm2 = norm(to)
        self.conv2 = nn.Conv2d(to, to, 3, padding=1)
        self.shortcut = nn.Identity() if width == to and stride == 1 else nn.Conv2d(width, to, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        active = act(self.norm1(x))
        return self.shortcut(active if self.first else x) + self.conv2(act(self.norm2(self.conv1(active))))


class WideResNet(nn.Module):
    """Three stages of ``depth`` blocks, ``widths`` channels wide; the second and third halve the map."""

    def __init__(
        self, num_classes: int = 100, in_chans: int = 3, depth: int = 4, widths: Sequence[int] = (128, 256, 512)
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = widths[-1]
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1)
        stages, before = [], 16
        self.feature_info = []
        for i, width in enumerate(widths):
            first = Block(before, width, 2 if i else 1, first=i == 0)
            stages.append(nn.Sequential(first, *(Block(width, width, 1, first=False) for _ in range(depth - 1))))
            self.feature_info.append({"num_chs": width, "reduction": 2**i, "module": f"stages.{i}"})
            before = width
        self.stages = nn.Sequential(*stages)
        self.norm = norm(widths[-1])
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # every convolution here has one

    def get_classifier(self) -> nn.Module:
        """The linear layer on top."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of ``num_classes``; 0: none. ``global_pool`` is ignored: the mean over the map is the feature."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps (B, C, H, W) of the stages ``indices`` and, before them, what ``forward_features`` returns.

        The arguments are those of timm. ``norm`` applies the last norm, and the activation behind it, to the last
        stage's map. With ``stop_early`` no stage after the last index runs, and the first result is what that stage
        returned.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        maps, x = [], self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            whole = i == len(self.stages) - 1
            if i in wanted:
                maps.append(act(self.norm(x)) if norm and whole else x)
        if intermediates_only:
            return maps
        return act(self.norm(x)) if whole else x, maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last map (B, 512, H / 4, W / 4), normalised and active."""
        return act(self.norm(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map to its mean (B, 512), or to logits."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def wide_resnet28_8_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Wide ResNet-28-8, 23.4 M parameters."""
    features = {"feature_cls": "getter", "out_indices": (0, 1, 2)}
    return build_model_with_cfg(WideResNet, "wide_resnet28_8_cifar", pretrained, feature_cfg=features, **kwargs)
