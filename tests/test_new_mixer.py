"""Promise: what ``mixup-recipes new-mixer`` writes works as it stands: installed, tested, checked, trained."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny
from tiny import ROOT, environment

from mixers import MIXERS, registry
from mixup_recipes.new_mixer import FILES, new_mixer
from mixup_recipes.pages.methods import methods, parse
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError

TINY = "--eval_split test --model test_resnet --epochs 1 --protocol_epochs 1 --batch_size 16 --warmup_epochs 0"
TINY += " --per_device_train_batch_size 16 --image_size 32 --eval_size 32 --eval_resize 32 --num_classes 4"
TINY += " --report_to none --dataloader_num_workers 0"


def install(package: Path, into: Path) -> None:
    """As pip does it, without a network."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(into), str(package)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def python(*args: object, site: Path, cwd: Path) -> str:
    """What Python prints where a package is installed."""
    env = environment() | {"PYTHONPATH": f"{site}:{ROOT}"}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_writes_a_package_in_the_style_of_this_one(console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, shown, _ = console("new-mixer", "blend")
    files = {path.relative_to(tmp_path).as_posix() for path in Path("blend").absolute().rglob("*") if path.is_file()}
    assert status == 0 and files == {f"blend/{path.replace('$name', 'blend')}" for path in FILES}
    assert files == set(shown.split("\n\n")[0].split()) and "cd blend && pip install -e '.[test]' && pytest" in shown
    assert not [path for path in files if re.search(r"\$\w", Path(path).read_text())]
    doc = parse(registry.ast.get_docstring(registry.ast.parse(Path("blend/mixup_blend/blend.py").read_text())))
    assert [*doc.parts] == ["Formula", "Published defaults", "Sampling law", "Cost", "Deviations", "Kind"]
    assert doc.title == "Blend" and re.fullmatch(r"(input|feature|learned|label)(; teacher)?\.", doc.parts["Kind"])
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    chosen = ["--select", ",".join(rules["select"]), "--ignore", ",".join(rules["ignore"])]
    for check in (["check", *chosen], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--isolated", "--line-length", "120", "--no-cache"]
        done = subprocess.run(command, cwd="blend", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_what_it_writes_passes_its_own_tests_trains_and_has_a_card(site, server, tiny_recipe, tmp_path):
    """Its metadata are written by hand here: the next test installs it with pip."""
    new_mixer("blend", tmp_path / "blend")
    site.package("mixup-blend", "0.1.0", blend="mixup_blend.blend:Blend")
    os.symlink(tmp_path / "blend/mixup_blend", site.folder / "mixup_blend")
    site.again()
    tests = runpy.run_path(str(tmp_path / "blend/tests/test_blend.py"))
    for name in ("test_it_is_its_formula", "test_it_keeps_the_contract"):
        tests[name](0.2)
    tests["test_it_is_registered_and_refuses_what_is_no_alpha"]()
    assert methods("blend", {"alpha": 1.0})[0].title == "Blend"

    path = tmp_path / "path.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(site.folder)!r})\n")
    data = re.search("dataset: (.*)", tiny_recipe.read_text())
    given = ["--recipe", "quickstart_blend", "--dataset", data[1], *TINY.split(), "--output_dir", tmp_path / "run"]
    status, text = server.run(*given, faults=[["script", str(path)]])
    assert status == 0, text
    opened = Run.open(tmp_path / "run")
    assert opened.environment["mixers"] == {"blend": ["mixup-blend 0.1.0"]} and opened.recipe.mixer == "blend"
    assert opened.environment["laws"] == [MIXERS["blend"]().law]
    assert "`blend` of mixup-blend 0.1.0" in opened.card and "--recipe quickstart_blend" in opened.card
    (site.folder / "mixup_blend-0.1.0.dist-info/METADATA").write_text("Name: mixup-blend\nVersion: 0.2.0\n")
    status, text = server.run(*given, "--resume_from_checkpoint", "auto", faults=[["script", str(path)]])
    assert status == 0 and "mixer 'blend' now comes from mixup-blend 0.2.0, and came from mixup-blend 0.1.0" in text
    assert Run.open(tmp_path / "run").environment["mixers"] == {"blend": ["mixup-blend 0.1.0", "mixup-blend 0.2.0"]}


def test_pip_installs_it_and_its_name_is_known(tmp_path):
    new_mixer("blend", tmp_path / "blend")
    install(tmp_path / "blend", tmp_path / "site")
    shown = python("-m", "mixup_recipes", "recipes", "show", "deit_s_blend", site=tmp_path / "site", cwd=tmp_path)
    assert "mixer: blend\n" in shown and "    alpha: 1.0\n" in shown
    shown = python("-m", "mixup_recipes", "methods", "show", "blend", site=tmp_path / "site", cwd=tmp_path)
    assert "blend@unpublished-" in shown


@pytest.mark.slow
def test_installed_by_pip_its_tests_pass_and_the_commands_of_its_page_work(tmp_path):
    new_mixer("blend", tmp_path / "blend")
    site = tmp_path / "site"
    install(tmp_path / "blend", site)
    shown = python("-m", "pytest", "-q", "-p", "no:cacheprovider", site=site, cwd=tmp_path / "blend")
    assert "5 passed" in shown
    assert "24 of 24" in python("-m", "mixup_recipes", "check", "blend", site=site, cwd=tmp_path)
    data = tiny.make_photos(tmp_path / "photos")
    given = ["--recipe", "quickstart_blend", "--dataset", data, *TINY.split(), "--output_dir", tmp_path / "run"]
    python(ROOT / "train_mixup.py", *given, site=site, cwd=tmp_path)
    assert "mixup-blend 0.1.0" in (tmp_path / "run/README.md").read_text()
    line = "preview --mixers blend cutmix --photos synthetic --images 2 --out blend.png"
    python("-m", "mixup_recipes", *line.split(), site=site, cwd=tmp_path)
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "blend/README.md").read_text(), re.S)[0]
    code = (
        f"import numpy, torch\nx, y, rng = torch.randn(4, 3, 8, 8), torch.eye(4), numpy.random.default_rng(0)\n{code}"
    )
    python("-c", f"{code}print(mixed.shape, target.sum())", site=site, cwd=tmp_path)


REFUSED = {
    "Blend": "got 'Blend'; did you mean 'blend'?",
    "my-mix": "got 'my-mix'; did you mean 'mymix'?",
    "2mix": "got '2mix'; did you mean 'mix'?",
    "../mix": "got '../mix'; did you mean 'mix'?",
    "lambda": "are not a word of Python, got 'lambda'",
    "": "begin with a letter and are not a word of Python, got ''",
    "ü": "begin with a letter and are not a word of Python, got 'ü'",
    "a" * 41: "at most 40 lower-case letters",
    "cutmix": "Mixup Recipes has a mixer 'cutmix'; give yours another name",
    "switch": "Mixup Recipes has a mixer 'switch'; give yours another name",
    "mine": "the package its-mixers 1.0 has a mixer 'mine'; give yours another name, or uninstall it",
    "official": "is a setting, so 'official' cannot be a mixer; take another name",
    "recipes": "there is a Python package 'mixup_recipes' already; give your mixer another name",
}


def test_a_name_that_cannot_be_is_one_line(console, site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site.mine()
    for name, says in REFUSED.items():
        status, out, err = console("new-mixer", name)
        assert (status, out) == (2, "") and err.startswith("error: ") and says in err and err.count("\n") == 1, name
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_nothing_is_overwritten_and_nothing_is_half_written(console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / "LICENSE").write_text("mine")
    assert console("new-mixer", "blend", "--out", ".")[0] == 0  # beside what is there
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 1 + len(FILES)
    for name, out, there in (("blend", ".", "README.md"), ("other", ".", "README.md"), ("other", "LICENSE", "LICENSE")):
        status, _, err = console("new-mixer", name, "--out", out)
        assert (
            status == 2
            and err == f"error: {there} is there already, and nothing was written; name another folder with --out\n"
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    rename, calls = os.rename, []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        rename(*args)

    monkeypatch.setattr(os, "rename", full)
    (tmp_path / "empty").mkdir()
    for out in ("new/folder", "empty"):
        calls.clear()
        with pytest.raises(UserError, match=f"cannot write {out}: No space left on device"):
            new_mixer("third", Path(out))
    assert not (tmp_path / "new/folder").exists() and not list((tmp_path / "empty").iterdir())
