"""Test-time augmentation: a model is asked about several views of an image, and its probabilities are averaged.

Averaged are the probabilities, of a softmax, or of a sigmoid where an image may have several labels; others average
logits. The views: ``flip``, the image and its mirror image; ``five_crop``, the four corners and the centre of the
resized image, as torchvision's ``five_crop``; ``ten_crop``, these and their mirror images. (torchvision's ``ten_crop``
takes the crops of the mirrored image. Only its second centre differs, by one pixel, where the margin is odd.)
"""

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from mixup_recipes.data.images import EvalTransform, Transform, resize
from mixup_recipes.data.picture import Picture
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError

KINDS = {"none": (1, 1), "flip": (1, 2), "five_crop": (5, 1), "ten_crop": (5, 2)}
"""Name -> crops of an image, and views of a crop."""


class FiveCrops:
    """The corners and the centre of the resized picture, one below the other: uint8 (3, H, W) to uint8 (3, *size)."""

    def __init__(self, centre: EvalTransform):
        self.centre = centre
        height, width = centre.size
        self.size = [5 * height, width]

    def __call__(self, image: Tensor | Picture, _key: tuple[int, ...] = ()) -> Tensor:
        """Top left, top right, bottom left, bottom right, centre."""
        one = self.centre
        whole = resize(image, one.resize, one.interpolation, one.pixels)
        return torch.cat(TF.five_crop(whole, one.size), 1)


class Views:
    """Which views of an image there are, of a kind in ``KINDS``; ``centre`` is how the image is seen without.

    Raises ``UserError`` for crops where the resized image has no margin.
    """

    def __init__(self, kind: str, centre: EvalTransform):
        self.kind, (self.crops, self.turns), self.size = kind, KINDS[kind], tuple(centre.size)
        cover = centre.resize if isinstance(centre.resize, tuple) else (centre.resize,) * 2
        if self.crops > 1 and cover == self.size:
            raise UserError(
                f"tta {kind}: images are resized to {centre.size[0]} x {centre.size[1]}, the size of the crop, so "
                "all crops of a square image are the same; pass --tta flip, or a recipe whose eval_resize is larger"
            )
        self.transform: Transform = FiveCrops(centre) if self.crops > 1 else centre
        """What an image becomes: its crops, one below the other."""

    def room(self, recipe: Recipe) -> Recipe:
        """The recipe whose batches take as much memory as those of the crops, for ``launch.workers``."""
        size = recipe.per_device_train_batch_size * self.crops
        return dataclasses.replace(recipe, per_device_train_batch_size=size)

    def averaged(self, net: nn.Module, several: bool) -> nn.Module:
        """The model that is asked about all views; ``several``: an image may have several labels."""
        return net if self.kind == "none" else Averaged(net, self.crops, self.turns, several)


class Averaged(nn.Module):
    """Images (B, 3, crops * H, W), see ``FiveCrops``, to the logits (B, K) of the averaged probabilities.

    The views go through the model one after another, so that it takes no more memory than without.
    """

    def __init__(self, net: nn.Module, crops: int, turns: int, several: bool):
        super().__init__()
        self.net, self.crops, self.turns, self.several = net, crops, turns, several

    def forward(self, x: Tensor) -> Tensor:
        views = itertools.chain.from_iterable((crop, crop.flip(3))[: self.turns] for crop in x.chunk(self.crops, 2))
        return of_average(torch.stack([self.net(view).float() for view in views]), self.several)


def of_average(logits: Tensor, several: bool) -> Tensor:
    """Logits (V, B, K) of the views to those (B, K) whose softmax is the mean of theirs, or whose sigmoid it is."""
    if several:
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
    return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))
