"""PreciseBN: statistics are the plain average over the batches of the epoch that ended, and nothing else changes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny import make_photos, make_recipe
from torch import nn

from mixers import Mixup, Step, build
from mixup_recipes.data import images
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.data.splits import load_splits
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import backbones, precise_bn
from mixup_recipes.training.update import criterion, inputs

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two micro-batches of 8 an update, four updates an epoch, MixUp; 20 images round up to two updates."""
    folder = tmp_path_factory.mktemp("precise")
    return load_recipe(str(make_recipe(folder, make_photos(folder / "photos"))), mixer="mixup")


@pytest.fixture
def samples(recipe: Recipe) -> Samples:
    return Samples(load_splits(recipe).train, recipe, images.TrainTransform(recipe))


def make_step(recipe: Recipe) -> Step:
    """A step whose statistics have drifted, with a layer that no forward reaches."""
    step = Step(backbones.create_model(recipe), build("mixup", alpha=0.4), criterion(recipe))
    step.mixer.unused = nn.BatchNorm2d(2)
    for name, buffer in step.named_buffers():
        buffer.copy_(torch.full_like(buffer, 7 if "num" in name else 3))
    return step


def refresh(step: Step, samples: Samples, recipe: Recipe, epoch: int = 2, rank: int = 0, world: int = 1) -> None:
    accelerator = SimpleNamespace(process_index=rank, num_processes=world, device=DEVICE)
    precise_bn.refresh(step, samples, recipe, epoch, 0, accelerator)


def by_hand(step: Step, samples: Samples, recipe: Recipe, micro_batches: list[tuple[int, int]]) -> dict:
    """Means and variances that the layers see in these (update, micro) batches, averaged in float64."""
    layers = {n: m for n, m in step.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen: dict[str, list] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
    step.train()
    batches = list(samples.train_batches(TrainOrder(len(samples), recipe, 0, 1), 0, DEVICE))
    for update, micro in micro_batches:
        pixels, labels, *_ = batches[2 * update + micro]
        step(*inputs(pixels, labels, recipe, update, micro, DEVICE))

    def averages(xs: list) -> list:
        pairs = [(x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=True)) for x in xs]
        return [torch.stack(values).mean(0).float() for values in zip(*pairs, strict=True)]

    return {name: averages(xs) for name, xs in seen.items()}


@pytest.mark.parametrize(("world", "rank", "micros"), [(1, 0, (0, 1)), (2, 0, (0,)), (2, 1, (1,))])
def test_statistics_are_the_average_over_the_mixed_batches_of_the_epoch_that_ended(
    recipe: Recipe, samples: Samples, world: int, rank: int, micros: tuple[int, ...]
) -> None:
    step = make_step(recipe)
    expected = by_hand(make_step(recipe), samples, recipe, [(u, m) for u in (4, 5) for m in micros])
    refresh(step, samples, recipe, epoch=2, rank=rank, world=world)  # epochs have updates 0-3, 4-7, 8-11
    layers = dict(step.named_modules())
    assert expected
    for name, (mean, var) in expected.items():
        torch.testing.assert_close(layers[name].running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layers[name].running_var, var, rtol=1e-4, atol=1e-5)


def test_nothing_but_the_statistics_of_layers_that_ran_changes(recipe: Recipe, samples: Samples) -> None:
    step = make_step(recipe)
    before = {k: v.clone() for k, v in step.state_dict().items()}
    momenta = [m.momentum for m in step.modules() if isinstance(m, nn.BatchNorm2d)]
    refresh(step, samples, recipe)
    changed = {k for k, v in step.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.endswith(("running_mean", "running_var")) and "unused" not in k}
    assert [m.momentum for m in step.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert not any(m._forward_pre_hooks for m in step.modules())
    assert not any(p.grad is not None for p in step.parameters())


def test_more_images_than_an_epoch_has_are_one_epoch(recipe: Recipe, samples: Samples) -> None:
    whole, more = make_step(recipe), make_step(recipe)
    refresh(whole, samples, dataclasses.replace(recipe, precise_bn_samples=64))
    refresh(more, samples, dataclasses.replace(recipe, precise_bn_samples=10**6))
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), more.buffers(), strict=True))


class Frozen(nn.Module):
    """A teacher that stays in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.seen = nn.BatchNorm2d(3), []

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class Taught(Mixup):
    """A mixer that looks at the images through its teacher."""

    def __init__(self) -> None:
        super().__init__(0.4)
        self.teacher = Frozen()

    def plan(self, x, y, rng, *look):
        self.teacher.seen.append(self.teacher.norm(x).detach())
        return super().plan(x, y, rng, *look)


def test_a_frozen_teacher_sees_with_its_own_statistics(recipe: Recipe, samples: Samples) -> None:
    step = Step(backbones.create_model(recipe), Taught(), criterion(recipe)).train()
    teacher = step.mixer.teacher
    teacher.norm.running_mean.fill_(100)
    refresh(step, samples, recipe)
    assert len(teacher.seen) == 4
    assert all((seen < -50).all() for seen in teacher.seen)
    assert (teacher.norm.running_mean == 100).all() and (teacher.norm.running_var == 1).all()


def test_a_failure_leaves_the_layers_as_they_were(recipe: Recipe, samples: Samples) -> None:
    step = make_step(recipe)
    before = {k: v.clone() for k, v in step.state_dict().items()}
    step.criterion = lambda logits, target: 1 / 0
    with pytest.raises(ZeroDivisionError):
        refresh(step, samples, recipe)
    assert all(torch.equal(v, before[k]) for k, v in step.state_dict().items())
    assert not any(m._forward_pre_hooks for m in step.modules())
