"""The run folder while it is written: who may write to it, and what it says of the run."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixers import Mixer, taps
from mixup_recipes.data.splits import Splits
from mixup_recipes.files import lock, write, write_json
from mixup_recipes.mixer_args import used_packages
from mixup_recipes.recipe import Recipe, differences, to_yaml
from mixup_recipes.resolve import resolve
from mixup_recipes.training.format import FORMAT, PLACE, SKIPPED, check_format
from mixup_recipes.typed import UserError

OURS = "Mixup Recipes"
PACKAGES = ("accelerate", "datasets", "numpy", "pillow", "safetensors", "timm", "torch", "torchvision", "transformers")


def trained(folder: Path) -> bool:
    """Whether the run in a folder got to an evaluation, a checkpoint or weights; else it may begin anew."""
    log, weights = folder / "log.jsonl", folder / "model.safetensors"
    evaluated = log.exists() and b'"mode": "val"' in log.read_bytes()
    return evaluated or weights.exists() or any(folder.glob("checkpoints/*step-*"))


def check_folder(folder: Path, recipe: Recipe, resume: bool, ignore: tuple[str, ...] = ("name",)) -> None:
    """Raise ``UserError`` unless the folder is free, or holds this very recipe when resuming. Writes nothing."""
    saved = folder / "recipe.yaml"
    if trained(folder) and saved.exists():
        if not resume:
            raise UserError(
                f"{folder} already holds a run; continue it with --resume_from_checkpoint auto, or choose another "
                "--output_dir"
            )
        check_format(noted(folder, "env.json"), str(folder / "env.json"))
        found, _ = resolve(str(saved))
        ignore += ("num_classes",) * (recipe.num_classes == 0)  # the data will say
        if different := differences(found, recipe, ignore):
            rows = "; ".join(f"{k}: {a} there, {b} now" for k, (a, b) in different.items())
            raise UserError(f"{folder} holds a run of another recipe: {rows}; choose another --output_dir")
    elif saved.exists() and ((folder / ".lock").exists() or saved.read_text() == to_yaml(resolve(str(saved))[0])):
        return  # of a try that failed before its first evaluation, and no recipe of the user's own
    elif folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
        raise UserError(f"{folder} is not empty and is not a run folder; choose another --output_dir")


def noted(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a folder; empty where there is none or it is damaged."""
    try:
        content = json.loads((folder / name).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def laws(module: nn.Module) -> list[str]:
    """The sampling laws of the mixers inside a module, as they name them: ``["cutmix@clova-2019"]``.

    A number behind a point counts the versions of a law: what a run drew by one is not what it would draw by the next.
    """
    return sorted({part.law for part in module.modules() if isinstance(part, Mixer) and part.law})


def check_mixer(folder: Path, step: nn.Module) -> None:
    """Raise ``UserError`` when a run that goes on, or is looked at, began with another law of its mixer or teacher.

    Version 0.1 noted no laws: a run of it follows the first of each, whose name has no number behind it.
    """
    env = noted(folder, "env.json") if trained(folder) else {}
    for law in laws(step) if env else ():
        if law not in env.get("laws", [law.partition(".")[0]]):
            program = f"commit {env['commit']}" if env.get("commit") else "0.1" if "laws" not in env else "another one"
            raise UserError(
                f"{folder} was started with an earlier sampling law of its mixer, which is now {law}; finish it with "
                f"the version of this program that started it ({program}), or train again into another folder"
            )
    before = env.get("teachers")
    if not isinstance(before, dict):
        return  # nothing was noted
    for source, now in taps.teachers(step).items():
        if before.get(source, now) != now:
            raise UserError(
                f"the teacher {source!r} is not what it was when {folder} was started: its weights have changed; put "
                "the old ones back, or train again into another folder"
            )


def begun(folder: Path, recipe: Recipe, sha256: str | None, say: Callable[[str], Any]) -> dict[str, Any]:
    """What a run was begun with, for its ``env.json``: ``pretrained`` and ``mixers``, see ``format``.

    ``sha256``: of the weights read now; None where none are, as by a run that goes on. Raises ``UserError`` for other
    weights than those of the beginning; another version of a mixer's package is said.
    """
    env = noted(folder, "env.json") if trained(folder) else {}
    return {"pretrained": start_of(folder, recipe, sha256, env), "mixers": packages_of(folder, recipe, env, say)}


def packages_of(folder: Path, recipe: Recipe, env: dict[str, Any], say: Callable[[str], Any]) -> dict[str, list[str]]:
    """The packages that a run's mixers come from, and came from before: ``{"blend": ["mixup-blend 0.1.0"]}``.

    ``env``: what the run noted when it was last begun. It goes on with another version, since nobody but its author
    knows whether that one mixes otherwise.
    """
    now, before = used_packages(recipe), env.get("mixers")
    if not isinstance(before, dict):
        return {name: [package] for name, package in now.items()}
    found = {name: list(told) for name, told in before.items() if isinstance(told, list)}
    for name in dict.fromkeys([*before, *now]):
        package, last = now.get(name, OURS), found[name][-1] if found.get(name) else OURS
        if package != last:
            found.setdefault(name, []).append(package)
            say(
                f"mixer {name!r} now comes from {package}, and came from {last} in {folder}: the run continues, but "
                "it may mix differently from here on"
            )
    return found


def start_of(folder: Path, recipe: Recipe, sha256: str | None, env: dict[str, Any]) -> dict[str, str]:
    """The weights that a run was begun with: source -> SHA-256, if there is a file. What it noted first holds.

    Raises ``UserError`` when a run that was stopped before its first checkpoint would begin again from other weights.
    """
    before = env.get("pretrained")
    now = {recipe.pretrained: sha256} if recipe.pretrained and sha256 else {}
    if not isinstance(before, dict) or not before:
        return now
    if now and now != before:
        raise UserError(
            f"pretrained {recipe.pretrained!r} is not what it was when {folder} was started: its weights have "
            "changed; put the old ones back, or train again into another folder"
        )
    return before


def check_disk(folder: Path, needed: int) -> None:
    """Raise ``UserError`` when the disk cannot take the run's checkpoints. ``needed`` in bytes."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"not enough disk for checkpoints in {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "choose another --output_dir or a lower --save_total_limit"
        )


def begin_folder(
    folder: Path, recipe: Recipe, splits: Splits, environment: dict[str, Any], resume: bool = False
) -> None:
    """Make the folder, remove what a killed process left half-written, and note recipe, data and environment."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        check_folder(folder, recipe, resume, ("name", "dataset", "num_classes"))  # another run may be done meanwhile
        for leftover in (*folder.glob("checkpoints/tmp-*"), *folder.glob(".*.tmp")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if not trained(folder):  # of a try that failed before its first evaluation, perhaps on other data
            for name in (SKIPPED, PLACE, "holdout.txt"):
                (folder / name).unlink(missing_ok=True)
            for name in ("samples", "runs"):
                shutil.rmtree(folder / name, ignore_errors=True)
        write(folder / "recipe.yaml", to_yaml(recipe))
        changes = splits.identity["changed"]
        write_json(folder / "data.json", {k: v for k, v in splits.identity.items() if k != "changed" or changes})
        if splits.held_out:
            write(folder / "holdout.txt", "".join(f"{name}\n" for name in splits.held_out))
        if splits.place:
            write_json(folder / PLACE, {"path": str(splits.place)})
        write_json(folder / "env.json", environment)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}; choose another --output_dir") from None


def environment(accelerator: Any, recipe: Recipe, step: nn.Module, start: dict[str, Any]) -> dict[str, Any]:
    """What the numbers depend on beside the recipe: versions, device, processes, commit, command, weights of others.

    ``start``: see ``begun``.
    """
    device = accelerator.device
    return {
        "format": FORMAT,
        "command": [Path(sys.argv[0]).name, *without_token(sys.argv[1:])],
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "device_type": device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": recipe.mixed_precision,
        "commit": git_commit(),
        "laws": laws(step),
        "teachers": taps.teachers(step),
        **start,
    }


def without_token(argv: list[str]) -> list[str]:
    """A command line as it may be kept: ``--hub_token`` keeps its name only."""
    shown: list[str] = []
    for word in argv:
        name, _, value = word.partition("=")
        if value and name.replace("-", "_") == "__hub_token":
            word = f"{name}=***"
        shown.append("***" if shown and shown[-1].replace("-", "_") == "__hub_token" else word)
    return shown


def git_commit() -> str | None:
    """The commit of this source tree, with + when files differ from it; None outside a checkout."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
