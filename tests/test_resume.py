"""A run that is killed anywhere and resumed equals, to the bit, the run that was left alone."""

import contextlib
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from driver import Server
from resuming import LOG, Reference, checkpoints, differences, finish, kill_after, log, small_model_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixers import MIXERS, build
from mixup_recipes.resolve import resolve
from mixup_recipes.training.job import STOPPED

KILL, TERM, USR1 = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGUSR1)
AUTO = ("--resume_from_checkpoint", "auto")
UPDATE = "mixup_recipes.training.optimisation:set_learning_rates"  # called once per update
EVALUATION = "mixup_recipes.training.evaluation:normalise"  # called once per batch: 4 of the model, 4 of its average


class Case:
    """One run folder, its reference, and ways to start the run in it."""

    def __init__(self, server: Server, reference: Reference, recipe: Path, out: Path, *args: object, processes: int):
        self.server, self.reference, self.out, self.processes = server, reference, out, processes
        self.recipe, self.own = recipe, args
        self.args = ["--recipe", recipe, "--output_dir", out, *LOG, *args]

    def with_args(self, *args: object) -> list[object]:
        """The arguments of the run, some of them replaced."""
        pairs = dict(zip(self.args[::2], self.args[1::2], strict=True)) | dict(zip(args[::2], args[1::2], strict=True))
        return [a for pair in pairs.items() for a in pair]

    def start(self, *args: object, **options: Any) -> tuple[list[int], str]:
        """Statuses of the processes, and what the first one printed."""
        run = self.server.start(*self.with_args(*args), processes=self.processes, **options)
        return run.wait(), run.output()

    def kill_at(self, target: str, call: int, *args: object, rank: int = 0) -> None:
        """Start or resume; one process kills itself at the given call of a function."""
        statuses, output = self.start(*AUTO, *args, faults=[["receive", target, call, KILL]], ranks=[rank])
        assert statuses == [-KILL] * self.processes, output

    def finish(self, *args: object) -> str:
        """Resume to the end."""
        return finish(self.server, *self.with_args(*args, *AUTO), processes=self.processes)

    def expect_same(self) -> None:
        """Nothing differs from the undisturbed run."""
        args = [a for k, v in zip(self.own[::2], self.own[1::2], strict=True) if k not in WHERE for a in (k, v)]
        assert differences(self.reference(*args, processes=self.processes, recipe=self.recipe), self.out) == []


WHERE = ("--dataloader_num_workers", "--checkpointing_steps", "--save_total_limit")  # never change what comes out


@pytest.fixture
def case(server: Server, reference: Reference, tiny_recipe: Path, tmp_path: Path) -> Any:
    """Makes cases: ``case("--mixer", "cutmix", processes=2)``."""

    def make(*args: object, processes: int = 1, recipe: Path = tiny_recipe) -> Case:
        given = {"--mixer": "deit", "--dataloader_num_workers": 0} | dict(zip(args[::2], args[1::2], strict=True))
        flat = [a for pair in given.items() for a in pair]
        return Case(server, reference, recipe, tmp_path / "run", *flat, processes=processes)

    return make


def lines(text: str) -> list[str]:
    """Lines that are not warnings of libraries."""
    return [line for line in text.splitlines() if line.startswith(("error", "checkpoint", "resumed", "saved", "SIG"))]


# ------------------------------------------------------------------------------------------------ killed at random

SHAPES = [(1, 2, 1), (2, 0, "epoch"), (2, 2, 2), (1, 0, "epoch")]  # processes, loader processes, checkpoint interval


@pytest.mark.parametrize("processes, workers, every", SHAPES)
def test_a_run_killed_at_random_times_equals_the_undisturbed_one(
    case: Any, reference: Reference, processes: int, workers: int, every: object
) -> None:
    c = case("--dataloader_num_workers", workers, "--checkpointing_steps", every, processes=processes)
    seconds = reference.seconds[reference("--mixer", "deit", processes=processes)]
    draw = random.Random(f"{processes} {workers} {every}")
    for _ in range(2):
        kill_after(c.server, draw.uniform(0.2, 1) * seconds, *c.args, *AUTO, processes=processes)
    c.finish()
    c.expect_same()


# ------------------------------------------------------------------------------------------------ every mixer


def in_whole_runs() -> list[str]:
    """Mixers whose runs can differ in what has to be saved: one of each kind that only changes the batch and has no
    state (the contract check ``resume`` shows it), and all others."""
    chosen, kinds = [], set()
    for name in MIXERS:
        mixer = build(name)
        own = mixer.needs == "step" or bool(mixer.state_dict())
        if own or mixer.needs not in kinds:
            chosen.append(name)
        kinds.add(mixer.needs)
    return chosen


@pytest.mark.parametrize("mixer", in_whole_runs())
def test_a_killed_run_of_every_kind_of_mixer_equals_the_undisturbed_one(case: Any, mixer: str) -> None:
    c = case("--mixer", mixer, "--model", small_model_for(mixer), "--epochs", 2, "--checkpointing_steps", 3)
    c.kill_at(UPDATE, 6)  # resumed from update 3, within an epoch
    assert lines(c.finish()) == ["resumed from step-00000003"]
    c.expect_same()


@pytest.mark.parametrize("mixer", ["attentivemix", "supermix"])
def test_a_killed_run_whose_teacher_is_a_run_folder_equals_the_undisturbed_one(
    case: Any, reference: Reference, mixer: str
) -> None:
    teacher = reference("--mixer", "vanilla")
    c = case("--mixer", mixer, "--mixer.teacher", teacher, "--epochs", 2, "--checkpointing_steps", 3)
    c.kill_at(UPDATE, 6)
    assert lines(c.finish()) == ["resumed from step-00000003"]
    c.expect_same()
    assert resolve(str(c.out / "recipe.yaml"))[0].mixer_args[mixer]["teacher"] == str(teacher)
    with safe_open(checkpoints(c.out)[-1] / "model.safetensors", "pt") as saved:
        assert saved.keys() and all(name.startswith("model.") for name in saved.keys())  # noqa: SIM118 it is no dict
    other = reference("--mixer", mixer, "--epochs", 2)  # another teacher, or the model itself
    assert log(other) != log(c.out)


def test_a_teacher_that_is_gone_or_another_is_one_line_when_a_run_starts_or_goes_on(
    case: Any, reference: Reference, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(reference("--mixer", "vanilla"), teacher)
    c = case("--mixer", "supermix", "--mixer.teacher", teacher, "--checkpointing_steps", 1)
    c.kill_at(UPDATE, 2)
    (teacher / "model.safetensors").rename(teacher / "elsewhere")
    expected = f"error: mixer 'supermix' with model 'test_resnet': no weights for the teacher '{teacher}' ("
    for args in (AUTO, ("--output_dir", tmp_path / "new")):
        statuses, output = c.start(*args)
        assert statuses == [2]
        (line,) = lines(output)
        assert line.startswith(expected) and len(line) < len(expected) + 300
    assert not (tmp_path / "new").exists()

    weights = load_file(teacher / "elsewhere")
    save_file({name: value + 1 for name, value in weights.items()}, teacher / "model.safetensors")
    statuses, output = c.start(*AUTO)
    assert statuses == [2]
    (line,) = lines(output)
    assert line.startswith(f"error: the teacher '{teacher}' is not what it was when {c.out} was begun: its weights")
    (teacher / "elsewhere").rename(teacher / "model.safetensors")
    assert lines(c.finish()) == ["resumed from step-00000001"]


# ------------------------------------------------------------------------------------------------ killed at a moment

MOMENTS = {
    "before the folder is opened": ("mixup_recipes.training.folder:open_folder", 1),
    "before the first update": (UPDATE, 1),
    "in an update": (UPDATE, 7),
    "in the evaluation of the average": (EVALUATION, 14),
    "between log line and results": ("mixup_recipes.training.export:publish", 2),
    "between two files of a checkpoint": ("mixup_recipes.training.checkpoint:torch.save", 2),
    "before a checkpoint gets its name": ("mixup_recipes.training.checkpoint:Path.rename", 2),
    "before old checkpoints are removed": ("mixup_recipes.training.checkpoint:shutil.rmtree", 5),
    "halfway through removing a checkpoint": ("os:unlink", 3),
    "after the last update": (EVALUATION, 17),
    "after the last checkpoint": ("accelerate:Accelerator.end_training", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_a_bad_moment_equals_the_undisturbed_one(case: Any, moment: str) -> None:
    c = case("--checkpointing_steps", 2)
    c.kill_at(*MOMENTS[moment])
    c.finish()
    c.expect_same()


def test_two_processes_killed_again_and_again_equal_undisturbed_ones(case: Any) -> None:
    c = case("--checkpointing_steps", 1, processes=2)
    c.kill_at(UPDATE, 1, rank=1)
    c.kill_at(UPDATE, 3, rank=1)
    c.kill_at("mixup_recipes.training.checkpoint:torch.save", 2)
    c.kill_at(EVALUATION, 3, rank=1)
    c.kill_at("mixup_recipes.training.export:publish", 1)
    c.kill_at("mixup_recipes.training.checkpoint:Path.rename", 2)
    c.finish()
    c.expect_same()


def test_files_replaced_one_by_one_are_made_good_after_a_kill_between_any_two(case: Any) -> None:
    c = case("--checkpointing_steps", 1)
    for call in range(1, 11):  # recipe, env, data, samples, then weights, config, results and summary of an epoch
        c.kill_at("mixup_recipes.files:os.replace", call)
    c.finish()
    c.expect_same()


# ------------------------------------------------------------------------------------------------ damage


def truncate(checkpoint: Path) -> None:
    """As after a crash of the machine. What else may happen to a checkpoint: see test_checkpoint."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.fixture(scope="module")
def killed_once(server: Server, reference: Reference, tiny_recipe: Path, tmp_path_factory: Any) -> Path:
    """The folder of a run killed in its last epoch, with checkpoints of updates 4 and 8."""
    out = tmp_path_factory.mktemp("killed") / "run"
    c = Case(server, reference, tiny_recipe, out, "--mixer", "deit", "--dataloader_num_workers", 0, processes=1)
    c.kill_at(UPDATE, 10)
    assert [p.name for p in checkpoints(out)] == ["step-00000004", "step-00000008"]
    return out


@pytest.fixture
def killed(case: Any, killed_once: Path) -> Case:
    """That run, to go on with."""
    c = case()
    shutil.copytree(killed_once, c.out)
    return c


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(killed: Case) -> None:
    path = checkpoints(killed.out)[-1] / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    said = lines(killed.finish())
    assert said[0].startswith("checkpoint step-00000008 is damaged (ema.safetensors changed")
    assert said[1] == "resumed from step-00000004"
    killed.expect_same()


def test_without_a_whole_checkpoint_the_run_starts_again(killed: Case) -> None:
    for checkpoint in checkpoints(killed.out):
        truncate(checkpoint)
    said = lines(killed.finish())
    assert [line.split(" (")[0] for line in said] == [
        "checkpoint step-00000008 is damaged",
        "checkpoint step-00000004 is damaged",
    ]
    killed.expect_same()


def test_a_damaged_checkpoint_does_not_push_out_whole_ones(case: Any) -> None:
    c = case("--checkpointing_steps", 1, "--save_total_limit", 2)
    c.kill_at(UPDATE, 7)
    truncate(checkpoints(c.out)[-1])
    c.kill_at(UPDATE, 2, "--save_total_limit", 1)  # resumed from update 5: the checkpoint of 6 is the only whole one
    assert lines(c.finish()) == ["resumed from step-00000006"]
    c.expect_same()


def test_a_checkpoint_that_is_not_there_is_an_error(killed: Case) -> None:
    statuses, output = killed.start("--resume_from_checkpoint", killed.out / "checkpoints/step-00000005")
    assert statuses == [2]
    (line,) = lines(output)
    assert line.endswith(": step-00000004, step-00000008")


def test_going_back_to_a_named_checkpoint_forgets_what_came_after_it(killed: Case) -> None:
    older = ("--resume_from_checkpoint", checkpoints(killed.out)[0], "--checkpointing_steps", 1)
    statuses, output = killed.start(*older, faults=[["receive", UPDATE, 3, KILL]])
    assert statuses == [-KILL], output
    assert lines(killed.finish()) == ["resumed from step-00000006"]
    killed.expect_same()


def test_leftovers_of_a_save_are_removed(killed: Case) -> None:
    (killed.out / "checkpoints/tmp-00000012").mkdir()
    (killed.out / "checkpoints/tmp-00000012/model.safetensors").touch()
    (killed.out / ".summary.csv.tmp").touch()
    killed.finish()
    killed.expect_same()  # which counts leftovers as differences


# ------------------------------------------------------------------------------------------------ resumed otherwise


def test_resuming_a_finished_run_changes_nothing(case: Any) -> None:
    c = case()
    c.finish()

    def content() -> dict[str, bytes]:
        files = [p for p in c.out.rglob("*") if p.is_file() and "tfevents" not in p.name and p.name != "env.json"]
        return {str(p): p.read_bytes() for p in files}

    before = content()
    assert lines(c.finish()) == ["resumed from step-00000012"]
    assert content() == before


def test_a_run_may_go_on_with_another_number_of_loader_processes(case: Any) -> None:
    c = case()
    c.kill_at(UPDATE, 7, "--dataloader_num_workers", 2)
    c.kill_at(UPDATE, 3, "--dataloader_num_workers", 1)
    c.finish()
    c.expect_same()


def test_a_run_that_goes_on_with_another_number_of_processes_says_so(case: Any) -> None:
    c = case(processes=2)
    c.kill_at(UPDATE, 7)
    c.processes = 1
    said = ["resumed from step-00000004", "saved by 2 processes: goes on, but not bit for bit"]
    assert lines(c.finish()) == said


# ------------------------------------------------------------------------------------------------ signals

SIGNALLED = {
    "SIGTERM in training": (UPDATE, 6, TERM, 6),
    "SIGUSR1 in training": (UPDATE, 6, USR1, 6),
    "SIGTERM in evaluation": (EVALUATION, 14, TERM, 8),
    "SIGUSR1 while a checkpoint is written": ("mixup_recipes.training.checkpoint:torch.save", 1, USR1, 5),
}


@pytest.mark.parametrize("what", SIGNALLED)
def test_a_signal_saves_and_leaves_with_a_status_of_its_own(case: Any, what: str) -> None:
    c = case()
    target, call, number, update = SIGNALLED[what]
    statuses, output = c.start(faults=[["receive", target, call, number]])
    assert statuses == [STOPPED], output
    name = signal.Signals(number).name
    assert lines(output) == [f"{name} at update {update}: saved; continue with --resume_from_checkpoint auto"]
    assert checkpoints(c.out)[-1].name == f"step-{update:08d}"
    assert lines(c.finish()) == [f"resumed from step-{update:08d}"]
    c.expect_same()


@pytest.mark.parametrize("rank, call, update", [(1, 6, 6), (0, 9, 9)])
def test_a_signal_to_one_process_makes_all_leave_at_the_same_update(
    case: Any, rank: int, call: int, update: int
) -> None:
    c = case("--dataloader_num_workers", 1, processes=2)
    statuses, output = c.start(faults=[["receive", UPDATE, call, TERM]], ranks=[rank])
    assert statuses == [STOPPED, STOPPED], output
    assert f" at update {update}: saved" in output
    assert checkpoints(c.out)[-1].name == f"step-{update:08d}"
    c.finish()
    c.expect_same()


# ------------------------------------------------------------------------------------------------ loader processes


def holders(path: Path) -> list[int]:
    """Processes that write to a file."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            if link.readlink() == path:
                found.append(int(link.parts[2]))
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "fault",
    [["receive", UPDATE, 5, KILL], ["kill_parent", "torch.utils.data._utils.worker:_worker_loop", 1]],
    ids=["while they work", "while they start"],
)
def test_loader_processes_leave_when_a_run_is_killed(case: Any, fault: list[object]) -> None:
    c = case("--dataloader_num_workers", 2)
    run = c.server.start(*c.args, faults=[fault])
    assert run.wait() == [-KILL], run.output()
    deadline = time.monotonic() + 12  # torch's workers look every 5 seconds
    while holders(run.out.with_suffix(".0")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert holders(run.out.with_suffix(".0")) == []
