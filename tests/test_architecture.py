"""The house stays in order: where imports may lead, what waits, how long a file is, and what a wheel installs."""

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from tiny import ROOT

CODE = sorted(
    path for top in ("mixers", "mixup_recipes", "train_mixup.py", "evaluate_mixup.py")
    for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))
)  # fmt: skip
FLOORS = [
    {"typed", "files", "names"},
    {"recipe", "mixer_args", "resolve", "flags", "hub_errors"},
    {"metrics", "fetch", "conformance"},
    {"data"},
    {"training"},
    {"runs"},
    {"benchmark"},
    {"pages"},
    {"hub"},
    {"cli", "__main__", "train_mixup", "evaluate_mixup"},
]
"""From the ground up: a file imports from its own floor and from those below."""
MAY_WAIT = {
    "mixup_recipes/training/backbones/pvt.py": "transformers takes seconds, and one model needs it",
    "mixup_recipes/metrics/calibration/app.py": "gradio is there on a Space only",
    "mixup_recipes/metrics/topk_accuracy/app.py": "gradio is there on a Space only",
    "mixers/registry.py": "a mixer is loaded when it is asked for",
}
ENTRIES = {"train_mixup.py": "main", "evaluate_mixup.py": "main"}
LONGEST = 400


def name_of(path: Path) -> str:
    """The module's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in CODE}


def imported(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever the import stands."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield from (name for name in (inner if inner in MODULES else base,) if name in MODULES)


IMPORTS = {name: {other for other in imported(path) if other != name} for name, path in MODULES.items()}


def floor(name: str) -> int:
    """The floor of a module; ``mixers`` and the package's own ``__init__`` are the ground."""
    parts = name.split(".")
    room = parts[1] if parts[0] == "mixup_recipes" and len(parts) > 1 else parts[0]
    if room in ("mixers", "mixup_recipes"):
        return -1
    (found,) = [i for i, rooms in enumerate(FLOORS) if room in rooms]
    return found


def test_all_code_is_looked_at() -> None:
    assert len(CODE) > 100 and len(MODULES) == len(CODE)
    assert "mixup_recipes.recipe" in IMPORTS["train_mixup"]


def test_imports_lead_down_or_along_a_floor() -> None:
    up = [f"{a} imports {b}" for a, found in IMPORTS.items() for b in found if floor(b) > floor(a)]
    assert not up


def test_the_methods_import_nothing_else_of_ours() -> None:
    assert not [(a, b) for a, found in IMPORTS.items() for b in found if a.startswith("mixers") and floor(b) >= 0]


def test_no_files_import_each_other_in_a_circle() -> None:
    left = {name: set(found) for name, found in IMPORTS.items()}
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "a circle, or what imports one"


def waiting(path: Path) -> Iterator[tuple[str, int]]:
    """Imports that stand inside of a function: its name at the top level of the file, and the line."""
    for top in ast.parse(path.read_text()).body:
        if isinstance(top, ast.FunctionDef | ast.ClassDef):
            for node in ast.walk(top):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield top.name, node.lineno


@pytest.mark.parametrize("name", MODULES)
def test_imports_stand_at_the_top(name: str) -> None:
    path = MODULES[name]
    place = path.relative_to(ROOT).as_posix()
    if name.startswith("mixup_recipes.cli") or place in MAY_WAIT:
        return
    assert {function for function, _ in waiting(path)} <= {ENTRIES.get(place)}


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_a_file_can_be_read_at_one_sitting(path: Path) -> None:
    most = 250 if path.name == "train_mixup.py" else LONGEST
    assert len(path.read_text().splitlines()) <= most


# ------------------------------------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_installs_two_packages_and_two_scripts(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"mixers", "mixup_recipes", "train_mixup.py", "evaluate_mixup.py"}
    data = installed / "mixup_recipes/shipped"
    shipped = {path.relative_to(data).as_posix() for path in data.rglob("*.*")}
    own = [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("model_cards/*.csv"), *ROOT.glob("model_cards/results/*.json")]
    assert {path.relative_to(ROOT).as_posix() for path in own} <= shipped
    assert not [path for path in installed.rglob("*") if path.name.startswith("test_")]


def test_it_works_in_a_folder_whose_files_have_our_old_names(installed: Path, tmp_path: Path) -> None:
    for name in ("training.py", "metrics.py", "model_cards.py", "data.py", "runs.py"):
        (tmp_path / name).write_text("raise SystemExit('not yours')\n")
    (tmp_path / "recipes").mkdir()
    recipe = tiny.make_recipe(tmp_path, tiny.make_photos(tmp_path / "photos"), epochs=1, protocol_epochs=1)
    env = tiny.environment() | {"PYTHONPATH": str(installed)}
    command = "import sys; sys.path.remove(''); from mixup_recipes import cli; sys.exit(cli.main())"

    def run(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-c", command, *map(str, words)], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "r50_100e" in run("recipes", "list")
    assert "published" in run("cells", "show", "r50_100e_cutmix")
    run("train", "--recipe", recipe, "--output_dir", "out", "--report_to", "none")
    assert (tmp_path / "out/model.safetensors").is_file()
    assert os.fspath(installed) not in (tmp_path / "out/README.md").read_text()
