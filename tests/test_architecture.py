"""The house stays in order: where imports may lead, what waits, how long a file is, and what a wheel installs."""

import ast
import os
import subprocess
import sys
import zipfile

import tiny
from tiny import ROOT

SCRIPTS = ("train_mixup.py", "evaluate_mixup.py")
CODE = sorted([*(ROOT / "mixers").rglob("*.py"), *(ROOT / "mixup_recipes").rglob("*.py"), *map(ROOT.joinpath, SCRIPTS)])
ROOMS = (
    "typed files names words | recipe mixer_args resolve flags hub_errors | metrics fetch conformance new_mixer | data"
)
ROOMS += " | training | runs | robustness | benchmark | pages | hub demo | cli __main__ train_mixup evaluate_mixup"
FLOORS = [rooms.split() for rooms in ROOMS.split(" | ")]  # a file imports from its own floor and from those before it
MAY_WAIT = {
    ("train_mixup", "main"): "help needs no torch",
    ("evaluate_mixup", "main"): "help needs no torch",
    ("mixup_recipes.training.backbones.pvt", "PVT"): "transformers takes seconds, and one model needs it",
    ("mixup_recipes.runs.portable", "open_onnx"): "an extra, which may not be installed",
    ("mixup_recipes.runs.queued", "submitit"): "an extra, which may not be installed",
    ("mixup_recipes.demo.app", "demo"): "gradio is there on a Space, or where the extra is installed",
    ("mixup_recipes.metrics.calibration.app", "demo"): "gradio is there on a Space only",
    ("mixup_recipes.metrics.topk_accuracy.app", "demo"): "gradio is there on a Space only",
}
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in CODE}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(name: str) -> set[str]:
    """What a module imports, wherever the import stands."""
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {inner if (inner := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found - {name}


IMPORTS = {name: imported(name) for name in MODULES}


def floor(name: str) -> int:
    """The floor of a module; ``mixers`` and the package's own ``__init__`` are the ground."""
    parts = name.split(".")
    room = parts[1] if parts[0] == "mixup_recipes" and len(parts) > 1 else parts[0]
    return -1 if room in ("mixers", "mixup_recipes") else [room in rooms for rooms in FLOORS].index(True)


def test_imports_lead_down_or_along_a_floor_and_never_in_a_circle() -> None:
    assert len(CODE) > 100 and "mixup_recipes.recipe" in IMPORTS["train_mixup"]
    left = {name: found & MODULES.keys() for name, found in IMPORTS.items()}
    assert not [f"{a} imports {b}" for a, found in left.items() for b in found if floor(b) > floor(a)]
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "a circle, or what imports one"


def test_the_methods_import_nothing_of_ours_and_no_paper() -> None:
    """Only the package itself shows the papers' classes: no paper, no composition and no tool imports one."""
    papers = {
        name for name, path in MODULES.items() if path.parent.name == "mixers" and "Sampling law" in path.read_text()
    }
    ours = {path.stem for path in ROOT.iterdir()} - {"mixers"}
    assert len(papers) > 20 and {"mixup_recipes", "train_mixup", "tests"} <= ours
    for name in (name for name in MODULES if name.startswith("mixers")):
        assert not ours & {other.split(".")[0] for other in IMPORTS[name]}, name
        assert name == "mixers" or not papers & IMPORTS[name], name


def test_imports_stand_at_the_top_and_a_file_can_be_read_at_one_sitting() -> None:
    waiting = {
        (name, top.name)
        for name, tree in TREES.items()
        for top in tree.body
        if isinstance(top, ast.FunctionDef | ast.ClassDef) and not name.startswith("mixup_recipes.cli")
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(top))
    }
    assert waiting == set(MAY_WAIT)
    files = MODULES | {path.name: path for path in (ROOT / "benchmarks").rglob("*.py")}
    lengths = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    assert not [name for name, lines in lengths.items() if lines > (250 if name == "train_mixup" else 400)]


def test_a_wheel_installs_two_packages_and_two_scripts_that_work_beside_files_with_our_old_names(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    site, there = tmp_path / "site", tmp_path / "there"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"mixers", "mixup_recipes", *SCRIPTS}
    own = [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("model_cards/*.csv"), *ROOT.glob("model_cards/results/*.json")]
    assert all((site / "mixup_recipes/shipped" / path.relative_to(ROOT)).is_file() for path in own)
    pages = [path for path in (ROOT / "mixup_recipes/pages/leaderboard_page").iterdir() if path.is_file()]
    assert len(pages) > 5 and all((site / path.relative_to(ROOT)).is_file() for path in pages)
    assert not list(site.rglob("test_*"))

    (there / "recipes").mkdir(parents=True)
    for name in ("training.py", "metrics.py", "model_cards.py", "data.py", "runs.py"):
        (there / name).write_text("raise SystemExit('not yours')\n")
    recipe = tiny.make_recipe(there, tiny.make_photos(there / "photos"), epochs=1, protocol_epochs=1)
    code = f"""
import sys
sys.path.remove("")
from mixup_recipes import cli
flags = "--output_dir out --report_to none --dataloader_num_workers 0"
for line in ("recipes list", "cells show r50_100e_cutmix", "train --recipe {recipe} " + flags):
    sys.argv = ["mixup-recipes", *line.split()]
    try: cli.main()
    except SystemExit as left: assert not left.code
"""
    env = tiny.environment() | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=there, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "r50_100e" in done.stdout and "published" in done.stdout
    assert (there / "out/model.safetensors").is_file() and os.fspath(site) not in (there / "out/README.md").read_text()
