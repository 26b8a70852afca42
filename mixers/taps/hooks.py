"""Outputs of submodules: kept, or replaced, during a block."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from timm.layers import use_reentrant_ckpt
from torch import Tensor, nn


@contextmanager
def edit(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of the submodule ``name`` by ``change(output)`` during the block.

    ``name`` is a module path, or ``""`` for the model's input. Raises ``RuntimeError`` at once if the submodule lies
    where activations are checkpointed or runs a second time, and when the block ends if it never ran.
    """
    refuse_recomputation(model, name)
    fired = False

    def fire() -> None:
        nonlocal fired
        if fired:
            raise RuntimeError(f"{name or 'the input'} would be edited twice: one forward belongs into the block")
        fired = True

    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        fire()
        return (change(args[0]), *args[1:])

    def after(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        fire()
        return change(output)

    module = model.get_submodule(name)
    with hooked(model, name, module.register_forward_hook(after) if name else model.register_forward_pre_hook(before)):
        yield
    if not fired:
        raise did_not_fire(model, name)


@contextmanager
def record(model: nn.Module, *names: str) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after one forward in the block, the output of each submodule in ``names``, with its graph.

    Raises ``RuntimeError`` when the block ends and a submodule never ran, or ran more than once.
    """
    outputs: dict[str, Tensor] = {}
    calls = dict.fromkeys(names, 0)

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            outputs[name] = output
            calls[name] += 1

        return after

    with contextlib.ExitStack() as stack:
        for name in calls:
            if use_reentrant_ckpt():  # it runs the forward without a graph
                refuse_recomputation(model, name)
            handle = model.get_submodule(name).register_forward_hook(keep(name))
            stack.enter_context(hooked(model, name, handle))
        yield outputs
    for name, times in calls.items():
        if times == 0:
            raise did_not_fire(model, name)
        if times > 1:
            raise RuntimeError(
                f"the tap on {name!r} of {type(model).__name__} fired {times} times: a record is of one forward, "
                "without the backward pass if activations are checkpointed"
            )


@contextmanager
def entering(model: nn.Module, module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that holds, after one forward in the block, what the submodule was given, with its graph.

    Raises ``RuntimeError`` when the block ends and the submodule did not run once.
    """
    (name,) = [name for name, inner in model.named_modules() if inner is module]
    given: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.append(args[0])

    with hooked(model, name, module.register_forward_pre_hook(keep)):
        yield given
    if len(given) != 1:
        raise (
            did_not_fire(model, name) if not given else RuntimeError(f"{name!r} ran {len(given)} times, expected once")
        )


@contextmanager
def hooked(model: nn.Module, name: str, *handles: Any) -> Iterator[None]:
    """Remove the hooks when the block ends, and run what is compiled around the submodule uncompiled until then."""
    compiled = [(m, m._compiled_call_impl) for m in around(model, name)[1:] if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, call in compiled:
            module._compiled_call_impl = call


def around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that contain the submodule ``name``, the model first; none contains the model itself."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def refuse_recomputation(model: nn.Module, name: str) -> None:
    """Raise RuntimeError when the submodule runs again in the backward pass, as timm's flag says."""
    if any(getattr(module, "grad_checkpointing", False) for module in around(model, name)):
        raise RuntimeError(
            f"no tap on {name!r} of {type(model).__name__} while it checkpoints activations: they would be recomputed "
            "without the tap; call set_grad_checkpointing(False)"
        )


def did_not_fire(model: nn.Module, name: str) -> RuntimeError:
    """The error of a block in which the submodule never ran."""
    return RuntimeError(
        f"the tap on {name or 'the input'!r} of {type(model).__name__} did not fire: a model that was compiled as "
        "a whole or that checkpoints activations bypasses it; compile it stage by stage (compile_stages) instead"
    )
