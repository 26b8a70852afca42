"""Which data a table holds: what tells whether two runs saw the same.

The identity of a split, as it stands in ``data.json``: ``images``; ``labels_sha256``, of the labels in order;
``per_class``, the images of each class; ``without_label``, those of no class, where they may be of several; and
``fingerprint``, which is cheap at a million images: of the names and sizes of image files in order, of the names, sizes
and footers of parquet files, or of the commit of the Hub. Runs of version 0.1 have the first two.
"""

from collections.abc import Sequence
from typing import Any

from mixup_recipes.typed import printable
from mixup_recipes.words import many

SHOWN = 5  # classes that a sentence names


def difference(
    before: dict[str, Any], now: dict[str, Any], classes_before: Sequence[str], classes_now: Sequence[str]
) -> str | None:
    """In what two records of a split differ, in words; None where they are of the same images.

    One without a fingerprint is compared by the number of images and by the labels.
    """
    keys = ["images", "labels_sha256", *["fingerprint"] * bool(before.get("fingerprint") and now.get("fingerprint"))]
    if list(classes_before) == list(classes_now) and all(before[k] == now[k] for k in keys):
        return None
    words = []
    if new := [name for name in classes_now if name not in set(classes_before)]:
        words.append(f"new classes {some(new)}")
    if gone := [name for name in classes_before if name not in set(classes_now)]:
        words.append(f"classes {some(gone)} are gone")
    if not new and not gone and list(classes_before) != list(classes_now):
        words.append(f"the classes are in another order, {some(classes_before)} then and {some(classes_now)} now")
    if before["images"] != now["images"]:
        words.append(f"{many(before['images'], 'image')} then, {now['images']:,} now")
    if isinstance(before.get("per_class"), list) and isinstance(now.get("per_class"), list):
        then = dict(zip(classes_before, before["per_class"], strict=False))
        counts = dict(zip(classes_now, now["per_class"], strict=False))
        moved = [f"{k}: {then[k]:,} then, {n:,} now" for k, n in counts.items() if k in then and then[k] != n]
        words += [some(moved, "; ")] if moved else []
    if not words and before["labels_sha256"] != now["labels_sha256"]:
        words.append("as many images, but other labels, or the same in another order")
    return "; ".join(words or ["as many images of each class, but other files: names, sizes or their order"])


def counted(found: dict[str, Any], classes: Sequence[str]) -> str:
    """How many images of how many classes a split has, in words, with the smallest and the largest of them."""
    words = f"{many(found['images'], 'image')}, {many(len(classes), 'class')}"
    if not found.get("per_class"):
        return words
    counts = sorted(zip(found["per_class"], classes, strict=True), key=lambda pair: pair[0])
    (few, small), (most, large) = counts[0], counts[-1]
    without = f", {many(found['without_label'], 'image')} without a label" if found.get("without_label") else ""
    return f"{words}, from {few:,} ({small}) to {most:,} ({large}){without}"


def some(names: Sequence[str], between: str = ", ") -> str:
    """The first of several names."""
    return between.join(map(printable, names[:SHOWN])) + f"{between}and {len(names) - SHOWN} more" * (
        len(names) > SHOWN
    )


def comparable(one: dict[str, Any], other: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two records of the same splits without what only one of them says, such as the fingerprint of a later version."""
    both = []
    for mine, theirs in ((one, other), (other, one)):
        splits = {
            name: {k: v for k, v in found.items() if k in theirs["splits"].get(name, found)}
            for name, found in mine["splits"].items()
        }
        both.append({"commit": None} | mine | {"splits": splits})
    return both[0], both[1]
