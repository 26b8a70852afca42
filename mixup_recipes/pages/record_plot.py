"""Accuracy against cost, from run records: what each mixer of a setting reached, and what its update takes."""

import statistics
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixup_recipes.benchmark.small_runs import Point
from mixup_recipes.pages.plots import COLOURS, STYLE, label_points, panels, picture_format, save

NAMED, DEAR = 5, 1.5
"""So many of the best mixers have a name, and those that take at least this multiple of the time without mixing."""


def cost_of_records(setting: str, points: list[Point], out: Path) -> None:
    """Draw the mean top-1 of each mixer against the time of an update, as PNG or SVG, with the range of its seeds.

    ``points``: see ``small_runs.points``. The best mixers are blue. They have a name, and so have ``vanilla`` and the
    mixers that take much time. The others are grey. Raises ``UserError`` for a file name of another kind.
    """
    picture_format(out)
    with matplotlib.rc_context(STYLE):
        save(figure_of(setting, points), out)


def figure_of(setting: str, points: list[Point]) -> Figure:
    """The figure of ``cost_of_records``."""
    figure, (panel,) = panels(1, 8.0, 5.6)
    best = sorted(points, key=lambda point: -statistics.fmean(point.tops))[:NAMED]
    for point in points:
        named = point in best or point.time >= DEAR or point.mixer == "vanilla"
        colour = COLOURS[1] if point in best else COLOURS[0] if named else "#b5b5b5"
        if len(point.tops) > 1:
            panel.plot([point.time] * 2, [min(point.tops), max(point.tops)], color=colour, linewidth=1, alpha=0.4)
        look = {"color": colour, "marker": "o", "markersize": 7, "markeredgecolor": "white", "linestyle": ""}
        panel.plot(point.time, statistics.fmean(point.tops), **look, gid=point.mixer if named else None, zorder=3)
    panel.set_xscale("log")
    panel.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    panel.minorticks_off()
    panel.set(title=setting, xlabel="time of an update, 1 without mixing", ylabel="top-1 (%), mean and range of seeds")
    panel.margins(0.1)
    FigureCanvasAgg(figure).draw()  # from here on the axes stay where they are: labels are inside of them
    label_points(panel)
    return figure
