"""Weight files of others as a start: what ``torch.save`` and safetensors write, read as nothing but numbers.

A pickle is read with ``weights_only``, which makes tensors and plain data and calls nothing that the file names. Beside
what torch allows an ``argparse.Namespace`` is made, which timm's checkpoints hold: a bag of names and values.
"""

import argparse
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixers import taps
from mixers.weights import is_hub
from mixup_recipes.files import file_hash
from mixup_recipes.training.weight_names import State, choose, contained, converted, few, printable
from mixup_recipes.typed import UserError

ENDINGS = (".pth", ".pth.tar", ".pt", ".bin", ".ckpt", ".safetensors")
AGAIN = "where you trust it, save its state dict alone with safetensors.torch.save_file and pass that file"
COUNTER = "num_batches_tracked"  # of BatchNorm, which older files do not have and nothing here reads


class Start(NamedTuple):
    """The trained weights that a run starts from."""

    model: nn.Module
    sha256: str | None
    """Of the file with the weights; None where there is no such file, as for timm's own names."""
    notes: list[str]
    """What to know of how they were read."""


def is_weight_file(name: str) -> bool:
    """Whether a name is that of a weight file; two weights of timm itself have a name that ends like one."""
    ends = name.lower().endswith(ENDINGS) and not os.path.isdir(name)
    return ends and (os.path.exists(name) or not (is_hub(name) or timm.is_model_pretrained(name)))


def load(name: str, model: nn.Module) -> Start:
    """A weight file in ``model``, which gets as many classes as the file has: none for a file without a classifier.

    Raises ``UserError`` for a file that cannot be read or does not fit.
    """
    path = Path(name)
    content = read(path)
    state, notes = contained(content, name)
    check_tensors(state, path.stat().st_size, name)
    cfg: Any = model.pretrained_cfg
    found = cfg.get("classifier") or ()
    heads = (found,) if isinstance(found, str) else tuple(found)
    chosen = choose(state, model, heads)
    try:
        state = converted(chosen.body, model) | chosen.head
    except Exception as e:  # timm expects the model's own weights
        raise UserError(f"{name} does not fit the model {said(cfg)}: {type(e).__name__}: {taps.why(e)}") from None
    classes = set_classes(model, state, heads)
    own = {k: v for k, v in model.state_dict().items() if k in state or not k.endswith(COUNTER)}
    if why := unfit(state, own):
        arch = content.get("arch") if isinstance(content, dict) else None
        hint = f"; the file says that it is of {arch!r:.60}" if isinstance(arch, str) else ""
        raise UserError(f"{name} does not fit the model {said(cfg)}: {why}{hint}; pass its --model and --model_args")
    values = {k: state[k].to(v.dtype) for k, v in own.items()}
    if broken := [k for k, v in values.items() if not v.isfinite().all()]:
        raise UserError(f"{name} holds numbers that are not finite, in {few(broken)} of the model's tensors")
    model.load_state_dict(model.state_dict() | values)
    notes += chosen.notes
    if left := [*chosen.left, *(k for k in state if k not in own)]:
        notes.append(f"does not use {few(left)} of its tensors")
    if not classes:
        notes.append("has no classifier for this model")
    return Start(model, file_hash(path), [f"{path.name} {note}" for note in notes])


def said(cfg: dict[str, Any]) -> str:
    """A model's architecture, quoted."""
    return repr(cfg.get("architecture"))


def read(path: Path) -> Any:
    """What a weight file holds. Raises ``UserError`` for what is none, and for a pickle that wants more than data."""
    if not os.path.exists(path):
        raise UserError(f"no weight file {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        check_archive(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch's advice to read all of it
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as e:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(e))
        what = f"{wanted[1]!r:.80}" if wanted else "more than tensors and plain data"
        raise UserError(f"{path} is a pickle that needs {what}, which is not read for safety; {AGAIN}") from None
    except Exception as e:  # torch, zipfile and safetensors raise what comes
        raise UserError(f"{path} cannot be read: {type(e).__name__}: {taps.why(e)}") from None


def check_archive(path: Path) -> None:
    """Raise ``UserError`` for what ``torch.save`` did not write: neither zip nor pickle, or a zip that grows."""
    with path.open("rb") as file:
        head = file.read(16)
    if not head.startswith((b"PK", b"\x80")):
        what = f"it begins with {head!r}" if head else "it is empty"
        raise UserError(f"{path} is not a file of torch.save: {what}")
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if packed or sum(part.file_size for part in parts) > path.stat().st_size:
        raise UserError(
            f"{path} is a compressed zip, as TorchScript or an archiver writes it, and not a file of torch.save"
        )


def check_tensors(state: State, size: int, where: str) -> None:
    """Raise ``UserError`` for tensors that are not plain, and for those that claim more than the file has bytes."""
    for name, value in state.items():
        plain = value.layout is torch.strided and not value.is_nested and not value.is_quantized
        if not plain or value.device.type != "cpu":
            raise UserError(
                f"{where}: {printable(name)} is not a plain tensor: it is sparse, quantised or without numbers"
            )
        if value.numel() * value.element_size() > size:
            raise UserError(
                f"{where}: {printable(name)} claims to have {value.numel():,} numbers, but the file has fewer"
            )


def set_classes(model: Any, state: State, heads: tuple[str, ...]) -> int:
    """Give the model as many classes as the file has; without a classifier that fits, none. Returns how many."""
    own = of(heads, model.state_dict())
    if not own:  # no classifier that timm names: the file's must be of the same number
        return model.num_classes
    given = of(heads, state)
    same = given.keys() == own.keys() and all(
        given[k].ndim == v.ndim and given[k].shape[1:] == v.shape[1:] for k, v in own.items()
    )
    rows = {value.shape[0] for value in given.values() if value.ndim}
    classes = rows.pop() if same and len(rows) == 1 else 0
    if classes != model.num_classes:
        model.reset_classifier(classes)
    return classes


def of(heads: tuple[str, ...], state: State) -> State:
    """The tensors of the classifiers."""
    return {k: v for k, v in state.items() if k.startswith(tuple(f"{head}." for head in heads))}


def unfit(state: State, own: State) -> str:
    """In what a state dict does not fit; empty where it does."""

    def shape(value: Tensor) -> str:
        return "x".join(map(str, value.shape)) or "a number"

    missing = [k for k in own if k not in state]
    other = [k for k, v in own.items() if k in state and state[k].shape != v.shape]
    kind = [k for k, v in own.items() if k in state and state[k].is_floating_point() != v.is_floating_point()]
    words = []
    if missing:
        words.append(f"of the model's {len(own)} tensors it lacks {few(missing)}")
        if unknown := [k for k in state if k not in own]:
            words.append(f"it has {few(unknown)} that the model does not")
    if other:
        first = other[0]
        words.append(
            f"the shapes of {few(other)} differ: {first} is {shape(state[first])} there and {shape(own[first])} here"
        )
    if kind:
        words.append(f"the number types of {few(kind)} differ: {kind[0]} is {state[kind[0]].dtype}")
    return ", ".join(words)
