"""AttentiveMix+. Attentive CutMix: An Enhanced Data Augmentation Approach for Deep Learning Based Image
Classification. Walawalkar, Shen, Liu, Savvides. ICASSP 2020, in the form of OpenMixup, whose tables call it that.

https://arxiv.org/abs/2003.13048, code of the form here https://github.com/Westlake-AI/openmixup

Formula: a trained network looks at every image, resized to 224 x 224. Its attention is the mean over channels of its
last feature, which has 7 x 7 cells for a ResNet. A sample keeps its ``k = floor(49*lam0)`` most attended cells, at
least one, and shows ``x[index]`` in the others. ``lam`` is the share of pixels kept. That is ``k/49`` where 7 divides
the sides.

Published defaults: alpha = 2 and a size of 224 (tables of OpenMixup). The teacher is a ResNet-18 that was trained on
ImageNet-1k. DeiT and the other networks of that column have a ResNet-50.

Sampling law: ``attentivemix@openmixup-2022``: ``lam0 ~ Beta(alpha, alpha)``, one k for the whole batch, cells of each
sample's own attention, the first in reading order among equals; the partner is a uniformly random permutation of the
batch, fixed points allowed. ``beta=8`` is ``Beta(alpha, 8)``, which OpenMixup's documentation and configurations name
and no public version of its code draws.

Cost: one forward of the teacher at 224 x 224, whatever the size of the images. That is 1.8 GMAC per image for
ResNet-18 and 4.1 for ResNet-50. A smaller ``teacher_size`` costs less.

Deviations: the teacher is in evaluation mode. (OpenMixup's takes the statistics of the batch, and its running ones
drift.) ``teacher_size`` is ours: a teacher that was trained on images of 32 pixels needs to see images of that size.
``lam`` is counted in pixels, for each sample, where the cells differ in size. Attentive CutMix itself pastes 6 of 49
cells, by a single channel of ResNet-50, of images that are not normalised. Here the teacher sees images as the run
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


class AttentiveMix(Mixer):
    """Keep the cells that a trained network attends to most, show the partner in the others.

    ``alpha`` > 0 and ``beta`` > 0 are the Beta parameters of the share that is kept. If ``beta`` is None, it equals
    alpha. ``teacher``: timm name, ``hf-hub:`` address or run folder of the trained network. ``teacher_size``: side in
    pixels, at least 1, at which the teacher sees the images.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float | None = None,
        teacher: str = "resnet18.tv_in1k",
        teacher_size: int = 224,
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        if beta is not None:
            ops.check_positive("beta", beta)
        if not (isinstance(teacher, str) and teacher):
            raise ValueError(f"teacher must be the name of timm weights or a folder, got {teacher!r}")
        ops.check_count("teacher_size", teacher_size, "of pixels")
        self.alpha = alpha
        self.beta = beta
        self.teacher = teacher
        self.teacher_size = teacher_size
        self.frozen: taps.Frozen | None = None

    def setup(self, model: nn.Module) -> None:
        """Load the teacher. Raises ``ValueError`` when its weights cannot be had or it is made for other images."""
        self.frozen = taps.Frozen(self.teacher)
        side, like = self.teacher_size, next(self.frozen.model.parameters())
        try:
            cells = self.attention(torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype))[0].numel()
        except (AssertionError, RuntimeError) as e:  # timm's layers assert the size that they are made for
            reason = " ".join(str(e).split())[:120]
            raise ValueError(
                f"the teacher {self.teacher!r} does not take images of {side} x {side} ({reason}); "
                "expected a network that does, such as 'resnet18.tv_in1k', or another teacher_size"
            ) from None
        if cells == 1:
            raise ValueError(
                f"the teacher {self.teacher!r} sees an image of {side} x {side} as one cell, so nothing would be "
                "mixed; expected a larger teacher_size, or a teacher with a smaller stride"
            )

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
        side = (self.teacher_size, self.teacher_size)
        images = x if x.shape[2:] == side else F.interpolate(x, side, mode="bilinear")
        teacher = self.frozen.model
        feature = teacher.forward_features(images)  # type: ignore[operator]
        kind = torch.promote_types(feature.dtype, torch.float32)
        return taps.to_map(teacher, feature, images).mean(1, dtype=kind)
