"""Kill runs at random times, resume them until they are done, and compare them with undisturbed runs, bit by bit.

    python benchmarks/kill_resume.py --kills 50

Goes through all mixers, 1 and 2 processes, 0 and 2 loader processes, and several checkpoint intervals. A kill is a
SIGKILL to all processes of a run at a time uniform over its duration: start-up, training, saving or evaluation.
Exit status 1 when a run differs.
"""

import argparse
import collections
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import teachers
import tiny
from driver import Server
from resuming import LOG, Reference, checkpoints, differences, finish, kill_after, small_model_for

from mixers import MIXERS


def stage(folder: Path) -> str:
    """How far a killed run had come, from what it left."""
    if not (folder / "log.jsonl").exists():
        return "start-up"
    names = [p.name for p in checkpoints(folder)] if (folder / "checkpoints").exists() else []
    if any(name.startswith("tmp-") for name in names) or any(folder.glob(".*.tmp")):
        return "writing a file"
    return "after a checkpoint" if names else "before a checkpoint"


def main() -> int:
    """Runs until the kills are used up; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many kills in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn")
    options = parser.parse_args()
    teachers.stand_in()
    draw, began = random.Random(options.seed), time.monotonic()
    shapes = list(itertools.product(MIXERS.rows, (1, 2), (0, 2), ("epoch", 1, 2)))
    draw.shuffle(shapes)
    kills, runs, different = 0, 0, []
    stages: collections.Counter[str] = collections.Counter()

    with tempfile.TemporaryDirectory() as folder, Server() as server:
        recipe = tiny.make_recipe(Path(folder), tiny.make_photos(Path(folder) / "photos"))
        reference = Reference(server, recipe, Path(folder) / "undisturbed")
        for mixer, processes, workers, every in itertools.cycle(shapes):
            fixed = ["--mixer", mixer, "--model", small_model_for(mixer)]
            expected = reference(*fixed, processes=processes)
            seconds = reference.seconds[expected]
            out = Path(folder) / f"run-{runs}"
            args = ["--recipe", recipe, "--output_dir", out, *LOG, *fixed, "--dataloader_num_workers", workers]
            args += ["--checkpointing_steps", every, "--resume_from_checkpoint", "auto"]
            left = min(draw.randint(1, 5), options.kills - kills)
            while left and kill_after(server, draw.uniform(0, seconds), *args, processes=processes):
                kills, left = kills + 1, left - 1
                stages[stage(out)] += 1
            finish(server, *args, processes=processes)
            runs += 1
            if wrong := differences(expected, out):
                different.append(f"{mixer}, {processes} processes, {workers} workers, checkpoints {every}: {wrong}")
                print(f"DIFFERENT {different[-1]}", flush=True)
            print(f"{kills} kills, {runs} runs, {time.monotonic() - began:.0f} s: {mixer} x {processes}", flush=True)
            if kills >= options.kills:
                break

    where = ", ".join(f"{n} {name}" for name, n in stages.most_common())
    print(f"{kills} kills ({where}) of {runs} runs: {len(different)} different, {time.monotonic() - began:.0f} s")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
