"""How numbers are said in messages and on pages."""

import statistics
from collections.abc import Sequence


def many(number: int, noun: str, plural: str = "") -> str:
    """``1 image``, ``1,234 images``, ``2 classes``. ``plural``: of other words, as ``row is`` and ``rows are``."""
    return f"{number:,} {noun if number == 1 else plural or noun + ('es' if noun.endswith('s') else 's')}"


def with_spread(mean: float, std: float | None, digits: int = 2) -> str:
    """A mean and its standard deviation, ``59.61 ± 0.42``; the mean alone where there is no deviation (None)."""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation (n - 1) of at least one number; one number alone has no deviation."""
    return with_spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, digits)
