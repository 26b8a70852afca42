"""Mixing methods for image classification, one file per paper.

``MIXERS`` maps every name that a recipe may use to what builds it; a name in it works. ``build`` makes a
mixer from a name and arguments, nested mixers included.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from . import compose  # its functions of the names of modules here are reached through it
from .adautomix import AdAutoMix
from .alignmix import AlignMix
from .attentivemix import AttentiveMix
from .automix import AutoMix
from .base import Mixer, Out, Plan, Step
from .comixup import CoMixup
from .compose import Switch, alignmixup, deit, rsb
from .cutmix import CutMix
from .decouplemix import DecoupleMix
from .fmix import FMix
from .grafting import Grafting
from .gridmix import GridMix
from .guidedmix import GuidedMix
from .manifoldmix import ManifoldMix
from .mixpro import MixPro
from .mixup import Mixup
from .puzzlemix import PuzzleMix
from .recursivemix import RecursiveMix
from .resizemix import ResizeMix
from .saliencymix import SaliencyMix
from .smmix import SMMix
from .smoothmix import SmoothMix
from .snapmix import SnapMix
from .supermix import SuperMix
from .tlalign import TLAlign
from .tokenmix import TokenMix
from .transmix import TransMix
from .vanilla import Vanilla

MIXERS: dict[str, Callable[..., Mixer]] = {
    "vanilla": Vanilla,
    "mixup": Mixup,
    "cutmix": CutMix,
    "deit": deit,
    "rsb": rsb,
    "smoothmix": SmoothMix,
    "gridmix": GridMix,
    "fmix": FMix,
    "resizemix": ResizeMix,
    "saliencymix": SaliencyMix,
    "manifoldmix": ManifoldMix,
    "attentivemix": AttentiveMix,
    "puzzlemix": PuzzleMix,
    "comixup": CoMixup,
    "supermix": SuperMix,
    "alignmix": alignmixup,
    "grafting": Grafting,
    "automix": compose.automix,
    "samix": compose.samix,
    "transmix": compose.transmix,
    "tokenmix": compose.tokenmix,
    "smmix": compose.smmix,
    "mixpro": compose.mixpro,
    "tlalign": TLAlign,
    "adautomix": AdAutoMix,
    "decouplemix": compose.decouplemix,
    "recursivemix": RecursiveMix,
    "snapmix": SnapMix,
    "guidedmix": compose.guidedmix,
}

# Building blocks for nested arguments, e.g. {"switch": {"mixers": [{"mixup": {"alpha": 0.8}}, "cutmix"]}}.
BLOCKS: dict[str, Callable[..., Mixer]] = {
    "switch": Switch,
    "align": AlignMix,
    "attend": TransMix,
    "maskmix": MixPro,
    "token": TokenMix,
    "smm": SMMix,
    "decouple": DecoupleMix,
    "guided": GuidedMix,
}


def build(spec: str | Mapping[str, Any], **args: Any) -> Mixer:
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
    known = MIXERS | BLOCKS
    if spec not in known:
        raise ValueError(f"unknown mixer {spec!r}; {nearest(spec, known)}")
    parameters = inspect.signature(known[spec]).parameters
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
    return known[spec](**args)


def made(spec: Mixer | str | Mapping[str, Any]) -> Mixer:
    """A mixer as it is, or built."""
    return spec if isinstance(spec, Mixer) else build(spec)


def nearest(name: str, known: Any) -> str:
    """The end of an error message: the closest valid name, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid names: " + (", ".join(sorted(known)) or "none")


__all__ = [
    "BLOCKS",
    "MIXERS",
    "AdAutoMix",
    "AlignMix",
    "AttentiveMix",
    "AutoMix",
    "CoMixup",
    "CutMix",
    "DecoupleMix",
    "FMix",
    "Grafting",
    "GridMix",
    "GuidedMix",
    "ManifoldMix",
    "MixPro",
    "Mixer",
    "Mixup",
    "Out",
    "Plan",
    "PuzzleMix",
    "RecursiveMix",
    "ResizeMix",
    "SMMix",
    "SaliencyMix",
    "SmoothMix",
    "SnapMix",
    "Step",
    "SuperMix",
    "Switch",
    "TLAlign",
    "TokenMix",
    "TransMix",
    "Vanilla",
    "alignmixup",
    "build",
    "deit",
    "nearest",
    "rsb",
]
