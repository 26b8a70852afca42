"""How numbers are said in messages and on pages."""


def many(number: int, noun: str, plural: str = "") -> str:
    """``1 image``, ``1,234 images``, ``2 classes``. ``plural``: of other words, as ``row is`` and ``rows are``."""
    return f"{number:,} {noun if number == 1 else plural or noun + ('es' if noun.endswith('s') else 's')}"
