"""Sharded training: every process holds a piece of each parameter, gradient, average and state of the optimiser.

torch's ``fully_shard`` (FSDP2) does it. The parameters of a block are gathered when it runs and let go of behind it,
once more in the backward pass, which leaves each process its piece of the mean gradient. So a step computes what it
computes without sharding, up to rounding. Parameters outside of blocks, and those of the mixer, are one group around
all: whole from the first network's forward until the backward pass ends, so that a mixer may read them. Buffers are
each process's own, as always.
"""

import warnings
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mixers import Step
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import create_model
from mixup_recipes.typed import UserError

OPTIMIZERS = (
    "adabelief", "adam", "adamw", "adan", "lamb", "lars", "momentum", "nadam", "nadamw", "radam", "rmsprop",
    "rmsproptf", "sgd",
)  # fmt: skip
"""Those that were tried, whose update of a piece is that piece of the update."""


def check(recipe: Recipe, world: int) -> None:
    """Raise ``UserError`` for what does not go together with sharding, before a run begins."""
    if world == 1:
        raise UserError(
            "shard divides a model between processes, and there is only one process; start several with torchrun"
        )
    if recipe.opt not in OPTIMIZERS:
        raise UserError(
            f"shard: expected an optimiser that was tested with it ({', '.join(OPTIMIZERS)}), got {recipe.opt!r}"
        )
    if recipe.unfreeze_epochs is not None:
        raise UserError(
            "shard cannot be combined with unfreeze_epochs, because it divides what learns from the start; leave "
            "out one of them"
        )
    if recipe.mixed_precision == "fp16":
        raise UserError("shard was not tested with fp16; pass --mixed_precision bf16")


def shard(step: Step, ema: ModelEmaV3 | None, device: torch.device, world: int) -> None:
    """Cut the step's parameters, and those of the average, into a piece per process, in place.

    Every process calls it with the same values, before the optimiser is made. Raises ``UserError`` for a model with
    parameters that cannot be cut.
    """
    networks = step.model, *step.mixer.models(step.model).values()  # some of these share all but a classifier
    averages = [ema.module] if ema is not None else []
    mesh = init_device_mesh(device.type, (world,))
    # A mixer may return a part of the model's logits (RegMixup); nothing is written into what a step returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    try:
        for net in (*networks, *averages):
            shard_blocks(net, mesh)
        root = fully_shard(step, mesh=mesh)
        for net in averages:
            fully_shard(net, mesh=mesh)
        settle(step)
    except ValueError as e:
        raise UserError(f"shard: {' '.join(str(e).split())}") from None
    if ema is not None:
        ema.foreach = False  # torch does not take pieces and whole buffers in one call

    def gather(*_: Any) -> None:
        root.unshard()

    for net in step.modules():
        if any(net is network for network in networks):  # evaluated without the step, or after a look let go of all
            net.register_forward_pre_hook(gather)


def settle(root: nn.Module) -> None:
    """Have torch see that this module lies around all others, by the first call: of nothing."""

    def nothing() -> None:
        pass

    root.forward = nothing
    root()
    del root.forward
    root.reshard()  # type: ignore[operator]


def shard_blocks(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the parameters of each block of a model, of inner blocks first."""
    for block in blocks(model):
        if not isinstance(block, FSDPModule) and any(not isinstance(p, DTensor) for p in block.parameters()):
            fully_shard(block, mesh=mesh)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What models are lists of: blocks of layers, and stages of blocks; inner ones first.

    Found as what stands in a list or sequence of modules and is made of modules with parameters.
    """
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    listed = {id(item) for parent in model.modules() if isinstance(parent, lists) for item in parent.children()}
    found = [m for m in model.modules() if id(m) in listed and not isinstance(m, nn.ModuleList | nn.ModuleDict)]
    return [m for m in reversed(found) if any(True for child in m.children() for _ in child.parameters())]


def accompany(model: nn.Module, size: int, device: torch.device) -> None:
    """Take part in the gathering of a forward that other processes do, on an image of ``size`` that is no image.

    Looks at nothing that would let go of what is gathered, since the others do not.
    """
    if sharded(model):
        model(torch.zeros(1, 3, size, size, device=device))


def sharded(module: nn.Module) -> bool:
    """Whether a process holds only pieces of it, also where they are gathered just now."""
    parts = (isinstance(m, FSDPModule) for m in module.modules())
    return any(parts) or any(isinstance(p, DTensor) for p in module.parameters())


def whole(state: Any, keep: bool = True) -> Any:
    """A nested state with whole tensors on the host in place of pieces; None in their place without ``keep``.

    Every process calls it, since each has pieces that the others want.
    """
    if isinstance(state, DTensor):
        tensor = state.full_tensor().detach()
        return tensor.cpu() if keep else None
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    return [whole(value, keep) for value in state] if isinstance(state, list) else state


def whole_models(models: dict[str, nn.Module], recipe: Recipe, keep: bool) -> dict[str, nn.Module]:
    """The recipe's models, each whole, on the host where they were sharded. Every process calls it.

    Without ``keep`` the sharded ones are left out.
    """
    found = {}
    for name, model in models.items():
        state = model.state_dict()
        tensors = whole(state, keep)
        if not any(isinstance(value, DTensor) for value in state.values()):
            found[name] = model
        elif keep:
            found[name] = create_model(recipe)
            found[name].load_state_dict(tensors)
    return found


def load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load whole tensors into a module, of which a sharded one takes its pieces."""
    own = module.state_dict()
    module.load_state_dict({name: piece(value, own.get(name)) for name, value in tensors.items()})


def load_optimizer(target: Any, saved: dict[str, Any]) -> None:
    """Load a whole state into an optimiser or a loss scaler, of which a sharded optimiser takes its pieces."""
    if "state" in saved:
        params = [p for group in target.param_groups for p in group["params"]]
        state = {i: {k: piece(v, params[i]) for k, v in values.items()} for i, values in saved["state"].items()}
        saved = saved | {"state": state}
    target.load_state_dict(saved)


def piece(value: Any, like: Any) -> Any:
    """This process's piece of a whole tensor, where it goes to a piece; else the value itself."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
