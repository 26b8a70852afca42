"""AutoMix: Unveiling the Power of Mixup for Stronger Classifiers. Liu et al. ECCV 2022 (oral).

https://arxiv.org/abs/2103.13027, reference code https://github.com/Westlake-AI/openmixup

Formula: q is the model in training and k is its momentum encoder. Each has two classifiers on one feature, one for
mixed and one for clean images. The mix block makes a mask of the hidden map z of k at stride 16. With ``a = [z; lam]``
and ``b = [z[index]; 1-lam]``, where lambda is one more channel, ``u = softmax(Q(a)^T Q(b) / sqrt(d)) V(b)`` and
``mask = 1 - sigmoid(upsample(u))``. One step draws two lambdas and two partners, and mixes two batches:

* x_q, its mask without gradient, trains the classifier: ``L_mix = CE(q(x_q), y_q) + CE(q_one_hot(x), y)``;
* x_k trains the mix block, through the frozen k: ``L_generator = CE(k(x_k), y_k)``, and
  ``L_mask = gamma * max(0, |mean(mask) - lam| - 0.1)`` over all pixels of the batch.

``y' = lam*y + (1-lam)*y[index]`` with the drawn lambda. After the update k follows q: ``k <- m*k + (1-m)*q``.

Published defaults: alpha = 2, margin 0.08, gamma from 0.1 to 0, m from 0.999 to 0.99999 (OpenMixup, ImageNet).

Sampling law: ``automix@openmixup-2022``: lambda ~ Beta(alpha, alpha) is drawn twice, once for the batch of the
classifier and once for that of the mix block. Each batch has a uniformly random permutation as partners. Fixed points
are allowed: an image may be its own partner. Where the classifier's lambda or one minus it is at most the margin (3.6 %
of the steps), its batch is plain Mixup. ``switch_off`` is the share of the steps that train the mix block through k; 0
and 1 both mean every step.

Cost: A step takes 2.9 (DeiT-S) to 3.0 (ResNet-50) times the FLOPs of a vanilla step. In memory, k and its gradients
with respect to the mask come on top.

What is reported: The reported model is the classifier of k for mixed images (``""``). The published numbers are usually
of this one. The other three are evaluated and exported beside it: ``k_one``, ``q`` and ``q_one``.

Deviations: Where later layers keep no statistics (DeiT, Swin, PVT, ConvNeXt), k stops behind the stage that masks are
made from. The result is the same. Both masks of a step share one projection of the map. The classifier for clean images
starts from the numbers of the other one. OpenMixup makes the mask of the classifier's batch also where the margin
discards it; here it is not made. OpenMixup's ViT configurations keep this behaviour of ``switch_off``. The paper trains
the mix block in every step. OpenMixup's hook multiplies gamma's cosine factor onto the value of the last update. So
gamma is below a tenth of its start after 2 % of the ImageNet runs, and 0 in effect for the rest. That is
``mask_loss_law = "compounded"``, which the settings of its tables take. The default goes from start to end over the
whole training. OpenMixup's encoder takes the momentum of the progress before an update. Here the momentum is that of
the progress behind it. The gap is at most 0.000145, in the update at which the delay ends.

Kind: input, learned.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import blocks, ops, taps
from .base import Criterion, Mixer, Out, Plan


class MixBlock(nn.Module):
    """Make mask logits of the partner from the map of a sample and that of its partner. Query and key share one layer.

    ``lam_concat`` gives lambda as one more channel. Without it, as on Tiny-ImageNet, the mask does not know lambda.
    ``upsample`` is "nearest" or "bilinear". ``setup`` makes the layers.
    """

    def __init__(self, lam_concat: bool = True, upsample: str = "nearest"):
        super().__init__()
        ops.check_choice("lam_concat", lam_concat, (False, True))
        ops.check_choice("upsample", upsample, ("nearest", "bilinear"))
        self.lam_concat, self.upsample = lam_concat, upsample

    def setup(self, channels: int) -> None:
        """Layers for a map of so many channels."""
        self.query_key = blocks.pointwise(channels + self.lam_concat, max(1, channels // 2))
        self.value = blocks.pointwise(channels + self.lam_concat, 1)

    def noise(self, z: Tensor, rng: np.random.Generator) -> None:
        """Nothing is random in this block."""

    def project(self, z: Float[Tensor, "B c h w"]) -> list[Tensor]:
        """What the layers make of the map alone: layers are linear, so that lambda and bias can be added later."""
        return blocks.project(z, self.query_key.weight[:, : z.shape[1]], self.value.weight[:, : z.shape[1]])

    def forward(
        self, projected: Sequence[Tensor], index: Int[Tensor, " B"], lam: Float[Tensor, " B"], noise: None = None
    ) -> Float[Tensor, "B 1 h w"]:
        """``lam`` is the share of the sample itself, ``projected`` comes from ``project``."""
        own = blocks.as_column(lam, projected[0])

        def complete(layer: nn.Conv2d, part: Tensor, share: Tensor) -> Tensor:
            part = part + layer.weight[:, -1] * share if self.lam_concat else part
            return part + layer.bias[:, None, None]  # type: ignore[index]

        query = complete(self.query_key, projected[0], own)
        key = complete(self.query_key, projected[0][index], 1 - own)
        return blocks.attend(query, key, complete(self.value, projected[1][index], 1 - own))

    def mask_loss(self, mask: Float[Tensor, "B 1 H W"], lam: Float[Tensor, " B"]) -> Tensor:
        """How far the mean of all masks is from the mean of lambda, beyond a tolerance."""
        return blocks.excess(mask, lam)

    def extra_repr(self) -> str:
        return f"lam_concat={self.lam_concat}, upsample={self.upsample!r}"


class AutoMix(Mixer):
    """Learn masks and classifier together. SAMix is the same step with another ``block``.

    ``block`` makes masks. ``alpha`` is the Beta parameter and must be above 0. ``margin`` says how near to 0 or 1 a
    lambda mixes by a constant. ``switch_off`` is the share of the steps that train the block through the momentum
    encoder. ``momentum`` is that of the encoder at the start. From the share ``momentum_delay`` of the training on it
    follows a cosine to ``momentum_end``. ``mask_loss`` and ``mask_loss_end`` are the weights of the mask's loss at the
    start and at the end. ``mask_loss_law`` is "cosine", over the whole training, or "compounded", where each update's
    cosine factor is applied to what the last one left, as in OpenMixup. ``block_lr`` and ``block_min_lr`` are the ends
    of the block's own cosine, without warm-up. If ``block_lr`` is None, it is the recipe's ``lr``. If ``block_min_lr``
    is None, it is a hundredth of where the cosine starts. ``block_momentum`` is the momentum of SGD for the block. If
    it is None, it is the recipe's.
    """

    def __init__(
        self,
        block: nn.Module,
        alpha: float = 2.0,
        margin: float = 0.08,
        switch_off: float = 1.0,
        momentum: float = 0.999,
        momentum_end: float = 0.99999,
        momentum_delay: float = 0.1,
        mask_loss: float = 0.1,
        mask_loss_end: float = 0.0,
        mask_loss_law: str = "cosine",
        block_lr: float | None = None,
        block_min_lr: float | None = None,
        block_momentum: float | None = None,
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_between("margin", margin, 0.0, 0.5)
        ops.check_between("switch_off", switch_off, 0.0, 1.0)
        for name, value in (("mask_loss", mask_loss), ("mask_loss_end", mask_loss_end)):
            ops.check_between(name, value, 0.0)
        ops.check_choice("mask_loss_law", mask_loss_law, ("cosine", "compounded"))
        blocks.check_rates(momentum, momentum_end, momentum_delay, block_lr, block_min_lr, block_momentum)
        self.block = block
        self.alpha = alpha
        self.margin = margin
        self.switch_off = switch_off
        self.momentum = momentum
        self.momentum_end = momentum_end
        self.momentum_delay = momentum_delay
        self.mask_loss = mask_loss
        self.mask_loss_end = mask_loss_end
        self.mask_loss_law = mask_loss_law
        self.block_lr = block_lr
        self.block_min_lr = block_min_lr
        self.block_momentum = block_momentum

    def setup(self, model: nn.Module) -> None:
        """Classifier for clean images, momentum encoder, mix block. ``ValueError`` for a model without stages."""
        stage = blocks.mixed_stage(model)
        self.one_hot = copy.deepcopy(taps.classifier(model))
        self.encoder = blocks.MomentumEncoder(model, self.one_hot, *stage)
        self.block.setup(self.encoder.channels)  # type: ignore[operator]
        self.register_buffer("gamma", torch.tensor(float(self.mask_loss)))

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """``index`` (B,), ``mask``, ``lam`` (B,) of the classifier's batch; ``generator``: those of the mix block's.

        ``look``: what the mix block makes of the momentum encoder's map.
        """
        ops.check_look(look)
        projected = look[0]
        lam, lam_k = ops.beta(self.alpha, self.alpha, rng), ops.beta(self.alpha, self.alpha, rng)
        run = self.switch_off == 0 or bool(rng.random() <= self.switch_off)
        index, index_k = ops.partners(x, rng), ops.partners(x, rng)
        noise, noise_k = (self.block.noise(projected[0], rng) for _ in range(2))  # type: ignore[operator]
        share, share_k = ops.per_sample(lam, x), ops.per_sample(lam_k, x)
        if min(lam, 1 - lam) <= self.margin:
            mask = share[:, None, None, None]
        else:
            with torch.no_grad():
                mask = self.mask(projected, x, index, share, noise)
        generator = {"index": index_k, "lam": share_k, "noise": noise_k, "run": run}
        return {"index": index, "mask": mask, "lam": share, "generator": generator}

    def look(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The momentum encoder's map of clean images, as the mix block projects it, at least in float32."""
        z = blocks.up_cast(self.encoder.look(x), self.block)
        with ops.full_precision(x.device):
            return self.block.project(z)  # type: ignore[operator]

    def mask(
        self,
        projected: Sequence[Tensor],
        x: Float[Tensor, "B C H W"],
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"],
        noise: Any,
    ) -> Float[Tensor, "B 1 H W"]:
        """1 where the sample itself stays, of the size of the images, at least in float32."""
        with ops.full_precision(x.device):
            partner = self.block(projected, index, lam, noise)
            return torch.sigmoid(-blocks.resized(partner, tuple(x.shape[2:]), self.block.upsample))  # type: ignore[arg-type]

    def masks_for(
        self, x: Float[Tensor, "B C H W"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"]
    ) -> Float[Tensor, "B 1 H W"]:
        """The masks of given pairs, without dropout: to look at."""
        return self.mask(self.look(x), x, index, lam, None)

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        mask: Float[Tensor, "B 1 h w"],
        lam: Float[Tensor, " B"],
        generator: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """The classifier's batch; that of the mix block does not enter it."""
        return super().mix(x, y, index=index, mask=mask, lam=lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """Classifier and mix block, each on a batch of its own, in one backward pass."""
        ops.check_batch(x, y)
        projected = self.look(x)
        plan = self.plan(x, y, rng, projected)
        index, lam, noise, run = (plan["generator"][key] for key in ("index", "lam", "noise", "run"))
        mask = self.mask(projected, x, index, lam, noise)
        parts = {"mask": self.gamma * self.block.mask_loss(mask, lam)}  # type: ignore[operator]
        if run:
            mixed, target = super().mix(x, y, index=index, mask=mask, lam=lam)
            parts["generator"] = criterion(self.encoder.model(mixed), target)
        parts["one_hot"] = criterion(blocks.with_classifier(model, self.one_hot)(x), y)
        mixed, target = self.mix(x, y, **plan)
        logits = model(mixed)
        return Out.of(logits, target, plan, mix=criterion(logits, target), **parts)

    def after_step(self, model: nn.Module, progress: float) -> None:
        """The encoder follows the model; the weight of the mask's loss moves on."""
        momentum = blocks.momentum_at(progress, self.momentum, self.momentum_end, self.momentum_delay)
        self.encoder.follow(model, self.one_hot, momentum)
        gamma, end = self.get_buffer("gamma"), self.mask_loss_end
        if self.mask_loss_law == "cosine":
            gamma.fill_(blocks.cosine(self.mask_loss, end, progress))
        else:
            gamma.sub_(end).mul_(blocks.cosine(1.0, 0.0, progress)).add_(end)

    def models(self, model: nn.Module) -> dict[str, nn.Module]:
        """``""``, ``k_one``, ``q``, ``q_one``: see ``MomentumEncoder.classifiers``."""
        return self.encoder.classifiers(model, self.one_hot)

    def compiled(self) -> list[nn.Module]:
        """What makes the masks."""
        return [self.block]

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The second classifier like the model's own; what makes the masks with its own rates."""
        start = lr if self.block_lr is None else self.block_lr
        return blocks.learning_groups(self.one_hot, self.block, start, self.block_min_lr, self.block_momentum)


def automix(
    *,
    alpha: float = 2.0,
    margin: float = 0.08,
    switch_off: float = 1.0,
    momentum: float = 0.999,
    momentum_end: float = 0.99999,
    momentum_delay: float = 0.1,
    mask_loss: float = 0.1,
    mask_loss_end: float = 0.0,
    mask_loss_law: str = "cosine",
    block_lr: float | None = None,
    block_min_lr: float | None = None,
    block_momentum: float | None = None,
    lam_concat: bool = True,
    upsample: str = "nearest",
) -> AutoMix:
    """Make the step with its own mix block. It takes the arguments of both, ``AutoMix`` and ``MixBlock``."""
    return AutoMix(
        MixBlock(lam_concat, upsample),
        alpha=alpha,
        margin=margin,
        switch_off=switch_off,
        momentum=momentum,
        momentum_end=momentum_end,
        momentum_delay=momentum_delay,
        mask_loss=mask_loss,
        mask_loss_end=mask_loss_end,
        mask_loss_law=mask_loss_law,
        block_lr=block_lr,
        block_min_lr=block_min_lr,
        block_momentum=block_momentum,
    )
