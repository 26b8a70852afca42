"""Command lines from dataclasses: every field is a flag, with its docstring as help and its type from the schema.

cyclopts finds the flags, prints the help and names the nearest flag for a typo; the values go through
``typed.convert``, like those of a YAML file. ``-`` and ``_`` are the same in a flag. Imports no torch, so that
``--help`` answers at once.
"""

import dataclasses
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import docstring_parser
from cyclopts import App, Group, Parameter

from mixup_recipes.recipe import schema
from mixup_recipes.typed import RankError, UserError, convert, describe


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    return {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(cls).params}


def flag(cls: type, name: str, group: Group, text: str) -> inspect.Parameter:
    """One keyword-only parameter for cyclopts; None means that the flag was not given."""
    kind = schema(cls)[name]
    shape: Any = {bool: bool, dict: dict[str, str]}.get(kind, str)
    numbers = [a for a in (kind, *typing.get_args(kind)) if typing.get_origin(a) is tuple]
    if numbers:
        shape = types.GenericAlias(tuple, (str,) * len(typing.get_args(numbers[0])))
    text = f"{text} ({describe(kind)})" if shape is str else text
    default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
    if default not in (None, "", dataclasses.MISSING):
        text += f" [default: {default}]"
    # --no-flag for what is true or false only: cyclopts would add --empty-flag to tuples and tables
    negative = {} if shape is bool else {"negative": ()}
    annotation = Annotated[shape | None, Parameter(help=text, group=group, show_default=False, **negative)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def parse(argv: list[str], program: str, about: str, classes: dict[str, type]) -> dict[str, dict[str, Any]]:
    """The flags given in ``argv``, raw, per title of ``classes`` (title -> dataclass).

    ``--mixer.alpha 0.5`` sets an argument of the chosen mixer. Prints help or an error and exits with status
    0 or 2 when that is what the command line asks for.
    """
    owner, parameters, bools = {}, [], set()
    for order, (title, cls) in enumerate(classes.items()):
        group, docs = Group(title, sort_key=order), field_docs(cls)
        for f in dataclasses.fields(cls):
            owner[f.name] = title
            parameters.append(flag(cls, f.name, group, docs.get(f.name, "")))
            if schema(cls)[f.name] is bool:
                bools.add(f.name)

    for token in argv:
        words = token.split("=")[0].split(".")
        if len(words) > 2 and words[0].replace("-", "_") in ("__mixer", "__mixer_args"):
            name = words[2] if len(words) > 3 else "NAME"
            raise UserError(
                f"{'.'.join(words)}: a mixer inside a mixer is one value: "
                f"--mixer.{words[1]} '{{{name}: {{{words[-1]}: VALUE}}}}'"
            )
    argv = [f"--mixer_args.{token[8:]}" if token.startswith("--mixer.") else token for token in argv]
    tokens: list[str] = []
    for token in argv:  # "--sync_bn true" is how HF scripts write it
        if token.lower() in ("true", "false") and tokens and tokens[-1][2:].replace("-", "_") in bools:
            tokens[-1] += "=" + token.lower()
        else:
            tokens.append(token)

    def command(**values: Any) -> dict[str, Any]:
        return values

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = App(name=program, help=about, version_flags=[], result_action="return_value")
    app.default(command)
    given = app(tokens)
    if given is None:  # --help
        sys.exit(0)
    return {title: {k: v for k, v in given.items() if owner[k] == title} for title in classes}


def fill(cls: type, given: dict[str, Any]) -> Any:
    """An instance of the dataclass from raw command-line values, each checked against its field's type."""
    return cls(**{k: convert(v, schema(cls)[k], f"command line: {k}") for k, v in given.items()})


def run(main: Callable[[], int | None]) -> None:
    """Run a command; a ``UserError`` becomes one line on stderr, once, and exit status 2."""
    try:
        status = main()
    except UserError as e:
        if isinstance(e, RankError) or int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {e}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
