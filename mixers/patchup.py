"""PatchUp: A Feature-Space Block-Level Regularization Technique for Convolutional Neural Networks. Faramarzi, Amini,
Badrinaaraayanan, Verma, Chandar. AAAI 2022.

https://arxiv.org/abs/2006.07794, reference code https://github.com/chandar-lab/PatchUp

Formula: A place is drawn from {the images, after the first convolution, after stage 1}. In a hidden feature h, of
height H and width W, blocks of b x b positions are drawn. They differ in each channel and are the same for the whole
batch. Each position is the centre of a block with the probability ``gamma*H*W / (b^2 * (H-b+1) * (W-b+1))``. Inside of
the blocks h becomes ``share*h + (1-share)*h[index]``. Hard PatchUp has ``share = 0``, which swaps the blocks. Soft
PatchUp has ``share ~ Beta(alpha, alpha)``. Images are mixed by CutMix in both. p is the part that no block covers.
``Y = share*y + (1-share)*y[index]`` and ``W = p*y + (1-p)*Y``, ``loss = p*l(y) + (1-p)*l(Y) + l(W)``.

Published defaults: b = 7, and 1 for CutMix's alpha. Hard PatchUp has gamma = 0.5 in seven batches of ten; the others
stay as they are. Soft PatchUp has gamma = 0.75, alpha = 2 and every batch. (These are from the reference code, its
commands for CIFAR.) ``patchup`` is the hard form, ``softpatchup`` the soft one. The class ``PatchUp``, ``patch`` within
a switch, is either, in every batch.

Sampling law: ``patchup@faramarzi-2022``: One place, one share and one pattern of blocks are drawn for the whole batch.
The three places are equally likely. Blocks may overlap and are cut at the border. The partners are a uniformly random
permutation of the batch. Fixed points are allowed: an image may be its own partner.

Cost: A step takes one forward and one backward, three losses of one prediction, and a mask of the size of one sample's
feature.

Deviations: l is the recipe's loss (reference code: binary cross entropy on the softmax). Both are linear in the target,
so the two halves of the loss are equal, and it is twice that of W. The mask is drawn in two parts: how many centres
there are, and then which. This is the same law. The reference code computes the probability once, for the size that it
meets first. Here it is that of each map, at most 1. Blocks are no larger than the map: b is then the largest odd number
that fits. The placement is ours: Stage 1 is the first of the last four published stages. In a ViT it is the first
quarter of the blocks, where the class token stays as it is. After the first convolution means before its norm, as in
the reference code's networks.

Kind: input, feature.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan
from .registry import Made, build

LAYERS, CUTMIX_ALPHA = 3, 1.0
Shape = tuple[int, int, int]


class PatchUp(Mixer):
    """Swap or blend blocks of an early feature with a partner's, or paste a box of its image.

    ``alpha`` is None to swap the blocks (hard). A number above 0 is the Beta parameter of what stays in them (soft).
    ``gamma``, in [0, 1], is about the part that blocks cover. ``block_size`` is their side, an odd number of positions.
    """

    inside = True

    def __init__(self, alpha: float | None = None, gamma: float = 0.5, block_size: int = 7):
        super().__init__()
        if alpha is not None:
            ops.check_positive("alpha", alpha)
        ops.check_between("gamma", gamma, 0.0, 1.0)
        ops.check_count("block_size", block_size, "of positions")
        if block_size % 2 == 0:
            raise ValueError(f"block_size must be odd, so that a block has a centre, got {block_size}")
        self.alpha = alpha
        self.gamma = gamma
        self.block_size = block_size

    def setup(self, model: nn.Module) -> None:
        """Find the modules whose output is mixed. Raises ``ValueError`` without published stages or a convolution."""
        first, *_ = taps.parts(model)
        self.modules_mixed = ["", taps.first_convolution(model), first]

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """``layer``, ``share`` (B,) of the sample in the blocks, ``mask`` 0 in them, ``index`` (B,).

        ``look``: the layer, and (channels, height, width) of its feature, unless it is 0, the images. The mask has one
        row for the whole batch, (1, channels, height, width), of images (B, 1, H, W). ``uncovered`` (B,) is its mean,
        ``lam`` (B,) the sample's share of the label. Without a look the layer is drawn; it has to be 0 then.
        """
        layer, *shape = look or (self.layer(rng),)
        if layer == 0:
            height, width = x.shape[-2:]
            box = ops.clipped_box(height, width, ops.beta(CUTMIX_ALPHA, CUTMIX_ALPHA, rng), rng)
            mask, share = ops.box_mask(*box, x), 0.0
            uncovered = ops.per_sample(1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width), x)
        else:
            ops.check_look(shape)
            share = 0.0 if self.alpha is None else ops.beta(self.alpha, self.alpha, rng)
            mask = self.blocks(shape[0], x, rng)
            uncovered = mask.mean().expand(len(x))
        return {
            "index": ops.partners(x, rng),
            "layer": layer,
            "mask": mask,
            "share": ops.per_sample(share, x),
            "uncovered": uncovered,
            "lam": uncovered + share * (1 - uncovered),
        }

    def layer(self, rng: np.random.Generator) -> int:
        """Where to mix: 0 the images, 1 after the first convolution, 2 after stage 1."""
        return int(rng.integers(LAYERS))

    def blocks(self, shape: Shape, x: Tensor, rng: np.random.Generator) -> Float[Tensor, "1 c h w"]:
        """A mask on the device of ``x``, 0 inside of the blocks, for a feature of (channels, height, width)."""
        _, height, width = shape
        side = min(self.block_size, height, width)
        side -= 1 - side % 2
        centres = (height - side + 1) * (width - side + 1)
        probability = min(1.0, self.gamma * height * width / (side**2 * centres))
        size = int(np.prod(shape))
        count = rng.binomial(size, probability)
        drawn = ops.send(rng.choice(size, count, replace=False, shuffle=False), x)
        centre = torch.zeros(size, device=x.device).index_fill(0, drawn, 1.0)
        return 1 - F.max_pool2d(centre.view(1, *shape), side, stride=1, padding=side // 2)

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        layer: int,
        mask: Tensor,
        share: Float[Tensor, " B"],
        uncovered: Float[Tensor, " B"],
        lam: Float[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """The targets W, and the images: mixed for layer 0, as they are when it is a hidden feature that is mixed."""
        ops.check_batch(x, y)
        return ops.blend(x, index, mask) if layer == 0 else x, ops.blend_targets(y, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward, with the drawn place mixed; its plan is made when the size of the feature is known."""
        ops.check_batch(x, y)
        layer = self.layer(rng)
        if layer == 0:
            plan = self.plan(x, y, rng, layer)
            logits = model(self.mix(x, y, **plan)[0])
        else:
            logits, plan = self.hidden(model, x, y, rng, layer)
        _, target = self.mix(x, y, **plan)
        blended = ops.blend_targets(y, plan["index"], plan["share"])
        uncovered = plan["uncovered"]
        mix = uncovered * criterion(logits, y) + (1 - uncovered) * criterion(logits, blended)
        return Out.of(logits, target, plan, mix=mix, reweighted=criterion(logits, target))

    def hidden(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: np.random.Generator, layer: int
    ) -> tuple[Float[Tensor, "B K"], Plan]:
        """Logits of the images with the feature after a layer mixed, and the plan of it."""
        name, plan = self.modules_mixed[layer], Plan()

        @torch.compiler.disable  # it draws, which the graph of a compiled stage cannot hold
        def change(h: Tensor) -> Tensor:
            plan.update(self.plan(x, y, rng, layer, shape_of(model, name, h, x)))
            weight = torch.lerp(plan["mask"], torch.ones_like(plan["mask"]), plan["share"][0])
            return ops.blend(h, plan["index"], laid_out(model, name, weight, h))

        with taps.edit(model, name, change):
            logits = model(x)
        return logits, plan


def patchup(gamma: float = 0.5, block_size: int = 7) -> Made:
    """Make Hard PatchUp as published: it mixes seven batches of ten, and the others stay as they are."""
    return build("switch", mixers=[PatchUp(None, gamma, block_size), build("vanilla")], probs=[0.7, 0.3])


def softpatchup(alpha: float = 2.0, gamma: float = 0.75, block_size: int = 7) -> PatchUp:
    """Make Soft PatchUp as published.

    ``alpha`` is the Beta parameter of what stays of the sample in the blocks. It must be above 0.
    """
    return PatchUp(alpha, gamma, block_size)


def shape_of(model: nn.Module, name: str, h: Tensor, x: Float[Tensor, "B C H W"]) -> Shape:
    """Channels, height and width of the output of a module for the images ``x``; of tokens the patches' grid."""
    axis = taps.channel_axis(model, name, h)
    if h.ndim == 3:
        height, width = taps.grid(taps.to_tokens(model, h).shape[1], x.shape[-2:])
    else:
        height, width = h.shape[2:] if axis == 1 else h.shape[1:3]
    return h.shape[axis], height, width


def laid_out(model: nn.Module, name: str, weight: Float[Tensor, "1 c h w"], h: Tensor) -> Tensor:
    """Weights of a map, for a feature as it lies there; 1 for the class token, and the same for each sample."""
    if taps.channel_axis(model, name, h) == -1:
        weight = weight.permute(0, 2, 3, 1)
    if h.ndim == 3:
        weight = F.pad(weight.flatten(1, 2), (0, 0, getattr(model, "num_prefix_tokens", 0), 0), value=1.0)
    return weight.to(h.dtype).expand(h.shape)  # cast first: a cast of what is expanded is a mask for each sample
