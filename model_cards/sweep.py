"""Many runs, one after another: recipes x grid x seeds, each a process of its own; then a table and plots.

What is finished is skipped, what was interrupted goes on, what fails does not stop the others. The same command
started again continues. docs/sweeps.md shows the file and the command line.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import recipes
from recipes import Recipe, cli
from recipes.typed import UserError, convert, from_yaml, nearest
from training.job import STOPPED, Job

from .logs import read_log
from .report import report, summarise
from .seeds import summary

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LONGEST = 244  # letters of a folder's name: with output- and .txt it is still a file name
GRACE = 60  # seconds that processes have which outlive their launcher, once they are asked to leave

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
    """What stands before train_mixup.py; default: this Python."""
    output_dir: str
    """Folder for the run folders, what they print, and the results; default runs/sweep."""


class Run(NamedTuple):
    """One run of a sweep."""

    name: str
    recipe: Recipe
    folder: Path
    output: Path
    """File with what the run prints; whoever runs it holds a lock on it."""
    command: list[str]


# --------------------------------------------------------------------------------------------- what is asked for


def read(file: Path | None, given: dict[str, Any]) -> Sweep:
    """A sweep from a YAML file, flags, or both; flags replace what the file says, ``set`` and ``grid`` add to it.

    ``given``: flag -> value or None; ``recipes seeds launcher output_dir`` as in the file, ``set`` and ``grid`` as
    lists of ``KEY=VALUE``. Raises ``UserError`` with the nearest valid key.
    """
    where, content = str(file or "command line"), recipes.read_yaml(file, "sweep file") if file else {}
    for key in content:
        if key not in Sweep._fields:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(str(key), Sweep._fields)}")
    for key, flag, form in (("overrides", "set", "{}"), ("grid", "grid", "[{}]")):
        table = content.get(key) or {}
        if not isinstance(table, dict):
            raise UserError(f"{where}: {key}: expected a table, got {table!r}")
        added = map(assignment, given.get(flag) or [])
        content[key] = {str(k): v for k, v in table.items()} | {k: yaml_value(k, form.format(v)) for k, v in added}
    simple = ("recipes", "seeds", "launcher", "output_dir")
    content |= {k: given[k] for k in simple if given.get(k) is not None}
    if not content.get("recipes"):
        raise UserError("which recipes? write them under recipes: in a file, or pass --recipes")
    lists = {k: content[k] for k in ("recipes", "seeds") if k in content}
    for key, values in (lists | {f"grid: {k}": v for k, v in content["grid"].items()}).items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: {key}: expected a list, got {values!r}")
    seed = recipes.schema(Recipe)["seed"]
    return Sweep(
        recipes=[convert(name, str, f"{where}: recipes") for name in content["recipes"]],
        seeds=[convert(value, seed, f"{where}: seeds") for value in content.get("seeds", [0])],
        overrides=content["overrides"],
        grid=content["grid"],
        launcher=convert(content.get("launcher"), str | None, f"{where}: launcher"),
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
    """The sweep as a file that ``read`` accepts."""
    return yaml.safe_dump({k: v for k, v in sweep._asdict().items() if v not in (None, {})}, sort_keys=False)


# --------------------------------------------------------------------------------------------- runs


def plan(sweep: Sweep) -> list[Run]:
    """The runs of a sweep, one seed of everything before the next. Raises ``UserError``; writes nothing."""
    try:
        launcher = shlex.split(sweep.launcher or shlex.quote(sys.executable))
    except ValueError as e:
        raise UserError(f"launcher {sweep.launcher!r}: {e}") from None
    if not launcher or shutil.which(launcher[0]) is None:
        raise UserError(f"launcher {sweep.launcher!r}: no such executable in PATH: {launcher[0] if launcher else ''!r}")
    for key in sweep.overrides:
        check_key(key, "overrides", {*recipes.schema(Recipe), *recipes.schema(Job)})
    for key in sweep.grid:
        check_key(key, "grid", set(recipes.schema(Recipe)))
        if key in sweep.overrides:
            raise UserError(f"{key} is both in overrides and in grid; leave out one")
    runs: dict[str, Run] = {}
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
        raise UserError(f"{where}: {key!r} cannot stand here; {FIXED[key]}")
    if key not in known and not key.startswith("mixer."):
        raise UserError(f"{where}: unknown field {key!r}; {nearest(key, sorted(known - FIXED.keys()))}")


def make_run(
    recipe_name: str, seed: int, overrides: dict[str, Any], grid: dict[str, Any], launcher: list[str], out: Path
) -> Run:
    """Resolve one run. Raises ``UserError`` that names it."""
    from training import backbones, optimisation

    values, known, job_flags = overrides | grid, recipes.schema(Recipe), recipes.schema(Job)
    fields = {k: v for k, v in values.items() if k in known} | {"seed": seed}
    if own_args := {k.removeprefix("mixer."): v for k, v in values.items() if k.startswith("mixer.")}:
        fields["mixer_args"] = own_args
    jobs = {k: convert(v, job_flags[k], f"overrides: {k}") for k, v in values.items() if k in job_flags}
    try:
        recipe, _ = recipes.resolve(recipe_name, fields)
        backbones.check_name(recipe.model)
        optimisation.check_name(recipe.opt)
    except UserError as e:
        raise UserError(str(e) if recipe_name in str(e) else f"{recipe_name}: {e}") from None
    args = recipe.mixer_args.get(recipe.mixer, {})
    typed = {k: args[k[6:]] if k.startswith("mixer.") else jobs[k] if k in jobs else getattr(recipe, k) for k in values}
    parts = [recipe.name, *(k.removeprefix("mixer.") + plain(typed[k]) for k in grid), f"seed{seed}"]
    name = re.sub(r"[^\w.+-]+", "_", "-".join(parts), flags=re.ASCII)
    if len(name) > LONGEST:
        raise UserError(f"{recipe_name}: the folder name {name[:60]}... has {len(name)} letters, at most {LONGEST} fit")
    script = find_spec("train_mixup").origin  # type: ignore[union-attr]  # it is installed with this module
    command = [*launcher, script, "--recipe", recipe_name, "--seed", str(seed)]
    command += ["--output_dir", str(out / name), "--resume_from_checkpoint", "auto", *flags(typed)]
    given = cli.parse(command[len(launcher) + 1 :], "train_mixup.py", "", {"Run": Job, "Recipe fields": Recipe})
    if recipes.resolve(recipe_name, given["Recipe fields"])[0] != recipe:
        raise UserError(f"{recipe_name}: cannot be written as flags: {shlex.join(flags(typed))}; write a recipe file")
    cli.fill(Job, given["Run"])
    return Run(name, recipe, out / name, out / f"output-{name}.txt", command)


def plain(value: Any) -> str:
    """A value as part of a folder name."""
    return "-".join(map(plain, value)) if isinstance(value, tuple | list) else str(value)


def flags(values: dict[str, Any]) -> list[str]:
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


def state(run: Run) -> str:
    """``finished``, ``running`` (another process is at it), ``resumable`` or ``new``.

    Raises ``UserError`` when the folder holds something else, with the fields that differ, or cannot be read.
    """
    from training.run import check_folder

    try:
        check_folder(run.folder, run.recipe, resume=True)
        if held(run.output, fcntl.flock) or held(run.folder / ".lock", fcntl.lockf):
            return "running"
        if finished(run):
            return "finished"
        return "resumable" if (run.folder / "recipe.yaml").exists() else "new"
    except OSError as e:  # its name is too long for the disk, its output is a folder
        raise UserError(f"cannot read {e.filename or run.folder}: {e.strerror}") from None


def short(row: dict[str, Any]) -> str:
    """How much of the protocol a run covers, where it is not all: ``: 2 of 5 epochs``."""
    used, wanted = row["epochs_used"], row["epochs_wanted"]
    return f": {used} of {wanted} epochs" if used < wanted else ""


def finished(run: Run) -> bool:
    """Whether the last epoch is evaluated, and what was exported is up to date (summary.csv is written last)."""
    try:
        last_row = (run.folder / "summary.csv").read_text(encoding="utf-8", errors="replace").splitlines()[-1]
    except (OSError, IndexError):
        return False
    evaluated = [line["epoch"] for line in read_log(run.folder / "log.jsonl") if line["mode"] == "val"]
    return run.recipe.epochs in evaluated and last_row.startswith(f"{run.recipe.epochs},")


def held(path: Path, lock: Any) -> bool:
    """Whether another process holds a lock on the file. A shared lock tells, for which it need not be writable."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


# --------------------------------------------------------------------------------------------- processes


class Stop:
    """Signals to the sweep go to the running process group as SIGTERM, which all launchers pass on; a second kills."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.child: subprocess.Popen[bytes] | None = None
        self.before = {n: signal.getsignal(n) for n in SIGNALS}
        for number, handler in self.before.items():
            if number != signal.SIGHUP or handler is not signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self.request)

    def request(self, number: int, _frame: Any) -> None:
        """The signal handler."""
        self.asked.append(signal.Signals(number).name)
        self.send()

    def send(self) -> None:
        """Pass on what was asked for."""
        if self.child is not None and self.asked:
            kill_group(self.child.pid, signal.SIGTERM if len(self.asked) == 1 else signal.SIGKILL)

    def restore(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def kill_group(pid: int, number: int) -> None:
    """Send a signal to a process group, if there still is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def launch(run: Run, stop: Stop) -> int | None:
    """Run to the end; its exit status, negative for the signal that killed it, or None if another process is at it.

    The child has a process group of its own, so that a Ctrl-C reaches it as SIGTERM only. It shares the lock on its
    output: who starts the sweep a second time sees that it still runs, even if this process was killed.
    """
    with run.output.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        file.write(f"$ {shlex.join(run.command)}\n".encode())
        file.flush()
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        stop.child = subprocess.Popen(run.command, start_new_session=True, **streams)
        stop.send()  # a signal may have come meanwhile
        status = stop.child.wait()
    # A launcher may leave before its processes: accelerate does on SIGTERM. They save; the next run needs their memory.
    deadline, asked = time.monotonic() + GRACE, False
    while status and held(run.output, fcntl.flock) and time.monotonic() < deadline + 5:
        if not asked or time.monotonic() > deadline:
            kill_group(stop.child.pid, signal.SIGKILL if asked else signal.SIGTERM)
        asked = True
        time.sleep(0.1)
    stop.child = None
    return status


def last_lines(path: Path, start: int) -> list[str]:
    """The last lines of a file that aren't empty, at most five, from byte ``start`` on."""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 20_000))
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    return [line for line in lines if line.strip() and not line.startswith("$ ")][-5:]


def duration(seconds: float) -> str:
    """Time for people."""
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"


def time_left(done: list[Run], left: list[Run]) -> str:
    """The time that the rest takes if it goes on as before: a run takes as long as its other seeds did, or as all."""
    took = [(run.recipe, summarise(run.folder)["seconds"]) for run in done]
    total = 0.0
    for run in left:
        alike = [s for other, s in took if not recipes.differences(other, run.recipe, ignore=("name", "seed"))]
        total += statistics.fmean(alike or [s for _, s in took])
    return f"; about {duration(total)} left" if left else ""


def run_all(runs: list[Run], say: Any = print) -> int:
    """Run what isn't finished; returns the exit status of the sweep: 0, 1 (a run failed) or 75 (start it again)."""
    stop, failures, unfinished = Stop(), [], 0
    done = [run for run in runs if state(run) == "finished"]
    try:
        for number, run in enumerate(runs, 1):
            head = f"[{number}/{len(runs)}] {run.name}"
            now = state(run)  # anew: another sweep may have been here
            if now == "finished":
                say(f"{head}: finished before")
                continue
            if stop.asked:
                break
            start, began = run.output.stat().st_size if run.output.exists() else 0, time.monotonic()
            if now != "running":
                say(f"{head}: {'resumed' if now == 'resumable' else 'started'}")
            status = None if now == "running" else launch(run, stop)
            took = duration(time.monotonic() - began)
            if status is None:
                say(f"{head}: another process is running it; skipped")
                unfinished += 1
            elif status == 0 and finished(run):
                done.append(run)
                row = summarise(run.folder)
                rest = time_left(done, [r for r in runs[number:] if r not in done])
                say(f"{head}: {took}, top-1 {row['top1']:.2f} ({row['protocol']}{short(row)}){rest}")
            elif status == STOPPED or stop.asked:
                say(f"{head}: {took}, stopped")
                unfinished += 1
            else:
                what = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
                if status == 0:
                    what = f"exit status 0, but epoch {run.recipe.epochs} was not evaluated"
                say(f"{head}: {took}, failed: {what}")
                failures.append((run, what, last_lines(run.output, start)))
    finally:
        stop.restore()
    for run, what, lines in failures:
        say("\n".join((f"\n{run.name} failed: {what}; its output is in {run.output}", *(f"    {x}" for x in lines))))
    if stop.asked:
        say(f"\n{stop.asked[0]}: stopped; the same command goes on")
        return STOPPED
    if failures:
        say(f"\n{len(failures)} of {len(runs)} runs failed; the same command tries them again")
        return 1
    return STOPPED if unfinished else 0


# --------------------------------------------------------------------------------------------- results


def results(runs: list[Run], out: Path) -> str:
    """Write tables and plots of the finished runs into the folder ``out``; returns the summary over seeds."""
    from . import plots

    done = [run.folder for run in runs if state(run) == "finished"]
    others = sorted({path.parent.name for path in out.glob("*/recipe.yaml")} - {run.name for run in runs})
    rest = f"\nalso in {out}, but not of this sweep: {', '.join(others)}" if others else ""
    if not done:
        return f"no run is finished: no table{rest}"
    text = summary(done)
    report(done, out)
    plots.dots(done, out / "dots.png")
    plots.write(out / "summary.md", text)
    files = "summary.md, table.md, dots.png, curves.png"
    return f"{text}\n{len(done)} of {len(runs)} runs are finished; written to {out}: {files}{rest}"


def slurm_script(runs: list[Run], out: Path, options: list[str]) -> str:
    """An sbatch array script with one task per run. ``options``: sbatch's, ``gres=gpu:1``, one line each."""
    for option in options:
        if not re.fullmatch(r"-{0,2}[a-zA-Z][\w-]*(=[^\n]*)?", option):
            raise UserError(
                f"slurm_options: expected options of sbatch, as in gres=gpu:1 time=12:00:00, got {option!r}"
            )
    tasks = []
    for number, run in enumerate(runs):
        tasks.append(f"{number})\n  out={shlex.quote(str(run.output))}\n  run=({shlex.join(run.command)}) ;;")
    return "\n".join((
        "#!/usr/bin/env bash",
        f"#SBATCH --array=0-{len(runs) - 1}",
        f"#SBATCH --job-name={re.sub(r'[^a-zA-Z0-9_.-]+', '_', out.resolve().name)}",
        f'#SBATCH --output="{out.resolve()}/slurm-%A_%a.out"',
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120",
        *(f"#SBATCH --{option.lstrip('-')}" for option in options),
        "",
        f"cd {shlex.quote(os.getcwd())} || exit 2",
        'case "$SLURM_ARRAY_TASK_ID" in',
        *tasks,
        '*) echo "SLURM_ARRAY_TASK_ID: no task ${SLURM_ARRAY_TASK_ID:-given}" >&2; exit 2 ;;',
        "esac",
        SLURM_END,
    ))  # fmt: skip


SLURM_END = f"""
set -m  # the run gets a process group of its own
"${{run[@]}}" >> "$out" 2>&1 &
job=$!
asked=
trap 'asked=1; kill -TERM -- "-$job"' USR1 TERM  # TERM: what every launcher passes on
while :; do
  wait "$job"
  status=$?
  kill -0 "$job" 2>/dev/null || break  # else a signal has ended the wait, not the run
done
while [ "$asked" ] && kill -0 -- "-$job" 2>/dev/null; do sleep 1; done  # a launcher may leave before its processes
if [ "$status" = {STOPPED} ] || {{ [ "$asked" ] && [ "$status" != 0 ]; }}; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
"""


# --------------------------------------------------------------------------------------------- the command


def sweep(
    file: Path | None,
    given: dict[str, Any],
    dry_run: bool = False,
    report_only: bool = False,
    slurm: Path | None = None,
    slurm_options: list[str] | None = None,
) -> int:
    """``mixup-recipes sweep``; returns its exit status. Everything is checked before anything is written or started."""
    from .plots import write

    asked = read(file, given)
    runs, out = plan(asked), Path(asked.output_dir)
    states = [state(run) for run in runs]
    if dry_run:
        for run, now in zip(runs, states, strict=True):
            print(f"{now:10} {shlex.join(run.command)}")
        return 0
    if report_only:
        print(results(runs, out))
        return 0
    if slurm is not None:
        left = [run for run, now in zip(runs, states, strict=True) if now in ("new", "resumable")]
        if not left:
            print("nothing to submit: no run is new or resumable")
            return 0
        script = slurm_script(left, out, slurm_options or [])
        write(out / "sweep.yaml", to_yaml(asked))
        write(slurm, script)
        print(f"{len(left)} of {len(runs)} runs are to be done. Submit them, and when they have ended make the table:")
        print(
            f"  sbatch {shlex.quote(str(slurm))}\n  mixup-recipes sweep {shlex.quote(str(out / 'sweep.yaml'))} --report"
        )
        return 0
    write(out / "sweep.yaml", to_yaml(asked))
    status = run_all(runs, lambda line: print(line, flush=True))
    print(f"\n{results(runs, out)}")
    return status
