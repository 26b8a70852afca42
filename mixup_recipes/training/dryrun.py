"""What a run would do, without arithmetic, and without data but those that lie on this machine."""

import copy

import numpy as np
import torch
from torch import nn

from mixers import Step
from mixup_recipes.data.known import KNOWN_SIZES
from mixup_recipes.data.opening import is_large, is_local
from mixup_recipes.data.order import cut, updates_per_epoch
from mixup_recipes.data.splits import count, load_splits
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.training import optimisation
from mixup_recipes.training.backbones import create_model, weight_bytes
from mixup_recipes.training.data import check_rates, split_lines
from mixup_recipes.training.distillation import Distilled
from mixup_recipes.training.unfreezing import Unfreezing
from mixup_recipes.training.update import meet_data, new_step, one_hot
from mixup_recipes.typed import UserError


def activation_bytes(model: nn.Module, batch: int, size: int) -> int:
    """Bytes that autograd keeps for one forward in fp32, counted on the meta device. An estimate of what is live."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
        return tensor

    model = copy.deepcopy(model).to("meta").train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = model(torch.empty(batch, 3, size, size, device="meta"))
    del kept
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(n for storage, n in seen.items() if storage not in weights)


def try_checkpointed(step: Step, recipe: Recipe) -> None:
    """Raise ``UserError`` where a mixer reads or changes activations that ``grad_checkpointing`` does not keep.

    Six steps of a copy on two random images: where a mixer looks may be drawn.
    """
    if not recipe.grad_checkpointing:
        return
    step = copy.deepcopy(step).train()
    classes = recipe.num_classes or 1000
    x = torch.randn(2, 3, recipe.image_size, recipe.image_size, generator=torch.Generator().manual_seed(0))
    y = one_hot(torch.arange(2) % classes, changed(recipe, num_classes=classes))
    for number in range(6):
        try:
            # without a teacher, which learns its classes from the data, and keeps nothing for a backward pass
            Step.forward(step, x, y, np.random.default_rng((number, recipe.seed))).loss.backward()
        except RuntimeError as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                f"mixer {recipe.mixer!r} needs activations of {recipe.model!r} that grad_checkpointing does not "
                f"keep; leave out grad_checkpointing, or take another mixer ({reason})"
            ) from None


def dry_run(recipe: Recipe, step: Step, world: int, shard: bool = False) -> str:
    """Local data as a run says them, then images, updates, learning-rate trace and memory.

    ``shard``: whether processes hold pieces of the model. Large shards of data are not opened, of which a run makes a
    copy first. Raises ``UserError`` for data that a run would refuse.
    """
    if not is_local(recipe) or is_large(recipe):
        return describe(recipe, step, world, shard)
    splits = load_splits(recipe)
    check_rates(recipe, count(splits.train))
    if recipe.num_classes == 0:
        recipe = changed(recipe, num_classes=len(splits.classes))
        step = new_step(create_model(recipe), recipe, step.teacher if isinstance(step, Distilled) else None)
    notes = [*splits.notes]
    meet_data(step, recipe, splits, torch.device("cpu"), notes.append)
    return "\n".join([*split_lines(splits), *notes, describe(recipe, step, world, shard, count(splits.train))])


def describe(recipe: Recipe, step: Step, world: int, shard: bool, size: int | None = None) -> str:
    """Images, updates, learning-rate trace and memory, as text. ``size``: training images, where they are known."""
    _, accumulation = cut(recipe, world)
    optimisation.optimizer(step, recipe)  # only to see that it can be made
    per_epoch, images = images_in_words(recipe, size)
    batch = f"{recipe.batch_size} = {recipe.per_device_train_batch_size} per process x {world} x {accumulation}"
    marks = sorted({0, 1, recipe.epochs // 4, recipe.epochs // 2, 3 * recipe.epochs // 4, recipe.epochs - 1})
    rates = {e: optimisation.learning_rate(recipe, e * per_epoch, per_epoch) for e in marks if e < recipe.epochs}
    trained = sum(p.numel() * p.element_size() for p in step.parameters() if p.requires_grad)
    moments = {"momentum": 1, "sgd": 1}.get(recipe.opt, 2)
    ema = weight_bytes(step.model) if recipe.ema_decay is not None else 0
    held = (weight_bytes(step) + trained * (1 + moments) + ema) / (world if shard else 1)
    activations = activation_bytes(step.model, recipe.per_device_train_batch_size, recipe.image_size)
    rows = {
        "recipe": recipe.name,
        "model": f"{recipe.model}, {sum(p.numel() for p in step.model.parameters()):,} parameters",
        "mixer": f"{recipe.mixer} {recipe.mixer_args[recipe.mixer]}",
        "global batch": batch,
        **images,
        "lr at epoch": "  ".join(f"{e}: {rate:.3g}" for e, rate in rates.items()),
        "memory": f"{held / 1e9:.2f} GB weights, gradients and optimiser, about {activations / 1e9:.2f} GB activations "
        "of one fp32 forward (estimated)",
    }
    if isinstance(step, Distilled):
        net = step.teacher.model
        size_of = f"{sum(p.numel() for p in net.parameters()):,} parameters, {weight_bytes(net) / 1e9:.2f} GB"
        rows["teacher"] = f"{step.teacher.source}, {size_of} more, whole on each process"
    if recipe.unfreeze_epochs is not None:
        rows["unfreezing"] = str(Unfreezing(step.model, recipe))
    return "\n".join(f"{k:14}{v}" for k, v in rows.items())


def images_in_words(recipe: Recipe, size: int | None = None) -> tuple[int, dict[str, str]]:
    """Updates per epoch, 1,000 where nobody knows without opening the data, and the rows about images and updates.

    ``size``: training images, where the data are open.
    """
    told = (recipe.max_train_samples, KNOWN_SIZES.get(recipe.dataset))
    known = [n for n in told if n is not None] if size is None else [size]
    if not known:
        why = f"unknown before {recipe.dataset!r} is opened; pass --max_train_samples to assume one"
        return 1000, {"images": why}
    opened, size = size is not None, min(known)
    per_epoch = updates_per_epoch(size, recipe)
    seen = per_epoch * recipe.batch_size
    last = f" ({seen:,} per epoch: the last update is {'filled' if seen > size else 'left out'})"
    images = f"{size:,}, {seen * recipe.epochs:,} in all{last if seen != size else ''}"
    if not opened:
        images += (
            f"; the data were not opened, this is {'--max_train_samples' if size == told[0] else 'the known number'}"
        )
    return per_epoch, {"images": images, "updates": f"{per_epoch:,} per epoch, {per_epoch * recipe.epochs:,} in all"}
