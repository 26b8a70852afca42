"""What depends on how the job was started: processes, precision, devices, trackers, the progress bar."""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from timm.layers import convert_sync_batchnorm
from torch import nn
from tqdm import tqdm

from mixers import Mixer, Step, taps
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, nearest


def accelerator(recipe: Recipe, folder: Path, report_to: str = "none", deterministic: bool = False) -> Accelerator:
    """accelerate's view of the processes that a launcher started; one process without a launcher."""
    trackers = [] if report_to == "none" else report_to.split(",")
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"report_to: unknown tracker {name!r}; {nearest(name, LOGGER_TYPE_TO_CLASS)}")
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
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except (ValueError, ImportError) as e:
        raise UserError(f"cannot start with {recipe.mixed_precision} precision and trackers {trackers}: {e}") from None
    # its successor cannot leave buffers alone when the model is wrapped
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if made.num_processes != asked:
        raise UserError(f"the launcher started {asked} processes, but accelerate connected {made.num_processes}")
    refused = {
        "a sharded or otherwise wrapped model": made.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"),
        "gradient accumulation of its own": made.gradient_accumulation_steps != 1,
        "torch.compile of its own": made.state.dynamo_plugin.backend.value != "NO",
    }
    for what, asked_for in refused.items():
        if asked_for:
            raise UserError(
                f"accelerate is configured for {what}, which would change what a recipe says; use a configuration "
                "with plain processes (recipes have batch_size and torch_compile)"
            )
    return made


def on_device(step: nn.Module, recipe: Recipe, accelerator: Accelerator) -> Any:
    """Move the step to the device, in the recipe's memory format, with shared BatchNorm where asked."""
    if recipe.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type != "cuda":
            raise UserError("sync_bn works between GPUs only; pass --sync_bn false, or start one process")
        step = convert_sync_batchnorm(step)  # timm's keeps the activation of its fused layers
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return step.to(accelerator.device, memory_format=layout)


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


def workers(asked: int | None, accelerator: Accelerator) -> int:
    """Loader processes per training process: as asked, or a share of this machine's cores."""
    if asked is not None:
        return asked
    if accelerator.device.type == "cpu":
        return 0  # the model itself needs the cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def init_trackers(accelerator: Accelerator, recipe: Recipe, start: int) -> None:
    """Start the trackers; TensorBoard forgets what a killed run wrote after its last checkpoint."""
    if accelerator.log_with:
        accelerator.init_trackers(recipe.name, init_kwargs={"tensorboard": {"purge_step": start}})


class Progress:
    """A bar with images/s and the time left on a terminal; a line per evaluation in a pipe; silence on other ranks."""

    NOTICE = 20  # updates, at the most, after which the limiting stage is named

    def __init__(self, accelerator: Accelerator, recipe: Recipe, start: int, total: int):
        self.main, self.images, self.left = accelerator.is_main_process, recipe.batch_size, total - start
        hidden = not self.main or not sys.stderr.isatty()
        self.bar = tqdm(
            total=total * self.images, initial=start * self.images, unit=" images", disable=hidden, dynamic_ncols=True
        )
        self.noticed = False
        self.updates = 0
        self.restart()

    def restart(self) -> None:
        """Begin a new window of time: after a log line, an evaluation, a checkpoint."""
        if self.updates:
            self.notice()
        self.began, self.waited, self.updates = time.perf_counter(), 0.0, 0

    def update(self, waited: float) -> None:
        """One update is done, ``waited`` seconds of it spent on waiting for images."""
        self.waited += waited
        self.updates += 1
        self.left -= 1
        self.bar.update(self.images)
        if self.updates == self.NOTICE:
            self.notice()

    def notice(self) -> None:
        """Say once what limits the run: loading above a third of the time means that it does."""
        if self.noticed:
            return
        self.noticed = True
        rate, share = self.speed()
        stage = "loading images" if share > 1 / 3 else "the model"
        minutes = self.left * self.images / rate / 60
        left = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
        self.say(
            f"{rate:.0f} images/s, {share:.0%} of the time waiting for images: limited by {stage}; "
            f"about {left} of training left"
        )

    def speed(self) -> tuple[float, float]:
        """Images per second over all processes, and the share of time spent waiting for images."""
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        return self.updates * self.images / elapsed, self.waited / elapsed

    def say(self, text: str) -> None:
        """A line beside the bar, on the main process."""
        if self.main:
            self.bar.write(text, file=sys.stdout) if not self.bar.disable else print(text, flush=True)
