"""DeiT. Training data-efficient image transformers and distillation through attention. Touvron, Cord, et al. ICML 2021.

https://arxiv.org/abs/2012.12877, reference code https://github.com/facebookresearch/deit

Formula: Every batch is mixed either by Mixup, with alpha = ``mixup_alpha``, or by CutMix, with alpha =
``cutmix_alpha``. Each has the probability 1/2.

Published defaults: mixup 0.8, cutmix 1 (paper, table 9).

Sampling law: ``deit@touvron-2021``: One of the two is drawn for the whole batch. The batch then follows the law of that
method.

Deviations: The reference code mixes with timm, so the deviations are those of Mixup and CutMix from timm.

Kind: input.
"""

from .registry import Made, build


def deit(mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0) -> Made:
    """Mix each batch by Mixup or by CutMix.

    ``mixup_alpha`` and ``cutmix_alpha`` are the Beta parameters of the two and must be above 0.
    """
    return build("switch", mixers=[build("mixup", alpha=mixup_alpha), build("cutmix", alpha=cutmix_alpha)])
