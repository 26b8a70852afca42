"""The training code of originals: what `benchmarks/acid.py` runs beside our job, one file for each way of training.

An ``Acid`` has the values of our recipe and a function that trains by the original's own loop on the ``Epochs`` that
our job reads too. The original's lines run as they stand; nothing of them is kept in this project.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import accelerate
import numpy as np
import torch
from originals import Checkout
from torch import Tensor, nn

from mixup_recipes.data import images, streaming
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.splits import load_splits
from mixup_recipes.recipe import Recipe
from mixup_recipes.training import evaluation

CPU = torch.device("cpu")
SETTING: dict[str, Any] = {
    "dataset": "cifar10", "eval_split": "test", "num_classes": 10, "max_train_samples": 4000,
    "model": "resnet18_cifar", "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    "epochs": 12, "batch_size": 100, "per_device_train_batch_size": 100, "lr": 0.1, "weight_decay": 1e-4,
    "decay_bias_and_norm": True, "sched_on_updates": False, "image_size": 16, "train_crop": "resize", "eval_size": 16,
    "eval_resize": 16, "eval_epochs": 12, "interpolation": "bilinear", "pixels": "v2",
    "mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010], "protocol_epochs": 1,
}  # fmt: skip
"""The recipe of every comparison, but for what an original changes in it."""


class Epochs:
    """The training images of our job, batch by batch in its order and with its flips: each iteration is one epoch.

    A batch is normalised images (B, 3, S, S) and labels (B,).
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        table = load_splits(recipe).train
        samples = streaming.reader(table, recipe, images.TrainTransform(recipe))
        order = TrainOrder(len(samples), recipe, 0, 1, 0, samples.labels)
        self.updates = order.updates_per_epoch
        self.loaded = samples.train_batches(order, 0, CPU)

    def __len__(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels, *_ in itertools.islice(self.loaded, self.updates):
            yield images.normalise(pixels, self.recipe, CPU), labels


@dataclass(frozen=True)
class Acid:
    """A method, trained by an original's code and by our job."""

    name: str
    """Of the row: METHOD by REPOSITORY's last part."""
    repository: str
    """``owner/name`` on GitHub; the checkout is the folder ``name``."""
    files: tuple[str, ...]
    """The original's files whose lines run."""
    values: dict[str, Any]
    """What the recipe of both sides has beyond ``SETTING``."""
    train: Callable[[Checkout, Recipe, Epochs], dict[str, nn.Module]]
    """What it trains, by the names of our run: ``""`` is what is reported."""
    runs: str
    """Which of the original's code runs, in one sentence."""
    differs: str
    """What is not as in the original's own runs, or not the same on both sides."""
    needs: tuple[str, ...] = ()
    """Packages that the original imports and this project does not."""


def seeded(seed: int) -> None:
    """Seed what originals draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def scores(nets: dict[str, nn.Module], recipe: Recipe) -> dict[str, float]:
    """The scores of the test images, by the code that evaluates our job."""
    samples = streaming.reader(load_splits(recipe).eval, recipe, images.EvalTransform.of(recipe))
    found = evaluation.evaluate(nets, samples, recipe, accelerate.Accelerator(cpu=True), 0)
    assert found is not None  # nothing stops it
    return found[0]
