"""LUMix: Improving Mixup by Better Modelling Label Uncertainty. Sun, Chen, He, Yuille, Torr, Bai. ICASSP 2024.

https://arxiv.org/abs/2211.15846, no code was published: https://github.com/kevin-ssy/LUMix says that it is to come.

Formula: The base mixes the images and gives the sample itself the share ``lam0`` of the label. How much of each image
is to be seen is not certain, so the share is perturbed:
``lam = (1-predicted-noise)*lam0 + predicted*lam_p + noise*lam_r``. ``lam_p = p_a / (p_a + p_b)`` is what the model
says. p is the softmax of its logits of the mixed image without gradient. a and b are the classes of the sample and of
its partner. ``lam_r ~ Beta(alpha, alpha)`` is drawn. ``y' = lam*y + (1-lam)*y[index]``.

Published defaults: None could be read. The defaults here are ours, see the deviations.

Sampling law: ``lumix@sun-2022``: First ``lam_r`` is drawn, one for the whole batch. Then the law of the base follows.

Cost: There is no extra pass. A softmax is computed.

Deviations: There is no code, and only the abstract of the paper was at hand. So this is a reading of the method and no
copy of it. The abstract says that the label is perturbed during training, at next to no cost, with any network. It is
known at second hand that a random part and the model's prediction do it. These choices are ours: that the two are
shares of one sum, their weights, alpha, one ``lam_r`` per batch, and CutMix in every batch as the base of ``lumix``. If
you want to meet a number of the paper, compare these choices with its text first. It is also our choice that a share of
0 or 1 stays: where one image alone is to be seen, its label is certain. With a smoothed or soft target, ``p_a`` is the
sum of p times the target. Where the model gives neither class any probability, ``lam_p`` is ``lam0``.

Kind: input, label.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import ops
from .base import Criterion, Mixer, Out, Plan
from .compose import check_base, inmost
from .registry import build


class LUMix(Mixer):
    """Mix like ``base`` and perturb the share of the label.

    ``base`` blends images by ``index`` and ``mask``. ``predicted`` and ``noise`` are the weights of what the model says
    and of what is drawn. Both are in [0, 1], and their sum is at most 1. ``alpha`` is the Beta parameter of what is
    drawn and must be above 0. Raises ``ValueError`` for a base that does more than blend images. A step raises it for a
    base that plans something else.
    """

    def __init__(self, base: Mixer, predicted: float = 0.4, noise: float = 0.1, alpha: float = 1.0):
        super().__init__()
        check_base(base)
        ops.check_between("predicted", predicted, 0.0, 1.0)
        ops.check_between("noise", noise, 0.0, 1.0)
        if predicted + noise > 1:
            raise ValueError(f"predicted + noise must be at most 1, got {predicted} + {noise}")
        ops.check_positive("alpha", alpha)
        self.base = base
        self.predicted = predicted
        self.one_label = predicted > 0  # what the model says is a softmax
        self.noise = noise
        self.alpha = alpha

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """The plan of ``base``; in a step, ``lam`` (B,) is perturbed."""
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
        """One forward on the mixed batch, whose logits have a say in the labels."""
        ops.check_batch(x, y)
        drawn = ops.beta(self.alpha, self.alpha, rng)
        plan = self.plan(x, y, rng, model, criterion)
        blended = inmost(plan)
        if blended.keys() <= {"choice"}:  # the member that does not mix
            logits = model(x)
            return Out.of(logits, y, plan, mix=criterion(logits, y))
        if not {"index", "mask"} <= blended.keys():
            raise ValueError(f"LUMix needs a base whose plan has index and mask, got {[*blended]}; use CutMix()")
        mixed, _ = self.mix(x, y, **plan)
        logits = model(mixed)
        index, area = blended["index"], blended["lam"] if "lam" in blended else blended["mask"].mean((1, 2, 3))
        said = share(logits.detach(), y, y[index], area)
        lam = area + self.predicted * (said - area) + self.noise * (drawn - area)
        lam = torch.where((area > 0) & (area < 1), lam, area)
        blended["lam"] = lam  # of a plan that was made for this step
        target = ops.blend_targets(y, index, lam)
        return Out.of(logits, target, plan, mix=criterion(logits, target))


def share(
    logits: Float[Tensor, "B K"], own: Float[Tensor, "B K"], partner: Float[Tensor, "B K"], area: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """How much of the probability of both labels is that of the first; ``area`` where neither has any."""
    with ops.full_precision(logits.device):
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
        first, second = (p * own).sum(1), (p * partner).sum(1)
        both = first + second
        return torch.where(both > 0, first / both, area).to(area.dtype)


def lumix(base: Mixer | None = None, predicted: float = 0.4, noise: float = 0.1, alpha: float = 1.0) -> LUMix:
    """Make perturbed labels over ``base``, or over CutMix with alpha = 1."""
    return LUMix(build("cutmix", alpha=1.0) if base is None else base, predicted, noise, alpha)
