"""Training data-efficient image transformers and distillation through attention. Touvron, Cord, et al. ICML 2021.

https://arxiv.org/abs/2012.12877, reference code https://github.com/facebookresearch/deit

Formula: every batch is mixed by Mixup, with alpha = ``mixup_alpha``, or by CutMix, with alpha = ``cutmix_alpha``, each
with probability 1/2.

Published defaults: mixup 0.8, cutmix 1 (paper, table 9).

Sampling law: ``deit@touvron-2021``: one of the two for the whole batch, which then follows its own law.

Deviations: those of Mixup and CutMix from timm, by which the reference code mixes.

Kind: input.
"""

from .registry import Made, build


def deit(mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0) -> Made:
    """Mixup or CutMix, switched per batch. Both alphas > 0 are Beta parameters."""
    return build("switch", mixers=[build("mixup", alpha=mixup_alpha), build("cutmix", alpha=cutmix_alpha)])
