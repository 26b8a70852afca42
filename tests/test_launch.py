"""The result does not depend on how the global batch is cut up: processes, accumulation, loader processes, launcher."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from driver import Server
from resuming import LOG, Reference, checkpoints, log

from mixup_recipes.training.job import STOPPED

ONE = ("--mixer", "deit")


def trace(folder: Path, mode: str, key: str) -> list[float]:
    """One column of the log."""
    return [line[key] for line in log(folder) if line["mode"] == mode]


# ------------------------------------------------------------------------------------------------ processes


def test_two_processes_train_like_one_that_accumulates_and_at_the_same_rates(reference: Reference) -> None:
    one, two = reference(*ONE), reference(*ONE, processes=2)
    losses, rates = (trace(one, "train", key) for key in ("loss", "lr"))
    assert trace(two, "train", "loss") == pytest.approx(losses, rel=1e-5)
    assert len(losses) == 6
    assert rates == trace(two, "train", "lr")
    for size in (4, 16):
        assert rates == trace(reference(*ONE, "--per_device_train_batch_size", size), "train", "lr")
    cosine = [0.025 * (1 + math.cos(math.pi * update / 12)) for update in (2, 3, 5, 7, 8, 11)]
    assert rates == pytest.approx([cosine[0] * 2 / 4, cosine[1] * 3 / 4, *cosine[2:]])  # a warm-up over 4 updates


@pytest.mark.parametrize("size", [1, 29])
def test_every_evaluation_image_counts_once(reference: Reference, size: int) -> None:
    found = reference(*ONE, "--max_eval_samples", size, "--epochs", 1, "--warmup_epochs", 0, processes=2)
    assert trace(found, "val", "count") == [size] == trace(found, "val", "ema_count")


def test_all_processes_hold_the_same_weights(server: Server, tiny_recipe: Path, tmp_path: Path) -> None:
    args = ["--recipe", tiny_recipe, "--output_dir", tmp_path / "run", *ONE, "--dataloader_num_workers", 0]
    status, output = server.run(*args, "--epochs", 1, processes=2, faults=[["weights_hash", str(tmp_path)]])
    assert status == 0, output
    first, second = ((tmp_path / f"rank-{rank}").read_text() for rank in (0, 1))
    assert first == second and int(first.split()[0]) > 10


def test_loader_processes_change_nothing(
    server: Server, reference: Reference, tiny_recipe: Path, tmp_path: Path
) -> None:
    args = ["--recipe", tiny_recipe, "--output_dir", tmp_path / "run", *ONE, *LOG, "--dataloader_num_workers", 3]
    assert server.run(*args)[0] == 0
    assert log(tmp_path / "run") == log(reference(*ONE))
    assert (tmp_path / "run/model.safetensors").read_bytes() == (reference(*ONE) / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ the first line


@pytest.mark.parametrize("processes, size, accumulated", [(1, 8, 2), (2, 8, 1), (1, 4, 4)])
def test_the_first_line_says_what_really_runs(
    server: Server, tiny_recipe: Path, tmp_path: Path, processes: int, size: int, accumulated: int
) -> None:
    args = ["--recipe", tiny_recipe, "--output_dir", tmp_path / "run", "--per_device_train_batch_size", size]
    _, output = server.run(*args, "--dry_run", processes=processes)
    assert output.splitlines()[0] == (
        f"tiny: {processes} process{'es' * (processes > 1)} on cpu, no mixed precision, "
        f"global batch 16 = {size} per process x {processes} x {accumulated} accumulated"
    )


def test_a_batch_that_does_not_divide_is_refused_by_all_processes_in_one_line(
    server: Server, tiny_recipe: Path, tmp_path: Path
) -> None:
    args = ["--recipe", tiny_recipe, "--output_dir", tmp_path / "run", "--per_device_train_batch_size", 16]
    run = server.start(*args, processes=2)
    assert run.wait() == [2, 2]
    assert run.output().startswith("error: batch_size 16 in micro-batches of 16 does not divide over 2 processes; pass")
    assert run.output(1) == ""
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ real launchers


def launch(*args: object, env: dict[str, str] | None = None) -> str:
    """Run a launcher to its end; returns what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, args)], env=tiny.environment() | (env or {}),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def job(tiny_recipe: Path, tmp_path: Path) -> list[object]:
    """Script and arguments of a run."""
    run = ["--recipe", tiny_recipe, "--output_dir", tmp_path / "run", *LOG, *ONE, "--dataloader_num_workers", 0]
    return [tiny.ROOT / "train_mixup.py", *run]


def test_plain_python_gives_the_numbers_of_the_tests(job: list[object], reference: Reference, tmp_path: Path) -> None:
    done = tiny.start(*job[1:])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings, no tracebacks
    assert log(tmp_path / "run") == log(reference(*ONE))


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--mixed_precision", "no", "--num_processes", "2"]


@pytest.mark.parametrize(
    ("launcher", "env"),
    [(TORCHRUN, {}), ([*ACCELERATE, "--multi_gpu"], {"ACCELERATE_USE_CPU": "true"})],
    ids=["torchrun", "accelerate"],
)
def test_a_launcher_gives_the_run_of_the_tests(
    job: list[object], reference: Reference, tmp_path: Path, launcher: list[str], env: dict[str, str]
) -> None:
    output = launch(*launcher, *job, env=env)
    assert output.splitlines()[0].startswith("tiny: 2 processes on cpu")
    assert log(tmp_path / "run") == log(reference(*ONE, processes=2))


def test_accelerate_with_the_obvious_flags_starts_one_process_and_the_first_line_says_so(job: list[object]) -> None:
    output = launch(*ACCELERATE, "--cpu", *job, "--dry_run")
    assert output.splitlines()[0].startswith("tiny: 1 process on cpu")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "process"])
def test_a_signal_under_torchrun_saves_and_leaves(job: list[object], tmp_path: Path, to: str) -> None:
    """Sent to the launcher, it hides the status of the processes behind its SignalException."""
    command = [sys.executable, "-m", *TORCHRUN, *map(str, job), "--epochs", "50"]
    with (tmp_path / "output").open("w") as file:
        launcher = subprocess.Popen(command, env=tiny.environment(), stdout=file, stderr=file)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("run/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    first, *_ = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    sent, pid = (signal.SIGTERM, launcher.pid) if to == "launcher" else (signal.SIGUSR1, int(first))
    os.kill(pid, sent)
    assert launcher.wait(60) == 1
    output = (tmp_path / "output").read_text()
    assert f"{sent.name} at update" in output and checkpoints(tmp_path / "run")
    assert ("SignalException" if to == "launcher" else f"exitcode  : {STOPPED}") in output


def test_the_environment_of_a_run_is_recorded(reference: Reference) -> None:
    record = json.loads((reference(*ONE, processes=2) / "env.json").read_text())
    assert record["processes"] == 2 and record["device_type"] == "cpu" and record["mixed_precision"] == "no"
    assert record["command"][0] == "train_mixup.py" and "--mixer" in record["command"]
    assert {"torch", "timm", "accelerate", "datasets"} <= record["packages"].keys()
