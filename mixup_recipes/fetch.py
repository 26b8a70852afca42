"""Models of others, see ``mixers.weights``, whose errors are told here in the way of all commands."""

from pathlib import Path
from typing import Any

from torch import nn

from mixers import weights
from mixers.weights import is_hub
from mixup_recipes.hub_errors import reason
from mixup_recipes.typed import UserError

__all__ = ["is_hub", "model_of", "snapshot"]


def snapshot(name: str, *others: str) -> Path:
    """Download ``hf-hub:owner/name[@revision]``: a folder with config.json and model.safetensors of one commit.

    ``others``: files to have too where the repository has them. Raises ``UserError``.
    """
    try:
        return weights.fetch(name, *others)
    except weights.NoWeights as e:
        raise UserError(str(e)) from None
    except Exception as e:  # the Hub's clients raise some twenty types
        raise UserError(f"cannot load {name}: {reason(e)}") from None


def model_of(folder: Path, name: str, **args: Any) -> nn.Module:
    """The model of a folder with config.json and model.safetensors, through timm. ``args``: instead of the config's.

    Raises ``UserError`` for a configuration that is none of a classifier of timm or of
    ``mixup_recipes.training.backbones``, and for weights that do not fit.
    """
    try:
        return weights.load(folder, name, **args)
    except weights.NoWeights as e:
        raise UserError(str(e)) from None
