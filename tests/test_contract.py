"""Every entry of MIXERS keeps every promise of the contract, but for the exceptions listed here with a reason."""

import pytest

from mixers import MIXERS
from mixers.testing import CHECKS

# An exception that no longer fails is an error, so that this table cannot outlive its reasons.
EXPECTED: dict[tuple[str, str], str] = {
    ("vanilla", "it_mixes"): "it is the baseline that does not mix",
    ("vanilla", "other_rng_other_plan"): "nothing is drawn, so there is one plan",
    ("resizemix", "identical_images_stay"): "the partner is shrunk before it is pasted",
}

CASES = [(mixer, check) for mixer in MIXERS for check in CHECKS]


@pytest.mark.parametrize(("mixer", "check"), CASES, ids=[f"{mixer}-{check}" for mixer, check in CASES])
def test_mixer_keeps_the_promise(mixer: str, check: str) -> None:
    reason = EXPECTED.get((mixer, check))
    if reason is None:
        CHECKS[check](MIXERS[mixer])
        return
    try:
        CHECKS[check](MIXERS[mixer])
    except AssertionError:
        return
    pytest.fail(f"{mixer} passes {check}: remove the exception {reason!r}")


def test_every_mixer_meets_every_check(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("keyword") or any("::" in argument for argument in request.config.args):
        pytest.skip("only a part of this file was asked for")
    here = [item for item in request.session.items if item.path == request.path]
    collected = [item for item in here if item.name.startswith("test_mixer_keeps_the_promise")]
    assert len(collected) == len(MIXERS) * len(CHECKS)
    assert len(MIXERS) >= 5
    assert len(CHECKS) == 22


def test_exceptions_name_real_mixers_and_checks() -> None:
    assert set(EXPECTED) <= set(CASES)
    assert all(EXPECTED.values())
