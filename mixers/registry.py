"""What can be built, by name. Names and signatures are known without torch, which comes with the first mixer.

A row is the address of a class or a function, ``"file:name"`` within this package. Its file is imported when the row is
asked for. When only its signature is asked for, the file is read and not imported, so every default of a row is written
as a literal. The mixers that other packages register (``packages``) come behind the rows. They are looked for when a
name is none of the rows.
"""

import ast
import difflib
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from inspect import Signature
from typing import TYPE_CHECKING, Any, TypeAlias

from . import packages
from .laws import law_in
from .source import found_at, signature_in, source_of

if TYPE_CHECKING:
    import mixers.base

Made: TypeAlias = "mixers.base.Mixer"
Make = Callable[..., Made]


class Rows(Mapping[str, Make]):
    """Names, and what builds a mixer for each. ``rows`` are addresses, or callables for mixers from elsewhere.

    ``others`` gives the mixers of other packages. It is called when a name is not among the rows, and for a list.
    """

    def __init__(self, rows: Mapping[str, str | Make], others: Callable[[], Mapping[str, packages.Registered]] = dict):
        self.rows = dict(rows)
        self.others = others

    def row(self, name: str) -> str | Make | packages.Registered:
        """What stands behind a name. Raises ``KeyError``."""
        return self.rows[name] if name in self.rows else self.others()[name]

    def __getitem__(self, name: str) -> Make:
        row = self.row(name)
        return found_at(row) if isinstance(row, str) else row.load() if isinstance(row, packages.Registered) else row

    def __contains__(self, name: object) -> bool:
        return name in self.rows or name in self.others()

    def __iter__(self) -> Iterator[str]:
        if self.others is others:
            tell()
        return iter({**self.rows, **self.others()})

    def __len__(self) -> int:
        return len({**self.rows, **self.others()})

    def __or__(self, other: Mapping[str, Make]) -> "Rows":
        return Rows(self.rows | (other.rows if isinstance(other, Rows) else dict(other)), self.others)

    def __repr__(self) -> str:
        return repr({**self.rows, **self.others()})


def others() -> Mapping[str, packages.Registered]:
    """The mixers that other packages register, by name."""
    return installed().mixers


@functools.cache
def installed() -> packages.Found:
    """What other packages register, looked for once. A name of ours is nobody else's."""
    return packages.read({*MIXERS.rows, *REGRESSION.rows, *BLOCKS.rows})


@functools.cache
def tell() -> None:
    """Say what is wrong with other packages, once: when names are listed, and when a mixer is made."""
    if os.environ.get("RANK", "0") == "0":  # of the processes of a launcher one says it
        for line in installed().problems.values():
            packages.log.warning(line)


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
        "augmix": "augmix:AugMix",
        "nfm": "nfm:NFM",
        "noisymix": "noisymix:NoisyMix",
        "mixtoken": "mixtoken:MixToken",
        "tokenmixup": "tokenmixup:tokenmixup",
        "remix": "remix:Remix",
        "hmix": "hmix:HMix",
        "gmix": "gmix:GMix",
        "regmixup": "regmixup:RegMixup",
        "lumix": "lumix:lumix",
        "sumix": "sumix:sumix",
        "mergemix": "mergemix:MergeMix",
        "patchup": "patchup:patchup",
        "softpatchup": "patchup:softpatchup",
        "catchupmix": "catchupmix:CatchUpMix",
    },
    others,
)

# Methods whose targets are values, for a loop of one's own: a recipe's are classes. Each says `regression`.
REGRESSION = Rows({"cmixup": "cmixup:CMixup"})

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
        "tokenwise": "tokenmixup:TokenMixup",
        "perturb": "lumix:LUMix",
        "semantic": "sumix:SUMix",
        "patch": "patchup:PatchUp",
    }
)


def build(spec: str | Mapping[str, Any], **args: Any) -> Made:
    """Make a mixer: ``build("cutmix", alpha=0.2)`` or ``build({"cutmix": {"alpha": 0.2}})``.

    Arguments called ``base`` or ``mixers`` are mixers, written in the same way. They are built first. Raises
    ``ValueError`` for an unknown name, argument or value, and names the nearest valid one.
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
    tell()  # a package whose mixer has a name of ours, too
    mixer = (MIXERS | REGRESSION | BLOCKS)[spec](**args)
    if not isinstance(mixer, found_at("base:Mixer")):
        package = package_of(spec)
        where = f"package {package}: " if package else ""
        raise ValueError(f"{where}mixer {spec!r} must be a Mixer, but what builds it made {type(mixer).__name__}")
    return mixer


def made(spec: Any) -> Made:
    """A mixer as it is, or built."""
    return spec if isinstance(spec, found_at("base:Mixer")) else build(spec)


def package_of(name: str) -> packages.Registered | None:
    """Which package a mixer comes from; None for ours, and for a name that there is not."""
    return None if any(name in table.rows for table in (MIXERS, REGRESSION, BLOCKS)) else others().get(name)


def why_not(name: str) -> str:
    """Why a name that a package registers is no mixer, as a sentence; empty where no package does."""
    return installed().problems.get(name, "")


def usable() -> list[str]:
    """All mixers but those of other packages that cannot be built by their name alone, which is told."""
    names = list(MIXERS.rows)
    for name, row in others().items():
        try:
            build(name)
            names.append(name)
        except Exception as error:  # whatever a stranger's code raises
            told = str(error)
            packages.log.warning(told if isinstance(error, packages.PackageError) else f"package {row}: {told}")
    return names


def nearest(name: str, known: Collection[str]) -> str:
    """The end of an error message: the closest valid name, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid names: " + (", ".join(sorted(known)) or "none")


def signature(name: str) -> Signature:
    """Return the parameters and defaults of whatever ``build`` knows, without torch and without annotations.

    Raises ``ValueError`` for an unknown name, and names the nearest valid one.
    """
    known = MIXERS | REGRESSION | BLOCKS
    if name not in known:
        raise ValueError(f"unknown mixer {name!r}; {why_not(name) or nearest(name, known)}")
    row = known.row(name)
    if isinstance(row, packages.Registered):
        return row.signature
    return written(row) if isinstance(row, str) else inspect.signature(row)


@functools.cache
def written(address: str) -> Signature:
    """The signature of a row, as its file has it."""
    found = signature_in(ast.parse(source_of(address)), address.partition(":")[2])
    return inspect.signature(found_at(address)) if found is None else found


def docstring(name: str) -> str:
    """Return what the file of whatever ``build`` knows says of its method, without torch."""
    row = (MIXERS | REGRESSION | BLOCKS).row(name)
    if isinstance(row, packages.Registered):
        return row.docstring
    if not isinstance(row, str):
        return inspect.getdoc(inspect.getmodule(row)) or ""
    return ast.get_docstring(ast.parse(source_of(row))) or ""


def sampling_law(name: str) -> str:
    """Return the law that the file of a mixer names, such as ``cutmix@clova-2019``.

    A number behind a point counts the versions of a law. The result is empty for a mixer from elsewhere that names
    none, and for a name that nothing here has.
    """
    return law_in(docstring(name)) if name in MIXERS | REGRESSION | BLOCKS else ""
