"""Remix: Rebalanced Mixup. Chou, Chang, Pan, Wei, Juan. ECCV Workshops 2020.

https://arxiv.org/abs/2007.03943. The authors published no code; the one in use is
https://github.com/ntucllab/imbalanced-DL

Formula: Images are blended as Mixup does, ``x' = lam_x*x + (1-lam_x)*x[index]``. The label goes to the rarer class
where one class is ``kappa`` times as frequent as the other and has less than ``tau`` of the image. With n images of the
sample's class and m of its partner's, ``lam_y = 0`` if ``n >= kappa*m and lam_x < tau``; ``lam_y = 1`` if
``m >= kappa*n and 1-lam_x < tau``; else ``lam_y = lam_x``. ``y' = lam_y*y + (1-lam_y)*y[index]``.

Published defaults: kappa = 3, tau = 0.5 (paper, as the code quotes it), alpha = 1 (the code).

Sampling law: ``remix@chou-2020``: One lambda is drawn for the whole batch from Beta(alpha, alpha). It is not folded.
The partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.
Draws and images are those of Mixup.

Deviations: There are none from the paper's formula as the code quotes it. The class of a soft target is that of its
largest value; the code takes whole labels. From a late epoch on, the code's loss weighs the classes (DRW). This is a
schedule of the loop and no part of the mixer. A recipe's ``class_weights`` weighs them from the first epoch. Without
``class_counts`` no class is known to be rarer than another, and Remix is Mixup.

Kind: input, label.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class Remix(Mixer):
    """Mix as Mixup does, with a label that goes to the rarer class.

    ``alpha`` is the Beta parameter and must be above 0. ``kappa``, at least 1, says how many times as frequent a class
    is that gives its label away. ``tau``, in [0, 1], is the share of the image below which it does so. ``class_counts``
    lists the training images of each of the K classes, in the order of the targets. If it is None, the training job
    counts them. Until it does, all classes are alike, which is Mixup, so give the counts in a loop of your own.
    """

    one_label = True  # the class of an image is the one of its largest target

    def __init__(
        self,
        alpha: float = 1.0,
        kappa: float = 3.0,
        tau: float = 0.5,
        class_counts: Sequence[int] | None = None,
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_between("kappa", kappa, 1.0)
        ops.check_between("tau", tau, 0.0, 1.0)
        if class_counts is not None:
            check_counts(class_counts)
        self.alpha, self.kappa, self.tau, self.class_counts = alpha, kappa, tau, class_counts

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), a constant ``mask`` (B, 1, 1, 1), and ``lam`` (B,), the share of the sample's own label.

        Raises ``ValueError`` unless there is a count for each class of the targets.
        """
        lam = ops.beta(self.alpha, self.alpha, rng)
        index, share = ops.partners(x, rng), ops.per_sample(lam, x)
        plan = {"index": index, "mask": share.view(-1, 1, 1, 1), "lam": share}
        if self.class_counts is None:
            return plan
        if len(self.class_counts) != y.shape[1]:
            raise ValueError(f"class_counts must be {y.shape[1]} numbers, one per class, got {len(self.class_counts)}")
        own = ops.send(np.array(self.class_counts), y)[y.argmax(1)]
        other = own[index]
        # the order of the two matters where both hold, for kappa 1: the code asks for the frequent sample first
        if 1 - lam < self.tau:
            plan["lam"] = torch.where(other >= self.kappa * own, 1.0, plan["lam"])
        if lam < self.tau:
            plan["lam"] = torch.where(own >= self.kappa * other, 0.0, plan["lam"])
        return plan


def check_counts(counts: object) -> None:
    """Raise ``ValueError`` unless these are whole numbers of images, of which some class has any."""
    whole = isinstance(counts, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
    if not whole or not any(counts) or min(counts) < 0:  # type: ignore[arg-type,call-overload]
        raise ValueError(
            f"class_counts must be the number of training images of each class, such as [500, 120, 30], got {counts!r}"
        )
