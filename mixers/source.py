"""What an address names, ``"file:name"`` within this package, and what a file says without being run."""

import ast
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any


def found_at(address: str) -> Any:
    """What an address names; a file alone is the module. This is the one import that waits."""
    file, _, name = address.partition(":")
    module = import_module(f"{__package__}.{file}")
    return getattr(module, name) if name else module


def source_of(address: str) -> str:
    """The text of the file that an address lies in."""
    return (Path(__file__).parent / f"{address.partition(':')[0]}.py").read_text(encoding="utf-8")


def signature_in(tree: ast.Module, name: str) -> Signature | None:
    """The signature of a function or of a class, as its file has it; a class may have no constructor of its own.

    None where only the import can tell: a name from another file, a decorator, a constructor that is inherited from
    another class than ``Mixer``, ``*args``, a default that is no literal.
    """
    node = named(tree, name)
    if isinstance(node, ast.ClassDef):
        above = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        own = named(node, "__init__")
        if node.decorator_list or (own is None and above != ["Mixer"]):
            return None
        if own is None:
            return Signature()
        node = own
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return None
    given = node.args
    if given.vararg or given.kwarg or given.posonlyargs:
        return None
    plain = [argument for argument in given.args if argument.arg != "self"]
    values: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults))
    values += [*given.defaults, *given.kw_defaults]
    parameters = []
    for argument, value in zip([*plain, *given.kwonlyargs], values, strict=True):
        kind = Parameter.KEYWORD_ONLY if argument in given.kwonlyargs else Parameter.POSITIONAL_OR_KEYWORD
        try:
            default = Parameter.empty if value is None else ast.literal_eval(value)
        except (ValueError, TypeError):
            return None
        parameters.append(Parameter(argument.arg, kind, default=default))
    return Signature(parameters)


def named(tree: ast.Module | ast.ClassDef, name: str) -> ast.stmt | None:
    """The class or function of that name in a file or a class."""
    found = (n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name)
    return next(found, None)
