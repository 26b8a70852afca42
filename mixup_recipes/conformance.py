"""Hold mixers, ours and others', against the contract: what each probe found, as a table."""

import copy
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from timm.data import Mixup
from torchvision.transforms import v2

from mixers import MIXERS, REGRESSION, CutMix, Mixer, build, probes
from mixers.registry import why_not
from mixers.testing import CHECKS, Factory, tiny_step
from mixup_recipes.typed import UserError, nearest

ALPHAS = (0.2, 1.0)  # laws are judged at both: at 1 a uniform lambda would do, at 0.2 it would not


class Report(NamedTuple):
    """What was found out about one target."""

    target: str
    findings: dict[str, probes.Finding]
    failures: list[str]
    """The contract's checks that a ``Mixer`` fails, one line each."""

    @property
    def passed(self) -> bool:
        """Whether everything that must hold does."""
        return not self.failures and all(f.holds is not False for f in self.findings.values())


def timm_mixup(mixup: float, cutmix: float) -> probes.Mix:
    """timm's Mixup, one lambda per batch."""
    return Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=probes.CLASSES)


def torchvision_mix(name: str, alpha: float) -> probes.Mix:
    """A transform of torchvision."""
    return getattr(v2, name)(alpha=alpha, num_classes=probes.CLASSES)


STRANGERS: dict[str, Callable[[float], probes.Mix]] = {
    "timm:mixup": lambda alpha: timm_mixup(alpha, 0.0),
    "timm:cutmix": lambda alpha: timm_mixup(0.0, alpha),
    "torchvision:mixup": functools.partial(torchvision_mix, "MixUp"),
    "torchvision:cutmix": functools.partial(torchvision_mix, "CutMix"),
}


def check(targets: list[str], alpha: float | None = None) -> list[Report]:
    """Probe each target: a name of ``MIXERS``, one of ``STRANGERS``, or ``file.py:callable``.

    The callable is a ``Mixer`` class or factory, a class or factory of something that is called with images and
    labels, or that itself; the file is run. ``alpha``: the Beta parameter whose law is declared (of a pasted box:
    CutMix's law); None: those of ``ALPHAS`` where the target has an argument ``alpha``. Raises ``UserError``.
    """
    if not targets:
        raise UserError(
            f"no target was given; pass a mixer ({', '.join(MIXERS)}), {', '.join(STRANGERS)}, or file.py:callable"
        )
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UserError(f"alpha: expected a number above 0, got {alpha:g}")
    subjects = [(target, *subject(target, alpha)) for target in targets]  # all are found before the first is probed
    reports = []
    for target, made, factory in subjects:
        try:
            findings = probes.probe(made)
        except ValueError as error:
            raise UserError(f"{target}: {error}") from None
        reports.append(Report(target, findings, failed_checks(factory) if factory else []))
        if factory:
            passed = f"{len(CHECKS) - len(reports[-1].failures)} of {len(CHECKS)}"
            findings["checks of the contract"] = probes.Finding(not reports[-1].failures, passed)
    return reports


def failed_checks(factory: Factory) -> list[str]:
    """The checks of ``mixers.testing`` that a mixer fails, with what was expected and found."""
    failures = []
    for run in CHECKS.values():
        try:
            run(factory)
        except AssertionError as error:
            failures.append(str(error))
        except (Exception, SystemExit) as error:
            failures.append(probes.raised(error))
    return failures


# --------------------------------------------------------------------------------------------- targets


def subject(target: str, alpha: float | None) -> tuple[probes.Subject, Factory | None]:
    """What a target names, and its factory when it is a ``Mixer``. Raises ``UserError``."""
    if target in (known := MIXERS | REGRESSION):
        try:
            return mixer_subject(lambda **args: build(target, **args), known[target], alpha)
        except ValueError as error:  # a package's, which is broken or needs arguments
            raise UserError(str(error)) from None
    if target in STRANGERS:
        make = STRANGERS[target]
        alphas = (alpha,) if alpha else ALPHAS
        return probes.Subject(lambda a: make(1.0 if a is None else a), probes.seed_globals, alphas), None
    path, colon, name = target.rpartition(":")
    if colon and path.endswith(".py"):
        return of_file(Path(path), name, alpha)
    if target.endswith(".py"):
        raise UserError(
            f"{target}: expected {target}:NAME with a callable of the file; {contents(module_of(Path(target)))}"
        )
    near = why_not(target) or f"{nearest(target, [*MIXERS, *STRANGERS])} (or the path of a file.py:callable)"
    raise UserError(f"unknown target {target!r}; {near}")


def mixer_subject(
    make: Callable[..., Mixer], signature: Callable[..., Any], alpha: float | None
) -> tuple[probes.Subject, Factory]:
    """A mixer by its factory."""
    takes = "alpha" in inspect.signature(signature).parameters
    alphas = () if not takes else (alpha,) if alpha else ALPHAS

    def step(a: float | None) -> Any:
        return tiny_step(lambda: make(**({} if a is None else {"alpha": a})), classes=probes.CLASSES)

    return probes.of_mixer(step, alphas, isinstance(make(), CutMix)), make


def of_file(path: Path, name: str, alpha: float | None) -> tuple[probes.Subject, Factory | None]:
    """A callable of a file."""
    module = module_of(path)
    found = getattr(module, name, None)
    if isinstance(found, Mixer):
        return mixer_subject(lambda: copy.deepcopy(found), lambda: None, alpha)
    if not callable(found):
        raise UserError(f"{path} has no callable {name!r}; {nearest(name, own_callables(module))}")
    try:
        parameters = inspect.signature(found).parameters
    except ValueError:
        raise UserError(f"the signature of {path}:{name} cannot be read; wrap it in a function (x, y)") from None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind in kinds]
    takes = "alpha" in parameters and parameters["alpha"] not in needed
    alphas = (alpha,) if alpha else ALPHAS if takes else ()
    if len(needed) == 2 and not inspect.isclass(found):
        make = lambda a: functools.partial(found, alpha=a) if takes and a is not None else found  # noqa: E731
        return probes.Subject(make, probes.seed_globals, alphas, alpha is not None), None
    if needed:
        raise UserError(
            f"{path}:{name} needs {', '.join(p.name for p in needed)}; expected a Mixer, a factory without required "
            "arguments, or a function (x, y)"
        )
    try:
        made = found()
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}:{name} cannot be made: {probes.raised(error)}") from None
    if isinstance(made, Mixer):
        return mixer_subject(found, found, alpha)
    if not callable(made):
        raise UserError(
            f"{path}:{name} makes a {type(made).__name__}; expected a Mixer, or something called with (x, y)"
        )
    factory = lambda a: found(alpha=a) if takes and a is not None else found()  # noqa: E731
    return probes.Subject(factory, probes.seed_globals, alphas, alpha is not None), None


def module_of(path: Path) -> ModuleType:
    """Run a Python file. Raises ``UserError`` when it cannot be."""
    if not path.is_file():
        raise UserError(f"no file {path}; expected the path of a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.absolute().parent))  # what lies beside it can be imported, as when it is a script
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"cannot import {path}: {probes.raised(error)}") from None
    finally:
        sys.path.remove(str(path.absolute().parent))
    return module


def own_callables(module: ModuleType) -> list[str]:
    """Public functions and classes that a file defines."""
    return [
        n for n, v in vars(module).items() if callable(v) and not n.startswith("_") and v.__module__ == module.__name__
    ]


def contents(module: ModuleType) -> str:
    """They as a text."""
    return f"it has {', '.join(own_callables(module)) or 'none'}"


# --------------------------------------------------------------------------------------------- tables


def table(reports: list[Report], format: str = "text") -> str:
    """A row per probe, a column per target: aligned text or Markdown, then the failed checks and the versions."""
    names = list(dict.fromkeys(name for report in reports for name in report.findings))
    head = ["", *(report.target for report in reports)]
    rows = [[name, *(cell(report.findings.get(name)) for report in reports)] for name in names]
    if format == "md":
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    else:
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in (head, *rows)]
        lines = ["  ".join(row).rstrip() for row in padded]
    failures = [f"{report.target}: {line}" for report in reports for line in report.failures]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "timm", "torchvision", "numpy"))
    note = "A row marked FAILS breaks the contract. All other rows are facts, not faults."
    return "\n".join([*lines, "", *failures, *[""] * bool(failures), note, versions]) + "\n"


def cell(finding: probes.Finding | None) -> str:
    """A finding as text."""
    if finding is None:
        return ""
    return {True: "ok: ", False: "FAILS: ", None: ""}[finding.holds] + finding.found.replace("|", "/")
