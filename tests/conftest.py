"""What all tests share: one torch thread, and a tiny model and batch that are the same on every machine."""

import random
from collections.abc import Iterator

import beartype._check.code.codemain
import jaxtyping
import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

# beartype looks at one random item of each list, drawn from python's global generator, which the contract says no
# mixer moves: it gets a generator of its own, before the first annotated function is imported.
beartype._check.code.codemain.getrandbits = random.Random(0).getrandbits

from mixers.testing import batch  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on several threads, and sums differ with their number."""
    torch.set_num_threads(1)


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter from numpy's generator, whose stream is fixed, unlike that of torch's initialisers."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.from_numpy(rng.standard_normal(parameter.shape, dtype=np.float32))
            if parameter.ndim > 1:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
            else:  # the scales of normalisation layers are near 1, all biases near 0
                parameter.copy_(name.endswith("weight") + 0.01 * values)
    return model


@pytest.fixture
def model() -> nn.Module:
    """A small convolutional network with BatchNorm and 5 classes, weights the same everywhere."""
    return fill(timm.create_model("test_resnet", num_classes=5))


@pytest.fixture
def images_and_targets() -> tuple[Tensor, Tensor]:
    """Four random images (4, 3, 32, 32) and one-hot targets (4, 5)."""
    return batch()


@pytest.fixture
def rng() -> np.random.Generator:
    """The generator of one update, as the loop makes it."""
    return np.random.default_rng((0, 0))


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """As in a plain run: annotations are checked under pytest only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
