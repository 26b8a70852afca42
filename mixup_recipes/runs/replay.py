"""Any update's mixed batch of a run, rebuilt: a function of the recipe, the seed and the update, and of the data.

A mixer whose plan looks at the model needs the weights as they were before that update: the initial ones for update
0, else the run's own checkpoint of that update.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import default_collate

from mixers import Plan, Step
from mixers.base import plan_alone
from mixup_recipes import files
from mixup_recipes.data import images
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.multi_label import BETWEEN
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.pictures import sample_sheet
from mixup_recipes.data.splits import Splits, load_splits
from mixup_recipes.mixer_args import absent_mixers, used_packages
from mixup_recipes.recipe import Recipe, to_yaml
from mixup_recipes.runs.run import Run
from mixup_recipes.training import backbones, checkpoint
from mixup_recipes.training.folder import check_mixer
from mixup_recipes.training.unfreezing import Unfreezing
from mixup_recipes.training.update import inputs, meet_data, new_step
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


class Replayed(NamedTuple):
    """One mixed micro-batch of B images of S pixels, and what it was made of. On the device that mixed it."""

    images: Tensor
    """Normalised float (B, 3, S, S), as the model saw them."""
    targets: Tensor
    """(B, K)."""
    plan: Plan
    """What the mixer decided."""
    labels: Tensor
    """Class (B,) of each image before mixing, or multi-hot (B, K)."""
    indices: Tensor
    """Row (B,) of each image in the training table."""
    recipe: Recipe
    classes: list[str]
    notes: list[str]
    """What may keep this from being the job's batch bit for bit; empty when nothing does."""
    remarks: list[str]
    """What one should know to read the picture."""

    def __str__(self) -> str:
        """The notes, and a line for each of the first 8 images: its row, class, and the shares of its target."""
        lines = [f"note: {note}" for note in (*self.notes, *self.remarks)]
        for i, target in enumerate(self.targets[:8].tolist()):
            shares = sorted(enumerate(target), key=lambda pair: -pair[1])[:2]
            text = " + ".join(f"{share:.3f} {self.classes[k]}" for k, share in shares if share > 0.005)
            lines.append(f"row {self.indices[i].item():>8}  {self.before(i)}  ->  {text}")
        return "\n".join(lines + [f"and {len(self.targets) - 8} more"] * (len(self.targets) > 8))

    def before(self, i: int) -> str:
        """The class of an image before mixing, or its classes."""
        of_several = self.labels.ndim == 2
        places = self.labels[i].nonzero()[:, 0].tolist() if of_several else [int(self.labels[i])]
        return BETWEEN.join(self.classes[k] for k in places) or "no label"


def replay(run: Run, step: int, micro: int = 0) -> Replayed:
    """The mixed batch of update ``step`` (from 0) and micro-batch ``micro`` of a run.

    Raises ``UserError``: no run, another data set, an update or micro-batch that the run does not have, or weights
    that the mixer looks at and that are not kept.
    """
    folder, recipe = run.folder, run.recipe
    if recipe.streaming:
        raise UserError(
            f"cannot replay {folder}: it is a run on a stream, which does not tell which images an update saw"
        )
    noted = (folder / "data.json").is_file()
    splits = load_splits(run.recipe_here, run.data.classes if noted else ())
    if noted:
        check_data(run, splits)
        if before := [c["update"] for c in run.data.changes if step < c["update"]]:
            raise UserError(
                f"{folder} continued on other images at update {before[0]}, and the images before that update are "
                "not known"
            )
    samples = Samples(splits.train, recipe, images.TrainTransform(recipe), on_bad_image="skip")
    order = TrainOrder(len(samples), recipe, 0, 1, step, samples.labels)
    for name, asked, size in (("step", step, order.updates), ("micro", micro, order.micro_batches)):
        if not 0 <= asked < size:
            what = "updates" if name == "step" else "micro-batches per update"
            raise UserError(f"{name}: expected 0 to {size - 1}, because {recipe.name} has {size} {what}, got {asked}")

    env = run.environment if (folder / "env.json").is_file() else {}
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    notes: list[str] = []
    remarks: list[str] = []
    if env.get("device_type", device.type) != device.type:
        notes.append(
            f"the run used {env['device_type']} and this replay uses {device.type}: they are equal except for "
            "rounding and noise"
        )
    noted_mixers = env.get("mixers")
    for name in absent_mixers(recipe):
        if isinstance(noted_mixers, dict) and noted_mixers.get(name):
            raise UserError(f"the run used the mixer {name!r} of {noted_mixers[name][-1]}, which is not installed here")
    net = backbones.create_model(recipe)  # before any image, whose keys move the generator of the initial weights
    try:
        module = new_step(net, recipe)
    except ValueError as e:  # a mixer of a package that is not here, or is another one now
        raise UserError(f"mixer {recipe.mixer!r} with model {recipe.model!r}: {e}") from None
    check_mixer(folder, module)
    for name, package in used_packages(recipe).items():
        last = noted_mixers.get(name) if isinstance(noted_mixers, dict) else None
        if isinstance(last, list) and last and last[-1] != package:
            notes.append(f"the run used the mixer {name!r} of {last[-1]}, and this replay uses that of {package}")
    meet_data(module, recipe, splits, device, notes.append)
    module.to(device).to(memory_format=torch.channels_last if recipe.channels_last else torch.contiguous_format)
    module.train()
    if recipe.unfreeze_epochs is not None:  # layers that were frozen used their running statistics
        Unfreezing(module.model, recipe).begin(step, order.updates_per_epoch)
    parts = list(itertools.islice(order, micro + 1))

    def given(number: int) -> tuple[Tensor, Tensor, np.random.Generator, Tensor, Tensor]:
        """What the step is given for one micro-batch, its labels and rows."""
        pixels, labels, indices, bad = default_collate([samples[key] for key in parts[number]])
        if bad.any():
            notes.append(
                f"{many(int(bad.gt(0).sum()), 'image')} cannot be read; the next images of the table replace them"
            )
        return *inputs(pixels, labels, recipe, step, number, device), labels, indices

    x, y, rng, labels, indices = given(micro)
    plan = plan_alone(module.mixer, x, y, rng)
    if plan is None:  # the process's own micro-batches of this update, with the weights as they were
        saved = checkpoint.state_of(folder / "checkpoints", step)  # a resumed run may have other processes
        world = saved.get("processes", env.get("processes", 1))
        load_weights(module, run, step, micro % world, world)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.mixed_precision)
        for number in range(micro % world, micro + 1, world):
            x, y, rng, labels, indices = given(number)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                plan = module(x, y, rng).plan
        if recipe.torch_compile:
            notes.append(
                "the run compiled the model that the mixer looks at, and this replay did not: they are equal except "
                "for rounding"
            )
    assert plan is not None
    with torch.no_grad():
        mixed, targets = module.mixer.mix(x, y, **plan)
    if torch.equal(mixed, x) and not torch.equal(targets, y):
        remarks.append("this update mixed inside the network, so the images are unmixed and the targets are mixed")
    if "second" in plan:
        remarks.append(
            "this update made mosaics: an image may be made of any images of its part, so the row beside it need "
            "not be one of them"
        )
    return Replayed(mixed, targets, plan, labels, indices, recipe, splits.classes, notes, remarks)


def check_data(run: Run, found: Splits) -> None:
    """Raise ``UserError`` when the training table isn't the one of the run."""
    split = run.recipe.train_split
    if words := run.data.difference(split, found.identity["splits"][split], found.classes):
        raise UserError(
            f"dataset {run.recipe.dataset!r}, split {split!r}, is not what {run.folder} was trained on: {words}"
        )


def load_weights(module: Step, run: Run, update: int, rank: int, world: int) -> None:
    """Make ``module``, which has its initial weights, what it was before ``update``. Raises ``UserError``."""
    mixer, start = run.recipe.mixer, run.recipe.pretrained
    if update == 0:
        if start is not None:
            raise UserError(
                f"mixer {mixer!r} looks at the model, which started from {start}, so update 0 cannot be replayed; "
                "take a later step"
            )
        return
    found = run.folder / "checkpoints" / f"step-{update:08d}"
    if not found.is_dir():
        kept = [0, *(int(path.name.removeprefix("step-")) for path in run.checkpoints)]
        raise UserError(
            f"mixer {mixer!r} looks at the model, and {run.folder} keeps no weights of update {update}; it has those "
            f"of {', '.join(map(str, kept))}"
        )
    if why := checkpoint.damage(found):
        raise UserError(f"checkpoint {found} is damaged: {why}")
    checkpoint.restore(found, {"model": module}, [None, None], rank, world, torch.device("cpu"))


def save_picture(batch: Replayed, path: Path) -> None:
    """The sheet of mixed images that the job writes for some epochs, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_sheet(batch.images, batch.targets, batch.recipe, batch.classes, path)


def save_data(batch: Replayed, path: Path) -> None:
    """Images, targets, labels, indices and the plan's tensors as safetensors, the rest of the plan as metadata."""
    files.check_output(path)
    tensors: dict[str, Tensor] = {n: getattr(batch, n) for n in ("images", "targets", "labels", "indices")}
    rest: dict[str, Any] = {}
    for name, value in named("plan", batch.plan):
        (tensors if isinstance(value, Tensor) else rest)[name] = value
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"recipe": to_yaml(batch.recipe), "plan": json.dumps(rest)}
    files.write(path, safetensors.torch.save(kept, metadata))


def named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Everything inside nested dicts, lists and tuples, by a dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from named(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from named(f"{name}.{i}", inner)
    else:
        yield name, value
