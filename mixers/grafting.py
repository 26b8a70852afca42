"""Saliency Grafting: Innocuous Attribution-Guided Mixup with Calibrated Label Mixing. Park et al. AAAI 2022.

https://arxiv.org/abs/2112.08796; no code was published.

Formula: S says where the network looks in an image, on a grid of cells. It is scaled to a largest value of 1. Cells
with ``softmax(S/temperature) >= sigma * mean`` may be grafted. Each of these cells is grafted with the probability
``p ~ Beta(alpha, alpha)``. M is 1 in the cells of x that were grafted. They are pasted on ``x[index]``:
``x' = M*x + (1-M)*x[index]``. The label goes by the share of its saliency that each image shows,
``I(S, M) = ||S*M|| / ||S||``: ``lam = I(S, M) / (I(S, M) + I(S[index], 1-M))``. It is not the share of the pixels.

Published defaults: alpha = 1 (tables of OpenMixup). For the other arguments see the deviations.

Sampling law: ``grafting@mixup-recipes-1``: One p is drawn for the whole batch. Then every cell of every sample is drawn
by itself. The partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its
own partner.

Cost: ``source="activation"`` takes one more forward, without gradient. A step then costs 1.33 plain steps.
``source="gradient"`` takes one more forward and the backward pass to the image. A step then costs 1.67 plain steps.

Deviations: This is a reconstruction. The paper's abstract and its surveys say that the saliency is scaled by a
temperature and thresholded, that a Bernoulli draw picks among what is left, and that labels are mixed by saliency. No
source has the rest, so these choices are ours, and they are arguments: the temperature 0.2, a threshold of one mean,
the norm of the label's share (2), untempered S in it, and the grid, which is that of the network's last feature.
Activation saliency is the mean over channels of the absolute last feature. Gradient saliency is the root mean square
over channels of the loss's gradient, as the mean over a cell. Both are taken in evaluation mode. A map without any
saliency counts as even.

Kind: input, label.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Plan


class Grafting(Mixer):
    """Paste a random part of what is salient on the partner. The labels go by the saliency that shows.

    ``alpha`` is the Beta parameter of the share that is grafted and must be above 0. ``temperature`` (above 0) and
    ``sigma`` (at least 0, a multiple of the mean) decide which cells may be grafted. ``grid`` is the number of cells
    per side. If it is None, the grid is that of the last feature. ``label_norm`` is 1 or 2. ``source`` is "activation"
    or "gradient".
    """

    def __init__(
        self,
        alpha: float = 1.0,
        temperature: float = 0.2,
        sigma: float = 1.0,
        grid: int | None = None,
        label_norm: int = 2,
        source: str = "activation",
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_positive("temperature", temperature)
        ops.check_between("sigma", sigma, 0.0)
        if grid is not None:
            ops.check_count("grid", grid, unit="of cells per side")
        ops.check_choice("label_norm", label_norm, (1, 2))
        ops.check_choice("source", source, ("activation", "gradient"))
        self.alpha = alpha
        self.temperature = temperature
        self.sigma = sigma
        self.grid = grid
        self.label_norm = label_norm
        self.source = source

    def plan(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
        model: nn.Module,
        criterion: Criterion,
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 1 in the cells grafted, ``lam`` (B,) by saliency."""
        p = ops.beta(self.alpha, self.alpha, rng)
        index = ops.partners(x, rng)
        saliency = self.saliency(model, criterion, x, y)
        drawn = ops.send((rng.random(tuple(saliency.shape)) < p).astype(np.float64), x).to(saliency.dtype)
        mask = self.candidates(saliency) * drawn
        own, partner = self.seen(saliency, mask), self.seen(saliency[index], 1 - mask)
        both = own + partner
        lam = torch.where(both > 0, own / both.clamp(min=torch.finfo(both.dtype).tiny), mask.mean((1, 2)))
        return {"index": index, "mask": F.interpolate(mask[:, None], x.shape[2:], mode="nearest"), "lam": lam}

    def saliency(
        self, model: Any, criterion: Criterion, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"]
    ) -> Float[Tensor, "B h w"]:
        """Where the model looks, from 0 to 1 on the grid; 1 everywhere where that is nowhere."""
        if not callable(getattr(model, "forward_features", None)):
            raise ValueError(
                f"{type(model).__name__} has no forward_features to look at; use a timm model such as resnet50, "
                "deit_small_patch16_224 or convnext_tiny"
            )
        if self.source == "gradient":
            with taps.last_feature(model) as features:
                found = taps.magnitude(taps.saliency(model, criterion, x, y))
            height, width = taps.to_map(model, features[0], x).shape[2:]
        else:
            with taps.looking(model):
                feature = taps.to_map(model, model.forward_features(x), x)
            found = feature.abs().mean(1, dtype=torch.promote_types(feature.dtype, torch.float32))
            height, width = feature.shape[2:]
        with ops.full_precision(x.device):
            found = F.adaptive_avg_pool2d(found.nan_to_num(0.0, 0.0, 0.0), (self.grid or height, self.grid or width))
            top = found.amax((1, 2), keepdim=True)
            return torch.where(top > 0, found / top.clamp(min=torch.finfo(found.dtype).tiny), 1.0)

    def candidates(self, saliency: Float[Tensor, "B h w"]) -> Float[Tensor, "B h w"]:
        """1 for the cells that may be grafted: the softmax over the cells against ``sigma`` times its mean."""
        flat = saliency.flatten(1)
        least = self.sigma / flat.shape[1] * (1 - 1e-5)  # the mean of a softmax is 1/n; equal cells all pass
        return ((flat / self.temperature).softmax(1) >= least).to(saliency.dtype).view_as(saliency)

    def seen(self, saliency: Float[Tensor, "B h w"], mask: Float[Tensor, "B h w"]) -> Float[Tensor, " B"]:
        """The share of the saliency where the mask is 1."""
        part, whole = (torch.linalg.vector_norm(s, self.label_norm, (1, 2)) for s in (saliency * mask, saliency))
        return part / whole  # the largest saliency is 1: the norm is not 0
