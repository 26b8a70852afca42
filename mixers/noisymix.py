"""NoisyMix: Boosting Model Robustness to Common Corruptions. Erichson, Lim, Xu, Utrera, Cao, Mahoney. 2022.

https://arxiv.org/abs/2202.01263, reference code https://github.com/erichson/NoisyMix

Formula: x and two views of it by AugMix, v and v', go through the model as one batch. A layer is drawn from {the input,
after stage 1, 2 or 3}; its output h becomes ``h' = (1 + m_i*S*U) * (lam*h + (1-lam)*h[index]) + a_i*S'*N`` for each of
the three parts i = 1, 2, 3, with the same ``lam ~ Beta(alpha, alpha)`` and the same partners. N is standard normal and
U uniform in [-1, 1] for each number of h, S and S' are 0 for a share ``sparse_level`` of them and 1 for the others,
``a_i = i * add_noise_level * Beta(2, 5)``, ``m_i = mult_noise_level * Beta(2, 5)``. ``loss = CE(p(x), y') + jsd_weight
* JSD(p(x), p(v), p(v'))`` with ``y' = lam*y + (1-lam)*y[index]``, where JSD is the mean divergence of the three
predictions from their mean.

Published defaults: alpha = 1, add_noise_level = 0.5, mult_noise_level = 0.5, sparse_level = 0.65, jsd_weight = 12,
AugMix of severity 3 with three chains of one to three operations (reference code's command for CIFAR-100).

Sampling law: ``noisymix@erichson-2022``: one lambda and one layer for the whole batch, the four layers equally likely;
a strength of each noise for each of the three parts; the partner is a uniformly random permutation of the batch, fixed
points allowed; views as in ``augmix@hendrycks-2020`` with alpha 1. The noise itself comes from generators on the device
of h, whose seeds are drawn, so that a CPU and a GPU draw other noise of the same law; all micro-batches and processes
of an update get the same noise.

Cost: the model sees three images for each one, which is all that the counted FLOPs hold. Each of the two views takes
about 290 tensor operations on the whole batch besides, as in AugMix, and the noise of each of the three parts takes 14
on h.

Where a stage ends: as in Manifold Mixup, see ``taps.early_stages``; the third is one stage further. Placement ours: a
ViT is taken as four equal parts, with all of its tokens mixed and noisy.

Deviations: the views are those of our AugMix, see there. That the added noise grows with the number of the part is what
the reference code does; of the paper only the abstract and the introduction could be read here, and all numbers are
those of its code. Noise is drawn in float32 and rounded to the type of h under autocast. The reference code can do
without views, mixing or the divergence; these are ``nfm``, ``augmix`` and others here. ``mix`` returns the clean part
as the network receives it, so the images are unmixed when the layer is hidden.

Kind: input, feature, label.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import augmentations, ops, taps
from .base import Criterion, Mixer, Out, Plan

HIDDEN = 3  # stages after which features may be mixed
PARTS = 3  # the clean batch and two views
CHAINS_ALPHA = 1.0  # of AugMix's own laws


class NoisyMix(Mixer):
    """Noisy feature mixup of an image and of two distorted views of it, and predicting the same of all three.

    ``alpha`` > 0 is the Beta parameter; ``add_noise_level``, ``mult_noise_level`` >= 0: of noise that is added to, and
    multiplied with, what was mixed; ``sparse_level`` in [0, 1]: the share of numbers that it spares. ``jsd_weight`` of
    at least 0: of the divergence. ``severity``, ``width``, ``depth``, ``mean``, ``std``: of AugMix.
    """

    inside = True

    def __init__(
        self,
        alpha: float = 1.0,
        add_noise_level: float = 0.5,
        mult_noise_level: float = 0.5,
        sparse_level: float = 0.65,
        jsd_weight: float = 12.0,
        severity: float = 3.0,
        width: int = 3,
        depth: int | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_between("add_noise_level", add_noise_level, 0.0)
        ops.check_between("mult_noise_level", mult_noise_level, 0.0)
        ops.check_between("sparse_level", sparse_level, 0.0, 1.0)
        ops.check_between("jsd_weight", jsd_weight, 0.0)
        augmentations.check(severity, width, depth)
        ops.check_rgb("mean", mean)
        ops.check_rgb("std", std, 1e-6)
        self.alpha = alpha
        self.add_noise_level = add_noise_level
        self.mult_noise_level = mult_noise_level
        self.sparse_level = sparse_level
        self.jsd_weight = jsd_weight
        self.one_label = jsd_weight > 0  # the divergence is of softmaxes
        self.severity = severity
        self.width = width
        self.depth = depth
        self.mean = mean
        self.std = std

    def setup(self, model: nn.Module) -> None:
        """Find the modules whose output is mixed. Raises ``ValueError`` when the model has too few stages."""
        self.modules_mixed = ["", *taps.early_stages(model, HIDDEN, "NoisyMix")]

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``lam`` (B,), ``layer`` 0 (the input) to 3, ``index`` (B,), ``view`` and ``other`` as in AugMix.

        ``noise``: for the clean batch and both views, the strength of what is added and multiplied, and a seed.
        """
        lam = ops.beta(self.alpha, self.alpha, rng)
        layer = int(rng.integers(1 + HIDDEN))
        parts = range(1, 1 + PARTS)
        noise = [ops.draw_noise(part * self.add_noise_level, self.mult_noise_level, rng) for part in parts]
        index = ops.partners(x, rng)
        chains = (self.severity, self.width, self.depth, CHAINS_ALPHA)
        view, other = (augmentations.draw_view(x, rng, *chains) for _ in range(2))
        plan = {"index": index, "lam": ops.per_sample(lam, x), "layer": layer, "noise": noise}
        return plan | {"view": view, "other": other}

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"],
        layer: int,
        noise: list[dict[str, Any]],
        view: Plan,
        other: Plan,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Mixed targets, and the clean part: mixed and noisy for layer 0, as it is when a hidden feature is mixed."""
        ops.check_batch(x, y)
        return self.blended(x, index, lam, noise[:1]) if layer == 0 else x, ops.blend_targets(y, index, lam)

    def blended(
        self, h: Float[Tensor, "n *rest"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"], noise: list[Any]
    ) -> Float[Tensor, "n *rest"]:
        """``lam*h + (1-lam)*h[index]`` with noise, for each of the parts that ``noise`` is of."""
        parts = [
            ops.noisy(ops.blend_samples(part, index, lam), **own, sparse=self.sparse_level)
            for part, own in zip(h.chunk(len(noise)), noise, strict=True)
        ]
        return torch.cat(parts)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """The clean batch and both views in one forward, with the planned layer's output mixed."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng)
        index, lam, layer, noise = (plan[name] for name in ("index", "lam", "layer", "noise"))
        views = (augmentations.view(x, plan[name], self.mean, self.std) for name in ("view", "other"))
        images = torch.cat([x, *views])
        if layer == 0:
            logits = model(self.blended(images, index, lam, noise))
        else:
            with taps.edit(model, self.modules_mixed[layer], lambda h: self.blended(h, index, lam, noise)):
                logits = model(images)
        clean, *of_views = logits.chunk(PARTS)
        target = ops.blend_targets(y, index, lam)
        apart = augmentations.divergence(clean, *of_views)
        return Out.of(clean, target, plan, mix=criterion(clean, target), jsd=self.jsd_weight * apart)
