"""Looks into a model that is not ours: the names of its stages, and editing a hidden feature.

Everything works on plain timm models from outside, through the module paths that timm publishes in
``feature_info``, and leaves no trace on the model. A tap that did not fire raises: a hook on a model that was
compiled as a whole, or that recomputes activations, would otherwise be ignored without a word.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def stages(model: nn.Module) -> list[str]:
    """Module paths of the model's published stages, in order of depth, e.g. ``["layer1", ..., "layer4"]``.

    Leaves out an entry that is not a stage of residual blocks or tokens but the stem's activation.
    Raises ``ValueError`` when the model does not publish its stages.
    """
    info = getattr(model, "feature_info", None)
    if info is None:
        raise ValueError(
            f"{type(model).__name__} does not publish its stages (feature_info); use a timm model such as "
            "resnet50, deit_small_patch16_224, swin_tiny_patch4_window7_224 or convnext_tiny"
        )
    entries = info.info if hasattr(info, "info") else info
    names = [entry["module"] for entry in entries]
    return [name for name in names if not isinstance(model.get_submodule(name), nn.ReLU | nn.SiLU | nn.GELU)]


@contextmanager
def edit(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of the submodule ``name`` by ``change(output)`` during the block.

    ``name`` is a module path, or ``""`` for the model's input. Raises ``RuntimeError`` when the block ends and
    the submodule never ran.
    """
    fired = False

    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal fired
        fired = True
        return (change(args[0]), *args[1:])

    def after(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal fired
        fired = True
        return change(output)

    handle = model.get_submodule(name).register_forward_hook(after) if name else model.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise RuntimeError(
            f"the tap on {name or 'the input'!r} of {type(model).__name__} did not fire: a model that was compiled as "
            "a whole or that checkpoints activations bypasses it; compile it stage by stage (compile_stages) instead"
        )


def compile_stages(model: nn.Module, **options: Any) -> None:
    """Compile every stage by itself, in place: hooks between the stages keep working, state-dict keys stay.

    ``options`` are those of ``torch.compile``, e.g. ``backend``.
    """
    for name in stages(model):
        model.get_submodule(name).compile(**options)
