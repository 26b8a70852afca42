"""Plots over run folders, as PNG or SVG by the name of the file: the same runs give the same bytes every time.

Runs that differ in the seed only share a colour. Accuracies are the reported top-1 or mAP in percent; what is drawn of
several seeds is their mean and sample standard deviation (n - 1).
"""

import io
import itertools
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as LinePath
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from mixup_recipes import files
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.seeds import Group, by_setting, grouped
from mixup_recipes.training.protocols import headline
from mixup_recipes.typed import UserError

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 12,
    "text.parse_math": False,  # a $ in a name is a $
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
    "svg.fonttype": "path",
    "svg.hashsalt": "mixup-recipes",  # else ids are random
}
# Okabe and Ito's palette, distinct for colour-blind readers too; the yellow is too pale for a line
COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")


# --------------------------------------------------------------------------------------------- shared


def picture_format(out: Path) -> str:
    """``png`` or ``svg``. Raises ``UserError`` for another suffix."""
    if out.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"{out}: expected a file name that ends in .png or .svg")
    return out.suffix.lower()[1:]


def save(figure: Figure, out: Path) -> None:
    """Write the picture without date and version of matplotlib, which would change the bytes."""
    kind, buffer = picture_format(out), io.BytesIO()
    figure.savefig(
        buffer, format=kind, metadata={"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    )
    files.write_into(out, buffer.getvalue())


def style(i: int) -> dict[str, str]:
    """Colour, dashes and marker of group number ``i``: no two of 28 are the same."""
    turn = i // len(COLOURS)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[turn % len(DASHES)],
        "marker": MARKERS[turn % len(MARKERS)],
    }


def styles(groups: list[Group]) -> dict[str, dict[str, str]]:
    """A style per name of a group, the same in all settings and in any order of the runs; vanilla has the first."""
    names = sorted({group.name for group in groups}, key=lambda name: (name != "vanilla", name))
    return {name: style(i) for i, name in enumerate(names)}


def accuracy(groups: list[Group]) -> str:
    """What an axis of reported numbers shows; the groups are of one setting."""
    summary = groups[0].summary
    return f"{groups[0].metric} on {summary.split} (%), {summary.protocol}"


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` axes, three in a row; the size of one in inches."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for used in axes[:count]:
        used.tick_params(length=0)
    return figure, axes[:count]


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


def within(heights: list[float], gap: float, low: float, high: float) -> list[float]:
    """Push label positions down below ``high``, then up above ``low``, keeping the gap."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed, limit = list(heights), high
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    limit = low
    for i in order:
        placed[i] = max(placed[i], limit)
        limit = placed[i] + gap
    return placed


# --------------------------------------------------------------------------------------------- learning curves


def curves(runs: list[Run], out: Path) -> None:
    """Draw training loss and top-1 over epochs: one colour per recipe, bold, and below it a thin line per seed.

    Raises ``UserError`` for a run that cannot be read and for a file that is neither .png nor .svg.
    """
    picture_format(out)
    groups = grouped(runs)
    with matplotlib.rc_context(STYLE):
        save(curves_figure(groups), out)


def curves_figure(groups: list[Group]) -> Figure:
    """The figure of ``curves``."""
    figure, (left, right) = panels(2, 6, 4.8)
    ends = []
    for i, group in enumerate(groups):
        losses, scores = [], []
        for run in group.runs:
            by_epoch: dict[int, list[float]] = {}
            for logged in run.log.train:
                by_epoch.setdefault(logged.epoch, []).append(logged.loss)
            losses.append({epoch: statistics.fmean(loss) for epoch, loss in by_epoch.items()})
            scores.append({logged.epoch: logged.metric(run.prefix + headline(run.recipe)) for logged in run.log.val})
        for axes, seeds in ((left, losses), (right, scores)):
            draw_seeds(axes, seeds, style(i))
        last = max(scores[0])
        ends.append((last, statistics.fmean(seed[last] for seed in scores)))
    several = any(len(group.runs) > 1 for group in groups)
    summaries = [run.summary for group in groups for run in group.runs]
    splits = " / ".join(dict.fromkeys(summary.split for summary in summaries))
    protocols = {summary.protocol for summary in summaries}
    labelled = f"labels: {protocols.pop() if len(protocols) == 1 else 'as reported'}"
    labelled += ", mean ± standard deviation" * several
    below = "epoch" + "\nthin lines: seeds, bold: their mean" * several
    left.set(title="Training loss, on mixed targets", xlabel=below)
    metrics = " or ".join(dict.fromkeys(group.metric for group in groups))
    right.set(
        title=f"{metrics[0].upper() if metrics == 'top-1' else metrics[0]}{metrics[1:]} on {splits} (%)",
        xlabel=f"epoch\n{labelled}",
    )
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
        axes.margins(x=0.02)
    bases = {group.setting.split(", ")[0] for group in groups}
    several_settings = len(by_setting(groups)) > 1
    texts = []
    for group in groups:
        # what all share says nothing
        setting = group.setting.split(", ")[len(bases) == 1 :] if several_settings else []
        texts.append(f"{textwrap.shorten(', '.join((group.name, *setting)), 60, placeholder=' …')}  {group.number}")
    label_ends(right, texts, ends)
    return figure


def draw_seeds(axes: Any, seeds: list[dict[int, float]], look: dict[str, str]) -> None:
    """One bold line over epochs, the mean of the seeds; each of several seeds as a thin one below it."""
    epochs = sorted(set.intersection(*(set(seed) for seed in seeds)))
    look = look | {"marker": look["marker"] if len(epochs) == 1 else ""}  # a line needs two epochs
    if len(seeds) > 1:
        for seed in seeds:
            axes.plot(list(seed), list(seed.values()), **look, linewidth=0.8, alpha=0.45)
    axes.plot(epochs, [statistics.fmean(seed[e] for seed in seeds) for e in epochs], **look, gid="mean", zorder=3)


def label_ends(axes: Any, texts: list[str], ends: Sequence[tuple[float, float]]) -> None:
    """Write a text to the right of the end of each bold line, in its colour."""
    low, high = axes.get_ylim()
    size = 12 if len(texts) <= 12 else 9
    gap = (high - low) * size / 200  # a line of text, on axes of about 4 inches
    left, right = axes.get_xlim()
    lines = [line for line in axes.lines if line.get_gid() == "mean"]
    heights = within(spread([height for _, height in ends], gap), gap, low, high)
    for line, text, end, height in zip(lines, texts, ends, heights, strict=True):
        colour = line.get_color()
        axes.annotate(
            text,
            xy=end,
            xytext=(right + (right - left) * 0.04, height),
            color=colour,
            fontsize=size,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 2, "relpos": (0, 0.5)},
        )
    axes.set_ylim(low, high)


# --------------------------------------------------------------------------------------------- accuracy and cost


def cost(runs: list[Run], out: Path) -> None:
    """Draw reported top-1 against measured cost, one panel per setting, one point per seed, labelled by mixer.

    Cost is the time per training image relative to vanilla, from the logged images/s, where each run has a vanilla
    run of the same setting, machine and versions beside it; else the seconds of wall time of the run.
    Raises ``UserError``: see ``curves``.
    """
    picture_format(out)
    groups = grouped(runs)
    with matplotlib.rc_context(STYLE):
        save(cost_figure(groups), out)


def cost_figure(groups: list[Group]) -> Figure:
    """The figure of ``cost``."""
    panes, looks = by_setting(groups), styles(groups)
    figure, axes = panels(len(panes), 7.5 if len(panes) == 1 else 6.5, 5.2)
    for panel, (setting, members) in zip(axes, panes.items(), strict=True):
        costs, unit = measured_costs(members)
        for group, x in zip(members, costs, strict=True):
            look = looks[group.name] | {"linestyle": "", "markeredgecolor": "white", "markeredgewidth": 0.8}
            centre = statistics.fmean(x), group.mean
            for seed in zip(x, group.values, strict=True):  # a star: what belongs together
                panel.plot(*zip(centre, seed, strict=True), color=look["color"], linewidth=1, alpha=0.4)
            panel.plot(x, group.values, **look, markersize=9, gid=group.name, zorder=3)
        panel.set(title=setting, xlabel=unit, ylabel=accuracy(members))
        panel.margins(0.12)
    FigureCanvasAgg(figure).draw()  # from here on the axes stay where they are: labels are inside of them
    for panel in axes:
        label_points(panel)
    return figure


def measured_costs(groups: list[Group]) -> tuple[list[list[float]], str]:
    """The cost of each run of each group, and what it is in words. The groups are of one setting."""
    speeds: dict[Any, list[float]] = {}  # of vanilla, by where it ran
    for group in groups:
        if group.recipe.mixer == "vanilla":
            for run in group.runs:
                speeds.setdefault(machine(run), []).append(run.summary.img_per_s)
    speeds.pop(None, None)
    if all(machine(run) in speeds for group in groups for run in group.runs):
        relative = [
            [statistics.fmean(speeds[machine(run)]) / run.summary.img_per_s for run in group.runs] for group in groups
        ]
        return relative, "training time per image, relative to vanilla"
    return [[run.summary.seconds for run in group.runs] for group in groups], "wall time of the run (s)"


def machine(run: Run) -> tuple[Any, ...] | None:
    """What the speed of a run depends on beside its recipe; None if it is not known."""
    try:
        env = run.environment
        return *(env[k] for k in ("device", "platform", "processes", "threads")), env["packages"]["torch"]
    except (UserError, KeyError, TypeError):
        return None


def label_points(axes: Any) -> None:
    """Write its name beside each group of points: where it covers no point and no other name, and no line crosses it.

    It takes the first place on ever wider rings around the points; a line leads there if it is far.
    """
    frame, renderer, point = axes.get_window_extent(), axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    groups = [line for line in axes.lines if line.get_gid()]
    pixels = [axes.transData.transform(line.get_xydata()) for line in groups]
    taken = [box_around(xy, 12 * point, 12 * point) for points in pixels for xy in points]
    leaders: list[LinePath] = []
    ways = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)])
    for line, points in zip(groups, pixels, strict=True):
        font: dict[str, Any] = {
            "color": line.get_color(),
            "fontsize": 11,
            "fontweight": "bold",
            "ha": "center",
            "va": "center",
        }
        font["path_effects"] = [withStroke(linewidth=3, foreground="white")]
        probe = axes.annotate(line.get_gid(), (0.5, 0.5), xycoords="axes fraction", **font)
        size = np.array(probe.get_window_extent(renderer).size)
        probe.remove()
        for ring, i, way in itertools.product(range(8, 160, 3), range(len(points)), ways):  # rings in points
            shift = way * (size / 2 + ring * point)
            near = points[i] + shift * 8 * point / np.hypot(*shift)  # the line ends beside the marker
            box, leader = box_around(points[i] + shift, *size), LinePath([near, points[i] + shift])
            inside = all(frame.contains(*corner) for corner in box.corners())
            covers = box.count_overlaps(taken) or any(path.intersects_bbox(box, filled=False) for path in leaders)
            crosses = ring > 10 and any(leader.intersects_bbox(other, filled=False) for other in taken)
            if inside and not covers and not crosses:
                break
        arrow = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.8, "shrinkA": 0, "shrinkB": 6}
        axes.annotate(
            line.get_gid(), line.get_xydata()[i], shift / point, textcoords="offset points",
            arrowprops=arrow if ring > 10 else None, **font,
        )  # fmt: skip
        taken.append(box)
        leaders += [leader] if ring > 10 else []


def box_around(centre: Any, width: float, height: float) -> Bbox:
    """A box by its centre."""
    return Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)


# --------------------------------------------------------------------------------------------- dots


def dots(runs: list[Run], out: Path, published: dict[str, float] | None = None) -> None:
    """Draw a row per mixer, the best on top: a dot per seed, and mean and standard deviation as a bar.

    One panel per setting. ``published``: mixer -> top-1 in percent, drawn as a hollow marker.
    Raises ``UserError``: see ``curves``; also for published numbers with runs of several settings.
    """
    picture_format(out)
    groups = grouped(runs)
    if published and len(by_setting(groups)) > 1:
        raise UserError(f"published numbers belong to one setting, got runs of {len(by_setting(groups))}")
    with matplotlib.rc_context(STYLE):
        save(dots_figure(groups, published or {}), out)


def dots_figure(groups: list[Group], published: dict[str, float]) -> Figure:
    """The figure of ``dots``."""
    panes, looks = by_setting(groups), styles(groups)
    tallest = max(len(members) for members in panes.values())
    figure, axes = panels(len(panes), 8 if len(panes) == 1 else 6.5, 1.6 + 0.42 * tallest)
    legend = "dots: seeds, bar: mean ± standard deviation" + ", hollow: published" * bool(published)
    for panel, (setting, members) in zip(axes, panes.items(), strict=True):
        members = sorted(members, key=lambda g: g.mean)
        for y, group in enumerate(members):
            bar = {"fmt": "|", "color": "#222222", "markersize": 15, "elinewidth": 1.2, "capsize": 4}
            panel.errorbar(group.mean, y, xerr=group.std, **bar)
            seeds = {"color": looks[group.name]["color"], "markeredgecolor": "white", "markersize": 9, "zorder": 3}
            panel.plot(group.values, [y] * len(group.values), "o", gid=group.name, alpha=0.8, **seeds)
            if group.recipe.mixer in published:
                hollow = {"markerfacecolor": "none", "markeredgecolor": "#222222", "markersize": 8, "zorder": 4}
                panel.plot(published[group.recipe.mixer], y, "D", gid="published", **hollow)
            beside = {"xycoords": panel.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
            panel.annotate(group.number, (1, y), (8, 0), **beside)
        panel.set_yticks(range(len(members)), [group.name for group in members])
        top = len(members) - 0.4
        panel.set(title=setting, xlabel=f"{accuracy(members)}\n{legend}", ylim=(top - tallest - 0.2, top))
        panel.grid(False, axis="y")
        panel.margins(x=0.06)
    return figure
