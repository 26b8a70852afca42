"""A few images as the suite changes them, with what the model says of each."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixup_recipes.data.images import normalise
from mixup_recipes.data.order import Key
from mixup_recipes.data.pictures import to_uint8
from mixup_recipes.data.splits import labels_of
from mixup_recipes.robustness import attacks, parts
from mixup_recipes.robustness.passes import Bench, InPixels

IMAGES = 6
SEVERITY, SHARE = 3, 0.5
SHOWN = ("gaussian_noise", "motion_blur", "fog", "pixelate")  # of each group one


class Example(NamedTuple):
    """An image, changed or not."""

    title: str
    pixels: Tensor
    """uint8 (3, H, W)."""
    said: str
    confidence: float
    right: bool


class Row(NamedTuple):
    """The examples of one image, and its class."""

    name: str
    examples: list[Example]


def examples(bench: Bench, classes: list[str], asked: tuple[str, ...]) -> list[Row]:
    """A row for each of up to ``IMAGES`` images, of classes as far apart as can be; ``asked``: the parts."""
    labels = np.asarray(labels_of(bench.table, bench.recipe.label_column))
    _, first = np.unique(labels, return_index=True)
    chosen = first[np.unique(np.linspace(0, len(first) - 1, IMAGES).round().astype(int))]
    return [row(bench, classes, asked, int(index)) for index in chosen]


def row(bench: Bench, classes: list[str], asked: tuple[str, ...], place: int) -> Row:
    """The examples of the image at a place among all."""
    image, label, _, _ = bench.samples()[Key(0, place, 0)]
    assert isinstance(label, int)
    batch, index = image[None], torch.tensor([place])
    made = {"as it is": batch} | changed(bench, batch, label, index, asked)
    found = []
    for title, pixels in made.items():
        likely = bench.of_bytes(pixels).softmax(1)[0]
        top = int(likely.argmax())
        found.append(Example(title, pixels[0], classes[top], float(likely[top]), top == label))
    return Row(classes[label], found)


def changed(bench: Bench, batch: Tensor, label: int, index: Tensor, asked: tuple[str, ...]) -> dict[str, Tensor]:
    """What is done to a batch of one image, uint8 (1, 3, H, W), by its title."""
    device, made = bench.accelerator.device, dict[str, Tensor]()
    if "attacks" in asked:
        net, x, y = InPixels(bench), batch.to(device).float() / 255, torch.tensor([label], device=device)
        fgsm, pgd = parts.FGSM_EPS[0], parts.PGD_EPS[0]
        made[f"FGSM {fgsm}/255"] = in_bytes(attacks.fgsm(net, x, y, fgsm / 255))
        made[f"PGD {pgd}/255"] = in_bytes(parts.pgd(net, x, y, pgd / 255, index))
    if "corruptions" in asked:
        pixels = batch[0].permute(1, 2, 0).contiguous().numpy()
        for name in SHOWN:
            picture = parts.corrupted(pixels, name, SEVERITY, int(index))
            made[f"{name.replace('_', ' ')} {SEVERITY}"] = torch.from_numpy(picture).permute(2, 0, 1)[None]
    if "occlusion" in asked:
        made[f"{SHARE:.0%} occluded"] = to_uint8(
            parts.occluded(normalise(batch, bench.recipe, device), SHARE, index), bench.recipe
        )
    return made


def in_bytes(x: Tensor) -> Tensor:
    """Pixels in [0, 1] as uint8 on the host."""
    return (x.cpu() * 255).round().to(torch.uint8)
