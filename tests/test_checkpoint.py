"""Choosing and reading checkpoints, without whole runs."""

import json
import os
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from runs import make_run, quick
from torch import nn

from mixers import Mixup, RecursiveMix
from mixers.testing import batch, rng_of, tiny_step
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import checkpoint
from mixup_recipes.training.format import PLACE
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError


def alone(**changes):
    """What checkpoints need of accelerate, for one process."""
    plain = {"is_main_process": True, "num_processes": 1, "wait_for_everyone": lambda: None, "print": print}
    return SimpleNamespace(**plain | changes)


def chosen(resume, folder, accelerator, **job):
    """The checkpoint that is chosen of a run whose checkpoints lie in the folder; it has no other files."""
    recipe = load_recipe("quickstart_cutmix", epochs=3)
    found, said = checkpoint.choose(resume, folder.parent, recipe, Job(**job), accelerator)
    assert said == ""
    return found


@pytest.fixture
def folder(tmp_path):
    """Where a run has its checkpoints."""
    return tmp_path / "checkpoints"


def save(folder, *updates, module=None, processes=1):
    """Checkpoints of a small module."""
    for update in updates:
        checkpoint.save(
            folder, update, {"model": module or nn.BatchNorm1d(3)}, [None, None], {"loss": torch.tensor(1.0)},
            {"evaluated": 0}, alone(num_processes=processes), limit=9,
        )  # fmt: skip


def test_the_newest_of_this_run_is_found_and_what_is_given_up_is_put_aside_and_not_lost(folder):
    assert chosen("auto", folder, alone()) is None
    save(folder, 3, 6, 12)
    assert chosen("auto", folder, alone()).name == "step-00000012"
    assert chosen(None, folder, alone()) is None
    with pytest.raises(UserError, match="belongs to another run; expected 'auto' or one of"):
        chosen(str(folder / "step-00000003"), folder / "mine", alone())
    (folder / "step-old").mkdir()  # somebody's copy
    checkpoint.forget(folder, 3, print)
    assert [p.name for p in checkpoint.existing(folder)] == ["step-00000003"]
    aside = sorted(folder.glob("given-up-*"))
    assert [p.name for p in aside] == ["given-up-step-00000006", "given-up-step-00000012"]
    assert checkpoint.damage(aside[0]) is None


def flip(path):
    """One bit is not what it was."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda c: (c / "model.safetensors").write_bytes(b"short"), "model.safetensors changed"),
    "one bit flipped": (lambda c: flip(c / "process.safetensors"), "process.safetensors changed"),
    "a file missing": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json"),
    "empty manifest": (lambda c: (c / "manifest.json").write_text("{}"), "manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_found_but_an_error_if_named(folder, kind):
    save(folder, 4, 8)
    (hurt, reason), (older, newer), said = DAMAGE[kind], checkpoint.existing(folder), []
    hurt(newer)
    assert chosen("auto", folder, alone(print=said.append)) == older
    assert len(said) == 1 and said[0].startswith("checkpoint step-00000008 is damaged (") and reason in said[0]
    with pytest.raises(UserError) as caught:
        chosen(str(newer), folder, alone())
    if kind == "no manifest":
        assert str(caught.value).endswith(f"or one of {folder}: step-00000004, step-00000008")
    else:
        assert str(caught.value).startswith(f"checkpoint {newer} is damaged: ") and reason in str(caught.value)
        assert str(caught.value).endswith("; use --resume_from_checkpoint auto")
    hurt(older)
    assert chosen("auto", folder, alone(print=said.append)) is None


def test_a_disk_that_fills_up_keeps_earlier_checkpoints_and_one_that_is_away_is_no_damage(folder, monkeypatch):
    save(folder, 4)
    full = OSError(28, "No space left on device")
    for place in ("save_file", "torch.save", "sync", "Path.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(f"mixup_recipes.training.checkpoint.{place}", Mock(side_effect=full))
            with pytest.raises(UserError, match=r"cannot write checkpoint .*/step-00000008: .*No space left"):
                save(folder, 8)
        assert [p.name for p in folder.iterdir()] == ["step-00000004"], place
        assert checkpoint.damage(folder / "step-00000004") is None
    monkeypatch.setattr(checkpoint, "file_hash", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"cannot read .*step-00000004: .*Permission denied; try again"):
        chosen("auto", folder, alone())


def test_sums_of_the_log_are_neither_lost_nor_counted_twice_and_each_process_has_its_own_statistics(
    folder, monkeypatch
):
    """The second process holds twice the first one's values."""
    monkeypatch.setattr(checkpoint, "gather_object", lambda parts: [*parts, {k: 2 * v for k, v in parts[0].items()}])
    module, first = nn.BatchNorm1d(3), torch.tensor([1.0, 2.0, 3.0])
    module.running_mean.copy_(first)
    save(folder, 3, module=module, processes=2)
    cases = [(0, 2, 1.0, 1), (1, 2, 2.0, 2), (0, 1, 3.0, 1), (0, 4, 3.0, 1), (3, 4, 0.0, 1)]
    for rank, world, loss, times in cases:
        again, cpu = nn.BatchNorm1d(3), torch.device("cpu")
        state, sums = checkpoint.restore(folder / "step-00000003", {"model": again}, [None, None], rank, world, cpu)
        assert state["processes"] == 2 and {k: v.item() for k, v in sums.items()} == {"loss": loss}
        assert again.running_mean.equal(times * first)


def test_the_history_of_a_mixer_counts_for_the_disk():
    """What a run asks for grows by what two forwards of one update, two micro-batches of 8, leave in the state dict."""

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    recipe, step = Recipe(batch_size=16, image_size=32, num_classes=5), tiny_step(RecursiveMix)
    before, moments = size(step.state_dict().values()), 2 * size(step.parameters())
    asked = checkpoint.needed_bytes({"model": step}, 1, recipe)
    for _ in range(2):
        step(*batch(size=8), rng_of(0))
    step.mixer.after_step(step.model, 0.1)
    after = size(step.state_dict().values())
    assert after > before and asked == 2 * (after + moments)
    assert checkpoint.needed_bytes({"model": tiny_step(Mixup)}, 1, recipe) < 2 * (before + moments)


def test_a_finished_run_without_checkpoints_is_not_said_to_be_one_of_other_data(tmp_path):
    folder, own = make_run(tmp_path / "run"), quick()
    says = f"the run in {folder} is finished, there is nothing left to do"
    assert checkpoint.finished_before(folder, own, Job()) == says
    other = changed(own, dataset="elsewhere/photos")
    with pytest.raises(
        UserError, match="finished and used dataset 'groceries', not 'elsewhere/photos'; leave out --dataset"
    ):
        checkpoint.finished_before(folder, other, Job())
    (folder / PLACE).write_text(json.dumps({"path": os.path.abspath("elsewhere/photos")}))  # where they lie by now
    assert checkpoint.finished_before(folder, other, Job()) == says
