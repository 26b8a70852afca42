"""The gradient of the loss in the images, and the modes in which a model is looked at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase


def saliency(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B C H W"],
    y: Float[Tensor, "B K"],
    training: bool = False,
) -> Float[Tensor, "B C H W"]:
    """Return the gradient of the summed loss of ``model(x)`` in the images, detached and at least in float32.

    The model is in evaluation mode, so row i is the gradient of sample i's own loss: BatchNorm takes its running
    statistics, and dropout and drop path are off. ``training=True`` leaves the modes as they are. Even then no buffer
    and no random generator is moved. Only activations are differentiated. The gradients of parameters, also those
    accumulated so far, and the hooks of DistributedDataParallel (give this function the module inside it) are not
    touched. Nothing underflows in float16: the gradient is started at a size near 1, per sample where samples do not
    interact, and is scaled back at the end, by powers of 2.
    """
    images = x.detach().requires_grad_()
    with as_is(model) if training else evaluating(model), torch.enable_grad():
        logits = model(images)
        slope, scale = started(logits, criterion, y, per_sample=not training)
        (gradient,) = torch.autograd.grad(logits, images, slope)
    return gradient.to(scale.dtype) / scale[:, None, None, None]


def started(
    logits: Float[Tensor, "B K"], criterion: Callable[[Tensor, Tensor], Tensor], y: Tensor, per_sample: bool
) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    """The slope of the summed loss in the logits, scaled to a size near 1, and the powers of 2 that did it.

    A criterion that returns a scalar returns the mean.
    """
    top = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
    losses = criterion(top, y)
    (slope,) = torch.autograd.grad(losses.sum() if losses.ndim else losses * len(top), top)
    largest = slope.abs().amax(1) if per_sample else slope.abs().amax()
    scale = torch.exp2(-torch.frexp(largest)[1].to(slope.dtype)).expand(len(logits))
    return (slope * scale[:, None]).to(logits.dtype), scale


def clean_pass(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B C H W"],
    y: Float[Tensor, "B K"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "B C H W"]]:
    """One forward and backward pass of a batch whose loss is to be learned too: its mean, and ``saliency`` beside it.

    In the modes that the model is in, as a training step. The gradients of the parameters are kept and handed over when
    the backward pass of the step reaches the loss that is returned: no graph of the first pass has to be kept or run
    twice, and ``grad`` is not touched before. They come in float32 from a start near 1, see ``saliency``. Where
    parameters are sharded the graph knows others in their place: there it is kept, and run a second time.
    """
    images = x.detach().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        logits = model(images)
        slope, scale = started(logits, criterion, y, per_sample=False)
        if any(isinstance(p, DTensor) for p in parameters):
            (gradient,) = torch.autograd.grad(logits, images, slope, retain_graph=True)
            seen = logits.view_as(logits)  # for a criterion that knows what the model said: of a look, as below
            return criterion(seen, y).mean(), gradient.to(scale.dtype) / scale[:, None, None, None]
        gradient, *of_parameters = torch.autograd.grad(logits, [images, *parameters], slope, allow_unused=True)
    loss = criterion(logits.detach(), y).mean()
    if torch.is_grad_enabled():
        used = [(p, g / (scale[0] * len(x))) for p, g in zip(parameters, of_parameters, strict=True) if g is not None]
        loss = Learned.apply(loss, *(p for p, _ in used), *(g for _, g in used))
    return loss, gradient.to(scale.dtype) / scale[:, None, None, None]


class Learned(torch.autograd.Function):
    """A value whose gradients in some parameters are known: ``apply(value, *parameters, *gradients)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, *(slope * gradient for gradient in gradients), *(None for _ in gradients)


def magnitude(gradient: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
    """Root mean square over channels of an image's gradient, as a share of its largest entry; 0 if not finite."""
    size = gradient.nan_to_num(0.0, 0.0, 0.0).abs()
    top = size.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    return (size / top).square().mean(1).sqrt()  # scaled first: squares of small numbers are 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode during the block, and in its own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """A look without gradients, in evaluation mode, of which the step that follows sees nothing.

    Autocast keeps the weights that it casts. torch 2.7 hands those of a look without gradients to the step too, whose
    weights would then get no gradient; so they are forgotten.
    """
    with torch.no_grad(), evaluating(model):
        yield
    torch.clear_autocast_cache()


@contextmanager
def as_is(model: nn.Module) -> Iterator[None]:
    """Every submodule in its own mode, but running statistics and the generators of torch stay where they are."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for module in norms:
        module.track_running_stats = False  # in training mode: statistics of the batch, none written
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in norms:
            module.track_running_stats = True
