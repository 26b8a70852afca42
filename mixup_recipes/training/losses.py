"""Losses that look at mistakes first, for dense targets: mixed labels are shares, so each class is partly right.

All take logits (B, K), at least float32, and targets (B, K) from 0 to 1, and give one loss per sample (B,), without
anything averaged over the batch. ``weights`` (K,) multiply what a target says for a class, as in cross-entropy.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def focal(
    logits: Float[Tensor, "B K"], target: Float[Tensor, "B K"], weights: Float[Tensor, " K"] | None, gamma: float = 2.0
) -> Float[Tensor, " B"]:
    """``sum over classes c of y_c (1 - p_c)^gamma (-log p_c)``, p being the softmax; with gamma 0 cross-entropy.

    Focal Loss for Dense Object Detection. Lin et al. ICCV 2017, https://arxiv.org/abs/1708.02002, whose p_t is that of
    the one class that is right. Of several, each counts by its share and is held against its own p. The paper's alpha,
    one number for each class, is ``weights``.
    """
    log_p = logits.log_softmax(1)
    # the power's slope is infinite at 0 for gamma below 1, where log p is 0 anyway
    missing = -torch.expm1(log_p.clamp(max=-torch.finfo(log_p.dtype).eps))
    said = target if weights is None else target * weights
    return -(said * missing**gamma * log_p).sum(1)


def asymmetric(
    logits: Float[Tensor, "B K"],
    target: Float[Tensor, "B K"],
    weights: Float[Tensor, " K"] | None,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
) -> Float[Tensor, " B"]:
    """``sum over c of y_c (1 - p_c)^gamma_pos (-log p_c) + (1 - y_c) q_c^gamma_neg (-log(1 - q_c))``, p the sigmoid.

    ``q = max(p - clip, 0)`` is the probability with its margin: what is said against a class of p below ``clip`` is
    said well enough. With both gammas 0 and clip 0 it is binary cross-entropy, summed over classes.

    Asymmetric Loss for Multi-Label Classification. Ridnik, Ben-Baruch, et al. ICCV 2021,
    https://arxiv.org/abs/2009.14119. There y is 0 or 1; here y and 1 - y are the weights of the two parts, for several
    labels and for mixed ones. The defaults are those of the authors' class, which timm has too; they trained with
    ``gamma_pos`` 0. Gradient flows through the powers, as the formula says; the authors' training stops it.
    """
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    said = target if weights is None else target * weights
    if clip:
        q = (logits.sigmoid() - clip).clamp(0, 1 - torch.finfo(logits.dtype).eps)
        power = q.clamp(min=torch.finfo(q.dtype).tiny) ** gamma_neg  # where it is 0, log(1 - q) is too
        against = power * torch.log1p(-q)
    else:
        against = torch.exp(gamma_neg * log_p) * log_not_p
    return -(said * torch.exp(gamma_pos * log_not_p) * log_p + (1 - target) * against).sum(1)
