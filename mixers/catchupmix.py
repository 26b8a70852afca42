"""Catch-up Mix: Catch-up Class for Struggling Filters in CNN. Kang, Kang, Kim. AAAI 2024.

https://arxiv.org/abs/2401.13193, code https://github.com/kdst-team/CatchupMix, which could not be had

Formula: A place is drawn from {the images, after the first convolution, after each of the four stages}. In a hidden
feature h the influence of channel c is ``|h_c| / sum over all channels of |h_c|``, with the Euclidean norm over its
positions. The sample keeps the ``floor(lam*C)`` of its C channels whose influence is lowest compared with the
partner's, ``influence(h_c) - influence(h[index]_c)``. The partner's channels take the place of the others.
``y' = lam*y + (1-lam)*y[index]``, with ``lam ~ Beta(alpha, alpha)``. Images are mixed by CutMix with the same alpha.
The gradient flows through both features, but not through the choice.

Published defaults: The places are 0 to 5, as above. The published alpha could not be read; 1 is CutMix's.

Sampling law: ``catchupmix@kang-2024``: One place and one lambda are drawn for the whole batch. All places are equally
likely. The partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own
partner.

Cost: A step takes one forward and one backward, the norms of one feature's channels, and two sorts of as many numbers.

Deviations: Neither the code nor the whole text of the paper could be had. These parts could be read: the abstract, the
caption of figure 2 (norms of a pair are compared, the maps with the lower ones are mixed by a mask), summaries of
others (a relative influence of filters, a mask that is 0 or 1, the places 0 to 5 with CutMix at 0), and, in the
authors' code for GuidedMixup, where such places lie. Three things are taken from the code of others
(https://github.com/JohnR31N/AllTheMiXLA): that the influence is a share of the sum, that the two of a pair are
subtracted, and the rounding of ``lam*C``. So nothing was compared with the original. The placement is ours: The stages
are the last four published ones. In a ViT they are four quarters of its blocks, with all of its tokens. The first place
is before the norm of the first convolution.

Kind: input, feature.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan


class CatchUpMix(Mixer):
    """Keep the channels that count least and take the others of a partner, or paste a box of its image.

    ``alpha`` is the Beta parameter, also that of the box, and must be above 0.
    """

    inside = True

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        ops.check_positive("alpha", alpha)
        self.alpha = alpha

    def setup(self, model: nn.Module) -> None:
        """Find the modules whose output is mixed. Raises ``ValueError`` without published stages or a convolution."""
        stages = taps.parts(model)
        self.modules_mixed = ["", taps.first_convolution(model), *stages]

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``layer``: 0 the images, or the place in ``modules_mixed``; ``lam`` (B,), ``index`` (B,).

        ``mask`` (B, 1, H, W) is CutMix's, with ``lam`` its exact mean; None where a hidden feature is mixed.
        """
        layer, lam, mask = int(rng.integers(len(self.modules_mixed))), ops.beta(self.alpha, self.alpha, rng), None
        if layer == 0:
            height, width = x.shape[-2:]
            top, bottom, left, right = ops.clipped_box(height, width, lam, rng)
            lam = 1 - (bottom - top) * (right - left) / (height * width)
            mask = ops.box_mask(top, bottom, left, right, x)
        return {"index": ops.partners(x, rng), "layer": layer, "lam": ops.per_sample(lam, x), "mask": mask}

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        layer: int,
        lam: Float[Tensor, " B"],
        mask: Float[Tensor, "B 1 H W"] | None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Mixed targets, and the images: mixed for layer 0, as they are when it is a hidden feature that is mixed."""
        ops.check_batch(x, y)
        return x if mask is None else ops.blend(x, index, mask), ops.blend_targets(y, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward, with the planned place mixed."""
        plan = self.plan(x, y, rng)
        mixed, target = self.mix(x, y, **plan)
        if plan["layer"] == 0:
            logits = model(mixed)
        else:
            name = self.modules_mixed[plan["layer"]]

            def change(h: Tensor) -> Tensor:
                return swap(h, plan["index"], plan["lam"], taps.channel_axis(model, name, h))

            with taps.edit(model, name, change):
                logits = model(mixed)
        return Out.of(logits, target, plan, mix=criterion(logits, target))


def swap(
    h: Float[Tensor, "B *rest"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"], axis: int
) -> Float[Tensor, "B *rest"]:
    """The kept channels of each sample, and the partner's in place of the others. ``axis``: that of the channels."""
    keep = kept(h.detach().movedim(axis, 1).flatten(2), index, lam)
    keep = keep.view(*keep.shape, *[1] * (h.ndim - 2)).movedim(1, axis)
    return torch.where(keep, h, h[index])


def kept(h: Float[Tensor, "B C P"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"]) -> Bool[Tensor, "B C"]:
    """Which channels of each sample stay: ``floor(lam*C)``, those of the lowest influence beside the partner's."""
    with ops.full_precision(h.device):
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=2)
        total = norm.sum(1, keepdim=True)
        influence = norm / total.clamp(min=torch.finfo(norm.dtype).tiny)
        rank = (influence - influence[index]).argsort(dim=1, stable=True).argsort(dim=1)
        return rank < (lam[:, None] * h.shape[1]).floor()
