"""Promise: runs of a sweep become jobs that start once, save in time, are queued again; each says what became of it."""

import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from stub import soon
from tiny import environment

from mixup_recipes import files
from mixup_recipes.pages import sweep as page
from mixup_recipes.pages.sweep import sweep
from mixup_recipes.runs import queued, submission
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.sweep import plan, read_sweep
from mixup_recipes.typed import UserError

# What stands where Slurm does: sbatch keeps the script, srun runs what follows its own options, others say or note.
CLUSTER = {
    "sbatch": 'cp "$1" job.sh; echo "Submitted batch job 77"',
    "srun": 'while :; do case "$1" in --output) shift 2;; --*) shift;; *) break;; esac; done; exec "$@"',
    "squeue": 'echo "$@" >> asked; cat queue',
    "scontrol": 'echo "$@" >> requeued',
}


@pytest.fixture
def local(stub, monkeypatch):
    """The sweep of the stub as jobs on this machine, without tables and plots."""
    stub.base["launcher"] = f"local {stub.base['launcher']}"
    monkeypatch.setattr(page, "results", lambda runs, out: "tables")
    stub.planned = stub.runs()
    stub.tell({})
    return stub


def standings(stub):
    """What each run is, by the last part of its name."""
    found = submission.standings(stub.planned, stub.out)
    return {run.recipe.mixer: now for run, now in zip(stub.planned, found, strict=True)}


def settled(stub):
    """What each run is once no job goes on."""
    deadline = time.monotonic() + 120
    while {"queued", "running"} & {*(found := {name: now.state for name, now in standings(stub).items()}).values()}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_a_sweep_killed_before_it_noted_a_job_starts_no_run_twice_and_all_end(local, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(submission, "claim", killed)
        sweep(None, local.base)
    assert sweep(None, local.base) in (0, 75)
    assert settled(local) == {"vanilla": "finished", "cutmix": "finished"}
    assert sorted(local.called()) == sorted(run.name for run in local.planned)
    capsys.readouterr()
    assert sweep(None, local.base) == 0
    assert "submitted: 0 of 2 runs\ntables" in capsys.readouterr().out and len(local.called()) == 2


def test_a_job_that_finds_its_run_given_to_another_one_leaves(local, monkeypatch, capsys):
    run = local.planned[0]
    assert [queued.claim(run.folder, "slurm", job) for job in ("77_0", "78_0")] == ["77_0", "77_0"]
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "5")
    queued.QueuedRun("local", run.command, run.output, run.folder, os.getcwd())()
    assert "was given to job 77_0" in capsys.readouterr().out and local.called() == []


@pytest.mark.parametrize("times, requeued", [(98, 1), (99, 0)])
def test_a_run_that_leaves_with_75_by_itself_is_queued_again_but_not_for_ever(local, monkeypatch, times, requeued):
    run, raised = local.planned[0], []
    local.tell({run.name: "75"})
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "5")
    monkeypatch.setattr(queued.signal, "raise_signal", raised.append)
    assert queued.claim(run.folder, "local", "5") == "5"
    (run.folder / ".job.json").write_text(json.dumps({"queue": "local", "job": "5", "times": times}))
    with pytest.raises(SystemExit, match="75"):
        queued.QueuedRun("local", run.command, run.output, run.folder, os.getcwd())()
    assert len(raised) == requeued and queued.noted(run.folder)["times"] == times + 1


def test_a_note_that_is_damaged_counts_as_none_and_storage_without_locks_is_told(local, monkeypatch):
    folder = local.planned[0].folder
    folder.mkdir(parents=True)
    for text in ("", "5", "null", '{"queue": "local"}', '{"queue": "local", "job": "x"}'):
        (folder / ".job.json").write_text(text)
        assert standings(local)["vanilla"].state == "new"
    assert queued.claim(folder, "slurm", "7_0") == "x"
    (folder / ".job.json").write_text("")
    assert queued.claim(folder, "slurm", "7_0") == "7_0"

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    with (folder / ".job.json").open("rb") as file, pytest.raises(UserError, match="this storage has no file locks"):
        files.locked(refuse, file, fcntl.LOCK_EX)


def test_a_job_saves_and_is_queued_again_or_leaves_when_it_is_cancelled_and_a_failure_is_told(local, capsys):
    failing, waiting = (run.name for run in local.planned)
    local.tell({failing: "2", waiting: "wait"})
    assert sweep(None, local.base) == 75
    soon(local.waits).join()
    controller = psutil.Process(int(standings(local)["cutmix"].job))
    assert standings(local)["cutmix"].state == "running"
    controller.terminate()  # cancelled
    assert settled(local) == {"vanilla": "failed", "cutmix": "resumable"}
    assert (local.folder / "saved").exists() and local.called().count(waiting) == 1
    (local.folder / "waiting").unlink()
    capsys.readouterr()
    assert sweep(None, local.base) == 1
    text = capsys.readouterr().out
    assert f"{failing} failed: exit status 2; its output is in {local.out}" in text
    assert f"    {failing} line 8\n" in text and "submitted: 2 of 2 runs" in text
    soon(local.waits).join()
    local.tell({failing: "2"})  # the failing one may begin only now
    (job,) = psutil.Process(int(standings(local)["cutmix"].job)).children()
    job.send_signal(signal.SIGUSR1)  # its time is up
    assert settled(local) == {"vanilla": "failed", "cutmix": "finished"}
    assert local.called().count(waiting) == 3
    log = next((local.out / "submitit").glob(f"{standings(local)['vanilla'].job}_0_log.out"))
    assert "the run ended with status 2" in log.read_text()


@pytest.fixture
def slurm(local, monkeypatch):
    """The same in a stand-in for Slurm."""
    (local.folder / "bin").mkdir()
    (local.folder / "queue").touch()
    for name, line in CLUSTER.items():
        script = local.folder / f"bin/{name}"
        script.write_text(f"#!/bin/sh\n[ {name} = srun ] || cd {shlex.quote(str(local.folder))}\n{line}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{local.folder}/bin:{os.environ['PATH']}")
    local.base["launcher"] = local.base["launcher"].replace("local", "slurm", 1)
    local.base["slurm_options"] = ["--partition=gpu", "time=1-2", "cpus-per-task=8", "signal=B:USR1@300", "exclusive"]
    return local


def task(stub, number):
    """Start a task of the array as Slurm would."""
    env = os.environ | {
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_JOB_ID": str(78 + number),
    }
    return subprocess.Popen(["bash", stub.folder / "job.sh"], env=env, stdout=subprocess.DEVNULL)


def test_slurm_gets_one_array_of_what_nobody_is_at_and_a_task_whose_time_is_up_is_queued_again(slurm, capsys):
    runs, asked = slurm.runs(seeds=[0, 1]), slurm.base | {"seeds": [0, 1]}
    slurm.tell({runs[0].name: "wait", runs[1].name: "1"})
    assert sweep(None, asked, jobs=3) == 75
    script = (slurm.folder / "job.sh").read_text()
    head = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert head >= {"array=0-3%3", "partition=gpu", "time=1560", "cpus-per-task=8", "exclusive", "requeue"}
    assert head >= {"signal=USR1@300", "job-name=out"} and not [x for x in head if "wckey" in x or "nodes=2" in x]
    assert "srun --unbuffered" in script and "--cpus-per-task=8" in script.split("srun")[1]
    first = task(slurm, 0)
    soon(slurm.waits).join()
    # the wrapper, not the script around it: Slurm signals the tasks of srun
    signal_to = next(p for p in psutil.Process(first.pid).children() if "submitit.core._submit" in p.cmdline())
    signal_to.send_signal(signal.SIGUSR1)
    first.wait(60)
    assert (slurm.folder / "requeued").read_text() == "requeue 77_0\n" and (slurm.folder / "saved").exists()
    assert task(slurm, 1).wait(60) == 1 and task(slurm, 2).wait(60) == 0
    (slurm.folder / "queue").write_text("77_0 PENDING\n")
    found = [now[:2] for now in submission.standings(runs, slurm.out)]
    assert found == [("queued", "77_0"), ("failed", "77_1"), ("finished", ""), ("new", "")], "the last never began"
    assert "--jobs=77_0,77_1,77_2,77_3" in (slurm.folder / "asked").read_text()
    capsys.readouterr()
    (runs[3].folder / ".job.json").write_text('{"queue": "slurm", "job": "77_3", "start": 0}')
    assert sweep(None, asked, dry_run=True) == 0
    assert f"{runs[3].name} failed: job 77_3 was killed: it ended and left no result" in capsys.readouterr().out
    assert sweep(None, asked) == 1 and "submitted: 2 of 4 runs" in capsys.readouterr().out
    assert json.loads((runs[1].folder / ".job.json").read_text()) == {"queue": "slurm", "job": "77_0"}
    assert "--array=0-1%" in (slurm.folder / "job.sh").read_text()


MISTAKES = (
    ("local", ["array=0-3"], "'array=0-3' cannot be set here; --jobs N says"),
    ("local", ["--ntasks-per-node=2"], "a run is one task on one node"),
    ("local", ["time=soon"], "time: expected minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, got 'soon'"),
    ("local", ["tiem=10"], "unknown option 'tiem'; did you mean time?"),
    ("local", ["time=10", "time=20"], "time is given twice"),
    ("local", ["time=2"], "expected more than the 120 seconds that a run takes"),
    ("local", ["signal=TERM@9"], "signal: expected USR1@SECONDS"),
    ("local", ["gpus-per-node=a100:2"], "gpus_per_node: expected a number"),
    ("local", ["gres gpu"], "expected options of sbatch"),
    ("slurm", ["gres=gpu:1"], "time is missing; it says when a run is saved"),
    ("slurm", ["time=5"], "needs a machine of a Slurm cluster, and sbatch is not in PATH"),
)


def test_what_cannot_be_submitted_is_one_line_and_nothing_is_written(stub, monkeypatch):
    for launcher, options, says in MISTAKES:
        with pytest.raises(UserError, match=says):
            sweep(None, stub.base | {"launcher": launcher, "slurm_options": options})
    with pytest.raises(UserError, match="the launcher local starts all runs at once"):
        sweep(None, stub.base | {"launcher": "local"}, jobs=2)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"need submitit: pip install 'mixup-recipes\[slurm\]'"):
        sweep(None, stub.base | {"launcher": "local"})
    assert not stub.out.exists()
    times = {"90": 90, "1:30": 1.5, "2:00:30": 120.5, "1-2": 1560, "1-2:03": 1563, "0-0:1:30": 1.5}
    assert {text: submission.minutes(text) for text in times} == times


@pytest.mark.slow
def test_real_runs_go_on_when_their_sweep_was_killed_and_end_whole(tiny_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    content = {"recipes": [str(tiny_recipe)], "seeds": [0, 1], "overrides": {"dataloader_num_workers": 0}}
    content |= {"launcher": "local", "output_dir": "out"}
    Path("sweep.yaml").write_text(yaml.safe_dump(content))
    first, second = (run.folder for run in plan(read_sweep(Path("sweep.yaml"), {})))
    command = subprocess.Popen([sys.executable, "-m", "mixup_recipes", "sweep", "sweep.yaml"])
    soon((first / ".job.json").exists, command.kill).join()
    command.wait()
    job = json.loads((first / ".job.json").read_text())["job"]
    assert sweep(Path("sweep.yaml"), {}) in (0, 75)
    assert job in capsys.readouterr().out
    deadline = time.monotonic() + 300
    while (status := sweep(Path("sweep.yaml"), {})) == 75 and time.monotonic() < deadline:
        time.sleep(1)
    assert status == 0
    outputs = [Path(f"out/output-{folder.name}.txt").read_text() for folder in (first, second)]
    assert [text.count("$ ") for text in outputs] == [1, 1]
    assert [len(Run.open(folder).log.val) for folder in (first, second)] == [3, 3]
