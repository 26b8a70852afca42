"""One mixer for any loop: a function, timm's loop, torchvision's transforms, a DataLoader, the Trainer, Lightning.

Each adapter gives a mixer ``numpy.random.default_rng((seed, step))``, where ``step`` is the index of the optimiser
update. With equal seeds and steps all adapters plan the same, on every process. A run that goes on at a step goes on
with the plans that it would have had. Labels are integers ``(B,)`` or dense targets ``(B, K)``. They are smoothed once,
before mixing. Only torch is imported. The two mix-ins are written against transformers' ``Trainer`` and Lightning's
``LightningModule`` and get them from the class that the user derives.

============================  =====================================  ==================================
adapter                       where ``step`` comes from              mixers (see ``Mixer.needs``)
============================  =====================================  ==================================
``mix_batch``                 the caller                             batch; model with ``model=``
``BatchMixer``                its own counter, ``.step``             batch
``MixCollate``                ``start(step)`` and the loader's turn  batch
``TrainerMixin``              ``Trainer.state.global_step``          batch, model
``LightningMixin``            ``Trainer.global_step``                all
============================  =====================================  ==================================
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate, get_worker_info

from . import ops
from .base import Criterion, Mixer, Needs, Plan, Step
from .registry import MIXERS


class Mixed(NamedTuple):
    """The result of ``mix_batch``."""

    x: Tensor
    """``(B, C, H, W)`` mixed images."""
    y: Tensor
    """``(B, K)`` mixed targets."""
    plan: Plan
    """What was decided: ``mixer.mix(x, y, **plan)`` does it again."""


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy with targets ``(B, K)`` or labels ``(B,)``, one loss per sample ``(B,)``.

    All adapters use it. It is computed in float32, or in float64 if the logits are float64.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    target = target.to(wide) if target.is_floating_point() else target
    return F.cross_entropy(logits.to(wide), target, reduction="none")


def dense_targets(labels: Tensor, num_classes: int | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Turn integer labels ``(B,)`` or float targets ``(B, K)`` into float targets ``(B, K)``: ``(1-s)*y + s/K``.

    Raises ``ValueError`` if the shape, ``num_classes`` or ``label_smoothing`` (0 to 1) does not fit.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
    if labels.ndim == 1 and not labels.is_floating_point():
        if num_classes is None:
            raise ValueError("integer labels need num_classes")
        y = F.one_hot(labels.long(), num_classes).float()
    elif labels.ndim == 2 and labels.is_floating_point():
        y = labels
    else:
        raise ValueError(
            f"labels must be integers (B,) or float targets (B, K), got {labels.dtype} {tuple(labels.shape)}"
        )
    if num_classes is not None and y.shape[1] != num_classes:
        raise ValueError(f"targets must have num_classes = {num_classes} columns, got {tuple(y.shape)}")
    return y * (1 - label_smoothing) + label_smoothing / y.shape[1] if label_smoothing else y


def mix_batch(
    mixer: Mixer,
    x: Tensor,
    labels: Tensor,
    *,
    seed: int,
    step: int,
    num_classes: int | None = None,
    label_smoothing: float = 0.0,
    model: nn.Module | None = None,
    criterion: Criterion = cross_entropy,
) -> Mixed:
    """Mix one batch of images ``(B, C, H, W)``, float and normalised, with labels as ``dense_targets`` takes them.

    ``model`` and ``criterion`` are for mixers that look at the model when they plan. The caller runs the forward pass.
    Raises ``ValueError`` for a mixer that is more than a mixed batch, and ``TypeError`` for integer images.
    """
    require(mixer, "mix_batch", *(("batch",) if model is None else ("batch", "model")))
    y = dense_targets(labels, num_classes, label_smoothing)
    ops.check_batch(x, y)
    look = (model, criterion) if mixer.needs == "model" else ()
    plan = mixer.plan(x, y, np.random.default_rng((seed, step)), *look)
    return Mixed(*mixer.mix(x, y, **plan), plan)


class BatchMixer:
    """Turn ``(images, labels)`` into ``(mixed images, dense targets)``, in the place of timm's ``Mixup`` or
    ``v2.MixUp``.

    ``num_classes`` and ``label_smoothing`` are those of timm's ``Mixup`` (whose smoothing is 0.1 unless given).
    ``mixup_enabled = False``, which timm's loop sets, gives images as they are and unmixed targets. ``step`` counts the
    calls. A loop that accumulates gradients sets it to the index of the update before each call. Nothing is written to,
    and any batch size works.
    """

    def __init__(self, mixer: Mixer, num_classes: int | None = None, label_smoothing: float = 0.0, seed: int = 0):
        require(mixer, "BatchMixer", "batch")
        self.mixer, self.num_classes, self.label_smoothing, self.seed = mixer, num_classes, label_smoothing, seed
        self.mixup_enabled = True
        self.step = 0

    def __call__(self, *batch: Any) -> tuple[Tensor, Tensor]:
        """Two arguments, or one pair."""
        pair = batch if len(batch) == 2 else batch[0]
        if not isinstance(pair, tuple | list) or [isinstance(part, Tensor) for part in pair] != [True, True]:
            raise TypeError(f"expected a batch of two tensors, images and labels, got {type(pair).__name__}")
        x, labels = pair
        y = dense_targets(labels, self.num_classes, self.label_smoothing)
        mixed = x
        if self.mixup_enabled:
            mixed, y, _ = mix_batch(self.mixer, x, y, seed=self.seed, step=self.step)
        self.step += 1  # a call that failed is none
        if not self.mixup_enabled:
            return x, y
        if type(x).__module__.startswith("torchvision"):  # its images are a kind of tensor, and stay one
            mixed = mixed.as_subclass(type(x))
        return mixed, y

    def state_dict(self) -> dict[str, int]:
        """What resuming needs, e.g. through accelerate's ``register_for_checkpointing``."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the step of ``state``."""
        self.step = state["step"]

    def __repr__(self) -> str:
        names = ("mixer", "num_classes", "label_smoothing", "seed")
        return f"BatchMixer({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class MixCollate:
    """A ``collate_fn`` for a DataLoader that mixes in the worker: ``collate(samples)`` goes through a ``BatchMixer``.

    A worker knows its number. A loader with ``in_order=True`` (the default) and a map-style dataset hands out batches
    in turn, so the worker also knows that its n-th batch of an epoch is number ``n*num_workers + id``. No worker knows
    the epoch, so call ``start(epoch * len(loader))`` before each epoch. A loader with fresh workers that is started
    again without this call raises ``RuntimeError``. With the call, a batch has the same plan with any number of
    workers. Persistent workers collate ahead, so every epoch must be read to its end. On a GPU, mixing after the
    transfer is faster: use the ``BatchMixer`` there.
    """

    def __init__(self, mixer: BatchMixer, collate: Callable[[list[Any]], Any] = default_collate):
        self.mixer, self.collate = mixer, collate
        self.seen, self.calls = -1, 0  # of this worker: which start, and batches since
        # Step of the epoch's first batch, number of starts, mixup_enabled, and the loader's seed of the epoch's
        # workers (0: not known yet). Shared, so that workers that live on see what the main process sets.
        self.shared = torch.tensor([mixer.step, 0, mixer.mixup_enabled, 0]).share_memory_()

    def start(self, step: int) -> None:
        """Say which step the first batch of the next epoch belongs to."""
        self.mixer.step = step
        self.shared.copy_(torch.tensor([step, self.shared[1] + 1, self.mixer.mixup_enabled, 0]))

    def __call__(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        worker = get_worker_info()
        if worker is not None:
            first, starts, enabled, seed = self.shared.tolist()
            if seed not in (0, worker.seed - worker.id):  # drawn anew whenever a loader makes workers
                raise RuntimeError("a new epoch has begun: call start(epoch * len(loader)) before each epoch")
            self.shared[3] = worker.seed - worker.id
            self.calls = self.calls + 1 if self.seen == starts else 0
            self.seen = starts
            self.mixer.step = first + self.calls * worker.num_workers + worker.id
            self.mixer.mixup_enabled = bool(enabled)
        return self.mixer(self.collate(samples))


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """A ``compute_loss_func`` for transformers' ``Trainer``: cross-entropy with labels ``(B,)`` or ``(B, K)``.

    Without it, models of transformers treat float labels as multi-label ones. They take the binary cross-entropy and
    write ``problem_type`` into the saved config. ``num_items_in_batch`` is what the ``Trainer`` counts in all
    micro-batches of an update. It counts numbers, not images, and dense targets have K numbers per image.
    """
    losses = cross_entropy(outputs["logits"], labels)
    return losses.mean() if num_items_in_batch is None else losses.sum() * labels[0].numel() / num_items_in_batch


class TrainerMixin:
    """Mixing for transformers' ``Trainer``: ``class MixTrainer(TrainerMixin, Trainer)`` takes ``mixer=`` as well.

    The batch is mixed in ``compute_loss``, on the device and in training only, because a ``Trainer`` has one collator
    for training and evaluation. Batches hold ``pixel_values`` and ``labels``, as the default collator gives them. The
    seed is ``args.seed``. The smoothing is ``args.label_smoothing_factor`` (training only). The number of classes is
    ``model.config.num_labels``. The loss is ``soft_cross_entropy``, or the ``compute_loss_func`` that was given. It is
    a mean over the batch, of dense targets in training and of the dataset's labels in evaluation.
    """

    def __init__(self: Any, *args: Any, mixer: Mixer, **kwargs: Any):
        require(mixer, "transformers' Trainer", "batch", "model")
        super().__init__(*args, **kwargs)
        self.mixer = mixer
        self.compute_loss_func = self.compute_loss_func or soft_cross_entropy

    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the ``Trainer``'s, on the mixed batch: a mean over all images of an update, however it is cut up."""
        if model.training:
            net = self.accelerator.unwrap_model(model)
            mixed = mix_batch(
                self.mixer,
                inputs["pixel_values"],
                inputs["labels"],
                seed=self.args.seed,
                step=self.state.global_step,
                num_classes=net.config.num_labels,
                label_smoothing=self.args.label_smoothing_factor,
                model=getattr(net, "timm_model", None) or Logits(net),  # the plain timm model, where there is one
            )
            if num_items_in_batch is not None:  # counted on the labels as they came
                num_items_in_batch = num_items_in_batch * mixed.y[0].numel() / inputs["labels"][0].numel()
            inputs = {**inputs, "pixel_values": mixed.x, "labels": mixed.y}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]


class Logits(nn.Module):
    """A model of transformers in the form that mixers know: images in, logits out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


class LightningMixin:
    """A training step for Lightning: ``class Lit(LightningMixin, LightningModule)`` with ``configure_optimizers``.

    The module ``self.step`` is a ``Step`` of model, mixer and criterion. So every mixer works, and what the mixer owns
    is trained and saved. ``self(x)`` is the model. Batches are ``(images, labels)``. It logs ``train_loss`` and its
    parts.
    """

    def __init__(
        self,
        model: nn.Module,
        mixer: Mixer,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        criterion: Criterion = cross_entropy,
        seed: int = 0,
    ):
        super().__init__()
        self.step = Step(model, mixer, criterion)
        self.num_classes, self.label_smoothing, self.seed = num_classes, label_smoothing, seed

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the model."""
        return self.step.model(x)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        """One step of the mixer; micro-batches of one update have one generator."""
        x, labels = batch
        y = dense_targets(labels, self.num_classes, self.label_smoothing)
        out = self.step(x, y, np.random.default_rng((self.seed, self.trainer.global_step)))
        self.log_dict({"train_loss": out.loss.detach()} | {f"train_{name}": part for name, part in out.logs.items()})
        return out.loss

    def optimizer_step(self: Any, *args: Any, **kwargs: Any) -> None:
        """The update, then the mixer's ``after_step``."""
        super().optimizer_step(*args, **kwargs)  # type: ignore[misc]
        done = self.trainer.global_step + 1  # counted when this hook is through
        self.step.mixer.after_step(self.step.model, min(1.0, done / self.trainer.estimated_stepping_batches))


def require(mixer: Mixer, where: str, *works: Needs) -> None:
    """Raise ``ValueError`` unless ``mixer.needs`` is among ``works``, naming the mixers and the adapters that work."""
    if mixer.needs in works:
        return
    what, adapters = {
        "model": ("looks at the model", "mix_batch with model=, TrainerMixin, LightningMixin"),
        "step": ("performs the training step itself", "LightningMixin"),
    }[mixer.needs]
    name, here = type(mixer).__name__, []
    for known in MIXERS.rows:
        with contextlib.suppress(TypeError, ValueError):  # one that needs arguments, weights or a module not there
            here += [known] if MIXERS[known]().needs in works else []
    raise ValueError(
        f"{name} {what}, which {where} cannot let it do. Here work: {', '.join(here)}. For {name} use {adapters} or "
        "Step in a loop of your own"
    )
