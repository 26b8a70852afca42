"""PreciseBN: BatchNorm statistics as the plain average over many batches, instead of the running average.

Rethinking "Batch" in BatchNorm. Wu and Johnson. 2021, https://arxiv.org/abs/2105.07576, section 3. As in the published
runs that use it, the averages are of the batches' means and variances, over mixed training images, in training mode.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixers import Step
from mixup_recipes.data.loading import Source
from mixup_recipes.data.order import TrainOrder, updates_per_epoch
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.signals import Stop
from mixup_recipes.training.update import prepared


@torch.no_grad()  # no update: a mixer that keeps what updates leave behind can tell
def refresh(
    step: Step,
    samples: Source,
    recipe: Recipe,
    epoch: int,
    workers: int,
    accelerator: Any,
    stop: Stop | None = None,
) -> bool:
    """Average the statistics over the first ``precise_bn_samples`` images of the epoch that has just ended.

    Rounded up to whole updates, at most the epoch; images, mixing and drop path are those of that epoch's updates.
    ``epoch`` counts from 1. Each process averages over its own images; the caller averages over the processes.
    Layers that see no batch in training mode (a frozen teacher's) keep their statistics; no counter changes.
    False when a signal asked to stop: then nothing has changed.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    per_epoch = updates_per_epoch(len(samples), recipe)
    start = (epoch - 1) * per_epoch
    updates = min(per_epoch, math.ceil((recipe.precise_bn_samples or 0) / recipe.batch_size))
    order = TrainOrder(len(samples), recipe, rank, world, start, samples.labels)
    loaded = samples.train_batches(order, workers, accelerator.device)
    batches = prepared(loaded if stop is None else stop.watched(loaded), order, accelerator.device)

    layers = [m for m in step.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [{k: v.clone() for k, v in layer.named_buffers()} for layer in layers]
    sums: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

    def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if layer.training:
            x = args[0].detach().float()
            var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1])
            means, variances, count = sums.get(layer, (torch.zeros_like(mean), torch.zeros_like(var), 0))
            sums[layer] = (means + mean, variances + var, count + 1)

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    step.train()
    try:
        for _ in range(updates):
            if stop is not None and stop.agreed(accelerator, "precise_bn"):
                return False
            for batch in itertools.islice(batches, order.accumulation):
                step(batch.x, batch.y, batch.rng)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, buffers in zip(layers, before, strict=True):
            for name, value in buffers.items():
                layer.get_buffer(name).copy_(value)
    for seen, (means, variances, count) in sums.items():
        seen.get_buffer("running_mean").copy_(means / count)
        seen.get_buffer("running_var").copy_(variances / count)
    return True
