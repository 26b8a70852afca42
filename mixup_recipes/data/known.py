"""How many images and classes the datasets have that the recipes name, for what must not download or count them."""

from typing import NamedTuple


class Published(NamedTuple):
    """What the authors of a data set say of it: how many classes, and how many images a split has."""

    classes: int
    splits: dict[str, int]


PUBLISHED = {
    "cifar10": Published(10, {"train": 50_000, "test": 10_000}),
    "cifar100": Published(100, {"train": 50_000, "test": 10_000}),
    "cub200": Published(200, {"train": 5_994, "test": 5_794}),
    "aircraft": Published(100, {"train": 6_667, "test": 3_333}),  # trainval and test
    "inat2017": Published(5_089, {"train": 579_184, "validation": 95_986}),
    "inat2018": Published(8_142, {"train": 437_513, "validation": 24_426}),
    "places205": Published(205, {"train": 2_448_873, "validation": 20_500}),
}
"""By the name of the prepared set; the split to evaluate on is the second one."""
KNOWN_SIZES = {
    "ILSVRC/imagenet-1k": 1_281_167,
    "zh-plus/tiny-imagenet": 100_000,
    "uoft-cs/cifar10": 50_000,
    "uoft-cs/cifar100": 50_000,
    "bentrevett/caltech-ucsd-birds-200-2011": 5_994,
    "groceries": 675,
} | {name: published.splits["train"] for name, published in PUBLISHED.items()}
"""Training images."""
EVALUATED = {
    "ILSVRC/imagenet-1k": 50_000,
    "zh-plus/tiny-imagenet": 10_000,
    "uoft-cs/cifar10": 10_000,
    "uoft-cs/cifar100": 10_000,
    "bentrevett/caltech-ucsd-birds-200-2011": 5_794,
} | {name: [*published.splits.values()][1] for name, published in PUBLISHED.items() if name != "cifar10"}
"""Evaluation images of the published data sets; the small settings take a part of cifar10."""
