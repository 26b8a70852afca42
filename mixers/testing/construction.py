"""Checks of the constructor and of the plan."""

import inspect
import random
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..base import Needs
from .contract import check
from .parts import (
    Factory,
    batch,
    differences,
    equal,
    expect,
    expect_global_rngs,
    global_rngs,
    leaves,
    rng_of,
    tiny_step,
    updates,
)


@check
def constructor_stores_arguments(factory: Factory) -> None:
    """Each argument is an attribute of its own name, as given; nothing is drawn and nothing heavy is made."""
    before = global_rngs()
    mixer = factory()
    expect_global_rngs(before, "construction")
    names = inspect.signature(type(mixer)).parameters
    missing = [name for name in names if not hasattr(mixer, name)]
    expect(not missing, "every argument of the constructor stored under its own name", f"no attribute {missing}")
    stored = {name: getattr(mixer, name) for name in names}
    lists = {name: list(value) for name, value in stored.items() if isinstance(value, nn.ModuleList)}
    again = type(mixer)(**(stored | lists))
    for name, value in stored.items():
        rebuilt = getattr(again, name)
        as_given = repr(value) == repr(rebuilt) if isinstance(value, nn.Module) else equal(value, rebuilt)
        expect(as_given, f"{name}={value!r} stored as it was given", f"{rebuilt!r} after building again from it")
    heavy = [key for key in mixer.state_dict() if key.split(".")[0] not in names]
    expect(not heavy, "no parameter or buffer before setup(model)", heavy)


@check
def plan_is_plain_detached_data(factory: Factory) -> None:
    """A plan holds tensors without a graph, numbers, strings, None, and dicts, lists and tuples of them."""
    plan = tiny_step(factory)(*batch(), rng_of(0)).plan
    expect(type(plan) is dict, "a dict as the plan", type(plan).__name__)
    for path, value in leaves(plan):
        plain = value is None or isinstance(value, (Tensor, bool, int, float, str))
        expect(plain, f"a tensor, number, string or None at plan{path}", type(value).__name__)
        expect(not getattr(value, "requires_grad", False), f"plan{path} detached", "a tensor with a gradient graph")


@check
def plan_keys_are_mix_keywords(factory: Factory) -> None:
    """``mix(x, y, **plan)`` is a legal call."""
    step, (x, y) = tiny_step(factory), batch()
    signature = inspect.signature(step.mixer.mix)
    for out in updates(step, x, y, 3):
        try:
            signature.bind(x, y, **out.plan)
            step.mixer.mix(x, y, **out.plan)
        except TypeError as error:
            raise AssertionError(f"expected the keywords of mix{signature}; found {list(out.plan)}: {error}") from error


@check
def needs_is_true(factory: Factory) -> None:
    """A mixer that says it needs only the batch, or the batch and the model, plans its step from these alone."""
    step, (x, y) = tiny_step(factory), batch()
    needs = step.mixer.needs
    expect(needs in get_args(Needs), f"needs to be one of {get_args(Needs)}", repr(needs))
    look = {"batch": (), "model": (step.model, step.criterion), "step": None}[needs]
    if look is None:
        return
    for index in range(3):
        try:
            plan = factory().plan(x, y, rng_of(index), *look)
        except Exception as error:
            raise AssertionError(f"expected a plan without more than needs={needs!r}; found {error!r}") from error
        found = differences(step(x, y, rng_of(index)).plan, plan)
        expect(not found, f"the plan of the step from what needs={needs!r} hands over", f"another one at {found}")


@check
def same_rng_same_plan(factory: Factory) -> None:
    """All randomness comes from ``rng``: two new mixers with equal generators plan the same, bit for bit."""
    for index in range(3):
        first, second = (tiny_step(factory)(*batch(), rng_of(index)).plan for _ in range(2))
        found = differences(first, second)
        expect(not found, "equal plans from equal generators", f"differences at {found}")


@check
def other_rng_other_plan(factory: Factory) -> None:
    """The generator is used: new mixers with five different generators do not all plan the same."""
    plans = [tiny_step(factory)(*batch(), rng_of(index)).plan for index in range(5)]
    varies = any(differences(plans[0], plan) for plan in plans)
    expect(varies, "different plans from different generators", "five equal plans")


@check
def global_rng_untouched(factory: Factory) -> None:
    """Neither the step nor ``mix`` reads or moves a global generator."""
    step, (x, y) = tiny_step(factory), batch()
    # From a state that no seed leads to: a mixer that seeds a generator may have done so before.
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        draw()
    before = global_rngs()
    plan = step(x, y, rng_of(0)).plan
    expect_global_rngs(before, "a step")
    step.mixer.mix(x, y, **plan)
    expect_global_rngs(before, "mix")
