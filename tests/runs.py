"""Run folders made up from what their evaluations were to have found, without training."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixers.registry import sampling_law
from mixup_recipes import cli
from mixup_recipes.recipe import Recipe, to_yaml
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs.records import fields_of
from mixup_recipes.training.export import write_predictions
from mixup_recipes.training.log import summary_csv

TOP1 = (10.0, 30.0, 50.0, 45.0, 41.0, 43.0, 40.0)
ENV = {
    "command": ["train_mixup.py"], "python": "3.11.7", "packages": {"torch": "2.14.1"}, "platform": "Linux",
    "device": "cpu", "device_type": "cpu", "processes": 1, "threads": 2, "mixed_precision": "bf16", "commit": "abc",
}  # fmt: skip
GROCERIES = (675, 661)
IMAGENET = (1_281_167, 50_000)


def quick(mixer: str = "cutmix", **fields: Any) -> Recipe:
    """A quickstart recipe of 7 epochs, which is a change: no published recipe."""
    return load_recipe(f"quickstart_{mixer}", **{"epochs": 7, "warmup_epochs": 0} | fields)


def train_line(epoch: int, speed: float | None = None, **more: Any) -> dict[str, Any]:
    """A row of training. ``speed``: images/s; default 300 + epoch, and 10 seconds an epoch."""
    line = {"mode": "train", "epoch": epoch, "update": 4 * epoch - 1, "lr": 0.1, "loss": 3 - epoch / 2, "images": 64}
    return line | {"perf": pace(epoch, speed)} | more


def val_line(
    epoch: int, top1: float, count: int = GROCERIES[1], speed: float | None = None, **more: Any
) -> dict[str, Any]:
    """A row of evaluation: each metric is a function of ``top1`` in percent, the calibration error of the epoch."""
    line = {"mode": "val", "epoch": epoch, "update": 4 * epoch, "top1": top1, "top5": min(100.0, top1 + 40)}
    line |= {"nll": top1 / 10, "ece": min(50.0, epoch / 2), "count": count, "perf": pace(epoch, speed)}
    return line | more


def pace(epoch: int, speed: float | None) -> dict[str, float]:
    """What the clock said."""
    return {"img_per_s": speed or 300.0 + epoch, "seconds": epoch * 1000 / speed if speed else 10.0 * epoch}


def log_of(top1: Iterable[float], start: int = 1, **more: Any) -> list[dict[str, Any]]:
    """A row of training and one of evaluation for each of the epochs from ``start`` on."""
    rows = ((train_line(e, more.get("speed")), val_line(e, t, **more)) for e, t in enumerate(top1, start))
    return [line for row in rows for line in row]


def write_log(run: Path, lines: Iterable[dict[str, Any]], tail: str = "") -> Path:
    """Write ``log.jsonl``, and behind it perhaps what a kill cut off; returns the run folder."""
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return run


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_run(
    folder: Path,
    recipe: Recipe | None = None,
    top1: Iterable[float] = TOP1,
    *,
    lines: list[dict[str, Any]] | None = None,
    last: int | None = None,
    speed: float | None = None,
    sizes: tuple[int, int] = GROCERIES,
    classes: list[str] | None = None,
    env: object = ENV,
    right: int | None = None,
    labels: np.ndarray | None = None,
) -> Path:
    """Write a run folder whose evaluations gave ``top1``, the last of them in epoch ``last`` (as many as there are).

    ``lines``: the whole log instead. ``sizes``: images to train on and to evaluate on. ``env``: the content of
    ``env.json``, None for no file. ``right``: how many images the exported weights get right, by their predictions;
    ``labels`` (N,) are the classes of these images.
    """
    recipe, top1 = recipe or quick(), list(top1)
    folder.mkdir(parents=True)
    if lines is None:
        lines = log_of(top1, (last or len(top1)) - len(top1) + 1, count=sizes[1], speed=speed)
        for line in lines:
            line |= {"loss": line["loss"] + recipe.seed} if line["mode"] == "train" else {}
            if recipe.ema_decay is not None:
                line |= {f"ema_{k}": line[k] for k in ("top1", "top5", "nll", "ece", "count") if k in line}
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    write_log(folder, lines)
    (folder / "summary.csv").write_text(summary_csv(lines))
    names = [f"class {i}" for i in range(recipe.num_classes)] if classes is None else classes
    data: dict[str, Any] = {"dataset": recipe.dataset, "config": None, "revision": None, "classes": names}
    splits = zip((recipe.train_split, recipe.eval_split), sizes, strict=True)
    data["splits"] = {split: {"images": n, "labels_sha256": f"{n:08x}"} for split, n in splits}
    (folder / "data.json").write_text(json.dumps(data))
    if env is not None:
        (folder / "env.json").write_text(json.dumps(env))
    if val := [line for line in lines if line["mode"] == "val"]:
        exported = {k: v for k, v in val[-1].items() if k not in ("mode", "perf")}
        exported |= {} if right is None else {"top1": 100 * right / sizes[1]}
        (folder / "eval_results.json").write_text(json.dumps({"exported": exported}))
    if right is not None:
        index, ones = np.arange(sizes[1]), np.ones(sizes[1])
        label = np.zeros(sizes[1], int) if labels is None else labels
        top = np.stack([np.where(index < right, label, label + 1), label + 2], 1)
        columns = {"index": index, "label": label, "top": top, "confidence": ones, "nll": ones}
        write_predictions(folder / "predictions.safetensors", columns)
    return folder


class Command:
    """The console command in this process: exit status, output and errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *argv: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr("sys.argv", ["mixup-recipes", *map(str, argv)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = self.capsys.readouterr()
        return int(left.value.code or 0), shown.out, shown.err


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of the tables in a Markdown text, row by row, without the rules below the heads."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row[1:-1])] for row in rows if not row.startswith("| ---")]


def cell_record(name: str, tops: Iterable[float], epochs: int | None = None, **changes: Any) -> dict[str, Any]:
    """A record of a published cell's recipe with finished seeds of the given top-1, or seeds at epoch ``epochs``."""
    recipe = load_recipe(name)
    reading = {"name": "best epoch", "value": 50.0, "used": 5, "wanted": 5, "epoch": 5, "missing": ""}
    same = {"tool": reading, "top5": 90.0, "nll": 1.0, "ece": 2.0, "seconds": 9.0, "img_per_s": 300.0}
    same |= {"env": {"laws": [sampling_law(recipe.mixer)]}}
    same |= {"epochs": epochs or recipe.epochs, "epochs_planned": recipe.epochs}
    seeds = {str(seed): {"top1": top1, "reading": dict(reading), **same} for seed, top1 in enumerate(tops)}
    content: dict[str, Any] = {"recipe": name, "fields": fields_of(recipe), "overrides": {}, "protocol": ""}
    train, evaluation = (100_000, 10_000) if name.startswith("tiny_") else IMAGENET
    content |= {"images": evaluation, "dataset": dataset(train, evaluation, recipe.train_split, recipe.eval_split)}
    return content | {"seeds": seeds} | changes


def dataset(train: int, evaluation: int, train_split: str = "train", eval_split: str = "validation") -> dict[str, Any]:
    """What a record says of its images."""
    counts = {train_split: train, eval_split: evaluation}
    return {"splits": {split: {"images": n, "labels_sha256": "aa"} for split, n in counts.items()}}
