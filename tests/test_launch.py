"""The result does not depend on how the global batch is cut up: processes, accumulation, loader processes, launcher."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from marks import slow_unless
from resuming import LOG, checkpoints, log

from mixup_recipes.training.job import STOPPED

ONE = ("--mixer", "deit")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--mixed_precision", "no", "--num_processes", "2"]


def trace(folder: Path, mode: str, key: str) -> list[float]:
    """One column of the log."""
    return [line[key] for line in log(folder) if line["mode"] == mode]


@pytest.fixture
def args(tiny_recipe, tmp_path):
    """The arguments of a run into the folder ``run``."""
    return ["--recipe", tiny_recipe, "--output_dir", tmp_path / "run", *LOG, *ONE, "--dataloader_num_workers", 0]


def test_two_processes_train_like_one_that_accumulates_and_at_the_same_rates(reference):
    one, two = reference(*ONE), reference(*ONE, processes=2)
    losses, rates = (trace(one, "train", key) for key in ("loss", "lr"))
    assert trace(two, "train", "loss") == pytest.approx(losses, rel=1e-5)
    assert len(losses) == 6
    assert rates == trace(two, "train", "lr")
    assert rates == trace(reference(*ONE, "--per_device_train_batch_size", 16), "train", "lr")  # 4: below
    cosine = [0.025 * (1 + math.cos(math.pi * update / 12)) for update in (2, 3, 5, 7, 8, 11)]
    assert rates == pytest.approx([cosine[0] * 2 / 4, cosine[1] * 3 / 4, *cosine[2:]])  # a warm-up over 4 updates


@pytest.mark.parametrize("size", [1, 29])
def test_every_evaluation_image_counts_once_and_all_processes_hold_the_same_weights(server, args, tmp_path, size):
    args += ["--max_eval_samples", size, "--epochs", 1, "--warmup_epochs", 0]
    status, output = server.run(*args, processes=2, faults=[["weights_hash", str(tmp_path)]])
    assert status == 0, output
    assert trace(tmp_path / "run", "val", "count") == [size] == trace(tmp_path / "run", "val", "ema_count")
    first, second = ((tmp_path / f"rank-{rank}").read_text() for rank in (0, 1))
    assert first == second and int(first.split()[0]) > 10


def test_loader_processes_change_nothing(server, reference, args, tmp_path):
    assert server.run(*args[:-1], 3)[0] == 0
    assert log(tmp_path / "run") == log(reference(*ONE))
    assert (tmp_path / "run/model.safetensors").read_bytes() == (reference(*ONE) / "model.safetensors").read_bytes()


def test_a_batch_that_does_not_divide_is_refused_by_all_processes_in_one_line(server, args, tmp_path):
    run = server.start(*args, "--per_device_train_batch_size", 16, processes=2)
    assert run.wait() == [2, 2]
    assert run.output().startswith("error: batch_size 16 in micro-batches of 16 does not divide over 2 processes; pass")
    assert run.output(1) == ""
    assert not (tmp_path / "run").exists()


LAUNCHERS = {  # command, environment, how many processes really run, and the size of their micro-batches
    "python": ([], {}, 1, 8),
    "torchrun": (TORCHRUN, {}, 2, 8),
    "accelerate": ([*ACCELERATE, "--multi_gpu"], {"ACCELERATE_USE_CPU": "true"}, 2, 8),
    "accelerate with the obvious flags": ([*ACCELERATE, "--cpu"], {}, 1, 4),
}


@pytest.mark.parametrize("launcher", slow_unless(lambda name: name == "accelerate", LAUNCHERS))
def test_a_launcher_gives_the_run_of_the_tests_whose_first_line_and_record_say_what_really_runs(
    reference, args, tmp_path, launcher
):
    command, env, processes, size = LAUNCHERS[launcher]
    command = [sys.executable, *command, tiny.ROOT / "train_mixup.py", *args, "--per_device_train_batch_size", size]
    done = subprocess.run(
        [*map(str, command)], env=tiny.environment() | env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert launcher != "python" or done.stderr == ""  # no warnings, no tracebacks
    assert done.stdout.splitlines()[0] == (
        f"tiny: {processes} process{'es' * (processes > 1)} on cpu, no mixed precision, "
        f"global batch 16 = {size} per process x {processes} x {16 // size // processes} accumulated"
    )
    run, expected = tmp_path / "run", reference(*ONE, processes=processes)
    assert trace(run, "train", "lr") == trace(expected, "train", "lr")
    assert size == 4 or log(run) == log(expected)
    record = json.loads((run / "env.json").read_text())
    assert (record["processes"], record["device_type"], record["mixed_precision"]) == (processes, "cpu", "no")
    assert record["command"][0] == "train_mixup.py" and "--mixer" in record["command"]
    assert {"torch", "timm", "accelerate", "datasets"} <= record["packages"].keys()


SLOW = """
import os, time
from datetime import timedelta
from torch.distributed import distributed_c10d
from mixup_recipes.training import data

load_splits, distributed_c10d.default_pg_timeout = data.load_splits, timedelta(seconds=0.5)

def prepare(*args):  # one process downloads and lists
    time.sleep(1.5 * (os.environ["RANK"] == "0"))
    return load_splits(*args)

data.load_splits = prepare
"""


def test_processes_wait_for_the_one_that_prepares_longer_than_a_group_waits_by_itself(server, args, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    args += ["--epochs", 1, "--warmup_epochs", 0, "--max_train_samples", 16, "--max_eval_samples", 4]
    began = time.monotonic()
    status, output = server.run(*args, processes=2, faults=[["script", str(tmp_path / "slow.py")]])
    assert status == 0 and "done: " in output, output
    assert time.monotonic() - began > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "process"])
def test_a_signal_under_torchrun_saves_and_leaves(args, tmp_path, to):
    """Sent to the launcher, it hides the status of the processes behind its SignalException."""
    command = [sys.executable, *TORCHRUN, tiny.ROOT / "train_mixup.py", *args, "--epochs", 50]
    with (tmp_path / "output").open("w") as file:
        launcher = subprocess.Popen([*map(str, command)], env=tiny.environment(), stdout=file, stderr=file)
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


def node(number: int, port: int, output: Path, args: list[Any]) -> subprocess.Popen[bytes]:
    """One of two machines that torchrun connects, each with one process; here both are this one."""
    command: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--node_rank", str(number), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += ["--max_restarts", "0", tiny.ROOT / "train_mixup.py", *args]
    with output.open("ab") as file:
        return subprocess.Popen(
            [*map(str, command)], env=tiny.environment(), stdout=file, stderr=file, start_new_session=True
        )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_two_nodes_train_as_two_processes_and_go_on_after_one_of_them_died(reference, args, tmp_path):
    long = (*ONE, "--epochs", 30)
    args += ["--epochs", 30, "--checkpointing_steps", 1, "--resume_from_checkpoint", "auto"]
    outputs = [tmp_path / f"node-{number}" for number in (0, 1)]

    def start() -> list[subprocess.Popen[bytes]]:
        port = free_port()
        return [node(number, port, outputs[number], args) for number in (0, 1)]

    nodes, deadline = start(), time.monotonic() + 100
    while not list(tmp_path.glob("run/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    worker = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()
    for pid in (nodes[1].pid, *map(int, worker)):  # its power is cut
        os.kill(pid, signal.SIGKILL)
    assert nodes[0].wait(90) != 0 and nodes[1].wait(10) == -signal.SIGKILL
    assert checkpoints(tmp_path / "run") and not (tmp_path / "run/model.safetensors").exists()
    assert [each.wait(200) for each in start()] == [0, 0], outputs[0].read_text()[-3000:]
    text, expected = outputs[0].read_text(), reference(*long, processes=2)
    assert "tiny: 2 processes on cpu" in text and "resumed from step-" in text
    assert log(tmp_path / "run") == log(expected)
    assert (tmp_path / "run/model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
