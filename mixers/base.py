"""The contract: a mixer is one training step.

A mixer has five verbs. A method overrides the smallest one that differs:

* ``plan`` decides: all randomness is here, and it returns plain, detached data;
* ``mix`` does: it is a pure function of the batch and the plan;
* ``forward`` performs the step up to the loss;
* ``setup`` builds what depends on the model, once, before the optimiser is made;
* ``after_step`` runs after each update of the optimiser.

Conventions that hold in every file of this package:

* shapes: B batch, C channels, H W pixels, K classes;
* ``x`` is a float image batch ``(B, C, H, W)`` on the device, already normalised;
* ``y`` is a dense float target ``(B, K)``: one-hot or soft, smoothed once by the loop;
* ``index[i]`` is the partner of sample ``i``;
* ``lam`` is always the share of the sample itself, and a mask is 1 where the sample itself stays;
* ``rng`` is ``numpy.random.default_rng((seed, step))``: nothing reads or moves a global generator.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops
from .laws import law_in

Plan = dict[str, Any]
Needs = Literal["batch", "model", "step"]
Criterion = Callable[[Tensor, Tensor], Tensor]


class Out(NamedTuple):
    """The result of a step. It is a NamedTuple, so that DDP and accelerate can walk through it."""

    loss: Tensor
    """Scalar, the sum of the named parts."""
    logits: Tensor
    """``(B, K)`` prediction for the mixed batch."""
    target: Tensor
    """``(B, K)`` what the logits were compared with."""
    logs: dict[str, Tensor]
    """The named parts of the loss, detached scalars: what is added is what is logged."""
    plan: Plan
    """The plan of this step; ``mixer.mix(x, y, **plan)`` rebuilds the mixed batch."""

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, plan: Plan, **parts: Tensor) -> "Out":
        """Sum the named ``parts``: each a scalar, or one loss per sample ``(B,)``, averaged here."""
        means = {name: part.mean() for name, part in parts.items()}
        loss = sum(means.values(), start=logits.new_zeros(()))
        return cls(loss, logits, target, {name: part.detach() for name, part in means.items()}, plan)


class Mixer(nn.Module):
    """The base of all mixers. ``__init__`` stores the hyperparameters under their own names and does nothing else."""

    pairs: bool = True
    """Whether a mixed sample ``i`` is made of ``i`` and ``index[i]``, or of ``i`` alone: what ``DecoupleMix`` needs."""

    one_label: bool = False
    """Whether the method takes each image for one of one class, so that it means nothing where images have several.

    A mixer without it gives, of any targets, the shares that ``mix`` gives of one-hot ones: ``y' = W y``, where the
    rows of W are at least 0 and sum to 1.
    """

    regression: bool = False
    """Whether the method goes by how far targets are apart, so that it means nothing where they are classes."""

    inside: bool = False
    """Whether it mixes features inside of the model, so that there is no mixed image that another model could see."""

    @property
    def law(self) -> str:
        """Its sampling law with a version, ``"cutmix@clova-2019"``, as its file names it; empty where it names none.

        A mixer whose law depends on its arguments overrides this.
        """
        text = getattr(sys.modules.get(type(self).__module__), "__doc__", "")  # a script may be forgotten (runpy)
        return law_in(text or "")

    def __init__(self) -> None:
        # Without this the signature of a mixer without hyperparameters is that of nn.Module: (*args, **kwargs).
        super().__init__()

    @property
    def needs(self) -> Needs:
        """What a loop has to hand over, so that an adapter can refuse in time. It is read off what the class defines.

        ``"batch"``: the step is ``mix(x, y, **plan(x, y, rng))``, then the model and the loss. Any loop will do.
        ``"model"``: the same, but ``plan`` names the model and the criterion that it looks at behind ``rng``. A
        ``plan`` that takes them out of ``*look`` says so in its class: ``needs = "model"``.
        ``"step"``: the mixer defines another verb, so the loop must run it through ``Step`` and ``after_step``.
        """
        verbs = ("setup", "forward", "after_step", "models", "param_groups")
        if any(getattr(type(self), verb) is not getattr(Mixer, verb) for verb in verbs):
            return "step"
        looks = list(inspect.signature(self.plan).parameters.values())[3:]  # behind x, y and rng
        return "model" if any(look.kind is not look.VAR_POSITIONAL for look in looks) else "batch"

    def setup(self, model: nn.Module) -> None:
        """Build what depends on the model: blocks, encoders, stage names.

        It is called once, before the optimiser is made. Raises ``ValueError`` if the model lacks what the method needs,
        and names models that have it.
        """

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """Decide this step. The keys of the result are exactly the keyword arguments of ``mix``.

        ``look`` is what the method wants to see. The default ``forward`` hands over ``model`` and ``criterion``. A
        method with a ``forward`` of its own may hand over a gradient or a map.
        """
        raise TypeError(f"{type(self).__name__} must define plan(x, y, rng, *look)")

    def mix(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        mask: Float[Tensor, "B 1 h w"],
        lam: Float[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Do what was planned: ``x' = mask*x + (1-mask)*x[index]``, ``y' = lam*y + (1-lam)*y[index]``.

        ``mask`` is ``(B, 1, H, W)`` or ``(B, 1, 1, 1)`` in [0, 1]. Without ``lam`` the label share is the mask's mean.
        The function is pure: new tensors come back, and ``x`` and ``y`` are never written to.
        """
        ops.check_batch(x, y)
        share = mask.mean((1, 2, 3)) if lam is None else lam
        return ops.blend(x, index, mask), ops.blend_targets(y, index, share)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One training step, up to the loss.

        ``criterion(logits, target)`` gives one loss per sample ``(B,)`` (or a scalar), so that a method
        can weight samples before anything is averaged.
        """
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng, model, criterion)
        mixed, target = self.mix(x, y, **plan)
        logits = model(mixed)
        return Out.of(logits, target, plan, mix=criterion(logits, target))

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Run after each optimiser update: momentum encoders, annealing. ``progress`` goes from 0 to 1."""

    def models(self, model: nn.Module) -> dict[str, nn.Module]:
        """The classifiers to evaluate and export, by name; ``""`` is the one that a run reports, here the model itself.

        Each is a plain timm model, whose state dict loads into ``timm.create_model`` without the mixer.
        """
        return {"": model}

    def compiled(self) -> list[nn.Module]:
        """Modules of its own, made by ``setup``, that are worth compiling; what ``models`` names is compiled anyway."""
        return []

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimiser groups of the mixer's own parameters. A method with settings of its own overrides this.

        ``lr`` and ``weight_decay`` are those of the recipe. A group may have ``lr``, the ``min_lr`` and
        ``warmup_epochs`` of its own cosine, ``weight_decay``, and what else the optimiser knows by group. What it
        leaves out is as for the model's parameters.
        """
        own = [p for p in self.parameters() if p.requires_grad]
        return [{"params": own}] if own else []

    def history_bytes(self, images: int, targets: int) -> int:
        """How much a step's batch, of so many bytes, adds to the state dict; 0 for all but methods with a history."""
        return 0

    def extra_repr(self) -> str:
        """``repr`` shows the constructor call: every argument is stored under its own name."""
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in names if not isinstance(getattr(self, n), nn.Module))


class Step(nn.Module):
    """Model, mixer and criterion as one module, which accelerate wraps, the optimiser sees and the checkpoint saves.

    The model inside stays a plain timm model. An export takes ``step.model`` and drops the rest.
    """

    def __init__(self, model: nn.Module, mixer: Mixer, criterion: Criterion):
        super().__init__()
        mixer.setup(model)
        self.model, self.mixer = model, mixer
        self.criterion = criterion

    def forward(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> Out:
        """One training step on a batch, see ``Mixer.forward``."""
        return self.mixer(self.model, self.criterion, x, y, rng)


def plan_alone(mixer: Mixer, x: Tensor, y: Tensor, rng: np.random.Generator) -> Plan | None:
    """Return the plan of a mixer that looks at nothing but the batch, or None if it asks for more.

    It may use up ``rng``.
    """
    if mixer.needs == "model":
        return None
    try:
        return mixer.plan(x, y, rng)
    except (TypeError, ValueError, IndexError):  # a look that is missing: a step may hand one over
        if mixer.needs == "batch":
            raise
        return None
