"""One typed layer for YAML files and command lines: dataclass annotations are the schema.

A value is checked against the annotation of its field, wherever it comes from. An annotation is one of
``bool int float str Path``, ``Literal[...]``, ``T | None``, ``tuple[float, float]``, ``tuple[T, ...]``, ``dict``, or
``Annotated[T, Between(low, high)]``. Text is converted (``"1e-4"`` to a float), but never silently changed:
``1.5`` is no integer.
"""

import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mixup_recipes.names import nearest as nearest  # beside UserError, whose messages end with it


def printable(text: str) -> str:
    """Text as one line: what breaks it, moves the cursor or is no text is written as in Python."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(ValueError):
    """Something the user can mend. The commands print it as one line and leave with exit status 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RankError(UserError):
    """A ``UserError`` that one process alone may meet, such as an image that cannot be read: it prints it itself."""


@dataclass(frozen=True)
class Between:
    """Inclusive range of a number; ``open_low`` excludes the lower end."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        high = "" if self.high == math.inf else f"at most {self.high:g}"
        return " and ".join(part for part in (low, high) if part)


DEEPEST = 50
PLAIN = re.compile(":(null|bool|int|float|str|seq|map)$")


class Loader(yaml.SafeLoader):
    """Plain YAML: tables, lists, text, numbers, true, false and null. What would hide or change a value is refused.

    Refused: a key twice in a table, an alias within what it names, more than ``DEEPEST`` levels. Text stays what YAML
    1.1 takes for a date, a number to base 60 (``1:30``), or an octal or binary one (``010``).
    """

    yaml_constructors = {k: v for k, v in yaml.SafeLoader.yaml_constructors.items() if k is None or PLAIN.search(k)}  # noqa: RUF012

    def __init__(self, text: str):
        super().__init__(text)
        self.level = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """The tag of a node that has none."""
        tag = super().resolve(kind, value, implicit)
        odd = tag.endswith(":timestamp") or (tag.endswith((":int", ":float")) and re.match(r"[-+]?0[\d_b]|.*:", value))
        return "tag:yaml.org,2002:str" if odd else tag

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Read one node and what is in it."""
        self.level += 1
        if self.level > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        if node.end_mark is None:  # not read to its end yet
            raise yaml.MarkedYAMLError(
                problem="an alias inside of the value that it names", problem_mark=node.start_mark
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Read a table."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Make the value of a node."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as e:  # !!bool maybe, an integer of 5,000 digits
            raise yaml.MarkedYAMLError(problem=str(e), problem_mark=node.start_mark) from None


def from_yaml(text: str) -> Any:
    """YAML text as plain values: see ``Loader``. Raises ``UserError`` with the line, whatever is wrong."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as e:
        raise UserError(
            "not valid YAML: " + " ".join(str(e).replace('in "<unicode string>", ', "in ").split())
        ) from None


def describe(annotation: Any) -> str:
    """The annotation in words, for help texts and errors."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return f"{describe(args[0])} {args[1]}".strip()
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is types.NoneType else describe(a) for a in args)
    if origin is tuple:
        return f"several values, each {describe(args[0])}" if args[-1] is ... else f"{len(args)} numbers"
    if origin is dict:
        return "a table"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path", dict: "a table"}
    return words[annotation]


def convert(value: Any, annotation: Any, where: str) -> Any:
    """``value`` as the type of ``annotation``. ``where`` names the field and its source in the error.

    Raises ``UserError``: what was given, what was expected, the nearest valid choice.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    wrong = UserError(f"{where}: expected {describe(annotation)}, got {value!r}")
    if origin is typing.Annotated:
        try:
            converted = convert(value, args[0], where)
        except UserError:
            raise wrong from None
        if isinstance(converted, int | float) and converted not in args[1]:
            raise wrong
        return converted
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        (inner,) = [a for a in args if a is not types.NoneType]
        try:
            return convert(value, inner, where)
        except UserError:
            raise wrong from None
    if origin is Literal:
        if value is False and "no" in args:  # YAML reads a bare no as false
            value = "no"
        if value not in args:
            raise UserError(f"{wrong}; {nearest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        kinds = args[:1] * len(value) if args[-1] is ... else args
        if len(value) != len(kinds):
            raise wrong
        return tuple(convert(v, a, where) for v, a in zip(value, kinds, strict=True))
    if annotation is dict or origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {str(k): from_words(v) for k, v in value.items()}
    if annotation is Path:
        if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
            raise wrong
        return Path(value)
    if annotation is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if annotation in (int, float) and isinstance(value, str):
        try:
            value = int(value) if annotation is int else float(value)
        except ValueError:
            raise wrong from None
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if annotation is int and isinstance(value, int) and abs(value) >= 2**63:
        raise wrong
    if type(value) is not annotation or (annotation is float and not math.isfinite(value)):
        raise wrong
    if annotation is str and "\0" in value:  # no path, no name
        raise wrong
    return value


def from_words(value: Any) -> Any:
    """A value of a free table: text from a command line is read as YAML, numbers such as ``1e-4`` included."""
    if isinstance(value, dict):
        return {str(k): from_words(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [from_words(v) for v in value]
    if not isinstance(value, str):
        return value
    try:
        read = from_yaml(value)
    except UserError:
        return value
    if not isinstance(read, str):
        return from_words(read)
    try:
        return float(read) if "e" in read.lower() else read
    except ValueError:
        return read
