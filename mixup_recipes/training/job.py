"""Options that decide where and how a run happens, never what comes out. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mixup_recipes.typed import Between, UserError

# Exit statuses of train_mixup.py beside 0 (done), 1 (failed) and 2 (bad input).
STOPPED = 75
"""A signal asked the run to stop; it saved a checkpoint and can be resumed (EX_TEMPFAIL: try again)."""

HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


@dataclass(frozen=True)
class Job:
    """How to run a recipe."""

    recipe: str | None = None
    """Recipe name SETTING_MIXER, such as r50_100e_cutmix, or the path of a recipe file."""
    output_dir: str | None = None
    """Folder of the run. The default is runs/NAME-seedN."""
    resume_from_checkpoint: str | None = None
    """auto: go on from the newest whole checkpoint of the run folder, or start the run if it has no results. Or the
    path of a checkpoint."""
    checkpointing_steps: str = "epoch"
    """Save a checkpoint every n updates. 'epoch' saves one at the end of each epoch."""
    save_total_limit: Annotated[int, Between(1)] = 2
    """Number of checkpoints that are kept. With 2, one is left when the newest is damaged."""
    report_to: str = "tensorboard"
    """Trackers of accelerate, comma-separated: tensorboard, trackio, wandb, mlflow, ... 'none' turns them off."""
    project: str = "mixup-recipes"
    """Project of the run in a tracker. The run is called RECIPE-seedN there, and its group is the recipe."""
    logging_steps: Annotated[int, Between(1)] = 50
    """Write a training line to the log every n updates. The device is read only then."""
    dataloader_num_workers: Annotated[int, Between(0)] | None = None
    """Loader processes per training process. 'none' is 0 on a CPU, else the number of cores, at most 16 and at most
    what /dev/shm holds."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """stop: a corrupt image ends the run with its index and path. skip: the next image replaces it, and the run counts
    it."""
    max_image_pixels: Annotated[int, Between(1)] = 178_956_970
    """A picture of more pixels is a bad image. The default is Pillow's limit, about 0.5 GB of decoded picture."""
    accept_changed_data: bool = False
    """Go on with a run whose images have changed. The log and the card say so."""
    deterministic: bool = False
    """Use only kernels that give the same bits each time. A bit-exact resume on a GPU needs this. It is slower."""
    shard: bool = False
    """Divide parameters, gradients, averages and optimiser between the processes (FSDP2), for a model too large for
    one."""
    push_to_hub: bool = False
    """Publish the run on the Hub, in the background. `mixup-recipes push RUN` finishes a push that failed."""
    hub_model_id: str | None = None
    """Repository, NAME or OWNER/NAME. The default is MODEL.MIXER_eEPOCHS_DATASET of the token's user."""
    hub_private_repo: bool = False
    """Make the repository private."""
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "end"
    """end: publish when the run ends. every_save: at every checkpoint. checkpoint, all_checkpoints: at every
    checkpoint, together with the newest checkpoint or all that are kept."""
    hub_token: str | None = field(default=None, repr=False)
    """Token of the Hub. `hf auth login` or HF_TOKEN is safer, because other users can see command lines."""
    list: bool = False
    """List settings and mixers, then leave."""
    dry_run: bool = False
    """Print images, updates, learning rates and memory, then leave. It opens data on this machine and downloads no
    data."""

    def __post_init__(self) -> None:
        every = self.checkpointing_steps
        if every != "epoch" and not (every.isdigit() and int(every)):
            raise UserError(f"checkpointing_steps: expected 'epoch' or an integer at least 1, got {every!r}")
        if not self.push_to_hub and (
            self.hub_model_id or self.hub_private_repo or self.hub_strategy != "end" or self.hub_token
        ):
            raise UserError("the hub_ flags say how to publish: pass --push_to_hub too, or leave them out")
