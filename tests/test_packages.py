"""Promise: a mixer that another package registers is known by name like ours, and a broken one breaks nothing else."""

import json
import logging
import subprocess
import sys

import pytest
from runs import edit
from strangers import MIXER
from tiny import ROOT, environment

from mixers import BLOCKS, MIXERS, CutMix, build, signature
from mixers.registry import docstring, package_of, sampling_law, usable
from mixers.testing import check_mixer
from mixup_recipes.conformance import subject
from mixup_recipes.mixer_args import used_packages
from mixup_recipes.pages.card import card
from mixup_recipes.pages.preview import chosen
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs.run import Run
from mixup_recipes.training.backbones import create_model
from mixup_recipes.training.folder import begun
from mixup_recipes.training.update import new_step
from mixup_recipes.typed import UserError


def test_a_registered_mixer_is_known_by_name_and_nothing_of_it_runs_before_it_is_built(site, console):
    site.mine()
    assert list(MIXERS) == [*MIXERS.rows, "mine"] and len(MIXERS) == len(MIXERS.rows) + 1 and "mine" in MIXERS | BLOCKS
    assert [(p.name, p.kind.name, p.default) for p in signature("mine").parameters.values()] == [
        ("share", "POSITIONAL_OR_KEYWORD", 0.5),
        ("sides", "KEYWORD_ONLY", (1, 2)),
    ]
    assert sampling_law("mine") == "mine@nobody-2026" and docstring("mine").startswith("Mine: a blend")
    recipe = load_recipe("quickstart_mine")
    assert recipe.mixer_args["mine"] == {"share": 0.5, "sides": [1, 2]}
    assert "mine" in console("recipes", "list")[1].split() and "mine" in console("train", "--list")[1].split()
    assert "mixer: mine\n" in console("recipes", "show", "quickstart_mine")[1]
    assert console("recipes", "show", "quickstart_mime")[2].endswith("did you mean 'mine'?\n")
    assert "mine" in console("methods", "list")[1]
    assert "mine@nobody-2026" in console("methods", "show", "mine")[1]
    assert "its.mine" not in sys.modules and "its" not in sys.modules

    mine = build("mine", share=0.25)
    assert type(mine) is MIXERS["mine"] and (type(mine).__module__, mine.law) == ("its.mine", "mine@nobody-2026")
    assert str(package_of("mine")) == "its-mixers 1.0" and package_of("cutmix") is None
    check_mixer(lambda: build("mine"))
    with pytest.raises(ValueError, match="mixer 'mine' has no argument 'sharee'; did you mean 'share'"):
        build("mine", sharee=1)
    assert usable() == list(MIXERS)


def test_a_registered_mixer_stands_in_for_ours_inside_of_others_and_in_every_command(site, console, tmp_path):
    site.mine()
    recipe = load_recipe("quickstart_decouplemix", mixer_args={"base": {"mine": {"share": 0.3}}})
    assert recipe.mixer_args["decouplemix"]["base"] == {"mine": {"share": 0.3, "sides": [1, 2]}}
    assert used_packages(recipe) == {"mine": "its-mixers 1.0"} and used_packages(load_recipe("quickstart_cutmix")) == {}
    made, factory = subject("mine", None)  # what `check` probes, slowly
    assert made.alphas == () and factory is not None and type(factory()) is MIXERS["mine"]
    picture = tmp_path / "mine.png"
    assert console("preview", "--mixers", "mine", "--images", 2, "--photos", "synthetic", "--out", picture)[0] == 0
    there = ["--output_dir", tmp_path / "sweep", "--dry-run"]
    status, shown, _ = console("sweep", "--recipes", "quickstart_mine", "--seeds", 0, *there)
    assert status == 0 and "quickstart_mine" in shown


HEAD = "import functools\nfrom mixers import CutMix, Mixer, Switch, build\n\nALPHA = 0.25\n"
OTHERWISE = {
    "class X(CutMix): pass": "(alpha: float = 1.0)",
    "class X(Mixer): pass": "()",
    "class X(Mixer):\n    def __init__(self, alpha=ALPHA): super().__init__()": "(alpha=0.25)",
    "class X(Mixer):\n    def __init__(self, alpha, **more): super().__init__()": "(alpha)",
    "def X(alpha=1.0, *rest): return CutMix(alpha)": "(alpha=1.0)",
    "@functools.cache\ndef Y(beta=2): return CutMix(beta)\ndef X(base=None): return build('cutmix')": "(base=None)",
    "class Y:\n    class X(Mixer): pass\nX = Y.X": "()",
    "from its.mine import Mine as X": "(share=0.5, *, sides=(1, 2))",
}


@pytest.mark.parametrize("text", OTHERWISE)
def test_arguments_that_the_file_does_not_tell_are_asked_of_what_is_imported(site, text):
    site.mine()
    site.module("other", f"{HEAD}\n{text}\n")
    site.package("other", other="other:X")
    assert str(signature("other")) == OTHERWISE[text]
    docs = "Mine: a blend" if "its.mine" in text else ""
    assert docstring("other").startswith(docs) and bool(docs) == bool(docstring("other"))


BROKEN = {
    "gone": ("no.such:X", "there is no such module"),
    "within": ("its.no:X", "there is no such module"),
    "address": (":::", "there is no such module"),
    "class": ("its.mine:Yours", "cannot be imported: AttributeError: module 'its.mine' has no attribute 'Yours'"),
    "raises": ("raises:X", "that cannot be imported: RuntimeError: one two"),
    "leaves": ("leaves:X", "that cannot be imported: SystemExit: 3"),
    "syntax": ("syntax:X", "that cannot be imported: SyntaxError"),
    "plain": ("plain:X", "that is neither a class of mixers.Mixer nor a function that makes one"),
    "whole": ("plain", "that is neither a class of mixers.Mixer nor a function that makes one"),
    "number": ("plain:make", "must be a Mixer, but what builds it made int"),
    "odd": ("plain:Odd", "the default of its 'of' is no number, text, list or table"),
    "Upper_case": ("its.mine:Mine", "a name is lower-case letters and digits, beginning with a letter"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_package_is_one_line_that_names_it_and_stops_nothing_else(site, console, name):
    site.mine()
    site.module("raises", "from mixers import Mixer\nclass X(Mixer): pass\nraise RuntimeError('one\\ntwo')\n")
    site.module("leaves", "import sys\nsys.exit(3)\n")
    site.module("syntax", "class X(\n")
    odd = "class Odd(Mixer):\n    def __init__(self, of=object()): super().__init__()\n"
    site.module("plain", f"from mixers import Mixer\nclass X: pass\ndef make(): return 3\n{odd}")
    address, says = BROKEN[name]
    site.package("broken", **{name: address})
    with pytest.raises(ValueError, match=r"package broken 1\.0"):
        build(name)
    for line in (
        ["check", name],
        ["preview", "--mixers", name, "--photos", "synthetic", "--images", 2, "--out", "x.png"],
    ):
        status, out, err = console(*line)
        assert (status, out) == (2, "") and "package broken 1.0" in err and says in err and err.count("\n") == 1, err
    status, _, err = console("train", "--recipe", f"quickstart_{name}", "--mixer.of", 1)
    assert status == 2 and ("broken 1.0" in err or "no argument" in err) and err.count("\n") == 1
    for line in ("recipes list", "methods list", "recipes show quickstart_mine", "recipes show quickstart_cutmix"):
        assert console(*line.split())[0] == 0
    assert type(build("cutmix")) is CutMix and build("mine")
    assert "mine" in usable() and name not in usable() and name not in {r.mixer for r in chosen([], [])}


def test_names_that_are_taken_are_told_when_something_is_made(site, console, caplog):
    site.mine()
    site.package("mean", cutmix="its.mine:Mine", switch="its.mine:Mine")
    for name in ("one", "two", "three"):
        site.package(name, twice="its.mine:Mine")
    (site.folder / "one-1.0.dist-info").rename(site.folder / "one-0.9.dist-info")  # METADATA says which it is
    assert signature("cutmix") and not caplog.records  # ours are known without a look
    assert type(build("cutmix")) is CutMix and not isinstance(build("switch", mixers=["mine"]), MIXERS["mine"])
    lines = sorted(record.getMessage() for record in caplog.records)
    assert [line.split(" ")[1] for line in lines[:2]] == ["mean", "mean"] and len(lines) == 3
    assert "as its.mine:Mine, but Mixup Recipes has one of that name, which is used" in lines[0]
    status, _, err = console("recipes", "show", "quickstart_twice")
    assert status == 2 and all(f"{name} 1.0" in err for name in ("one", "two", "three")) and "none is used" in err


def test_metadata_that_cannot_be_read_is_told_and_a_package_that_is_found_twice_counts_once(
    site, tmp_path, monkeypatch, caplog
):
    folder = site.mine()
    (folder / "METADATA").rename(folder / "METADATA.old")
    site.again()
    (site.folder / "odd-1.dist-info").mkdir()
    (site.folder / "odd-1.dist-info/entry_points.txt").write_bytes(b"\xff[mixup_recipes.mixers]\n")
    with caplog.at_level(logging.WARNING):
        assert "mine" not in [*MIXERS]
    (folder / "METADATA.old").rename(folder / "METADATA")
    second = tmp_path / "second"
    second.mkdir()
    (second / "Its.Mixers-2.0.dist-info").mkdir()
    for name, text in (("METADATA", "Name: Its.Mixers\nVersion: 2.0\n"), ("entry_points.txt", "")):
        text = text or "[mixup_recipes.mixers]\nmine = its.mine:Mine\n"
        (second / "Its.Mixers-2.0.dist-info" / name).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path, str(second)])
    site.again()
    assert str(package_of("mine")) == "its-mixers 1.0"  # what comes first on the path is what is imported


def test_commands_about_names_import_neither_torch_nor_the_package(site):
    site.mine()
    code = """
import sys
from mixup_recipes.cli import app
for line in ("recipes list", "recipes show quickstart_mine", "recipes explain deit_s_mine", "methods list"):
    app(line.split())
print([name for name in ("torch", "its") if name in sys.modules])
"""
    env = environment() | {"PYTHONPATH": f"{ROOT}:{site.folder}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "mixer: mine" in done.stdout and done.stdout.endswith("[]\n"), done.stderr


def test_a_run_notes_its_packages_and_says_when_they_have_changed(site, tmp_path):
    said = []
    site.mine()
    recipe, ours = load_recipe("quickstart_mine"), load_recipe("quickstart_cutmix")
    assert begun(tmp_path, ours, None, said.append) == {"pretrained": {}, "mixers": {}}
    first = begun(tmp_path, recipe, None, said.append)
    assert first["mixers"] == {"mine": ["its-mixers 1.0"]}
    (tmp_path / "model.safetensors").touch()  # by now it was trained
    for noted in ({}, {"laws": []}, first):  # the first two: nothing was noted of packages
        (tmp_path / "env.json").write_text(json.dumps(noted))
        assert begun(tmp_path, recipe, None, said.append)["mixers"] == first["mixers"] and not said
    (site.folder / "its_mixers-1.0.dist-info/METADATA").write_text("Name: its-mixers\nVersion: 1.1\n")
    site.again()
    second = begun(tmp_path, recipe, None, said.append)
    assert second["mixers"] == {"mine": ["its-mixers 1.0", "its-mixers 1.1"]}
    assert len(said) == 1 and "now comes from its-mixers 1.1, and came from its-mixers 1.0 in" in said[0]
    (tmp_path / "env.json").write_text(json.dumps(second))
    assert begun(tmp_path, recipe, None, said.append) == second and len(said) == 1
    assert begun(tmp_path, ours, None, said.append)["mixers"]["mine"][2:] == ["Mixup Recipes"] and len(said) == 2


def test_what_was_trained_is_read_without_the_package_and_the_card_names_it(site, run, console):
    """A run of cutmix made to look like one of a mixer of another package."""
    recipe = run / "recipe.yaml"
    name = Run.open(run).recipe.mixer
    recipe.write_text(
        recipe.read_text()
        .replace(f"mixer: {name}\n", "mixer: mine\n")
        .replace(f"  {name}:", "  mine:\n    share: 0.5\n    sides: [1, 2]\n  vanilla:")
    )
    edit(run / "env.json", mixers={"mine": ["its-mixers 1.0", "its-mixers 1.1"]})
    opened = Run.open(run)
    assert (opened.recipe.mixer, opened.recipe.mixer_args["mine"]) == ("mine", {"share": 0.5, "sides": [1, 2]})
    names = "`mine` of its-mixers 1.0, then its-mixers 1.1"
    without = card(opened)
    assert f"| mixers of other packages | {names} |" in without and f"does not have: {names}." in without
    assert console("report", run, "--out", run.parent / "report")[0] == 0
    assert console("evaluate", run)[0] == 0
    status, _, err = console("replay", run, "--step", 0)
    assert status == 2 and "of its-mixers 1.1, which is not installed here" in err and err.count("\n") == 1
    edit(run / "env.json", mixers={})
    with pytest.raises(UserError, match="unknown mixer 'mine'"):
        _ = Run.open(run).recipe
    edit(run / "env.json", mixers={"mine": ["its-mixers 1.0"]}, laws=["mine@nobody-2026"])
    site.mine("1.1")
    with_it = card(Run.open(run))
    assert "Mine" in with_it and "mine@nobody-2026" in with_it
    status, shown, _ = console("replay", run, "--step", 0)
    assert (
        status == 0
        and "the run used the mixer 'mine' of its-mixers 1.0, and this replay uses that of its-mixers 1.1" in shown
    )
    site.module("its.mine", MIXER.replace("share", "part"))  # a version that calls its argument otherwise
    assert Run.open(run).recipe == opened.recipe


def test_a_mixer_for_values_is_refused_where_its_name_does_not_tell(site):
    site.module("far", MIXER.replace("    def __init__", "    regression = True\n\n    def __init__"))
    site.package("far-mixers", far="far:Mine")
    recipe = load_recipe("quickstart_far")
    with pytest.raises(UserError, match="mixer 'far' is for regression"):
        new_step(create_model(recipe), recipe)
