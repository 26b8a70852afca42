"""A sweep as an array of Slurm tasks."""

import os
import re
import shlex
from pathlib import Path

from mixup_recipes.runs.sweep import Planned
from mixup_recipes.training.job import STOPPED
from mixup_recipes.typed import UserError

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


def check_options(options: list[str]) -> None:
    """Raise ``UserError`` unless they look like options of sbatch, with or without their dashes."""
    for option in options:
        if not re.fullmatch(r"-{0,2}[a-zA-Z][\w-]*(=[^\n]*)?", option):
            raise UserError(
                f"slurm_options: expected options of sbatch, as in gres=gpu:1 time=12:00:00, got {option!r}"
            )


def job_name(out: Path) -> str:
    """The name of a sweep's jobs: that of its output folder."""
    return re.sub(r"[^a-zA-Z0-9_.-]+", "_", out.resolve().name)


def slurm_script(runs: list[Planned], out: Path, options: list[str]) -> str:
    """An sbatch array script with one task per run. ``options``: sbatch's, ``gres=gpu:1``, one line each."""
    check_options(options)
    tasks = []
    for number, run in enumerate(runs):
        tasks.append(f"{number})\n  out={shlex.quote(str(run.output))}\n  run=({shlex.join(run.command)}) ;;")
    return "\n".join((
        "#!/usr/bin/env bash",
        f"#SBATCH --array=0-{len(runs) - 1}",
        f"#SBATCH --job-name={job_name(out)}",
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
