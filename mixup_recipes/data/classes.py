"""Classes go by their names, never by their position: where those of a data set stand among those of a model."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from mixup_recipes.data.identity import some
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

SYNSET = re.compile(r"n\d{8}")


def natural(names: Sequence[str]) -> Callable[[str], Any]:
    """The key by which class names are sorted: as numbers where all of them are, else as text. No two are equal."""
    return (lambda name: (int(name), name)) if all(re.fullmatch(r"\d+", name) for name in names) else str


def among(known: Sequence[str], found: Sequence[str], data: str, whose: str) -> list[int]:
    """The place of each class of ``found`` in ``known``. Raises ``UserError`` for a class that is not there."""
    place = {name: i for i, name in enumerate(known)}
    if new := [name for name in found if name not in place]:
        missing = [name for name in known if name not in set(found)]
        near = f"; {nearest(new[0], known)}" if len(new) == 1 else ""
        raise UserError(
            f"{data} has classes that {whose} does not: {some(new)}{near}"
            + (f" (it lacks {some(missing)})" if missing else "")
        )
    return [place[name] for name in found]


def places(
    known: Sequence[str] | None, count: int, found: Sequence[str], data: str, model: str
) -> tuple[list[int], str]:
    """The output of a model for each class of a data set, and what to say of it; nothing where names are the same.

    ``known``: the names of the model's ``count`` outputs, None where it has none. Names are compared, then ImageNet's
    synsets where both sides have them. A model without names is scored by position only when the classes are in their
    natural order. Raises ``UserError`` when classes cannot be told apart.
    """
    whose = f"model {model!r}"
    if known:
        if not {*found} - {*known}:
            return among(known, found, data, whose), subset(len(found), count, data, whose)
        mine, theirs = synsets(known, count), synsets(found, count)
        if mine and theirs and not {*theirs} - {*mine}:
            return among(mine, theirs, data, whose), f"{data}: its classes are matched by ImageNet's synsets"
        return among(known, found, data, whose), ""
    if (mine := synsets(None, count)) and (theirs := synsets(found, count)) and not {*theirs} - {*mine}:
        return among(mine, theirs, data, whose), f"{data}: its classes are matched by ImageNet's synsets"
    if len(found) != count:
        raise UserError(f"{whose} has {many(count, 'class')} without names, but {data} has {len(found)}")
    if list(found) != sorted(found, key=natural(found)):
        raise UserError(
            f"{whose} does not name its classes, and the classes of {data} are not in the model's order "
            f"({some(found)}), so they cannot be matched; give the model label_names in its config.json"
        )
    return list(range(count)), f"{whose} does not name its classes: its outputs are taken in the order {some(found)}"


def subset(found: int, count: int, data: str, whose: str) -> str:
    """Says that some of a model's classes have no images."""
    return f"{data} has {found} of the {count} classes of {whose}" if found < count else ""


def synsets(names: Sequence[str] | None, count: int) -> list[str] | None:
    """ImageNet's synset of each class, by synset or description; None where they are others.

    Without names: those of a model of ``count`` outputs, where that is the number of classes of a part of ImageNet.
    """
    if names and all(SYNSET.fullmatch(name) for name in names):
        return list(names)
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info: Any = ImageNetInfo(subset)
    known = info.label_names()
    if names is None:
        return known
    told = [first(info.index_to_description(i)) for i in range(len(known))]
    if len(names) == len(told) and sum(a == first(b) for a, b in zip(told, names, strict=True)) > 0.98 * len(told):
        return known  # some names are there twice
    by_name = {name: synset for name, synset in zip(told, known, strict=True) if told.count(name) == 1}
    found = [by_name.get(first(name)) for name in names]
    return [name for name in found if name] if all(found) else None


def first(description: str) -> str:
    """The first of several words for a class, without its number among namesakes."""
    return re.sub(r"\d+$", "", description.split(",")[0].strip().lower().replace("_", " "))
