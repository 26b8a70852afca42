"""TransMix: Attend to Mix for Vision Transformers. Chen, Sun, He, Torr, Yuille, Bai. CVPR 2022.

https://arxiv.org/abs/2111.09833, reference code https://github.com/Beckschen/TransMix

Formula: The base mixes the images with a mask. ``a`` says where the class token looks in the last attention layer of
the forward that is trained. It is the mean over heads, on the grid of patches. ``M`` is the mask on that grid, 1 where
the sample itself stays; each patch takes the mask of its first pixel. ``lam = (area + sum(M*a) / sum(a)) / 2``, where
``area`` is the base's share of the label. ``y' = lam*y + (1-lam)*y[index]``, with one lambda per sample. No gradient
flows through a.

Published defaults: The base is CutMix with alpha = 1. The two shares of the label weigh the same. The published method,
``transmix``, does this for .8 of the batches and mixes the others by Mixup with alpha = .8.

Sampling law: ``transmix@chen-2022``: The law is that of the base. Nothing else is drawn.

Cost: There is no extra pass. One row of the last layer's attention is computed. If a stage was compiled and that layer
lies in it, the stage runs uncompiled (DeiT: the last block of 12).

Models: The method takes DeiT and other ViTs with a class token, and PVT, which has one in its last stage (7 x 7
patches). A variant is ours: Swin and other models without a class token take the mean over all patches as queries. The
paper gives Swin class attention blocks, which is another model.

Deviations: The partners are a random permutation. In the reference code they are the batch in reverse. OpenMixup
replaces all lambdas of a batch by their mean, because its loss is averaged before it is weighted. Here each sample
keeps its own. The official command reads a YAML file that sets the share of CutMix to 80 percent. Its parser does not
know this entry, so the command mixes by CutMix in 50 percent of the batches. OpenMixup and this default take 80.

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
    """Mix like ``base`` and share the label by where the model looks.

    ``base`` blends images by ``index`` and ``mask``. Raises ``ValueError`` for a base that does more than blend images.
    A step raises it for a base that plans something else.
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
    """Make the published method: CutMix with labels by attention for ``share`` of the batches, Mixup for the others."""
    ops.check_between("share", share, 0.0, 1.0)
    members = [build("mixup", alpha=mixup_alpha), TransMix(build("cutmix", alpha=cutmix_alpha))]
    return Switch(members, [round(1 - share, 12), share])
