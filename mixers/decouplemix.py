"""DecoupleMix: Harnessing Hard Mixed Samples with Decoupled Regularizer. Liu, Li, Wu, et al. NeurIPS 2023.

https://arxiv.org/abs/2203.10761, code in OpenMixup https://github.com/Westlake-AI/openmixup

Formula: A sample is mixed of classes a and b. The partner's class leaves the denominator of the softmax,
``p(a without b) = exp z_a / sum over c != b of exp z_c``, so that both classes can be certain at once: ``loss = loss of
the base mixer - eta * (lam^power * log p(a without b) + (1-lam)^power * log p(b without a))``. Samples of one class, or
of one image (lam 0 or 1), have the base's loss alone.

Published defaults: eta = 0.1, and both terms weigh alike (power = 0). OpenMixup's ImageNet configurations weight the
terms by their shares, power = 1, over Mixup with alpha = 1. ``decouplemix`` puts it over the same Mixup.

For binary cross entropy the paper lifts the targets instead: a share t becomes ``min(1, (t/two_hot)^xi)``, so that both
classes count as present. ``DecoupleMix(base, eta=0, two_hot=0.8)`` is that, with xi = 1.

Sampling law: ``decouplemix@liu-2023``: The law is that of the base. Nothing else is drawn.

Cost: A step takes two logsumexp per sample besides.

Deviations: a and b are the largest entries of the two unmixed targets. lam, one per sample, is read off the mixed
target. So label smoothing is right, and so is any mixer that plans ``index``. OpenMixup orders eta by the class numbers
of the first sample, decouples a smoothed target into ones, and leaves out lam = 0.5 and shares of at most 0.001. Where
both samples are of one class, its two-hot target is the sum of both lifted shares, up to 1.25. Here it is at most 1.

Kind: label.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops
from .base import Criterion, Mixer, Out, Plan
from .compose import inmost
from .registry import build


class DecoupleMix(Mixer):
    """Add the decoupled regulariser to a mixer.

    ``base`` performs the step. Its plan must name each partner, as ``index``. ``eta`` weights the regulariser and must
    be at least 0. ``power``, at least 0, is the power of the share that weights its terms. ``two_hot``, in (0, 1],
    lifts the targets for a binary cross entropy, with the exponent ``xi`` above 0. If it is None, the targets stay as
    they are.
    """

    def __init__(
        self, base: Mixer, eta: float = 0.1, power: float = 0.0, two_hot: float | None = None, xi: float = 1.0
    ):
        super().__init__()
        if not isinstance(base, Mixer):
            raise ValueError(f"base must be a mixer, got {base!r}")
        ops.check_between("eta", eta, 0.0)
        ops.check_between("power", power, 0.0)
        if two_hot is not None:
            ops.check_between("two_hot", two_hot, 1e-3, 1.0)
        ops.check_positive("xi", xi)
        self.base = base
        self.eta = eta
        self.one_label = eta > 0  # the regulariser is of a softmax, and of two classes
        self.power = power
        self.two_hot = two_hot
        self.xi = xi

    def setup(self, model: nn.Module) -> None:
        """Raises ``ValueError`` for a base that mixes more than two samples, or one with an earlier batch."""
        for mixer in self.base.modules():
            if isinstance(mixer, Mixer) and not mixer.pairs:
                raise ValueError(
                    f"DecoupleMix needs a base that mixes each sample with one partner of its batch, got "
                    f"{type(mixer).__name__}({mixer.extra_repr()}); "
                    "use mixup, cutmix, puzzlemix or another such mixer"
                )
        self.base.setup(model)

    def plan(self, x: Tensor, y: Tensor, rng: np.random.Generator, *look: Any) -> Plan:
        """The plan of the base."""
        return self.base.plan(x, y, rng, *look)

    def mix(self, x: Tensor, y: Tensor, **plan: Any) -> tuple[Tensor, Tensor]:
        return self.base.mix(x, y, **plan)

    def forward(self, model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, rng: np.random.Generator) -> Out:
        """The base's own step, with the regulariser added; none where the step mixed nothing (an empty plan)."""

        def lifted(logits: Tensor, target: Tensor) -> Tensor:
            if self.two_hot is not None:
                target = (target / self.two_hot).clamp(max=1) ** self.xi
            return criterion(logits, target)

        out = self.base(model, lifted, x, y, rng)
        plan = inmost(out.plan)
        if "index" in plan and plan["index"].ndim == 1:
            part = (
                self.eta * self.regulariser(out.logits, y, out.target.detach(), plan["index"], plan.get("lam")).mean()
            )
        elif set(plan) <= {"choice"}:
            part = out.loss.new_zeros(())
        else:
            raise ValueError(f"DecoupleMix needs a base whose plan has index (B,), one partner for each; got {[*plan]}")
        return out._replace(loss=out.loss + part, logs=out.logs | {"decouple": part.detach()})

    def regulariser(
        self,
        logits: Float[Tensor, "B K"],
        y: Float[Tensor, "B K"],
        target: Float[Tensor, "B K"],
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " B"]:
        """The two decoupled terms of each sample; 0 where it is not of two classes. Without ``lam``: by the target."""
        a = y.argmax(1)
        b = a[index]
        if lam is None:
            own, partner, mixed = (t.gather(1, a[:, None])[:, 0] for t in (y, y[index], target))
            lam = torch.where(own > partner, (mixed - partner) / (own - partner), 1.0).clamp(0, 1)
        two = (a != b) & (lam > 0) & (lam < 1)
        with ops.full_precision(logits.device):
            z = logits.to(torch.promote_types(logits.dtype, torch.float32))
            terms = lam**self.power * without(z, a, b) + (1 - lam) ** self.power * without(z, b, a)
        return torch.where(two, -terms, 0.0)

    def after_step(self, model: nn.Module, progress: float) -> None:
        self.base.after_step(model, progress)

    def models(self, model: nn.Module) -> dict[str, nn.Module]:
        """The classifiers of the base."""
        return self.base.models(model)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The groups of the base."""
        return self.base.param_groups(lr, weight_decay)


def decouplemix(
    base: Mixer | None = None, eta: float = 0.1, power: float = 0.0, two_hot: float | None = None, xi: float = 1.0
) -> DecoupleMix:
    """Put the regulariser over ``base``.

    If ``base`` is None, it is Mixup with alpha = 1, as in OpenMixup's ImageNet configurations.
    """
    return DecoupleMix(build("mixup", alpha=1.0) if base is None else base, eta, power, two_hot, xi)


def without(z: Float[Tensor, "B K"], a: Int[Tensor, " B"], b: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Log probability of class ``a`` when class ``b`` is none."""
    others = z.scatter(1, b[:, None], -torch.inf)
    return z.gather(1, a[:, None])[:, 0] - torch.logsumexp(others, 1)
