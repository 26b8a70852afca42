"""Teachers: frozen, with the weights that were saved, and what is said where there are none."""

import copy
import json
import shutil
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from driver import free_port
from small_models import SWIN, X, unchanged
from timm.models import save_for_hf
from torch import nn

from mixers import taps, weights
from mixers.taps import Frozen
from mixers.testing import differences, equal, global_rngs
from mixers.weights import NoWeights
from mixup_recipes.training.backbones import load_model
from mixup_recipes.typed import UserError


@pytest.fixture
def saved(model, tmp_path):
    """A trained model in a folder, in the format of a run."""
    save_for_hf(model, tmp_path / "teacher", safe_serialization=True)
    return tmp_path / "teacher"


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_frozen_teacher_has_the_weights_that_were_saved_and_never_leaves_evaluation_mode(model, saved, prefix):
    generators = global_rngs()
    teacher = Frozen(f"{prefix}{saved}")
    assert not differences(generators, global_rngs())
    with torch.no_grad():
        expected = model.eval()(X)
    parent = nn.Sequential(teacher, nn.Linear(5, 5)).train()
    teacher.train()
    assert all(torch.equal(teacher(X), expected) for _ in range(2))
    assert not any(module.training for module in (teacher, *teacher.model.modules()))
    assert repr(teacher) == f"Frozen('{prefix}{saved}')" and not teacher(X).requires_grad
    assert [name for name, _ in parent.named_parameters()] == list(parent.state_dict()) == ["1.weight", "1.bias"]
    assert not list(parent.buffers())
    parent.requires_grad_(True)
    images = X.clone().requires_grad_()
    parent(images).sum().backward()
    assert images.grad.any()
    assert all(not p.requires_grad and p.grad is None for p in teacher.model.parameters())
    assert not any(isinstance(resets, nn.BatchNorm2d) for resets in parent.modules())


def test_a_module_is_frozen_as_a_copy_and_a_copy_of_that_has_a_model_of_its_own(model):
    with unchanged(model):
        teacher = Frozen(model)
    expected = teacher(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(teacher(X), expected) and repr(teacher) == "Frozen('ResNet')"
    parent = nn.Sequential(teacher).to(memory_format=torch.channels_last)
    assert teacher.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not equal(copy.deepcopy(parent)[0].model, teacher.model)


@pytest.mark.parametrize("network", ["offline", "no network"])
def test_weights_out_of_reach_are_one_line_at_once_and_cached_ones_load(network, saved, tmp_path, monkeypatch, capfd):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    endpoint, before = f"http://127.0.0.1:{free_port()}", network == "offline"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", before)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    out_of_reach = "HF_HUB_OFFLINE is set" if before else f"{endpoint} cannot be reached"
    for name, reason in {
        "resnet18.a1_in1k": f"not on this machine, and {out_of_reach}",
        "hf-hub:someone/nothing": f"not on this machine, and {out_of_reach}",
        "resnet18.no_such": "Invalid pretrained tag (no_such) for resnet18",
        "no_such_model": "Unknown model (no_such_model)",
        "empty": "empty: config.json cannot be read: [Errno 2] No such file or directory: 'empty/config.json'",
    }.items():
        with pytest.raises(ValueError) as caught:
            Frozen(name)
        assert str(caught.value) == (
            f"no weights for the teacher '{name}' ({reason}); expected timm weights such as "
            "'resnet18.tv_in1k', hf-hub:owner/name, or a run folder"
        )
        assert huggingface_hub.constants.HF_HUB_OFFLINE is before
    with pytest.raises(UserError) as caught:
        load_model("resnet18.a1_in1k")
    assert str(caught.value) == f"cannot load model 'resnet18.a1_in1k': not on this machine, and {out_of_reach}"
    assert capfd.readouterr() == ("", "")  # the Hub's client reports each of its attempts

    repo, commit = tmp_path / "cache/models--someone--net", "0123456789012345678901234567890123456789"
    shutil.copytree(saved, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    assert torch.equal(Frozen("hf-hub:someone/net")(X), Frozen(str(saved))(X))


def test_what_the_hub_answered_is_said_in_a_few_words(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    errors = huggingface_hub.errors
    unknown, busy = (SimpleNamespace(headers={}, request=None, status_code=status) for status in (None, 429))
    words = "404 Client Error. (Request ID: 1)\n\nRepository Not Found for url: http://hub"
    nobody = errors.RepositoryNotFoundError(words, response=unknown)
    missing = errors.LocalEntryNotFoundError("not in the cache")
    for error, cause, why in (
        (nobody, None, "the Hub has no such repository, or does not show it without a token"),
        (OSError(), None, "OSError"),
        (missing, errors.HfHubHTTPError("", response=busy), "not on this machine, and the Hub answered 429"),
        *((missing, e, "not on this machine, and http://hub cannot be reached") for e in (OSError(), None)),
    ):
        error.__cause__ = cause
        assert taps.why(error) == why


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("vit_tiny_patch16_224", {"depth": 9999, "embed_dim": 9999, "num_heads": 3}),
        ("vit_tiny_patch16_224", {"depth": 9999}),
        ("test_vit", {"depth": 30}),  # a little more than there is
        ("resnet18", {"layers": [2, 2, 9999, 2]}),
        (SWIN, {"window_size": 100, "img_size": 3200}),  # buffers, not parameters
    ],
)
def test_a_configuration_of_more_numbers_than_the_weights_is_never_built(saved, architecture, args, monkeypatch):
    config = json.loads((saved / "config.json").read_text()) | {"architecture": architecture, "model_args": args}
    (saved / "config.json").write_text(json.dumps(config))
    if architecture == "test_vit":  # this much: 30 layers of 64 channels have 1.5 million numbers
        (saved / "model.safetensors").write_bytes(bytes(10**6))
    create, devices, began = timm.create_model, [], time.monotonic()
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: devices.append(torch.empty(0).device.type) or create(*a, **k)
    )
    with pytest.raises(NoWeights, match=r"config.json describes (more than )?[\d,]+ numbers, the weights hold fewer"):
        weights.load(saved, "a stranger's")
    assert devices == ["meta"] and time.monotonic() - began < 30
    assert not torch.nn.modules.module._global_parameter_registration_hooks
