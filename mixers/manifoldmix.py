"""Manifold Mixup: Better Representations by Interpolating Hidden States. Verma et al. ICML 2019.

https://arxiv.org/abs/1806.05236, reference code https://github.com/vikasverma1077/manifold_mixup

Formula: A layer is drawn from {the input, after stage 1, after stage 2}. Up to this layer the network sees the clean
batch. ``h' = lam*h + (1-lam)*h[index]`` replaces the output of the layer, and the rest of the network sees h'.
``y' = lam*y + (1-lam)*y[index]`` with ``lam ~ Beta(alpha, alpha)``. The gradient flows through both parts of h'.

Published defaults: alpha = 2 (paper, CIFAR). The tables of the benchmark use 0.2 throughout.

Sampling law: ``manifoldmix@verma-2019``: One lambda and one layer are drawn for the whole batch. The three layers are
equally likely, so a third of the batches is plain Mixup, to the bit. The partners are a uniformly random permutation of
the batch. Fixed points are allowed: an image may be its own partner.

Where a stage ends: In a network whose maps get coarser, stages 1 and 2 are the first two of its last four published
stages. These are layer1 and layer2 of a ResNet and the first two stages of ConvNeXt, Swin, PVT and MogaNet, as in the
reference code and OpenMixup. For two kinds of networks the placement is ours. EfficientNet and MobileNet.V2 are mixed
after the blocks that end at strides 4 and 8; no code was published for them. The blocks of a ViT all have one
resolution, so a ViT is taken as four equal parts (DeiT: after blocks 3 and 6 of 12), and all of its tokens are mixed.
The tables have no such cell.

Deviations: The recipe's loss compares the target with the logits. (The reference code uses the binary cross entropy on
the softmax.) OpenMixup blends by a constant mask whose size it guesses from the layer. Here lambda is a scalar, and any
stride works. ``mix`` returns the images as the network receives them, so they are unmixed when the layer is hidden.

Kind: input, feature.
"""

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan

LAYERS = 3


class ManifoldMix(Mixer):
    """Blend images or a hidden feature by one lambda per batch.

    ``alpha`` is the Beta parameter and must be above 0.
    """

    inside = True

    def __init__(self, alpha: float = 2.0):
        super().__init__()
        ops.check_positive("alpha", alpha)
        self.alpha = alpha

    def setup(self, model: nn.Module) -> None:
        """Find the modules whose output is mixed. Raises ``ValueError`` when the model does not publish stages."""
        self.modules_mixed = ["", *taps.early_stages(model, LAYERS - 1, "ManifoldMix")]

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``lam`` (B,), ``layer`` 0 (the input), 1 or 2 (after that stage), ``index`` (B,)."""
        lam = ops.beta(self.alpha, self.alpha, rng)
        layer = int(rng.integers(LAYERS))
        return {"index": ops.partners(x, rng), "lam": ops.per_sample(lam, x), "layer": layer}

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"],
        layer: int,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Mixed targets, and the images: mixed for layer 0, as they are when it is a hidden feature that is mixed."""
        ops.check_batch(x, y)
        return ops.blend_samples(x, index, lam) if layer == 0 else x, ops.blend_targets(y, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward, with the planned layer's output mixed."""
        plan = self.plan(x, y, rng, model, criterion)
        mixed, target = self.mix(x, y, **plan)
        if plan["layer"] == 0:
            logits = model(mixed)
        else:
            name = self.modules_mixed[plan["layer"]]
            with taps.edit(model, name, lambda h: ops.blend_samples(h, plan["index"], plan["lam"])):
                logits = model(mixed)
        return Out.of(logits, target, plan, mix=criterion(logits, target))
