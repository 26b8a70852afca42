"""Noisy Feature Mixup. Lim, Erichson, Utrera, Xu, Mahoney. ICLR 2022.

https://arxiv.org/abs/2110.02180, reference code https://github.com/erichson/NFM

Formula: A layer is drawn from {the input, after stage 1, 2 or 3}. Its output h becomes
``h' = (1 + m*U) * (lam*h + (1-lam)*h[index]) + a*N`` with ``lam ~ Beta(alpha, alpha)``. N is standard normal and U is
uniform in [-1, 1] for each number of h. ``a = add_noise_level * Beta(2, 5)``, ``m = mult_noise_level * Beta(2, 5)``;
``y' = lam*y + (1-lam)*y[index]``.

Published defaults: alpha = 1, add_noise_level = 0.4, mult_noise_level = 0.2 (reference code's commands for CIFAR-10 and
CIFAR-100). Its script for ImageNet has 0.1 and 0.1.

Sampling law: ``nfm@lim-2022``: One lambda, one layer and one strength of each noise are drawn for the whole batch. The
four layers are equally likely. The partners are a uniformly random permutation of the batch. Fixed points are allowed:
an image may be its own partner. The noise itself comes from a generator on the device of h, whose seed is drawn. So a
CPU and a GPU draw different noise of the same law. All micro-batches and processes of an update get the same noise.

Where a stage ends: A stage ends as in Manifold Mixup, see ``taps.early_stages``. The third is one stage further. For a
ViT the placement is ours: it is taken as four equal parts, with all of its tokens mixed and noisy.

Deviations: Noise is drawn in float32 and rounded to the type of h under autocast. ``alpha`` and the levels of noise are
numbers of the recipe. The reference code turns mixing off with an alpha of 0. ``mix`` returns the images as the network
receives them, so they are unmixed when the layer is hidden. Only the abstract and the introduction of the paper could
be read here. All numbers are those of its code.

Kind: input, feature.
"""

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan

HIDDEN = 3  # stages after which features may be mixed


class NFM(Mixer):
    """Blend images or a hidden feature by one lambda per batch, and add noise.

    ``alpha`` is the Beta parameter and must be above 0. ``add_noise_level`` and ``mult_noise_level`` must be at
    least 0. They are the levels of the noise that is added to, and multiplied with, what was mixed.
    """

    inside = True

    def __init__(self, alpha: float = 1.0, add_noise_level: float = 0.4, mult_noise_level: float = 0.2):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_between("add_noise_level", add_noise_level, 0.0)
        ops.check_between("mult_noise_level", mult_noise_level, 0.0)
        self.alpha = alpha
        self.add_noise_level = add_noise_level
        self.mult_noise_level = mult_noise_level

    def setup(self, model: nn.Module) -> None:
        """Find the modules whose output is mixed. Raises ``ValueError`` when the model has too few stages."""
        self.modules_mixed = ["", *taps.early_stages(model, HIDDEN, "NFM")]

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``lam`` (B,), ``layer`` 0 (the input) to 3, ``index`` (B,); ``add``, ``mult`` and ``seed`` of the noise."""
        lam = ops.beta(self.alpha, self.alpha, rng)
        layer = int(rng.integers(1 + HIDDEN))
        noise = ops.draw_noise(self.add_noise_level, self.mult_noise_level, rng)
        return {"index": ops.partners(x, rng), "lam": ops.per_sample(lam, x), "layer": layer, **noise}

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"],
        layer: int,
        add: float,
        mult: float,
        seed: int,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Mixed targets, and the images: mixed and noisy for layer 0, as they are when a hidden feature is mixed."""
        ops.check_batch(x, y)
        mixed = blend_with_noise(x, index, lam, add, mult, seed) if layer == 0 else x
        return mixed, ops.blend_targets(y, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward, with the planned layer's output mixed."""
        plan = self.plan(x, y, rng, model, criterion)
        mixed, target = self.mix(x, y, **plan)
        if plan["layer"] == 0:
            logits = model(mixed)
        else:
            given = {name: plan[name] for name in ("index", "lam", "add", "mult", "seed")}
            with taps.edit(model, self.modules_mixed[plan["layer"]], lambda h: blend_with_noise(h, **given)):
                logits = model(mixed)
        return Out.of(logits, target, plan, mix=criterion(logits, target))


def blend_with_noise(
    h: Float[Tensor, "B *rest"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"], add: float, mult: float, seed: int
) -> Float[Tensor, "B *rest"]:
    """``lam*h + (1-lam)*h[index]`` with noise, for images, maps and tokens."""
    return ops.noisy(ops.blend_samples(h, index, lam), add, mult, seed)
