"""TransMix: Attend to Mix for Vision Transformers. Chen, Sun, He, Torr, Yuille, Bai. CVPR 2022.

https://arxiv.org/abs/2111.09833, reference code https://github.com/Beckschen/TransMix

Formula: images are mixed with a mask as by the base. ``a`` is where the class token looks in the last attention layer
of the forward that is trained, mean over heads, on the grid of patches; ``M`` the mask on that grid, 1 where the sample
itself stays, each patch its first pixel. ``lam = (area + sum(M*a) / sum(a)) / 2`` with the base's share of the label as
``area``, and ``y' = lam*y + (1-lam)*y[index]``, one lambda per sample. No gradient flows through a.

Published defaults: over CutMix, alpha = 1; the two shares of the label weigh the same. The published method,
``transmix``, does so for .8 of the batches and mixes the others by Mixup with alpha = .8.

Sampling law: ``transmix@chen-2022``: that of the base, nothing else is drawn.

Cost: no extra pass; one row of the last layer's attention. A stage that was compiled runs uncompiled when that layer
lies in it (DeiT: the last block of 12).

Models: DeiT and other ViTs with a class token; PVT, which has one in its last stage (7 x 7 patches). Variant ours: Swin
and other models without a class token, by the mean over all patches as queries; the paper gives Swin class attention
blocks, which is another model.

Deviations: the partner is a random permutation, reference code: the batch in reverse. In OpenMixup all lambdas of a
batch are replaced by their mean, because its loss is averaged before it is weighted; here each sample keeps its own.
The official command reads a YAML file whose share of CutMix, 80 percent, its parser does not know, so that it mixes by
CutMix in 50 percent of the batches; 80 is what OpenMixup and this default take.

Kind: label.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan
from .compose import Switch, check_base, inmost
from .registry import build


class TransMix(Mixer):
    """Mix like ``base``, which blends images by ``index`` and ``mask``, and share the label by where the model looks.

    Raises ``ValueError`` for a base that does more than blend images, in a step for one that plans something else.
    """

    def __init__(self, base: Mixer):
        super().__init__()
        check_base(base)
        self.base = base

    def setup(self, model: nn.Module) -> None:
        """Raises ``ValueError`` when the model has no attention between image tokens."""
        taps.attention_layers(model)

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """The plan of ``base``; in a step, ``lam`` (B,) takes what was looked at into account."""
        ops.check_look(look)
        return self.base.plan(x, y, rng, *look)

    def mix(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], **plan: Any
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """What ``base`` does."""
        return self.base.mix(x, y, **plan)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward on the mixed batch, whose attention decides on the labels."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng, model, criterion)
        blended = inmost(plan)
        if blended.keys() <= {"choice"}:  # the member that does not mix
            logits = model(x)
            return Out.of(logits, y, plan, mix=criterion(logits, y))
        mask, area = self.stays(blended)
        mixed, _ = self.mix(x, y, **plan)
        with taps.attention(model) as look:
            logits = model(mixed)
        blended["lam"] = (area + look.share(mask)) / 2  # of a plan that was made for this step
        target = ops.blend_targets(y, blended["index"], blended["lam"])
        return Out.of(logits, target, plan, mix=criterion(logits, target))

    def stays(self, plan: Plan) -> tuple[Float[Tensor, "B 1 h w"], Float[Tensor, " B"]]:
        """Where the sample itself stays in the images, and in what share of its label, by the plan of ``base``."""
        if not {"index", "mask"} <= plan.keys():
            raise ValueError(
                f"TransMix needs a base whose plan has index and mask, got {', '.join(plan)}; use CutMix()"
            )
        mask = plan["mask"]
        return mask, plan["lam"] if "lam" in plan else mask.mean((1, 2, 3))


def transmix(mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0, share: float = 0.8) -> Switch:
    """The published method: CutMix with labels by attention for ``share`` of the batches, Mixup for the others."""
    ops.check_between("share", share, 0.0, 1.0)
    members = [build("mixup", alpha=mixup_alpha), TransMix(build("cutmix", alpha=cutmix_alpha))]
    return Switch(members, [round(1 - share, 12), share])
