"""Activations that are computed anew in the backward pass: the same numbers, or a refusal, with every mixer."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from marks import slow_unless
from resuming import log
from torch import nn

from mixers import MIXERS
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.training import launch
from mixup_recipes.training.backbones import checkpoint_activations, create_model, hold_statistics
from mixup_recipes.training.dryrun import activation_bytes, try_checkpointed
from mixup_recipes.training.update import new_step, one_hot
from mixup_recipes.typed import UserError

MODELS = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},  # its blocks end in BatchNorm
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 3, "drop_path_rate": 0.3},
}
INSIDE = {"manifoldmix", "alignmix", "nfm", "noisymix", "patchup", "softpatchup", "catchupmix"}
REFUSED = {
    "mobilenetv3_small_050": INSIDE | {"automix", "samix", "adautomix"},
    "resnet10t": INSIDE | {"automix", "samix", "adautomix"},
    "deit_tiny_patch16_224": INSIDE | {"tokenmixup"},
}
# what the others have none of
ATTENTION = {"transmix", "tokenmix", "smmix", "mixpro", "tlalign", "mixtoken", "tokenmixup", "mergemix"}
QUICK = {"mixup", "manifoldmix", "alignmix", "automix", "puzzlemix", "transmix"}
CASES = [(model, mixer) for model in MODELS for mixer in MIXERS if "deit" in model or mixer not in ATTENTION]


def recipe(model: str, mixer: str, **changes) -> Recipe:
    args: dict[str, Any] = {mixer: {}}
    base = Recipe(dataset="none", model=model, model_args=MODELS[model], mixer=mixer, mixer_args=args)
    return changed(base, num_classes=10, image_size=64, eval_size=64, eval_resize=64, smoothing=0.1, **changes)


def two_updates(r: Recipe) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, the gradients of the second update, and all that the model counts."""
    step, losses = new_step(create_model(r), r).train(), []
    for number in range(2):
        torch.manual_seed(5 + number)
        x, y = torch.randn(8, 3, 64, 64), one_hot(torch.arange(8), r)
        step.zero_grad()
        loss = step(x, y, np.random.default_rng((0, number))).loss
        loss.backward()
        step.mixer.after_step(step.model, 0.3)
        losses.append(loss.item())
    grads = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    return losses, grads, dict(step.named_buffers())


@pytest.mark.parametrize(("model", "mixer"), slow_unless(lambda case: case[1] in QUICK, CASES))
def test_gradients_losses_and_statistics_are_equal_or_the_mixer_is_refused(model, mixer):
    r = recipe(model, mixer, grad_checkpointing=True)
    if mixer in REFUSED[model]:
        with pytest.raises(UserError, match=f"^mixer '{mixer}' needs activations of '{model}' that grad_checkpointing"):
            try_checkpointed(new_step(create_model(r), r), r)
        return
    try_checkpointed(new_step(create_model(r), r), r)
    (plain, grads, counts), (again, others, counted) = two_updates(changed(r, grad_checkpointing=False)), two_updates(r)
    assert plain == again and grads.keys() == others.keys() and counts.keys() == counted.keys()
    assert all(torch.equal(grads[name], others[name]) for name in grads)
    assert all(torch.equal(counts[name], counted[name]) for name in counts)


def test_fewer_activations_are_kept_and_a_trial_leaves_the_step_as_it_was():
    for model in MODELS:
        plain, kept = (create_model(recipe(model, "mixup", grad_checkpointing=g)) for g in (False, True))
        assert activation_bytes(kept, 8, 64) < 0.75 * activation_bytes(plain, 8, 64)
    r = recipe("resnet10t", "mixup", grad_checkpointing=True)
    step = new_step(create_model(r), r)
    before = {name: value.clone() for name, value in step.state_dict().items()}
    try_checkpointed(step, r)
    assert all(torch.equal(before[name], value) for name, value in step.state_dict().items())
    assert all(p.grad is None for p in step.parameters())


def test_layers_that_are_shared_between_gpus_count_once_too(monkeypatch):
    r = recipe("resnet10t", "mixup", grad_checkpointing=True, sync_bn=True)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    net = launch.on_device(create_model(r), r, Mock(num_processes=2, device=Mock(type="cuda")))
    layers = [m for m in net.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert layers and all(hold_statistics in layer._forward_pre_hooks.values() for layer in layers)


def test_a_model_that_cannot_is_refused():
    with pytest.raises(UserError, match=r"^model 'none' cannot compute its activations again; leave out grad_check"):
        checkpoint_activations(nn.Linear(2, 2), "none")


def test_a_run_ends_in_the_same_weights(reference):
    own = ("--model", "resnet10t", "--mixer", "cutmix", "--epochs", 1)
    plain, checkpointed = reference(*own), reference("--grad_checkpointing", "true", *own)
    assert log(plain) == log(checkpointed)
    assert (plain / "model.safetensors").read_bytes() == (checkpointed / "model.safetensors").read_bytes()
