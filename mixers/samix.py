"""SAMix: Boosting Discriminative Visual Representation Learning with Scenario-Agnostic Mixup. Li et al. 2021.

https://arxiv.org/abs/2111.15454, reference code https://github.com/Westlake-AI/openmixup

Formula: This is the step of AutoMix (``automix.AutoMix``) with another mix block. Lambda multiplies the maps,
``a = z*(1 + r(lam))`` and ``b = z[index]*(2 - r(lam))``. Query and key are two different layers on ``[a; b]``. The
value is a small network of b, ``V(b) = dropout(W2 ELU(BN(W1 b)))``. Then
``u = softmax(Q([a; b])^T K([a; b]) / sqrt(d)) V(b)`` and ``mask = 1 - sigmoid(upsample(u))``.
``L_mask = gamma * (max(0, |mean(mask) - lam| - 0.1) - 2*Var(mask))`` over all pixels of the batch. So a mask of one
value for all pixels is worth less, and the loss can be negative.

``r(lam) = lam``. With ``lam_mul_k >= 0`` and ``c = lam_mul_k + 1`` it is the curve
``r(lam) = (4/3 lam^3 - 2 lam^2 + c lam) / (c - 2/3)`` instead. The curve fixes 0, 1/2 and 1.

Published defaults: The defaults are those of AutoMix, with dropout 0.1 and bilinear upsampling on ImageNet (OpenMixup).

Sampling law: ``samix@openmixup-2022``: The law is that of AutoMix. In addition dropout switches positions of the value
off, by a draw for each sample and position. The draw is the same in every micro-batch of an update.

Cost: A step takes 2.9 (DeiT-S) to 3.1 (ResNet-50) times the FLOPs of a vanilla step.

Deviations: Those of AutoMix hold here too. OpenMixup's ``neg_weight`` (eta) is 1 on ImageNet and 0.5 on Tiny-ImageNet.
It weights the classes that are not mixed, whose share in the target is 0, so in a softmax cross entropy it multiplies
zeros. There is no such argument here. The running statistics of the mix block see the two masks in another order. No
step reads these statistics.

Kind: input, learned.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import blocks, ops
from .base import Mixer
from .registry import found_at


class SAMixBlock(nn.Module):
    """Make mask logits of the partner from the map of a sample and that of its partner.

    ``lam_mul_k`` sets the curve of lambda; -1 is the straight line. ``dropout``, in [0, 1), is that of the value.
    ``upsample`` is "bilinear" or "nearest". ``setup`` makes the layers.
    """

    def __init__(self, lam_mul_k: float | int = -1, dropout: float = 0.1, upsample: str = "bilinear"):
        super().__init__()
        if lam_mul_k != -1:
            ops.check_between("lam_mul_k", lam_mul_k, 0.0)
        ops.check_between("dropout", dropout, 0.0, 0.99)
        ops.check_choice("upsample", upsample, ("bilinear", "nearest"))
        self.lam_mul_k, self.dropout, self.upsample = lam_mul_k, dropout, upsample

    def setup(self, channels: int) -> None:
        """Layers for a map of so many channels."""
        inner = max(1, channels // 2)
        self.query, self.key = blocks.pointwise(2 * channels, inner), blocks.pointwise(2 * channels, inner)
        first, second = blocks.pointwise(channels, inner, bias=False), blocks.pointwise(inner, 1, bias=False)
        self.value = nn.Sequential(first, nn.BatchNorm2d(inner), nn.ELU(), second)

    def noise(self, z: Float[Tensor, "B c h w"], rng: np.random.Generator) -> Float[Tensor, "B 1 h w"] | None:
        """What dropout multiplies the value by: 0, or what keeps its mean."""
        if not self.dropout or not self.training:
            return None
        kept = rng.random((len(z), 1, *z.shape[2:])) >= self.dropout
        return ops.send(kept / (1 - self.dropout), z).to(z.dtype)

    def project(self, z: Float[Tensor, "B c h w"]) -> list[Tensor]:
        """What the layers make of the map alone: they are linear, so that partner, factor and bias can come later."""
        halves = [half for layer in (self.query, self.key) for half in layer.weight.chunk(2, 1)]
        return blocks.project(z, *halves, self.value[0].weight)  # type: ignore[arg-type]

    def forward(
        self,
        projected: Sequence[Tensor],
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"],
        noise: Float[Tensor, "B 1 h w"] | None = None,
    ) -> Float[Tensor, "B 1 h w"]:
        """``lam`` is the share of the sample itself; ``projected``, ``noise``: from the methods of these names."""
        share = blocks.as_column(curve(lam, self.lam_mul_k), projected[0])
        query_a, query_b, key_a, key_b, value_b = projected
        query = query_a * (1 + share) + query_b[index] * (2 - share) + self.query.bias[:, None, None]  # type: ignore[index]
        key = key_a * (1 + share) + key_b[index] * (2 - share) + self.key.bias[:, None, None]  # type: ignore[index]
        value = self.value[1:](value_b[index] * (2 - share))
        return blocks.attend(query, key, value if noise is None else value * noise)

    def mask_loss(self, mask: Float[Tensor, "B 1 H W"], lam: Float[Tensor, " B"]) -> Tensor:
        """How far the mean of all masks is from the mean of lambda, beyond a tolerance, minus twice their variance."""
        return blocks.excess(mask, lam) - 2 * mask.var(correction=0)

    def extra_repr(self) -> str:
        return f"lam_mul_k={self.lam_mul_k}, dropout={self.dropout}, upsample={self.upsample!r}"


def samix(
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
    lam_mul_k: float | int = -1,
    dropout: float = 0.1,
    upsample: str = "bilinear",
) -> Mixer:
    """Make the step of AutoMix with this mix block. It takes the arguments of both, ``AutoMix`` and ``SAMixBlock``."""
    step: Callable[..., Mixer] = found_at("automix:AutoMix")  # papers do not import each other
    return step(
        block=SAMixBlock(lam_mul_k, dropout, upsample),
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


def curve(lam: Float[Tensor, " B"], k: float | int) -> Float[Tensor, " B"]:
    """``r(lam)``: the straight line for -1; monotone for k >= 0."""
    return lam if k == -1 else (4 / 3 * lam**3 - 2 * lam**2 + (k + 1) * lam) / (k + 1 - 2 / 3)
