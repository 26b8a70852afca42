"""Every random number of a run is a function of the seed and of what it is for: nothing has to be saved to resume.

The last part of a key names the purpose and is never 0, since numpy pads keys with zeros. Mixing uses
``default_rng((seed, update))`` and belongs to the mixers: a key of ours has at least two parts and the purpose.
"""

import random

import numpy as np
import torch

ORDER, SAMPLE, STEP, ERASE, SUBSET, ROBUST = 1, 2, 3, 4, 5, 6


def rng(purpose: int, *key: int) -> np.random.Generator:
    """A generator for one purpose, e.g. ``rng(ORDER, seed, epoch)``."""
    return np.random.default_rng((*key, purpose))


def seed_everything(purpose: int, *key: int) -> None:
    """Seed the global generators that libraries draw from (dropout, timm's augmentation) for one purpose.

    Those of other devices only for a training step: images are prepared on the CPU, and torch writes down the call
    stack for each device that is not in use, which takes longer than to augment a small image.
    """
    draw = rng(purpose, *key)
    seed_policy(draw)
    seed = torch.manual_seed if purpose == STEP else torch.default_generator.manual_seed
    seed(int(draw.integers(2**63)))


def seed_policy(draw: np.random.Generator) -> None:
    """Seed the global generators that timm's augmentation draws from."""
    random.seed(int(draw.integers(2**63)))
    np.random.seed(int(draw.integers(2**32)))
