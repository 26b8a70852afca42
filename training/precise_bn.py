"""PreciseBN: BatchNorm statistics as the plain average over many batches, instead of the running average.

Rethinking "Batch" in BatchNorm. Wu and Johnson. 2021, https://arxiv.org/abs/2105.07576, section 3. As in the published
runs that use it, the averages are of the batches' means and variances, over mixed training images, in training mode.
"""

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixers import Step
from recipes import Recipe

from . import data, microbatch


def refresh(step: Step, samples: data.Samples, recipe: Recipe, epoch: int, workers: int, accelerator: Any) -> None:
    """Average the statistics over the first ``precise_bn_samples`` images of the epoch that has just ended.

    Rounded up to whole updates, at most the epoch; images, mixing and drop path are those of that epoch's updates.
    ``epoch`` counts from 1. Each process averages over its own images; the caller averages over the processes.
    Layers that the forward does not reach keep their statistics; no momentum changes.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    per_epoch = data.updates_per_epoch(len(samples), recipe)
    start = (epoch - 1) * per_epoch
    updates = min(per_epoch, math.ceil((recipe.precise_bn_samples or 0) / recipe.batch_size))
    order = data.TrainOrder(len(samples), recipe, rank, world, start)
    batches = data.train_batches(samples, order, workers, accelerator.device)

    layers = [m for m in step.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [(layer.momentum, {k: v.clone() for k, v in layer.named_buffers()}) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch: the cumulative average over all batches since the reset
    step.train()
    try:
        for update in range(start, start + updates):
            for micro in range(rank, order.micro_batches, world):
                pixels, labels, *_ = next(batches)
                step(*microbatch.inputs(pixels, labels, recipe, update, micro, accelerator.device))
    finally:
        for layer, (momentum, buffers) in zip(layers, before, strict=True):
            layer.momentum = momentum
            seen = int(layer.num_batches_tracked or 0)
            put_back(layer, buffers if not seen else {"num_batches_tracked": buffers["num_batches_tracked"]})


def put_back(layer: nn.Module, buffers: dict[str, Any]) -> None:
    """Copy buffers back into a layer."""
    for name, value in buffers.items():
        layer.get_buffer(name).copy_(value)
