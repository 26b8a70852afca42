"""PreciseBN: statistics are the plain average over the batches of the epoch that ended, and nothing else changes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny import make_photos, make_recipe
from torch import nn

from mixers import Mixup, Step, build
from mixup_recipes.data.images import TrainTransform
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.splits import load_splits
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import backbones, precise_bn
from mixup_recipes.training.update import criterion, inputs

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two micro-batches of 8 an update, four updates an epoch, MixUp; 20 images round up to two updates."""
    folder = tmp_path_factory.mktemp("precise")
    return load_recipe(str(make_recipe(folder, make_photos(folder / "photos"))), mixer="mixup")


@pytest.fixture
def samples(recipe):
    return Samples(load_splits(recipe).train, recipe, TrainTransform(recipe))


def make_step(recipe):
    """A step whose statistics have drifted, with a layer that no forward reaches."""
    step = Step(backbones.create_model(recipe), build("mixup", alpha=0.4), criterion(recipe))
    step.mixer.unused = nn.BatchNorm2d(2)
    for name, buffer in step.named_buffers():
        buffer.copy_(torch.full_like(buffer, 7 if "num" in name else 3))
    return step


def refresh(step, samples, recipe, rank=0, world=1):
    """As after epoch 2: the epochs have updates 0-3, 4-7, 8-11."""
    accelerator = SimpleNamespace(process_index=rank, num_processes=world, device=DEVICE)
    precise_bn.refresh(step, samples, recipe, 2, 0, accelerator)


def test_statistics_are_the_average_over_the_mixed_batches_of_the_epoch_that_ended(recipe, samples):
    batches = list(samples.train_batches(TrainOrder(len(samples), recipe, 0, 1), 0, DEVICE))
    for world, rank, micros in ((1, 0, (0, 1)), (2, 0, (0,)), (2, 1, (1,))):
        step, by_hand = make_step(recipe), make_step(recipe).train()
        seen = {name: [] for name, layer in by_hand.named_modules() if isinstance(layer, nn.BatchNorm2d)}
        for name, found in seen.items():
            by_hand.get_submodule(name).register_forward_pre_hook(lambda _, args, found=found: found.append(args[0]))
        for update, micro in ((u, m) for u in (4, 5) for m in micros):
            pixels, labels, *_ = batches[2 * update + micro]
            by_hand(*inputs(pixels, labels, recipe, update, micro, DEVICE))
        refresh(step, samples, recipe, rank, world)
        layers, ran = dict(step.named_modules()), {name: xs for name, xs in seen.items() if xs}
        assert ran
        for name, xs in ran.items():
            mean = torch.stack([x.double().mean((0, 2, 3)) for x in xs]).mean(0).float()
            var = torch.stack([x.double().var((0, 2, 3), unbiased=True) for x in xs]).mean(0).float()
            torch.testing.assert_close(layers[name].running_mean, mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layers[name].running_var, var, rtol=1e-4, atol=1e-5)


def test_nothing_but_the_statistics_of_layers_that_ran_changes_and_nothing_at_all_after_a_failure(recipe, samples):
    step = make_step(recipe)
    loss, norms = step.criterion, [m for m in step.modules() if isinstance(m, nn.BatchNorm2d)]
    before, momenta = {k: v.clone() for k, v in step.state_dict().items()}, [m.momentum for m in norms]
    step.criterion = lambda logits, target: 1 / 0
    with pytest.raises(ZeroDivisionError):
        refresh(step, samples, recipe)
    assert all(torch.equal(v, before[k]) for k, v in step.state_dict().items())
    assert not any(m._forward_pre_hooks for m in step.modules())

    step.criterion = loss
    refresh(step, samples, recipe)
    changed = {k for k, v in step.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.endswith(("running_mean", "running_var")) and "unused" not in k}
    assert [m.momentum for m in norms] == momenta
    assert not any(m._forward_pre_hooks for m in step.modules())
    assert not any(p.grad is not None for p in step.parameters())


def test_more_images_than_an_epoch_has_are_one_epoch(recipe, samples):
    whole, more = make_step(recipe), make_step(recipe)
    for step, count in ((whole, 64), (more, 10**6)):
        refresh(step, samples, dataclasses.replace(recipe, precise_bn_samples=count))
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), more.buffers(), strict=True))


class Frozen(nn.BatchNorm2d):
    """A teacher that stays in evaluation mode."""

    def train(self, mode=True):
        return super().train(False)


class Taught(Mixup):
    """A mixer that looks at the images through its teacher."""

    def __init__(self):
        super().__init__(0.4)
        self.teacher, self.seen = Frozen(3), []

    def plan(self, x, y, rng, *look):
        self.seen.append(self.teacher(x).detach())
        return super().plan(x, y, rng, *look)


def test_a_frozen_teacher_sees_with_its_own_statistics(recipe, samples):
    step = Step(backbones.create_model(recipe), Taught(), criterion(recipe)).train()
    teacher = step.mixer.teacher
    teacher.running_mean.fill_(100)
    refresh(step, samples, recipe)
    assert len(step.mixer.seen) == 4 and all((seen < -50).all() for seen in step.mixer.seen)
    assert (teacher.running_mean == 100).all() and (teacher.running_var == 1).all()
