"""Which cases of a test run each time, and which by `make slow` alone."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(kept: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """The cases in their order, those that are not kept with the mark ``slow``. A case of several values is a tuple."""

    def marked(case: Any) -> Any:
        return pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] * (not kept(case))
        )

    return [marked(case) for case in cases]
