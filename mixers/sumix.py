"""SUMix: Mixup with Semantic and Uncertain Information. Qin, Jin, Zhu, Liao, El-Yacoubi, Gao. ECCV 2024.

https://arxiv.org/abs/2407.07805, reference code https://github.com/JinXins/SUMix

Formula: The base mixes the images and gives ``lam``. The model sees the clean images and the mixed ones. p and p' are
its predictions, without gradient. a and b are the classes of a sample and of its partner. N scales a vector to
length 1. Class by class, the distance of the mixed image from its sample is
    ``d = scale * N(softmax(p without b - p'))``, and its distance from the partner is
    ``e = scale * N(softmax(p[index] without a - p'))``,
where "without" puts a 0 in place of one class. The label follows what is near:
    ``lam' = lam*exp(-d_a) / (lam*exp(-d_a) + (1-lam)*exp(-e_b))``, ``y' = lam'*y + (1-lam')*y[index]``.
A second linear layer h on what the classifier is given says how uncertain each class is. ``u = N(softmax(h))`` is that
of the clean images and ``u'`` that of the mixed ones. With the cross-entropy CE of logits,
    ``loss = L(f(x'), y') + gamma * (lam*CE(exp(-(u+u'+d)), y) + (1-lam)*CE(exp(-(u[index]+u'+e)), y[index]))``.
h is dropped when the model is exported.

Published defaults: The base is CutMix with alpha = 0.2. gamma = 0.5 (1 on Tiny-ImageNet), scale = 100.

Sampling law: ``sumix@qin-2024``: The law is that of the base. Nothing else is drawn in a step.

Cost: A step takes a second step for the clean images, from which u learns. This makes 2 steps of the model itself.

Deviations: Only the abstract of the paper could be read. The formula is that of the reference code, except for a sign.
The reference code takes ``p' - p without b`` for d. This is larger the nearer the mixed image is to its sample, so lam'
goes to the class that the model sees less of. The README of the reference code says distance, as here. Its loss is
averaged over the batch before it is weighted, so the mean of lam' stands for each of them. This hides the error.
``as_released=True`` does both. The head of the reference code returns a name that it never makes. It runs once that is
mended. In the reference code ``scale`` is the number of images per process (100 on CIFAR and Tiny-ImageNet, 64 on
ImageNet, 16 on fine-grained sets), so a label would depend on how a batch is divided. Here it is an argument. The
published configuration of ImageNet has no layer h and takes the logits themselves for u, which pushes down the logit of
the right class. It is not here. L is the recipe's loss, with labels smoothed as the recipe says. a and b are the
largest entries of the targets.

Kind: label.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan
from .compose import check_base, inmost
from .registry import build

STD = 0.01  # of the initial weights of the second layer


class SUMix(Mixer):
    """Mix like ``base``, share the label by how near the mixed image is to both, and learn how uncertain classes are.

    ``base`` is a mixer whose plan names each partner, as ``index``. ``gamma`` weights the uncertainty and must be at
    least 0. ``scale``, above 0, scales the distance, each of whose K entries is about ``scale / sqrt(K)``.
    ``as_released`` takes the distance and the mean of the released code; the deviations say more. Raises ``ValueError``
    for a base that does more than mix images. A step raises it for a base that plans something else.
    """

    one_label = True  # the distance is between classes a and b

    def __init__(self, base: Mixer, gamma: float = 0.5, scale: float = 100.0, as_released: bool = False):
        super().__init__()
        check_base(base)
        ops.check_between("gamma", gamma, 0.0)
        ops.check_positive("scale", scale)
        ops.check_choice("as_released", as_released, (False, True))
        self.base = base
        self.gamma = gamma
        self.scale = scale
        self.as_released = as_released

    def setup(self, model: nn.Module) -> None:
        """Make the second layer. Raises ``ValueError`` for a model without a linear classifier."""
        head = taps.classifier(model)
        self.uncertainty = nn.Linear(
            head.in_features, head.out_features, device=head.weight.device, dtype=head.weight.dtype
        )
        nn.init.normal_(self.uncertainty.weight, std=STD)
        nn.init.zeros_(self.uncertainty.bias)

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """``index`` (B,), and as ``images`` the plan of ``base``; a step adds ``lam`` (B,), the share by distances.

        Where ``base`` mixes nothing, each sample is its own partner, so that its label stays as it is.
        """
        ops.check_look(look)
        images = self.base.plan(x, y, rng, *look)
        drawn = inmost(images)
        if drawn.keys() <= {"choice"}:  # the member that does not mix
            return {"index": torch.arange(len(x), device=x.device), "images": images}
        if "index" not in drawn:
            raise ValueError(f"SUMix needs a base whose plan has index, got {', '.join(drawn)}; use CutMix()")
        return {"index": drawn["index"], "images": images}

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        images: Plan,
        lam: Float[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """The images of ``base``, with labels by ``lam``, without it those of ``base`` too."""
        mixed, target = self.base.mix(x, y, **images)
        return mixed, target if lam is None else ops.blend_targets(y, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward of the clean images and one of the mixed ones."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng, model, criterion)
        index = plan["index"]
        mixed, shares = self.base.mix(x, torch.eye(len(x), device=x.device), **plan["images"])
        clean, uncertain = self.seen(model, x)
        logits, doubt = self.seen(model, mixed)
        with ops.full_precision(x.device):
            dtype = torch.promote_types(logits.dtype, torch.float32)
            a, share = y.argmax(1), shares.diagonal().to(dtype)  # 1 where a sample is its own partner
            p, seen = (z.detach().to(dtype).softmax(1) for z in (clean, logits))
            own, other = self.distances(p, seen, a, index)
            near = torch.stack([share.log() - taken(own, a), (1 - share).log() - taken(other, a[index])], 1).softmax(1)
            says = [torch.exp(-(u + doubt + d)) for u, d in ((uncertain, own), (uncertain[index], other))]
            of_own, of_partner = (
                F.cross_entropy(z, t.to(dtype), reduction="none") for z, t in zip(says, (y, y[index]), strict=True)
            )
            part = self.gamma * (share * of_own + (1 - share) * of_partner)
        learned = near[:, 0].mean().expand(len(x)) if self.as_released else near[:, 0]
        plan = plan | {"lam": learned}
        target = ops.blend_targets(y, index, learned)
        return Out.of(logits, target, plan, mix=criterion(logits, target), uncertainty=part)

    def seen(self, model: nn.Module, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
        """Logits, and how uncertain each class is, a vector of length 1."""
        with taps.entering(model, taps.classifier(model)) as vectors:
            logits = model(x)
        doubt = self.uncertainty(vectors[0])
        with ops.full_precision(x.device):
            return logits, F.normalize(doubt.to(torch.promote_types(doubt.dtype, torch.float32)).softmax(1), dim=1)

    def distances(
        self, clean: Float[Tensor, "B K"], mixed: Float[Tensor, "B K"], a: Int[Tensor, " B"], index: Int[Tensor, " B"]
    ) -> list[Float[Tensor, "B K"]]:
        """How far a mixed image is from its sample and from its partner, by predictions, class by class."""
        found = []
        for one, other in ((clean, a[index]), (clean[index], a)):
            away = one.scatter(1, other[:, None], 0.0) - mixed
            found.append(self.scale * F.normalize((-away if self.as_released else away).softmax(1), dim=1))
        return found


def sumix(base: Mixer | None = None, gamma: float = 0.5, scale: float = 100.0, as_released: bool = False) -> SUMix:
    """Make the method over ``base``, or over CutMix with alpha = 0.2, as in the published tables."""
    return SUMix(build("cutmix", alpha=0.2) if base is None else base, gamma, scale, as_released)


def taken(values: Float[Tensor, "B K"], at: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """One entry of each row."""
    return values.gather(1, at[:, None])[:, 0]
