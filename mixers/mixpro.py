"""MixPro: Data Augmentation with MaskMix and Progressive Attention Labeling for Vision Transformer. ICLR 2023.

Zhao, Huang, Hu, Zhang, Liu. https://arxiv.org/abs/2304.12043, reference code https://github.com/fistyee/MixPro

Formula: MaskMix cuts the images into n square cells. ``count = ceil(rho*n)`` of the cells, with
``rho ~ Beta(alpha, alpha)``, show the sample itself. The others show its partner. ``area`` is the share of the pixels
that stay. ``attention`` is the share of what the class token looks at that falls on them, in the last layer of the same
forward, as the mean over heads. Progressive attention labeling trusts the attention as far as the model is right:
``s = cos(softmax(logits), y_area)`` with the target mixed by area, and ``lam = s*attention + (1-s)*area``. The loss is
``lam*CE(y) + (1-lam)*CE(y[index])``.

Published defaults: alpha = 1, and cells of 56 pixels on a ViT with patches of 14. Here patches are of 16 and cells
of 32. The published method, ``mixpro``, does so for half of the batches and mixes the others as DeiT does.

Sampling law: ``mixpro@zhao-2023``: One count is drawn for the whole batch. It is at least one cell unless rho is 0,
hence the mean share is (n+1)/(2n) at alpha = 1. Each sample has a uniformly random subset of that many cells. The
partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.

Cost: There is no extra pass. One row of the last layer's attention is computed. If a stage was compiled and that layer
lies in it, the stage runs uncompiled (DeiT: the last block of 12).

Label smoothing: The loss of these batches is of class labels, as in the reference code. The class is the largest entry
of each row of y. ``s`` compares with the targets as they come, smoothed. ``smoothed=True`` keeps the smoothed targets
for the loss too.

Models: The method takes the models of TransMix. Swin takes the mean over all patches as queries. A cell must be a whole
number of the model's coarsest patches (DeiT 16 pixels, PVT and Swin 32), so that each patch shows one image.

Deviations: ``s`` carries no gradient. In the reference code it does (``detach=False``). The attention carries no
gradient in either. The published numbers are of patches of 14, which take 1.3 times the compute of DeiT at 16. The
shipped configurations have the labeling off, and the README describes it as on. Images whose sides are no whole number
of cells have smaller cells at the far border, and ``area`` is that of the pixels. The reference code and OpenMixup
count cells. OpenMixup cuts the cells to 64 pixels and looks at the unmixed images in another forward. It replaces the
shares of a batch by their mean, as with TransMix.

Kind: input, label.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan
from .compose import Switch
from .registry import build


class MixPro(Mixer):
    """Mix every batch by MaskMix with progressive attention labeling.

    ``alpha`` is the Beta parameter and must be above 0. ``cell`` is the side of a cell in pixels. ``detach`` says
    whether s carries no gradient. ``smoothed`` says whether the loss is of the targets as they come instead of class
    labels.
    """

    one_label = True  # targets become one-hot, and are compared with a softmax

    def __init__(self, alpha: float = 1.0, cell: int = 32, detach: bool = True, smoothed: bool = False):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_count("cell", cell, unit="of pixels")
        ops.check_choice("detach", detach, (False, True))
        ops.check_choice("smoothed", smoothed, (False, True))
        self.alpha, self.cell, self.detach, self.smoothed = alpha, cell, detach, smoothed

    def setup(self, model: nn.Module) -> None:
        """Raises ``ValueError`` for a model without attention between image tokens, or a cell that cuts a patch."""
        taps.attention_layers(model)
        patch = max(taps.reductions(model).values())
        if self.cell % patch:
            raise ValueError(
                f"cell must be a multiple of {patch}, the patch of {type(model).__name__}, got {self.cell}"
            )

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) of 0 and 1, ``lam`` (B,) its exact mean, later that of the label."""
        ops.check_look(look)
        sides = [np.diff(np.r_[0 : side : self.cell, side]) for side in x.shape[-2:]]
        area = np.outer(*sides).ravel() / (x.shape[-2] * x.shape[-1])
        count = int(np.ceil(ops.beta(self.alpha, self.alpha, rng) * len(area)))
        index = ops.partners(x, rng)
        cells = rng.permuted(np.tile(np.arange(len(area)) < count, (len(x), 1)), axis=1).astype(np.float64)
        rows, columns = (ops.send(np.repeat(np.arange(len(side)), side), x) for side in sides)
        grid = ops.send(cells, x).view(len(x), 1, len(sides[0]), len(sides[1]))
        return {"index": index, "mask": grid[:, :, rows][..., columns], "lam": ops.send(cells @ area, x)}

    def mix(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        mask: Float[Tensor, "B 1 h w"],
        lam: Float[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """As every mask; without ``smoothed``, the labels that are mixed are those of the likeliest class."""
        ops.check_batch(x, y)
        return super().mix(x, self.labels(y), index=index, mask=mask, lam=lam)

    def labels(self, y: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """What the loss is of: ``y`` without its smoothing, or as it is."""
        return y if self.smoothed else torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward on the mixed batch, whose attention and prediction decide on the labels."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng, model, criterion)
        mixed, _ = self.mix(x, y, **plan)
        with taps.attention(model) as look:
            logits = model(mixed)
        by_area = ops.blend_targets(y, plan["index"], plan["lam"])
        trust = agreement(logits.detach() if self.detach else logits, by_area)
        area, attention = (share.to(trust.dtype) for share in (plan["lam"], look.share(plan["mask"])))
        lam = torch.lerp(area, attention, trust)
        target = ops.blend_targets(self.labels(y), plan["index"], lam)
        loss = criterion(logits, target)
        return Out.of(logits, target.detach(), plan | {"lam": lam.detach()}, mix=loss)


def mixpro(
    alpha: float = 1.0,
    cell: int = 32,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    share: float = 0.5,
    detach: bool = True,
    smoothed: bool = False,
) -> Switch:
    """Make the published method: ``MixPro`` for ``share`` of the batches, Mixup or CutMix for the rest."""
    ops.check_between("share", share, 0.0, 1.0)
    each = round((1 - share) / 2, 12)
    others = [build("mixup", alpha=mixup_alpha), build("cutmix", alpha=cutmix_alpha)]
    return Switch([MixPro(alpha, cell, detach, smoothed), *others], [share, each, each])


def agreement(logits: Float[Tensor, "B K"], target: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Cosine between prediction and target, in [0, 1], at least in float32."""
    with ops.full_precision(logits.device):
        predicted = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
        return functional.cosine_similarity(predicted, target.to(predicted.dtype)).clamp(0, 1)
