"""NoisyMix: Boosting Model Robustness to Common Corruptions. Erichson, Lim, Xu, Utrera, Cao, Mahoney. 2022.

https://arxiv.org/abs/2202.01263, reference code https://github.com/erichson/NoisyMix

Formula: x and two views of it by AugMix, v and v', go through the model as one batch. A layer is drawn from {the input,
after stage 1, 2 or 3}. Its output h becomes ``h' = (1 + m_i*S*U) * (lam*h + (1-lam)*h[index]) + a_i*S'*N`` for each of
the three parts i = 1, 2, 3, with the same ``lam ~ Beta(alpha, alpha)`` and the same partners. For each number of h, N
is standard normal and U is uniform in [-1, 1]. S and S' are 0 for a share ``sparse_level`` of the numbers and 1 for the
others. ``a_i = i * add_noise_level * Beta(2, 5)``, ``m_i = mult_noise_level * Beta(2, 5)``.
``loss = CE(p(x), y') + jsd_weight * JSD(p(x), p(v), p(v'))`` with ``y' = lam*y + (1-lam)*y[index]``. JSD is the mean
divergence of the three predictions from their mean.

Published defaults: alpha = 1, add_noise_level = 0.5, mult_noise_level = 0.5, sparse_level = 0.65, jsd_weight = 12,
AugMix of severity 3 with three chains of one to three operations (reference code's command for CIFAR-100).

Sampling law: ``noisymix@erichson-2022``: One lambda and one layer are drawn for the whole batch. The four layers are
equally likely. A strength of each noise is drawn for each of the three parts. The partners are a uniformly random
permutation of the batch. Fixed points are allowed: an image may be its own partner. Views are drawn as in
``augmix@hendrycks-2020`` with alpha 1. The noise itself comes from generators on the device of h, whose seeds are
drawn. So a CPU and a GPU draw different noise of the same law. All micro-batches and processes of an update get the
same noise.

Cost: The model sees three images for each one. The counted FLOPs hold this and nothing else. In addition, each of the
two views takes about 290 tensor operations on the whole batch, as in AugMix. The noise of each of the three parts takes
14 on h.

Where a stage ends: A stage ends as in Manifold Mixup, see ``taps.early_stages``. The third is one stage further. For a
ViT the placement is ours: it is taken as four equal parts, with all of its tokens mixed and noisy.

Deviations: The views are those of our AugMix and have its deviations. The added noise grows with the number of the
part, as in the reference code. Only the abstract and the introduction of the paper could be read here, and all numbers
are those of its code. Noise is drawn in float32 and rounded to the type of h under autocast. The reference code can do
without views, mixing or the divergence. Here these cases are ``nfm``, ``augmix`` and others. ``mix`` returns the clean
part as the network receives it, so the images are unmixed when the layer is hidden.

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
    """Mix features of an image and of two distorted views of it, with noise, and predict the same of all three.

    ``alpha`` is the Beta parameter and must be above 0. ``add_noise_level`` and ``mult_noise_level`` must be at
    least 0. They are the levels of the noise that is added to, and multiplied with, what was mixed. ``sparse_level``,
    in [0, 1], is the share of numbers that the noise spares. ``jsd_weight`` is the weight of the divergence and must be
    at least 0. ``severity``, ``width``, ``depth``, ``mean`` and ``std`` are those of AugMix.
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
