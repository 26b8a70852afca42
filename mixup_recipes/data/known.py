"""How many images the datasets have that the recipes name, for what must not download them."""

KNOWN_SIZES = {
    "ILSVRC/imagenet-1k": 1_281_167,
    "zh-plus/tiny-imagenet": 100_000,
    "uoft-cs/cifar10": 50_000,
    "groceries": 675,
    "cifar10": 50_000,
}
"""Training images."""
EVALUATED = {"ILSVRC/imagenet-1k": 50_000, "zh-plus/tiny-imagenet": 10_000}
"""Evaluation images of the published data sets."""
