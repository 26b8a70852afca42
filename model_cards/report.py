"""A report over run folders: one table, the curves, and the mixed batches, all generated from what the runs logged.

Top-1, top-5 and ECE are percentages, NLL is in nats, times are wall seconds. The reported numbers follow the
setting's protocol (``training.protocols``): each metric's median over the last epochs, or all metrics of the epoch
with the highest top-1.
"""

import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import recipes
from recipes.typed import UserError
from training import protocols

from .logs import COUNT, NUMBER, TEXT, check, naming, read_log, read_table

METRICS = ("top1", "top5", "nll", "ece")


def load_run(run: Path) -> tuple[recipes.Recipe, list[dict[str, Any]], list[dict[str, Any]]]:
    """Recipe, training lines and evaluation lines of a run folder. Raises ``UserError`` naming what is missing."""
    if not run.is_dir():
        raise UserError(f"no run folder {run}")
    for file in ("recipe.yaml", "log.jsonl"):
        if not (run / file).is_file():
            raise UserError(f"{run} is no run folder: {file} is missing")
    recipe, _ = recipes.resolve(str(run / "recipe.yaml"))
    lines = read_log(run / "log.jsonl")
    train, val = ([line for line in lines if line["mode"] == mode] for mode in ("train", "val"))
    if not train or not val:
        raise UserError(f"{run}: log.jsonl has no {'evaluated' if train else 'trained'} epoch yet")
    return recipe, train, val


def images_of(recipe: recipes.Recipe) -> dict[str, Any]:
    """The shape of what a run says of its images (``logs.check``)."""
    split = {"images": COUNT, "labels_sha256": TEXT}
    return {"splits": {recipe.train_split: split, recipe.eval_split: split}}


def load_data(run: Path, recipe: recipes.Recipe) -> dict[str, Any]:
    """What ``data.json`` of a run folder says of its images, without the class names. Raises ``UserError``."""
    content = read_table(run / "data.json")
    check(content, images_of(recipe), str(run / "data.json"))
    return {"commit": None} | {k: v for k, v in content.items() if k != "classes"}  # a run may be older than this field


def value(run: Path, line: dict[str, Any], *keys: str) -> float:
    """A number of a log line; ``keys`` lead to it. Raises ``UserError`` if it isn't there."""
    found: Any = line
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    place = f"{run}: log.jsonl, {line['mode']} line of epoch {line['epoch']}: {'.'.join(keys)}"
    if found is None:
        raise UserError(f"{place} is missing")
    check(found, NUMBER, place)
    return found


def summarise(run: Path) -> dict[str, Any]:
    """The reported numbers of a run.

    ``run`` (folder name), ``recipe``, ``mixer``, ``seed``, ``split`` and ``count`` (what was evaluated), ``epochs``
    done of ``epochs_planned``, ``protocol`` in words, ``epochs_used`` of ``epochs_wanted`` by it, ``ema`` (weights
    averaged or not), ``top1 top5 ece`` (percent), ``nll`` (nats), ``tool_protocol`` and ``tool_top1`` (what OpenMixup's
    tools would report), ``seconds`` (wall time over all resumes), ``img_per_s`` (median over training lines). Raises
    ``UserError``: see ``load_run``.
    """
    recipe, train, val = load_run(run)
    prefix = "ema_" if recipe.report_ema else ""
    metrics = {line["epoch"]: {name: value(run, line, prefix + name) for name in METRICS} for line in val}
    with naming(run):
        number, tool = protocols.of_run(val, recipe)
    top1 = {epoch: found["top1"] for epoch, found in metrics.items()}
    window = protocols.window(top1, recipe.protocol, recipe.protocol_epochs, recipe.epochs)
    return {
        "run": run.resolve().name,
        "recipe": recipe.name,
        "mixer": recipe.mixer,
        "seed": recipe.seed,
        "split": recipe.eval_split,
        "count": int(value(run, val[-1], "count")),
        "epochs": val[-1]["epoch"],
        "epochs_planned": recipe.epochs,
        "protocol": number.name + (", EMA" if recipe.report_ema else ""),
        "epochs_used": number.used,
        "epochs_wanted": number.wanted,
        "ema": recipe.report_ema,
        **{name: statistics.median(metrics[epoch][name] for epoch in window) for name in METRICS},
        "tool_protocol": tool.label,
        "tool_top1": tool.value,
        "seconds": max(value(run, line, "perf", "seconds") for line in (*train, *val)),
        "img_per_s": statistics.median(value(run, line, "perf", "img_per_s") for line in train),
    }


def labels(runs: list[Path]) -> list[str]:
    """Folder names; where two are the same, with as many parents as tell the runs apart."""
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts), default=0)):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run) for run in runs]


def markdown(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(runs: list[Path]) -> str:
    """The runs as a Markdown table, with a line that says what was measured."""
    rows = [summarise(run) for run in runs]
    if not rows:
        raise UserError("no run folders given")
    protocols = sorted({row["protocol"] for row in rows})
    shared = len(protocols) == 1
    head = ["run", "mixer", "epochs", f"top-1 ({protocols[0]})" if shared else "top-1", "top-5", "NLL", "ECE"]
    head += ["seconds", "images/s"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for name, row in zip(labels(runs), rows, strict=True):
        done, planned, used, wanted = (row[k] for k in ("epochs", "epochs_planned", "epochs_used", "epochs_wanted"))
        notes = [] if shared else [row["protocol"]]
        notes += [f"{used} of {wanted} epochs"] if used < wanted else []
        lines.append([
            markdown(name),
            row["mixer"],
            f"{done}" if done == planned else f"{done} of {planned}",
            f"{row['top1']:.2f}" + (f" ({', '.join(notes)})" if notes else ""),
            f"{row['top5']:.2f}",
            f"{row['nll']:.3f}",
            f"{row['ece']:.2f}",
            f"{row['seconds']:.0f}",
            f"{row['img_per_s']:.0f}",
        ])  # fmt: skip
    evaluated = " / ".join(dict.fromkeys(f"{row['count']:,} images of `{row['split']}`" for row in rows))
    note = f"Evaluated on {evaluated}. Top-1, top-5 and ECE in percent, NLL in nats, seconds of wall time."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def last_sheet(run: Path) -> Path | None:
    """The newest sample sheet of a run, by the numbers in its name: file times don't survive a copy."""

    def order(path: Path) -> tuple[list[int], str]:
        return [int(number) for number in re.findall(r"\d+", path.stem)], path.name

    return max((run / "samples").glob("*.png"), key=order, default=None)


def stack_sheets(sheets: list[tuple[str, Path]], out: Path) -> None:
    """Stack pictures into the PNG ``out``, each below its title, at the width of the widest."""
    pictures = []
    for _, path in sheets:
        try:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        except OSError as e:
            raise UserError(f"cannot read the sample sheet {path}: {' '.join(str(e).split())}") from None
    width = max(picture.width for picture in pictures)
    font_size = max(14, min(28, width // 24))
    pad, font = font_size // 2, ImageFont.load_default(font_size)
    height = pad + sum(picture.height + font_size + 3 * pad for picture in pictures)
    page = Image.new("RGB", (width + 2 * pad, height), "white")
    draw, top = ImageDraw.Draw(page), pad
    for (title, _), picture in zip(sheets, pictures, strict=True):
        draw.text((pad, top), title, fill="#222222", font=font)
        top += font_size + pad
        page.paste(picture, (pad, top))
        top += picture.height + 2 * pad
    page.save(out)


def report(runs: list[Path], out: Path) -> str:
    """Write ``table.md``, ``curves.png`` and, if runs have sample sheets, ``samples.png`` into the folder ``out``.

    Returns the table. Raises ``UserError`` for what cannot be read or drawn, before anything is written.
    """
    from . import plots  # it reads runs through this module

    text = table(runs)
    rows = [summarise(run) for run in runs]
    mixers = [row["mixer"] for row in rows]
    titles = [m if mixers.count(m) == 1 else f"{m} ({n})" for m, n in zip(mixers, labels(runs), strict=True)]
    sheets = [(title, sheet) for title, run in zip(titles, runs, strict=True) if (sheet := last_sheet(run))]
    with tempfile.TemporaryDirectory() as folder:  # all is made before any of it is written
        aside = Path(folder)
        plots.curves(runs, aside / "curves.png")
        if sheets:
            stack_sheets(sheets, aside / "samples.png")
        made = {path.name: path.read_bytes() for path in sorted(aside.iterdir())}
    for name, content in (made | {"table.md": text.encode()}).items():
        plots.write(out / name, content)
    return text
