"""What a run's predictions look like: which classes are taken for which, and how right the model is when it is sure."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from mixup_recipes.metrics.calibration.formula import BINS, bin_of
from mixup_recipes.pages.fonts import drawable, fitting, shortened
from mixup_recipes.pages.plots import COLOURS, STYLE, save

LARGEST = 200  # classes of a picture
NUMBERED = 20  # classes up to which its cells have numbers


class Sure(NamedTuple):
    """How sure a model was of each image, (N,), and whether it was right."""

    title: str
    confidence: NDArray[np.floating]
    right: NDArray[np.bool_]
    ece: float
    """Percent."""


# --------------------------------------------------------------------------------------------- confusion


def confusion(counts: NDArray[np.int64], classes: list[str], title: str, out: Path) -> None:
    """Draw images by their class, a row each, and the class that they were taken for; counts (K, K).

    The colour is the share of a row, on the scale of its root, so that a few images can be seen.
    """
    with matplotlib.rc_context(STYLE | {"savefig.bbox": "tight"}):  # the picture grows with the names
        names = [shortened(drawable(name), 28) for name in classes]
        save(confusion_figure(counts, names, shortened(drawable(title), 80)), out)


def confusion_figure(counts: NDArray[np.int64], names: list[str], title: str) -> Figure:
    """The figure of ``confusion``: the matrix fills it, all else is beside it."""
    size = len(names)
    cell, font = (0.5, 10) if size <= NUMBERED else (0.28, 9) if size <= 40 else (0.13, 6.5)  # inches, points
    side = max(2.5, cell * size)
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colours = ScalarMappable(PowerNorm(0.5, 0, 1), "Blues")
    axes.imshow(colours.to_rgba(share, bytes=True), interpolation="nearest", aspect="auto")
    axes.set_xticks(range(size), names, rotation=90)
    axes.set_yticks(range(size), names)
    every = 1 if size <= 40 else 10  # lines between the cells
    for ticks in (axes.set_xticks, axes.set_yticks):
        ticks(np.arange(every, size, every) - 0.5, minor=True)
    axes.grid(False)
    axes.grid(which="minor", color="white" if every == 1 else "#cccccc", linewidth=0.8)
    axes.set_axisbelow(False)
    axes.tick_params(which="both", length=0, labelsize=font)
    if size <= NUMBERED:
        for row, column in np.argwhere(counts):
            ink = "white" if share[row, column] > 0.25 else "#222222"
            text = f"{counts[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", fontsize=10 - max(0, len(text) - 4), color=ink)
    axes.set(title=title, ylabel="class", xlabel="taken for" + "; the numbers are images" * (size <= NUMBERED))
    high = min(side, 4)
    beside = figure.add_axes((1 + 0.2 / side, 1 - high / side, 0.18 / side, high / side))
    bar = figure.colorbar(colours, cax=beside, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.ax.tick_params(length=0)
    bar.set_label("of the images of the class")
    return figure


# --------------------------------------------------------------------------------------------- reliability


def reliability(models: list[Sure], out: Path) -> None:
    """Draw accuracy by confidence, a panel for each model: the bins are those of the calibration error."""
    with matplotlib.rc_context(STYLE):
        save(reliability_figure(models), out)


def reliability_figure(models: list[Sure]) -> Figure:
    """The figure of ``reliability``: above accuracy and confidence in each bin, below the images of it."""
    columns = min(len(models), 3)
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(4.6 * columns, 5.4 * rows + 0.6), layout="constrained")
    panes = figure.subfigures(rows, columns, squeeze=False)
    for pane, model in zip(panes.flat, models, strict=False):
        above, below = pane.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        draw_reliability(above, below, model)
    look = {"ncols": 3 if columns > 1 else 1, "frameon": False, "fontsize": 10}
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", **look)
    return figure


def draw_reliability(above: Any, below: Any, model: Sure) -> None:
    """The two axes of a panel, in percent."""
    bins = bin_of(model.confidence.astype(np.float64))
    counts = np.bincount(bins, minlength=BINS)
    filled = counts > 0
    accuracy, confidence = (
        100 * np.bincount(bins, weights=of, minlength=BINS)[filled] / counts[filled]
        for of in (model.right, model.confidence)
    )
    centres = (np.arange(BINS) + 0.5) * 100 / BINS
    both, wide = np.minimum(accuracy, confidence), 92 / BINS
    above.bar(centres[filled], both, wide, color=COLOURS[1], label="accuracy")
    for more, colour, label in (
        (accuracy - both, COLOURS[6], "accuracy above the mean confidence"),
        (confidence - both, COLOURS[2], "mean confidence above the accuracy"),
    ):
        above.bar(centres[filled], more, wide, bottom=both, color=colour, label=label)
    above.plot([0, 100], [0, 100], linestyle="--", linewidth=1, color="#888888")
    name = fitting(model.title, 3.7 * 72, STYLE["axes.titlesize"])  # inches of the axes, in points
    above.set(title=f"{name}\nECE {model.ece:.2f} %", xlim=(0, 100), ylim=(0, 100), ylabel="accuracy (%)")
    below.bar(centres, counts, wide, color=COLOURS[0])
    below.set(xlabel="confidence (%)", ylabel="images")
    below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    for axes in (above, below):
        axes.tick_params(length=0)
