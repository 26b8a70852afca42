"""Runs start from weight files of others: any wrapping is understood, what does not fit or harms is refused."""

import argparse
import json
import os
import pickle
import re
import shutil
import signal
import zipfile

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from resuming import LOG, SHORT
from safetensors.torch import save_file
from teachers import fill

from mixers import taps
from mixup_recipes.files import file_hash
from mixup_recipes.recipe import Recipe
from mixup_recipes.runs.run import Run
from mixup_recipes.training.backbones import create_model, load_model, load_start, start_from
from mixup_recipes.typed import UserError


def recipe(path, model="test_resnet", classes=5, **args):
    return Recipe(dataset="x", model=model, model_args=args, num_classes=classes, pretrained=str(path))


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def other(state):
    """Tensors of the same names and shapes with other numbers."""
    return {name: value + 1 for name, value in state.items()}


def openmixup(state, body="backbone.", head="head."):
    """Names as in OpenMixup, of a model whose classifier is called fc."""
    return {(head if name.startswith("fc.") else body) + name: value for name, value in state.items()}


def automix(state):
    """A checkpoint of OpenMixup's AutoMix: ``state`` in the momentum encoder, and two more names of it."""
    q, k = openmixup(other(state), "backbone_q.", "head_mix_q."), openmixup(state, "backbone_k.", "head_mix_k.")
    one = openmixup(other(state), "backbone.", "head_one_k.") | openmixup(other(state))
    return one | q | k | {"mix_block.query.weight": torch.ones(2)}


def without_counters(state):
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


WRAPPED = {  # what is saved, and what is said of it
    "plain.pt": (lambda s: s, None),
    "plain.safetensors": (lambda s: s, None),
    "legacy.pth.tar": (lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"param_groups": [{"lr": 0.1}]}}, None),
    "timm.pth.tar": (lambda s: {"arch": "x", "args": argparse.Namespace(lr=1), "state_dict": s}, None),
    "average.pth.tar": (
        lambda s: {"state_dict": other(s), "state_dict_ema": under("module.", s)},
        "has several state dicts: state_dict_ema is used, not state_dict",
    ),
    "facebook.pth": (lambda s: {"model": s}, None),
    "compiled.pth": (lambda s: under("module._orig_mod.", s), None),
    "part.pth": (lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()}, None),
    "lightning.ckpt": (
        lambda s: {"state_dict": under("net.", s) | {"criterion.weight": torch.ones(5)}, "hyper_parameters": {"lr": 1}},
        "does not use 1 (criterion.weight) of its tensors",
    ),
    "both.ckpt": (lambda s: {"state_dict": under("model.", other(s)) | under("ema_model.", s)}, "not model"),
    "beside.ckpt": (lambda s: other(s) | under("ema.", s), "has several models: ema is used, not the names without it"),
    "split.ckpt": (lambda s: {k.replace("head.fc.", "head."): v for k, v in openmixup(s).items()}, None),
    "old.bin": (without_counters, None),
    "half.pth": (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, None),
    "openmixup.pth": (lambda s: {"meta": {"CLASSES": ("a", "b")}, "state_dict": openmixup(s)}, None),
    "of_timm.pth": (lambda s: {"state_dict": under("module.", openmixup(s, "backbone.timm_model."))}, None),
    "automix.pth": (lambda s: {"state_dict": automix(s)}, "has several models: backbone_k and head_mix_k are used"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_the_model_is_found_in_whatever_it_was_wrapped(name, tmp_path, model):
    wrap, words = WRAPPED[name]
    state = {k: v.half().to(v.dtype) for k, v in model.state_dict().items()}
    if name.endswith(".safetensors"):
        save_file(wrap(state), tmp_path / name)
    else:
        torch.save(wrap(state), tmp_path / name, _use_new_zipfile_serialization=name != "legacy.pth.tar")
    start = load_start(recipe(tmp_path / name))
    found = start.model.state_dict()
    assert found.keys() == state.keys()
    assert all(found[k].equal(v) for k, v in (without_counters(state) if name == "old.bin" else state).items())
    assert all(note.startswith(f"{name} ") for note in start.notes)
    assert any(words in note for note in start.notes) if words else not start.notes
    assert start.sha256 == file_hash(tmp_path / name)
    fresh = create_model(recipe(tmp_path / name))
    assert start_from(fresh, start.model, list("abcde")) == "with its head"


# What OpenMixup's tools/model_converters/timm_to_openmixup_dir.py does to a vision transformer of timm.
TRANSFORMER = (
    (r"patch_embed\.proj\.", "patch_embed.projection."), (r"mlp\.fc1\.", "ffn.layers.0.0."), ("blocks", "layers"),
    (r"mlp\.fc2\.", "ffn.layers.1."), (r"\.norm", ".ln"), ("^norm", "ln1"), ("^head", "head.layers.head"),
)  # fmt: skip
# The names in OpenMixup's openmixup/models/backbones/convnext.py, from those of timm.
CONVNEXT = (
    (r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"), (r"\.blocks", ""),
    (r"conv_dw", "depthwise_conv"), (r"mlp\.fc", "pointwise_conv"), (r"^head\.norm", "norm3"),
)  # fmt: skip


@pytest.mark.parametrize(
    "name, rules, sample",
    [
        ("test_vit", TRANSFORMER, "backbone.layers.1.ffn.layers.0.0.weight"),
        ("deit_tiny_patch16_224", TRANSFORMER, "backbone.layers.11.ln2.bias"),
        ("test_convnext", CONVNEXT, "backbone.stages.1.0.pointwise_conv2.weight"),
    ],
)
def test_transformers_and_convnexts_of_openmixup_are_the_same_under_other_names(name, rules, sample, tmp_path):
    net, given = fill(timm.create_model(name, num_classes=5)), {}
    for key, value in net.state_dict().items():
        for ours, theirs in rules:
            key = re.sub(ours, theirs, key)
        given[key if key.startswith("head.") else f"backbone.{key}"] = value
    assert sample in given and len(given) == len(net.state_dict())
    torch.save({"state_dict": given}, tmp_path / "x.pth")
    start = load_start(recipe(tmp_path / "x.pth", name))
    assert not start.notes and all(v.equal(net.state_dict()[k]) for k, v in start.model.state_dict().items())


def test_a_resnet_of_torchvision_says_the_same_and_a_published_form_goes_through_timms_own_conversion(tmp_path):
    theirs = fill(torchvision.models.resnet18(num_classes=5)).eval()
    torch.save(openmixup(theirs.state_dict()), tmp_path / "r18.pth")
    ours = load_start(recipe(tmp_path / "r18.pth", "resnet18")).model.eval()
    x = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))
    net = fill(timm.create_model("test_vit", num_classes=5))
    flat = {k: v.flatten(1) if k == "patch_embed.proj.weight" else v for k, v in net.state_dict().items()}
    torch.save(flat, tmp_path / "vit.pth")
    found = load_start(recipe(tmp_path / "vit.pth", "test_vit", img_size=80)).model.state_dict()
    assert found["patch_embed.proj.weight"].equal(net.patch_embed.proj.weight)
    assert found["pos_embed"].shape != net.pos_embed.shape


@pytest.mark.parametrize(
    "head, classes, note",
    [
        ({"fc.weight": torch.ones(7, 96), "fc.bias": torch.ones(7)}, 7, None),
        ({}, 0, "has no classifier for this model"),
        ({"fc.weight": torch.ones(5, 9), "fc.bias": torch.ones(5)}, 0, "does not use 2 (fc.weight, fc.bias)"),
        ({"fc.weight": torch.tensor(1.0), "fc.bias": torch.ones(5)}, 0, "does not use 2"),
        ({"fc.0.weight": torch.ones(9, 96), "fc.2.weight": torch.ones(5, 9)}, 0, "does not use 2"),
    ],
)
def test_a_classifier_of_other_classes_is_drawn_anew_and_the_rest_is_kept(head, classes, note, tmp_path, model):
    assert model.fc.in_features == 96
    body = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    torch.save(body | head, tmp_path / "x.pth")
    start = load_start(recipe(tmp_path / "x.pth"))
    assert start.model.num_classes == classes and (note in " ".join(start.notes) if note else not start.notes)
    fresh, drawn = (create_model(recipe(tmp_path / "x.pth")) for _ in range(2))
    assert start_from(fresh, start.model, list("abcde")) == "with a new head for 5 classes"
    weight = drawn.fc.weight * (0.01 / drawn.fc.weight.std())  # as it was drawn, but small
    wanted = drawn.state_dict() | body | {"fc.weight": weight, "fc.bias": torch.zeros(5)}
    for k, v in fresh.state_dict().items():
        torch.testing.assert_close(v, wanted[k], rtol=1e-5, atol=0)


class Harm:
    """Makes a pickle that leaves a mark when it is really read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path / "ran"),)


def rewritten(path, state, edit=lambda content: content, **options):
    """A file of torch.save as a zip of our own."""
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in parts.items():
            archive.writestr(name, edit(content) if name.endswith("data.pkl") else content)


def cut_off(save, path, state):
    """A file whose end is missing."""
    save(state, path)
    os.truncate(path, path.stat().st_size // 2)


def save_knot(path):
    """A table that holds itself."""
    table = {"epoch": 3}
    table["model"] = table
    torch.save(table, path)


def swapped(state, name, value):
    return {k: value if k == name else v for k, v in state.items()}


REFUSED = {  # how the file comes about, and what is said of it
    "gone.pth": (lambda p, s: None, "no weight file"),
    "empty.pth": (lambda p, s: p.touch(), "it is empty"),
    "page.pth": (lambda p, s: p.write_text("<!DOCTYPE html>"), "it begins with b'<!DOCTYPE html>'"),
    "page.safetensors": (lambda p, s: p.write_text("<!DOCTYPE html>"), "SafetensorError"),
    "folder.pth": (lambda p, s: p.mkdir(), "has no config.json and model.safetensors"),
    "pipe.pth": (lambda p, s: os.mkfifo(p), "is not a regular file"),
    "weights.npz": (lambda p, s: p.touch(), "expected a weight file that ends .pth, .pth.tar"),
    "number.pt": (lambda p, s: torch.save(3, p), "holds no state dict"),
    "tensor.pt": (lambda p, s: torch.save(torch.ones(3), p), "holds a Tensor"),
    "epochs.pt": (lambda p, s: torch.save({"epoch": 3, "state_dict": {}}, p), "holds 2 (epoch, state_dict) of other"),
    "knot.pt": (lambda p, s: save_knot(p), "holds no state dict"),
    "short.pth": (lambda p, s: cut_off(torch.save, p, s), "cannot be read"),
    "short.safetensors": (lambda p, s: cut_off(save_file, p, s), "SafetensorError"),
    "harm.pth": (lambda p, s: torch.save(s | {"x": Harm(p.parent)}, p), "is a pickle that needs 'posix.mkdir'"),
    "harm.bin": (
        lambda p, s: torch.save(s | {"x": Harm(p.parent)}, p, _use_new_zipfile_serialization=False),
        "save its state dict alone with safetensors.torch.save_file",
    ),
    "harm.ckpt": (lambda p, s: p.write_bytes(pickle.dumps(Harm(p.parent), protocol=4)), "is a pickle that needs more"),
    "ancient.pt": (lambda p, s: p.write_bytes(pickle.dumps(Harm(p.parent), protocol=0)), "is not a file of torch.save"),
    "whole.pth": (lambda p, s: torch.save(torch.nn.Linear(2, 2), p), "needs 'torch.nn.modules.linear.Linear'"),
    "packed.pth": (lambda p, s: rewritten(p, s, compression=zipfile.ZIP_DEFLATED), "is a compressed zip"),
    "claim.pth": (
        lambda p, s: rewritten(p, {"a": torch.arange(10.0)}, lambda c: c.replace(b"K\n", b"J\xff\xff\xff\x00")),
        "does not match expected size" if torch.__version__ >= "2.14" else "a claims to have 16,777,215 numbers",
    ),
    "wide.pth": (lambda p, s: torch.save(s | {"x": torch.ones(1).expand(10**12)}, p), "x claims to have 1,000,"),
    "sparse.pth": (lambda p, s: torch.save(s | {"x": torch.eye(3).to_sparse()}, p), "x is not a plain tensor"),
    "escape.pth": (lambda p, s: torch.save({"\x1b[2J\n": torch.ones(1)}, p), "it has 1 (?[2J?) that"),
    "nan.pth": (
        lambda p, s: torch.save(swapped(s, "fc.bias", torch.full((5,), torch.nan)), p),
        "numbers that are not finite, in 1 (fc.bias)",
    ),
    "bytes.pth": (
        lambda p, s: torch.save(swapped(s, "bn1.bias", s["bn1.bias"].to(torch.int8)), p),
        "the number types of 1 (bn1.bias) differ: bn1.bias is torch.int8",
    ),
    "lacks.pth": (
        lambda p, s: torch.save({"arch": "resnet18", "model": {k: v for k, v in s.items() if "layer4" not in k}}, p),
        "(layer4.0.conv1.weight, layer4.0.bn1.weight, layer4.0.bn1.bias, ...); the file says that it is of 'resnet18'",
    ),
    "shape.pth": (
        lambda p, s: torch.save(swapped(s, "bn1.bias", torch.ones(3)), p),
        "the shapes of 1 (bn1.bias) differ: bn1.bias is 3 there and",
    ),
    "swin.pth": (
        lambda p, s: torch.save(under("backbone.", {"stages.0.w_msa.qkv": torch.ones(2), "norm3": torch.ones(2)}), p),
        "it has 2 (stages.0.w_msa.qkv, norm3) that the model does not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_harms_or_does_not_fit_is_one_line_and_nothing_of_it_runs(name, tmp_path, model):
    make, words = REFUSED[name]
    make(tmp_path / name, model.state_dict())
    with pytest.raises(UserError) as error:
        load_start(recipe(tmp_path / name))
    assert words in str(error.value) and str(error.value).isprintable(), str(error.value)
    assert not (tmp_path / "ran").exists()


def test_what_timm_cannot_convert_is_one_line(tmp_path, transformer):
    state = swapped(transformer.state_dict(), "pos_embed", torch.ones(1, 12, 64))
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd\.pth does not fit the model 'test_vit': \w+Error: "):
        load_start(recipe(tmp_path / "odd.pth", "test_vit", patch_size=8))


def test_who_cannot_take_a_weight_file_says_who_can(tmp_path, console, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(model.state_dict(), "resnet18.pth")  # begins like a name of timm
    (tmp_path / "x.jpg").touch()
    for command in ("evaluate resnet18.pth --dataset x", "predict resnet18.pth x.jpg", "evaluate gone.pt"):
        status, _, errors = console(*command.split())
        assert status == 2 and "train starts a run from it with --pretrained" in errors and "save_for_hf" in errors
    with pytest.raises(ValueError, match="a file of weights, which does not say what model they are of"):
        taps.Frozen("resnet18.pth")
    (tmp_path / "resnet18").touch()  # is one
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(timm, "create_model", lambda name, **_: f"timm's {name}")
    assert load_model("resnet18") == "timm's resnet18"


def arguments(tiny_recipe, folder):
    """Of a short run into ``folder/run`` that starts from ``folder/private/best.pth.tar``; and that file."""
    path = folder / "private" / "best.pth.tar"
    path.parent.mkdir()
    given = ("--recipe", tiny_recipe, "--output_dir", folder / "run", "--dataloader_num_workers", 0, *LOG, *SHORT)
    return (*given, "--pretrained", path), path


def noted(folder):
    return json.loads((folder / "run/env.json").read_text())["pretrained"]


def test_a_run_starts_from_a_weight_file_or_not_at_all_and_its_record_and_card_say_which(server, tiny_recipe, tmp_path):
    given, path = arguments(tiny_recipe, tmp_path)
    net = fill(timm.create_model("test_resnet", num_classes=7))
    torch.save({"state_dict": {k: v for k, v in net.state_dict().items() if k != "bn1.bias"}}, path)
    status, output = server.run(*given)
    assert status == 2 and output.count("error:") == 1 and "it lacks 1 (bn1.bias)" in output, output
    assert "Traceback" not in output and not (tmp_path / "run").exists()

    torch.save({"state_dict": net.state_dict(), "state_dict_ema": other(net.state_dict())}, path)
    status, output = server.run(*given)
    assert status == 0 and "best.pth.tar has several state dicts: state_dict_ema is used" in output, output
    assert f"starts from {path} with a new head for 4 classes" in output
    mark, card = file_hash(path), Run.open(tmp_path / "run").card
    assert noted(tmp_path) == {str(path): mark}
    assert f"| fine-tuned from | `best.pth.tar`, SHA-256 of the weights `{mark[:16]}` |" in card
    assert "private" not in card and "--pretrained WEIGHTS" in card
    assert "`WEIGHTS` stands for `best.pth.tar`, the weights that the run started from." in card


@pytest.mark.slow
def test_a_run_begins_again_from_the_same_file_only_and_goes_on_without_it(server, tiny_recipe, tmp_path, model):
    given, path = arguments(tiny_recipe, tmp_path)
    torch.save(model.state_dict(), path)
    before = {str(path): file_hash(path)}
    stopped = ["receive", "mixup_recipes.training.update:train_update", 2, signal.SIGKILL]
    assert server.run(*given, faults=[stopped])[0] == -signal.SIGKILL and noted(tmp_path) == before
    resumed = (*given, "--resume_from_checkpoint", "auto")
    torch.save(other(model.state_dict()), path)
    status, output = server.run(*resumed)
    assert status == 2 and "its weights have changed" in output and noted(tmp_path) == before, output
    torch.save(model.state_dict(), path)
    status, output = server.run(*resumed)
    assert status == 0 and "starts from" in output and noted(tmp_path) == before, output
    shutil.rmtree(path.parent)
    status, output = server.run(*resumed)
    assert status == 0 and "starts from" not in output and noted(tmp_path) == before, output
