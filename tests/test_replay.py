"""``replay`` rebuilds, bit for bit, what a job fed its model: by the recipe, or with the weights as they were."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver import Server
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import CLASSES, make_photos, make_recipe
from torch import nn

from mixers import MIXERS, Mixup, build
from mixers.base import plan_alone
from mixers.testing import batch, tiny_step
from mixup_recipes.runs.replay import Replayed, named, replay, save_data, save_picture
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError

# Every process writes what its model is fed at each step, and the target. One more mixer: its lambdas are the model's
# confidences in evaluation mode, which depend on weights and on BatchNorm's statistics.
SPY = """
import torch
from safetensors.torch import save_file

import mixers
from mixers import MIXERS, Mixup, Step

FOLDER = {folder!r}


class Looking(Mixup):
    needs = "model"

    def plan(self, x, y, rng, *look):
        model, _ = look
        training = model.training
        with torch.no_grad():
            lam = model.eval()(x).float().softmax(1).amax(1)
        model.train(training)
        return super().plan(x, y, rng) | {{"mask": lam.view(-1, 1, 1, 1)}}


MIXERS.rows["looking"] = Looking
forward, seen = Step.forward, []


def spy(self, x, y, rng):
    fed = []
    hook = self.model.register_forward_pre_hook(lambda _, args: fed.append(args[0].detach().clone()))
    out = forward(self, x, y, rng)
    hook.remove()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    name = f"{{FOLDER}}/{{rank}}-{{len(seen)}}.safetensors"
    save_file({{"images": fed[-1].contiguous(), "targets": out.target}}, name)
    seen.append(1)
    return out


if FOLDER:
    Step.forward = spy
"""


def spied(server: Server, folder: Path, mixer: str, processes: int = 1, **changes: object) -> Path:
    """A run with two micro-batches per update, and beside it what its models were fed; returns its folder."""
    (folder / "fed").mkdir()
    (folder / "spy.py").write_text(SPY.format(folder=str(folder / "fed")))
    recipe = make_recipe(folder, make_photos(folder / "photos"), mixer=mixer, precise_bn_samples="null", **changes)
    args = ("--recipe", recipe, "--output_dir", folder / "out", "--save_total_limit", 9)
    status, printed = server.run(*args, processes=processes, faults=[["script", str(folder / "spy.py")]])
    assert status == 0, printed
    return folder / "out"


def rebuilt(out: Path, step: int, micro: int = 0) -> Replayed:
    return replay(Run.open(out), step, micro)


def assert_same(out: Path, *batches: tuple[int, int], processes: int = 1) -> None:
    """Hold batches against what the job's model was fed.

    With one process its second micro-batch is its next step, with two the other's.
    """
    for step, micro in batches:
        rank, number = (0, 2 * step + micro) if processes == 1 else (micro, step)
        batch, expected = rebuilt(out, step, micro), load_file(out.parent / f"fed/{rank}-{number}.safetensors")
        assert torch.equal(batch.images, expected["images"]), (step, micro)
        assert torch.equal(batch.targets, expected["targets"]), (step, micro)
        assert not batch.notes


@pytest.fixture(scope="module")
def run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spied(server, tmp_path_factory.mktemp("one"), "deit")


def test_any_micro_batch_of_a_run_is_rebuilt_bit_for_bit(run: Path) -> None:
    assert_same(run, (0, 0), (0, 1), (3, 1), (4, 0), (11, 1))


@pytest.mark.parametrize(
    ("mixer", "processes", "changes", "batches"),
    [
        (
            "cutmix",
            2,
            {"mixed_precision": "bf16", "channels_last": "true", "aug_repeats": 2},
            [(0, 0), (5, 1), (11, 0)],
        ),
        ("samix", 1, {}, [(0, 1), (4, 0), (8, 1)]),  # masks that were learned
        ("adautomix", 1, {}, [(0, 1), (4, 0), (8, 1)]),
    ],
)
def test_so_is_that_of_other_runs(
    server: Server, tmp_path: Path, mixer: str, processes: int, changes: dict[str, Any], batches: list[tuple[int, int]]
) -> None:
    assert_same(spied(server, tmp_path, mixer, processes, **changes), *batches, processes=processes)


def test_the_picture_is_the_job_s_own_byte_for_byte(run: Path, tmp_path: Path) -> None:
    for epoch in range(3):
        save_picture(rebuilt(run, 4 * epoch), tmp_path / "new" / "sheet.png")
        assert (tmp_path / "new/sheet.png").read_bytes() == (run / f"samples/epoch_{epoch:03d}.png").read_bytes()


def test_the_data_hold_the_batch_and_all_that_rebuilds_it(run: Path, tmp_path: Path) -> None:
    batch = rebuilt(run, 5)
    save_data(batch, tmp_path / "batch.safetensors")
    with safe_open(tmp_path / "batch.safetensors", "pt") as file:
        saved, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert set(saved) >= {"images", "targets", "labels", "indices", "plan.index", "plan.mask"}
    assert torch.equal(saved["images"], batch.images)
    assert json.loads(metadata["plan"]) == {"plan.choice": batch.plan["choice"]}
    # the labels are those of the rows; the target of each image holds its own class and its partner's, smoothed by .1
    assert saved["labels"].tolist() == [i % 4 for i in saved["indices"].tolist()]
    lam = saved["plan.lam"] if "plan.lam" in saved else saved["plan.mask"].flatten()
    own = nn.functional.one_hot(saved["labels"], 4).float()
    mixed = lam[:, None] * own + (1 - lam[:, None]) * own[saved["plan.index"]]
    assert torch.allclose(saved["targets"], 0.9 * mixed + 0.1 / 4)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mixer_that_looks_at_the_model_is_rebuilt_with_the_weights_as_they_were(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    out = spied(server, tmp_path, "looking", processes)
    (tmp_path / "looking.py").write_text(SPY.format(folder=""))
    monkeypatch.setitem(MIXERS.rows, "looking", Mixup)  # so that the entry is taken out again
    runpy.run_path(str(tmp_path / "looking.py"))
    assert_same(out, (0, 0), (0, 1), (4, 0), (8, 1), processes=processes)
    with pytest.raises(UserError, match=r"'looking' looks at the model, .* no weights of update 5; .* 0, 4, 8, 12$"):
        rebuilt(out, 5)
    weights = out / "checkpoints/step-00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"step-00000004 is damaged: model.safetensors changed"):
        rebuilt(out, 4)


def test_a_teacher_with_other_weights_than_in_the_run_is_refused(server: Server, tmp_path: Path) -> None:
    out = spied(server, tmp_path, "attentivemix")
    rebuilt(out, 4)
    environment = json.loads((out / "env.json").read_text())
    (teacher,) = environment["teachers"]
    environment["teachers"][teacher] = "0" * 64
    (out / "env.json").write_text(json.dumps(environment))
    with pytest.raises(UserError, match=f"the teacher '{teacher}' is not what it was when .* its weights have changed"):
        rebuilt(out, 4)


@pytest.mark.parametrize("name", MIXERS)
def test_a_plan_made_without_the_model_is_that_of_the_step(name: str) -> None:
    step, (x, y) = tiny_step(lambda: build(name)), batch()
    for update in range(6):
        alone = plan_alone(step.mixer, x, y, np.random.default_rng((0, update)))
        if alone is None:
            continue
        planned = step(x, y, np.random.default_rng((0, update))).plan
        a, b = dict(named("plan", alone)), dict(named("plan", planned))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_a_plan_that_needs_the_model_is_not_guessed() -> None:
    class Needs(Mixup):
        needs = "model"

        def plan(self, x, y, rng, *look):
            return super().plan(x, y, rng) | {"mask": look[0](x).amax(1).view(-1, 1, 1, 1)}

    step = tiny_step(Needs)
    assert plan_alone(step.mixer, *batch(), np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    ("step", "micro", "says"),
    [
        (12, 0, "step 12: tiny has 12 updates, 0 to 11"),
        (-1, 0, "step -1: tiny has 12 updates, 0 to 11"),
        (0, 2, "micro 2: tiny has 2 micro-batches per update, 0 to 1"),
    ],
)
def test_what_the_run_does_not_have_is_one_line(run: Path, step: int, micro: int, says: str) -> None:
    with pytest.raises(UserError) as error:
        rebuilt(run, step, micro)
    assert str(error.value) == says


def other_images(run: Path) -> str:
    """What a run on one image less would say of its data."""
    record: dict[str, Any] = json.loads((run / "data.json").read_text())
    record["splits"]["train"]["images"] = 71
    return json.dumps(record)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("data.json", "{", "data.json is not valid JSON"),
        ("data.json", "[]", "data.json: expected a table"),
        ("data.json", '{"splits": 3}', "data.json: splits: expected a table, got 3"),
        ("env.json", "[", "env.json is not valid JSON"),
        ("data.json", other_images, "'train' is not what the run in .* was trained on: .*71.* then, .*72.* now"),
    ],
)
def test_damaged_files_of_a_run_and_other_data_are_one_line(
    run: Path, tmp_path: Path, name: str, text: Any, says: str
) -> None:
    with pytest.raises(UserError, match=r"is no run folder: recipe\.yaml is missing"):
        rebuilt(tmp_path, 0)
    shutil.copy(run / "recipe.yaml", tmp_path)
    (tmp_path / name).write_text(text if isinstance(text, str) else text(run))
    with pytest.raises(UserError, match=says) as error:
        rebuilt(tmp_path, 0)
    assert "\n" not in str(error.value)


def test_the_text_names_row_class_and_shares(run: Path) -> None:
    batch = rebuilt(run, 0)
    lines = str(batch).splitlines()
    assert len(lines) == 8
    for line, index, target in zip(lines, batch.indices.tolist(), batch.targets, strict=True):
        share, k = target.max(0)
        assert line.startswith(f"row {index:>8}  {CLASSES[index % 4]}  ->  {share:.3f} {CLASSES[k]}")
