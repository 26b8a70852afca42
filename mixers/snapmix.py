"""SnapMix: Semantically Proportional Mixing for Augmenting Fine-grained Data. Huang, Wang, Tao. AAAI 2021.

https://arxiv.org/abs/2012.04846, reference code https://github.com/Shaoli-Huang/SnapMix

Formula: A box of ``x[index]``, resized bilinearly with aligned corners, is pasted on another box of ``x``. S(x) is the
class activation map of a sample's own class: the classifier's weights of that class times the last feature, at each
position. The map is resized bilinearly to the image. Then its minimum is taken off, and it is divided by its sum.
``w_a = 1 - sum of S(x) inside the box`` and ``w_b = sum of S(x[index]) inside the partner's box`` need not sum to 1.
``loss = w_a*CE(y) + w_b*CE(y[index])``.

Published defaults: alpha = 5, every batch (paper, section 4; fine-grained sets).

Sampling law: ``snapmix@huang-2021``: Two boxes are drawn for the whole batch. Each is CutMix's box (half sides rounded
down, clipped) from a lambda of its own, ``Beta(alpha, alpha)``. The partners are a uniformly random permutation of the
batch. Fixed points are allowed: an image may be its own partner. When a box is empty, nothing is pasted and the weights
are 1 and 0.

The target is ``(w_a*y + w_b*y[index]) / (w_a + w_b)``, which is a distribution. A sample's loss is multiplied by
``w_a + w_b``. Cross entropies are linear in the target, so this is the formula to the bit of rounding.

Cost: A step takes one more forward, without gradient. This is a third of a plain step more.

Deviations: The map is made in evaluation mode. (The reference code makes it in training mode, which moves the running
statistics twice.) ``same_label_twice=True`` doubles the loss of pairs of one class, as the reference code does. The
paper does not mention this. A map without contrast counts as uniform. There is no ReLU before the map, which changes
nothing for a ResNet. The placement is ours: The map is of what the classifier would see at each position, after the
head's norm where it has one. In token networks (DeiT, PVT) these positions are the patches, which the classifier of the
class token was not trained on.

Kind: input, label.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan

Box = tuple[int, int, int, int]


class SnapMix(Mixer):
    """Paste a box of the partner, resized, and weight both labels by how much of their class is seen.

    ``alpha`` is the Beta parameter and must be above 0. ``same_label_twice`` doubles the loss of pairs of one class, as
    published. The deviations say more.
    """

    one_label = True  # the map is of the class of the largest target

    def __init__(self, alpha: float = 5.0, same_label_twice: bool = False):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_choice("same_label_twice", same_label_twice, (False, True))
        self.alpha = alpha
        self.same_label_twice = same_label_twice

    def setup(self, model: nn.Module) -> None:
        """Raises ``ValueError`` for a model without a linear classifier."""
        taps.classifier(model)

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: nn.Module
    ) -> Plan:
        """``box`` and ``source``: top, bottom, left, right, in the sample and in its partner; ``index`` (B,).

        ``lam`` (B,) is the sample's share of the two weights, ``weight`` (B,) their sum. ``look``: the model.
        """
        (model,) = look
        height, width = x.shape[-2:]
        lams = [ops.beta(self.alpha, self.alpha, rng) for _ in range(2)]
        box, source = (ops.clipped_box(height, width, lam, rng) for lam in lams)
        index = ops.partners(x, rng)
        if area(box) and area(source):
            maps = semantic_map(model, x, y)
            own, partner = 1 - inside(maps, box), inside(maps, source)[index]
            weight = own + partner
            lam = torch.where(weight > 0, own / weight.clamp(min=1e-12), 1.0)
            if self.same_label_twice:
                label = y.argmax(1)
                weight = torch.where(label == label[index], 2 * weight, weight)
        else:
            box, weight, lam = (0, 0, 0, 0), ops.per_sample(1.0, x), ops.per_sample(1.0, x)
        return {"index": index, "box": box, "source": source, "lam": lam, "weight": weight}

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        box: Box,
        source: Box,
        lam: Float[Tensor, " B"],
        weight: Float[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """The source of ``x[index]``, resized to the box, on ``x``; ``weight`` is for the loss."""
        ops.check_batch(x, y)
        top, bottom, left, right = box
        mixed = x.clone()
        if area(box):
            crop = x[:, :, source[0] : source[1], source[2] : source[3]]
            patch = F.interpolate(crop, (bottom - top, right - left), mode="bilinear", align_corners=True)
            mixed[:, :, top:bottom, left:right] = ops.gather(patch, index)
        return mixed, ops.blend_targets(y, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """A look at the clean batch, then one forward of the mixed one."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng, model)
        mixed, target = self.mix(x, y, **plan)
        logits = model(mixed)
        return Out.of(logits, target, plan, mix=plan["weight"] * criterion(logits, target))


@torch.no_grad()
def semantic_map(model: Any, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"]) -> Float[Tensor, "B H W"]:
    """Where a sample's own class is, at least 0 and of sum 1, in evaluation mode and without a trace."""
    with taps.looking(model):
        feature = model.forward_features(x)
        tokens = taps.to_tokens(model, feature)
        seen = taps.before_classifier(model, tokens.flatten(0, 1), feature).unflatten(0, tokens.shape[:2])
    grid = taps.to_map(model, feature, x).shape[2:]
    with ops.full_precision(x.device):
        weight = taps.classifier(model).weight[y.argmax(1)]
        kind = torch.promote_types(seen.dtype, torch.float32)
        score = (seen.to(kind) @ weight.to(kind)[:, :, None])[:, :, 0]  # a bias would go with the minimum
        cam = F.interpolate(score.unflatten(1, grid)[:, None], x.shape[2:], mode="bilinear")[:, 0]
        cam = cam - cam.amin((1, 2), keepdim=True)
        total = cam.sum((1, 2), keepdim=True)
        return torch.where(total > 0, cam / total.clamp(min=torch.finfo(kind).tiny), 1 / cam[0].numel())


def inside(maps: Float[Tensor, "B H W"], box: Box) -> Float[Tensor, " B"]:
    """The share of each map inside a box."""
    top, bottom, left, right = box
    return maps[:, top:bottom, left:right].sum((1, 2)).clamp(max=1)


def area(box: Box) -> int:
    """Pixels inside."""
    top, bottom, left, right = box
    return (bottom - top) * (right - left)
