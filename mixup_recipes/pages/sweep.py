"""``mixup-recipes sweep``: plan the runs, run or submit them, and write tables and plots of what is finished."""

import itertools
import shlex
from pathlib import Path
from typing import Any

from mixup_recipes import files
from mixup_recipes.pages import plots
from mixup_recipes.pages.report import overview
from mixup_recipes.pages.seeds import seeds_table
from mixup_recipes.runs.queued import noted
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.slurm import slurm_script
from mixup_recipes.runs.submission import Standing, executor, read_options, standings, submit
from mixup_recipes.runs.sweep import Planned, Sweep, launcher_of, plan, read_sweep, to_yaml
from mixup_recipes.runs.sweep_runs import check_data, run_all, state
from mixup_recipes.training.job import STOPPED
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


def results(runs: list[Planned], out: Path) -> str:
    """Write tables and plots of the finished runs into the folder ``out``; returns the summary over seeds."""
    done = [Run.open(run.folder) for run in runs if state(run) == "finished"]
    others = sorted({path.parent.name for path in out.glob("*/recipe.yaml")} - {run.name for run in runs})
    rest = f"\nalso in {out}, but not of this sweep: {', '.join(others)}" if others else ""
    if not done:
        return f"no run is finished: no table{rest}"
    text = seeds_table(done)
    overview(done, out)
    plots.dots(done, out / "dots.png")
    files.write_into(out / "summary.md", text)
    names = "summary.md, table.md, dots.png, curves.png"
    return f"{text}\nfinished: {len(done)} of {many(len(runs), 'run')}; written to {out}: {names}{rest}"


def on_queue(asked: Sweep, runs: list[Planned], queue: str, jobs: int | None, dry_run: bool) -> int:
    """Submit the runs that nobody is at, and say what each one is. Returns the exit status of the sweep."""
    out, options = Path(asked.output_dir), read_options(asked.slurm_options, queue)
    if queue == "local" and jobs:
        raise UserError("jobs: the launcher local starts all runs at once; leave out --jobs or the launcher")
    notes = [noted(run.folder) for run in runs]
    before = standings(runs, out)
    check_data([run for run, now in zip(runs, before, strict=True) if now.state in ("new", "failed")], queue == "slurm")
    if dry_run:
        for run, now in zip(runs, before, strict=True):
            print(f"{now.state:10} {now.job:8} {shlex.join(run.command)}")
    else:
        made = executor(queue, out, options, jobs)
    say_failures(runs, before)
    if dry_run:
        return 0
    again = [now.state in ("new", "resumable", "failed") for now in before]
    left, over = [*itertools.compress(runs, again)], [*itertools.compress(notes, again)]
    files.write_into(out / "sweep.yaml", to_yaml(asked))
    if left:
        submit(left, queue, made, over)
    after = standings(runs, out)
    for run, now in zip(runs, after, strict=True):
        print(f"{now.state:10} {now.job:8} {run.name}")
    print(f"\nsubmitted: {len(left)} of {many(len(runs), 'run')}\n{results(runs, out)}")
    if any(now.state == "failed" for now in before):
        return 1
    return 0 if all(now.state == "finished" for now in after) else STOPPED


def say_failures(runs: list[Planned], found: list[Standing]) -> None:
    """Each run that failed, with the last lines of its output."""
    for run, now in zip(runs, found, strict=True):
        if now.state == "failed":
            head = f"{run.name} failed: {now.why}" + (f"; its output is in {run.output}" if run.output.exists() else "")
            print("\n".join((head, *(f"    {line}" for line in now.lines), "")))


def sweep(
    file: Path | None,
    given: dict[str, Any],
    dry_run: bool = False,
    report_only: bool = False,
    slurm: Path | None = None,
    jobs: int | None = None,
) -> int:
    """``mixup-recipes sweep``; returns its exit status. Everything is checked before anything is written or started.

    ``jobs``: runs at a time; None: one, or as many as a queue will take.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs: expected an integer of at least 1, got {jobs}")
    asked = read_sweep(file, given)
    runs, out = plan(asked), Path(asked.output_dir)
    queue, _ = launcher_of(asked)
    if queue and slurm is None and not report_only:
        return on_queue(asked, runs, queue, jobs, dry_run)
    if asked.slurm_options and slurm is None and not report_only:
        raise UserError("slurm_options need --launcher slurm or local, or --slurm FILE; add one of them")
    if jobs and slurm is not None:
        raise UserError(
            "jobs: Slurm itself decides how many jobs of a script run at a time; leave out --jobs or --slurm"
        )
    states = [state(run) for run in runs]
    if not report_only:
        new = [run for run, now in zip(runs, states, strict=True) if now == "new"]
        check_data(new, elsewhere=slurm is not None)
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
        if any(option.lstrip("-").startswith("array") for option in asked.slurm_options):
            raise UserError("slurm_options: array cannot be set here; the script has a task for each run")
        script = slurm_script(left, out, asked.slurm_options)
        files.write_into(out / "sweep.yaml", to_yaml(asked))
        files.write_into(slurm, script)
        print(
            f"{len(left)} of {many(len(runs), 'run')} are to be done. Submit them, and make the report when they "
            "have ended:"
        )
        print(
            f"  sbatch {shlex.quote(str(slurm))}\n  mixup-recipes sweep {shlex.quote(str(out / 'sweep.yaml'))} --report"
        )
        return 0
    files.write_into(out / "sweep.yaml", to_yaml(asked))
    status = run_all(runs, lambda line: print(line, flush=True), jobs or 1)
    print(f"\n{results(runs, out)}")
    return status
