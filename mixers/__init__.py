"""Mixing methods for image classification, one file per paper.

``MIXERS`` maps every name that a recipe may use to what builds the mixer. Every name in it works. ``REGRESSION`` does
the same for methods whose targets are values, which no recipe has. ``build`` makes a mixer from a name and arguments,
and also makes nested mixers. Names and signatures are known without torch. A mixer that needs torch is loaded when it
is asked for.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .deit import deit  # this file and rsb have their functions' names: imported here, so that the package shows these
from .registry import BLOCKS, MIXERS, REGRESSION, build, found_at, made, nearest, signature
from .rsb import rsb

if TYPE_CHECKING:  # what __getattr__ finds
    from .adautomix import AdAutoMix as AdAutoMix
    from .alignmix import AlignMix as AlignMix
    from .alignmix import alignmixup as alignmixup
    from .attentivemix import AttentiveMix as AttentiveMix
    from .augmix import AugMix as AugMix
    from .automix import AutoMix as AutoMix
    from .base import Mixer as Mixer
    from .base import Out as Out
    from .base import Plan as Plan
    from .base import Step as Step
    from .catchupmix import CatchUpMix as CatchUpMix
    from .cmixup import CMixup as CMixup
    from .comixup import CoMixup as CoMixup
    from .compose import Switch as Switch
    from .cutmix import CutMix as CutMix
    from .decouplemix import DecoupleMix as DecoupleMix
    from .fmix import FMix as FMix
    from .gmix import GMix as GMix
    from .grafting import Grafting as Grafting
    from .gridmix import GridMix as GridMix
    from .guidedmix import GuidedMix as GuidedMix
    from .hmix import HMix as HMix
    from .lumix import LUMix as LUMix
    from .manifoldmix import ManifoldMix as ManifoldMix
    from .mergemix import MergeMix as MergeMix
    from .mixpro import MixPro as MixPro
    from .mixtoken import MixToken as MixToken
    from .mixup import Mixup as Mixup
    from .nfm import NFM as NFM
    from .noisymix import NoisyMix as NoisyMix
    from .patchup import PatchUp as PatchUp
    from .puzzlemix import PuzzleMix as PuzzleMix
    from .recursivemix import RecursiveMix as RecursiveMix
    from .regmixup import RegMixup as RegMixup
    from .remix import Remix as Remix
    from .resizemix import ResizeMix as ResizeMix
    from .saliencymix import SaliencyMix as SaliencyMix
    from .smmix import SMMix as SMMix
    from .smoothmix import SmoothMix as SmoothMix
    from .snapmix import SnapMix as SnapMix
    from .sumix import SUMix as SUMix
    from .supermix import SuperMix as SuperMix
    from .tlalign import TLAlign as TLAlign
    from .tokenmix import TokenMix as TokenMix
    from .tokenmixup import TokenMixup as TokenMixup
    from .transmix import TransMix as TransMix
    from .vanilla import Vanilla as Vanilla

# Where the public names are that need torch.
LAZY = {name: f"base:{name}" for name in ("Mixer", "Out", "Plan", "Step")}
LAZY |= {"alignmixup": "alignmix:alignmixup", "AutoMix": "automix:AutoMix"}
ROWS = [str(row).split(":") for row in (MIXERS | REGRESSION | BLOCKS).rows.values()]
LAZY |= {name: f"{file}:{name}" for file, name in ROWS if not name.islower()}

__all__ = ["BLOCKS", "MIXERS", "REGRESSION", "build", "deit", "made", "nearest", "rsb", "signature", *LAZY]


def __getattr__(name: str) -> Any:
    """Return a public class, or a file of this package as a module."""
    if name in LAZY:
        return found_at(LAZY[name])
    if find_spec(f"{__name__}.{name}"):
        return found_at(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
