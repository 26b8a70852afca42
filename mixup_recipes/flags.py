"""Command lines from dataclasses: every field is a flag, with its docstring as help and its type from the schema.

cyclopts finds the flags, prints the help and names the nearest flag for a typo; the values go through
``typed.convert``, like those of a YAML file. Flags are shown as the fields are written; ``-`` is understood for ``_``.
Imports no torch, so that ``--help`` answers at once.
"""

import dataclasses
import inspect
import io
import json
import os
import re
import select
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import docstring_parser
import yaml
from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
)
from cyclopts.help import DefaultFormatter, NameRenderer
from cyclopts.help.specs import get_default_parameter_columns

from mixers.packages import PackageError
from mixup_recipes.names import meant_by
from mixup_recipes.recipe import Recipe, schema
from mixup_recipes.typed import RankError, UserError, convert

Classes = Mapping[str, type]
"""Title of a group of flags -> the dataclass whose fields they are."""
WIDEST = 30
"""Characters that the help has for a flag: the longest name fits; choices that are longer go to its text."""
SETTINGS: dict[str, Any] = {
    "version_flags": [],
    "result_action": "return_value",
    "suppress_keyboard_interrupt": False,  # ``run`` has something to say
    "exit_on_error": False,  # ``asked`` makes one line of an error
    "print_error": False,
    "default_parameter": Parameter(name_transform=lambda name: name),
}
"""How all commands read their command line."""

# What a Ctrl-C leaves, and how to go on, by command.
KEPT = {
    "train": "log and checkpoints so far are kept; --resume_from_checkpoint auto continues from the newest checkpoint",
    "sweep": "finished runs are kept; the same command goes on with the others",
    "supermix": "images that were made are kept; the same command goes on",
    "push": "the repository has all of this publication or none of it; the same command sends what is missing",
    "prepare": "no half-made data set is left; the same command begins again",
}
NOTHING_KEPT = "no file is left half-written; the same command begins again"


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    return {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(cls).params}


def bare(kind: Any) -> Any:
    """An annotation without its range and without none."""
    if typing.get_origin(kind) is Annotated:
        return bare(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return bare(next(a for a in typing.get_args(kind) if a is not types.NoneType))
    return kind


def is_tuple(kind: Any) -> bool:
    """Whether a flag takes several values."""
    return typing.get_origin(bare(kind)) is tuple


def placeholder(kind: Any) -> str:
    """What the help shows for the value of a flag: INT, FLOAT FLOAT, PATH."""
    kind = bare(kind)
    if is_tuple(kind):
        parts = typing.get_args(kind)
        return f"{placeholder(parts[0])} ..." if parts[-1] is ... else " ".join(placeholder(part) for part in parts)
    if typing.get_origin(kind) is Literal:
        choices = "|".join(typing.get_args(kind))
        return choices if len(choices) + 2 <= WIDEST else "CHOICE"
    return {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT", dict: "TABLE"}.get(kind, "")


def choices_of(kind: Any) -> str:
    """What the help says of choices that ``placeholder`` has no room for."""
    one = typing.get_args(bare(kind))[0] if is_tuple(kind) else bare(kind)
    return f"choices: {', '.join(typing.get_args(one))}" if placeholder(one) == "CHOICE" else ""


def limits_of(kind: Any) -> str:
    """What the help says of a value beside its type: at least 1 or none."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = next(a for a in typing.get_args(kind) if a is not types.NoneType)
        return f"{limits_of(inner)} or none".strip()
    return str(typing.get_args(kind)[1]) if typing.get_origin(kind) is Annotated else ""


def flag(cls: type, name: str, group: Group, text: str, first: tuple[str, ...] = ()) -> inspect.Parameter:
    """One parameter for cyclopts; None means that the flag was not given. ``first``: the first argument's names."""
    kind = schema(cls)[name]
    shape: Any = {bool: bool, dict: dict[str, str]}.get(bare(kind), list[str] if is_tuple(kind) else str)
    default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
    notes = [limits_of(kind) if bare(kind) in (int, float) else choices_of(kind)]
    if default not in (None, "", (), dataclasses.MISSING):
        notes.append(f"default: {default}")
    text = " ".join([*text.split(), *(f"[{note}]" for note in notes if note)])  # paragraphs would be torn apart
    # --no_flag for what is true or false only: cyclopts would add --empty_flag to tuples and tables
    more: dict[str, Any] = {} if shape is bool else {"negative": (), "metavar": placeholder(kind) or None}
    more |= {"consume_multiple": True} if is_tuple(kind) else {}
    more |= {"name": tuple(f"--{name}" for name in first)} if name in first else {}
    annotation = Annotated[shape | None, Parameter(help=text, group=group, show_default=False, **more)]
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in first else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, place, default=None, annotation=annotation)


def columns(console: Any, options: Any, entries: list[Any]) -> tuple[Any, ...]:
    """The columns of cyclopts, but on a narrow screen the first is wide enough for the longest name of a flag."""
    *others, names, texts = get_default_parameter_columns(console, options, entries)
    width = max(names.max_width or 0, WIDEST)
    return *others, names.copy(renderer=NameRenderer(max_width=width), max_width=width), texts


def command(program: str, about: str, classes: Classes, first: tuple[str, ...] = ()) -> App:
    """The command whose flags are the fields of ``classes``; it returns the values that were given, as text.

    ``first``: a field that is the first argument too, and synonyms of its flag.
    """
    parameters, formatter = [], DefaultFormatter(column_specs=columns)
    for order, (title, cls) in enumerate(classes.items()):
        group, docs = Group(title, sort_key=order, help_formatter=formatter), field_docs(cls)
        parameters += [flag(cls, f.name, group, docs.get(f.name, ""), first) for f in dataclasses.fields(cls)]

    def given(*start: Any, **values: Any) -> dict[str, Any]:
        return dict(zip((parameter.name for parameter in parameters), start, strict=False)) | values

    parameters.sort(key=lambda parameter: parameter.kind)
    given.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = App(name=program, help=about, **SETTINGS)
    app.default(given)
    return app


def parse(
    argv: list[str], program: str, about: str, classes: Classes, first: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """The flags given in ``argv``, raw, per title of ``classes``. ``first``: see ``command``.

    ``--mixer.alpha 0.5`` sets an argument of the chosen mixer. Prints help or an error and exits with status
    0 or 2 when that is what the command line asks for.
    """
    kinds = {name: kind for cls in classes.values() for name, kind in schema(cls).items()}
    given = asked(command(program, about, classes, first), tidy(argv, kinds, first))
    if given is None:  # --help
        sys.exit(0)
    whole = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    whole = {k: "none" if v == ("none",) else v for k, v in whole.items()}
    return {title: {k: v for k, v in whole.items() if k in schema(cls)} for title, cls in classes.items()}


def tidy(argv: list[str], kinds: Mapping[str, Any], first: tuple[str, ...] = ()) -> list[str]:
    """A command line as cyclopts wants it.

    ``--sync_bn true``, as HF scripts write it, becomes ``--sync_bn=true``; ``--mean [0.5, 0.5, 0.5]`` becomes
    ``--mean 0.5 0.5 0.5``; several values of an argument, as in ``--model_args.channels 16 32``, become one list;
    ``--model_args '{depth: 2}'`` becomes ``--model_args.depth=2``.
    Raises ``UserError`` for a flag that means another one.
    """
    tokens: list[str] = []
    left = list(argv)
    while left:
        token = left.pop(0)
        if not token.startswith("--"):
            tokens.append(token)
            continue
        flag, equals, value = token.partition("=")
        name, *keys = flag[2:].split(".")
        name = name.replace("-", "_")
        kind = kinds.get(name)
        if name in ("mixer", "mixer_args") and len(keys) > 1:
            inner = keys[1] if len(keys) > 2 else "NAME"
            raise UserError(
                f"{flag}: a mixer inside a mixer is one value: --mixer.{keys[0]} '{{{inner}: {{{keys[-1]}: VALUE}}}}'"
            )
        if kind is None and name not in first and (meant := meant_by(name, kinds)) and not name.startswith("no_"):
            raise UserError(f"unknown flag {flag}; did you mean --{meant}?")
        values = [value] * bool(equals)
        while left and not re.match(r"--?[A-Za-z]", left[0]) and (keys or is_tuple(kind)) and not equals:
            values.append(left.pop(0))
        if keys:
            start = "--mixer_args" if name == "mixer" else f"--{name}"
            text = " ".join(values)
            text = f"[{', '.join(values)}]" if len(values) > 1 and text[0] not in "[{" else text
            tokens += [".".join((start, *keys)) + (f"={text}" if values else "")]
        elif bare(kind) is dict and (whole := value or (left[0] if left else "")).startswith("{"):
            del left[: not equals]
            tokens += table(flag, whole)
        elif is_tuple(kind):
            tokens += [flag, *re.split(r"[,\s]+", re.sub(r"[\[\]()]", " ", " ".join(values)).strip())]
        elif bare(kind) is bool and not equals and left and left[0].lower() in ("true", "false"):
            tokens.append(f"{flag}={left.pop(0).lower()}")
        else:
            tokens.append(token)
    return tokens


def table(flag: str, text: str) -> list[str]:
    """``{depth: 2, layers: [1, 1]}`` after a flag, as YAML or JSON, as a flag for each of its keys."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{flag}: expected a table such as '{{NAME: VALUE}}', got {text!r}")
    return [f"{flag}.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in found.items()]


def asked(app: App, argv: list[str]) -> Any:
    """What the command that the arguments ask for returns. Raises ``UserError`` for a wrong command line."""
    try:
        return app(argv)
    except MissingArgumentError as e:
        if e.argument is None or e.argument.tokens or e.keyword:  # a flag without its value
            raise UserError(str(e)) from None
        wanted, about = e.argument.field_info.name, e.argument.parameter.help
        wanted = wanted.upper() if e.argument.field_info.is_positional else f"--{wanted}"
        raise UserError(f"{' '.join(e.command_chain or ())}: {wanted} is missing. {about}") from None
    except UnusedCliTokensError as e:
        raise UserError(f"too many arguments: {' '.join(e.unused_tokens or ())}") from None
    except UnknownOptionError as e:
        name = (e.token.keyword or e.token.value).lstrip("-").partition("=")[0].replace("-", "_")
        if any("--set" in a.names for a in e.argument_collection) and name in schema(Recipe):
            raise UserError(f"unknown flag --{name}; for the runs of a sweep: --set {name}=VALUE") from None
        raise UserError(str(e)) from None
    except CycloptsError as e:
        raise UserError(str(e)) from None


def fill(cls: type, given: dict[str, Any]) -> Any:
    """An instance of the dataclass from raw command-line values, each checked against its field's type."""
    return cls(**{k: convert(v, schema(cls)[k], f"command line: {k}") for k, v in given.items()})


def run(main: Callable[[], int | None]) -> None:
    """Run a command and leave with its exit status.

    A ``UserError``, or a package whose mixer cannot be used, becomes one line on stderr, once, and status 2; a Ctrl-C
    one that says what is kept, and 130. Where nobody reads on, as behind ``| head``, the end is quiet: 141, as of a
    program that the signal ends.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        status: Any = main()
    except (UserError, PackageError) as e:
        if isinstance(e, RankError) or first:
            print(f"error: {e}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        if first:
            print(f"stopped: {KEPT.get(asked_for(), NOTHING_KEPT)}", file=sys.stderr)
        status = 130
    except SystemExit as left:
        status = left.code
    except BrokenPipeError:
        if not unread():
            raise  # another pipe
        status = 141
    if unread():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or python finds out again when it ends
        status = 141
    sys.exit(status)


def unread() -> bool:
    """Whether nobody reads what this process prints."""
    try:
        sys.stdout.flush()
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)  # what was too long for the buffer is not flushed again
        return any(event & select.POLLERR for _, event in pipe.poll(0))
    except BrokenPipeError:
        return True
    except io.UnsupportedOperation:  # no file, as in a notebook
        return False


def asked_for() -> str:
    """The command that this process runs: ``train`` for ``train_mixup.py`` and for ``mixup-recipes train``."""
    script = Path(sys.argv[0]).stem
    return script.removesuffix("_mixup") if script.endswith("_mixup") else next(iter(sys.argv[1:]), "")
