"""``robustness.json``: what ``evaluate --suite robustness`` writes, read back and checked.

``format``, ``model`` (what its run or it is called), ``weights_sha256`` (of a run), ``data`` (``dataset``, ``split``,
``images``, ``labels_sha256``, ``fingerprint``), ``transform``, ``seed``, ``device``, ``mixed_precision``, ``packages``,
``commit``, ``picture_sha256`` (of the sheet of examples), ``budgets`` (part -> what it was measured with), ``clean``,
and a table for each part that was measured, see ``robustness.parts``; ``ood`` has the ``data`` of the second set too.
Parts may be of several calls, on the same images, weights, device and precision; ``packages`` and ``commit`` are those
of the last.
"""

from pathlib import Path
from typing import Any

from mixup_recipes.runs.shapes import COUNT, NUMBER, OBJECT, PERCENT, TEXT, UPDATE, check, read_object
from mixup_recipes.training.format import check_format
from mixup_recipes.typed import UserError

Keys = tuple[str, ...]
NAME = "robustness.json"
PICTURE = "robustness.png"
PARTS = ("attacks", "corruptions", "occlusion", "calibration", "ood")
CLEAN = {"top1": PERCENT, "top5": PERCENT, "ece": PERCENT, "nll": NUMBER, "count": COUNT}
DATA = {"dataset": TEXT, "split": TEXT, "images": COUNT, "labels_sha256": TEXT}
SHAPE = {"data": DATA, "seed": UPDATE, "budgets": OBJECT, "clean": CLEAN}


def read(path: Path) -> dict[str, Any]:
    """The content of a file of results. Raises ``UserError`` where it is missing, damaged or of a newer version."""
    try:
        content = read_object(path)
        check_format(content, str(path))
        check(content, {"model": TEXT}, str(path))
        validate(content, str(path))
    except UserError as e:
        raise UserError(f"{e}; remove the file, or measure again with evaluate RUN --suite robustness") from None
    return content


def validate(content: Any, where: str, key: str = "") -> None:
    """Raise ``UserError`` unless a table holds what the suite found of one model. ``key``: its place in the file."""
    check(content, SHAPE, where, key)
    for part in PARTS:
        if part in content:
            check(content[part], OBJECT, where, f"{key}.{part}".strip("."))
            check_numbers(content[part], where, f"{key}.{part}".strip("."))


def check_numbers(value: Any, where: str, key: str) -> None:
    """Raise ``UserError`` unless all that a part says is numbers, in tables and lists; of a second set also text."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in inside:
        check_numbers(inner, where, f"{key}.{name}")
    if not isinstance(value, dict | list) and value is not None and not (TEXT.fits(value) and ".data." in f".{key}"):
        check(value, NUMBER, where, key)


def at(content: Any, keys: Keys) -> float | None:
    """The number that the keys lead to; None where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, int | float) else None
