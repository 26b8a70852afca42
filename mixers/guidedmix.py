"""GuidedMixup: An Efficient Mixup Strategy Guided by Saliency Maps. Kang, Kim. AAAI 2023.

https://arxiv.org/abs/2306.16612, reference code https://github.com/3neutronstar/GuidedMixup

Formula: s is the saliency of an image. It is smoothed by a Gaussian of 7 x 7 pixels and standard deviation 3, and it
sums to 1. Images are mixed pixel by pixel, ``m = s / (s + s[index])``, ``x' = m*x + (1-m)*x[index]``.
``lam = mean of m`` for each sample. Partners are images whose saliency is apart. They are found greedily. The two
farthest images (Euclidean distance of s) come first. After that, the image that is farthest from the last one, of those
left, always comes next. Each image is the partner of the one before it, and the first is the partner of the last.

Published defaults: Half of the batches are mixed with spectral residual (GuidedMixup-SR), 0.8 of them with gradients
(GuidedMixup-AP). The others are not mixed. ``guidedmix`` does this; this class mixes every batch.

Sampling law: ``guidedmix@kang-2023.2``: Nothing is drawn. A plan follows from the images (and the model). (The first
version of this law, ``guidedmix@kang-2023``, squared the spectral saliency and smoothed it once.)

Cost: "spectral" takes no pass. "gradient" takes one more forward and the backward pass to the image, which makes 1.67
plain steps.

Spectral residual (Hou and Zhang. Saliency Detection: A Spectral Residual Approach. CVPR 2007): The grey image is taken
with no side above 128 pixels. The amplitude of each frequency is divided by the geometric mean of the 3 x 3 around it.
Saliency is the magnitude of the image that comes back. It is smoothed by the same Gaussian before it is resized.

Deviations: Pairs are searched on the device, in B short steps, and nothing is read back. The authors' main script asks
for a search ("greedy_c") that its code does not know, so it pairs by a random permutation. The paper and their code for
fine-grained sets search. (OpenMixup's search comes after the images were paired at random, and has no effect.) The
saliency is computed in evaluation mode (reference code: in training mode) and leaves no gradient. Grey is the luma of
the normalised channels, with 0.299 parts of red (reference code: 0.2989, by which masks differ by up to 0.013). A pixel
where neither image is salient is half of each (reference code: not a number). An image without contrast, or without
gradient, is salient everywhere.

Kind: input.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from . import ops, taps
from .base import Mixer, Needs, Plan
from .compose import Switch
from .registry import build

LUMA = (0.299, 0.587, 0.114)
SIDE = 128
GAUSSIAN = [math.exp(-(i**2) / (2 * 3.0**2)) for i in range(-3, 4)]
CONTRAST = 1e-3  # in standard deviations of the dataset; a step of 8 bits is 0.017


class GuidedMix(Mixer):
    """Mix each pixel by the saliency of both images, with a partner whose saliency lies elsewhere.

    ``source`` is "spectral", which needs the image alone, or "gradient", which takes the gradient of the loss.
    """

    def __init__(self, source: str = "spectral"):
        super().__init__()
        ops.check_choice("source", source, ("spectral", "gradient"))
        self.source = source

    @property
    def needs(self) -> Needs:
        """The model for its gradient only."""
        return "model" if self.source == "gradient" else "batch"

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """``index`` (B,), one cycle through the batch, and ``mask`` (B, 1, H, W), whose mean is the label's share."""
        if min(x.shape[2:]) < len(GAUSSIAN) // 2 + 1:
            raise ValueError(f"GuidedMix needs sides of at least 4 pixels, got {x.shape[2]} x {x.shape[3]}")
        if self.source == "gradient":
            ops.check_look(look)
            model, criterion = look
            found = taps.magnitude(taps.saliency(model, criterion, x, y))
        else:
            found = spectral_residual(x)
        with ops.full_precision(x.device):
            found = blurred(found)[:, None]
            total = found.sum((1, 2, 3), keepdim=True)
            even = 1 / found[0].numel()
            found = torch.where(total > 0, found / total.clamp(min=torch.finfo(found.dtype).tiny), even)
            index = farthest_partners(found.flatten(1))
            both = found + found[index]
            mask = torch.where(both > 0, found / both.clamp(min=torch.finfo(both.dtype).tiny), 0.5)
        return {"index": index, "mask": mask}


def guidedmix(source: str = "spectral", share: float | None = None) -> Switch:
    """Make the published method: it mixes ``share`` of the batches by saliency and leaves the others as they are.

    If ``share`` is None, it is half with "spectral" saliency and 0.8 with that of the "gradient".
    """
    mixer = GuidedMix(source)
    share = {"spectral": 0.5, "gradient": 0.8}[source] if share is None else share
    ops.check_between("share", share, 0.0, 1.0)
    return Switch([build("vanilla"), mixer], [round(1 - share, 12), share])


def blurred(maps: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
    """Convolved with the Gaussian, along one axis and then the other; the border is mirrored, so sides are 4 or more.

    As a sum of shifted maps: a convolution of one channel takes ten times as long on a CPU.
    """
    half, total = len(GAUSSIAN) // 2, sum(GAUSSIAN)
    maps = F.pad(maps, (half, half, half, half), mode="reflect")
    for axis in (1, 2):
        length, given = maps.shape[axis] - 2 * half, maps
        maps = given.narrow(axis, half, length) * (GAUSSIAN[half] / total)
        for i in range(half):
            for place in (i, 2 * half - i):
                maps.add_(given.narrow(axis, place, length), alpha=GAUSSIAN[i] / total)
    return maps


@torch.no_grad()
def spectral_residual(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
    """How unexpected each pixel is by the spectrum of its image, at least 0; 1 everywhere without contrast."""
    kind = torch.promote_types(x.dtype, torch.float32)
    with ops.full_precision(x.device):
        channels = x.to(kind).unbind(1)
        luma = LUMA if len(channels) == len(LUMA) else (1 / len(channels),) * len(channels)
        grey = torch.stack([channel * weight for channel, weight in zip(channels, luma, strict=True)], 1).sum(1, True)
        size = [min(side, SIDE) for side in x.shape[2:]]
        small = F.interpolate(grey, size, mode="bilinear", antialias=True)[:, 0]
        spectrum = torch.fft.fft2(small)
        # exp(log a - mean(log a)) with the phase of the spectrum is the spectrum times exp(-mean(log a)).
        log_amplitude = spectrum.abs().clamp(min=1e-8).log()
        around = F.avg_pool2d(F.pad(log_amplitude[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]
        found = torch.fft.ifft2(spectrum * (-around).exp()).abs()
        contrast = small.amax((1, 2), keepdim=True) - small.amin((1, 2), keepdim=True)
        found = torch.where(contrast > CONTRAST, found, 1.0).nan_to_num(0.0, 0.0, 0.0)
        return F.interpolate(blurred(found)[:, None], x.shape[2:], mode="bilinear")[:, 0]


def farthest_partners(vectors: Float[Tensor, "B n"]) -> Int[Tensor, " B"]:
    """A single cycle through the batch that goes greedily to the farthest of those left; nothing is read back."""
    size = len(vectors)
    distance = torch.cdist(vectors, vectors)
    last = (distance.triu(1).argmax() // size).view(1)  # with its farthest: the farthest two; both halves may differ
    cycle = [last]
    for _ in range(size - 1):
        distance.index_fill_(1, last, -1.0)  # taken
        last = distance.index_select(0, last).argmax(1)
        cycle.append(last)
    order = torch.cat(cycle)
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))
