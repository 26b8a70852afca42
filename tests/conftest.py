"""What all tests share: one torch thread, and a tiny model and batch that are the same on every machine."""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from mixers.testing import batch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on several threads, and sums differ with their number."""
    torch.set_num_threads(1)


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter from numpy's generator, whose stream is fixed, unlike that of torch's initialisers."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = rng.standard_normal(parameter.shape, dtype=np.float32)
            if parameter.ndim > 1:
                parameter.copy_(torch.from_numpy(values / np.sqrt(parameter[0].numel())))
            else:  # scales near 1 and biases near 0 are what their layer started with
                parameter.add_(torch.from_numpy(0.01 * values))
    return model


@pytest.fixture
def model() -> nn.Module:
    """A small convolutional network with BatchNorm, 5 classes, weights the same everywhere."""
    model = timm.create_model("test_resnet", num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.5)
    return fill(model)


@pytest.fixture
def images_and_targets() -> tuple[Tensor, Tensor]:
    """Four random images (4, 3, 32, 32) and one-hot targets (4, 5)."""
    return batch()
