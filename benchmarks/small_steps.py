"""Time of an update with every mixer in a setting of ours, as a multiple of the update without mixing.

    python benchmarks/small_steps.py --settings small_data small_data_vit --csv model_cards/small_costs.csv

Each mixer runs forward and backward, and what it does after an update, with the setting's own network, arguments,
image size and batch size, on noise in the place of images. Reading images and the optimiser's step are left out. Times
are the process's own time on a CPU, so that other programs count little. Each is divided by the mean of the updates
without mixing right before and after it. What is shown is the mean over the updates, since some mixers do something
else in each of them, with the least and the most. Memory is counted as ``benchmarks/step.py`` does: the most that
autograd keeps for the backward pass at one time.

A teacher is a network of the setting itself, with random weights: what it has learned takes no time.
"""

# ruff: noqa: E402
import argparse
import csv
import functools
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent), str(HERE)]  # beside this file "mixers" would mean mixers.py

import torch
from step import Held, paired, train_once
from timm.models import save_for_hf

from mixers import MIXERS
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import resolve, settings
from mixup_recipes.training import backbones
from mixup_recipes.training.launch import keep_freed_memory
from mixup_recipes.training.update import new_step
from mixup_recipes.typed import UserError

COLUMNS = ("setting", "mixer", "time", "least", "most", "kept", "timed_on")
TEACHES = ("attentivemix", "supermix")


def main() -> None:
    """Print a table for each setting, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", nargs="+", required=True, choices=list(settings()), metavar="SETTING")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS.rows), choices=list(MIXERS.rows), metavar="MIXER")
    parser.add_argument("--repeats", type=int, default=24, help="updates of each mixer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="write the rows here too; rows of other settings and mixers stay")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.csv and not args.csv.parent.is_dir():
        parser.error(f"--csv {args.csv}: there is no folder {args.csv.parent}")
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as a run does
    timed_on = f"CPU, {args.threads} thread(s)"
    print(f"`python {' '.join(sys.argv)}`: torch {torch.__version__}; {timed_on}.")
    for setting in args.settings:
        rows = measured(setting, list(dict.fromkeys(("vanilla", *args.mixers))), args.repeats)
        print(f"\n| {setting} | time | kept for backward |\n|---|---:|---:|")
        for mixer, row in rows.items():
            print(f"| {mixer} | {row['time']:.2f}x ({row['least']:.2f} to {row['most']:.2f}) | {row['kept']:.2f}x |")
        if args.csv:
            write(args.csv, setting, rows, timed_on)


def measured(setting: str, mixers: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """What each mixer costs under a setting, as multiples of ``vanilla``; those that its network cannot take are left
    out, with a line that says so."""
    calls: dict[str, Callable[[int], None]] = {}
    kept: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = resolve(f"{setting}_vanilla")[0]
        save_for_hf(backbones.create_model(base), folder, safe_serialization=True, model_args=base.model_args)
        for mixer in mixers:
            teacher = {"mixer_args": {"teacher": folder}} if mixer in TEACHES else {}
            try:
                recipe = resolve(f"{setting}_{mixer}", teacher)[0]
                call, kept[mixer] = update_of(recipe)
            except (UserError, ValueError) as error:
                print(f"{setting}_{mixer} is left out: {error}")
                continue
            call(0)  # warms up, and leaves a history
            calls[mixer] = call
        times = paired(calls, repeats, time.process_time)
    return {
        mixer: {
            "time": fmean(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "kept": kept[mixer] / kept["vanilla"],
        }
        for mixer, ratios in times.items()
    }


def update_of(recipe: Recipe) -> tuple[Callable[[int], None], float]:
    """One update of a recipe on noise, and the bytes that autograd keeps in it."""
    step = new_step(backbones.create_model(recipe), recipe).train()
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    size = recipe.per_device_train_batch_size, 3, recipe.image_size, recipe.image_size
    x = torch.randn(size).to(memory_format=layout)
    y = torch.nn.functional.one_hot(torch.arange(size[0]) % recipe.num_classes, recipe.num_classes).float()
    step = step.to(memory_format=layout)
    call = functools.partial(train_once, step, x, y)
    call(0)
    most = []
    for update in range(1, 5):
        held = Held({p.untyped_storage()._cdata for p in step.parameters()})
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda tensor: tensor.tensor):
            call(update)
        most.append(held.most)
    return call, fmean(most)


def write(path: Path, setting: str, rows: dict[str, dict[str, float]], timed_on: str) -> None:
    """Put the rows into the CSV file that `mixup-recipes table --setting` reads."""
    old = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    lines = {(row["setting"], row["mixer"]): row for row in old}
    for mixer, row in rows.items():
        values = {name: f"{value:.3f}" for name, value in row.items()}
        lines[setting, mixer] = {"setting": setting, "mixer": mixer, **values, "timed_on": timed_on}
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(lines.values())
    path.write_text(text.getvalue())


if __name__ == "__main__":
    main()
