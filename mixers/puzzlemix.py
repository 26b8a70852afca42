"""Puzzle Mix: Exploiting Saliency and Local Statistics for Optimal Mixup. Kim, Choo, Song. ICML 2020.

https://arxiv.org/abs/2009.06962, reference code https://github.com/snu-mllab/PuzzleMix

Formula: The saliency s of a pixel is the norm over channels of the gradient of the loss. It is averaged over the blocks
of a b x b grid and scaled to sum to 1. Each sample has a mask z, with values in {1, 1/2, 0} for the blocks. The mask
minimises ``sum z*s[index] + (1-z)*s`` (the saliency that is lost) ``+ eta/b^2 * -log Binomial(z; lam0) + sum
(beta/16b)*(1 + gamma*d)*(z-z')^2`` over touching blocks, with ``lam0 ~ Beta(alpha, alpha)``. Here d says by how much
more the images differ across the boundary when one gives way to the other there. For equal z there is a cost of its own
of staying with either image. Transport follows: In each image blocks move, at ``t_eps`` times the squared distance, so
that salient blocks come to lie where the image shows. ``x' = z*T(x) + (1-z)*T'(x[index])``,
``y' = lam*y + (1-lam)*y[index]``. lam is the mean of z, for each sample.

Published defaults: alpha = 1, three levels, beta = 1.2, gamma = 0.5, eta = 0.2, strips of 4 pixels, t_eps = 0.8. The
numbers of blocks are those of OpenMixup, whose numbers the tables print: 2, 4 or 8 a side (reference code: also 16).

Sampling law: ``puzzlemix@kim-2020``: One lam0 and one b are drawn for the whole batch. b is uniform among ``blocks``.
The partners are a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.

Cost: A step takes one forward in evaluation mode and the gradient in the images. With ``clean_lam`` this is a forward
and a backward pass from which the model learns, so BatchNorm then sees the clean batch too.

Deviations: Up to 8 x 8 blocks the minimum is exact. It is found by descent on convex labels, for which lam0 is kept
1e-4 from 0 and 1 inside the logarithm. (The reference code makes alpha-beta swaps on integers, which overflow where a
block holds a third of the saliency.) Finer grids get row and column sweeps. Labels follow each sample's own lam, also
with label smoothing (OpenMixup: the batch's mean). Images may have any size: blocks differ by a pixel where the grid
does not divide the image. Where an image is not shown, a block stays if nothing moved to its place. A block without
saliency keeps its place (reference code: the place is left black). An image without any gradient has saliency
everywhere. The clean loss has the weight ``clean_lam`` beside the mixed loss (reference code: 2/K beside a binary loss
averaged over K).

Kind: input.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import grids, ops, taps
from .base import Criterion, Mixer, Needs, Out, Plan

EXACT = 8  # blocks a side up to which the mask is optimal: 2**8 states
MARGIN = 1e-4
Cells = Int[Tensor, "B t t"]


class PuzzleMix(Mixer):
    """Cut two images into blocks, keep what matters to the model, and move it to where it shows.

    ``alpha`` is the Beta parameter and must be above 0. ``blocks`` lists the numbers of blocks a side, of which one is
    drawn per batch. ``n_labels`` is the number of levels of the mask, 2 to 4. ``beta``, ``gamma`` and ``eta`` must be
    at least 0. They weigh the smoothness, the images' share in it, and the prior. ``neigh_size`` is the number of
    pixels on either side of a boundary that are compared. ``transport`` says whether blocks are moved, at the cost
    ``t_eps``. ``t_size`` is the largest size in pixels of a block that is moved. ``adv_p`` is how often, per batch and
    image of a pair, adversarial noise is added, of at most ``adv_eps`` (of 1). ``clean_lam`` is the weight of the clean
    batch's loss. ``mean`` and ``std`` are those that the images were normalised with.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        blocks: Sequence[int] = (2, 4, 8),
        n_labels: int = 3,
        beta: float = 1.2,
        gamma: float = 0.5,
        eta: float = 0.2,
        neigh_size: int = 4,
        transport: bool = True,
        t_eps: float = 0.8,
        t_size: int | None = None,
        adv_p: float = 0.0,
        adv_eps: float = 0.0392156862745098,  # 10 of 255
        clean_lam: float = 0.0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        for name, value in (("alpha", alpha), ("t_eps", t_eps)):
            ops.check_positive(name, value)
        for name, value in (("beta", beta), ("eta", eta), ("adv_eps", adv_eps), ("clean_lam", clean_lam)):
            ops.check_between(name, value, 0.0)
        for name, value in (("gamma", gamma), ("adv_p", adv_p)):  # a larger gamma could reward a boundary
            ops.check_between(name, value, 0.0, 1.0)
        if not isinstance(blocks, list | tuple) or not blocks or not all(isinstance(b, int) and b > 1 for b in blocks):
            raise ValueError(f"blocks must be integers of at least 2, such as [2, 4, 8], got {blocks!r}")
        ops.check_count("neigh_size", neigh_size, unit="of pixels")
        if t_size is not None:
            ops.check_count("t_size", t_size, unit="of pixels")
        ops.check_choice("n_labels", n_labels, (2, 3, 4))
        ops.check_choice("transport", transport, (False, True))
        ops.check_rgb("mean", mean)
        ops.check_rgb("std", std, 1e-6)
        self.alpha = alpha
        self.blocks = blocks
        self.n_labels = n_labels
        self.beta = beta
        self.gamma = gamma
        self.eta = eta
        self.neigh_size = neigh_size
        self.transport = transport
        self.t_eps = t_eps
        self.t_size = t_size
        self.adv_p = adv_p
        self.adv_eps = adv_eps
        self.clean_lam = clean_lam
        self.mean = mean
        self.std = std

    @property
    def needs(self) -> Needs:
        """The model; with a clean loss the whole step."""
        return "step" if self.clean_lam else "model"

    def plan(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
        *look: Any,
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W), ``own`` and ``partner`` (B, t, t) or None, ``noise`` and ``noisy``.

        ``own``, ``partner``: which block each block shows, of the sample and of its partner. ``noise``: like ``x``, in
        units of the images before they were normalised, or None; ``noisy``: whether the sample, and the partner, get
        it. ``look``: the model and the criterion, or a function from images to their gradient.
        """
        ops.check_look(look)
        if x.shape[1] != 3:
            raise ValueError(f"PuzzleMix needs RGB images (B, 3, H, W), got {tuple(x.shape)}")
        lam = ops.beta(self.alpha, self.alpha, rng)
        grid = min(self.blocks[int(rng.integers(len(self.blocks)))], *x.shape[2:])
        noisy = [bool(rng.random() < self.adv_p) for _ in range(2)] if self.adv_p else [False, False]
        strength = float(rng.random()) if any(noisy) else 0.0
        index = ops.partners(x, rng)
        images, noise = x, None
        if any(noisy):  # a random start, then one step along the gradient
            noise = ops.send(rng.uniform(-self.adv_eps, self.adv_eps, x.shape), x)
            images = self.perturbed(x, noise)
        gradient = look[0](images) if len(look) == 1 else taps.saliency(look[0], look[1], images, y)
        if noise is not None:
            start = self.units(images.to(noise.dtype)) - self.units(x.to(noise.dtype))
            noise = strength * (start + (self.adv_eps + 2 / 255) * gradient.sign()).clamp(-self.adv_eps, self.adv_eps)
        with ops.full_precision(x.device):
            z, own, partner = self.solve(x.detach().float(), grids.saliency_map(gradient), index, grid, lam)
        rows, columns = (ops.send(grids.cell_of(length, z.shape[1]), x) for length in x.shape[2:])
        mask = z[:, None, rows[:, None], columns]
        return {"index": index, "mask": mask, "own": own, "partner": partner, "noise": noise, "noisy": noisy}

    def solve(
        self, x: Float[Tensor, "B C H W"], s: Float[Tensor, "B H W"], index: Tensor, grid: int, lam: float
    ) -> tuple[Float[Tensor, "B b b"], Cells | None, Cells | None]:
        """The mask of the blocks, and where they come from in the sample and in its partner."""
        top = self.n_labels - 1
        slope, prior, down, right = self.costs(x, s, index, grid, lam)
        if grid <= EXACT:
            labels = grids.descent(slope, prior, down, right)
        else:
            level = torch.arange(top + 1, device=x.device, dtype=slope.dtype)
            each = slope[..., None] * level + prior
            labels = grids.sweeps(each, (level[:, None] - level)[None] ** 2, down, right)
        z = 1 - labels / top
        if not self.transport:
            return z, None, None
        finer = max(1, min(x.shape[2:]) // grid // self.t_size) if self.t_size else 1
        shown = z.repeat_interleave(finer, 1).repeat_interleave(finer, 2)
        saliency = grids.block_saliency(s, grid * finer)
        both = torch.cat([saliency, saliency[index]]), torch.cat([shown > 0, shown < 1])
        own, partner = transported(*both, self.t_eps).chunk(2)
        return z, own, partner

    def costs(
        self, x: Float[Tensor, "B C H W"], s: Float[Tensor, "B H W"], index: Tensor, grid: int, lam: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``slope``, ``prior``, ``down``, ``right`` of ``grids.descent``, level l being ``z = 1 - l/(n_labels-1)``."""
        top = self.n_labels - 1
        shown = grids.block_saliency(s, grid)
        gap = shown - shown[index]  # what showing the partner costs more than showing the sample
        scale = self.beta / (16 * grid)
        weights = []
        pixels = x * ops.send(np.array(self.std)[:, None, None], x)  # differences in units of 0 to 1
        for dim, (first, second) in enumerate(boundaries(pixels, grid, self.neigh_size), start=1):
            own = difference(first, second)  # upper and lower, or left and right, both of the sample
            partner = own[index]
            leave, enter = difference(first, second[index]), difference(first[index], second)
            # Half of what is seen at a boundary is the price of what either side shows, the rest that of a change.
            strength = scale * self.gamma / 2
            gap.narrow(dim, 0, grid - 1).add_(strength * (enter + partner - leave - own))
            gap.narrow(dim, 1, grid - 1).add_(strength * (leave + partner - enter - own))
            weights.append((scale + strength * (leave + enter - own - partner)) / top**2)
        lam = min(max(lam, MARGIN), 1 - MARGIN)
        chance = [math.comb(top, level) * lam ** (top - level) * (1 - lam) ** level for level in range(top + 1)]
        prior = ops.send(-self.eta / grid**2 * np.log(chance), x)
        return gap / top, prior, weights[0], weights[1]

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        mask: Float[Tensor, "B 1 H W"],
        own: Cells | None,
        partner: Cells | None,
        noise: Float[Tensor, "B C H W"] | None,
        noisy: list[bool],
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """``mask`` of the sample's blocks and the rest of the partner's."""
        ops.check_batch(x, y)
        target = ops.blend_targets(y, index, mask.mean((1, 2, 3)))
        if own is None and noise is None:
            return ops.blend(x, index, mask), target
        with_noise = x if noise is None else self.perturbed(x, noise)
        first, second = (with_noise if flag else x for flag in noisy)
        second = ops.gather(second, index)
        if own is not None and partner is not None:
            rows = torch.arange(len(x), device=x.device)[:, None, None]
            first, second = grids.mosaic(first, rows, own), grids.mosaic(second, rows, partner)
        mixed = torch.empty_like(x)
        return mixed.copy_(torch.lerp(second, first, mask.to(x.dtype))), target

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """A look at the clean batch, which may count as learned, then one forward of the mixed one."""
        if not self.clean_lam:
            return super().forward(model, criterion, x, y, rng)
        return grids.learn_and_mix(self, self.clean_lam, model, criterion, x, y, rng)

    def units(self, x: Tensor) -> Tensor:
        """Images before they were normalised, 0 to 1."""
        std, mean = (ops.send(np.array(v)[:, None, None], x).to(x.dtype) for v in (self.std, self.mean))
        return x * std + mean

    def perturbed(self, x: Tensor, noise: Tensor) -> Tensor:
        """Images plus noise, kept within 0 to 1."""
        std, mean = (ops.send(np.array(v)[:, None, None], x).to(x.dtype) for v in (self.std, self.mean))
        return ((x * std + mean + noise.to(x.dtype)).clamp(0, 1) - mean) / std


def difference(a: Float[Tensor, "B C h w k"], b: Float[Tensor, "B C h w k"]) -> Float[Tensor, "B h w"]:
    """Mean absolute difference over channels and strips."""
    return (a - b).abs().mean((1, 4))


def boundaries(x: Float[Tensor, "B C H W"], grid: int, strip: int) -> list[tuple[Tensor, Tensor]]:
    """The pixels that meet where blocks touch, for blocks above each other and for blocks side by side.

    Before and behind the boundary: means over ``strip`` pixels either way, (B, C, b-1, b, k) and (B, C, b, b-1, k) with
    k strips along a block's side.
    """
    found = []
    for dim in (2, 3):
        lines = x if dim == 2 else x.transpose(2, 3)
        height, width = lines.shape[2:]
        depth = min(strip, height // grid)
        ends = np.searchsorted(grids.cell_of(height, grid), np.arange(1, grid))[:, None]
        k = max(1, width // grid // min(strip, max(1, width // grid)))
        pair = []
        for rows in (ends - 1 - np.arange(depth), ends + np.arange(depth)):
            mean = lines[:, :, ops.send(rows, x)].mean(3)  # (B, C, b-1, W)
            cells = (
                F.adaptive_avg_pool1d(mean.flatten(0, 2), grid * k).unflatten(1, (grid, k)).unflatten(0, mean.shape[:3])
            )
            pair.append(cells if dim == 2 else cells.transpose(2, 3))
        found.append((pair[0], pair[1]))
    return found


def transported(saliency: Float[Tensor, "n t t"], shown: Tensor, cost: float) -> Int[Tensor, "n t t"]:
    """Which block comes to lie at each place.

    t times, each block claims the place that is cheapest to it, ``cost`` per squared distance, of 1 across the image,
    less its saliency if the place is ``shown``; of several, the cheapest claim holds, and the others cost 1 more from
    then on. On a CPU, where values may be read, only those choose that may leave their own place or lost the last one.
    """
    batch, side = saliency.shape[:2]
    count = side * side
    rows, columns = np.divmod(np.arange(count), side)
    distance = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    away = ops.send(cost * distance / max(1, side - 1) ** 2, saliency).to(saliency.dtype)
    gain, shown = saliency.flatten(1), shown.flatten(1).to(saliency.dtype)
    costs = torch.addcmul(away, gain[:, :, None], shown[:, None], value=-1).flatten(0, 1)
    block = torch.arange(batch * count, device=saliency.device)  # blocks and places of all images are counted on
    nobody = len(block)
    on_cpu = grids.at_hand(saliency)
    # Who is worth a step and does not show may leave; on other devices all choose from the first time on.
    moves = (shown < 1) & (gain >= away[0, min(1, count - 1)]) if on_cpu else torch.ones_like(shown, dtype=torch.bool)
    choosing = moves.flatten().nonzero()[:, 0] if on_cpu else block
    to = block.clone()
    pays = torch.where(moves, torch.inf, -gain * shown).flatten()  # each block
    price, holder = pays.clone(), torch.where(moves.flatten(), nobody, block)  # of each place
    for _ in range(side):
        choices = costs[choosing] if on_cpu else costs
        spot = torch.as_tensor(grids.quick(choices)[1].argmin(1))
        claim = choices.gather(1, spot[:, None])[:, 0]
        place = choosing - choosing % count + spot
        pays.scatter_(0, choosing, claim)
        to.scatter_(0, choosing, place)
        before, was = holder[place], price[place]
        price.scatter_reduce_(0, place, claim, "amin")
        now = price[place]
        holder.scatter_(0, place, torch.where(now < was, nobody, before))
        holder.scatter_reduce_(0, place, torch.where(claim == now, choosing, nobody), "amin")  # of equals the first
        lost = holder[place] != choosing
        if on_cpu:
            ousted = before[~lost]
            choosing = torch.cat([choosing[lost], ousted[ousted < nobody]])
            if not len(choosing):
                break
        raised = pays[choosing] + 1 if on_cpu else pays + lost
        costs.view(-1).scatter_(0, choosing * count + to[choosing] % count, raised)
    return (torch.where(holder < nobody, holder, block) % count).view(batch, side, side)
