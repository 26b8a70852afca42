"""One update of the training loop: what a step is given, and what becomes of it.

``prepared`` turns loaded images into batches on the device; ``train_update`` takes those of one update through the
step, backward, the optimiser, and what follows it. Everything random is a function of (seed, update, micro).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mixers import Out, Step, Switch, Vanilla, build
from mixup_recipes.data import images, keys
from mixup_recipes.data.loading import Loaded
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.splits import Splits
from mixup_recipes.mixer_args import check_labels, fill_counts
from mixup_recipes.recipe import Recipe
from mixup_recipes.training import losses, optimisation, sharding
from mixup_recipes.training.distillation import Distilled, Teacher
from mixup_recipes.training.unfreezing import Unfreezing


class Batch(NamedTuple):
    """A micro-batch on the device, ready for a step."""

    x: Tensor
    """Images, normalised and erased, float (B, 3, S, S)."""
    y: Tensor
    """Targets, one-hot and smoothed, or multi-hot, float (B, K)."""
    rng: np.random.Generator
    """The mixer's generator, the same for every micro-batch of an update."""
    bad: Tensor
    """How many unreadable images were passed over for each, (B,), on the host."""


def prepared(loaded: Iterator[Loaded], order: TrainOrder, device: torch.device) -> Iterator[Batch]:
    """The rest of a run's micro-batches of this process, each made ready when it is asked for, and not before.

    ``loaded``: what ``train_batches`` of a table or a stream gives for the same ``order``.
    """
    for update in range(order.start, order.updates):
        for micro in range(order.rank, order.micro_batches, order.world):
            pixels, labels, _, bad = next(loaded)
            yield Batch(*inputs(pixels, labels, order.recipe, update, micro, device), bad)


def load_teacher(recipe: Recipe) -> Teacher | None:
    """The trained model that the recipe learns from, if any. Raises ``UserError``."""
    return Teacher(recipe) if recipe.distill_from is not None else None


def new_step(model: nn.Module, recipe: Recipe, teacher: Teacher | None = None) -> Step:
    """The recipe's mixer on a model, with its teacher. Raises ``ValueError`` where they do not fit.

    Without ``teacher`` the step mixes the same, and learns by labels alone.
    """
    mixer = build(recipe.mixer, **recipe.mixer_args[recipe.mixer])
    check_labels(recipe, mixer)  # of another package's mixer a name and arguments do not tell it
    if recipe.mix_prob < 1:
        mixer = Switch([mixer, Vanilla()], [recipe.mix_prob, 1 - recipe.mix_prob])
    return Distilled(model, mixer, criterion(recipe), teacher) if teacher else Step(model, mixer, criterion(recipe))


def meet_data(step: Step, recipe: Recipe, splits: Splits, device: torch.device, say: Callable[[str], Any]) -> None:
    """Tell a step of the data, once they are open.

    That is the class counts, the class weights, and which of the teacher's classes each one is. What to
    know of it is said. Raises ``UserError`` when a teacher does not know the classes, or a mixer other ones.
    """
    fill_counts(step.mixer, splits.per_class)
    step.criterion = criterion(recipe, class_weights(recipe, splits.per_class, device))
    if isinstance(step, Distilled) and (note := step.teacher.meet(splits.classes, device)):
        say(note)


def inputs(
    pixels: Tensor, labels: Tensor, recipe: Recipe, update: int, micro: int, device: torch.device
) -> tuple[Tensor, Tensor, np.random.Generator]:
    """``x``, ``y`` and ``rng`` of a ``Batch``, from images uint8 (B, 3, S, S) and labels (B,), or (B, K) multi-hot.

    ``micro``: position of the micro-batch within its update, over all processes. Seeds the global generators too,
    from which dropout and drop path draw.
    """
    x = images.normalise(pixels, recipe, device)
    if recipe.reprob:
        rng = keys.rng(keys.ERASE, recipe.seed, update, micro)
        x = images.erase(x, recipe.reprob, recipe.remode, rng, recipe.pixels)
    y = one_hot(labels.to(device, non_blocking=True), recipe)
    keys.seed_everything(keys.STEP, recipe.seed, update, micro)
    return x, y, np.random.default_rng((recipe.seed, update))


def one_hot(labels: Tensor, recipe: Recipe) -> Tensor:
    """Labels (B,) to dense float targets (B, K), smoothed: ``(1-s)*onehot + s/K``. Multi-hot ones (B, K) stay."""
    if labels.ndim == 2:
        return labels
    y = F.one_hot(labels, recipe.num_classes).float()
    return y if not recipe.smoothing else y * (1 - recipe.smoothing) + recipe.smoothing / recipe.num_classes


def class_weights(recipe: Recipe, images: Sequence[int], device: torch.device) -> Tensor | None:
    """The weights (K,) of the classes in the loss, for so many images of each; None where all weigh the same.

    ``N / (K n)`` of N images, of which n are of the class, and K classes that have some: 1 in the mean over the images.
    A class without images weighs 0.
    """
    if recipe.class_weights == "none":
        return None
    counts = torch.tensor(images, dtype=torch.float64)
    weights = counts.sum() / (counts.gt(0).sum() * counts)
    return weights.where(counts > 0, 0.0).float().to(device)


def criterion(recipe: Recipe, weights: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """``loss(logits (B, K), target (B, K)) -> (B,)``: one loss per sample, so that mixers can weight samples.

    ``weights`` (K,): of what a target says for each class; what losses of yes and no say against it keeps its weight.
    """

    def given(**values: float | None) -> dict[str, float]:
        return {name: value for name, value in values.items() if value is not None}

    of_focal = given(gamma=recipe.focal_gamma)
    of_asymmetric = given(gamma_neg=recipe.asl_gamma_neg, gamma_pos=recipe.asl_gamma_pos, clip=recipe.asl_clip)

    def binarised(target: Tensor) -> Tensor:
        above = recipe.bce_target_thresh
        return target if above is None else (target > above).to(target.dtype)

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target, weights, reduction="none")

    def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        target = binarised(target)
        loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none", pos_weight=weights)
        return loss.sum(1) if recipe.loss == "bce_sum" else loss.mean(1)

    def focal(logits: Tensor, target: Tensor) -> Tensor:
        return losses.focal(logits.float(), target, weights, **of_focal)

    def asymmetric(logits: Tensor, target: Tensor) -> Tensor:
        return losses.asymmetric(logits.float(), binarised(target), weights, **of_asymmetric)

    named = {"ce": cross_entropy, "focal": focal, "asymmetric": asymmetric}
    return named.get(recipe.loss, binary_cross_entropy)


@dataclass(frozen=True)
class Learner:
    """All that an update changes."""

    step: Step
    """Model and mixer."""
    wrapped: nn.Module
    """The step as the processes share it: what is called."""
    optimizer: Any
    """accelerate's, with the learning rates of the update already set."""
    ema: ModelEmaV3 | None
    """The average of the model's weights, where the recipe asks for one."""
    unfreezing: Unfreezing | None = None
    """What thaws when, where the recipe has a model thaw."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint saves, by name."""
        return {"model": self.step} | ({"ema": self.ema.module} if self.ema else {})

    @property
    def classifiers(self) -> dict[str, nn.Module]:
        """What is evaluated and exported, by name; ``""`` is the model itself or what the mixer puts in its place."""
        return self.step.mixer.models(self.step.model) | ({"ema": self.ema.module} if self.ema else {})

    def whole_classifiers(self, recipe: Recipe, keep: bool) -> dict[str, nn.Module]:
        """The classifiers, each whole also where it is sharded; every process calls it. See ``whole_models``."""
        return sharding.whole_models(self.classifiers, recipe, keep)


def new_learner(step: Step, recipe: Recipe, accelerator: Any, shard: bool) -> Learner:
    """A step with its average and its optimiser, as the processes share it: copies of it, or pieces with ``shard``."""
    ema = ModelEmaV3(step.model, decay=recipe.ema_decay) if recipe.ema_decay is not None else None
    if shard:
        sharding.shard(step, ema, accelerator.device, accelerator.num_processes)
    optimizer = accelerator.prepare_optimizer(optimisation.optimizer(step, recipe))
    wrapped = accelerator.prepare_model(step, evaluation_mode=shard)  # its other mode makes copies
    thaws = recipe.unfreeze_epochs is not None
    return Learner(step, wrapped, optimizer, ema, Unfreezing(step.model, recipe) if thaws else None)


def train_update(
    learner: Learner,
    batches: Iterator[Batch],
    order: TrainOrder,
    update: int,
    sums: dict[str, Tensor],
    accelerator: Any,
) -> tuple[Batch, Out]:
    """Update number ``update``, from 0, on the next micro-batches of this process.

    Adds to ``sums``, for the log, without waiting for the device: steps, images, bad images, the loss and its parts.
    Returns the first micro-batch and what the step said of it.
    """
    step, recipe = learner.step, order.recipe
    step.train()
    if learner.unfreezing:
        learner.unfreezing.begin(update, order.updates_per_epoch)
    done: list[tuple[Batch, Out]] = []
    for number, batch in enumerate(itertools.islice(batches, order.accumulation), start=1):
        with contextlib.nullcontext() if number == order.accumulation else accelerator.no_sync(learner.wrapped):
            out = learner.wrapped(batch.x, batch.y, batch.rng)
            accelerator.backward(out.loss / order.accumulation)
        counts = {"steps": 1, "images": len(batch.x), "bad": int(batch.bad.gt(0).sum())}
        for name, value in (counts | {"loss": out.loss.detach(), **out.logs}).items():
            sums[name] = sums[name] + value if name in sums else torch.zeros((), device=accelerator.device) + value
        done = done or [(batch, out)]
    if recipe.clip_grad is not None:
        accelerator.clip_grad_norm_(step.parameters(), recipe.clip_grad)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    step.mixer.after_step(step.model, (update + 1) / order.updates)
    if learner.ema:
        learner.ema.decay = ema_decay(recipe, update + 1, order.updates_per_epoch)
        learner.ema.update(step.model)
    return done[0]


def ema_decay(recipe: Recipe, update: int, updates_per_epoch: int) -> float:
    """The decay of the averaged weights after ``update`` updates: it warms up linearly from 0.9 times its value."""
    assert recipe.ema_decay is not None
    warmup = recipe.ema_warmup_epochs * updates_per_epoch
    return recipe.ema_decay * (0.9 + 0.1 * min(1.0, update / warmup) if warmup else 1.0)
