"""Command lines: every spelling of a flag, help without torch, names that are the same in all commands, quiet ends."""

import dataclasses
import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import rich.console
from cyclopts import App
from tiny import ROOT, environment

import evaluate_mixup
from mixup_recipes import __version__, flags
from mixup_recipes.cli import app
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import resolve
from mixup_recipes.training.job import Job
from mixup_recipes.typed import RankError, UserError

CLASSES = {"Run": Job, "Recipe fields": Recipe}
MIXUP_RECIPES = [sys.executable, "-m", "mixup_recipes"]


def parse(argv: str) -> dict[str, Any]:
    """The recipe fields of a command line, raw."""
    return flags.parse(argv.split(), "program", "What it does.", CLASSES)["Recipe fields"]


@pytest.mark.parametrize(
    ("spellings", "given"),
    [
        ("", {}),
        ("--batch_size 64 | --batch-size 64 | --batch_size=64", {"batch_size": "64"}),
        ("--per-device_train-batch_size 8", {"per_device_train_batch_size": "8"}),
        ("--lr 1e-4", {"lr": "1e-4"}),
        ("--clip_grad none", {"clip_grad": "none"}),
        ("--sync_bn | --sync-bn | --sync_bn true | --sync_bn True", {"sync_bn": True}),
        ("--no-sync-bn | --no-sync_bn | --sync-bn false | --sync_bn=false", {"sync_bn": False}),
        ("--drop_last False --seed 3", {"drop_last": False, "seed": "3"}),
        ("--sync_bn --seed 3", {"sync_bn": True, "seed": "3"}),
        ("--dataset true", {"dataset": "true"}),
        ("--scale 0.5 1 | --scale=[0.5,1]", {"scale": ("0.5", "1")}),
        ("--mean 0.1 0.2 0.3 --seed 3", {"mean": ("0.1", "0.2", "0.3"), "seed": "3"}),
        ("--opt_betas 0.9 0.95", {"opt_betas": ("0.9", "0.95")}),
        ("--opt_betas none", {"opt_betas": "none"}),
        ("--opt-betas [0.9, 0.95] --seed 3", {"opt_betas": ("0.9", "0.95"), "seed": "3"}),
        ("--model_args.channels 16 32 64", {"model_args": {"channels": "[16, 32, 64]"}}),
        ("--model_args.channels [16, 32, 64] --lr 1", {"model_args": {"channels": "[16, 32, 64]"}, "lr": "1"}),
        ("--model_args.channels=[16,32,64]", {"model_args": {"channels": "[16,32,64]"}}),
        ('--model_args={"a":"b","c":null}', {"model_args": {"a": "b", "c": "null"}}),
        ('--mixer_args {"alpha":0.5} --lr 1', {"mixer_args": {"alpha": "0.5"}, "lr": "1"}),
        ("--model_args.shift -1 --lr 1", {"model_args": {"shift": "-1"}, "lr": "1"}),
        ("--model_args.img_size 64 | --model-args.img_size 64", {"model_args": {"img_size": "64"}}),
        (
            "--mixer cutmix --mixer.alpha 0.5 | --mixer.alpha=0.5 --mixer cutmix",
            {"mixer": "cutmix", "mixer_args": {"alpha": "0.5"}},
        ),
        ("--mixer.mixup_alpha 1 --mixer.cutmix_alpha 2", {"mixer_args": {"mixup_alpha": "1", "cutmix_alpha": "2"}}),
    ],
)
def test_a_flag_may_be_spelt_in_every_usual_way(spellings, given):
    assert [parse(argv) for argv in spellings.split(" | ")] == [given] * (spellings.count(" | ") + 1)


def test_a_table_that_is_none_is_refused_with_an_example():
    with pytest.raises(UserError, match=r"^--model_args: expected a table such as '\{NAME: VALUE\}', got '\{depth'$"):
        parse("--model_args {depth")


def test_a_command_line_becomes_a_recipe_and_a_job() -> None:
    argv = "--mixer cutmix --mixer.alpha 5e-1 --model_args.img_size 64 --model_args.pretrained false --lr 1e-3"
    argv += " --scale 0.5 1 --no-drop-last --sync_bn true --clip_grad none --model_args.depths 1 2 --opt_betas [0.8, 1]"
    recipe, origin = resolve("deit_s", parse(argv))
    assert (recipe.name, recipe.mixer_args["cutmix"]) == ("deit_s_cutmix", {"alpha": 0.5})
    assert recipe.model_args == {"img_size": 64, "pretrained": False, "depths": [1, 2]}
    assert (recipe.opt_betas, recipe.clip_grad) == ((0.8, 1.0), None)
    assert (recipe.lr, recipe.scale, recipe.drop_last, recipe.sync_bn) == (1e-3, (0.5, 1.0), False, True)
    assert origin["lr"] == origin["clip_grad"] == origin["mixer_args.cutmix.alpha"] == "command line"
    argv = "--recipe r50_100e_mixup --epochs 2 --dry_run --save-total-limit 3"
    given = flags.parse(argv.split(), "program", "", CLASSES)
    assert given["Recipe fields"] == {"epochs": "2"}
    assert given["Run"] == {"recipe": "r50_100e_mixup", "dry_run": True, "save_total_limit": "3"}
    job = flags.fill(Job, given["Run"])
    assert (job.recipe, job.dry_run, job.save_total_limit) == ("r50_100e_mixup", True, 3)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--batch_sise 3", "Unknown option: --batch_sise. Did you mean --batch_size?"),
        ("--epochs", "--epochs requires an argument"),
        ("--sync_bn=maybe", 'unable to convert "maybe" into bool'),
        ("--seed 1 --seed 2", "--seed specified multiple times"),
        ("stray", "stray"),
    ],
)
def test_a_wrong_flag_is_one_line(argv, says):
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert says in str(caught.value) and "\n" not in str(caught.value)


OTHER = {
    "card": "error: card: RUN is missing. Folder of a run.",
    "card a b c": "error: too many arguments: b c",
    "replay runs/x": "error: replay: --step is missing. Number of the update, counted from 0.",
    "sweep --epochs 1": "error: unknown flag --epochs; for the runs of a sweep: --set epochs=VALUE",
    "masks a --pairs x": "error: Invalid value for --pairs: expected an integer, got 'x'",
    "table --format pdf": 'error: Invalid value "pdf" for --format. Choose from: "md", "csv", "latex", "html".',
    "tabel": 'error: Unknown command "tabel". Did you mean "table"?',
    "cells shw": 'error: Unknown command "shw". Did you mean "show"?',
}


def test_a_wrong_command_line_is_one_line_in_every_command(console):
    for line, says in OTHER.items():
        status, out, err = console(*line.split())
        assert (status, out) == (2, "") and err.startswith(says) and err.count("\n") == 1, line


WRONG = {
    "--save_total_limit 0": "command line: save_total_limit: expected an integer at least 1, got '0'",
    "--on_bad_image skp": "expected one of stop, skip, got 'skp'; did you mean 'skip'?",
    "--checkpointing_steps 0": "checkpointing_steps: expected 'epoch' or an integer at least 1, got '0'",
    "--checkpointing_steps 1.5": "checkpointing_steps: expected 'epoch' or an integer at least 1, got '1.5'",
}
for flag, meant in {
    "--epoch": "epochs", "--learning-rate": "lr", "--num_epochs": "epochs", "--wd": "weight_decay",
    "--mixer_arg.alpha": "mixer_args", "--data-dir": "dataset", "--resume": "resume_from_checkpoint",
    "--bs": "batch_size",
}.items():  # fmt: skip
    WRONG |= {f"{flag}{value}": f"unknown flag {flag}; did you mean --{meant}?" for value in (" 3", "=3")}
for flag, name in (("mixer", "NAME"), ("mixer-args", "NAME"), ("mixer", "cutmix")):
    flag = f"--{flag}.base.{'' if name == 'NAME' else name + '.'}alpha"
    says = f"{flag}: a mixer inside a mixer is one value: --mixer.base '{{{name}: {{alpha: VALUE}}}}'"
    WRONG |= {f"--mixer decouplemix {flag}{value}": says for value in (" 3", "=3")}


@pytest.mark.parametrize(("argv", "says"), WRONG.items())
def test_a_flag_that_means_another_and_a_wrong_value_of_a_run_option_are_explained(argv, says):
    with pytest.raises(UserError) as caught:
        flags.fill(Job, flags.parse(argv.split(), "program", "", CLASSES)["Run"])
    assert str(caught.value).endswith(says)


def test_a_mixer_inside_a_mixer_is_one_value() -> None:
    argv = ["--mixer", "decouplemix", "--mixer.base", "{cutmix: {alpha: 3.0}}"]
    recipe, _ = resolve("quickstart", flags.parse(argv, "program", "", CLASSES)["Recipe fields"])
    assert recipe.mixer_args["decouplemix"]["base"] == {"cutmix": {"alpha": 3.0}}


def test_help_shows_every_flag_as_it_is_written_with_its_type_its_choices_and_its_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # nothing is wrapped
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    names = [f"--{field.name}" for cls in CLASSES.values() for field in dataclasses.fields(cls)]
    kinds = ["--epochs INT ", "--lr FLOAT ", "--scale FLOAT FLOAT ", "--model TEXT ", "--sync_bn --no-sync_bn "]
    kinds += ["--mixed_precision no|fp16|bf16 ", "[at least 1] [default: 100]", "Stochastic depth", "What it does."]
    assert not [part for part in (*CLASSES, *names, *kinds) if part not in shown]
    assert " STR" not in shown and "batch-size" not in shown


COMMANDS = {
    "train": "", "evaluate": "RUN", "predict": "RUN IMAGES", "export": "RUN", "verify": "RUN", "push": "RUN",
    "card": "RUN", "replay": "RUN", "masks": "RUN", "supermix": "RECIPE", "prepare": "NAME", "sweep": "FILE",
    "preview": "NAMES", "check": "TARGETS", "report": "RUNS", "record": "RUNS", "protocol": "LOGS", "table": "",
    "soup": "RUNS", "probe": "RUN", "leaderboard": "RUNS", "demo": "RUN",
    "compare": "", "plot curves": "RUNS", "plot cost": "RUNS", "plot dots": "RUNS", "recipes list": "",
    "recipes show": "RECIPE", "recipes explain": "RECIPE", "recipes diff": "FIRST SECOND", "cells list": "",
    "methods list": "", "methods show": "MIXER", "methods render": "", "methods draw": "MIXERS",
    "cells show": "RECIPE", "cells explain": "RECIPE",
    "cells diff": "FIRST SECOND", "cells export": "RECIPE", "robustness": "RUNS",
    "new-mixer": "NAME",
}  # fmt: skip


def test_each_command_says_what_it_is_its_first_arguments_and_types(console, monkeypatch):
    monkeypatch.setattr(app, "console", rich.console.Console(width=200))  # one that an earlier test made is narrow
    groups = {"plot", "recipes", "cells", "methods"}
    names = {name for name in app if not name.startswith("-")} - groups
    names |= {f"{group} {name}" for group in groups for name in app[group] if not name.startswith("-")}
    assert names == set(COMMANDS) and console("--version") == (0, f"{__version__}\n", "")
    for name, arguments in COMMANDS.items():
        status, shown, _ = console(*name.split(), "--help")
        assert status == 0 and f"mixup-recipes {name}" in shown.splitlines()[0]
        assert not [word for word in arguments.split() if f" {word} " not in shown.replace("│", " ")], name
        assert " STR" not in shown, name
        assert "RUN" not in arguments.split() or "RUN --run --model " in shown
        assert name not in ("push", "card") or "--hub_model_id --repo_id TEXT" in shown


def commands(group: App, *names: str) -> Iterator[tuple[str, App]]:
    """All commands below a group with their whole names, and the group."""
    yield " ".join(names), group
    for name in group:
        if not name.startswith("-"):
            yield from commands(group[name], *names, name)


def test_each_command_has_a_summary_and_each_flag_a_text_in_whole_sentences():
    found = dict(commands(app))
    assert {*COMMANDS} <= {*found}
    for name, command in found.items():
        summary = command.help.partition("\n\n")[0]
        assert re.fullmatch(r"[A-Z].*\.", summary), f"{name}: {summary!r} is no sentence in one line"
        for argument in command.assemble_argument_collection() if command.default_command else ():
            text = re.sub(r"( \[[^]]+\])+$", "", argument.parameter.help or "")  # limits and default come last
            assert text.endswith("."), f"{name} {argument.name}: {text!r} is no sentence"


def test_a_screen_of_80_characters_has_room_for_the_whole_name_of_each_flag():
    for name, classes in (("train", CLASSES), ("evaluate", {"Evaluation": evaluate_mixup.Evaluation})):
        console = rich.console.Console(width=80, file=io.StringIO())
        app.help_print([name], console=console)
        shown = console.file.getvalue().splitlines()
        assert max(map(len, shown)) <= 80
        names = {f"--{field.name}" for cls in classes.values() for field in dataclasses.fields(cls)}
        assert not names - {word for line in shown for word in line.split()}, name


def test_old_and_new_names_of_the_run_and_of_the_repository_are_the_same(console, tmp_path, monkeypatch):
    for start in ([], ["--run"], ["--model"]):
        for name, *more in (["push"], ["card"], ["masks"], ["verify"], ["replay", "--step", 0]):
            missing = f"error: no run folder {tmp_path}/no\n"
            assert console(name, *start, tmp_path / "no", *more) == (2, "", missing)
        assert "nor in timm" in console("evaluate", *start, tmp_path / "no")[2]
    pushed = []
    monkeypatch.setattr("mixup_recipes.runs.run.Run.open", lambda run: run)
    monkeypatch.setattr("mixup_recipes.pages.card.write_card", lambda run, repo, *_: pushed.append(repo) or [])
    for flag in ("--hub_model_id", "--hub-model-id", "--repo_id", "--repo-id"):
        assert console("card", tmp_path, flag, "me/it")[0] == 0
    assert pushed == ["me/it"] * 4


@pytest.mark.parametrize("seeds", [["0", "1", "2"], ["[0,", "1,", "2]"], ["[0,1,2]"], ["[0, 1, 2]"]])
def test_a_list_is_written_with_or_without_brackets(console, tmp_path, seeds):
    where = ["--output_dir", tmp_path, "--dry-run"]
    status, shown, _ = console("sweep", "--recipes", "[quickstart_mixup]", "--seeds", *seeds, *where)
    assert status == 0 and [line.split("--seed ")[1].split()[0] for line in shown.splitlines()] == ["0", "1", "2"]


# What needs no torch must not import it: all in one fresh process. By command: what it says, among other things.
LIGHT = {
    "--help": "recipes", "--version": __version__, "train --help": "--recipe", "train --list": "r50_100e",
    "evaluate --help": "--run --model", "predict --help": "IMAGES", "export --help": "--out",
    "push --help": "--repo_id", "probe --help": "--features", "recipes list": "r50_100e",
    "recipes show deit_s_samix": "mixer: samix",
    "recipes explain deit_s_cutmix": "deit_s.yaml", "recipes diff deit_s_deit deit_s_cutmix": "mixer_args",
    "recipes show deit_x_cutmix": "did you mean 'deit_", "cells list": "deit_s_samix",
    "cells show deit_s_samix": "published", "cells explain deit_s_samix": "deit_s.yaml",
    "cells diff deit_s_samix deit_s_deit": "samix", "cells export deit_s_samix": "mixer: samix",
    "methods list --format csv": "cutmix,2019,input", "methods show samix": "samix@openmixup-2022",
    "train_mixup.py --help": "--recipe", "evaluate_mixup.py --help": "--run --model",
}  # fmt: skip


def test_help_names_completion_and_the_formulas_of_metrics_import_no_torch():
    code = f"""
import contextlib, io, runpy, sys
import mixup_recipes.metrics.calibration.formula, mixup_recipes.metrics.topk_accuracy.formula
from mixup_recipes.cli import app, main
modules = "torch timm datasets accelerate transformers matplotlib evaluate pandas gradio".split()
for line, says in {LIGHT}.items():
    script, words = line.split()[0], line.split()
    sys.argv = words if script.endswith(".py") else ["mixup-recipes", *words]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
        try: runpy.run_path(script, run_name="__main__") if script.endswith(".py") else main()
        except SystemExit as left: status = left.code
    print(status or 0, [m for m in modules if m in sys.modules], line, says in shown.getvalue())
print(app.generate_completion(shell="bash"))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[: len(LIGHT)] == [f"{2 * ('deit_x' in asked)} [] {asked} True" for asked in LIGHT]
    assert {"--per_device_train_batch_size", "--hub_model_id"} <= set(done.stdout.split()) and lines[-1] == "False"


def leave(**outcome):
    """The exit status of a command that returns ``return_value`` or raises ``side_effect``."""
    with pytest.raises(SystemExit) as left:
        flags.run(Mock(**outcome))
    return left.value.code or 0


def test_a_command_leaves_with_its_own_status_and_a_bug_keeps_its_traceback(capsys):
    assert (leave(return_value=None), leave(return_value=75), leave(side_effect=SystemExit(3))) == (0, 75, 3)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError):
        flags.run(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("train_mixup.py --recipe x", "log and checkpoints so far are kept; --resume_from_checkpoint auto"),
        ("/bin/mixup-recipes train", "log and checkpoints so far are kept; --resume_from_checkpoint auto"),
        ("mixup-recipes sweep", "finished runs are kept; the same command goes on with the others"),
        ("mixup-recipes supermix", "images that were made are kept; the same command goes on"),
        ("mixup-recipes push", "the repository has all of this publication or none of it; the same command sends"),
        ("mixup-recipes prepare", "no half-made data set is left; the same command begins again"),
        ("evaluate_mixup.py", "no file is left half-written; the same command begins again"),
        ("mixup-recipes report", "no file is left half-written; the same command begins again"),
    ],
)
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv.split())
    assert leave(side_effect=KeyboardInterrupt()) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"stopped: {says}") and err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert leave(side_effect=KeyboardInterrupt()) == 130 and capsys.readouterr() == ("", "")


def test_a_real_ctrl_c_is_one_line_and_130(tmp_path):
    """The command waits for a pipe that nobody writes to."""
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's "&" starts us deaf to it
    argv = [*MIXUP_RECIPES, "recipes", "show", pipe]
    process = subprocess.Popen(argv, cwd=ROOT, stderr=-1, text=True, preexec_fn=heard)
    with pipe.open("w"):  # opens when the command has opened it too
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "stopped: no file is left half-written; the same command begins again\n")


@pytest.mark.parametrize("command", ["recipes explain r50_100e_cutmix", "train --help"])
@pytest.mark.parametrize("lines", [0, 1])
def test_a_command_whose_output_nobody_reads_on_ends_quietly(command, lines):
    env = environment() | {"PYTHONUNBUFFERED": "1" * lines}
    argv = [*MIXUP_RECIPES, *command.split()]
    with subprocess.Popen(argv, cwd=ROOT, env=env, text=True, stdout=-1, stderr=-1) as process:
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    # 1: rich, which prints the help, has left by itself; 0: all was written before the reader went
    assert process.returncode in (141, 1, *[0] * lines)


def test_a_user_error_is_one_line_from_the_first_process_only(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for rank in (None, "0", "1"):
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert leave(side_effect=UserError("epochs: expected an integer")) == 2
        assert capsys.readouterr() == ("", "" if rank == "1" else "error: epochs: expected an integer\n")
        assert leave(side_effect=RankError("image 3 cannot be read")) == 2  # what it meets alone, it says itself
        assert capsys.readouterr() == ("", "error: image 3 cannot be read\n")
