"""ResNet strikes back: An improved training procedure in timm. Wightman, Touvron, Jegou. 2021.

https://arxiv.org/abs/2110.00476, reference code https://github.com/huggingface/pytorch-image-models

Formula: every batch is mixed by Mixup, with alpha = ``mixup_alpha``, or by CutMix, with alpha = ``cutmix_alpha``, each
with probability 1/2.

Published defaults: mixup 0.1, cutmix 1 (paper, table 2, procedures A2 and A3).

Sampling law: ``rsb@wightman-2021``: one of the two for the whole batch, which then follows its own law.

Deviations: those of Mixup and CutMix from timm, by which the reference code mixes.

Kind: input.
"""

from .registry import Made, build


def rsb(mixup_alpha: float = 0.1, cutmix_alpha: float = 1.0) -> Made:
    """Mixup or CutMix, switched per batch. Both alphas > 0 are Beta parameters."""
    return build("switch", mixers=[build("mixup", alpha=mixup_alpha), build("cutmix", alpha=cutmix_alpha)])
