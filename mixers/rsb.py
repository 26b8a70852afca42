"""RSB. ResNet strikes back: An improved training procedure in timm. Wightman, Touvron, Jegou. 2021.

https://arxiv.org/abs/2110.00476, reference code https://github.com/huggingface/pytorch-image-models

Formula: Every batch is mixed either by Mixup, with alpha = ``mixup_alpha``, or by CutMix, with alpha =
``cutmix_alpha``. Each has the probability 1/2.

Published defaults: mixup 0.1, cutmix 1 (paper, table 2, procedures A2 and A3).

Sampling law: ``rsb@wightman-2021``: One of the two is drawn for the whole batch. The batch then follows the law of that
method.

Deviations: The reference code mixes with timm, so the deviations are those of Mixup and CutMix from timm.

Kind: input.
"""

from .registry import Made, build


def rsb(mixup_alpha: float = 0.1, cutmix_alpha: float = 1.0) -> Made:
    """Mix each batch by Mixup or by CutMix.

    ``mixup_alpha`` and ``cutmix_alpha`` are the Beta parameters of the two and must be above 0.
    """
    return build("switch", mixers=[build("mixup", alpha=mixup_alpha), build("cutmix", alpha=cutmix_alpha)])
