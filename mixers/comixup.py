"""Co-Mixup: Saliency Guided Joint Mixup with Supermodular Diversity. Kim, Choo, Jeong, Song. ICLR 2021.

https://arxiv.org/abs/2102.03065, reference code https://github.com/snu-mllab/Co-Mixup

Formula: A part of m images becomes m mosaics of g x g cells. Each cell shows one of the m images, or half of each of
two. The labels of the cells say which images these are. For each mosaic they minimise a sum of three terms. The first
is ``sum -s_j - eta/g^2 * log r_j``, where s is the saliency of image j in the cell, of sum 1 per image, and
``r ~ Dirichlet(alpha)`` is drawn per part. The second is ``+ beta/g^2`` per pair of neighbours that differ, and a
quarter of it between a half and its whole. The third is ``+ 2*gamma/g^2 * p_j [p_j > tau*g^2]`` per cell that shows j.
In it ``p = A n``, n counts the cells that the other mosaics give to each image, and
``A = (1-omega)*I + omega*m*D/sum(D)``, where D says how far apart the most salient windows of two images lie. The
labels begin at random and are found one mosaic after the other, ``niter`` times. From the second time on there are
halves, of the three images that a mosaic shows most. Before the last time, mosaics of the same several images are
pushed apart (``set_resolve``). ``y'`` is the mean over cells; ``loss = CE(mosaics, y') + clean_lam*CE(x, y)``.

Published defaults: alpha = 2, beta = 0.32, gamma = 1, tau = 0.83, eta = 0.05, omega = 0.001, 4 x 4 cells, parts of 20,
4 iterations, clean_lam = 1 (CIFAR and Tiny-ImageNet). The reference code for ImageNet has parts of 16, 3 iterations and
windows that do not overlap, ``stride=8``. It does not hand alpha on, so it draws from Dirichlet(1), ``alpha=1``.

Sampling law: ``comixup@kim-2021.2``: There is one Dirichlet draw per part, and the first labels are uniformly random.
Parts are consecutive images of the batch. The last part is shorter where m does not divide the batch. (The first
version of this law, ``comixup@kim-2021``, swept once and stayed in fragments where the saliency is flat.)

Cost: A step takes a forward and a backward pass of the clean batch besides. The model learns from them, so BatchNorm
sees both batches.

Deviations: The labels of a mosaic are found by row and column sweeps instead of alpha-beta swaps, for all parts at
once. From the second time on the sweeps also start from the one label that is best for all cells, and the labels of
less energy are taken. On 384 mosaics of flat saliency the labels are those of the swaps on 46 percent, of less energy
on 38 and of more on 16. With the hard threshold the reference code sums the distances to those images that are above
it, because of a bracket. Here an image that is above it counts with all of them. Because of this, two thirds of the
cells of a batch differ. There is no early stop, which skipped pushing equal mosaics apart. ``sum(D) = 0`` counts as no
distance. An image without any gradient has saliency everywhere. The clean loss has the weight ``clean_lam`` beside the
mixed loss, as in the reference code for ImageNet (for CIFAR: 2/K beside a binary loss averaged over K).

Kind: input.
"""

from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import grids, ops, taps
from .base import Criterion, Mixer, Needs, Out, Plan

WINDOW = 8  # pixels a side of what is compared for the compatibility of images
BONUS = 5e-4  # of a half over the mean of its two images
ROUNDS = 2  # of sweeps: more change nothing on 4 x 4 cells
MEMBER = 0.25  # of the price of a boundary, between a half and one of its images


class CoMixup(Mixer):
    """Make mosaics that together keep what is salient in a part of the batch, and that differ from each other.

    ``alpha`` is the Dirichlet parameter and must be above 0. ``part`` is the number of images that are mixed together.
    ``block_num`` is the number of cells a side. If it is None, one of 2, 4, 8, 16 is drawn per batch. ``beta``,
    ``gamma`` and ``eta`` must be at least 0. They weigh the smoothness, the diversity and the prior. ``thres`` is the
    share of a mosaic from which an image counts as used too often, and ``thres_type`` is "hard" or "soft". ``omega``,
    in [0, 1], weighs the compatibility, and ``stride`` is the step of its windows. ``set_resolve`` pushes equal mosaics
    apart. ``niter`` is the number of rounds. ``clean_lam`` is the weight of the clean loss and must be at least 0. If
    it is 0, the saliency is that of the model in evaluation mode.
    """

    pairs = False

    def __init__(
        self,
        alpha: float = 2.0,
        part: int = 20,
        block_num: int | None = 4,
        beta: float = 0.32,
        gamma: float = 1.0,
        thres: float = 0.83,
        thres_type: str = "hard",
        eta: float = 0.05,
        omega: float = 0.001,
        stride: int = 1,
        set_resolve: bool = True,
        niter: int = 4,
        clean_lam: float = 1.0,
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        numbers = {"beta": beta, "gamma": gamma, "thres": thres, "eta": eta, "clean_lam": clean_lam}
        for name, value in numbers.items():
            ops.check_between(name, value, 0.0)
        ops.check_between("omega", omega, 0.0, 1.0)
        counts = {"part": part, "block_num": 1 if block_num is None else block_num, "stride": stride, "niter": niter}
        for name, count in counts.items():
            ops.check_count(name, count)
        ops.check_choice("thres_type", thres_type, ("hard", "soft"))
        ops.check_choice("set_resolve", set_resolve, (False, True))
        self.alpha = alpha
        self.part = part
        self.block_num = block_num
        self.beta = beta
        self.gamma = gamma
        self.thres = thres
        self.thres_type = thres_type
        self.eta = eta
        self.omega = omega
        self.stride = stride
        self.set_resolve = set_resolve
        self.niter = niter
        self.clean_lam = clean_lam

    @property
    def needs(self) -> Needs:
        """The whole step, for its clean loss; without one the model."""
        return "step" if self.clean_lam else "model"

    def plan(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
        *look: Any,
    ) -> Plan:
        """``first``, ``second`` (B, g, g): the two images that each cell shows half of, mostly the same one twice.

        ``look``: the model and the criterion, or a function from images to their gradient.
        """
        ops.check_look(look)
        grid = 2 ** int(rng.integers(1, 5)) if self.block_num is None else self.block_num
        grid = min(grid, *x.shape[2:])
        size = len(x)
        parts = [(0, size // self.part, self.part), (size - size % self.part, 1, size % self.part)]  # start, number, m
        draws = []
        for start, number, m in parts:
            if number and m:
                prior = rng.dirichlet(np.full(m, self.alpha), number)
                draws.append((start, prior, rng.integers(m, size=(number, m, grid, grid))))
        gradient = look[0](x) if len(look) == 1 else taps.saliency(look[0], look[1], x, y)
        found = []
        with ops.full_precision(x.device):
            saliency = grids.saliency_map(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
            for start, prior, labels in draws:
                number, m = prior.shape
                part = saliency[start : start + number * m]
                costs = -grids.block_saliency(part, grid).unflatten(0, (number, m))
                costs -= ops.send(self.eta / grid**2 * np.log(prior + 1e-8), x)[:, :, None, None]
                compatible = self.compatibility(part.unflatten(0, (number, m)))
                two = self.solve(costs, compatible, ops.send(labels, x))
                base = start + m * torch.arange(number, device=x.device).view(-1, 1, 1, 1)
                found.append([(image + base).flatten(0, 1) for image in two])
        return {"first": torch.cat([f for f, _ in found]), "second": torch.cat([s for _, s in found])}

    def compatibility(self, saliency: Float[Tensor, "P m H W"]) -> Float[Tensor, "P m m"]:
        """A: how much a cell that shows one image counts for another."""
        m = saliency.shape[1]
        window = min(WINDOW, *saliency.shape[2:])
        pooled = F.avg_pool2d(saliency, window, self.stride)
        peak = pooled.flatten(2).argmax(2)
        place = torch.stack([peak // pooled.shape[3], peak % pooled.shape[3]], 2).float()
        distance = (place[:, :, None] - place[:, None]).abs().sum(3)
        share = m * distance / distance.sum((1, 2), keepdim=True).clamp(min=1)
        return (1 - self.omega) * torch.eye(m, device=share.device) + self.omega * share

    def solve(
        self, costs: Float[Tensor, "P m g g"], compatible: Float[Tensor, "P m m"], labels: Int[Tensor, "P m g g"]
    ) -> tuple[Int[Tensor, "P m g g"], Int[Tensor, "P m g g"]]:
        """The two images of each cell, counted within their part, from first labels on."""
        number, m, grid = costs.shape[:3]
        cells, threshold = grid**2, self.thres * grid**2
        halves = np.array(list(combinations(range(min(3, m)), 2)), dtype=np.int64).reshape(-1, 2).T
        levels = m + halves.shape[1]  # the images, then halves of two of them
        unit = costs.new_ones(levels).diag()
        counts = unit[labels.flatten(2), :m].sum(2)  # of cells, by mosaic and image
        on, costs, compatible, half, near, counts, whole, prices, push, order, part, ends, chosen, pairs = grids.quick(
            costs,
            compatible,
            unit[:m, :m] / 2,
            1 - (1 - MEMBER) * unit[:m, :m],
            counts,
            self.beta / cells * (1 - unit).expand(number, -1, -1),
            costs.new_empty(number, grid, grid, levels).permute(0, 3, 1, 2),
            torch.zeros_like(counts),
            torch.arange(m, device=costs.device, dtype=costs.dtype) / (4 * m),  # of equal counts the first
            torch.arange(number, device=costs.device)[:, None, None],
            torch.arange(levels, device=costs.device).repeat(2, number, 1),  # the two images of a label
            labels.repeat(2, 1, 1, 1, 1),
            ops.send(halves, costs),
        )
        which, total = part[:, 0], counts.sum(1)
        for turn in range(self.niter):
            for i in range(m):
                total = total - counts[:, i]
                crowd = (compatible @ total[:, :, None])[:, :, 0]
                excess = crowd - threshold if self.thres_type == "soft" else crowd
                extra = self.gamma / cells * (2 * excess * (crowd > threshold) + push[:, i])
                on.add(costs, extra[:, :, None, None], out=prices[:, :m])
                known, pairwise = m, whole
                if turn and levels > m:
                    known, pairwise = levels, whole + 0
                    most = (order - counts[:, i]).argsort(1)[:, :3]
                    ends[:, :, m:] = most[:, pairs].swapaxes(0, 1)
                    one, other = ends[:, :, m:]
                    pairwise[:, m:, :m] *= near[one] * near[other]
                    pairwise[:, :m, m:] = pairwise[:, m:, :m].swapaxes(1, 2)
                    unused = on.where(counts[which, i, other] == 0, torch.inf, 0.0)[:, :, None, None]
                    prices[:, m:] = (prices[which, one] + prices[which, other]) / 2 - BONUS + unused
                price = prices[:, :known].swapaxes(1, 2).swapaxes(2, 3)
                label = grids.swept(on, part, price, pairwise[:, :known, :known], (), ROUNDS, twice=turn > 0)
                two = ends[:, part, label]
                chosen[:, :, i] = two
                counts[:, i] = half[two.reshape(2, number, cells)].sum((0, 2))
                total = total + counts[:, i]
            if turn == self.niter - 2 and self.set_resolve:
                push = push + grids.quick(pushed(torch.as_tensor(counts) > 0))[1]
        first, second = torch.as_tensor(chosen)
        return first, second

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        first: Int[Tensor, "B g g"],
        second: Int[Tensor, "B g g"],
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Half of each of the two mosaics, labelled by the pixels that each image has."""
        ops.check_batch(x, y)
        grid = first.shape[1]
        cells = torch.arange(grid**2, device=x.device).view(1, grid, grid)
        mixed = torch.empty_like(x)
        mixed.copy_(torch.lerp(grids.mosaic(x, first, cells), grids.mosaic(x, second, cells), 0.5))
        rows, columns = (np.bincount(grids.cell_of(length, grid)) / length for length in x.shape[2:])
        area = ops.send(np.outer(rows, columns).ravel() / 2, y).to(y.dtype)
        shares = torch.zeros(len(y), len(y), dtype=y.dtype, device=y.device)
        for images in (first, second):
            shares = shares.scatter_add(1, images.flatten(1), area.expand(len(y), -1))
        with ops.full_precision(y.device):
            return mixed, shares @ y

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """The clean batch, learned from and looked at in one pass, then the mosaics."""
        if not self.clean_lam:
            return super().forward(model, criterion, x, y, rng)
        return grids.learn_and_mix(self, self.clean_lam, model, criterion, x, y, rng)


def pushed(used: Tensor) -> Tensor:
    """Which images cost more, (P, m, m), for mosaics that show the same several images (P, m, m).

    For a mosaic with a twin behind it the first of them, for one with a twin before it the second.
    """
    twins = (used[:, :, None] == used[:, None]).all(3) & (used.sum(2) > 1)[:, :, None]
    order = used.cumsum(2)
    first, second = used & (order == 1), used & (order == 2)
    return first & twins.triu(1).any(2)[:, :, None] | second & twins.tril(-1).any(2)[:, :, None]
