"""The number of a run, in two readings: as the published text states it, and as OpenMixup's summary tools compute it.

The text says "median of the last 5 (10) epochs", "best", or "best of the last 10 epochs"; the tools (tools/summary of
Westlake-AI/openmixup) take one epoch more, or the mean of maximum and 99th percentile, and for AutoMix and SAMix the
best of several windows and heads.
The text's reading is the one compared with a table; the tool's stands beside it. Everywhere: top-1 in percent, or mAP
where an image may have several labels (``headline``), ``{epoch: top-1}`` with epochs from 1 and each epoch once (the
tools count an epoch twice that a resumed run repeats), ``protocol`` that of ``Recipe``, ``last`` the epochs that are
the last ones, ``epochs`` the planned ones. The median's window ends at the newest epoch; the best of the last epochs is
one of those that are planned as the last, and before they have begun the newest epoch, so that the best does not leave
its window again. Where a run has fewer epochs than asked for, ``Reading.missing`` says so.
"""

import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


class Reading(NamedTuple):
    """A number and the rule it comes from."""

    name: str
    """The rule in words."""
    value: float
    """Top-1 in percent."""
    used: int
    """Evaluated epochs in the window."""
    wanted: int
    """Epochs that the window should have."""
    epoch: int
    """The best epoch, or the last one that the median takes."""
    missing: str = ""
    """What the rule asks for and the run does not have, in words; empty for a finished run."""

    @property
    def label(self) -> str:
        """The rule, and what is missing."""
        return f"{self.name} ({self.missing})" if self.missing else self.name


NAMES = {"top1": "top-1", "map": "mAP"}
"""What a headline is called."""


def headline(recipe: Recipe) -> str:
    """The metric that runs of a recipe report: ``top1``, or ``map`` where an image may have several labels."""
    return "map" if recipe.multi_label else "top1"


def strict(values: dict[int, float], protocol: str, last: int, epochs: int) -> Reading:
    """The reading of the published text: median of the last ``last`` epochs, or the best (the first of equals).

    Raises ``UserError`` without an evaluated epoch and for an epoch beyond the planned ones.
    """
    chosen = window(values, protocol, last, epochs)
    value = statistics.median(values[e] for e in chosen)
    if protocol == "best":
        return reading("best epoch", value, len(values), epochs, chosen[0], values, epochs)
    if protocol == "best_of_last":
        inside = [e for e in values if e > epochs - last]
        return reading(f"best of the last {last} epochs", value, len(inside), last, chosen[0], values, epochs)
    return reading(f"median of the last {last} epochs", value, len(chosen), last, chosen[-1], values, epochs)


def window(values: dict[int, float], protocol: str, last: int, epochs: int) -> list[int]:
    """The epochs whose medians ``strict`` reports, ascending: the last ones, or the best one alone."""
    end = newest(values, epochs)
    if protocol != "median":
        begin = min(end, epochs - last + 1) if protocol == "best_of_last" else 0
        return [max((e for e in values if e >= begin), key=lambda e: (values[e], -e))]
    return sorted(e for e in values if e > end - last)


def tool(heads: dict[str, dict[int, float]], protocol: str, last: int, epochs: int) -> Reading:
    """The reading of OpenMixup's tools. ``heads``: the classifiers of one run by name; a plain model has one.

    - median, one head: ``last`` + 1 epochs.
    - median, several heads (AutoMix, SAMix): ``last`` + 1 epochs, or ``last`` + 2 from ``last`` = 10 on; with and
      without the newest of them; the best median over both windows and all heads.
    - best, of all or of the last epochs: (maximum + 99th percentile) / 2 over all epochs; of several heads the best.

    Raises ``UserError`` as ``strict`` does, and for heads evaluated at different epochs.
    """
    first = next(iter(heads.values()), {})
    end = newest(first, epochs)
    if any(values.keys() != first.keys() for values in heads.values()):
        raise UserError(f"the classifiers {', '.join(heads)} were not evaluated at the same epochs")
    several = len(heads) > 1
    of_heads = f"best of {len(heads)} heads"
    if protocol != "median":
        scores = {head: (max(v.values()) + percentile(list(v.values()), 99)) / 2 for head, v in heads.items()}
        head = max(scores, key=scores.__getitem__)
        name = "OpenMixup's tool: (maximum + 99th percentile) / 2 over all epochs"
        name += f", {of_heads} ({head or 'model'})" if several else ""
        epoch = window(heads[head], "best", last, epochs)[0]
        return reading(name, scores[head], len(first), epochs, epoch, first, epochs)
    wanted = last + 1 + (several and last >= 10)
    inside = sorted(e for e in first if e > end - wanted)
    if not several:
        value = statistics.median(first[e] for e in inside)
        name = f"OpenMixup's tool: median of the last {wanted} epochs"
        return reading(name, value, len(inside), wanted, end, first, epochs)
    candidates = [
        (statistics.median(values[e] for e in kept), head, kept)
        for kept in (inside[:-1], inside)
        for head, values in heads.items()
        if kept
    ]
    value, head, kept = max(candidates, key=lambda c: c[0])  # the first of equals, as in the tool
    name = f"OpenMixup's AutoMix tool: {of_heads} ({head or 'model'}), median of the last {wanted} epochs"
    name += "" if kept == inside else " without the newest"
    return reading(name, value, len(inside), wanted, kept[-1], first, epochs)


def plainly(rule: str) -> str:
    """The words of a rule for people: files and records say "median of the last 1 epochs"."""
    return rule.replace("median of the last 1 epochs", "last epoch")


def rule_in_words(recipe: Recipe) -> str:
    """How the reported number of a recipe is taken."""
    last = f"of the last {recipe.protocol_epochs} epochs"
    text = {"median": f"median {last}", "best": "best epoch", "best_of_last": f"best {last}"}[recipe.protocol]
    text += f", mean of {recipe.trials} trials" if recipe.trials > 1 else ""
    return text + (", averaged weights (EMA)" if recipe.report_ema else "")


def of_run(lines: Iterable[dict[str, Any]], recipe: Recipe) -> tuple[Reading, Reading]:
    """Both readings of a run from its validation lines: of the model or, where the recipe says so, of its average."""
    metric = headline(recipe)
    heads = reported_heads(by_head(lines, metric), recipe.report_ema)
    own, rule = "ema" if recipe.report_ema else "", (recipe.protocol, recipe.protocol_epochs, recipe.epochs)
    if own not in heads:
        raise UserError(f"no validation line has {'ema_' if own else ''}{metric}")
    return strict(heads[own], *rule), tool(heads, *rule)


def by_head(lines: Iterable[dict[str, Any]], metric: str = "top1") -> dict[str, dict[int, float]]:
    """Top-1 by classifier and epoch: the keys ``top1`` (""), ``ema_top1`` ("ema"), ``mix_k_top1`` ("mix_k"), ...

    ``metric``: another headline, see ``headline``. Of an epoch that comes twice, the later line counts. Raises
    ``UserError`` for what is no number.
    """
    heads: dict[str, dict[int, float]] = {}
    for line in lines:
        for key, value in line.items():
            if head_of(key, metric) is not None:
                if not isinstance(value, int | float) or not math.isfinite(value):
                    raise UserError(f"validation of epoch {line['epoch']}: expected a number as {key}, not {value!r}")
                heads.setdefault(head_of(key, metric) or "", {})[line["epoch"]] = value
    return heads


def head_of(key: str, metric: str) -> str | None:
    """The classifier whose ``metric`` a key of the log is; None for a key of another metric."""
    return key.removesuffix(metric).removesuffix("_") if key == metric or key.endswith(f"_{metric}") else None


def reported_heads(heads: dict[str, dict[int, float]], ema: bool) -> dict[str, dict[int, float]]:
    """The classifiers that count: the average of the weights alone, or all but it."""
    return {head: values for head, values in heads.items() if (head == "ema") == ema}


def over_trials(values: list[float], trials: int = 3) -> tuple[float, float]:
    """Mean and standard deviation over the newest ``trials`` runs, oldest first, as OpenMixup's tool prints them.

    The deviation divides by n, not n - 1 (numpy's default): it describes these runs and understates that of the
    method; ``mixup_recipes.runs.noise`` uses n - 1.
    """
    newest_runs = values[-trials:]
    if not newest_runs:
        raise UserError("no finished run to average")
    return statistics.fmean(newest_runs), statistics.pstdev(newest_runs)


def percentile(values: list[float], q: float) -> float:
    """numpy's default percentile: linear between the two nearest of the sorted values. q in 0 ... 100."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def newest(values: dict[int, float], epochs: int) -> int:
    """The newest evaluated epoch, checked against the planned ones."""
    if not values:
        raise UserError("no evaluated epoch yet")
    if max(values) > epochs:
        planned = many(epochs, "epoch is planned", "epochs are planned")
        raise UserError(f"epoch {max(values)} was evaluated, but only {planned}: wrong recipe or epochs?")
    return max(values)


def reading(
    name: str, value: float, used: int, wanted: int, epoch: int, values: dict[int, float], epochs: int
) -> Reading:
    """A ``Reading`` that says what is missing."""
    parts = [f"{used} of {wanted} epochs"] if used < wanted else []
    if max(values) < epochs and wanted != epochs:
        parts.append(f"at epoch {max(values)} of {epochs}")
    return Reading(name, value, used, wanted, epoch, ", ".join(parts))
