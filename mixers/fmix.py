"""FMix: Enhancing Mixed Sample Data Augmentation. Harris et al. 2020.

https://arxiv.org/abs/2002.12047, reference code https://github.com/ecs-vlc/FMix

Formula: ``lam ~ Beta(alpha, alpha)``. A random grey image is made whose Fourier amplitudes fall with the frequency f as
``1/max(f, 1/max(H, W))^decay_power``. The mask is 1 in the brightest ``k`` pixels of this image, with ``k = lam*H*W``.
``x' = mask*x + (1-mask)*x[index]``, ``y' = k/(H*W)*y + (1 - k/(H*W))*y[index]``.

Published defaults: alpha = 1, decay_power = 3, max_soft = 0 (paper, section 4 and appendix).

Sampling law: ``fmix@harris-2020``: One mask is drawn for the whole batch. k is lam*H*W rounded up or down with equal
odds. The published code takes the random numbers of the spectrum's first two rows as its real and its imaginary part.
So the spectrum that it transforms has W/2+1 rows and two columns. Across the image only the frequencies 0 and 1 occur,
with 0.12 and 0.88 of the energy at 64 x 64. ``isotropic=True`` is the spectrum of the paper, which has 0.30, 0.67 and
0.03 of the energy in the frequencies 0, 1 and 2. The partners are a uniformly random permutation of the batch. Fixed
points are allowed: an image may be its own partner.

Deviations: The label share is the mean of the mask, which is within 1/(H*W) of the published lam. The mask has the size
of the batch's images. For an odd width the published code transforms one more row of the spectrum, which changes one
pixel in 100,000. Since March 2025 (commit 9fc838b) OpenMixup redraws the partners up to ten times, until no image is
its own partner. Its tables are older. They were made with plain permutations, as here.

Kind: input.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import ops
from .base import Mixer, Plan


class FMix(Mixer):
    """Mix by a random binary mask of a few smooth blobs. The whole batch has the same mask.

    ``alpha`` is the Beta parameter and must be above 0. ``decay_power`` says how fast the amplitudes fall and must be
    at least 0. ``max_soft``, in [0, 0.5], replaces the sharp edge by a linear ramp. The ramp covers that share of the
    pixels, in order of brightness, on either side of the threshold. ``reformulate`` draws lam from Beta(alpha+1, alpha)
    and keeps the sample's own label. This is an equivalent by Huszar, which the paper's code offers. ``isotropic``
    takes the spectrum of the paper instead of that of the published code.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        decay_power: float = 3.0,
        max_soft: float = 0.0,
        reformulate: bool = False,
        isotropic: bool = False,
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_between("decay_power", decay_power, 0.0)
        ops.check_between("max_soft", max_soft, 0.0, 0.5)
        ops.check_choice("reformulate", reformulate, (False, True))
        ops.check_choice("isotropic", isotropic, (False, True))
        self.alpha = alpha
        self.decay_power = decay_power
        self.max_soft = max_soft
        self.reformulate = reformulate
        self.isotropic = isotropic

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W), and ``lam`` (B,), its mean, or 1 if reformulated."""
        pixels = x[0, 0].numel()
        lam = ops.beta(self.alpha + self.reformulate, self.alpha, rng)
        kept = math.ceil(lam * pixels) if rng.random() < 0.5 else math.floor(lam * pixels)
        soft = int(pixels * min(self.max_soft, lam, 1 - lam))
        mask = top_pixels(self.low_frequency_image(x, rng), kept, soft)
        return {
            "index": ops.partners(x, rng),
            "mask": mask.expand(len(x), 1, -1, -1),
            "lam": ops.per_sample(1.0 if self.reformulate else kept / pixels, x),
        }

    def low_frequency_image(self, x: Float[Tensor, "B C H W"], rng: np.random.Generator) -> Float[Tensor, "H W"]:
        """A random image of the size of the batch's, on its device, in float32; only the order of its values counts."""
        height, width = x.shape[-2:]
        rows = np.fft.fftfreq(height)[: height if self.isotropic else 2, None]
        cycles = np.hypot(rows, np.fft.rfftfreq(width)) * max(height, width)
        amplitude = np.maximum(cycles, 1) ** -self.decay_power
        if self.isotropic:
            spectrum = amplitude * rng.standard_normal((2, *amplitude.shape))
        else:
            spectrum = amplitude[..., None] * rng.standard_normal((2, amplitude.shape[1], 2))
        real, imaginary = ops.send(spectrum, x)
        return torch.fft.irfft2(torch.complex(real, imaginary), s=(height, width))


def top_pixels(image: Float[Tensor, "H W"], kept: int, soft: int) -> Float[Tensor, "H W"]:
    """1 for the ``kept`` brightest pixels, 0 for the others; a linear ramp from 1 to 0 over ``soft`` ranks either side.

    The counts travel to the device as a tensor, so that a compiled step is not compiled again for every lambda.
    """
    order = image.flatten().argsort(descending=True)
    rank = torch.arange(len(order), device=image.device)
    soft = max(soft, 1)  # a ramp over two ranks is 1, 0: the threshold itself
    end, steps = ops.send(np.array([kept + soft - 1, 2 * soft - 1]), image)
    weight = ((end - rank) / steps).clamp(0, 1)
    return torch.empty_like(weight).scatter(0, order, weight).view_as(image)
