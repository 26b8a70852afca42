"""MergeMix: A Unified Augmentation Paradigm for Visual and Multi-Modal Understanding. Jin, Li, Jian, et al. ICLR 2026.

https://arxiv.org/abs/2510.23479, reference code in OpenMixup https://github.com/Westlake-AI/openmixup (classification)
and https://github.com/JinXins/MergeMix (language models)

Formula: The model first looks at the clean images, and on the way similar patches become one token (ToMe). ``A`` is
where the class token looks in the last attention layer, as the mean over heads. Each patch takes the attention of the
token that it is in. Of P patches the ``p = floor(lam0*P)`` with the most attention stay, and the others show
``x[index]``:
    ``x' = M*x + (1-M)*x[index]``, ``y' = lam*y + (1-lam)*y[index]``, ``lam = p/P``,
    ``loss = L(f(x'), y') + L(f(x), y)``.

Published defaults: alpha = 1. A quarter of the patches is merged (49 of 196) on ImageNet, half of them (98) on small
data sets. Both parts of the loss weigh the same.

Sampling law: ``mergemix@jin-2026``: ``lam0 ~ Beta(alpha, alpha)`` is drawn once for the whole batch. The partners are a
uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner. With ``rescale`` a
normal draw for each sample comes last. Then comes what ``base`` draws.

Cost: A step takes the look at the clean images, which has fewer tokens than a forward, and a second step for the clean
images. This makes 2.3 steps of the model itself.

Models: The method takes DeiT and other plain ViTs of timm. For those without a class token it takes the mean over all
patches as queries, which is a variant of ours. Other models keep a grid that a merged token has no place on.

Deviations: The look at the clean images is in evaluation mode and without gradient (reference code: in training mode,
its graph kept and not used). Patches with equal attention, as those of one token have, stay in reading order (reference
code: in no particular order). The partners are any permutation. The reference code tries ten times for one without
fixed points. The paper's Eq. 8 is on in the configurations of small data sets and off in that of ImageNet. It draws the
label instead: normal with the share of tokens as its mean and lam as its deviation, moved and scaled so that the least
in the batch is 0 and the largest 1. Mean and deviation are those of the whole batch, so they cancel, and the label
depends on neither the images nor lam. This is why it is no default: ``rescale=True``. OpenMixup's loss replaces the
shares of a batch by their mean. Here each sample keeps its own. In the attention a token is not weighted by the number
of patches that it stands for, as in the reference code.
What made the published number of DeiT-S:
- The second part of the loss is of images mixed by Mixup with alpha = 0.8, ``base: {mixup: {alpha: 0.8}}``.
- The code for classification takes what the patches give the class token for what the class token gives them. It looks
  up the token of a patch among those left after the last layer's merge, two fewer than that layer's attention saw.
  ``as_released=True`` does both. (The code for language models takes the class token's row.) The configurations of
  small data sets take the attention of the ninth layer of twelve with the tokens left after the last.

Kind: input.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan
from .compose import check_base
from .registry import build

TINY = 1e-5


class MergeMix(Mixer):
    """Keep the patches with the most attention after similar ones were merged, and learn from a second batch.

    ``alpha`` is the Beta parameter of the share of patches and must be above 0. ``merged``, in [0, 1), is the share of
    patches that the look at the clean images merges. ``base`` is a mixer of images for the second part of the loss. If
    it is None, that part is of the clean images. ``rescale`` draws the label as the paper's Eq. 8 does. ``as_released``
    takes the attention as the released code does. The deviations say more of both.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        merged: float = 0.25,
        base: Mixer | None = None,
        rescale: bool = False,
        as_released: bool = False,
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_between("merged", merged, 0.0, 0.99)
        ops.check_choice("rescale", rescale, (False, True))
        ops.check_choice("as_released", as_released, (False, True))
        base = build("vanilla") if base is None else base
        check_base(base, "Mixup()")
        self.alpha = alpha
        self.merged = merged
        self.base = base
        self.rescale = rescale
        self.as_released = as_released

    def setup(self, model: nn.Module) -> None:
        """Raises ``ValueError`` when the model is no plain vision transformer, naming models that are."""
        taps.merging_blocks(model)

    def plan(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
        *look: Float[Tensor, "B h w"],
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 0 in the partner's patches, ``lam`` (B,).

        ``look``: how much each patch of the clean images is attended to.
        """
        ops.check_look(look)
        (attention,) = look
        lam = ops.beta(self.alpha, self.alpha, rng)
        index = ops.partners(x, rng)
        patches = attention.flatten(1)
        count = int(lam * patches.shape[1])
        order = patches.argsort(dim=1, descending=True, stable=True)
        cells = torch.zeros_like(patches).scatter_(1, order[:, :count], 1.0).view_as(attention)[:, None]
        share = count / patches.shape[1]
        labels = ops.send(rescaled(share, self.merged, len(x), rng), x) if self.rescale else ops.per_sample(share, x)
        return {"index": index, "mask": ops.to_pixels(cells, x), "lam": labels}

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """A look, the second batch, and the step on the mixed images."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng, self.attention(model, x))
        second, aim = self.base.mix(x, y, **self.base.plan(x, y, rng, model, criterion))
        beside = model(second)
        mixed, target = self.mix(x, y, **plan)
        logits = model(mixed)
        return Out.of(logits, target, plan, mix=criterion(logits, target), base=criterion(beside, aim))

    def attention(self, model: nn.Module, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w"]:
        """How much each patch is attended to, as part of the token that it is in."""
        with taps.looking(model), taps.merging(model, self.merged) as groups, taps.attention(model) as look:
            model(x)
        if self.as_released:
            tokens, of = look.weights().mean(1)[:, :, 0], groups[-1]
        else:
            queries = slice(0, 1) if look.has_class_token else slice(look.prefix, None)
            tokens, of = look.weights(queries).mean((1, 2)), groups[-2]
        return tokens.gather(1, of).unflatten(1, taps.grid(of.shape[1], x.shape[2:]))


def rescaled(share: float, mean: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """The paper's Eq. 8: normal draws with the share as deviation, (size,), the least 0, the largest 1."""
    drawn = rng.normal(mean, share, size)
    return (drawn - drawn.min()) / (drawn.max() - drawn.min() + TINY)
