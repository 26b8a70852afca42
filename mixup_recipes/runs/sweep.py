"""What a sweep asks for: recipes x grid x seeds, each a run with a command and a folder.

docs/sweeps.md shows the file.
"""

import itertools
import json
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mixup_recipes import flags
from mixup_recipes.recipe import Recipe, schema
from mixup_recipes.resolve import read_yaml, resolve
from mixup_recipes.training import backbones, optimisation
from mixup_recipes.training.job import Job
from mixup_recipes.training.preprocessing import of_weights
from mixup_recipes.typed import UserError, convert, from_yaml, nearest

QUEUES = ("slurm", "local")  # first words of a launcher that make each run a job of its own, see submission.py
LONGEST = 244  # letters of a folder's name: with output- and .txt it is still a file name

FIXED = {
    "name": "it follows from recipe and setting",
    "seed": "write it under seeds",
    "mixer_args": "write mixer.ARGUMENT, as in mixer.alpha",
    **dict.fromkeys(("recipe", "output_dir", "resume_from_checkpoint", "list", "dry_run"), "the sweep sets it"),
}
"""Flags of train_mixup.py that are no overrides, and why."""


class Sweep(NamedTuple):
    """What a sweep file says; every part of it is a flag too."""

    recipes: list[str]
    """Recipe names or paths of recipe files."""
    seeds: list[int]
    """Seeds that each recipe runs with; default 0 alone."""
    overrides: dict[str, Any]
    """Flag of train_mixup.py -> value, for all runs."""
    grid: dict[str, list[Any]]
    """Recipe field -> values; every combination is run."""
    launcher: str | None
    """What stands before train_mixup.py; default: this Python. ``slurm`` in front of it: each run is a job of Slurm."""
    slurm_options: list[str]
    """Options of sbatch: ``gres=gpu:1``, ``time=12:00:00``."""
    output_dir: str
    """Folder for the run folders, what they print, and the results; default runs/sweep."""


class Planned(NamedTuple):
    """One run of a sweep."""

    name: str
    recipe: Recipe
    folder: Path
    output: Path
    """File with what the run prints; whoever runs it holds a lock on it."""
    command: list[str]


# --------------------------------------------------------------------------------------------- what is asked for


def read_sweep(file: Path | None, given: dict[str, Any]) -> Sweep:
    """A sweep from a YAML file, flags, or both; flags replace what the file says, ``set`` and ``grid`` add to it.

    ``given``: flag -> value or None; ``recipes seeds launcher slurm_options output_dir`` as in the file, ``set`` and
    ``grid`` as lists of ``KEY=VALUE``. Raises ``UserError`` with the nearest valid key.
    """
    where, content = str(file or "command line"), read_yaml(file, "sweep file") if file else {}
    for key in content:
        if key not in Sweep._fields:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(str(key), Sweep._fields)}")
    for key, flag, form in (("overrides", "set", "{}"), ("grid", "grid", "[{}]")):
        table = content.get(key) or {}
        if not isinstance(table, dict):
            raise UserError(f"{where}: {key}: expected a table, got {table!r}")
        added = map(assignment, given.get(flag) or [])
        content[key] = {str(k): v for k, v in table.items()} | {k: yaml_value(k, form.format(v)) for k, v in added}
    simple = ("recipes", "seeds", "launcher", "slurm_options", "output_dir")
    content |= {k: given[k] for k in simple if given.get(k) is not None}
    if not content.get("recipes"):
        raise UserError("no recipes were given; list them under recipes: in a sweep file, or pass --recipes")
    lists = {k: content[k] for k in ("recipes", "seeds", "slurm_options") if k in content}
    for key, values in (lists | {f"grid: {k}": v for k, v in content["grid"].items()}).items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: {key}: expected a list, got {values!r}")
    seed = schema(Recipe)["seed"]
    return Sweep(
        recipes=[convert(name, str, f"{where}: recipes") for name in content["recipes"]],
        seeds=[convert(value, seed, f"{where}: seeds") for value in content.get("seeds", [0])],
        overrides=content["overrides"],
        grid=content["grid"],
        launcher=convert(content.get("launcher"), str | None, f"{where}: launcher"),
        slurm_options=[convert(text, str, f"{where}: slurm_options") for text in content.get("slurm_options", [])],
        output_dir=convert(content.get("output_dir", "runs/sweep"), str, f"{where}: output_dir"),
    )


def assignment(text: str) -> tuple[str, str]:
    """``KEY=VALUE`` in two."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"command line: expected KEY=VALUE, as in epochs=20, got {text!r}")
    return key.replace("-", "_"), value


def yaml_value(key: str, text: str) -> Any:
    """Text of a command line as a YAML value."""
    try:
        return from_yaml(text)
    except UserError as e:
        raise UserError(f"command line: {key}: {e}") from None


def to_yaml(sweep: Sweep) -> str:
    """The sweep as a file that ``read_sweep`` accepts."""
    return yaml.safe_dump({k: v for k, v in sweep._asdict().items() if v not in (None, {}, [])}, sort_keys=False)


# --------------------------------------------------------------------------------------------- runs


def launcher_of(sweep: Sweep) -> tuple[str | None, list[str]]:
    """The queue that the runs wait in, if there is one, and what stands before train_mixup.py. Raises ``UserError``."""
    try:
        words = shlex.split(sweep.launcher or "")
    except ValueError as e:
        raise UserError(f"launcher {sweep.launcher!r}: {e}") from None
    queue = words.pop(0) if words and words[0] in QUEUES else None
    if not words and (queue or not sweep.launcher):
        words = [sys.executable]
    if not words or shutil.which(words[0]) is None:
        first = words[0] if words else ""
        hint = nearest(first, (*QUEUES, "accelerate launch", "torchrun", "python"))
        raise UserError(f"launcher {sweep.launcher!r}: there is no executable {first!r} in PATH; {hint}")
    return queue, words


def plan(sweep: Sweep) -> list[Planned]:
    """The runs of a sweep, one seed of everything before the next. Raises ``UserError``; writes nothing."""
    _, launcher = launcher_of(sweep)
    for key in sweep.overrides:
        check_key(key, "overrides", {*schema(Recipe), *schema(Job)})
    for key in sweep.grid:
        check_key(key, "grid", set(schema(Recipe)))
        if key in sweep.overrides:
            raise UserError(f"{key} is both in overrides and in grid; leave out one")
    runs: dict[str, Planned] = {}
    out = Path(sweep.output_dir)
    for seed, recipe, values in itertools.product(sweep.seeds, sweep.recipes, itertools.product(*sweep.grid.values())):
        run = make_run(recipe, seed, sweep.overrides, dict(zip(sweep.grid, values, strict=True)), launcher, out)
        if run.name in runs:
            a, b = (shlex.join(r.command[len(launcher) + 1 :]) for r in (runs[run.name], run))
            raise UserError(f"two runs would share the folder {run.folder}: {a}" + ("" if a == b else f" and {b}"))
        runs[run.name] = run
    return list(runs.values())


def check_key(key: str, where: str, known: set[str]) -> None:
    """Raise ``UserError`` unless the key is a flag of train_mixup.py that a sweep may set."""
    if key in FIXED:
        raise UserError(f"{where}: {key!r} cannot be set here; {FIXED[key]}")
    if key not in known and not key.startswith("mixer."):
        raise UserError(f"{where}: unknown field {key!r}; {nearest(key, sorted(known - FIXED.keys()))}")


def make_run(
    recipe_name: str, seed: int, overrides: dict[str, Any], grid: dict[str, Any], launcher: list[str], out: Path
) -> Planned:
    """Resolve one run. Raises ``UserError`` that names it."""
    values, known, job_flags = overrides | grid, schema(Recipe), schema(Job)
    fields = {k: v for k, v in values.items() if k in known} | {"seed": seed}
    if own_args := {k.removeprefix("mixer."): v for k, v in values.items() if k.startswith("mixer.")}:
        fields["mixer_args"] = own_args
    jobs = {k: convert(v, job_flags[k], f"overrides: {k}") for k, v in values.items() if k in job_flags}
    try:
        recipe, _ = resolve(recipe_name, fields)
        backbones.check_model(recipe.model)
        optimisation.check_optimizer(recipe.opt)
    except UserError as e:
        raise UserError(str(e) if recipe_name in str(e) else f"{recipe_name}: {e}") from None
    args = recipe.mixer_args.get(recipe.mixer, {})
    typed = {k: args[k[6:]] if k.startswith("mixer.") else jobs[k] if k in jobs else getattr(recipe, k) for k in values}
    parts = [recipe.name, *(k.removeprefix("mixer.") + in_path(typed[k]) for k in grid), f"seed{seed}"]
    name = re.sub(r"[^\w.+-]+", "_", "-".join(parts), flags=re.ASCII)
    if len(name) > LONGEST:
        raise UserError(
            f"{recipe_name}: the folder name {name[:60]}... has {len(name)} letters, and at most {LONGEST} fit"
        )
    script = str(find_spec("train_mixup").origin)  # type: ignore[union-attr]  # it is installed with this module
    command = [*launcher, script, "--recipe", recipe_name, "--seed", str(seed)]
    command += ["--output_dir", str(out / name), "--resume_from_checkpoint", "auto", *as_flags(typed)]
    given = flags.parse(command[len(launcher) + 1 :], "train_mixup.py", "", {"Run": Job, "Recipe fields": Recipe})
    said, origin = resolve(recipe_name, given["Recipe fields"])
    if said != recipe:
        raise UserError(
            f"{recipe_name}: its values cannot be written as flags: {shlex.join(as_flags(typed))}; write a recipe file"
        )
    flags.fill(Job, given["Run"])
    try:  # as training does
        recipe, _ = resolve(recipe_name, given["Recipe fields"] | of_weights(recipe, origin))
    except UserError as e:
        raise UserError(f"{recipe_name}: {e}") from None
    return Planned(name, recipe, out / name, out / f"output-{name}.txt", command)


def in_path(value: Any) -> str:
    """A value as part of a folder name."""
    return "-".join(map(in_path, value)) if isinstance(value, tuple | list) else str(value)


def as_flags(values: dict[str, Any]) -> list[str]:
    """Values as flags of train_mixup.py."""
    tokens = []
    for key, value in values.items():
        if isinstance(value, dict) and not key.startswith("mixer."):
            tokens += [f"--{key}.{k}={text(v)}" for k, v in value.items()]
        elif isinstance(value, tuple):
            tokens += [f"--{key}", *map(str, value)]
        else:
            tokens.append(f"--{key}={text(value)}")
    return tokens


def text(value: Any) -> str:
    """A value as the command line writes it."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
