"""TL-Align. Token-Label Alignment for Vision Transformers. Xiao, Zheng, Zhu, Zhou, Lu. ICCV 2023.

https://arxiv.org/abs/2210.06455, reference code https://github.com/Euphoria16/TL-Align

Formula: This is CutMix with a box of whole patches. Every token has a label. A patch has the label of its image, and
the class token has the label mixed by area. In each block the labels follow the tokens: ``Y <- (A Y + Y) / 2``. A is
the block's attention, as the mean over heads, and Y itself stands for the residual connection. The target is the class
token's label after the last block. All labels lie between y and y[index], and the rows of A sum to 1, so one number per
token says the same: ``w <- (A w + w) / 2``. At the start w = 1 in a patch of the sample itself and 0 in a patch of its
partner. ``y' = w_class*y + (1-w_class)*y[index]``. No gradient flows through A.

Published defaults: alpha = 1, every batch.

Sampling law: ``tlalign@xiao-2023``: CutMix's box is drawn on the grid of patches, with ``lam0 ~ Beta(alpha, alpha)``.
Its half sides are rounded down to whole patches, its centre is uniform on the grid, and it is clipped at the border.
The whole batch has one box. The box is empty for 2 of 100 batches on a grid of 14 x 14, and for all batches on one of 2
x 2. The partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own
partner.

Cost: There is no extra pass. Each block computes one more fused attention whose values have 8 channels, in the layer's
precision. Blocks that were compiled one by one run uncompiled.

Models: The method takes DeiT and other ViTs with a class token. It does not take Swin and PVT, because their tokens
change from stage to stage. The number of Swin was published without code.

Deviations: The reference code carries (B, N, K) labels through the network, which is the same. Its partner is the batch
in reverse. What OpenMixup calls TLA has no alignment and is another method.

Kind: input, label.
"""

from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan


class TLAlign(Mixer):
    """Paste a box of whole patches as CutMix does, with labels that follow the tokens.

    ``alpha`` is the Beta parameter and must be above 0.
    """

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        ops.check_positive("alpha", alpha)
        self.alpha = alpha

    def setup(self, model: nn.Module) -> None:
        """Raises ``ValueError`` for a model that does not keep its tokens, a class token among them, to the end."""
        layers = [model.get_submodule(name) for name in taps.attention_layers(model)]
        keeps = all(isinstance(layer, timm.layers.Attention) for layer in layers)
        if not keeps or not getattr(model, "has_class_token", False) or getattr(model, "global_pool", "") != "token":
            raise ValueError(
                f"TLAlign needs the same tokens, a class token among them, in all layers, {type(model).__name__} has "
                "others; use deit_small_patch16_224 or vit_base_patch16_224"
            )

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 0 inside the box, ``lam`` (B,) its mean, later that of the label.

        ``look``: the model, for the size of its patches.
        """
        ops.check_look(look)
        patch = max(taps.reductions(look[0]).values())
        height, width = (side // patch for side in x.shape[-2:])
        box = ops.clipped_box(height, width, ops.beta(self.alpha, self.alpha, rng), rng)
        top, bottom, left, right = (patch * side for side in box)
        lam = 1 - (bottom - top) * (right - left) / (x.shape[-2] * x.shape[-1])
        return {
            "index": ops.partners(x, rng),
            "mask": ops.box_mask(top, bottom, left, right, x),
            "lam": ops.per_sample(lam, x),
        }

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward on the mixed batch, whose attention carries the labels along."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng, model, criterion)
        mixed, _ = self.mix(x, y, **plan)
        with taps.attentions(model) as looks:
            logits = model(mixed)
        plan = plan | {"lam": align(looks, plan["mask"], plan["lam"])}
        target = ops.blend_targets(y, plan["index"], plan["lam"])
        return Out.of(logits, target, plan, mix=criterion(logits, target))


def align(looks: list[taps.Attention], mask: Float[Tensor, "B 1 H W"], lam: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The class token's share of the sample itself after the last layer, from the mask and its share ``lam`` before."""
    patches = looks[0].on_patches(mask)
    share = torch.cat((lam[:, None].expand(-1, looks[0].prefix), patches), dim=1)
    for look in looks:
        share = (look.product(share) + share) / 2
    return share[:, 0]
