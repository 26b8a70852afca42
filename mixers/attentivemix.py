"""AttentiveMix+: Attentive CutMix: An Enhanced Data Augmentation Approach for Deep Learning Based Image
Classification. Walawalkar, Shen, Liu, Savvides. ICASSP 2020, in the form of OpenMixup, whose tables call it that.

https://arxiv.org/abs/2003.13048, code of the form here https://github.com/Westlake-AI/openmixup

Formula: a trained network looks at every image, resized to 224 x 224; its attention is the mean over channels of its
last feature, 7 x 7 cells for a ResNet. A sample keeps its ``k = floor(49*lam0)``, at least 1, most attended cells and
shows ``x[index]`` in the others; ``lam`` is the share of pixels kept, ``k/49`` where 7 divides the sides.

Published defaults: alpha = 2 (tables of OpenMixup); the teacher is ResNet-18 trained on ImageNet-1k (ResNet-50 for DeiT
and the other networks of that column).

Sampling law: ``attentivemix@openmixup-2022``: ``lam0 ~ Beta(alpha, alpha)``, one k for the whole batch, cells of each
sample's own attention, the first in reading order among equals; the partner is a uniformly random permutation of the
batch, fixed points allowed. ``beta=8`` is ``Beta(alpha, 8)``, which OpenMixup's documentation and configurations name
and no public version of its code draws.

Cost: one forward of the teacher at 224 x 224, whatever the size of the images: 1.8 GMAC per image for ResNet-18,
4.1 for ResNet-50.

Deviations: the teacher is in evaluation mode (OpenMixup's takes the statistics of the batch, and its running ones
drift). ``lam`` is counted in pixels, for each sample, where cells are not of one size. Attentive CutMix itself pastes 6
of 49 cells, by a single channel of ResNet-50, of images that are not normalised. The teacher sees images as the run
normalises them.

Kind: input; teacher.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from . import ops, taps
from .base import Mixer, Plan

SIDE = 224


class AttentiveMix(Mixer):
    """Keep the cells that a trained network attends to most, show the partner in the others.

    ``alpha`` > 0 and ``beta`` > 0 are the Beta parameters of the share kept; None: beta is alpha. ``teacher``: timm
    name, ``hf-hub:`` address or run folder of the trained network.
    """

    def __init__(self, alpha: float = 2.0, beta: float | None = None, teacher: str = "resnet18.tv_in1k"):
        super().__init__()
        ops.check_positive("alpha", alpha)
        if beta is not None:
            ops.check_positive("beta", beta)
        if not (isinstance(teacher, str) and teacher):
            raise ValueError(f"teacher must be the name of timm weights or a folder, got {teacher!r}")
        self.alpha = alpha
        self.beta = beta
        self.teacher = teacher
        self.frozen: taps.Frozen | None = None

    def setup(self, model: nn.Module) -> None:
        """Load the teacher. Raises ``ValueError`` when its weights cannot be had or it is made for other images."""
        self.frozen = taps.Frozen(self.teacher)
        like = next(self.frozen.model.parameters())
        try:
            self.attention(torch.zeros(1, 3, SIDE, SIDE, device=like.device, dtype=like.dtype))
        except (AssertionError, RuntimeError) as e:  # timm's layers assert the size that they are made for
            reason = " ".join(str(e).split())[:120]
            raise ValueError(
                f"the teacher {self.teacher!r} does not take images of {SIDE} x {SIDE} ({reason}); "
                "expected a network that does, such as 'resnet18.tv_in1k'"
            ) from None

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 1 in the cells kept, whose mean is the label's share."""
        lam = ops.beta(self.alpha, self.alpha if self.beta is None else self.beta, rng)
        index = ops.partners(x, rng)
        attention = self.attention(x)
        cells = attention[0].numel()
        kept = min(max(int(cells * lam), 1), cells)
        best = attention.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :kept]
        mask = attention.new_zeros(len(x), cells).scatter_(1, best, 1.0).view_as(attention)
        return {"index": index, "mask": F.interpolate(mask[:, None], x.shape[2:], mode="nearest")}

    @torch.no_grad()
    def attention(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w"]:
        """Mean over channels of the teacher's last feature, on the teacher's grid."""
        if self.frozen is None:
            raise ValueError("no teacher yet: setup(model) loads it")
        images = x if x.shape[2:] == (SIDE, SIDE) else F.interpolate(x, (SIDE, SIDE), mode="bilinear")
        teacher = self.frozen.model
        feature = teacher.forward_features(images)  # type: ignore[operator]
        kind = torch.promote_types(feature.dtype, torch.float32)
        return taps.to_map(teacher, feature, images).mean(1, dtype=kind)
