"""Promise: a sweep checks everything first, runs what is not finished, survives failures and signals, and sums up."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import yaml
from stub import soon
from tiny import ROOT, environment

from mixup_recipes import cli, flags
from mixup_recipes.data.splits import load_splits
from mixup_recipes.pages import report, seeds
from mixup_recipes.pages.sweep import sweep
from mixup_recipes.recipe import Recipe, schema
from mixup_recipes.resolve import load_recipe, resolve
from mixup_recipes.runs import processes, sweep_runs
from mixup_recipes.runs import sweep as runs_sweep
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.sweep import Sweep, plan, read_sweep
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError


def test_every_recipe_value_and_seed_makes_a_run_and_seeds_come_last_to_change(stub):
    runs = stub.runs(seeds=["0", "3"], grid=["lr=0.1,0.20"], set=["epochs=2"])
    expected = [(seed, mixer, lr, 2) for seed in (0, 3) for mixer in ("vanilla", "cutmix") for lr in (0.1, 0.2)]
    assert [(r.recipe.seed, r.recipe.mixer, r.recipe.lr, r.recipe.epochs) for r in runs] == expected
    assert [r.name for r in runs] == [f"quickstart_{mixer}-lr{lr}-seed{seed}" for seed, mixer, lr, _ in expected]
    folder = f"--output_dir {stub.out}/quickstart_cutmix-lr0.2-seed3 --resume_from_checkpoint auto"
    words = f"{ROOT}/train_mixup.py --recipe quickstart_cutmix --seed 3 {folder} --epochs=2 --lr=0.2"
    assert runs[-1].command[2:] == words.split()


def test_each_command_line_says_what_was_asked_for_and_flags_replace_and_extend_what_a_file_says(tmp_path):
    file = tmp_path / "s.yaml"
    for overrides in (
        {"scale": [0.5, 1], "mean": [-0.1, 0, 1e-5]},
        {"clip_grad": None, "aa": "rand-m9-mstd0.5-inc1", "drop_last": False, "sync_bn": True},
        {"model_args": {"drop_rate": 0.1, "output_stride": 8}, "lr": "1e-4", "mixed_precision": False},
        {"mixer.alpha": 0.3, "weight_decay": 0, "dataset": "-odd name's", "max_train_samples": 64},
        {"dataloader_num_workers": 0, "deterministic": True, "report_to": "none"},
    ):
        file.write_text(yaml.safe_dump({"recipes": ["quickstart_cutmix"], "overrides": overrides}))
        (run,) = plan(read_sweep(file, {}))
        given = flags.parse(run.command[2:], "train_mixup.py", "", {"Run": Job, "Recipe fields": Recipe})
        fields = {k: v for k, v in overrides.items() if k in schema(Recipe)}
        own = {k[6:]: v for k, v in overrides.items() if k.startswith("mixer.")}
        expected = load_recipe("quickstart_cutmix", **fields, mixer_args=own)
        assert resolve("quickstart_cutmix", given["Recipe fields"])[0] == expected == run.recipe
        job = flags.fill(Job, given["Run"])
        assert all(getattr(job, k) == v for k, v in overrides.items() if k in schema(Job))
        assert (job.recipe, job.output_dir) == ("quickstart_cutmix", "runs/sweep/quickstart_cutmix-seed0")
    file.write_text("recipes: [quickstart_mixup]\nseeds: [0, 1]\noverrides: {epochs: 20, lr: 0.1}\noutput_dir: a b\n")
    asked = read_sweep(file, {"seeds": ["5"], "set": ["epochs=3", "clip-grad=none"], "grid": ["mixer.alpha=0.2,1"]})
    overrides, grid = {"epochs": 3, "lr": 0.1, "clip_grad": "none"}, {"mixer.alpha": [0.2, 1]}
    assert asked == Sweep(["quickstart_mixup"], [5], overrides, grid, None, slurm_options=[], output_dir="a b")
    file.write_text(runs_sweep.to_yaml(asked))  # the record of a sweep is a sweep file
    assert read_sweep(file, {}) == asked


MISTAKES = (
    ("recipe: [quickstart_mixup]", "unknown key 'recipe'; did you mean 'recipes'"),
    ("seeds: [1]", "no recipes were given"),
    ("recipes: quickstart_mixup", "recipes: expected a list, got 'quickstart_mixup'"),
    ("recipes: [quickstart_mixup, quickstart_cutmx]", "unknown mixer 'cutmx'; did you mean 'cutmix'"),
    ("+ seeds: [-1]", "seeds: expected an integer at least 0, got -1"),
    ("+ seeds: []", r"seeds: expected a list, got \[\]"),
    ("+ seeds: [1, 1]", "two runs would share the folder .*quickstart_mixup-seed1"),
    ("+ overrides: {epoch: 2}", "unknown field 'epoch'; did you mean 'epochs'"),
    ("+ overrides: [epochs]", "overrides: expected a table"),
    ("+ overrides: {seed: 2}", "'seed' cannot be set here; write it under seeds"),
    ("+ overrides: {output_dir: x}", "'output_dir' cannot .*; the sweep sets it"),
    ("+ overrides: {save_total_limit: 0}", "save_total_limit: expected an integer"),
    ("+ overrides: {mixer.alhpa: 2}", "no argument 'alhpa'; did you mean 'alpha'"),
    ("+ grid: {lrs: [1]}", "grid: unknown field 'lrs'; did you mean 'lr'"),
    ("+ grid: {lr: 0.1}", "grid: lr: expected a list, got 0.1"),
    ("+ grid: {lr: [0.1, -1]}", "lr: expected a number above 0, got -1"),
    ("+ grid: {lr: [0.1, '1e-1']}", "share the folder .*-lr0.1-seed0"),
    ("+ grid: {report_to: [none]}", "grid: unknown field 'report_to'"),
    ("+ overrides: {lr: 1}\ngrid: {lr: [2]}", "lr is both in overrides and in grid"),
    ("+ launcher: acelerate launch", "there is no executable 'acelerate' in PATH; did you mean 'accelerate"),
    ("+ launcher: ' '", "there is no executable"),
    ("- quickstart_mixup", "a sweep file must be a table of names and values, got list"),
    ("+ launcher: torchrun 'x", 'launcher "torchrun \'x": No closing quotation'),
    ('recipes: ["a\\0.yaml"]', r"recipes: expected text, got 'a\\x00.yaml'"),
    ('+ launcher: "a\\0b"', r"launcher: expected text or none, got 'a\\x00b'"),
    (
        f"+ grid: {{dataset: [{'x' * 250}]}}",
        r"name quickstart_mixup-datasetx+\.\.\. has 280 letters, and at most 244 fit",
    ),
    ("+ overrides: {model: resnet10x}", "quickstart_mixup: unknown model 'resnet10x'"),
    ("+ overrides: {dataset: ./no-photos, eval_split: val}", "no-photos"),
    ("+ overrides: {opt: adamww}", "unknown optimiser 'adamww'; did you mean 'adamw'"),
)


def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path):
    file, given = tmp_path / "s.yaml", {"recipes": ["quickstart_mixup"], "output_dir": str(tmp_path / "out")}
    cases = [(content, {"output_dir": given["output_dir"]}, says) for content, says in MISTAKES]
    with pytest.raises(UserError, match="jobs: expected an integer of at least 1, got 0"):
        sweep(None, given, jobs=0)
    for value in ("2020-13-45", "9" * 5000, "&a [*a]", "{a: 1, a: 2}", "[" * 3000, "[a", "\0"):
        cases.append(("", given | {"set": [f"lr={value}"]}, r"command line: (lr|.*lr): "))
    for content, asked, says in cases:
        file.write_text(content.replace("+ ", "recipes: [quickstart_mixup]\n"))
        with pytest.raises(UserError, match=says) as caught:
            sweep(file if content else None, asked)
        assert "\n" not in str(caught.value) and [*tmp_path.iterdir()] == [file], content


def test_data_are_opened_once_before_the_first_run_and_a_set_that_is_missing_is_said(tmp_path, monkeypatch):
    opened, data = [], tiny.make_photos(tmp_path / "data")
    monkeypatch.setattr(sweep_runs, "load_splits", lambda recipe: opened.append(recipe) or load_splits(recipe))
    given = {"recipes": ["quickstart_mixup", "quickstart_cutmix"], "seeds": [0, 1], "output_dir": str(tmp_path / "out")}
    local = {"set": [f"dataset={data}", "eval_split=test", "num_classes=4", "batch_size=64"]}
    assert sweep(None, given | local | {"grid": ["lr=0.1,0.2"]}, dry_run=True) == 0 and len(opened) == 1
    monkeypatch.setenv("MIXUP_RECIPES_CACHE", str(tmp_path / "cache"))
    missing = given | {"set": ["dataset=cub200", "num_classes=200"]}
    with pytest.raises(UserError, match="prepare cub200"):
        sweep(None, missing, dry_run=True)
    assert sweep(None, missing, slurm=tmp_path / "job.sh") == 0  # other machines may have it


def test_a_folder_with_another_recipe_or_an_output_that_is_a_folder_is_refused_before_the_first_run_starts(stub):
    assert stub(recipes=["quickstart_cutmix"]) == 0
    before = stub.calls()
    with pytest.raises(UserError, match="another recipe: epochs: 2 there, 3 now"):
        stub(set=["epochs=3"], tables=True)  # vanilla comes first and has no folder yet
    assert stub.calls() == before and not (stub.out / "quickstart_vanilla-seed0").exists()
    (stub.out / "output-quickstart_vanilla-seed0.txt").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*output-quickstart_vanilla-seed0.txt: Is a directory"):
        sweep(None, stub.base, dry_run=True)


def test_a_dry_run_says_what_each_run_is_and_opens_nothing_for_writing(stub, monkeypatch, capsys):
    runs = stub.runs(seeds=[0, 1, 2])
    assert stub({runs[1].name: "1"}, seeds=[0, 1]) == 1
    (runs[2].folder / "summary.csv").write_bytes(b"\xff\xfe\x00")
    before, opened = {p: p.read_bytes() for p in stub.out.rglob("*") if p.is_file()}, Path.open
    capsys.readouterr()

    def read_only(path, mode="r", *args, **options):
        assert not set(mode) & set("wax+"), f"{path} is opened for writing"
        return opened(path, mode, *args, **options)

    with runs[3].output.open("ab") as file, monkeypatch.context() as patch:
        fcntl.flock(file, fcntl.LOCK_EX)
        patch.setattr(Path, "open", read_only)
        assert sweep(None, stub.base | {"seeds": [0, 1, 2]}, dry_run=True) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [state for state, _ in lines] == ["finished", "resumable", "resumable", "running", "new", "new"]
    assert [command for _, command in lines] == [shlex.join(run.command) for run in runs]
    assert {p: p.read_bytes() for p in stub.out.rglob("*") if p.is_file()} == before


def test_failures_do_not_stop_the_others_and_are_reported_at_the_end(stub, capsys):
    names = [run.name for run in stub.runs(seeds=[0, 1])]
    assert stub({names[0]: "1", names[1]: "kill", names[2]: "early"}, tables=True, seeds=[0, 1]) == 1
    assert stub.called() == names
    text = capsys.readouterr().out
    assert f"[1/4] {names[0]}: started" in text and re.search(rf"\[4/4\] {names[3]}: 0.0 min, top-1 51.00 \(", text)
    at_the_end = text[text.index("[4/4]") :]
    lines, output = "\n".join(f"    {names[0]} line {i}" for i in range(4, 9)), stub.out / f"output-{names[0]}.txt"
    assert f"{names[0]} failed: exit status 1; its output is in {output}\n{lines}\n" in at_the_end
    assert f"{names[1]} failed: killed by SIGKILL" in at_the_end
    assert f"{names[2]} failed: exit status 0, but epoch 2 was not evaluated" in at_the_end
    assert "3 of 4 runs failed" in at_the_end and "finished: 1 of 4 runs" in at_the_end
    assert output.read_text().startswith(f"$ {shlex.join(stub.runs()[0].command)}\nfirst line\n")
    assert "| cutmix | 51.00 (2 of 5 epochs) |  | 1 | 51.00 | 51.00 |" in (stub.out / "summary.md").read_text()
    assert all((stub.out / name).exists() for name in ("table.md", "dots.png", "curves.png", "sweep.yaml"))
    output.write_bytes(b"before\n" * 9 + b"$ command\n\n50 %\r100 %\r\nend \xff\n")
    assert sweep_runs.last_lines(output, 9 * 7) == ["50 %", "100 %", "end \ufffd"]  # those of this time
    assert sweep_runs.last_lines(output, 0) == ["before", "before", "50 %", "100 %", "end \ufffd"]


def test_finished_runs_are_skipped_others_resumed_and_one_stopped_by_its_own_signal_is_no_failure(stub, capsys):
    first, second = (run.name for run in stub.runs())
    assert [stub({first: "75"}), stub({first: "kill"}), stub(), stub()] == [75, 1, 0, 0]
    assert stub.called() == [first, second, first, first]
    text = capsys.readouterr().out
    assert f"{second}: finished before" in text and f"{first}: resumed" in text
    # the time left is that of other seeds, or else the mean
    *done, _, _ = runs = stub.runs(seeds=[0, 1])
    log = done[1].folder / "log.jsonl"
    log.write_text(log.read_text().replace("120.0", "480.0"))  # seconds
    found = [sweep_runs.time_left(done, left) for left in (runs[2:], stub.runs(recipes=["quickstart_mixup"]), [])]
    assert found == ["; about 10.0 min left", "; about 5.0 min left", ""]  # 2 + 8, (2 + 8) / 2


def test_the_report_needs_no_run_and_leaves_out_what_is_not_finished_and_names_what_was_not_asked_for(stub, capsys):
    assert stub(dict.fromkeys((run.name for run in stub.runs()), "2"), tables=True) == 1
    assert "no run is finished" in capsys.readouterr().out and not (stub.out / "table.md").exists()
    assert stub(seeds=[0, 1]) == 0 and stub(tables=True) == 0
    says = f"also in {stub.out}, but not of this sweep: quickstart_cutmix-seed1, quickstart_vanilla-seed1\n"
    assert says in capsys.readouterr().out
    (stub.out / "summary.md").unlink()
    (stub.runs()[0].folder / "summary.csv").write_text("epoch,train_loss\n1,2.0\n")  # the export lags behind the log
    assert sweep(stub.out / "sweep.yaml", {"seeds": [0, 1]}, report_only=True) == 0
    text = capsys.readouterr().out
    assert "finished: 3 of 4 runs" in text and "not of this sweep" not in text
    assert (stub.out / "summary.md").exists()
    assert sweep_runs.state(stub.runs()[0]) == "resumable" and len(stub.calls()) == 6


# What leaves is outlived by a process that is asked to save and waited for; what is stubborn is killed the second time.
SIGNALS = [("wait", "SIGTERM"), ("wait", "SIGINT"), ("wait", "SIGUSR1"), ("leave", "SIGTERM"), ("stubborn", "SIGINT")]


@pytest.mark.parametrize(("what", "name"), SIGNALS)
def test_a_signal_reaches_the_run_which_saves_and_the_sweep_leaves_with_75(stub, what, name, capsys):
    first, second = (run.name for run in stub.runs())
    number, main = signal.Signals[name], threading.main_thread().ident
    handler, when = signal.getsignal(number), [stub.waits, (stub.folder / "asked").exists][: 1 + (what == "stubborn")]
    threads = [soon(happened, lambda: signal.pthread_kill(main, number)) for happened in when]
    assert stub({first: what}) == 75
    for thread in threads:
        thread.join()
    text = capsys.readouterr().out
    assert f"{first}: 0.0 min, stopped" in text and f"{name}: stopped; run the same command again to continue" in text
    assert (stub.folder / "saved").exists() == (what != "stubborn") and not (stub.folder / "over").exists()
    assert f"{second}: started" not in text and stub.called() == [first]
    assert signal.getsignal(number) == handler
    assert stub() == 0
    assert stub.called() == [first, first, second]


def test_several_runs_go_on_at_a_time_and_what_is_left_comes_next_in_order(stub, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = [run.name for run in stub.runs(seeds=[0, 1, 2])]
    assert stub({names[0]: "meet", names[1]: "meet", names[3]: "2"}, seeds=[0, 1, 2], jobs=2) == 1
    assert sorted(stub.called()[:2]) == sorted(names[:2]) and sorted(stub.called()) == sorted(names)
    text = capsys.readouterr().out
    assert f"{names[3]} failed: exit status 2" in text and "1 of 6 runs failed" in text
    environments = [json.loads((stub.folder / f"env-{name}").read_text()) for name in names]
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {e["OMP_NUM_THREADS"] for e in environments} == {share}
    assert stub(seeds=[0, 1, 2], jobs=9, tables=True) == 0 and stub.called() == [*stub.called()[:6], names[3]]
    assert "finished: 6 of 6 runs" in capsys.readouterr().out


def test_each_run_has_a_gpu_of_its_own_as_far_as_there_are_some(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sweep_runs.torch.cuda, "device_count", lambda: 3)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in sweep_runs.environments(4)] == ["0", "1", "2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in sweep_runs.environments(2)] == ["5", "GPU-ab"]
    assert sweep_runs.environments(1) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweep_runs.environments(2) == [{"OMP_NUM_THREADS": "3"}] * 2


def test_a_signal_reaches_all_runs_that_go_on(stub, capsys):
    names, main = [run.name for run in stub.runs(seeds=[0, 1])], threading.main_thread().ident
    both = soon(
        lambda: all((stub.folder / f"env-{name}").exists() for name in names[:2]) and stub.waits(),
        lambda: (time.sleep(0.3), signal.pthread_kill(main, signal.SIGTERM)),
    )
    assert stub(dict.fromkeys(names, "wait"), seeds=[0, 1], jobs=2) == 75
    both.join()
    assert sorted(p.name for p in stub.folder.glob("saved-*")) == sorted(f"saved-{name}" for name in names[:2])
    assert (
        len(stub.called()) == 2
        and "SIGTERM: stopped; run the same command again to continue" in capsys.readouterr().out
    )
    assert stub(seeds=[0, 1], jobs=3) == 0


def test_a_signal_while_a_run_is_being_started_reaches_it(stub, monkeypatch):
    start = subprocess.Popen

    def popen(*args, **options):
        child = start(*args, **options)
        soon(stub.waits).join()
        signal.raise_signal(signal.SIGTERM)  # nobody knows the child yet
        return child

    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    assert stub({stub.runs()[0].name: "wait"}) == 75
    assert (stub.folder / "saved").exists()


def test_a_run_that_another_sweep_is_at_or_somebody_started_by_hand_is_left_alone(stub, capsys):
    first, second = stub.runs()
    stub.out.mkdir()
    with first.output.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep_runs.state(first) == "running" and stub() == 75
    assert stub.called() == [second.name]
    assert f"{first.name}: another process is running it; skipped" in capsys.readouterr().out
    assert stub({first.name: "1"}) == 1
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", lock, first.folder / ".lock"], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        assert sweep_runs.state(first) == "running"
        other.stdin.close()
    assert sweep_runs.state(first) == "resumable" and stub() == 0


def test_a_run_left_behind_by_a_sweep_that_was_killed_counts_as_running(stub):
    first, _ = stub.runs()
    stub.tell({first.name: "wait"})
    code = f"from mixup_recipes.pages.sweep import sweep; sweep(None, {stub.base!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.DEVNULL)
    soon(stub.waits, process.kill).join()
    process.wait()
    assert sweep_runs.state(first) == "running"
    os.kill(int((stub.folder / "pid").read_text()), signal.SIGTERM)
    soon(lambda: sweep_runs.state(first) != "running").join()
    assert sweep_runs.state(first) == "resumable"


def test_each_sweep_of_the_documents_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    docs = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/sweeps.md"))
    (content,) = re.findall(r"```yaml\n# baselines.yaml\n(.*?)```", docs, re.S)
    Path("baselines.yaml").write_text(content)
    commands = {line.rstrip(" &") for line in re.findall(r"mixup-recipes (sweep [^`\n#]*)", docs)}
    assert len(commands) >= 5
    for argv in map(shlex.split, commands):
        assert cli.app(argv if "--dry_run" in argv else [*argv, "--dry_run"]) == 0
        runs = capsys.readouterr().out.splitlines()
        assert len(runs) == (18 if "baselines.yaml" in argv else 12 if "--grid" in argv else 6)


def test_a_sweep_of_a_real_run_ends_in_tables_and_is_done_the_second_time(tiny_recipe, tmp_path, monkeypatch, capsys):
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    overrides = {"epochs": 1, "warmup_epochs": 0, "max_train_samples": 32, "dataloader_num_workers": 0}
    content = {"recipes": [str(tiny_recipe)], "overrides": overrides | {"report_to": "none"}, "output_dir": "out"}
    Path("sweep.yaml").write_text(yaml.safe_dump(content | {"grid": {"mixer": ["cutmix"]}}))
    assert cli.app(["sweep", "sweep.yaml"]) == 0
    text, run = capsys.readouterr().out, Run.open("out/tiny-mixercutmix-seed0")
    says = rf"\[1/1\] {run.folder.name}: \d+\.\d min, top-1 {run.summary.reading.value:.2f} \(median of the last 2"
    assert re.search(says, text)
    assert Path("out/summary.md").read_text() == seeds.seeds_table([run]) and seeds.seeds_table([run]) in text
    assert Path("out/table.md").read_text() == report.runs_table([run])
    assert all(Path(f"out/{name}.png").stat().st_size > 10_000 for name in ("dots", "curves"))
    log = (run.folder / "log.jsonl").read_bytes()
    assert cli.app(["sweep", "sweep.yaml"]) == 0
    assert capsys.readouterr().out.count("finished before") == 1
    assert (run.folder / "log.jsonl").read_bytes() == log


def test_a_planned_run_takes_from_its_weights_what_training_takes(tmp_path):
    """Else a sweep of a setting for fine-tuning would not know its own runs."""
    config = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 96, 96], "crop_pct": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    (tmp_path / "model.safetensors").touch()
    asked = {"recipes": ["finetune_vanilla"], "set": [f"pretrained={tmp_path}", "eval_size=64"]}
    (run,) = plan(read_sweep(None, asked | {"output_dir": str(tmp_path / "out")}))
    found = run.recipe
    assert (found.mean, found.std, found.eval_resize) == ((0.5,) * 3, (0.25,) * 3, 128)
    assert (found.image_size, found.eval_size) == (96, 64) and "--mean" not in run.command
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"^finetune_vanilla: "):
        plan(read_sweep(None, asked))
