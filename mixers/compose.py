"""Mixers made of mixers. Options are composition: no mixer has a ``prob=`` or ``mode=`` flag."""

from typing import Any

import numpy as np
from torch import Tensor, nn

from . import ops
from .base import Criterion, Mixer, Needs, Out, Plan


class Switch(Mixer):
    """Draw one of several mixers per step with ``rng``: the same one on every rank and micro-batch of an update.

    ``mixers`` lists the members. ``probs`` lists their probabilities. If it is None, they are uniform. The drawn member
    performs the whole step, so any mixer can be a member.
    """

    def __init__(self, mixers: list[Mixer], probs: list[float] | None = None):
        super().__init__()
        if not mixers:
            raise ValueError("Switch needs at least one mixer, got none")
        if probs is not None and not (
            isinstance(probs, list | tuple)
            and len(probs) == len(mixers)
            and all(isinstance(p, int | float) and 0 <= p <= 1 for p in probs)
            and abs(sum(probs) - 1) <= 1e-6
        ):
            raise ValueError(f"probs must be {len(mixers)} probabilities that sum to 1, got {probs}")
        self.mixers = nn.ModuleList(mixers)
        self.probs = probs

    def draw(self, rng: np.random.Generator) -> int:
        """The position of the member that performs this step."""
        return int(rng.choice(len(self.mixers), p=self.probs))

    @property
    def needs(self) -> Needs:
        """The most that a member needs."""
        found = {mixer.needs for mixer in self.members()}
        return "step" if "step" in found else "model" if "model" in found else "batch"

    def setup(self, model: nn.Module) -> None:
        """Raises ``ValueError`` when two members bring classifiers of one name, of which only one could be kept."""
        taken: set[str] = set()
        for mixer in self.members():
            mixer.setup(model)
            own = mixer.models(model).keys() - {""}
            if both := sorted(own & taken):
                raise ValueError(f"two members bring a classifier {both[0]!r}; use one of them in a switch")
            taken |= own

    def plan(self, x: Tensor, y: Tensor, rng: np.random.Generator, *look: object) -> Plan:
        """``choice``, and the plan of the chosen member."""
        choice = self.draw(rng)
        return planned(choice, self.members()[choice].plan(x, y, rng, *look))

    def mix(  # type: ignore[override]
        self, x: Tensor, y: Tensor, *, choice: int, inner: Plan | None = None, **plan: Any
    ) -> tuple[Tensor, Tensor]:
        return self.members()[choice].mix(x, y, **(plan if inner is None else inner))

    def forward(self, model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, rng: np.random.Generator) -> Out:
        """The chosen member's own step; its plan gains ``choice``."""
        choice = self.draw(rng)
        out = self.members()[choice](model, criterion, x, y, rng)
        idle = (p for i, mixer in enumerate(self.members()) if i != choice for p in mixer.parameters())
        return out._replace(loss=out.loss + ops.touch(idle), plan=planned(choice, out.plan))

    def after_step(self, model: nn.Module, progress: float) -> None:
        for mixer in self.members():
            mixer.after_step(model, progress)

    def models(self, model: nn.Module) -> dict[str, nn.Module]:
        """The classifiers of all members; ``""`` is the model, or what a member reports in its place."""
        nets = {"": model}
        for mixer in self.members():
            nets |= {name: net for name, net in mixer.models(model).items() if name or net is not model}
        return nets

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The groups of all members, each with its own settings."""
        return [group for mixer in self.members() for group in mixer.param_groups(lr, weight_decay)]

    def members(self) -> list[Mixer]:
        """The mixers, typed."""
        return list(self.mixers)  # type: ignore[arg-type]


def planned(choice: int, plan: Plan) -> Plan:
    """The plan of the chosen member with the choice; that of a ``Switch`` keeps its own choice, as ``inner``."""
    return {"choice": choice, "inner": plan} if "choice" in plan else {"choice": choice, **plan}


def inmost(plan: Plan) -> Plan:
    """The plan of the member that was drawn in the end, in a switch of switches; it has ``choice`` in any switch.

    Where that member mixes nothing, there is no other key.
    """
    while "inner" in plan:
        plan = plan["inner"]
    return plan


def check_base(base: object, example: str = "CutMix()") -> None:
    """Raise ValueError unless a method that performs the step itself can have its images mixed by ``base``."""
    if not isinstance(base, Mixer) or base.needs == "step":
        raise ValueError(f"base must be a mixer that only mixes images, such as {example}, got {base!r}")
