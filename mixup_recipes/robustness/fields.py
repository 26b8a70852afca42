"""What corruptions are made of: streaks, enlargements, clouds, ice, and pictures read between their pixels.

A field is (H, W) or (H, W, 3), floats; the laws are those of the reference code that ``corruptions`` names.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float64]


def gaussian(distances: NDArray[Any], sigma: float) -> Array:
    """The weights of a Gaussian at these distances, with sum 1."""
    weights = np.exp(-(distances**2) / (2 * sigma**2))
    return weights / weights.sum()


def streaks(x: Array, radius: int, sigma: float, degrees: float) -> Array:
    """ImageMagick's motion blur of (H, W) or (H, W, 3): a mean of 2 * radius + 1 pixels along a line, half a Gaussian.

    The line begins at the pixel, 0 degrees go right, 90 down; its points are rounded. Outside the border goes on.
    """
    reach = 2 * radius
    along = np.arange(reach + 1)
    height, width = x.shape[:2]
    padded = np.pad(x, [(reach, reach)] * 2 + [(0, 0)] * (x.ndim - 2), mode="edge")
    angle = math.radians(degrees)
    blurred = np.zeros_like(x)
    for weight, distance in zip(gaussian(along, sigma), along, strict=True):
        top = reach + math.ceil(distance * math.sin(angle) - 0.5)
        left = reach + math.ceil(distance * math.cos(angle) - 0.5)
        blurred += weight * padded[top : top + height, left : left + width]
    return blurred


def zoomed(x: Array, factor: float) -> Array:
    """The middle of (H, W) or (H, W, 3), enlarged linearly by a factor of at least 1 and cut to the size of ``x``."""
    for axis in (0, 1):
        side = x.shape[axis]
        cut = math.ceil(side / factor)
        large = round(cut * factor)
        # The first and last pixel of the cut are the first and last of the enlarged one, whose middle is taken
        position = (np.arange(side) + (large - side) // 2) * ((cut - 1) / max(1, large - 1))
        low = np.minimum(position.astype(int), max(0, cut - 2))
        share = (position - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        first = (side - cut) // 2 + low
        x = x.take(first, axis) * (1 - share) + x.take(np.minimum(first + 1, side - 1), axis) * share
    return x


def plasma(side: int, decay: float, rng: np.random.Generator) -> Array:
    """A cloud in [0, 1], square, its side the power of 2 from ``side`` on: the diamond-square algorithm on a torus.

    Each round puts a point into the middle of four corners, then one between each two neighbours: the mean of the four
    nearest, and even noise, which falls by ``decay`` squared from round to round.
    """
    cloud, noise = np.zeros((1, 1)), 1.0
    while len(cloud) < side:
        corners, (first, second, third) = cloud, rng.uniform(-noise, noise, (3, *cloud.shape))
        pairs = corners + np.roll(corners, -1, 0)
        middles = (pairs + np.roll(pairs, -1, 1)) / 4 + first
        beside = (middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)) / 4 + second
        below = (middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)) / 4 + third
        rows = np.stack([np.stack([corners, beside], 2), np.stack([below, middles], 2)], 1)
        cloud = rows.reshape(2 * len(corners), -1)
        noise /= decay**2
    cloud -= cloud.min()
    return cloud / max(cloud.max(), 1e-12)


PANES = ((78, 149, 166, 17), (201, 205, 214, 22), (201, 205, 214, 22), (138, 153, 165, 29), (112, 123, 135, 43))
"""Of the reference's photographs frost1 to frost5: mean red, green and blue, and the deviation of the grey, of 255."""


def ice(height: int, width: int, rng: np.random.Generator) -> Array:
    """Frost (H, W, 3) in place of a photograph: random needles on uneven ice, in a colour of ``PANES``.

    The spread that it has at each width of detail, octave by octave, is near to that of the photographs.
    """
    *colour, spread = PANES[rng.integers(len(PANES))]
    edge, needles = 24, np.zeros((height, width))
    for angle, thickness in zip(rng.uniform(0, 360, 8), rng.uniform(0, 1.5, 8), strict=True):
        seeds = (rng.random((height + 2 * edge, width + 2 * edge)) < 0.008).astype(float)
        grown = streaks(ndimage.gaussian_filter(seeds, thickness), edge // 2, 10, angle)
        needles = np.maximum(needles, grown[edge:-edge, edge:-edge] / max(grown.max(), 1e-12))
    uneven = plasma(max(height, width), 1.5, rng)[:height, :width]
    relief = needles / max(needles.std(), 1e-12) + uneven / max(uneven.std(), 1e-12)
    relief = (relief - relief.mean()) / max(relief.std(), 1e-12)
    return ((colour + spread * relief[..., None]) / 255).clip(0, 1)


def sampled(x: Array, positions: Array, border: str) -> Array:
    """The picture at positions (2, H, W), row and column, linearly between pixels."""
    channels = [ndimage.map_coordinates(channel, positions, order=1, mode=border) for channel in np.moveaxis(x, 2, 0)]
    return np.stack(channels, 2)
