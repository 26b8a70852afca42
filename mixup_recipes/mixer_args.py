"""The arguments of a recipe's mixer: checked by name, completed, and merged from where they are given."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mixers import BLOCKS, MIXERS, REGRESSION, build, signature
from mixers.registry import package_of, why_not
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, convert, nearest
from mixup_recipes.words import many

if TYPE_CHECKING:
    from torch import nn


def check_rows(rows: dict[str, Any], source: str, absent: Collection[str] = ()) -> None:
    """Raise ``UserError`` for a mixer or argument that isn't, whichever mixer is chosen. ``rows``: ``mixer_args``.

    ``absent``: mixers of packages that are not installed here, which nobody can check.
    """
    for row, args in rows.items():
        if row not in absent:
            check_mixer_name(row, f"{source}: mixer_args: ")
        if not isinstance(args, dict):
            raise UserError(f"{source}: mixer_args.{row}: expected a table of arguments")
        if row in absent:
            continue
        known = signature(row).parameters
        for name in args:
            if name not in known:
                raise UserError(f"{source}: mixer_args: mixer {row!r} has no argument {name!r}; {nearest(name, known)}")


def merge_rows(below: dict[str, Any], above: dict[str, Any], source: str, origin: dict[str, str]) -> dict[str, Any]:
    """Two ``mixer_args`` tables, argument by argument; notes where each argument comes from."""
    for row, args in above.items():
        origin |= {f"mixer_args.{row}.{key}": source for key in args}
    return below | {row: below.get(row, {}) | args for row, args in above.items()}


def check_mixer_name(name: str, where: str = "") -> None:
    """Raise ``UserError`` unless a mixer of this name exists, and its arguments can be read, for classes."""
    if name in REGRESSION:
        raise UserError(of_regression(name))
    if name not in MIXERS:
        raise UserError(f"{where}unknown mixer {name!r}; {why_not(name) or nearest(str(name), MIXERS)}")
    if package_of(name):
        try:
            signature(name)
        except ValueError as e:  # what is wrong with the package
            raise UserError(f"{where}unusable mixer {name!r}: {e}") from None


def used_packages(recipe: Recipe) -> dict[str, str]:
    """The mixers of a recipe that other packages register: name -> package and version, ``"mixup-blend 0.1.0"``."""
    rows = {name: package_of(name) for name in named(recipe.mixer, recipe.mixer_args.get(recipe.mixer))}
    return {name: str(row) for name, row in sorted(rows.items()) if row}


def absent_mixers(recipe: Recipe) -> list[str]:
    """The mixers of a recipe that nothing registers here: those of a package that is not installed."""
    names = named(recipe.mixer, recipe.mixer_args.get(recipe.mixer))
    return [name for name in names if name not in MIXERS | REGRESSION | BLOCKS]


def named(mixer: Any, args: Any) -> Iterator[str]:
    """The name of a mixer, and of those inside it."""
    yield str(mixer)
    if isinstance(args, dict):
        inside = args.get("mixers")
        for spec in [args.get("base"), *(inside if isinstance(inside, list | tuple) else ())]:
            for name, own in (
                spec if isinstance(spec, dict) else {spec: None} if isinstance(spec, str) else {}
            ).items():
                yield from named(name, own)


def of_regression(name: str) -> str:
    """Why a recipe cannot use a mixer whose targets are values, and what can."""
    return (
        f"mixer {name!r} is for regression and compares values, but a recipe's targets are classes; use mixup or "
        f"another mixer here, and {name} in a loop of your own (docs/dense.md)"
    )


# Arguments that are filled in where they are not given: by what the recipe says, and by the data once they are open. A
# recipe keeps the second at None, so that it is right for other data too; data.json has the counts of a run.
NORMALISED = ("mean", "std")
COUNTED = "class_counts"
NESTED = ("base", "mixers")


def complete(recipe: Recipe, mixer: str, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a mixer: its defaults, the recipe's normalisation, what is ``given``.

    A mixer inside another gets what the setting says of it, too. What is no mixer or argument is left for ``build``.
    """

    def inner(spec: Any) -> Any:
        table = {spec: {}} if isinstance(spec, str) else spec
        if not isinstance(table, dict) or len(table) != 1:
            return spec
        ((name, own),) = table.items()
        if name not in MIXERS | BLOCKS or not isinstance(own, dict | None):
            return spec
        row = {k: v for k, v in recipe.mixer_args.get(name, {}).items() if k not in NESTED}
        return {name: complete(recipe, name, row | (own or {}))}

    parameters = signature(mixer).parameters
    # A tuple becomes what the saved file will read back, or a resumed run would look like another one.
    defaults = {
        n: list(p.default) if isinstance(p.default, tuple) else p.default
        for n, p in parameters.items()
        if p.default is not p.empty
    }
    # A mixer that undoes the normalisation gets the numbers that it was made with.
    args = defaults | {n: list(getattr(recipe, n)) for n in NORMALISED if n in parameters} | given
    if args.get("base") is not None:
        args["base"] = inner(args["base"])
    if isinstance(args.get("mixers"), list | tuple):
        args["mixers"] = [inner(spec) for spec in args["mixers"]]
    return args


def with_mixer_args(
    recipe: Recipe, own_args: dict[str, Any], origin: dict[str, str], proven: bool, absent: Collection[str] = ()
) -> Recipe:
    """Write down every argument of the chosen mixer, defaults included, so that the saved recipe is complete.

    Their values are checked by building the mixer, which takes seconds to import torch. ``proven``: this package's own
    files set them all, and its tests have built those. Raises ``UserError``, also for a mixer that does not go with the
    recipe's labels. A recipe with a mixer that is ``absent`` is taken as it was completed.
    """
    if {*named(recipe.mixer, recipe.mixer_args.get(recipe.mixer))} & {*absent}:
        return recipe
    check_mixer_name(recipe.mixer)
    given = recipe.mixer_args.get(recipe.mixer, {})
    own_args = convert(own_args, dict, "command line: mixer")
    try:
        args = complete(recipe, recipe.mixer, given | own_args)
    except ValueError as e:  # of a package, whose mixer is inside
        raise UserError(str(e)) from None
    for key in args:
        path = f"mixer_args.{recipe.mixer}.{key}"
        filled = {COUNTED: "counted in the training data"} | {n: f"the recipe's {n}" for n in NORMALISED}
        source = filled.get(key, "mixer's default")
        origin[path] = "command line" if key in own_args else origin.get(path, source)
    if own_args or not proven or recipe.multi_label or recipe.streaming:
        try:
            made = build(recipe.mixer, **args)
        except (ValueError, TypeError) as e:
            raise UserError(str(e)) from None
        check_labels(recipe, made)
    return dataclasses.replace(recipe, mixer_args=recipe.mixer_args | {recipe.mixer: args})


def check_labels(recipe: Recipe, mixer: "nn.Module") -> None:
    """Raise ``UserError`` where a mixer, or one inside of it, does not go with what the recipe says of its labels."""
    if recipe.multi_label and any(getattr(module, "one_label", False) for module in mixer.modules()):
        raise UserError(
            f"mixer {recipe.mixer!r} assumes one class per image, so it cannot be combined with multi_label; use "
            "cutmix, mixup, puzzlemix or another"
        )
    if any(getattr(module, "regression", False) for module in mixer.modules()):
        inside = named(recipe.mixer, recipe.mixer_args.get(recipe.mixer))
        raise UserError(of_regression(next((name for name in inside if name in REGRESSION), recipe.mixer)))
    for module in counting(mixer):
        if recipe.streaming and module.class_counts is None:
            raise UserError(
                f"mixer {recipe.mixer!r} needs the number of training images of each class, and a stream does not "
                f"tell it before it is read; leave out streaming, or pass the numbers: --mixer.{COUNTED} '[500, 120, "
                "30]'"
            )
        if recipe.num_classes and module.class_counts is not None:
            check_counts(module.class_counts, recipe.num_classes)


def counting(mixer: "nn.Module") -> Iterator[Any]:
    """A mixer and those inside of it, as far as they go by how many training images a class has."""
    return (module for module in mixer.modules() if COUNTED in vars(module))


def check_counts(counts: Sequence[int], classes: int) -> None:
    """Raise ``UserError`` unless there is a count for each class."""
    if len(counts) != classes:
        raise UserError(
            f"{COUNTED}: expected {many(classes, 'number')}, one for each class, got {len(counts)}; leave it out, "
            "and the training images are counted"
        )


def fill_counts(mixer: "nn.Module", images: Sequence[int]) -> None:
    """Tell a mixer, and those inside of it, the training images of each class, where the recipe does not say them.

    Raises ``UserError`` where it says them for another number of classes.
    """
    for module in counting(mixer):
        if module.class_counts is None:
            module.class_counts = list(images)
        elif images:  # of a stream they are not known
            check_counts(module.class_counts, len(images))
