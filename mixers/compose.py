"""Mixers made of mixers. Options are composition: no mixer has a ``prob=`` or ``mode=`` flag."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from . import ops
from .alignmix import AlignMix
from .automix import AutoMix, MixBlock
from .base import Criterion, Mixer, Needs, Out, Plan
from .cutmix import CutMix
from .decouplemix import DecoupleMix
from .guidedmix import GuidedMix
from .manifoldmix import ManifoldMix
from .mixpro import MixPro
from .mixup import Mixup
from .samix import SAMixBlock
from .smmix import SMMix
from .tokenmix import TokenMix
from .transmix import TransMix
from .vanilla import Vanilla


class Switch(Mixer):
    """One of several mixers per step, drawn with ``rng``: the same one on every rank and micro-batch of an update.

    ``mixers``: the members; ``probs``: their probabilities, uniform when None. The drawn member performs the
    whole step, so any mixer can be a member.
    """

    def __init__(self, mixers: list[Mixer], probs: list[float] | None = None):
        super().__init__()
        if not mixers:
            raise ValueError("Switch needs at least one mixer, got none")
        if probs is not None and not (
            isinstance(probs, list | tuple)
            and len(probs) == len(mixers)
            and all(isinstance(p, int | float) and 0 <= p <= 1 for p in probs)
            and abs(sum(probs) - 1) <= 1e-6
        ):
            raise ValueError(f"probs must be {len(mixers)} probabilities that sum to 1, got {probs}")
        self.mixers = nn.ModuleList(mixers)
        self.probs = probs

    def draw(self, rng: np.random.Generator) -> int:
        """The position of the member that performs this step."""
        return int(rng.choice(len(self.mixers), p=self.probs))

    @property
    def needs(self) -> Needs:
        """The most that a member needs."""
        found = {mixer.needs for mixer in self.members()}
        return "step" if "step" in found else "model" if "model" in found else "batch"

    def setup(self, model: nn.Module) -> None:
        """Raises ``ValueError`` when two members bring classifiers of one name, of which only one could be kept."""
        taken: set[str] = set()
        for mixer in self.members():
            mixer.setup(model)
            own = mixer.models(model).keys() - {""}
            if both := sorted(own & taken):
                raise ValueError(f"two members bring a classifier {both[0]!r}; use one of them in a switch")
            taken |= own

    def plan(self, x: Tensor, y: Tensor, rng: np.random.Generator, *look: object) -> Plan:
        """``choice``, and the plan of the chosen member."""
        choice = self.draw(rng)
        return planned(choice, self.members()[choice].plan(x, y, rng, *look))

    def mix(  # type: ignore[override]
        self, x: Tensor, y: Tensor, *, choice: int, inner: Plan | None = None, **plan: Any
    ) -> tuple[Tensor, Tensor]:
        return self.members()[choice].mix(x, y, **(plan if inner is None else inner))

    def forward(self, model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, rng: np.random.Generator) -> Out:
        """The chosen member's own step; its plan gains ``choice``."""
        choice = self.draw(rng)
        out = self.members()[choice](model, criterion, x, y, rng)
        idle = (p for i, mixer in enumerate(self.members()) if i != choice for p in mixer.parameters())
        return out._replace(loss=out.loss + ops.touch(idle), plan=planned(choice, out.plan))

    def after_step(self, model: nn.Module, progress: float) -> None:
        for mixer in self.members():
            mixer.after_step(model, progress)

    def models(self, model: nn.Module) -> dict[str, nn.Module]:
        """The classifiers of all members; ``""`` is the model, or what a member reports in its place."""
        nets = {"": model}
        for mixer in self.members():
            nets |= {name: net for name, net in mixer.models(model).items() if name or net is not model}
        return nets

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The groups of all members, each with its own settings."""
        return [group for mixer in self.members() for group in mixer.param_groups(lr, weight_decay)]

    def members(self) -> list[Mixer]:
        """The mixers, typed."""
        return list(self.mixers)  # type: ignore[arg-type]


def planned(choice: int, plan: Plan) -> Plan:
    """The plan of the chosen member with the choice; that of a ``Switch`` keeps its own choice, as ``inner``."""
    return {"choice": choice, "inner": plan} if "choice" in plan else {"choice": choice, **plan}


def deit(mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0) -> Switch:
    """The DeiT rows: Mixup or CutMix with probability one half each.

    Training data-efficient image transformers and distillation through attention. Touvron et al. ICML 2021,
    https://arxiv.org/abs/2012.12877, table 9: mixup 0.8, cutmix 1.0, switched per batch.
    """
    return Switch([Mixup(mixup_alpha), CutMix(cutmix_alpha)])


def rsb(mixup_alpha: float = 0.1, cutmix_alpha: float = 1.0) -> Switch:
    """The RSB rows: Mixup or CutMix with probability one half each.

    ResNet strikes back: an improved training procedure in timm. Wightman, Touvron, Jegou. 2021,
    https://arxiv.org/abs/2110.00476, table 2: mixup 0.1, cutmix 1.0, switched per batch.
    """
    return Switch([Mixup(mixup_alpha), CutMix(cutmix_alpha)])


def alignmixup(alpha: float = 2.0, partner: str = "mixup") -> Switch:
    """The AlignMix rows: alignment of the last feature, or ``partner``, with probability one half each.

    ``partner``: "mixup" as in the reference code, whose numbers the tables print, or "manifoldmix" as in OpenMixup's
    configurations. AlignMixup: Improving Representations By Interpolating Aligned Features. Venkataramanan et al.
    CVPR 2022, https://arxiv.org/abs/2103.15375; alpha = 2 for both.
    """
    ops.check_choice("partner", partner, ("mixup", "manifoldmix"))
    return Switch([{"mixup": Mixup, "manifoldmix": ManifoldMix}[partner](alpha), AlignMix(alpha)])


def transmix(mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0, share: float = 0.8) -> Switch:
    """The TransMix rows: CutMix with labels by attention for ``share`` of the batches, Mixup for the others.

    TransMix: Attend to Mix for Vision Transformers. Chen et al. CVPR 2022, https://arxiv.org/abs/2111.09833.
    """
    ops.check_between("share", share, 0.0, 1.0)
    return Switch([Mixup(mixup_alpha), TransMix(CutMix(cutmix_alpha))], [round(1 - share, 12), share])


def mixpro(
    alpha: float = 1.0,
    cell: int = 32,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    share: float = 0.5,
    detach: bool = True,
    smoothed: bool = False,
) -> Switch:
    """MixPro as published: MaskMix with progressive labels for ``share`` of the batches, Mixup or CutMix for the rest.

    MixPro: Data Augmentation with MaskMix and Progressive Attention Labeling for Vision Transformer. Zhao et al.
    ICLR 2023, https://arxiv.org/abs/2304.12043; ``alpha, cell, detach, smoothed`` are those of ``MixPro``.
    """
    ops.check_between("share", share, 0.0, 1.0)
    each = round((1 - share) / 2, 12)
    return Switch(
        [MixPro(alpha, cell, detach, smoothed), Mixup(mixup_alpha), CutMix(cutmix_alpha)], [share, each, each]
    )


def tokenmix(
    mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0, use_alpha: bool = True, teacher: str | None = None
) -> Switch:
    """The TokenMix rows: Mixup or blocks of tokens with probability one half each.

    ``cutmix_alpha``: the Beta parameter of the share of tokens, which the reference code ignores (``use_alpha=False``).
    TokenMix: Rethinking Image Mixing for Data Augmentation in Vision Transformers. Liu et al. ECCV 2022,
    https://arxiv.org/abs/2207.08409; mixup 0.8, switched per batch.
    """
    return Switch([Mixup(mixup_alpha), TokenMix(cutmix_alpha, use_alpha, teacher)])


def smmix(mixup_alpha: float = 0.8) -> Switch:
    """SMMix as published: Mixup or the attended square with probability one half each.

    SMMix: Self-Motivated Image Mixing for Vision Transformers. Chen et al. ICCV 2023, https://arxiv.org/abs/2212.12977;
    mixup 0.8, switched per batch.
    """
    return Switch([Mixup(mixup_alpha), SMMix()])


def learned(block: type[nn.Module]) -> Callable[..., AutoMix]:
    """The step of AutoMix with a mix block: takes, and shows as its signature, the arguments of both."""
    of_block = inspect.signature(block).parameters
    of_step = {name: p for name, p in inspect.signature(AutoMix).parameters.items() if name != "block"}

    def make(**args: Any) -> AutoMix:
        own = {name: args.pop(name) for name in of_block if name in args}
        return AutoMix(block(**own), **args)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=keyword) for p in (*of_step.values(), *of_block.values())]
    make.__signature__ = inspect.Signature(parameters, return_annotation=AutoMix)  # type: ignore[attr-defined]
    make.__doc__ = inspect.getmodule(block).__doc__
    return make


automix = learned(MixBlock)
samix = learned(SAMixBlock)


def decouplemix(
    base: Mixer | None = None, eta: float = 0.1, power: float = 0.0, two_hot: float | None = None, xi: float = 1.0
) -> DecoupleMix:
    """The decoupled regulariser over ``base``, or over Mixup with alpha = 1, as in OpenMixup's ImageNet configurations.

    Those have power = 1, the paper 0. Harnessing Hard Mixed Samples with Decoupled Regularizer. Liu et al. NeurIPS
    2023, https://arxiv.org/abs/2203.10761.
    """
    return DecoupleMix(Mixup(1.0) if base is None else base, eta, power, two_hot, xi)


def guidedmix(source: str = "spectral", share: float | None = None) -> Switch:
    """GuidedMixup as published: ``share`` of the batches mixed by saliency, the others as they are.

    None: half with "spectral" saliency, 0.8 with that of the "gradient". GuidedMixup: An Efficient Mixup Strategy
    Guided by Saliency Maps. Kang and Kim. AAAI 2023, https://arxiv.org/abs/2306.16612.
    """
    mixer = GuidedMix(source)
    share = {"spectral": 0.5, "gradient": 0.8}[source] if share is None else share
    ops.check_between("share", share, 0.0, 1.0)
    return Switch([Vanilla(), mixer], [round(1 - share, 12), share])
