"""``mixup-recipes sweep``: plan the runs, run them, and write tables and plots of what is finished."""

import shlex
from pathlib import Path
from typing import Any

from mixup_recipes import files
from mixup_recipes.pages import plots
from mixup_recipes.pages.report import overview
from mixup_recipes.pages.seeds import seeds_table
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.slurm import slurm_script
from mixup_recipes.runs.sweep import Planned, plan, read_sweep, to_yaml
from mixup_recipes.runs.sweep_runs import run_all, state
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


def sweep(
    file: Path | None,
    given: dict[str, Any],
    dry_run: bool = False,
    report_only: bool = False,
    slurm: Path | None = None,
    slurm_options: list[str] | None = None,
    jobs: int = 1,
) -> int:
    """``mixup-recipes sweep``; returns its exit status. Everything is checked before anything is written or started."""
    if jobs < 1:
        raise UserError(f"jobs: expected an integer of at least 1, got {jobs}")
    asked = read_sweep(file, given)
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
        files.write_into(out / "sweep.yaml", to_yaml(asked))
        files.write_into(slurm, script)
        print(f"To be done: {len(left)} of {many(len(runs), 'run')}. Submit them; when they have ended:")
        print(
            f"  sbatch {shlex.quote(str(slurm))}\n  mixup-recipes sweep {shlex.quote(str(out / 'sweep.yaml'))} --report"
        )
        return 0
    files.write_into(out / "sweep.yaml", to_yaml(asked))
    status = run_all(runs, lambda line: print(line, flush=True), jobs)
    print(f"\n{results(runs, out)}")
    return status
