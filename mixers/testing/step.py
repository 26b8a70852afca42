"""Checks of the step: loss, gradients, what is left on the model, resuming, micro-batches."""

import copy
import io

import numpy as np
import torch
from torch import Tensor, nn

from ..base import Out
from .contract import check
from .parts import (
    Factory,
    Recorder,
    batch,
    differences,
    expect,
    footprint,
    leaves,
    rng_of,
    tiny_step,
    train,
    updates,
)


@check
def loss_is_sum_of_parts(factory: Factory) -> None:
    """The loss is one finite number with a gradient, and the sum of what is logged."""
    step, (x, y) = tiny_step(factory), batch()
    for out in updates(step, x, y, 3):
        expect(isinstance(out, Out), "an Out from forward", type(out).__name__)
        finite = out.loss.shape == () and bool(out.loss.isfinite())
        expect(finite and out.loss.requires_grad, "a finite scalar loss with a gradient", out.loss)
        plain = bool(out.logs) and all(part.shape == () and not part.requires_grad for part in out.logs.values())
        expect(plain, "named parts of the loss as detached scalars", out.logs)
        total = sum(part.item() for part in out.logs.values())
        expect(abs(total - out.loss.item()) < 1e-5, f"a loss equal to the sum of its parts, {total}", out.loss.item())
        shapes = (out.logits.shape, out.target.shape)
        expect(shapes == (y.shape, y.shape), f"logits and target of shape {tuple(y.shape)}", shapes)


@check
def model_left_as_found(factory: Factory) -> None:
    """A step changes no mode, hook, attribute, flag or gradient, and moves buffers as one plain forward would."""
    x, y = batch()
    for training in (True, False):
        step = tiny_step(factory)
        step.train(training)
        parameters = list(step.model.parameters())
        # One module, one flag and one gradient unlike the others: restoring a common value is not enough.
        list(step.model.modules())[-1].train(not training)
        parameters[0].requires_grad_(False)
        parameters[-1].grad = torch.ones_like(parameters[-1])
        plain = copy.deepcopy(step.model)
        before = footprint(step.model)
        out = step(x, y, rng_of(0))
        mode = "train" if training else "eval"
        found = differences(before, footprint(step.model))
        expect(not found, f"a model in {mode} mode left as it was found", f"changes at {found[:5]}")
        with torch.no_grad():
            plain(step.mixer.mix(x, y, **out.plan)[0])
        moved = dict(step.model.named_buffers())
        wrong = [n for n, b in plain.named_buffers() if not torch.allclose(b, moved[n], rtol=1e-4, atol=1e-6)]
        expect(not wrong, f"buffers in {mode} mode as after one forward on the mixed batch", f"others at {wrong[:5]}")


@check
def no_device_read(factory: Factory) -> None:
    """A step runs on the meta device, where tensors have no values to read, and its plan lives on that device."""
    step = tiny_step(factory).to("meta")
    x, y = (value.to("meta") for value in batch())
    for index in range(3):
        try:
            plan = step(x, y, rng_of(index)).plan
            step.mixer.after_step(step.model, (index + 1) / 3)
        except Exception as error:
            raise AssertionError(
                "expected a step that reads nothing back from the device (.item(), .cpu(), float(), if on a tensor, "
                f"boolean indexing) and leaves nothing on the host; found {type(error).__name__}: {error}"
            ) from error
        host = [path for path, value in leaves(plan) if isinstance(value, Tensor) and value.device != x.device]
        expect(not host, "all tensors of the plan on the device of the batch", f"others at {host}")


@check
def resume(factory: Factory) -> None:
    """Two steps, save, load into a new step, two more: the same losses and state as four steps, bit for bit."""
    whole = tiny_step(factory)
    train(whole, 0, 2, total=4)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    losses = train(whole, 2, 4, total=4)
    file.seek(0)
    resumed = tiny_step(factory, seed=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    again = train(resumed, 2, 4, total=4)
    expect(losses == again, f"losses {losses} after resuming", again)
    found = differences(dict(whole.state_dict()), dict(resumed.state_dict()))
    expect(not found, "the same state after resuming", f"differences at {found[:5]}")


@check
def autocast_bf16(factory: Factory) -> None:
    """A step runs under autocast: finite loss and gradients, targets in full precision."""
    step, (x, y) = tiny_step(factory), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = step(x, y, rng_of(0))
    out.loss.backward()
    expect(bool(out.loss.isfinite()), "a finite loss", out.loss)
    expect(out.target.dtype == y.dtype, f"targets in {y.dtype}", out.target.dtype)
    wrong = [n for n, p in step.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    expect(not wrong, "finite gradients", f"others at {wrong[:5]}")


@check
def gradient_reaches_every_parameter(factory: Factory) -> None:
    """Over five steps every trainable parameter of model and mixer gets a gradient, and not all of it is zero."""
    step, (x, y) = tiny_step(factory), batch()
    for out in updates(step, x, y, 5):
        out.loss.backward()
    trainable = {name: p.grad for name, p in step.named_parameters() if p.requires_grad}
    missing = [name for name, grad in trainable.items() if grad is None]
    expect(not missing, "a gradient for every trainable parameter", f"none at {missing[:5]}")
    for owner in ("model.", "mixer."):
        own = [grad for name, grad in trainable.items() if name.startswith(owner) and grad is not None]
        expect(not own or any(bool(grad.any()) for grad in own), f"a gradient in {owner[:-1]} that is not 0", "only 0")


@check
def moves_with_to(factory: Factory) -> None:
    """``Step.to`` moves everything: no tensor is kept beside the registered parameters and buffers."""
    step = tiny_step(factory)
    train(step, 0, 1, total=2)
    x, y = (value.double() for value in batch())
    out = step.double()(x, y, rng_of(1))
    expect(out.loss.dtype == torch.float64, "a step in float64 after .double()", out.loss.dtype)
    step.to("meta")
    for name, module in step.named_modules():
        for path, value in leaves(vars(module)):
            tensors = list(value.state_dict().values()) if isinstance(value, nn.Module) else [value]
            left = any(isinstance(tensor, Tensor) and tensor.device.type != "meta" for tensor in tensors)
            expect(not left, f"{name}{path} moved by Step.to, as a parameter, buffer or submodule is", "it stayed")


@check
def accumulation_invariance(factory: Factory) -> None:
    """Micro-batches of one update draw the same values, and leave the gradient accumulated so far alone.

    Scalars (branch, layer, lambda) are drawn before anything whose amount depends on the size of the batch.
    """
    draws, plain = [], []
    for size, seed in ((4, 0), (4, 1), (3, 2), (7, 3)):
        rng = Recorder()
        plan = tiny_step(factory)(*batch(size, seed=seed), rng).plan
        draws.append(rng.draws)
        plain.append({path: None if isinstance(value, Tensor) else value for path, value in leaves(plan)})
    expect(repr(draws[0]) == repr(draws[1]), "the same draws whatever the images", f"{draws[0]} and {draws[1]}")
    scalars = [[draw for draw in of_one if np.ndim(draw) == 0] for of_one in draws]
    same = all(a == b for other in scalars[2:] for a, b in zip(scalars[0], other, strict=False))
    expect(same, "the same scalars drawn first whatever the batch size", scalars)
    expect(all(other == plain[0] for other in plain), "the same branch, layer and keys in every micro-batch", plain)

    step = tiny_step(factory)
    step(*batch(seed=0), rng_of(0)).loss.backward()
    before = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step(*batch(seed=1), rng_of(0))
    after = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    found = differences(before, after)
    expect(not found, "the gradient of the previous micro-batch untouched by the next step", f"changes at {found[:5]}")
