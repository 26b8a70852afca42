"""One update: what it is given, what it changes, and how few files a reader opens to follow it."""

import contextlib
import copy
import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import tiny
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from mixers import Step, build
from mixers.testing import differences
from mixup_recipes.data import keys
from mixup_recipes.data.images import erase, normalise
from mixup_recipes.data.loading import Loaded
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import progress
from mixup_recipes.training.optimisation import optimizer
from mixup_recipes.training.update import Learner, criterion, one_hot, prepared, train_update

CPU = torch.device("cpu")
SMALL = {"model": "test_resnet", "num_classes": 4, "image_size": 32, "batch_size": 8}


def recipe(**changes: Any) -> Recipe:
    """Two micro-batches an update, everything that an update may do."""
    own = {"per_device_train_batch_size": 4, "reprob": 0.5, "smoothing": 0.1, "drop_path_rate": 0.3, "epochs": 3}
    own |= {"clip_grad": 0.1, "ema_decay": 0.9, "ema_warmup_epochs": 1}
    return load_recipe("r50_100e_cutmix", **SMALL, **(own | changes))


def loaded(order: TrainOrder) -> Iterator[Loaded]:
    """What loaders would give: the images and labels are functions of their keys."""
    for batch in order:
        index = torch.tensor([key.index for key in batch])
        pixels = torch.stack([torch.full((3, 32, 32), int(i), dtype=torch.uint8) for i in index])
        yield pixels, index % 4, index, (index % 5 == 0).long()


def learner(r):
    torch.manual_seed(0)
    args = {} if r.drop_path_rate is None else {"drop_path_rate": r.drop_path_rate}
    model = timm.create_model(r.model, num_classes=4, **args)
    step = Step(model, build(r.mixer, **r.mixer_args[r.mixer]), criterion(r))
    ema = ModelEmaV3(model, decay=r.ema_decay) if r.ema_decay else None
    return Learner(step, step, optimizer(step, r), ema)


def alone(**changes: Any) -> SimpleNamespace:
    """What an update needs of accelerate."""
    plain = {"device": CPU, "backward": Tensor.backward, "clip_grad_norm_": torch.nn.utils.clip_grad_norm_}
    return SimpleNamespace(**plain | {"no_sync": lambda _: contextlib.nullcontext()} | changes)


def test_a_step_of_r50_100e_cutmix_passes_through_five_files():
    """``train_mixup.py``, which calls it, and these four: from a batch that is ready to the end of the update."""
    r = load_recipe("r50_100e_cutmix", **SMALL, per_device_train_batch_size=8)
    order, made, seen = TrainOrder(16, r, 0, 1), learner(r), set()
    batches = [next(prepared(loaded(order), order, CPU))]
    sys.setprofile(lambda frame, event, _: event == "call" and seen.add(frame.f_code.co_filename))
    try:
        train_update(made, iter(batches), order, 0, {}, alone())
    finally:
        sys.setprofile(None)
    ours = {file.removeprefix(f"{tiny.ROOT}/") for file in seen if file.startswith(str(tiny.ROOT))}
    ours = {file for file in ours if not file.startswith((".venv", "tests/"))}
    assert ours == {"mixup_recipes/training/update.py", "mixers/base.py", "mixers/cutmix.py", "mixers/ops.py"}


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_is_a_function_of_seed_update_and_micro_batch_and_made_when_it_is_asked_for(world):
    r = recipe(seed=3)
    orders = [TrainOrder(40, r, rank, world, start=4) for rank in range(world)]
    batches = [prepared(loaded(order), order, CPU) for order in orders]
    images = loaded(TrainOrder(40, r, 0, 1, start=4))
    for update, micro in itertools.product(range(4, 15), range(2)):
        batch, drawn = next(batches[micro % world]), torch.rand(3)
        pixels, labels, _, bad = next(images)
        x = erase(normalise(pixels, r, CPU), 0.5, r.remode, keys.rng(keys.ERASE, 3, update, micro), r.pixels)
        assert torch.equal(batch.x, x) and torch.equal(batch.y, one_hot(labels, r)) and torch.equal(batch.bad, bad)
        keys.seed_everything(keys.STEP, 3, update, micro)
        assert torch.equal(drawn, torch.rand(3))
        assert batch.rng.bytes(8) == np.random.default_rng((3, update)).bytes(8)
    assert all(next(rest, None) is None for rest in batches)


@pytest.mark.parametrize("changes", [{}, {"clip_grad": None, "ema_decay": None, "ema_warmup_epochs": 0}])
def test_an_update_is_the_one_written_down(changes):
    """Two updates of two micro-batches, the second one half way through the warm-up of the average."""
    r = recipe(**changes)
    order = TrainOrder(32, r, 0, 1)
    made, unsynced, progress = learner(r), [], []
    expected = copy.deepcopy(made)
    made.step.mixer.after_step = lambda model, share: progress.append((model, share))
    accelerator = alone(no_sync=lambda module: contextlib.nullcontext(unsynced.append(module)))
    batches, again = (prepared(loaded(order), order, CPU) for _ in range(2))
    sums, total, bad = {}, 0.0, 0
    for update in range(2):
        made.step.eval()
        batch, out = train_update(made, batches, order, update, sums, accelerator)

        for micro in range(2):
            given = next(again)
            loss = expected.step.train()(given.x, given.y, given.rng).loss
            (loss / 2).backward()
            total, bad = total + loss.detach(), bad + int(given.bad.sum())
            # The first one comes back.
            assert micro or (torch.equal(batch.x, given.x) and torch.equal(out.loss, loss))
        if r.clip_grad:
            torch.nn.utils.clip_grad_norm_(expected.step.parameters(), r.clip_grad)
        expected.optimizer.step()
        expected.optimizer.zero_grad()
        if expected.ema:
            expected.ema.decay = 0.9 * (0.9 + 0.1 * (update + 1) / 4)
            expected.ema.update(expected.step.model)
        for name, module in made.modules.items():
            assert not differences(module.state_dict(), expected.modules[name].state_dict())
    assert made.modules.keys() == ({"model", "ema"} if r.ema_decay else {"model"})
    assert unsynced == [made.wrapped] * 2  # gradients are shared with the last micro-batch of an update only
    assert progress == [(made.step.model, (update + 1) / order.updates) for update in range(2)]
    found = {name: value.item() for name, value in sums.items()}
    assert found == {"steps": 4, "images": 16, "bad": bad, "loss": total.item(), "mix": total.item()}


@pytest.mark.parametrize(("seconds", "updates", "rate"), [(0.1, 20, "100"), (12.0, 3, "0.83"), (50.0, 1, "0.2")])
def test_what_is_left_is_estimated_once_after_some_updates_or_half_a_minute(
    monkeypatch, capsys, seconds, updates, rate
):
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    now = [next(clock)]
    shown = progress.Progress(Mock(is_main_process=True), Mock(batch_size=10), 0, 1000)
    said = []
    for number in range(1, 30):
        now[0] = next(clock)
        shown.update()
        said += [(number, line) for line in capsys.readouterr().out.splitlines()]
    ((number, line),) = said
    minutes = (1000 - updates) * seconds / 60
    left = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
    assert number == updates and line.startswith(f"{rate} images/s, 0% of the time waiting for images")
    assert line.endswith(f"about {left} of training left")
