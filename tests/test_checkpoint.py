"""Choosing and reading checkpoints, without whole runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mixers import Mixup, RecursiveMix
from mixers.testing import batch, rng_of, tiny_step
from mixup_recipes.recipe import Recipe
from mixup_recipes.training import checkpoint
from mixup_recipes.typed import UserError


def alone(**changes: Any) -> SimpleNamespace:
    """What checkpoints need of accelerate, for one process."""
    plain = {"is_main_process": True, "num_processes": 1, "wait_for_everyone": lambda: None, "print": print}
    return SimpleNamespace(**plain | changes)


def save(folder: Path, update: int, **sums: float) -> nn.Module:
    """A checkpoint of a small module."""
    module = nn.BatchNorm1d(3)
    values = {k: torch.tensor(v) for k, v in sums.items()}
    checkpoint.save(folder, update, {"model": module}, [None, None], values, {"evaluated": 0}, alone(), limit=9)
    return module


def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a save believe that a second process holds twice the first one's values."""
    both = lambda parts: [*parts, {k: 2 * v for k, v in parts[0].items()}]  # noqa: E731
    monkeypatch.setattr(checkpoint, "gather_object", both)


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert checkpoint.choose("auto", tmp_path, alone()) is None
    for update in (3, 12):
        save(tmp_path, update, loss=1.0)
    assert checkpoint.choose("auto", tmp_path, alone()).name == "step-00000012"
    assert checkpoint.choose(None, tmp_path, alone()) is None


def flip(path: Path) -> None:
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
def test_a_damaged_checkpoint_is_reported_and_the_one_before_found_but_an_error_if_named(
    tmp_path: Path, kind: str
) -> None:
    for update in (4, 8):
        save(tmp_path, update, loss=1.0)
    (hurt, reason), (older, newer), said = DAMAGE[kind], checkpoint.existing(tmp_path), []
    hurt(newer)
    assert checkpoint.choose("auto", tmp_path, alone(print=said.append)) == older
    assert len(said) == 1 and said[0].startswith("checkpoint step-00000008 is damaged (") and reason in said[0]
    with pytest.raises(UserError) as caught:
        checkpoint.choose(str(newer), tmp_path, alone())
    if kind == "no manifest":
        assert str(caught.value).endswith(f"or one of {tmp_path}: step-00000004, step-00000008")
    else:
        assert str(caught.value).startswith(f"checkpoint {newer} is damaged: ") and reason in str(caught.value)
        assert str(caught.value).endswith("; use --resume_from_checkpoint auto")
    hurt(older)
    assert checkpoint.choose("auto", tmp_path, alone(print=said.append)) is None


@pytest.mark.parametrize("place", ["save_file", "torch.save", "sync", "Path.rename"])
def test_a_disk_that_fills_up_keeps_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 4, loss=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(f"mixup_recipes.training.checkpoint.{place}", full)
        with pytest.raises(UserError, match=r"cannot write checkpoint .*/step-00000008: .*No space left"):
            save(tmp_path, 8, loss=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    assert checkpoint.damage(tmp_path / "step-00000004") is None


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "other", 3, loss=1.0)
    with pytest.raises(UserError, match="belongs to another run; expected 'auto' or one of"):
        checkpoint.choose(str(tmp_path / "other/step-00000003"), tmp_path / "mine", alone())


def test_storage_that_cannot_be_read_is_an_error_and_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 3, loss=1.0)

    def away(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "file_hash", away)
    with pytest.raises(UserError, match=r"cannot read .*step-00000003: .*Permission denied; try again"):
        checkpoint.choose("auto", tmp_path, alone())


def test_what_is_given_up_is_put_aside_and_not_lost(tmp_path: Path) -> None:
    for update in (3, 6, 9):
        save(tmp_path, update, loss=1.0)
    (tmp_path / "step-old").mkdir()  # somebody's copy
    checkpoint.forget(tmp_path, 3, print)
    assert [p.name for p in checkpoint.existing(tmp_path)] == ["step-00000003"]
    aside = sorted(tmp_path.glob("given-up-*"))
    assert [p.name for p in aside] == ["given-up-step-00000006", "given-up-step-00000009"]
    assert checkpoint.damage(aside[0]) is None


@pytest.mark.parametrize(("rank", "world", "loss"), [(0, 2, 1.0), (1, 2, 2.0), (0, 1, 3.0), (0, 4, 3.0), (3, 4, 0.0)])
def test_sums_of_the_log_are_neither_lost_nor_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, world: int, loss: float
) -> None:
    two_processes(monkeypatch)
    save(tmp_path, 3, loss=1.0)
    module = nn.BatchNorm1d(3)
    folder = tmp_path / "step-00000003"
    state, sums = checkpoint.restore(folder, {"model": module}, [None, None], rank, world, torch.device("cpu"))
    assert state["processes"] == 2
    assert {k: v.item() for k, v in sums.items()} == {"loss": loss}


def test_each_process_gets_its_own_batch_statistics_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_processes(monkeypatch)
    module = nn.BatchNorm1d(3)
    module.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    accelerator = alone(num_processes=2)
    checkpoint.save(tmp_path, 3, {"model": module}, [None, None], {"loss": torch.tensor(1.0)}, {}, accelerator, limit=9)
    for rank, mean in ((0, [1.0, 2.0, 3.0]), (1, [2.0, 4.0, 6.0])):
        again = nn.BatchNorm1d(3)
        checkpoint.restore(tmp_path / "step-00000003", {"model": again}, [None, None], rank, 2, torch.device("cpu"))
        assert again.running_mean.tolist() == mean


def test_the_history_of_a_mixer_counts_for_the_disk() -> None:
    """What a run asks for grows by what two forwards of one update, two micro-batches of 8, leave in the state dict."""
    recipe = Recipe(batch_size=16, image_size=32, num_classes=5)
    step = tiny_step(RecursiveMix)
    before, optimiser = (f({"model": step}) for f in (stored, trained))
    asked = checkpoint.needed_bytes({"model": step}, 1, recipe)
    for _ in range(2):
        step(*batch(size=8), rng_of(0))
    step.mixer.after_step(step.model, 0.1)
    assert stored({"model": step}) > before
    assert asked == 2 * (stored({"model": step}) + 2 * optimiser)
    assert checkpoint.needed_bytes({"model": tiny_step(Mixup)}, 1, recipe) < 2 * (before + 2 * optimiser)


def stored(modules: dict[str, nn.Module]) -> int:
    return sum(t.numel() * t.element_size() for m in modules.values() for t in m.state_dict().values())


def trained(modules: dict[str, nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for m in modules.values() for p in m.parameters())
