"""What can be built, by name: names and signatures are known without torch, which comes with the first mixer.

A row is the address of a class or a function, ``"file:name"`` within this package. Its file is imported when the row is
asked for, and only read when its signature is: so every default of a row is written as a literal.
"""

import ast
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .laws import law_in

if TYPE_CHECKING:
    import mixers.base

Made: TypeAlias = "mixers.base.Mixer"
Make = Callable[..., Made]


class Rows(Mapping[str, Make]):
    """Names, and what builds a mixer for each. ``rows``: addresses, or callables, of mixers from elsewhere."""

    def __init__(self, rows: Mapping[str, str | Make]):
        self.rows = dict(rows)

    def __getitem__(self, name: str) -> Make:
        row = self.rows[name]
        return found_at(row) if isinstance(row, str) else row

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __or__(self, other: Mapping[str, Make]) -> "Rows":
        return Rows(self.rows | (other.rows if isinstance(other, Rows) else dict(other)))

    def __repr__(self) -> str:
        return repr(self.rows)


def found_at(address: str) -> Any:
    """What an address names; a file alone is the module. This is the one import that waits."""
    file, _, name = address.partition(":")
    module = import_module(f"{__package__}.{file}")
    return getattr(module, name) if name else module


# Every name that a recipe may use. A name in it works.
MIXERS = Rows(
    {
        "vanilla": "vanilla:Vanilla",
        "mixup": "mixup:Mixup",
        "cutmix": "cutmix:CutMix",
        "deit": "deit:deit",
        "rsb": "rsb:rsb",
        "smoothmix": "smoothmix:SmoothMix",
        "gridmix": "gridmix:GridMix",
        "fmix": "fmix:FMix",
        "resizemix": "resizemix:ResizeMix",
        "saliencymix": "saliencymix:SaliencyMix",
        "manifoldmix": "manifoldmix:ManifoldMix",
        "attentivemix": "attentivemix:AttentiveMix",
        "puzzlemix": "puzzlemix:PuzzleMix",
        "comixup": "comixup:CoMixup",
        "supermix": "supermix:SuperMix",
        "alignmix": "alignmix:alignmixup",
        "grafting": "grafting:Grafting",
        "automix": "automix:automix",
        "samix": "samix:samix",
        "transmix": "transmix:transmix",
        "tokenmix": "tokenmix:tokenmix",
        "smmix": "smmix:smmix",
        "mixpro": "mixpro:mixpro",
        "tlalign": "tlalign:TLAlign",
        "adautomix": "adautomix:AdAutoMix",
        "decouplemix": "decouplemix:decouplemix",
        "recursivemix": "recursivemix:RecursiveMix",
        "snapmix": "snapmix:SnapMix",
        "guidedmix": "guidedmix:guidedmix",
        "patchup": "patchup:patchup",
        "softpatchup": "patchup:softpatchup",
        "catchupmix": "catchupmix:CatchUpMix",
    }
)

# Building blocks for nested arguments, e.g. {"switch": {"mixers": [{"mixup": {"alpha": 0.8}}, "cutmix"]}}.
BLOCKS = Rows(
    {
        "switch": "compose:Switch",
        "align": "alignmix:AlignMix",
        "attend": "transmix:TransMix",
        "maskmix": "mixpro:MixPro",
        "token": "tokenmix:TokenMix",
        "smm": "smmix:SMMix",
        "decouple": "decouplemix:DecoupleMix",
        "guided": "guidedmix:GuidedMix",
        "patch": "patchup:PatchUp",
    }
)


def build(spec: str | Mapping[str, Any], **args: Any) -> Made:
    """Make a mixer: ``build("cutmix", alpha=0.2)`` or ``build({"cutmix": {"alpha": 0.2}})``.

    Arguments called ``base`` or ``mixers`` are mixers, written in the same way, and are built first. Raises
    ``ValueError`` for an unknown name, argument or value, naming the nearest valid one.
    """
    if not isinstance(spec, str):
        if not isinstance(spec, Mapping) or len(spec) != 1 or not isinstance(next(iter(spec.values())), Mapping | None):
            raise ValueError(f"a mixer is written as name or {{name: {{argument: value}}}}, got {spec!r}")
        ((name, inner),) = spec.items()
        twice = set(inner or {}) & set(args)
        if twice:
            raise ValueError(f"mixer {name!r} was given {twice.pop()!r} twice")
        return build(name, **(inner or {}), **args)
    parameters = signature(spec).parameters
    for name in args:
        if name not in parameters:
            raise ValueError(f"mixer {spec!r} has no argument {name!r}; {nearest(name, parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in args:
            raise ValueError(f"mixer {spec!r} needs the argument {name!r}")
    if "mixers" in args:
        if not isinstance(args["mixers"], list | tuple):
            raise ValueError(f"mixers must be a list of mixers, got {args['mixers']!r}")
        args = args | {"mixers": [made(inner) for inner in args["mixers"]]}
    if args.get("base") is not None:
        args = args | {"base": made(args["base"])}
    return (MIXERS | BLOCKS)[spec](**args)


def made(spec: Any) -> Made:
    """A mixer as it is, or built."""
    return spec if isinstance(spec, found_at("base:Mixer")) else build(spec)


def nearest(name: str, known: Collection[str]) -> str:
    """The end of an error message: the closest valid name, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid names: " + (", ".join(sorted(known)) or "none")


def signature(name: str) -> Signature:
    """Parameters and defaults of an entry of ``MIXERS`` or ``BLOCKS``, without torch and without annotations.

    Raises ``ValueError`` for an unknown name, naming the nearest valid one.
    """
    known = MIXERS | BLOCKS
    if name not in known:
        raise ValueError(f"unknown mixer {name!r}; {nearest(name, known)}")
    row = known.rows[name]
    return written(row) if isinstance(row, str) else inspect.signature(row)


def docstring(name: str) -> str:
    """What the file of an entry of ``MIXERS`` or ``BLOCKS`` says of its method, without torch."""
    row = (MIXERS | BLOCKS).rows[name]
    if not isinstance(row, str):
        return inspect.getdoc(inspect.getmodule(row)) or ""
    return ast.get_docstring(ast.parse(source_of(row))) or ""


def sampling_law(name: str) -> str:
    """``cutmix@clova-2019``: how the file of a mixer names its law; a number behind a point counts its versions.

    Empty for a mixer from elsewhere that names none, and for a name that nothing here has.
    """
    return law_in(docstring(name)) if name in MIXERS | BLOCKS else ""


def source_of(address: str) -> str:
    """The text of the file that an address lies in."""
    return (Path(__file__).parent / f"{address.partition(':')[0]}.py").read_text(encoding="utf-8")


@functools.cache
def written(address: str) -> Signature:
    """The signature of a function or of a class, as its file has it; a class may have no constructor of its own."""
    tree = ast.parse(source_of(address))
    node = named(tree, address.partition(":")[2])
    if isinstance(node, ast.ClassDef):
        node = named(node, "__init__")
    if not isinstance(node, ast.FunctionDef):
        return Signature()
    given = node.args
    plain = [argument for argument in given.args if argument.arg != "self"]
    values: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults))
    values += [*given.defaults, *given.kw_defaults]
    parameters = []
    for argument, value in zip([*plain, *given.kwonlyargs], values, strict=True):
        kind = Parameter.KEYWORD_ONLY if argument in given.kwonlyargs else Parameter.POSITIONAL_OR_KEYWORD
        default = Parameter.empty if value is None else ast.literal_eval(value)
        parameters.append(Parameter(argument.arg, kind, default=default))
    return Signature(parameters)


def named(tree: ast.Module | ast.ClassDef, name: str) -> ast.stmt | None:
    """The class or function of that name in a file or a class."""
    found = (n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name)
    return next(found, None)
