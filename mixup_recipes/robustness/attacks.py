"""FGSM and PGD: pictures near to given ones on which a network's loss is as large as these methods find.

FGSM: Explaining and Harnessing Adversarial Examples, Goodfellow et al., ICLR 2015, https://arxiv.org/abs/1412.6572.

    x' = clip(x + eps * sign(d loss / d x), 0, 1)

PGD: Towards Deep Learning Models Resistant to Adversarial Attacks, Madry et al., ICLR 2018,
https://arxiv.org/abs/1706.06083. From a random point of the ball, ``steps`` times:

    x' <- clip(x + clip(x' + step * sign(d loss / d x') - x, -eps, eps), 0, 1)

The distance is the largest difference of any channel of any pixel (L-infinity), in pixels of 0 to 1; the loss is
cross-entropy with the class number. 1/255 is one level of 8 bits.

Deviations from OpenMixup (``openmixup/utils/collect.py`` at 37e1372): its PGD multiplies the random start and the step
by the standard deviation of the data, and shifts the centre of the ball in each step, since it takes the
normalisation off the same images again and again. Here both are as in the paper. Its FGSM is this one.

Budgets of other codes: OpenMixup's tool has FGSM of 8/255, and PGD of 8/255 in 10 steps of 2/255
(``pgd_nondist_forward_collect``). GuidedMixup's code reports FGSM of 4/255 too. PuzzleMix's code has PGD of 4/255 in 20
steps of 2/255 (``checkpoint/test_robust.py`` at e2dbf3a), and prints each of its steps.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fgsm(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], each value at most ``eps`` from ``x``: one step along the sign of the gradient.

    ``model`` maps pixels in [0, 1] to logits (B, K), so the normalisation is inside it, and is in evaluation mode: only
    there is a sample's gradient its own. ``y`` (B,) are class numbers. Nothing of the model is changed.
    """
    return (x + eps * gradient(model, x, y).sign()).clamp(0, 1)


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float,
    step: float,
    steps: int,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Tensor:
    """As ``fgsm``, by ``steps`` steps of size ``step`` from a point that ``generator`` draws evenly from the ball.

    With a generator for each picture its point does not depend on the others. Points are drawn on a generator's device,
    so a generator of the CPU gives the same ones for every device.
    """
    start = drawn(x, generator)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    moved = (x + eps * (2 * start - 1)).clamp(low, high)
    for _ in range(steps):
        moved = (moved + step * gradient(model, moved, y).sign()).clamp(low, high)
    return moved


def drawn(x: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Even numbers in [0, 1) of the shape of ``x`` (B, 3, H, W), from a generator or from one for each picture."""
    if isinstance(generator, torch.Generator):
        return torch.rand(x.shape, generator=generator, device=generator.device).to(x)
    return torch.stack([torch.rand(x.shape[1:], generator=own, device=own.device) for own in generator]).to(x)


def gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The gradient (B, 3, H, W) of each picture's cross-entropy in its own pixels; no parameter gets one."""
    with torch.enable_grad():
        images = x.detach().requires_grad_()
        loss = F.cross_entropy(model(images).float(), y, reduction="sum")  # a mean would shrink them with the batch
        (slope,) = torch.autograd.grad(loss, images)
    return slope
