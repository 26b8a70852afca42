"""LUMix: Improving Mixup by Better Modelling Label Uncertainty. Sun, Chen, He, Yuille, Torr, Bai. ICASSP 2024.

https://arxiv.org/abs/2211.15846, no code was published: https://github.com/kevin-ssy/LUMix says that it is to come.

Formula: images are mixed as by the base, which gives the sample itself the share ``lam0`` of the label. How much of
each image is to be seen is not certain, so the share is perturbed: ``lam = (1-predicted-noise)*lam0 + predicted*lam_p +
noise*lam_r``. ``lam_p = p_a / (p_a + p_b)`` is what the model says, p the softmax of its logits of the mixed image
without gradient, a and b the classes of the sample and of its partner; ``lam_r ~ Beta(alpha, alpha)`` is drawn.
``y' = lam*y + (1-lam)*y[index]``.

Published defaults: none that could be read; those here are ours, see Deviations.

Sampling law: ``lumix@sun-2022``: ``lam_r``, one for the whole batch, then that of the base.

Cost: no extra pass; a softmax.

Deviations: without code, and of the paper with the abstract alone, this is a reading of the method and no copy of it.
The abstract has that the label is perturbed during training, at next to no cost, with any network; that a random part
and the model's prediction do it is known at second hand. That they are shares of one sum, their weights, alpha, one
``lam_r`` per batch, and CutMix in every batch as the base of ``lumix`` are ours: who wants to meet a number of the
paper's compares these with its text first. So is that a share of 0 or 1 stays: where one image alone is to be seen, its
label is certain. Of a smoothed or soft target ``p_a`` is the sum of p times the target. Where the model gives neither
class any probability, ``lam_p`` is ``lam0``.

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
    """Mix like ``base``, which blends images by ``index`` and ``mask``, and perturb the share of the label.

    ``predicted``, ``noise`` in [0, 1], of sum at most 1: weights of what the model says and of what is drawn; ``alpha``
    > 0: Beta parameter of the latter. Raises ``ValueError`` for a base that does more than blend images, in a step for
    one that plans something else.
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
    """Perturbed labels over ``base``, or over CutMix with alpha = 1."""
    return LUMix(build("cutmix", alpha=1.0) if base is None else base, predicted, noise, alpha)
