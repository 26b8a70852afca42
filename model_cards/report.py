"""A report over run folders: one table, the curves, and the mixed batches, all generated from what the runs logged.

Top-1, top-5 and ECE are percentages, NLL is in nats, times are wall seconds. The reported numbers follow the
setting's protocol (``training.protocols``): each metric's median over the last epochs, or all metrics of the epoch
with the highest top-1.
"""

import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

import recipes
from recipes.typed import UserError
from training import protocols

from .logs import read_log

METRICS = ("top1", "top5", "nll", "ece")

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
}
# Okabe and Ito's palette, distinct for colour-blind readers too; the yellow is too pale for a line
COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":", "-.")


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


def value(run: Path, line: dict[str, Any], *keys: str) -> float:
    """A number of a log line; ``keys`` lead to it. Raises ``UserError`` if it isn't there."""
    found: Any = line
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, int | float):
        raise UserError(f"{run}: log.jsonl, {line['mode']} line of epoch {line['epoch']}: {'.'.join(keys)} is missing")
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
            name,
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


def spread(heights: list[float], gap: float) -> list[float]:
    """Move label positions apart to at least ``gap``, each as little as the pile it stands in allows."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    piles: list[tuple[float, list[int]]] = []  # centre and members
    for i in order:
        centre, members = heights[i], [i]
        while piles and centre - (len(members) - 1) / 2 * gap < piles[-1][0] + (len(piles[-1][1]) + 1) / 2 * gap:
            members = piles.pop()[1] + members
            centre = statistics.fmean(heights[m] for m in members)
        piles.append((centre, members))
    placed = dict.fromkeys(order, 0.0)
    for centre, members in piles:
        for place, i in enumerate(members):
            placed[i] = centre + (place - (len(members) - 1) / 2) * gap
    return [placed[i] for i in range(len(heights))]


def curves(runs: list[Path], out: Path) -> None:
    """Draw training loss and top-1 over epochs into the PNG ``out``: one colour per run, the same bytes every time."""
    if not runs:
        raise UserError("no run folders given")
    rows = [summarise(run) for run in runs]
    mixers = [row["mixer"] for row in rows]
    names = mixers if len(set(mixers)) == len(mixers) else labels(runs)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        ends = []
        for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
            _, train, val = load_run(run)
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
            style["marker"] = "o" if len(val) == 1 else ""  # a line needs two epochs
            losses: dict[int, list[float]] = {}
            for line in train:
                losses.setdefault(line["epoch"], []).append(value(run, line, "loss"))
            left.plot(list(losses), [statistics.fmean(loss) for loss in losses.values()], **style)
            key = "ema_top1" if row["ema"] else "top1"
            right.plot([line["epoch"] for line in val], [value(run, line, key) for line in val], **style)
            ends.append((val[-1]["epoch"], value(run, val[-1], key)))
        splits = " / ".join(dict.fromkeys(row["split"] for row in rows))
        left.set(title="Training loss, on mixed targets", xlabel="epoch")
        protocols = {row["protocol"] for row in rows}
        labelled = protocols.pop() if len(protocols) == 1 else "as reported"
        right.set(title=f"Top-1 on {splits} (%), labelled: {labelled}", xlabel="epoch")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
            axes.tick_params(length=0)
            axes.margins(x=0.02)
        label_ends(right, names, rows, ends)
        # Without matplotlib's version, which would change the bytes; a PNG holds no date
        figure.savefig(out, format="png", metadata={"Software": None})


def label_ends(axes: Any, names: list[str], rows: list[dict[str, Any]], ends: list[tuple[float, float]]) -> None:
    """Write name and reported top-1 of each run to the right of its curve, in its colour."""
    low, high = axes.get_ylim()
    size = 12 if len(rows) <= 12 else 9
    gap = (high - low) * size / 200  # a line of text, on axes of about 4 inches
    right = axes.get_xlim()[1]
    for i, height in enumerate(spread([top1 for _, top1 in ends], gap)):
        line = axes.lines[i]
        axes.annotate(
            f"{names[i]}  {rows[i]['top1']:.1f}",
            xy=ends[i],
            xytext=(right + (right - axes.get_xlim()[0]) * 0.04, height),
            color=line.get_color(),
            fontsize=size,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "linewidth": 0.8,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )
    axes.set_ylim(low, high)


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

    Returns the table. Raises ``UserError`` for an unreadable run folder, before anything is written.
    """
    text = table(runs)
    rows = [summarise(run) for run in runs]
    mixers = [row["mixer"] for row in rows]
    titles = [m if mixers.count(m) == 1 else f"{m} ({n})" for m, n in zip(mixers, labels(runs), strict=True)]
    sheets = [(title, sheet) for title, run in zip(titles, runs, strict=True) if (sheet := last_sheet(run))]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(text, encoding="utf-8")
        curves(runs, out / "curves.png")
        if sheets:
            stack_sheets(sheets, out / "samples.png")
    except OSError as e:
        raise UserError(f"cannot write the report to {out}: {e.strerror or e}") from None
    return text
