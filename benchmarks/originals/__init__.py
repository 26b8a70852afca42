"""Beside the original code: what `benchmarks/parity.py` compares, one file for each kind of method.

A comparison is a function marked ``@beside(...)``. It takes the checkout that its mark names and yields ``Gap``s: what
was compared, and by how much both differ at most. The original's lines run as they stand, on the images, the weights
and the draws that ours had; nothing of them is kept in this project.
"""

import ast
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Gap(NamedTuple):
    """One comparison. ``gap``: the largest difference, in ``unit``."""

    compared: str
    """What, on what: "mixed images, 64 of 224 pixels"."""
    gap: float
    unit: str = "absolute"
    """absolute | relative (to the largest value of the original) | share (of the draws or pixels that differ)."""
    why: str = ""
    """Where both differ: the reason, in one sentence."""


Run = Callable[["Checkout"], Iterator[Gap]]


class Comparison(NamedTuple):
    """A function that compares, and with what."""

    subject: str
    """A mixer's name, or what else a published run is made of: "repeated augmentation"."""
    repository: str
    """``owner/name`` on GitHub; the checkout is the folder ``name``."""
    files: tuple[str, ...]
    """The original's files whose lines run."""
    held: str
    """The test that holds the same formula without the original, ``FILE::FUNCTION`` in ``tests``."""
    run: Run


COMPARISONS: list[Comparison] = []


def beside(subject: str, repository: str, *files: str, held: str) -> Callable[[Run], Run]:
    """Mark a comparison of ``subject`` with ``files`` of a repository; the fields are those of ``Comparison``."""

    def mark(run: Run) -> Run:
        COMPARISONS.append(Comparison(subject, repository, files, held, run))
        return run

    return mark


class Checkout:
    """A checkout of an original's repository."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def commit(self) -> str:
        """The commit that is checked out, shortened to ten letters."""
        return self.git("rev-parse", "--short=10", "HEAD")

    def check(self, *files: str) -> None:
        """Raise ``LookupError`` unless the folder is a checkout of its own, with these files as they were committed."""
        if Path(self.git("rev-parse", "--show-toplevel")) != self.folder.resolve():
            raise LookupError(f"{self.folder} is no checkout of its own")
        if changed := self.git("status", "--porcelain", "--", *files):
            raise LookupError(f"{self.folder} was changed: {changed}")

    def git(self, *words: str) -> str:
        """What git says of the checkout."""
        command = ["git", "-C", str(self.folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def names(self, file: str, *wanted: str, **given: Any) -> Any:
        """Functions, classes and constants of a file, without its imports and whatever else it does when it is read.

        ``given`` are the names that they use, such as ``np=numpy``. One name gives one object, several a tuple.
        """
        source = (self.folder / file).read_text()
        found = [node for node in ast.parse(source).body if set(wanted) & set(defined(node))]
        space: dict[str, Any] = {"__name__": f"original.{Path(file).stem}", **given}
        exec(compile(ast.Module(found, []), str(self.folder / file), "exec"), space)
        missing = [name for name in wanted if name not in space]
        if missing:
            raise LookupError(f"{self.folder / file} defines no {', '.join(missing)}: is it another commit?")
        return space[wanted[0]] if len(wanted) == 1 else tuple(space[name] for name in wanted)

    def method(self, file: str, owner: str, name: str, **given: Any) -> Callable[..., Any]:
        """One method of a class, as a function whose first argument is ``self``."""
        source = (self.folder / file).read_text()
        classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == owner]
        found = [n for c in classes for n in c.body if isinstance(n, ast.FunctionDef) and n.name == name]
        if not found:
            raise LookupError(f"{self.folder / file} has no {owner}.{name}: is it another commit?")
        space: dict[str, Any] = {"__name__": f"original.{Path(file).stem}", **given}
        found[0].decorator_list = []
        exec(compile(ast.Module([*found], []), str(self.folder / file), "exec"), space)
        function: Callable[..., Any] = space[name]
        return function


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a file defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


class Draws:
    """Random functions that give what they are told, in turn: the original gets the numbers that ours drew.

    ``Draws(beta=[0.3], randint=[4, 5])`` has ``beta`` and ``randint``; whatever else is asked for goes to ``rest``,
    such as ``numpy.random``.
    """

    def __init__(self, rest: Any = None, **values: list[Any]):
        self.rest, self.values = rest, {name: list(v) for name, v in values.items()}

    def __getattr__(self, name: str) -> Any:
        if name not in self.values:
            return getattr(self.rest, name)
        return lambda *args, **kwargs: self.values[name].pop(0)


class Numpy:
    """numpy as older code knows it, with ``draws`` for its random numbers and the types that it no longer has."""

    int, float, bool = int, float, bool

    def __init__(self, draws: Any = np.random):
        self.random = draws

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)
