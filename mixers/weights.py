"""Models of others: a configuration that is looked at before it is used, and weights that can be nothing but numbers.

Only ``config.json`` and ``model.safetensors`` of a folder or a repository are read, by these names. Those of a
repository are of one commit. Pickles are not read, no code of a repository is run, and what a configuration asks of
timm is checked.
"""

import difflib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

PREFIXES = ("hf-hub:", "hf_hub:")
SMALL = 2**23  # bytes of a configuration or a recipe, at the most
# arguments of timm's factory that say where weights come from or what is made of the model
NOT_OF_A_MODEL = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn",
    "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "features_only", "feature_cfg", "model_name",
}  # fmt: skip
SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}

NO_SAFETENSORS = "has no model.safetensors; weights in other files, such as pickles, are not read"


class NoWeights(ValueError):
    """The weights of a model cannot be had, or are refused. One line says why."""


def is_hub(name: str) -> bool:
    """Whether a model's name is one of the Hub."""
    return name.startswith(PREFIXES)


def fetch(name: str, *others: str) -> Path:
    """Download ``hf-hub:owner/name[@revision]``: a folder with config.json and model.safetensors of one commit.

    ``others``: files to have too where the repository has them. Raises ``NoWeights``, and what the Hub's client does.
    """
    repo, _, revision = name.partition(":")[2].partition("@")
    try:
        config = download(repo, "config.json", revision or None)
        commit = config.parent.name if config.parent.parent.name == "snapshots" else revision or None
        try:
            download(repo, "model.safetensors", commit)
        except RemoteEntryNotFoundError:
            raise NoWeights(f"{name} {NO_SAFETENSORS}") from None
        for other in others:
            try:
                download(repo, other, commit)
            except EntryNotFoundError:  # also that it is not here, without a network
                continue
    except RemoteEntryNotFoundError:
        raise NoWeights(f"{name} has no config.json: not a model of timm's kind") from None
    return config.parent


def download(repo: str, file: str, revision: str | None) -> Path:
    """One file into the cache. What is announced too large is not begun."""
    if not constants.HF_HUB_OFFLINE:
        size = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision)).size or 0
        cache = Path(constants.HF_HUB_CACHE)
        there = next(p for p in (cache.absolute(), *cache.absolute().parents) if p.exists())
        most = shutil.disk_usage(there).free if file.endswith(".safetensors") else SMALL
        if size > most:
            raise NoWeights(
                f"hf-hub:{repo}: {file} has {size / 1e6:,.0f} MB, and {most / 1e6:,.0f} MB are the most here"
            )
    return Path(hf_hub_download(repo, file, revision=revision))


def load(folder: Path, name: str, **args: Any) -> nn.Module:
    """The model of a folder with config.json and model.safetensors, through timm. ``args``: instead of the config's.

    Raises ``NoWeights`` for a configuration that is none of a classifier of timm or of a registered architecture, and
    for weights that do not fit.
    """
    config = checked(folder / "config.json", name)
    if not (folder / "model.safetensors").is_file():
        raise NoWeights(f"{name} {NO_SAFETENSORS}")
    with tempfile.TemporaryDirectory() as aside:  # so that timm sees these two files and no others
        (Path(aside) / "config.json").write_text(json.dumps(config))
        (Path(aside) / "model.safetensors").symlink_to((folder / "model.safetensors").absolute())
        try:
            check_size(f"local-dir:{aside}", (folder / "model.safetensors").stat().st_size, name)
            model = timm.create_model(f"local-dir:{aside}", pretrained=True, **args)
            if "num_classes" not in args:
                check_classifier(model, folder / "model.safetensors", name)
            return model
        except NoWeights:
            raise
        except Exception as e:  # timm and safetensors raise what comes
            why = " ".join(str(e).replace(aside, str(folder)).split())[:300]
            raise NoWeights(f"cannot load model {name!r}: {type(e).__name__}: {why}") from None


def check_classifier(model: Any, file: Path, name: str) -> None:
    """Raise ``NoWeights`` when the classifier is not the file's: timm draws one where numbers of classes differ."""
    heads = model.pretrained_cfg.get("classifier") or ()
    with safe_open(file, "pt") as saved:
        for key in (f"{head}.weight" for head in ((heads,) if isinstance(heads, str) else heads)):
            if key not in saved.keys():  # noqa: SIM118 it is no dict
                continue
            there, here = saved.get_tensor(key), model.state_dict().get(key)
            if here is None or here.numel() != there.numel() or not there.to(here).view_as(here).equal(here):
                raise NoWeights(
                    f"{name}: the weights know {len(there)} classes, which is not what config.json says in num_classes "
                    "and model_args"
                )


def check_size(address: str, size: int, name: str) -> None:
    """Raise ``NoWeights`` when a configuration describes more numbers than the weights have bytes. Allocates nothing.

    The meta device has no memory but takes time: one that describes far more is not built to its end. Numbers count
    twice there when a layer is replaced while a model is built, and buffers need not be among the weights.
    """
    seen = 0

    def count(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal seen
        if tensor is not None and tensor.is_meta:
            seen += tensor.numel()
            if seen > 4 * size:
                raise NoWeights(f"{name}: config.json describes more than {seen:,} numbers, the weights hold fewer")

    hooks = (register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count))
    try:
        with torch.device("meta"):
            model = timm.create_model(address, pretrained=False)
    finally:
        for hook in hooks:
            hook.remove()
    if (numbers := sum(p.numel() for p in model.parameters())) > size:
        raise NoWeights(f"{name}: config.json describes {numbers:,} numbers, the weights hold fewer")


def checked(path: Path, name: str) -> dict[str, Any]:
    """A model's configuration without what says where weights lie. Raises ``NoWeights`` for what is no such thing."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise NoWeights(f"{name}: config.json cannot be read: {' '.join(str(e).split())[:160]}") from None
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise NoWeights(f"{name}: config.json names no architecture: not a model of timm's kind")
    if ":" in architecture or not timm.is_model(architecture):
        raise NoWeights(f"{name} is a {architecture[:80]!r}, which timm does not have{like(architecture)}")
    args, nested = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    if not isinstance(args, dict) or not isinstance(nested, dict):
        raise NoWeights(f"{name}: config.json: model_args and pretrained_cfg must be tables")
    if odd := sorted(NOT_OF_A_MODEL & args.keys()):
        raise NoWeights(f"{name}: config.json gives the model the argument {odd[0]!r}, which is none of a model's")
    for key, value in [*args.items(), ("num_classes", config.get("num_classes"))]:
        if largest(value) > (10**6 if key == "num_classes" else 10**4):
            raise NoWeights(f"{name}: config.json asks for {key} {str(value)[:80]}: no classifier is that large")
    config["pretrained_cfg"] = {k: v for k, v in nested.items() if k not in SOURCES}
    if not nested:  # written by an older timm: one table
        config = {k: v for k, v in config.items() if k not in SOURCES and k != "pretrained_cfg"}
    return config


def like(architecture: str) -> str:
    """The end of a sentence: the architecture that may have been meant, if any."""
    close = difflib.get_close_matches(architecture, timm.list_models(), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def largest(value: Any) -> int | float:
    """The largest number in nested lists and tables."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return max(map(largest, value), default=0)
    return abs(value) if isinstance(value, int | float) else 0
