"""``replay`` rebuilds, bit for bit, what a job fed its model: by the recipe, or with the weights as they were."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from driver import Server
from runs import edit
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import CLASSES, make_photos, make_recipe
from torch import nn

from mixers import MIXERS, Mixup, build
from mixers.base import plan_alone
from mixers.testing import batch, tiny_step
from mixers.testing.parts import differences
from mixup_recipes.runs.replay import replay, save_data, save_picture
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError

# Every process writes what its model is fed at each step, and the target. One more mixer: its lambdas are the model's
# confidences in evaluation mode, which depend on weights and on BatchNorm's statistics.
SPY = """
import os

import torch
from safetensors.torch import save_file

from mixers import MIXERS, Mixup, Step

FOLDER = {folder!r}

class Looking(Mixup):
    needs = "model"

    def plan(self, x, y, rng, model, _):
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
    name = f"{{FOLDER}}/{{os.environ.get('RANK', 0)}}-{{len(seen)}}.safetensors"
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


def assert_same(out: Path, *batches: tuple[int, int], processes: int = 1) -> None:
    """Hold batches against what the job's model was fed; the second micro-batch is its next step or the other's."""
    for step, micro in batches:
        rank, number = (0, 2 * step + micro) if processes == 1 else (micro, step)
        batch, expected = replay(Run.open(out), step, micro), load_file(out.parent / f"fed/{rank}-{number}.safetensors")
        assert torch.equal(batch.images, expected["images"]), (step, micro)
        assert torch.equal(batch.targets, expected["targets"]), (step, micro)
        assert not batch.notes


@pytest.fixture(scope="module")
def run(server, tmp_path_factory):
    return spied(server, tmp_path_factory.mktemp("one"), "deit")


def test_any_micro_batch_of_a_run_and_its_picture_are_rebuilt_bit_for_bit(run, tmp_path):
    assert_same(run, (0, 0), (0, 1), (3, 1), (4, 0), (11, 1))
    for epoch in range(3):
        save_picture(replay(Run.open(run), 4 * epoch), tmp_path / "new" / "sheet.png")
        assert (tmp_path / "new/sheet.png").read_bytes() == (run / f"samples/epoch_{epoch:03d}.png").read_bytes()


@pytest.mark.slow
def test_so_is_one_of_two_processes_in_bf16_and_one_whose_masks_are_learned(server, tmp_path):
    options = {"mixed_precision": "bf16", "channels_last": "true", "aug_repeats": 2}
    for mixer, processes, changes, batches in (
        ("cutmix", 2, options, [(0, 0), (5, 1), (7, 0)]),
        ("samix", 1, {}, [(0, 1), (4, 0), (4, 1)]),
        ("adautomix", 1, {}, [(0, 1), (4, 0), (4, 1)]),
    ):
        (tmp_path / mixer).mkdir()
        out = spied(server, tmp_path / mixer, mixer, processes, epochs=2, **changes)
        assert_same(out, *batches, processes=processes)


def test_the_data_hold_the_batch_and_all_that_rebuilds_it_and_the_text_names_row_class_and_shares(run, tmp_path):
    batch = replay(Run.open(run), 5)
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
    lines = str(batch).splitlines()
    assert len(lines) == 8
    for line, index, target in zip(lines, batch.indices.tolist(), batch.targets, strict=True):
        share, k = target.max(0)
        assert line.startswith(f"row {index:>8}  {CLASSES[index % 4]}  ->  {share:.3f} {CLASSES[k]}")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mixer_that_looks_at_the_model_gets_the_weights_as_they_were(server, tmp_path, monkeypatch, processes):
    out = spied(server, tmp_path, "looking", processes)
    (tmp_path / "looking.py").write_text(SPY.format(folder=""))
    monkeypatch.setitem(MIXERS.rows, "looking", Mixup)  # so that the entry is taken out again
    runpy.run_path(str(tmp_path / "looking.py"))
    assert plan_alone(build("looking"), *batch(), np.random.default_rng(0)) is None  # it is not guessed
    assert_same(out, (0, 0), (0, 1), (4, 0), (8, 1), processes=processes)
    with pytest.raises(UserError, match=r"'looking' looks at the model, .* no weights of update 5; .* 0, 4, 8, 12$"):
        replay(Run.open(out), 5)
    weights = out / "checkpoints/step-00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"step-00000004 is damaged: model.safetensors changed"):
        replay(Run.open(out), 4)


def test_a_teacher_with_other_weights_than_in_the_run_is_refused(server, tmp_path):
    out = spied(server, tmp_path, "attentivemix", epochs=2)
    replay(Run.open(out), 4)
    (teacher,) = json.loads((out / "env.json").read_text())["teachers"]
    edit(out / "env.json", teachers={teacher: "0" * 64})
    with pytest.raises(UserError, match=f"the teacher '{teacher}' is not what it was when .* its weights have changed"):
        replay(Run.open(out), 4)


def test_a_plan_made_without_the_model_is_that_of_the_step():
    for name in MIXERS:
        step, (x, y) = tiny_step(lambda name=name: build(name)), batch()
        for update in range(6):
            alone = plan_alone(step.mixer, x, y, np.random.default_rng((0, update)))
            planned = step(x, y, np.random.default_rng((0, update))).plan
            assert alone is None or not differences(alone, planned), (name, update)


def test_what_a_run_does_not_have_and_other_data_are_one_line(run, tmp_path):
    for step, micro, says in (
        (12, 0, "step: expected 0 to 11, because tiny has 12 updates, got 12"),
        (-1, 0, "step: expected 0 to 11, because tiny has 12 updates, got -1"),
        (0, 2, "micro: expected 0 to 1, because tiny has 2 micro-batches per update, got 2"),
    ):
        with pytest.raises(UserError, match=f"^{says}$"):
            replay(Run.open(run), step, micro)
    for name in ("recipe.yaml", "data.json"):
        shutil.copy(run / name, tmp_path)
    splits = json.loads((run / "data.json").read_text())["splits"]
    edit(tmp_path / "data.json", splits=splits | {"train": splits["train"] | {"images": 71}})
    with pytest.raises(UserError, match=r"'train', is not what .* was trained on: 71 images then, 72 now"):
        replay(Run.open(tmp_path), 0)
