"""AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty. Hendrycks et al. ICLR 2020.

https://arxiv.org/abs/1912.02781, reference code https://github.com/google-research/augmix

Formula: Three chains of one to three operations each distort an image. The operations are drawn from nine
(autocontrast, equalize, posterize, rotate, solarize, shear in x and in y, translate in x and in y).
``v = lam*x + (1-lam) * sum_c w_c*chain_c(x)`` with ``w ~ Dirichlet(alpha)`` and ``lam ~ Beta(alpha, alpha)``. The model
is given x and two such views v, v' as one batch: ``loss = CE(x, y) + jsd_weight * JSD(p(x), p(v), p(v'))``. JSD is the
mean divergence of the three predictions from their mean. The labels stay as they are.

Published defaults: severity 3, three chains, depth drawn from 1 to 3, alpha = 1, jsd_weight = 12 (reference code,
CIFAR). Its command for ImageNet has severity 1.

Sampling law: ``augmix@hendrycks-2020``: Everything is drawn per image and view. Each operation of a chain is one of
nine, equally likely. Its level is uniform from 0.1 to the severity, to either side.

Cost: The model sees three images for each one. The counted FLOPs hold this and nothing else. In addition, making a view
takes about 290 tensor operations on the whole batch, with three chains of up to three operations, whatever the number
and the size of its images (counted without those that only index or reshape). ``jsd_weight=0`` trains on one view
alone, without the clean image. It costs the making of that view and a plain step (reference code: ``--no-jsd``).

Deviations: Operations start from the pixels of the normalised batch, rounded to 8 bits, on its device. The reference
code works on files in the loader, on the same 8 bits. Tables of values and shifts are Pillow's to the bit. Rotations
and shears are interpolated in 32 bits and can differ by 1 of 255. A shift is a share of the width or of the height. The
reference code knows square images only. The four operations of ``--all-ops`` are left out, as in the published runs;
they are among the corruptions that ImageNet-C tests. Erased pixels (``reprob``) are distorted like others; the
reference code erases nothing. The target of the clean image may be soft. Only the abstract of the paper and the parts
that others quote could be read here. All numbers are those of its code.

Kind: input, label.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor, cat, nn

from . import augmentations, ops
from .base import Criterion, Mixer, Needs, Out, Plan


class AugMix(Mixer):
    """Train on an image, and on predicting the same of two distorted views of it.

    ``severity``, in [0.1, 10], is that of the operations. ``width`` is the number of chains, and ``depth`` is the
    number of operations of each. If ``depth`` is None, each chain has 1 to 3. ``alpha``, above 0, is the parameter of
    the Dirichlet and Beta laws. ``jsd_weight`` is the weight of the divergence and must be at least 0. If it is 0, only
    a view is learned from. ``mean`` and ``std`` are those that the images were normalised with.
    """

    pairs = False

    def __init__(
        self,
        severity: float = 3.0,
        width: int = 3,
        depth: int | None = None,
        alpha: float = 1.0,
        jsd_weight: float = 12.0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        augmentations.check(severity, width, depth)
        ops.check_positive("alpha", alpha)
        ops.check_between("jsd_weight", jsd_weight, 0.0)
        ops.check_rgb("mean", mean)
        ops.check_rgb("std", std, 1e-6)
        self.severity = severity
        self.width = width
        self.depth = depth
        self.alpha = alpha
        self.jsd_weight = jsd_weight
        self.one_label = jsd_weight > 0  # the divergence is of softmaxes
        self.mean = mean
        self.std = std

    @property
    def needs(self) -> Needs:
        """The whole step, for the divergence; without it the batch."""
        return "step" if self.jsd_weight else "batch"

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``view``, and ``other`` where the divergence counts: see ``augmentations.draw_view``."""
        chains = (self.severity, self.width, self.depth, self.alpha)
        plan = {"view": augmentations.draw_view(x, rng, *chains)}
        return plan | {"other": augmentations.draw_view(x, rng, *chains)} if self.jsd_weight else plan

    def mix(  # type: ignore[override]
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], *, view: Plan, other: Plan | None = None
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """The first view, and the targets as they are."""
        ops.check_batch(x, y)
        return augmentations.view(x, view, self.mean, self.std), y

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """The clean batch and both views in one forward."""
        if not self.jsd_weight:
            return super().forward(model, criterion, x, y, rng)
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng)
        views = (augmentations.view(x, plan[name], self.mean, self.std) for name in ("view", "other"))
        clean, *of_views = model(cat([x, *views])).chunk(3)
        apart = augmentations.divergence(clean, *of_views)
        return Out.of(clean, y, plan, clean=criterion(clean, y), jsd=self.jsd_weight * apart)
