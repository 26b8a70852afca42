"""The table of checks, and the call that runs them all."""

from collections.abc import Callable, Collection
from functools import wraps

from .parts import Factory

Check = Callable[[Factory], None]

CHECKS: dict[str, Check] = {}


def check_mixer(factory: Factory, skip: Collection[str] = ()) -> None:
    """Run all checks but those in ``skip``, and raise one ``AssertionError`` with a line for each that failed.

    Raises ``ValueError`` if ``skip`` names a check that does not exist.
    """
    unknown = set(skip) - set(CHECKS)
    if unknown:
        raise ValueError(f"no check is called {sorted(unknown)}; valid names: {', '.join(CHECKS)}")
    failures = []
    for name, run in CHECKS.items():
        if name not in skip:
            try:
                run(factory)
            except AssertionError as error:
                failures.append(str(error))
    if failures:
        raise AssertionError("\n".join(failures))


def check(function: Check) -> Check:
    """Enter a function in ``CHECKS``; whatever it raises becomes an ``AssertionError`` that opens with its name."""
    name = function.__name__

    @wraps(function)
    def run(factory: Factory) -> None:
        try:
            function(factory)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{name}: expected no error; found {type(error).__name__}: {error}") from error

    CHECKS[name] = run
    return run
