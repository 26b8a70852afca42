"""Promise: a sweep becomes an array of Slurm that saves in time, is queued again, and tries no failure for ever."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from stub import soon

from mixup_recipes.pages.sweep import sweep
from mixup_recipes.typed import UserError


def slurm(stub, number, script, act=lambda process: None):
    """Run a task of the array as Slurm would, with a scontrol that writes down what it was asked: errors and status."""
    scontrol = stub.folder / "bin/scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(stub.folder))}/requeued\n')
    scontrol.chmod(0o755)
    env = os.environ | {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(number)}
    env["PATH"] = f"{stub.folder}/bin:{env['PATH']}"
    process = subprocess.Popen(["bash", script], env=env, cwd="/", stderr=subprocess.PIPE, text=True)
    act(process)
    return process.communicate(timeout=30)[1], process.returncode


def test_the_slurm_script_holds_one_task_per_unfinished_run(stub, capsys, monkeypatch):
    monkeypatch.chdir(stub.folder)
    stub.out = Path("with space's")  # relative to where the script is written
    stub.base["output_dir"] = str(stub.out)
    stub(recipes=["quickstart_vanilla"])
    runs, script, asked = stub.runs(seeds=[0, 1]), stub.folder / "job.sh", stub.base | {"seeds": [0, 1]}
    capsys.readouterr()
    assert sweep(None, asked | {"slurm_options": ["gres=gpu:1", "--time=1:00:00"]}, slurm=script) == 0
    says = f"  mixup-recipes sweep {shlex.quote(f'{stub.out}/sweep.yaml')} --report"
    assert capsys.readouterr().out.splitlines()[1:] == [f"  sbatch {script}", says]
    head = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"array=0-2", "gres=gpu:1", "time=1:00:00", "requeue", "signal=B:USR1@120"} <= {*head}
    subprocess.run(["bash", "-n", script], check=True)
    stub.tell({runs[1].name: "75", runs[2].name: "1"})
    assert [slurm(stub, number, script) for number in range(3)] == [("", 75), ("", 1), ("", 0)]
    assert stub.calls()[1:] == [run.command[2:] for run in runs[1:]]
    assert (stub.folder / "requeued").read_text() == "requeue 77_0\n"  # what failed is not tried for ever
    assert (stub.out / f"output-{runs[2].name}.txt").read_text().startswith("first line")
    says, status = slurm(stub, 3, script)
    assert "no task 3" in says and status == 2


def test_a_slurm_task_saves_before_its_time_is_up_and_is_queued_again_and_no_task_is_no_script(stub, capsys):
    script = stub.folder / "job.sh"
    for option in ("gres gpu", "time=1\nrm -rf x", "-", ""):
        with pytest.raises(UserError, match="slurm_options: expected options of sbatch"):
            sweep(None, stub.base | {"slurm_options": [option]}, slurm=script)
    assert not stub.out.exists() and not script.exists()
    sweep(None, stub.base, slurm=script)
    stub.tell({stub.runs()[0].name: "wait"})
    left = slurm(stub, 0, script, lambda task: soon(stub.waits, lambda: task.send_signal(signal.SIGUSR1)).join())
    assert left == ("", 75) and (stub.folder / "requeued").read_text() == "requeue 77_0\n"
    script.unlink()
    stub()
    assert sweep(None, stub.base, slurm=script) == 0
    assert "nothing to submit" in capsys.readouterr().out and not script.exists()


def test_options_that_would_be_ignored_or_overruled_are_refused(stub, tmp_path):
    stub.runs()
    for options, more, says in (
        (["time=5"], {}, "slurm_options need --launcher slurm or local, or --slurm FILE"),
        (["array=1"], {"slurm": tmp_path / "job.sh"}, "slurm_options: array cannot be set here"),
        (["time=5"], {"slurm": tmp_path / "job.sh", "jobs": 2}, "jobs: Slurm itself decides"),
    ):
        with pytest.raises(UserError, match=says):
            sweep(None, stub.base | {"slurm_options": options}, **more)
    assert not (tmp_path / "job.sh").exists() and not stub.out.exists()
