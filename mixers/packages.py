"""Mixers of other packages, which register them by an entry point: ``name = "package.module:Class"``.

What is registered is read off the metadata of the installed packages. The arguments and the docstring of a mixer are
read off its source. A package is run when one of its mixers is built, or when arguments are asked for that its source
does not tell plainly. If something is wrong with a package, one line says so and names it. It is no error for those who
ask for something else.
"""

import ast
import contextlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from inspect import Parameter, Signature
from typing import Any, NamedTuple

from .source import found_at, named, signature_in

GROUP = "mixup_recipes.mixers"
NAME = re.compile("[a-z][a-z0-9]*")
"""What a mixer may be called: ``<setting>_<mixer>`` can be read in one way only, since no mixer has an underscore."""

log = logging.getLogger(__package__)  # where nobody has set it up, its warnings are lines on stderr


class PackageError(ValueError):
    """One line that names a package, one of its mixers, and what is wrong with it."""


@dataclass(frozen=True, eq=False)
class Registered:
    """A mixer that a package registers."""

    name: str
    point: metadata.EntryPoint
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def wrong(self, what: str) -> PackageError:
        """What is wrong with it, as an error to raise."""
        words = " ".join(what.split())
        return PackageError(f"package {self} registers the mixer {self.name!r} as {self.point.value}, but {words}")

    @property
    def spec(self) -> ModuleSpec | None:
        """Where its module lies; None where there is none."""
        try:
            return found(self.point.module)
        except AttributeError:  # an address that is none
            return None

    @cached_property
    def written(self) -> tuple[ast.Module | None, str]:
        """The file that has its class or function, and the name there: its own file may import it from another one."""
        tree, name = parsed(self.point.module, self.spec), self.point.attr or ""
        if tree is None or named(tree, name):
            return tree, name
        is_package = self.spec is not None and self.spec.submodule_search_locations is not None
        around = self.point.module if is_package else self.point.module.rpartition(".")[0]
        for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    with contextlib.suppress(ImportError):  # more dots than there are packages
                        module = importlib.util.resolve_name("." * node.level + (node.module or ""), around)
                        return parsed(module, found(module)), alias.name
        return tree, name

    def load(self) -> Callable[..., Any]:
        """Its class or function. Raises ``PackageError`` when there is none."""
        try:
            found = self.point.load()
        except (Exception, SystemExit) as error:
            raise self.wrong(f"that cannot be imported: {type(error).__name__}: {error}") from error
        if inspect.isfunction(found) or (isinstance(found, type) and issubclass(found, found_at("base:Mixer"))):
            return found
        raise self.wrong("that is neither a class of mixers.Mixer nor a function that makes one")

    @cached_property
    def signature(self) -> Signature:
        """Parameters and defaults, read off the source where it tells them plainly. Raises ``PackageError``."""
        tree, name = self.written
        read = signature_in(tree, name) if tree else None
        if read is None:
            many = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)  # no recipe can name these
            parameters = inspect.signature(self.load()).parameters.values()
            read = Signature([parameter for parameter in parameters if parameter.kind not in many])
        for parameter in read.parameters.values():
            if parameter.default is not parameter.empty and not plain(parameter.default):
                raise self.wrong(f"the default of its {parameter.name!r} is no number, text, list or table")
        return read

    @cached_property
    def docstring(self) -> str:
        """What the file of its class or function says of the method; empty where that cannot be read."""
        tree, name = self.written
        return (ast.get_docstring(tree) if tree and named(tree, name) else None) or ""


class Found(NamedTuple):
    """What the installed packages register."""

    mixers: dict[str, Registered]
    problems: dict[str, str]
    """A mixer's name, or a package's where that is all that is known, and why there is no such mixer."""


def found(module: str) -> ModuleSpec | None:
    """Where a module lies; None where there is none. Not even the packages around it are run."""
    try:
        first, *rest = module.split(".")
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):  # the second: an address that is none
        return None
    for depth, _ in enumerate(rest, 2):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join([first, *rest][:depth]), spec.submodule_search_locations)
    return spec


def parsed(module: str, spec: ModuleSpec | None) -> ast.Module | None:
    """A module's file, read and not run; None where there is no source that can be read."""
    loader: Any = spec and spec.loader
    try:
        return ast.parse(loader.get_source(module))
    except (ImportError, OSError, AttributeError, TypeError, SyntaxError, ValueError):
        return None


def plain(value: Any) -> bool:
    """Whether a recipe file can hold a value."""
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
    return value is None or type(value) in (bool, int, float, str)


def read(taken: Collection[str]) -> Found:
    """Look what is installed. ``taken``: names that nobody else can have."""
    problems: dict[str, str] = {}
    entries: dict[str, list[Registered]] = {}
    for found in registered():
        if isinstance(found, PackageError):
            problems[str(found)] = str(found)
        else:
            entries.setdefault(found.name, []).append(found)
    for name, (first, *others) in entries.items():
        if name in taken:
            problems[name] = str(first.wrong("Mixup Recipes has one of that name, which is used"))
        elif others:
            so = " and ".join(map(str, others))
            problems[name] = str(first.wrong(f"so does {so}: none is used; uninstall all but one"))
        elif not NAME.fullmatch(name):
            problems[name] = str(first.wrong("a name is lower-case letters and digits, beginning with a letter"))
        elif first.spec is None:
            problems[name] = str(first.wrong("there is no such module"))
    return Found({name: first for name, (first, *_) in entries.items() if name not in problems}, problems)


def registered() -> Iterator[Registered | PackageError]:
    """Each entry of the group, of each package once: the first that is found is the one that is imported."""
    seen = set()
    for distribution in metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except (OSError, ValueError):
            continue  # whose mixers nobody can know of
        if GROUP not in text:
            continue
        package = getattr(getattr(distribution, "_path", None), "name", "of an unknown name")
        try:
            name, version = distribution.metadata["Name"], distribution.version
            if not (name and version):
                raise ValueError("it has no name or no version")
            package = name
            points = list(distribution.entry_points.select(group=GROUP))
        except Exception as error:
            yield PackageError(f"package {package}: its metadata cannot be read: {type(error).__name__}: {error}")
            continue
        if re.sub(r"[-_.]+", "-", package).lower() in seen:
            continue
        seen.add(re.sub(r"[-_.]+", "-", package).lower())
        yield from (Registered(point.name, point, package, version) for point in points)
