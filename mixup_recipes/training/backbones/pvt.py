"""PVT-Tiny and -Small: transformers whose tokens get coarser from stage to stage, with a class token in the last.

Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions, Wang et al., ICCV 2021,
https://arxiv.org/abs/2102.12122; official code https://github.com/whai362/PVT. Registered with timm as ``pvt_tiny``
and ``pvt_small`` (timm has the second version only, another architecture), so that ``timm.create_model`` and the image
classification models of transformers build and reload them once ``mixup_recipes.training.backbones`` is imported.

The layers are those of transformers' ``PvtForImageClassification``, arranged as timm arranges a model. Its weights
fit under other names: ``pvt.encoder.patch_embeddings.I`` is ``stages.I.embed``, ``pvt.encoder.block.I`` is
``stages.I.layers``, ``pvt.encoder.layer_norm`` is ``norm``, ``classifier`` is ``head``. ``attention_info`` names, as
``mixers.taps`` asks for it, the layers whose attention is between all tokens: those of the last stage.

Deviations:

- Initial weights are those of the official code: convolutions as in torch, and a truncated normal of std .02 for
  linear weights, class token and position embeddings. transformers draws convolutions from the latter too.
- Position embeddings are added as they are. Official code and transformers first resize them to the size they have,
  an identity whose gradient cannot be reproduced on a GPU. Images of another size than ``img_size`` are refused.
- The norms after patch embedding and key reduction have eps 1e-6, as in transformers; official 1e-5.
- ``no_weight_decay`` names class token and position embeddings; the official code decays the latter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "stages.0.embed.projection",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({"pvt_tiny": CFG, "pvt_small": CFG})


class Stage(nn.Module):
    """Patch embedding and layers: a map (B, C, H, W) to a map, in the last stage to tokens, the class token first."""

    def __init__(self, embed: nn.Module, layers: nn.ModuleList):
        super().__init__()
        self.embed = embed
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        embed: Any = self.embed  # transformers' patch embedding
        if tuple(x.shape[2:]) != embed.image_size:
            wanted, got = (" x ".join(map(str, size)) for size in (embed.image_size, x.shape[2:]))
            raise ValueError(f"made for {wanted}, got {got}")
        x = embed.projection(x)
        size = x.shape[2:]
        x = embed.layer_norm(x.flatten(2).transpose(1, 2))
        if embed.cls_token is not None:
            x = torch.cat((embed.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + embed.position_embeddings
        for layer in self.layers:
            x = layer(x, *size)[0]
        return x if embed.cls_token is not None else to_map(x, size)


def to_map(tokens: Tensor, size: torch.Size) -> Tensor:
    """Tokens (B, H*W, C) to a map (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, size).contiguous()


class PVT(nn.Module):
    """PVT for square images of ``img_size`` pixels, a multiple of 32. Raises ``ValueError`` for others.

    ``depths``: layers of the four stages.
    """

    num_prefix_tokens = 1  # in the last stage; the others give maps

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (2, 2, 2, 2),
    ):
        # Here and not above: transformers takes seconds to import, and most runs have another model.
        from transformers.models.pvt.configuration_pvt import PvtConfig
        from transformers.models.pvt.modeling_pvt import PvtEncoder

        super().__init__()
        height, width = to_2tuple(img_size)
        if height != width or height % 32:
            raise ValueError(f"img_size must be square and a multiple of 32, got {height} x {width}")
        config = PvtConfig(image_size=height, num_channels=in_chans, drop_path_rate=drop_path_rate, depths=list(depths))
        encoder: Any = PvtEncoder(config)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = height
        self.num_features = self.head_hidden_size = config.hidden_sizes[-1]
        self.stages = nn.Sequential(*map(Stage, encoder.patch_embeddings, encoder.block))
        self.norm = encoder.layer_norm
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(config.hidden_sizes)
        ]
        self.attention_info = [
            {"module": f"stages.3.layers.{i}.attention.self.dropout"} for i in range(len(encoder.block[3]))
        ]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for name in sorted(self.no_weight_decay()):
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of class token and position embeddings."""
        return {n for n, _ in self.named_parameters() if n.endswith((".cls_token", ".position_embeddings"))}

    def get_classifier(self) -> nn.Module:
        """The linear layer on top."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of ``num_classes``; 0: none. ``global_pool`` is ignored: the class token is the feature."""
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

        The arguments are those of timm. ``norm`` applies the last norm to the last stage's map. With ``stop_early``
        no stage after the last index runs, and the first result is what that stage returned.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted:
                tokens = self.norm(x) if norm and x.ndim == 3 else x
                maps.append(to_map(tokens[:, 1:], torch.Size([self.img_size // 32] * 2)) if x.ndim == 3 else x)
        if intermediates_only:
            return maps
        return self.norm(x) if x.ndim == 3 else x, maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, S, S) to the normalised tokens of the last stage (B, 1 + (S / 32)^2, 512)."""
        return self.norm(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to the class token (B, 512), or to logits."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


FEATURES = {"feature_cls": "getter", "out_indices": (0, 1, 2, 3)}


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Tiny, 13.2 M parameters."""
    return build_model_with_cfg(PVT, "pvt_tiny", pretrained, feature_cfg=dict(FEATURES), **kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Small, 24.5 M parameters."""
    depths: dict[str, Any] = {"depths": (3, 4, 6, 3)}
    return build_model_with_cfg(PVT, "pvt_small", pretrained, feature_cfg=dict(FEATURES), **(depths | kwargs))
