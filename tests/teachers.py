"""Tiny networks with weights that are the same on every machine, also for the teachers that mixers would download."""

import copy
import functools

import numpy as np
import timm
import torch
from torch import nn

from mixers import taps

NAMES = ("resnet18.tv_in1k", "resnet34.tv_in1k", "resnet50.tv_in1k")


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


def stand_in() -> None:
    """From here on each of these names is a tiny network of 1,000 classes: no test needs the network."""
    load = taps.pretrained

    @functools.cache
    def network() -> nn.Module:
        with torch.device("cpu"):  # a test that asks first may be about models without memory
            return fill(timm.create_model("test_resnet"))

    def pretrained(name: str) -> nn.Module:
        return copy.deepcopy(network()) if name in NAMES else load(name)

    taps.pretrained = taps.teacher.pretrained = pretrained
