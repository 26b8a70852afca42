"""Command lines: every spelling of a flag, help without torch, and mistakes in one line with exit status 2."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from tiny import ROOT

from mixup_recipes import flags as cli
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import resolve
from mixup_recipes.training.job import Job
from mixup_recipes.typed import RankError, UserError

CLASSES = {"Run": Job, "Recipe fields": Recipe}


def parse(*argv: str) -> dict[str, Any]:
    """The recipe fields of a command line, raw."""
    return cli.parse(list(argv), "program", "What it does.", CLASSES)["Recipe fields"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What is printed about a command line that leaves with status 2; box-drawing and line breaks removed."""
    with pytest.raises(SystemExit) as left:
        parse(*argv)
    assert left.value.code == 2
    shown = capsys.readouterr()
    return " ".join("".join(c for c in shown.out + shown.err if c not in "╭╮╰╯│─").split())


# --------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ("", {}),
        ("--batch_size 64", {"batch_size": "64"}),
        ("--batch-size 64", {"batch_size": "64"}),
        ("--batch_size=64", {"batch_size": "64"}),
        ("--per-device_train-batch_size 8", {"per_device_train_batch_size": "8"}),
        ("--lr 1e-4", {"lr": "1e-4"}),
        ("--clip_grad none", {"clip_grad": "none"}),
        ("--sync_bn", {"sync_bn": True}),
        ("--sync-bn", {"sync_bn": True}),
        ("--no-sync-bn", {"sync_bn": False}),
        ("--no-sync_bn", {"sync_bn": False}),
        ("--sync_bn true", {"sync_bn": True}),
        ("--sync_bn True", {"sync_bn": True}),
        ("--sync-bn false", {"sync_bn": False}),
        ("--sync_bn=false", {"sync_bn": False}),
        ("--drop_last False --seed 3", {"drop_last": False, "seed": "3"}),
        ("--sync_bn --seed 3", {"sync_bn": True, "seed": "3"}),
        ("--dataset true", {"dataset": "true"}),
        ("--scale 0.5 1", {"scale": ("0.5", "1")}),
        ("--mean 0.1 0.2 0.3 --seed 3", {"mean": ("0.1", "0.2", "0.3"), "seed": "3"}),
        ("--opt_betas 0.9 0.95", {"opt_betas": ("0.9", "0.95")}),
        ("--mixer cutmix --mixer.alpha 0.5", {"mixer": "cutmix", "mixer_args": {"alpha": "0.5"}}),
        ("--mixer.alpha=0.5 --mixer cutmix", {"mixer": "cutmix", "mixer_args": {"alpha": "0.5"}}),
        ("--mixer.mixup_alpha 1 --mixer.cutmix_alpha 2", {"mixer_args": {"mixup_alpha": "1", "cutmix_alpha": "2"}}),
        ("--model_args.img_size 64", {"model_args": {"img_size": "64"}}),
        ("--model-args.img_size 64", {"model_args": {"img_size": "64"}}),
    ],
)
def test_a_flag_may_be_spelt_in_every_usual_way(argv: str, given: dict[str, Any]) -> None:
    assert parse(*argv.split()) == given


def test_flags_are_sorted_by_what_they_belong_to() -> None:
    argv = ["--recipe", "r50_100e_mixup", "--epochs", "2", "--dry_run", "--save-total-limit", "3"]
    given = cli.parse(argv, "program", "", CLASSES)
    assert given["Recipe fields"] == {"epochs": "2"}
    assert given["Run"] == {"recipe": "r50_100e_mixup", "dry_run": True, "save_total_limit": "3"}
    job = cli.fill(Job, given["Run"])
    assert (job.recipe, job.dry_run, job.save_total_limit) == ("r50_100e_mixup", True, 3)


def test_every_field_is_a_flag() -> None:
    for field in dataclasses.fields(Recipe):
        if field.type is str or field.type == "str":
            assert parse(f"--{field.name}", "x") == {field.name: "x"}


def test_a_command_line_becomes_a_recipe() -> None:
    argv = "--mixer cutmix --mixer.alpha 5e-1 --model_args.img_size 64 --model_args.pretrained false --lr 1e-3"
    argv += " --scale 0.5 1 --no-drop-last --sync_bn true --clip_grad none"
    recipe, origin = resolve("deit_s", parse(*argv.split()))
    assert (recipe.name, recipe.mixer_args["cutmix"]) == ("deit_s_cutmix", {"alpha": 0.5})
    assert recipe.model_args == {"img_size": 64, "pretrained": False}
    assert (recipe.lr, recipe.scale, recipe.drop_last, recipe.sync_bn) == (1e-3, (0.5, 1.0), False, True)
    assert recipe.clip_grad is None
    assert origin["lr"] == origin["clip_grad"] == origin["mixer_args.cutmix.alpha"] == "command line"


# --------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--epoch 3", "Unknown option: --epoch. Did you mean --epochs?"),
        ("--batch_sise 3", "Unknown option: --batch_sise. Did you mean --batch-size?"),
        ("--mixer_arg.alpha 3", "Did you mean --mixer-args?"),
        ("--epochs", "--epochs requires an argument"),
        ("--scale 0.1", "--scale requires 2 positional arguments. Only got 1."),
        ("--sync_bn=maybe", 'unable to convert "maybe" into bool'),
        ("--seed 1 --seed 2", "--seed specified multiple times"),
        ("stray", "stray"),
    ],
)
def test_a_wrong_flag_is_explained_and_leaves_with_2(capsys: pytest.CaptureFixture[str], argv: str, says: str) -> None:
    shown = refused(capsys, *argv.split())
    assert says.replace("-", "_") in shown.replace("-", "_")


@pytest.mark.parametrize("value", ["=3", " 3"])
@pytest.mark.parametrize(
    ("flag", "name"),
    [("--mixer.base.alpha", "NAME"), ("--mixer-args.base.alpha", "NAME"), ("--mixer.base.cutmix.alpha", "cutmix")],
)
def test_a_mixer_inside_a_mixer_is_one_value(flag: str, name: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*f"--mixer decouplemix {flag}{value}".split())
    expected = f"{flag}: a mixer inside a mixer is one value: --mixer.base '{{{name}: {{alpha: VALUE}}}}'"
    assert str(caught.value) == expected
    recipe, _ = resolve("quickstart", parse("--mixer", "decouplemix", "--mixer.base", "{cutmix: {alpha: 3.0}}"))
    assert recipe.mixer_args["decouplemix"]["base"] == {"cutmix": {"alpha": 3.0}}


def test_a_wrong_value_of_a_run_option_is_explained() -> None:
    for given, says in (
        ({"save_total_limit": "0"}, "command line: save_total_limit: expected an integer at least 1, got '0'"),
        ({"on_bad_image": "skp"}, "expected one of stop, skip, got 'skp'; did you mean 'skip'?"),
        ({"checkpointing_steps": "0"}, "checkpointing_steps: expected 'epoch' or an integer at least 1, got '0'"),
        ({"checkpointing_steps": "1.5"}, "checkpointing_steps: expected 'epoch' or an integer at least 1, got '1.5'"),
    ):
        with pytest.raises(UserError) as caught:
            cli.fill(Job, given)
        assert says in str(caught.value)


# --------------------------------------------------------------------------------------------- help


def test_help_leaves_with_0_and_shows_every_flag_with_its_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # nothing is wrapped
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does." in shown
    assert all(title in shown for title in CLASSES)
    for cls in CLASSES.values():
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')}" in shown
    assert "Stochastic depth" in shown


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train_mixup.py', '--help']\n"
        "try:\n"
        "    runpy.run_path('train_mixup.py', run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    heavy = {'torch', 'timm', 'datasets', 'accelerate', 'transformers', 'mixers'} & set(sys.modules)\n"
        "    print('left with', left.code, 'imported', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "left with 0 imported []"
    assert "--recipe" in done.stdout


# --------------------------------------------------------------------------------------------- exit status


def leave(status: int | None = None, error: BaseException | None = None) -> Any:
    """Run a command that returns or raises; its exit status."""

    def main() -> int | None:
        if error is not None:
            raise error
        return status

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    return left.value.code


def test_a_command_leaves_with_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert not leave(None)
    assert leave(75) == 75
    assert leave(error=KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "shown"), [(None, True), ("0", True), ("1", False)])
def test_a_user_error_is_one_line_from_the_first_process_only(
    rank: str | None, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert leave(error=UserError("epochs: expected an integer")) == 2
    assert capsys.readouterr() == ("", "error: epochs: expected an integer\n" if shown else "")
    assert leave(error=RankError("image 3 cannot be read")) == 2  # what one process alone meets, it says itself
    assert capsys.readouterr() == ("", "error: image 3 cannot be read\n")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)
