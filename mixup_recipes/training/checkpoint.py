"""Checkpoints that appear whole or not at all: written aside, hashed, synced, renamed.

A checkpoint is a folder ``step-00001234`` with ``model.safetensors`` (model and mixer), ``ema.safetensors``,
``process.safetensors`` (what each process has for itself: BatchNorm statistics, running sums of the log),
``optimizer.pt`` (read with ``weights_only=True``), ``state.json`` and ``manifest.json`` (SHA-256 of each file).
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixers import Mixer
from mixup_recipes.data.opening import same_place
from mixup_recipes.files import file_hash, sync
from mixup_recipes.recipe import Recipe
from mixup_recipes.training import sharding
from mixup_recipes.training.folder import noted
from mixup_recipes.training.format import PLACE
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

ALWAYS = {"model.safetensors", "optimizer.pt", "process.safetensors", "state.json"}


def save(
    folder: Path,
    update: int,
    modules: dict[str, nn.Module],
    optimizers: list[Any],
    sums: dict[str, Tensor],
    state: dict[str, Any],
    accelerator: Any,
    limit: int,
) -> None:
    """Write the checkpoint of ``update`` and remove all but the newest ``limit``. Call it on every process.

    ``modules``: name -> module, saved by the main process. ``optimizers``: optimiser and loss scaler, None where there
    is none. ``sums``: scalars that differ between processes, as BatchNorm statistics do.
    """
    own = {f"sums/{k}": v.detach().cpu().clone() for k, v in sums.items()}
    if accelerator.num_processes > 1:
        for name, module in modules.items():
            own |= {f"{name}/{k}": v.detach().cpu().clone() for k, v in module.named_buffers()}
    gathered = gather_object([own])
    if not all(part["sums/loss"].isfinite() for part in gathered if "sums/loss" in part):
        raise RuntimeError(
            f"the loss is not finite at update {update}; no checkpoint is written, and the earlier ones are kept"
        )
    keep = accelerator.is_main_process
    gathered_whole = {name: tensors(module, keep) for name, module in modules.items() if sharding.sharded(module)}
    states = [{} if one is None else sharding.whole(one.state_dict(), keep) for one in optimizers]
    if keep:
        final, aside = folder / f"step-{update:08d}", folder / f"tmp-{update:08d}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            for name, module in modules.items():
                save_file(gathered_whole.get(name) or tensors(module, keep), aside / f"{name}.safetensors")
            per_process = {f"{rank}/{k}": v for rank, part in enumerate(gathered) for k, v in part.items()}
            save_file(per_process, aside / "process.safetensors")
            torch.save(states, aside / "optimizer.pt")
            (aside / "state.json").write_text(json.dumps(state | {"update": update, "processes": len(gathered)}))
            manifest = {p.name: file_hash(p) for p in sorted(aside.iterdir())}
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for path in (*aside.iterdir(), aside):
                sync(path)
            before = folder / f"tmp-{update:08d}-before"
            if final.exists():  # the same update again: after a fall back to an older checkpoint, or evaluated by now
                shutil.rmtree(before, ignore_errors=True)
                final.rename(before)
            aside.rename(final)
            sync(folder)
            shutil.rmtree(before, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors wrap a full disk
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {final}: {e}; earlier checkpoints are kept") from e
        for old in existing(folder)[:-limit]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def tensors(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """A module's state as independent host tensors; safetensors refuses shared memory. Empty without ``keep``.

    Call it on every process: one may hold pieces of what others have the rest of.
    """
    state = sharding.whole(module.state_dict(), keep)
    return {k: v.detach().cpu().clone().contiguous() for k, v in state.items()} if keep else {}


def existing(folder: Path) -> list[Path]:
    """All checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if not isinstance(manifest, dict) or not manifest.keys() >= ALWAYS:
            return "manifest.json is incomplete"
        wrong = [name for name, digest in manifest.items() if file_hash(checkpoint / name) != digest]
    except (FileNotFoundError, ValueError) as e:
        return str(e)
    except OSError as e:  # storage that is away for a moment is no reason to give a checkpoint up
        raise UserError(f"cannot read {checkpoint}: {e}; try again") from None
    return f"{', '.join(wrong)} changed" if wrong else None


def find(resume: str | None, folder: Path, say: Any) -> Path | None:
    """The checkpoint to resume from: the newest whole one for ``auto`` (damaged ones are reported), or the one named.

    None: start fresh. Raises ``UserError`` when a named checkpoint is missing or damaged.
    """
    if resume is None:
        return None
    if resume.lower() not in ("auto", "true"):
        checkpoint = Path(resume)
        if checkpoint.absolute().parent != folder.absolute():
            raise UserError(f"checkpoint {checkpoint} belongs to another run; expected 'auto' or one of {folder}")
        if not (checkpoint / "manifest.json").exists():
            names = ", ".join(p.name for p in existing(folder)) or "none"
            raise UserError(f"no checkpoint at {checkpoint}; expected 'auto' or one of {folder}: {names}")
        if why := damage(checkpoint):
            raise UserError(f"checkpoint {checkpoint} is damaged: {why}; use --resume_from_checkpoint auto")
        return checkpoint
    for checkpoint in reversed(existing(folder)):
        why = damage(checkpoint)
        if why is None:
            return checkpoint
        say(f"checkpoint {checkpoint.name} is damaged ({why}); trying the one before")
    return None


def choose(resume: str | None, folder: Path, recipe: Recipe, job: Job, accelerator: Any) -> tuple[Path | None, str]:
    """The checkpoint to resume from, None to start fresh, and what to say of a run that is done and has none.

    The main process alone looks into the folder, so that all processes do the same. Raises ``UserError``.
    """
    found: list[Any] = [None, "", None]
    if accelerator.is_main_process:
        try:
            found[0] = find(resume, folder / "checkpoints", accelerator.print)
            if resume is not None and found[0] is None:
                found[1] = finished_before(folder, recipe, job)
                if not found[1] and (folder / "log.jsonl").exists():
                    accelerator.print(f"no checkpoint yet in {folder}: the run starts from the beginning")
        except UserError as e:
            found[2] = str(e)
    chosen, said, error = broadcast_object_list(found)
    if error:
        raise UserError(error)
    return chosen, said


def finished_before(folder: Path, recipe: Recipe, job: Job) -> str:
    """What to say of a finished run of this recipe that has no checkpoint to go on from; nothing where one may begin.

    A run that was stopped before its first checkpoint begins again, and finds the same. Raises ``UserError`` for
    results that would be lost, and for another dataset than that of the run, whose images nothing compares any more.
    """
    rows = logged(folder)
    evaluated = [number for number, row in enumerate(rows) if row.get("mode") == "val"]
    epoch = rows[evaluated[-1]].get("epoch") if evaluated else 0
    if epoch == recipe.epochs and (folder / "eval_results.json").is_file():
        places = [noted(folder, "data.json").get("dataset"), noted(folder, PLACE).get("path")]
        known = [place for place in places if isinstance(place, str)]
        if known and not any(same_place(recipe.dataset, place) for place in known):
            raise UserError(
                f"the run in {folder} is finished and used dataset {known[0]!r}, not {recipe.dataset!r}; leave out "
                "--dataset, or choose another --output_dir"
            )
        publish = f"; publish it with: mixup-recipes push {folder}" if job.push_to_hub else ""
        return f"the run in {folder} is finished, there is nothing left to do{publish}"
    first = job.checkpointing_steps.isdigit() and rows and rows[-1].get("update", 0) <= int(job.checkpointing_steps)
    if first or evaluated[:1] == [len(rows) - 1] or not (evaluated or (folder / "model.safetensors").exists()):
        return ""
    done = f"of {epoch} of {many(recipe.epochs, 'epoch')}" if epoch else "without a log"
    raise UserError(
        f"{folder} has results {done}, but no whole checkpoint to continue from; put its checkpoints back, or train "
        "again into another --output_dir"
    )


def logged(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a folder's log; none where there is no log."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (folder / "log.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def forget(folder: Path, after: int, say: Any) -> None:
    """Put aside, as ``given-up-...``, checkpoints newer than update ``after``: damaged ones, or a future left behind.

    They would count among the newest, and push out those of the run that goes on from ``after``.
    """
    for checkpoint in existing(folder):
        if int(checkpoint.name.removeprefix("step-")) > after:
            aside = checkpoint.with_name(f"given-up-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            say(f"the run continues from update {after}, and {checkpoint.name} is renamed to {aside.name}")


def restore(
    checkpoint: Path, modules: dict[str, nn.Module], optimizers: list[Any], rank: int, world: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore modules and optimisers in place; return the state and this process's sums.

    ``optimizers``: as they were given to ``save``; None skips one. With another number of processes the
    first one's statistics stand in for those that were not there.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    for name, module in modules.items():
        sharding.load(module, load_file(checkpoint / f"{name}.safetensors"))
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    for target, part in zip(optimizers, saved, strict=True):
        if target is not None:
            sharding.load_optimizer(target, part)
    source = rank if state["processes"] == world else 0
    stored = load_file(checkpoint / "process.safetensors")
    own = {k.removeprefix(f"{source}/"): v for k, v in stored.items() if k.startswith(f"{source}/")}
    if state["processes"] != world:  # the first process takes over what all had summed
        for k in [k for k in own if k.startswith("sums/")]:
            everyone = sum((stored[f"{r}/{k}"] for r in range(state["processes"])), start=torch.zeros_like(own[k]))
            own[k] = everyone if rank == 0 else torch.zeros_like(own[k])
    with torch.no_grad():
        for name, module in modules.items():
            for k, buffer in module.named_buffers():
                if f"{name}/{k}" in own:
                    buffer.copy_(own[f"{name}/{k}"])
    return state, {k.removeprefix("sums/"): v.to(device) for k, v in own.items() if k.startswith("sums/")}


def resumed(checkpoint: Path, saved_by: int, world: int) -> str:
    """What is said of a run of ``world`` processes that goes on from what ``saved_by`` processes saved."""
    other = (
        ""
        if saved_by == world
        else (f"\nit was saved by {many(saved_by, 'process')}, so the run continues, but not bit for bit")
    )
    return f"resumed from {checkpoint.name}{other}"


def state_of(folder: Path, update: int) -> dict[str, Any]:
    """What the checkpoint of an update says of itself; empty where there is none or it is damaged."""
    try:
        state = json.loads((folder / f"step-{update:08d}" / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def needed_bytes(modules: dict[str, nn.Module], limit: int, recipe: Recipe) -> int:
    """Bytes that ``limit`` checkpoints and one being written take, over all processes.

    Weights, averages, two moments of the optimiser, and what mixers keep of the float32 batch of an update.
    """
    images, targets = (4 * recipe.batch_size * n for n in (3 * recipe.image_size**2, recipe.num_classes))
    mixers = [m for module in modules.values() for m in module.modules() if isinstance(m, Mixer)]
    history = sum(mixer.history_bytes(images, targets) for mixer in mixers)
    weights = sum(t.numel() * t.element_size() for m in modules.values() for t in m.state_dict().values())
    trained = sum(p.numel() * p.element_size() for m in modules.values() for p in m.parameters() if p.requires_grad)
    return (weights + 2 * trained + history) * (limit + 1)
