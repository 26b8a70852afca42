"""A trained model that never changes, by name."""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from jaxtyping import Float
from torch import Tensor, nn

from .. import weights
from ..weights import NoWeights

PLACES: dict[str, Callable[[], Path]] = {}
"""Names that stand for a folder of this machine, and what finds it: a program enters those that it has."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names and values of a model's weights, wherever they came from."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Frozen(nn.Module):
    """A trained model that never changes: it is in evaluation mode whatever is called, and has no parameters to train.

    ``source`` is the name of timm weights (``resnet18.tv_in1k``), ``hf-hub:owner/name``, a run folder, a name of
    ``PLACES``, or a module, which is copied. Raises ``ValueError``, in one line, if its weights cannot be had.

    The model inside is hidden from torch's registration. It moves with ``.to()``, but optimiser, checkpoint,
    DistributedDataParallel, SyncBatchNorm's conversion and whatever resets BatchNorm statistics do not see it. A run
    that is resumed loads it again by its name. The gradient flows through it to its input, not to its weights.
    """

    def __init__(self, source: str | nn.Module):
        super().__init__()
        self.source = source if isinstance(source, str) else type(source).__name__
        model = pretrained(source) if isinstance(source, str) else copy.deepcopy(source)
        self.hidden = [model.eval().requires_grad_(False)]
        self.training = False

    @property
    def model(self) -> nn.Module:
        """The model itself, for ``forward_features`` and taps."""
        return self.hidden[0]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """What the model makes of images."""
        return self.model(x)

    def fingerprint(self) -> str:
        """SHA-256 of the weights: the same name may stand for others some day."""
        return fingerprint(self.model)

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in evaluation mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return repr(self.source)


def teachers(module: nn.Module) -> dict[str, str]:
    """The frozen models inside a module: source -> SHA-256 of the weights."""
    return {part.source: part.fingerprint() for part in module.modules() if isinstance(part, Frozen)}


def pretrained(name: str) -> nn.Module:
    """Return a trained model, by timm name, ``hf-hub:`` or ``local-dir:`` address, or folder. Raises ``NoWeights``.

    Only safetensors are read from folders and repositories: see ``mixers.weights``.
    """
    folder = Path(name.removeprefix("local-dir:"))
    try:
        if name in PLACES:
            folder = PLACES[name]()
        # initial weights are drawn before the trained ones are read
        with contextlib.nullcontext() if folder.is_dir() else asking_once(), torch.random.fork_rng(devices=[]):
            if weights.is_hub(name):
                return weights.load(weights.fetch(name), name)
            if folder.is_dir():
                return weights.load(folder, name)
            if folder.is_file() and not timm.is_model_pretrained(name):
                raise NoWeights("a file of weights, which does not say what model they are of")
            if ":" in name:
                raise NoWeights("neither a folder nor a kind of address known here")
            if "/" in name:
                raise NoWeights("no such folder")
            return timm.create_model(name, pretrained=True)
    except Exception as e:  # the Hub, timm and safetensors raise some twenty types between them
        raise NoWeights(
            f"no weights for the teacher {name!r} ({why(e)}); expected timm weights such as 'resnet18.tv_in1k', "
            "hf-hub:owner/name, or a run folder"
        ) from None


@contextmanager
def asking_once() -> Iterator[None]:
    """Ask once whether the Hub answers. If not, the block has what is in the cache, as with HF_HUB_OFFLINE.

    The Hub's client would ask six times for each file, for a minute in all, and print each time.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        if not offline:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of the client's HTTP library, which changes
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def why(error: Exception) -> str:
    """What kept weights from being loaded, in a few words."""
    if isinstance(error, LocalEntryNotFoundError):
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        if status is not None:
            return f"not on this machine, and the Hub answered {status}"
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return f"not on this machine, and {offline}"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such repository, or does not show it without a token"
    words = " ".join(str(error).split()) or type(error).__name__
    return words.split(". ")[0].rstrip(".")[:160]
