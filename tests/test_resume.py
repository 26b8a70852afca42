"""A run that is killed anywhere and resumed equals, to the bit, the run that was left alone."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from driver import Server
from marks import slow_unless
from resuming import LOG, Reference, checkpoints, differences, finish, kill_after, log, small_model_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixers import MIXERS, build
from mixup_recipes.resolve import resolve
from mixup_recipes.training.job import STOPPED

KILL, TERM, USR1 = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGUSR1)
AUTO = ("--resume_from_checkpoint", "auto")
UPDATE = "mixup_recipes.training.optimisation:set_learning_rates"  # called once per update
EVALUATION = "mixup_recipes.training.evaluation:normalise"  # called once per batch, of which an evaluation has 4
BATCH = "mixup_recipes.training.update:inputs"  # called once per micro-batch: 8 an epoch, then 4 of PreciseBN
SAVE, RENAME = "mixup_recipes.training.checkpoint:torch.save", "mixup_recipes.training.checkpoint:Path.rename"
WHERE = ("--dataloader_num_workers", "--checkpointing_steps", "--save_total_limit")  # never change what comes out


def pairs(*args: object) -> dict[object, object]:
    """Flags and their values; of a flag that comes again the last."""
    return dict(zip(args[::2], args[1::2], strict=True))


class Case:
    """One run folder, its reference, and ways to start the run in it."""

    def __init__(self, server: Server, reference: Reference, recipe: Path, out: Path, *args: object, processes: int):
        self.server, self.reference, self.out, self.processes = server, reference, out, processes
        self.own = pairs("--mixer", "deit", "--dataloader_num_workers", 0, *args)
        self.args = pairs("--recipe", recipe, "--output_dir", out, *LOG) | self.own

    def with_args(self, *args: object) -> list[object]:
        """The arguments of the run, some of them replaced."""
        return [a for pair in (self.args | pairs(*args)).items() for a in pair]

    def start(self, *args: object, **options: Any) -> tuple[list[int], str]:
        """Statuses of the processes, and what the first one printed."""
        run = self.server.start(*self.with_args(*args), processes=self.processes, **options)
        return run.wait(), run.output()

    def kill_at(self, target: str, call: int, *args: object, rank: int = 0) -> list[str]:
        """Start or resume; one process kills itself at the given call of a function."""
        statuses, output = self.start(*AUTO, *args, faults=[["receive", target, call, KILL]], ranks=[rank])
        assert statuses == [-KILL] * self.processes, output
        return lines(output)

    def finish(self, same: bool = True) -> list[str]:
        """Resume to the end, where nothing differs from the undisturbed run; returns what was said."""
        said = lines(finish(self.server, *self.with_args(*AUTO), processes=self.processes))
        args = [a for flag, value in self.own.items() if flag not in WHERE for a in (flag, value)]
        assert not same or differences(self.reference(*args, processes=self.processes), self.out) == []
        return said


@pytest.fixture
def case(server, reference, tiny_recipe, tmp_path):
    """Makes cases: ``case("--mixer", "cutmix", processes=2)``."""
    return lambda *args, processes=1: Case(server, reference, tiny_recipe, tmp_path / "run", *args, processes=processes)


def lines(text: str) -> list[str]:
    """Lines that are not warnings of libraries."""
    return [
        line
        for line in text.splitlines()
        if line.startswith(("error", "checkpoint", "no checkpoint", "resumed", "it was saved", "saved", "SIG"))
    ]


@pytest.mark.parametrize(
    "processes, workers, every",
    slow_unless(lambda case: case == (2, 2, 2), [(1, 2, 1), (2, 2, 2), (1, 0, "epoch"), (2, 0, "epoch")]),
)
def test_a_run_killed_at_random_times_equals_the_undisturbed_one(case, reference, processes, workers, every):
    c = case("--dataloader_num_workers", workers, "--checkpointing_steps", every, processes=processes)
    seconds = reference.seconds[reference("--mixer", "deit", processes=processes)]
    draw = random.Random(f"{processes} {workers} {every}")
    for _ in range(2):
        kill_after(c.server, draw.uniform(0.2, 1) * seconds, *c.with_args(*AUTO), processes=processes)
    c.finish()


def in_whole_runs() -> list[str]:
    """Mixers whose runs can differ in what has to be saved: one of each kind that only changes the batch and has no
    state (the contract check ``resume`` shows it), and all others."""
    made = {name: build(name) for name in MIXERS}
    first = {mixer.needs: name for name, mixer in reversed(made.items())}.values()
    return [name for name, m in made.items() if m.needs == "step" or m.state_dict() or name in first]


# one of each kind each time: plain, a history in the checkpoint, a look at the model, a network that learns
EACH_TIME = {"manifoldmix", "recursivemix", "puzzlemix", "automix"}


@pytest.mark.parametrize("mixer", slow_unless(lambda name: name in EACH_TIME, in_whole_runs()))
def test_a_killed_run_of_every_kind_of_mixer_equals_the_undisturbed_one(case, mixer):
    c = case("--mixer", mixer, "--model", small_model_for(mixer), "--epochs", 2, "--checkpointing_steps", 3)
    c.kill_at(UPDATE, 6)  # resumed from update 3, within an epoch
    assert c.finish() == ["resumed from step-00000003"]


@pytest.mark.parametrize("mixer", slow_unless(lambda name: name == "supermix", ["attentivemix", "supermix"]))
def test_a_killed_run_whose_teacher_is_a_run_folder_equals_the_undisturbed_one(case, reference, mixer):
    teacher = reference("--mixer", "vanilla")
    c = case("--mixer", mixer, "--mixer.teacher", teacher, "--epochs", 2, "--checkpointing_steps", 3)
    c.kill_at(UPDATE, 6)
    assert c.finish() == ["resumed from step-00000003"]
    assert resolve(str(c.out / "recipe.yaml"))[0].mixer_args[mixer]["teacher"] == str(teacher)
    with safe_open(checkpoints(c.out)[-1] / "model.safetensors", "pt") as saved:
        assert saved.keys() and all(name.startswith("model.") for name in saved.keys())  # noqa: SIM118 it is no dict
    other = reference("--mixer", mixer, "--epochs", 2)  # another teacher, or the model itself
    assert log(other) != log(c.out)


def test_a_teacher_that_is_gone_or_another_is_one_line_when_a_run_starts_or_goes_on(case, reference, tmp_path):
    teacher = Path(shutil.copytree(reference("--mixer", "vanilla"), tmp_path / "teacher"))
    c = case("--mixer", "supermix", "--mixer.teacher", teacher, "--checkpointing_steps", 1)
    c.kill_at(UPDATE, 2)
    gone = f"error: mixer 'supermix' with model 'test_resnet': no weights for the teacher '{teacher}' ("
    other = f"error: the teacher '{teacher}' is not what it was when {c.out} was started: its weights"
    weights = load_file(teacher / "model.safetensors")
    (teacher / "model.safetensors").rename(teacher / "elsewhere")
    for args, expected in ((AUTO, gone), (("--output_dir", tmp_path / "new"), gone), (AUTO, other)):
        if expected == other:
            save_file({name: value + 1 for name, value in weights.items()}, teacher / "model.safetensors")
        statuses, output = c.start(*args)
        (line,) = lines(output)
        assert statuses == [2] and line.startswith(expected) and len(line) < len(expected) + 300
    assert not (tmp_path / "new").exists()
    (teacher / "elsewhere").rename(teacher / "model.safetensors")
    assert c.finish(same=False) == ["resumed from step-00000001"]


MOMENTS = {  # one after the other in a run of 12 updates; each time it goes on from its newest checkpoint
    "before the folder is opened": ("mixup_recipes.training.folder:begin_folder", 1, 0),
    "before the first update": (UPDATE, 1, 0),
    "in an update": (UPDATE, 7, 0),
    "in an evaluation": (EVALUATION, 3, 6),
    "between log line and results": ("mixup_recipes.training.export:export_epoch", 1, 6),
    "between two files of a checkpoint": (SAVE, 1, 6),
    "before a checkpoint gets its name": (RENAME, 1, 6),
    "before old checkpoints are removed": ("mixup_recipes.training.checkpoint:existing", 3, 6),
    "halfway through removing a checkpoint": ("os:unlink", 7, 8),
    "after the last update": (EVALUATION, 1, 10),
    "after the last checkpoint": ("accelerate:Accelerator.end_training", 1, 10),
}


def test_a_run_killed_at_every_bad_moment_equals_the_undisturbed_one_and_then_changes_no_more(case):
    c = case("--checkpointing_steps", 2)
    for number, (moment, (target, call, update)) in enumerate(MOMENTS.items()):
        said = c.kill_at(target, call, "--dataloader_num_workers", number % 3)  # whose number may change
        begun = [f"no checkpoint yet in {c.out}: the run starts from the beginning"] * (number > 1)  # there is a log
        assert said == ([f"resumed from step-{update:08d}"] if update else begun), moment

    def content():
        files = [p for p in c.out.rglob("*") if p.is_file() and "tfevents" not in p.name and p.name != "env.json"]
        return {str(p): p.read_bytes() for p in files}

    before = content()
    assert c.finish() == ["resumed from step-00000012"]
    assert content() == before


def test_two_processes_killed_again_and_again_equal_undisturbed_ones(case):
    c = case("--checkpointing_steps", 1, processes=2)
    c.kill_at(UPDATE, 1, rank=1)
    c.kill_at(UPDATE, 3, rank=1)
    c.kill_at(SAVE, 2)
    c.kill_at(EVALUATION, 3, rank=1)
    c.kill_at("mixup_recipes.training.export:export_epoch", 1)
    c.kill_at(RENAME, 2)
    c.finish()


def test_files_replaced_one_by_one_are_made_good_after_a_kill_between_any_two(case):
    c = case("--checkpointing_steps", 1)
    for call in range(1, 11):  # recipe, env, data, samples, then weights, config, results and summary of an epoch
        c.kill_at("mixup_recipes.files:os.replace", call)
    c.finish()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def truncate(checkpoint: Path) -> None:
    """As after a crash of the machine. What else may happen to a checkpoint: see test_checkpoint."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def test_a_run_goes_on_from_a_named_or_whole_checkpoint_or_starts_again_and_forgets_what_came_later(case):
    c = case("--checkpointing_steps", 1, "--save_total_limit", 2)
    c.kill_at(UPDATE, 7)
    older, newer = checkpoints(c.out)
    assert (older.name, newer.name) == ("step-00000005", "step-00000006")
    (c.out / "checkpoints/tmp-00000012").mkdir()  # leftovers of a save, which count as differences
    (c.out / "checkpoints/tmp-00000012/model.safetensors").touch()
    (c.out / ".summary.csv.tmp").touch()
    assert c.kill_at(UPDATE, 3, "--resume_from_checkpoint", older) == ["resumed from step-00000005"]
    truncate(checkpoints(c.out)[-1])
    damaged, resumed = c.kill_at(UPDATE, 2, "--save_total_limit", 1)  # a damaged one does not push out a whole one
    assert damaged.startswith("checkpoint step-00000007 is damaged (model.safetensors changed")
    assert resumed == "resumed from step-00000006"
    assert c.finish() == ["resumed from step-00000007"]
    for checkpoint in checkpoints(c.out):
        truncate(checkpoint)
    before = contents(c.out)
    said = [line.split(" (")[0] for line in c.finish(same=False)]
    assert said == ["checkpoint step-00000012 is damaged", "checkpoint step-00000011 is damaged"]
    assert contents(c.out) == before


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_results_without_a_checkpoint_are_not_trained_over(case, reference, processes):
    c = case(processes=processes)
    c.kill_at("mixup_recipes.training.export:export_epoch", 1)  # before the first checkpoint: it begins again
    c.kill_at(UPDATE, 10)
    shutil.rmtree(c.out / "checkpoints")
    before = contents(c.out)
    statuses, output = c.start(*AUTO)
    says = f"error: {c.out} has results of 2 of 3 epochs, but no whole checkpoint to continue from; put its checkpoints"
    assert statuses[0] == 2 and says in output and contents(c.out) == before
    done = Path(shutil.copytree(reference("--mixer", "deit", processes=processes), c.out.parent / "done"))
    shutil.rmtree(done / "checkpoints")
    before = contents(done)
    statuses, output = c.start(*AUTO, "--output_dir", done)
    assert statuses == [0] * processes and contents(done) == before
    assert output.splitlines()[1:] == [f"the run in {done} is finished, there is nothing left to do"]
    (done / "log.jsonl").unlink()
    assert c.start(*AUTO, "--output_dir", done)[0][0] == 2


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(case):
    c = case("--checkpointing_steps", 6)
    assert c.kill_at(RENAME, 1) == []  # within the second epoch, after an evaluation
    assert c.finish() == [f"no checkpoint yet in {c.out}: the run starts from the beginning"]


def test_a_run_that_goes_on_with_another_number_of_processes_says_so(case):
    c = case(processes=2)
    c.kill_at(UPDATE, 7)
    c.processes = 1
    assert c.finish(same=False) == [
        "resumed from step-00000004",
        "it was saved by 2 processes, so the run continues, but not bit for bit",
    ]


SIGNALS = {  # processes -> rank, moment, signal and the update at which all leave, one after the other in a run
    1: [
        *((0, SAVE, 1, USR1, 5), (0, UPDATE, 1, TERM, 6), (0, UPDATE, 1, USR1, 7)),
        *((0, BATCH, 4, TERM, 8), (0, EVALUATION, 3, TERM, 8)),
        (0, EVALUATION, 7, TERM, 12),
    ],
    2: [(0, BATCH, 5, TERM, 4), (1, UPDATE, 2, TERM, 6), (0, UPDATE, 3, TERM, 9), (1, EVALUATION, 1, TERM, 12)],
}


@pytest.mark.parametrize("processes", slow_unless(lambda n: n == 2, SIGNALS))
def test_after_a_signal_to_one_process_all_save_and_leave_with_a_status_of_its_own(case, processes):
    c = case("--dataloader_num_workers", processes - 1, processes=processes)
    for rank, target, call, number, update in SIGNALS[processes]:
        statuses, output = c.start(*AUTO, faults=[["receive", target, call, number]], ranks=[rank])
        assert statuses == [STOPPED] * processes, output
        name = signal.Signals(number).name if processes == 1 else ""
        assert f"{name} at update {update}: saved; continue with --resume_from_checkpoint auto" in output
        assert checkpoints(c.out)[-1].name == f"step-{update:08d}"
    assert c.finish() == [f"resumed from step-{update:08d}"]


HANG = """
import ctypes, os, signal, threading
from mixup_recipes.data.loading import Samples
from mixup_recipes.training import data, signals

def hang(*_):  # where no Python runs, as in a library that reads a disk which does not answer
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(lock), libc.pthread_mutex_lock(lock)

def batches(self, *args, calls=[], original=Samples.batches):
    calls.append(1)
    for number, batch in enumerate(original(self, *args)):
        if (len(calls), number) == WHEN:
            hang()
        yield batch

signals.PATIENCE = 0.5
Samples.batches = batches
if WHEN is None:
    data.load_splits = hang
"""
HUNG = {  # what hangs -> the loader and its batch, what is said, and the checkpoint that is left
    "the data": (None, "SIGTERM came before the first update, so the run stopped with nothing to save; continue", None),
    "a batch": ((1, 5), "SIGTERM: no images came for 0 s, so the run stopped without a new checkpoint; continue", 2),
    "a batch for BatchNorm": (
        (2, 1),
        "SIGTERM: no images came for 0 s, so the run stopped without a new checkpoint; continue",
        3,
    ),
}


@pytest.mark.parametrize("what", HUNG)
def test_a_signal_ends_a_process_also_where_something_hangs(case, tmp_path, what):
    when, words, update = HUNG[what]
    (tmp_path / "hang.py").write_text(f"WHEN = {when}\n{HANG}")
    c = case("--checkpointing_steps", 1)
    statuses, output = c.start(faults=[["script", str(tmp_path / "hang.py")]])
    assert statuses == [STOPPED] and words in output, output
    assert c.finish() == ([f"resumed from step-{update:08d}"] if update else [])


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("when", ["while they work", "while they start"])
def test_loader_processes_leave_when_a_run_is_killed(case, when):
    c = case("--dataloader_num_workers", 2)
    start = ["kill_parent", "torch.utils.data._utils.worker:_worker_loop", 1]
    run = c.server.start(*c.with_args(), faults=[["receive", UPDATE, 5, KILL] if when == "while they work" else start])
    assert run.wait() == [-KILL], run.output()

    def holders():
        found, out = [], os.path.realpath(run.out.with_suffix(".0"))
        for link in Path("/proc").glob("[0-9]*/fd/1"):
            with contextlib.suppress(OSError):  # of another user, or gone just now
                found += [link] if os.readlink(link) == out else []
        return found

    deadline = time.monotonic() + 12  # torch's workers look every 5 seconds
    while holders() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert holders() == []
