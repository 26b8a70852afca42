"""The contract as named checks: hold any mixer against it with ``check_mixer``.

``CHECKS`` maps the name of each check to a function. The function takes a factory, which is a callable without
arguments that returns a new mixer. It raises ``AssertionError``, which says what was expected and what was found. No
test runner is needed::

    from mixers.testing import check_mixer

    check_mixer(lambda: MyMixer(alpha=0.5))

Every check runs the mixer through ``Step`` on a tiny model, on the CPU, in a fraction of a second. A plan is taken from
``Out.plan``, so a mixer may hand what it likes to its own ``plan``.
"""

from . import construction, mixing, step  # each enters its checks, in this order
from .contract import CHECKS, Check, check, check_mixer
from .parts import (
    CLASSES,
    Factory,
    Recorder,
    batch,
    differences,
    equal,
    expect,
    expect_global_rngs,
    footprint,
    gap,
    global_rngs,
    leaves,
    rng_of,
    tiny_step,
    train,
    updates,
)

__all__ = [
    "CHECKS",
    "CLASSES",
    "Check",
    "Factory",
    "Recorder",
    "batch",
    "check",
    "check_mixer",
    "construction",
    "differences",
    "equal",
    "expect",
    "expect_global_rngs",
    "footprint",
    "gap",
    "global_rngs",
    "leaves",
    "mixing",
    "rng_of",
    "step",
    "tiny_step",
    "train",
    "updates",
]
