"""One pass over the images of an evaluation, on any number of processes: each image counts exactly once.

What is drawn for an image is a function of ``SEED`` and of its place among the images, so that it does not depend on
the size of a batch or on the number of processes.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixup_recipes.data import keys
from mixup_recipes.data.images import Transform, normalise, per_channel
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import Key
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.evaluation import gathered
from mixup_recipes.typed import UserError

SEED = 0
PGD, CORRUPT, OCCLUDE, MIX, PARTNER, HALVES = range(1, 7)
"""What is drawn for, the first part of a key behind seed and image."""
Columns = dict[str, np.ndarray]


def rng(index: int, purpose: int, *which: int) -> np.random.Generator:
    """The generator of one image and purpose."""
    return keys.rng(keys.ROBUST, SEED, index, purpose, *which)


@dataclass(frozen=True)
class Bench:
    """A model and the images that it is tried on."""

    net: nn.Module
    """On its device, in evaluation mode."""
    table: Any
    """Encoded images, and labels as outputs of the model."""
    recipe: Recipe
    transform: Transform
    accelerator: Any
    workers: int
    on_bad_image: str = "stop"
    limit: int = 178_956_970
    """Pixels of a picture, above which it is a bad image."""

    @property
    def size(self) -> int:
        """Images per forward and process."""
        return self.recipe.per_device_train_batch_size

    def samples(self, transform: Transform | None = None) -> Samples:
        """The images as the model's evaluation sees them, or by another transform."""
        return Samples(self.table, self.recipe, transform or self.transform, self.on_bad_image, self.limit)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Of normalised images (B, 3, H, W), in float32."""
        mixed = self.accelerator.mixed_precision != "no"
        with self.accelerator.autocast() if mixed else contextlib.nullcontext():
            found: Tensor = self.net(x)
        return found.float()

    def of_bytes(self, images: Tensor) -> Tensor:
        """Logits of uint8 images (B, 3, H, W)."""
        return self.logits(normalise(images, self.recipe, self.accelerator.device))

    def over(
        self,
        look: Callable[..., dict[str, Tensor]],
        samples: Samples | None = None,
        size: int | None = None,
        partner: np.ndarray | None = None,
    ) -> Columns:
        """What ``look`` finds of each image, as columns sorted by image, on every process; bad images are left out.

        ``look(index, images, labels)`` gets a batch: places on the host, uint8 images (B, 3, H, W) and labels (B,) on
        the device; it returns a row for each of them in every column. With ``partner`` (N,) images and labels of
        ``partner[index]`` follow. ``size``: of a batch. Raises ``UserError`` where no image can be read.
        """
        samples, size, device = samples or self.samples(), size or self.size, self.accelerator.device
        mine = range(self.accelerator.process_index, len(samples), self.accelerator.num_processes)
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        orders = [[[Key(0, i, 0) for i in batch] for batch in batches]]
        if partner is not None:
            orders.append([[Key(0, int(partner[i]), 0) for i in batch] for batch in batches])
        loaded = [samples.batches(order, size, self.workers, device) for order in orders]
        parts: list[dict[str, Tensor]] = []
        for together in zip(*loaded, strict=True):
            seen = [part.to(device, non_blocking=True) for images, labels, *_ in together for part in (images, labels)]
            index, bad = together[0][2], torch.stack([batch[3] for batch in together]).amax(0)
            parts.append({"index": index, "bad": bad, **look(index, *seen)})
        columns = gathered(parts, len(batches), len(samples), self.recipe)
        if not len(columns["index"]):
            raise UserError(f"dataset {self.recipe.dataset!r}: no image can be read")
        return {k: v for k, v in columns.items() if k != "bad"}


class InPixels(nn.Module):
    """The model as a function of pixels in [0, 1], in float32: half precision would round small gradients to zero."""

    def __init__(self, bench: Bench):
        super().__init__()
        self.net, self.recipe = bench.net, bench.recipe

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, K); gradients reach the pixels."""
        mean, std = (per_channel(values, x.device) for values in (self.recipe.mean, self.recipe.std))
        logits: Tensor = self.net((x * 255 - mean) / std)
        return logits.float()


def percent(right: np.ndarray) -> float:
    """How many are true, in percent."""
    return 100 * float(right.mean(dtype=np.float64))
