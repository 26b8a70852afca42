"""AlignMixup: Improving Representations By Interpolating Aligned Features. Venkataramanan et al. CVPR 2022.

https://arxiv.org/abs/2103.15375, reference code https://github.com/shashankvkt/AlignMixup_CVPR22

Formula: f and f' are the last feature maps of a sample and its partner, with P positions of C channels each. The
transport plan T (P, P) minimises ``sum_ij T_ij |f_i - f'_j|^2 - eps * entropy(T)`` with 1/P of the mass at each
position. ``R = P*T`` says which position of one corresponds to which of the other. With equal probability the partner
is laid over the sample, ``lam*f + (1-lam)*R f'``, or the sample over the partner, ``lam*R^T f + (1-lam)*f'``. The
result is then pooled and classified, with ``y' = lam*y + (1-lam)*y[index]`` and ``lam ~ Beta(alpha, alpha)``. The
gradient flows through both features, but not through R.

Published defaults: alpha = 2, eps = 0.1, at most 100 Sinkhorn iterations (reference code). This class aligns every
batch. The published method, ``alignmixup``, aligns half of the batches and mixes the input of the others.

Sampling law: ``alignmix@venkataramanan-2022``: One lambda and one direction are drawn for the whole batch. The partners
are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.

Which feature: The feature is the output of the last published stage. In ResNet, MogaNet and ConvNeXt this is what is
pooled (ConvNeXt normalises it afterwards). For the others the placement is ours. Swin is aligned before its last norm,
EfficientNet and MobileNet.V2 before their last 1x1 convolution. DeiT and PVT classify a class token, which no alignment
of the patches after the last attention can reach. They are aligned one published stage earlier (DeiT: after block 11 of
12, PVT: after stage 3). If there is a class token there already, it is blended as it is.

Deviations: Sinkhorn always takes its 100 iterations, in float32 also under autocast. (In bfloat16 it would stop after a
few iterations with a wrong plan.) It keeps the first result that meets the published stopping rule, a mean change of
the potentials below 0.1. This gives the same result without reading the device. With costs of the size that features
have, the iterations rarely converge before. The columns of R sum to 1; its rows need not, as in the reference code. The
paper's autoencoder is left out, because no code of it was published.

Kind: input, feature.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan
from .compose import Switch
from .registry import build

EPS, ITERATIONS, TOLERANCE = 0.1, 100, 0.1


class AlignMix(Mixer):
    """Blend the last feature with a partner's after aligning their positions.

    ``alpha`` is the Beta parameter and must be above 0.
    """

    inside = True

    def __init__(self, alpha: float = 2.0):
        super().__init__()
        ops.check_positive("alpha", alpha)
        self.alpha = alpha

    def setup(self, model: nn.Module) -> None:
        """Find the module whose output is aligned. Raises ``ValueError`` when the model does not publish stages."""
        names = taps.stages(model)
        with_class_token = getattr(model, "num_prefix_tokens", 0) > 0
        if len(names) < 1 + with_class_token:
            raise ValueError(f"AlignMix needs {1 + with_class_token} stages, {type(model).__name__} has {len(names)}")
        self.module_aligned = names[-1 - with_class_token]

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``lam`` (B,), ``over``: who is laid over the other's positions, "partner" or "sample", ``index`` (B,)."""
        lam = ops.beta(self.alpha, self.alpha, rng)
        over = "partner" if rng.integers(2) else "sample"
        return {"index": ops.partners(x, rng), "lam": ops.per_sample(lam, x), "over": over}

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"],
        over: str,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """The images as they are, it is a hidden feature that is mixed, and mixed targets."""
        ops.check_batch(x, y)
        return x, ops.blend_targets(y, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward, with the last feature aligned and mixed."""
        plan = self.plan(x, y, rng, model, criterion)
        images, target = self.mix(x, y, **plan)

        def change(h: Tensor) -> Tensor:
            like = ops.blend(h, plan["index"], plan["lam"].view(-1, 1, 1)) if h.ndim == 3 else h
            return taps.from_tokens(model, align(taps.to_tokens(model, h), **plan), like)

        with taps.edit(model, self.module_aligned, change):
            logits = model(images)
        return Out.of(logits, target, plan, mix=criterion(logits, target))


def alignmixup(alpha: float = 2.0, partner: str = "mixup") -> Switch:
    """Make the published method: align the last feature, or mix as ``partner`` does, with probability one half each.

    ``alpha`` is the Beta parameter of both and must be above 0. ``partner`` is "mixup", as in the reference code, whose
    numbers the tables print, or "manifoldmix", as in OpenMixup's configurations.
    """
    ops.check_choice("partner", partner, ("mixup", "manifoldmix"))
    return Switch([build(partner, alpha=alpha), AlignMix(alpha)])


def align(
    f: Float[Tensor, "B P C"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"], over: str
) -> Float[Tensor, "B P C"]:
    """Blend positions with those of the partner that correspond to them."""
    with ops.full_precision(f.device):
        own = f.to(torch.promote_types(f.dtype, torch.float32))
        partner = own[index]
        match = f.shape[1] * transport_plan(own, partner)
        if over == "partner":
            partner = match @ partner
        else:
            own = match.transpose(1, 2) @ own
        return torch.lerp(partner, own, lam.to(own.dtype)[:, None, None]).to(f.dtype)


@torch.no_grad()
def transport_plan(own: Float[Tensor, "B P C"], partner: Float[Tensor, "B P C"]) -> Float[Tensor, "B P P"]:
    """Entropic transport between positions with squared distances as costs, by Sinkhorn iterations on logarithms.

    Columns sum to 1/P up to rounding; rows as far as the iterations came. The stopping rule is that of the reference
    code, whose unit is that of the cost, over the whole batch; what comes after it is computed and dropped.
    """
    square = own.square().sum(2)[:, :, None] + partner.square().sum(2)[:, None, :]
    cost = torch.baddbmm(square, own, partner.transpose(1, 2), alpha=-2).clamp(min=0)
    score = cost / -EPS
    each = -math.log(own.shape[1])
    row, column = torch.zeros_like(score[:, :, 0]), torch.zeros_like(score[:, 0, :])
    done = torch.zeros((), dtype=torch.bool, device=own.device)
    for _ in range(ITERATIONS):
        row_next = each - log_sum_exp(score + column[:, None, :], 2)
        column_next = each - log_sum_exp(score + row_next[:, :, None], 1)
        change = EPS * (row_next - row).abs().sum(1).mean()
        row, column = torch.where(done, row, row_next), torch.where(done, column, column_next)
        done = done | (change < TOLERANCE)
    return torch.exp(score + row[:, :, None] + column[:, None, :])


def log_sum_exp(score: Tensor, dim: int) -> Tensor:
    """``torch.logsumexp`` of finite scores, to the last digit, where most lie far below the largest.

    A CPU takes ten times as long for an exponential that underflows. What is below exp(-87) adds nothing to the sum, in
    which the largest counts 1, so it may as well be exp(-87).
    """
    top = score.amax(dim, keepdim=True)
    return (score - top).clamp_(min=-87).exp_().sum(dim).log_().add_(top.squeeze(dim))
