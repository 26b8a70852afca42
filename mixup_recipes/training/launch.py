"""What depends on how the job was started: processes, precision, devices."""

import contextlib
import ctypes
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
)
from timm.layers import convert_sync_batchnorm
from torch import nn

from mixers import Mixer, Step, taps
from mixup_recipes.data.loading import PREFETCHED
from mixup_recipes.data.order import cut
from mixup_recipes.recipe import Recipe
from mixup_recipes.training import sharding
from mixup_recipes.training.backbones import count_once
from mixup_recipes.training.signals import WAITING, Stop
from mixup_recipes.training.trackers import chosen
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

SHARED = Path("/dev/shm")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
Net = TypeVar("Net", bound=nn.Module)


def accelerator(
    recipe: Recipe, folder: Path, report_to: str = "none", deterministic: bool = False, shard: bool = False
) -> Accelerator:
    """accelerate's view of the processes that a launcher started; one process without a launcher."""
    trackers = chosen(report_to)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        made = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else accelerate starts N unconnected processes on a CPU
            mixed_precision=recipe.mixed_precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "runs")),
            # BatchNorm statistics stay each process's own within an epoch, as in the published runs, and are averaged
            # at its end.
            # One process downloads or lists the data while the others wait: for hours, if it takes so long. A process
            # that dies is its launcher's business, which ends the others.
            # What thaws later takes no gradient until then.
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    find_unused_parameters=recipe.unfreeze_epochs is not None,
                ),
                InitProcessGroupKwargs(timeout=WAITING),
            ],
        )
    except (ValueError, ImportError) as e:
        raise UserError(f"cannot start with {recipe.mixed_precision} precision and trackers {trackers}: {e}") from None
    # its successor cannot leave buffers alone when the model is wrapped
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    if made.device.type == "cpu":
        keep_freed_memory()
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if made.num_processes != asked:
        raise UserError(f"the launcher started {many(asked, 'process')}, but accelerate connected {made.num_processes}")
    refused = {
        "a sharded or otherwise wrapped model": made.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"),
        "gradient accumulation of its own": made.gradient_accumulation_steps != 1,
        "torch.compile of its own": made.state.dynamo_plugin.backend.value != "NO",
    }
    for what, asked_for in refused.items():
        if asked_for:
            raise UserError(
                f"accelerate is configured for {what}, which would change what a recipe says; use a configuration "
                "with plain processes (recipes have batch_size and torch_compile, and --shard divides a model)"
            )
    if shard:
        sharding.check(recipe, made.num_processes)
    return made


def keep_freed_memory() -> None:
    """On a CPU: memory that a step frees is for the next one. Else glibc gives large pieces back to the system, which
    fills each of them with zeros when it is asked again, for about a tenth of a small step.

    What the environment says of malloc stays as it is; where there is no glibc nothing happens.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def announce(recipe: Recipe, accelerator: Accelerator) -> None:
    """The first line of a run: how many processes it really has, and how they share a batch; then what to avoid."""
    world, (_, accumulation) = accelerator.num_processes, cut(recipe, accelerator.num_processes)
    accelerator.print(
        f"{recipe.name}: {many(world, 'process')} on {accelerator.device.type}, {recipe.mixed_precision} "
        f"mixed precision, global batch {recipe.batch_size} = {recipe.per_device_train_batch_size} per process x "
        f"{world} x {accumulation} accumulated",
        flush=True,
    )
    emulated = torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if accelerator.device.type == "cpu" and recipe.mixed_precision == "bf16" and emulated:
        accelerator.print("bf16 is emulated on this CPU, about ten times slower than --mixed_precision no", flush=True)
    if recipe.warmup_epochs == recipe.epochs:
        accelerator.print(
            f"the warm-up lasts for all of the run, {many(recipe.epochs, 'epoch')}, so the learning rate stays below "
            f"{recipe.lr:g}; --warmup_epochs 0 trains without a warm-up",
            flush=True,
        )


def end(accelerator: Accelerator, stop: Stop | None = None) -> None:
    """Let go of all that the processes hold together; each then ends for itself."""
    if accelerator.num_processes > 1:
        # Torch 2.7 hangs where Python lets go of a group while a thread of that group lets go of what was gathered
        # last: each waits for the other. A moment in which Python is free lets the thread go first.
        time.sleep(0.2)
    if stop is not None:
        stop.group = None  # with torch 2.7 a process hangs that still holds it when the groups are gone
    accelerator.end_training()


def on_device(module: Net, recipe: Recipe, accelerator: Accelerator) -> Net:
    """Move a step or a model to the device, in the recipe's memory format, with shared BatchNorm where asked."""
    moved: Any = module  # torch's types know no move to a device and into a format at once
    if recipe.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type != "cuda":
            raise UserError("sync_bn works between GPUs only; pass --sync_bn false, or start one process")
        moved = convert_sync_batchnorm(moved)  # timm's keeps the activation of its fused layers
        if recipe.grad_checkpointing:  # the layers are new
            count_once(moved)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return moved.to(accelerator.device, memory_format=layout)


def compile_step(step: Step) -> None:
    """Compile each network stage by stage, and what mixers name of their own.

    For the few shapes of a run: whole and last batches, training and evaluation.
    All stages share one budget of recompilations, which torch sets to 8; and dynamic shapes, which it would try
    next, do not compile for every model.
    """
    torch._dynamo.config.recompile_limit = 64
    try:
        for net in (step.model, *step.mixer.models(step.model).values()):
            taps.compile_stages(net, dynamic=False)
        for mixer in step.mixer.modules():
            if isinstance(mixer, Mixer):
                for part in mixer.compiled():
                    part.compile(dynamic=False)
    except ValueError as e:
        raise UserError(f"torch_compile: {e}") from None


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers(asked: int | None, accelerator: Accelerator, recipe: Recipe, training: bool = False) -> int:
    """Loader processes per training process: as asked, or a share of this machine's cores that its memory has room for.

    Their batches lie in memory that they share with this process, those of all loaders that are there at once: in
    ``training`` its own, whose batches wait meanwhile, and that of PreciseBN or of the evaluation after it. Every
    process must call this. Raises ``UserError`` where there is no room for as many as asked.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    default = 0 if accelerator.device.type == "cpu" else min(16, cores() // local)  # on a CPU the model needs the cores
    count = default if asked is None else asked
    train, evaluation = recipe.image_size**2, recipe.eval_size**2
    second = max(evaluation, train if recipe.precise_bn_samples is not None else 0)
    pixels = train + second if training else evaluation
    each = local * PREFETCHED * recipe.per_device_train_batch_size * 3 * pixels
    free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else None
    if asked is None:
        fitting = count if free is None else min(count, free // each)
        if accelerator.num_processes > 1:  # the order of a stream needs the same everywhere
            fitting = min(gather_object([fitting]))
        if fitting < count:
            accelerator.print(
                f"{SHARED} is small: {many(fitting, 'loader process')} instead of {count}; give a container more "
                "(docker run --shm-size 8g)"
            )
        return fitting
    if free is not None and count * each > free:
        raise UserError(
            f"{SHARED} has {free / 1e6:.0f} MB free, batches of {many(count, 'loader process')} need "
            f"{count * each / 1e6:.0f} MB; pass --dataloader_num_workers {free // each} or fewer, or give a container "
            "more (docker run --shm-size 8g)"
        )
    return count
