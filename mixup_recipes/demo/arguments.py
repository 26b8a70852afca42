"""The fields of a mixer's arguments on the page: made from its signature, and read back as values."""

from typing import Any, Literal, NamedTuple

from mixers import signature
from mixup_recipes.data.cache import whole
from mixup_recipes.mixer_args import COUNTED, NORMALISED, complete
from mixup_recipes.pages.method_facts import TRAINED
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.known_weights import FILES
from mixup_recipes.typed import UserError, from_words

FILLED = (*NORMALISED, COUNTED)  # by what the model or the data say; no field


class Field(NamedTuple):
    """One argument of a mixer."""

    name: str
    kind: Literal["switch", "number", "text"]
    value: bool | int | float | str
    """What the field shows at first. An empty text means None."""


def fields(mixer: str, recipe: Recipe) -> list[Field]:
    """A field for each argument, at first with the recipe's value, or else with the mixer's default."""
    made = []
    for name, value in complete(recipe, mixer, recipe.mixer_args.get(mixer, {})).items():
        if name in FILLED:
            continue
        if name == "teacher" and value is not None and whole(TRAINED, FILES):
            value = TRAINED  # which is on this machine
        if isinstance(value, bool):
            made.append(Field(name, "switch", value))
        elif isinstance(value, int | float):
            made.append(Field(name, "number", value))
        else:
            made.append(Field(name, "text", as_text(value)))
    return made


def as_text(value: Any) -> str:
    """A value as it stands in a text field: ``2, 6`` for a list."""
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def values(mixer: str, recipe: Recipe, given: list[Any]) -> dict[str, Any]:
    """All arguments of a mixer from what its ``fields`` hold. Raises ``UserError`` for a field that has no value."""
    read: dict[str, Any] = {}
    defaults = signature(mixer).parameters
    for field, value in zip(fields(mixer, recipe), given, strict=True):
        if field.kind == "switch":
            read[field.name] = bool(value)
        elif field.kind == "number":
            read[field.name] = number(field, value)
        else:
            several = isinstance(defaults[field.name].default, list | tuple)
            read[field.name] = from_text(str(value or "").strip(), several)
    return complete(recipe, mixer, recipe.mixer_args.get(mixer, {}) | read)


def number(field: Field, value: Any) -> int | float:
    """The value of a number's field, whole where the default is and it can be. Raises ``UserError`` for none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{field.name}: expected a number, got {value!r}" if value else f"{field.name}: enter a number")
    if isinstance(field.value, float):
        return float(value)
    return int(value) if float(value).is_integer() else value


def from_text(text: str, several: bool) -> Any:
    """The value of a text field, read as YAML is. ``several``: numbers with commas between them."""
    if not text:
        return None
    if several and not text.startswith("["):
        text = f"[{text.strip('()')}]"
    return from_words(text)
