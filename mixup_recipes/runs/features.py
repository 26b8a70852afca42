"""What a frozen model makes of images before its classifier: features of whole splits, computed once and kept."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mixup_recipes import files
from mixup_recipes.data.images import normalise
from mixup_recipes.data.loading import Samples
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError

KEY = "of"  # the metadata of a file of features: what they are of


class Features(NamedTuple):
    """Of N images."""

    x: Tensor
    """float32 (N, D), on the host."""
    y: Tensor
    """Classes, int64 (N,)."""
    bad: int
    """Images that could not be read, and are not among the N."""


class UpToClassifier(nn.Module):
    """A timm model up to its classifier: images (B, 3, H, W) to features (B, D)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        return net.forward_head(net.forward_features(x), pre_logits=True)


def width(frozen: UpToClassifier, size: tuple[int, ...], name: str) -> int:
    """How many features a model has. Runs no arithmetic (meta device). Raises ``UserError`` for one that has none."""
    try:
        with torch.no_grad():
            found = copy.deepcopy(frozen).to("meta")(torch.empty(2, 3, *size, device="meta"))
    except Exception as e:  # what a model without them raises is up to it
        raise UserError(
            f"model {name!r} gives no features: {type(e).__name__}: {' '.join(str(e).split())[:160]}"
        ) from None
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
        raise UserError(f"model {name!r} gives no vector of features for each image")
    return found.shape[1]


@torch.no_grad()
def of_images(frozen: UpToClassifier, samples: Samples, recipe: Recipe, device: torch.device, workers: int) -> Features:
    """The features of all images that can be read, in order, in float32."""
    found, classes, bad = [], [], 0
    for pixels, labels, _, passed in samples.eval_batches(0, 1, recipe.per_device_train_batch_size, workers, device):
        whole = passed == 0  # another image stands in for one that cannot be read
        found.append(frozen(normalise(pixels, recipe, device)).float().cpu()[whole])
        classes.append(labels.cpu()[whole])
        bad += int((~whole).sum())
    return Features(torch.cat(found), torch.cat(classes), bad)


def keep(path: Path, splits: dict[str, Features], of: dict[str, Any]) -> None:
    """Write features as safetensors: ``SPLIT.x``, ``SPLIT.y``, ``SPLIT.bad``; ``of``: what they are of, metadata."""
    tensors: dict[str, Tensor] = {}
    for split, found in splits.items():
        tensors |= {f"{split}.x": found.x, f"{split}.y": found.y, f"{split}.bad": torch.tensor(found.bad)}
    files.write(path, safetensors.torch.save(tensors, {KEY: json.dumps(of)}))


def kept(path: Path, of: dict[str, Any]) -> dict[str, Features] | None:
    """The features in a file; None where there is no such file.

    Raises ``UserError`` for a file of other features than those ``of``, naming what differs, and for a damaged one.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})[KEY])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
        differing = [key for key in of if said.get(key) != json.loads(json.dumps(of[key]))]
        if not differing:
            splits = dict.fromkeys(name.rpartition(".")[0] for name in found)
            return {s: Features(found[f"{s}.x"], found[f"{s}.y"], int(found[f"{s}.bad"])) for s in splits}
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as e:
        raise UserError(
            f"{path} holds no features ({type(e).__name__}: {e}); remove it, or name another file"
        ) from None
    raise UserError(
        f"{path} holds other features than these, which differ in {', '.join(differing)}; remove it, or name another "
        "file for --features"
    )
