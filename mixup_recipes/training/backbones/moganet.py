"""MogaNet-Tiny: a convolutional network that gathers context of several ranges and gates it.

MogaNet: Multi-order Gated Aggregation Network, Li et al., ICLR 2024, https://arxiv.org/abs/2211.03295; official code
https://github.com/Westlake-AI/MogaNet. Registered with timm as ``moganet_tiny``, so that ``timm.create_model`` and the
image classification models of transformers build and reload it once ``mixup_recipes.training.backbones`` is imported.

A block is ``x + a Moga(BN(x))``, then ``x + b FFN(BN(x))``, with a and b per channel. With 1 x 1 convolutions W::

    Moga(x) = x + W3(SiLU(W1 z) * SiLU(V z)),  z = SiLU(u + s (u - mean(u))),  u = W0 x
    V z = W2 [v1, D5,2(v2), D7,3(v3)],  v = D5,1(z),  split into 1/8, 3/8 and 4/8 of the channels
    FFN(x) = W5(h + t (h - GELU(w h))),  h = GELU(D3,1(W4 x)),  w to one channel

where Dk,d is a depth-wise k x k convolution of dilation d, the mean is over the map, and s and t are per channel.
a, b, s and t start at 1e-5.

Deviations: the code of OpenMixup, and the official one when asked to gate in single precision, apply the SiLU of the
gate twice in that case; here, as in the paper and by default in the official code, it is applied once. ``gate_fp32``
(default true, as the published run of OpenMixup) takes both SiLUs and their product in single precision under
autocast, and changes nothing without. Initial weights are the official ones; OpenMixup's configuration draws
convolutions from a truncated normal of std .02 instead. ``no_weight_decay`` names a, b, s and t, which timm would
decay because of their shape (1, C, 1, 1).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

WIDTHS, DEPTHS, RATIOS = (32, 64, 128, 256), (3, 3, 12, 2), (8, 8, 4, 4)  # of the four stages

default_cfgs = generate_default_cfgs(
    {
        "moganet_tiny": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stages.0.downsample.0",
            "classifier": "head",
        }
    }
)


def depthwise(width: int, kernel: int, dilation: int = 1) -> nn.Conv2d:
    """Depth-wise convolution that keeps the size of the map."""
    return nn.Conv2d(width, width, kernel, padding="same", dilation=dilation, groups=width)


def scale(width: int) -> nn.Parameter:
    """Per-channel scale (1, C, 1, 1), nearly off."""
    return nn.Parameter(torch.full((1, width, 1, 1), 1e-5))


class MultiOrder(nn.Module):
    """Depth-wise convolutions of three ranges, each on its share of the channels, then a 1 x 1: V above."""

    def __init__(self, width: int):
        super().__init__()
        self.shares = [width // 8, width * 3 // 8, width // 2]
        self.near = depthwise(width, 5)
        self.middle = depthwise(self.shares[1], 5, dilation=2)
        self.far = depthwise(self.shares[2], 7, dilation=3)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        near, middle, far = self.near(x).split(self.shares, dim=1)
        return self.project(torch.cat((near, self.middle(middle), self.far(far)), dim=1))


class Moga(nn.Module):
    """Gated aggregation over the map, with a shortcut of its own."""

    def __init__(self, width: int, gate_fp32: bool):
        super().__init__()
        self.gate_fp32 = gate_fp32
        self.expand = nn.Conv2d(width, width, 1)
        self.detail_scale = scale(width)
        self.gate = nn.Conv2d(width, width, 1)
        self.value = MultiOrder(width)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.expand(x)
        z = F.silu(u + self.detail_scale * (u - u.mean((2, 3), keepdim=True)))
        gate, value = self.gate(z), self.value(z)
        dtype = value.dtype
        if self.gate_fp32:
            gate, value = gate.float(), value.float()
        return x + self.project((F.silu(gate) * F.silu(value)).to(dtype))


class FFN(nn.Module):
    """Two 1 x 1 convolutions with a depth-wise one and a re-weighting of channels between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.expand = nn.Conv2d(width, hidden, 1)
        self.depthwise = depthwise(hidden, 3)
        self.common = nn.Conv2d(hidden, 1, 1)
        self.detail_scale = scale(hidden)
        self.project = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.depthwise(self.expand(x)))
        return self.project(h + self.detail_scale * (h - F.gelu(self.common(h))))


class Block(nn.Module):
    """Moga and FFN, each after BatchNorm, scaled per channel and added to its input."""

    def __init__(self, width: int, ratio: int, drop_path: float, gate_fp32: bool):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.moga = Moga(width, gate_fp32)
        self.layer_scale1 = scale(width)
        self.norm2 = nn.BatchNorm2d(width)
        self.ffn = FFN(width, ratio * width)
        self.layer_scale2 = scale(width)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale1 * self.moga(self.norm1(x)))
        return x + self.drop_path(self.layer_scale2 * self.ffn(self.norm2(x)))


class Stage(nn.Module):
    """Downsampling, blocks, BatchNorm: a map to a map."""

    def __init__(self, downsample: nn.Module, blocks: list[Block], width: int):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.downsample(x)))


def halve(width: int, to: int) -> list[nn.Module]:
    """A convolution of stride 2 and BatchNorm."""
    return [nn.Conv2d(width, to, 3, stride=2, padding=1), nn.BatchNorm2d(to)]


class MogaNet(nn.Module):
    """MogaNet-Tiny for images of any size."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, gate_fp32: bool = True):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        stem = [*halve(in_chans, WIDTHS[0] // 2), nn.GELU(), *halve(WIDTHS[0] // 2, WIDTHS[0])]
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(DEPTHS), stagewise=True)
        stages = []
        self.feature_info = []
        for i, (width, ratio) in enumerate(zip(WIDTHS, RATIOS, strict=True)):
            downsample = nn.Sequential(*(halve(WIDTHS[i - 1], width) if i else stem))
            stages.append(Stage(downsample, [Block(width, ratio, rate, gate_fp32) for rate in rates[i]], width))
            self.feature_info.append({"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # fan-out of one group
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                assert module.bias is not None  # as in every convolution of this model
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the per-channel scales."""
        return {n for n, _ in self.named_parameters() if n.endswith(("detail_scale", "layer_scale1", "layer_scale2"))}

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
        """Maps (B, C, H, W) of the stages ``indices`` and, before them, the last map.

        The arguments are those of timm; ``norm`` has no effect, every stage ends with one. With ``stop_early`` no
        stage after the last index runs.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last map (B, 256, H / 32, W / 32)."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map to its mean (B, 256), or to logits."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def moganet_tiny(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-Tiny, 5.2 M parameters."""
    features = {"feature_cls": "getter", "out_indices": (0, 1, 2, 3)}
    return build_model_with_cfg(MogaNet, "moganet_tiny", pretrained, feature_cfg=features, **kwargs)
