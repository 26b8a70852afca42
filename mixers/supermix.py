"""SuperMix: Supervising the Mixing Data Augmentation. Dabouei, Soleymani, Taherkhani, Nasrabadi. CVPR 2021.

https://arxiv.org/abs/2003.05034, reference code https://github.com/alldbi/SuperMix. Experimental.

Formula: A frozen network f, the teacher, sees ``x' = M*x + (1-M)*x[index]``. It should find both classes in their
shares, ``t = lam*onehot(y) + (1-lam)*onehot(y[index])``. ``M = s_1 / (s_1 + s_2)`` is made of two sigmoids of logits m
on a small grid and is resized bilinearly. From m = 0 (half and half) these steps are taken a few times:
``J = KL(t || softmax f(x')) + sparsity * mean |M*(M-1)|`` is computed. Its gradient g by m is smoothed on the grid to
G. Then ``m = m - rho*G`` with ``rho = |J| / (g.G + 1e-10)`` in [0.0001, 2000], which is a Newton step to the root of J.
A sample is done, and stays as it is, once its two classes are the teacher's first two. The label is ``lam``, not the
share of the pixels.

Published defaults: alpha = 3, sparsity = 25. Grid 16 and sigma 2 are for a ResNet-34 and ImageNet, 8 and 1 are for
CIFAR.

Sampling law: ``supermix@mixup-recipes-1``: ``lam ~ Beta(alpha, alpha)`` is drawn for each sample. The partner of a
sample is the next one in the batch. Pairs of one class are not mixed.

Cost: The teacher runs ``steps`` forwards, with the backward passes to the image. This is 4.3 plain steps for 5 steps of
a teacher of the model's own size.

Deviations: The reference code makes images for distillation before training: see ``mixup-recipes supermix``. It takes
up to 50 steps, until 30 percent of the images are done, and then keeps and stores those, with the classes that the
teacher sees. Here masks are made during training, in ``steps`` steps. They are kept whether they are done or not. They
aim at the classes of the dataset, and the student learns ``lam``. The tables' row is of the reference code, which lacks
its classification part. Smoothing kernels have an odd size, so they shift nothing. Without a ``teacher`` the model
itself is asked, in evaluation mode and as far as it has come. This option is ours, for datasets without a trained
network. If both classes of a pair are found at once, at half and half, the pair stays that plain blend. The reference
code takes one step before it looks.

Kind: input; teacher.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Mixer, Plan


class SuperMix(Mixer):
    """Search masks with which a teacher sees both classes in their shares. This is experimental and slow.

    ``alpha`` is the Beta parameter and must be above 0. ``teacher`` is the timm name, ``hf-hub:`` address or run folder
    of a network trained on the classes of the run. If it is None, the model itself is asked. ``steps`` is the number of
    steps of the search. ``grid`` is the number of cells per side of the mask's logits. ``sigma`` is the standard
    deviation, in cells, of what smooths their gradient. ``sparsity`` is the weight of its term.
    """

    one_label = True  # the teacher is to find one class in each source

    def __init__(
        self,
        alpha: float = 3.0,
        teacher: str | None = None,
        steps: int = 5,
        grid: int = 16,
        sigma: float = 2.0,
        sparsity: float = 25.0,
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        if teacher is not None and not (isinstance(teacher, str) and teacher):
            raise ValueError(f"teacher must be the name of timm weights or a folder, or None, got {teacher!r}")
        ops.check_count("steps", steps)
        ops.check_count("grid", grid)
        ops.check_positive("sigma", sigma)
        ops.check_between("sparsity", sparsity, 0.0)
        self.alpha = alpha
        self.teacher = teacher
        self.steps = steps
        self.grid = grid
        self.sigma = sigma
        self.sparsity = sparsity
        self.frozen: taps.Frozen | None = None

    def setup(self, model: nn.Module) -> None:
        """Load the teacher. Raises ``ValueError`` when its weights cannot be had or its classes are not the model's."""
        self.frozen = trained(self.teacher, getattr(model, "num_classes", None)) if self.teacher else None

    def plan(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
        model: nn.Module,
        *look: object,
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) in [0, 1], ``lam`` (B,), which is not the mask's mean."""
        if self.teacher and not self.frozen:
            raise ValueError("no teacher yet: setup(model) loads it")
        lam = ops.send(rng.beta(self.alpha, self.alpha, len(x)), x)
        index = torch.arange(len(x), device=x.device).roll(-1)
        label = y.argmax(1)
        same = label == label[index]
        mask = self.search(self.frozen.model if self.frozen else model, x, y, index, lam, same)
        return {
            "index": index,
            "mask": torch.where(same[:, None, None, None], 1.0, mask),
            "lam": torch.where(same, 1.0, lam),
        }

    def search(
        self,
        teacher: nn.Module,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"],
        done: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B 1 H W"]:
        """The masks after all steps, for samples that are not done already."""
        for logits, _ in self.searching(teacher, x, y, index, lam, done):
            found = logits
        with torch.no_grad(), ops.full_precision(x.device):
            return masks(found, x)

    def searching(
        self,
        teacher: nn.Module,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"],
        done: Bool[Tensor, " B"],
    ) -> Iterator[tuple[Float[Tensor, "B 2 g g"], Bool[Tensor, " B"]]]:
        """The logits of the masks after each step, and whose images were done before it and stay as they are."""
        kind = torch.promote_types(x.dtype, torch.float32)
        pair = torch.stack([y.argmax(1), y.argmax(1)[index]], 1)
        shares = torch.stack([lam, 1 - lam], 1).to(kind)
        target = torch.zeros_like(y, dtype=kind).scatter_add_(1, pair, shares)
        logits = torch.zeros(len(x), 2, self.grid, self.grid, dtype=kind, device=x.device)
        for _ in range(self.steps):
            with torch.enable_grad(), ops.full_precision(x.device):
                logits.requires_grad_()
                mask = masks(logits, x)
                hard = self.sparsity * (mask * (mask - 1)).abs().mean((1, 2, 3))
            seen: list[Tensor] = []

            def divergence(top: Tensor, target: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(top.detach())
                return torch.special.xlogy(target, target).sum(1) - (target * top.log_softmax(1)).sum(1)

            slope = taps.saliency(teacher, divergence, ops.blend(x, index, mask.detach()), target)
            with ops.full_precision(x.device):
                by_mask = ((x - x[index]) * slope).sum(1, keepdim=True).to(kind)
                (gradient,) = torch.autograd.grad((mask, hard), logits, (by_mask, torch.ones_like(hard)))
                gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
                smooth = smoothed(gradient, self.sigma)
                value = divergence(seen[0], target) + hard.detach()
                rate = (value.abs() / ((gradient * smooth).sum((1, 2, 3)) + 1e-10)).clamp(1e-4, 2000)
                done = done | finds_both(seen[0], pair)
                step = torch.where(done, 0.0, rate.nan_to_num(1e-4))[:, None, None, None] * smooth
            logits = logits.detach() - step
            yield logits, done


def trained(teacher: str, classes: int | None) -> taps.Frozen:
    """The teacher. Raises ``ValueError`` when its weights cannot be had or its classes are not so many."""
    frozen = taps.Frozen(teacher)
    theirs = getattr(frozen.model, "num_classes", None)
    if theirs != classes:
        raise ValueError(
            f"the teacher {teacher!r} knows {theirs} classes, expected {classes}: take one that was trained on "
            "the same dataset, such as the folder of a vanilla run"
        )
    return frozen


def finds_both(logits: Float[Tensor, "B K"], pair: Int[Tensor, "B 2"]) -> Bool[Tensor, " B"]:
    """Whether two classes are the first two of the logits, in either order."""
    first_two = logits.topk(min(2, logits.shape[1]), 1).indices
    return (first_two.sort(1).values == pair.sort(1).values).all(1)


def masks(logits: Float[Tensor, "B 2 g g"], x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H W"]:
    """The first of two sigmoids of the resized logits over their sum."""
    first, second = F.logsigmoid(F.interpolate(logits, x.shape[2:], mode="bilinear")).split(1, dim=1)
    return (first - second).sigmoid()


def smoothed(gradient: Float[Tensor, "B k g g"], sigma: float) -> Float[Tensor, "B k g g"]:
    """Convolved with a Gaussian of sum 1, five standard deviations wide, zeros around."""
    half = int(5 * sigma) // 2
    place = torch.arange(-half, half + 1, device=gradient.device, dtype=gradient.dtype)
    kernel = (-(place**2) / (2 * sigma**2)).softmax(0)
    planes = gradient.flatten(0, 1)[:, None]
    planes = F.conv2d(planes, kernel[None, None, :, None], padding=(half, 0))
    return F.conv2d(planes, kernel[None, None, None, :], padding=(0, half)).view_as(gradient)
