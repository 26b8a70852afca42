"""RegMixup: Mixup as a Regularizer Can Surprisingly Improve Accuracy and Out Distribution Robustness. Pinto et al.
NeurIPS 2022.

https://arxiv.org/abs/2206.14502, reference code https://github.com/FrancescoPinto/RegMixup

Formula: ``lam ~ Beta(alpha, alpha)``, ``x' = lam*x + (1-lam)*x[index]``, ``y' = lam*y + (1-lam)*y[index]``;
``loss = CE(x, y) + eta*CE(x', y')``. What Mixup would train on alone is added to the loss of the clean batch.

Published defaults: alpha = 20 (reference code; its commands take 20 for CIFAR-10 and 10 for CIFAR-100), so lambda is
near one half. eta = 1.

Sampling law: ``regmixup@pinto-2022``: One lambda is drawn for the whole batch. It is not folded to max(lam, 1-lam). The
partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.

Cost: A step takes 2.0 times a vanilla step, in FLOPs and in what is kept for the backward pass.

Batches: Clean and mixed images go through the model as one batch of twice the size, the clean ones first, as in the
reference code. So BatchNorm normalises both by the statistics of both, and its running statistics are of both.

Deviations: The reference code averages over both halves, so its loss is half of this one. ``averaged=True`` divides by
``1 + eta``, as in the runs of its commands. Its two Beta parameters are equal in all of these runs. Here they are one.
Only the abstract of the paper was read for this file.

Kind: input, label.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import ops
from .base import Criterion, Mixer, Out, Plan


class RegMixup(Mixer):
    """Learn from the clean batch, and from its Mixup beside it.

    ``alpha`` is the Beta parameter and must be above 0. ``eta`` is the weight of the mixed batch and must be at
    least 0. ``averaged`` divides the loss by ``1 + eta``, as the reference code does.
    """

    def __init__(self, alpha: float = 20.0, eta: float = 1.0, averaged: bool = False):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_between("eta", eta, 0.0)
        ops.check_choice("averaged", averaged, (False, True))
        self.alpha = alpha
        self.eta = eta
        self.averaged = averaged

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,) and a constant ``mask`` (B, 1, 1, 1)."""
        lam = ops.beta(self.alpha, self.alpha, rng)
        return {"index": ops.partners(x, rng), "mask": ops.per_sample(lam, x).view(-1, 1, 1, 1)}

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward of both batches; the logits and the target of the step are those of the mixed one."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng)
        mixed, target = self.mix(x, y, **plan)
        clean, logits = model(torch.cat([x, mixed])).chunk(2)
        share = 1 / (1 + self.eta) if self.averaged else 1.0
        parts = {"mix": share * self.eta * criterion(logits, target), "clean": share * criterion(clean, y)}
        return Out.of(logits, target, plan, **parts)
