"""Runs grouped by what they repeat: seeds of one recipe, recipes of one setting. Only like is compared with like."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import recipes
from recipes.typed import UserError

from .report import labels, load_data, load_run, markdown, summarise

COMPARED = ("name", "mixer", "mixer_args", "seed")
"""Recipe fields in which runs may differ and still be compared: one table, one panel."""


class Group(NamedTuple):
    """Runs that differ in the seed only."""

    setting: str
    """What the compared runs have in common: the setting's name, and fields that tell it from others of that name."""
    name: str
    """The mixer, and what tells it from others of the setting where that isn't enough."""
    recipe: recipes.Recipe
    """Of the first run."""
    runs: list[Path]
    """Run folders, one per seed."""
    rows: list[dict[str, Any]]
    """What ``report.summarise`` says about each run."""
    data: dict[str, Any] | None
    """What ``data.json`` says of the images, the same for all; None for runs that do not have it."""

    @property
    def top1(self) -> list[float]:
        """Reported top-1 of each run in percent."""
        return [row["top1"] for row in self.rows]

    @property
    def mean(self) -> float:
        """Mean of ``top1``."""
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of ``top1`` (n - 1); None for a single seed."""
        return statistics.stdev(self.top1) if len(self.rows) > 1 else None

    @property
    def number(self) -> str:
        """Mean and standard deviation as text: ``59.61 ± 0.42``."""
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


def grouped(runs: list[Path]) -> list[Group]:
    """Group run folders by recipe, seeds aside, in order of appearance.

    Runs on the same images that got equally far make a group, each seed once: what repeats recipe and seed stands
    alone, and so does a run that is unfinished. Raises ``UserError``: see ``report.load_run``.
    """
    if not runs:
        raise UserError("no run folders given")
    groups: list[Group] = []
    for run in runs:
        recipe, row = load_run(run)[0], summarise(run)
        data = load_data(run, recipe) if (run / "data.json").exists() else None
        for group in groups:
            same = data == group.data and not recipes.differences(group.recipe, recipe, ignore=("name", "seed"))
            far = row["epochs"] == group.rows[0]["epochs"]
            if same and far and row["seed"] not in [r["seed"] for r in group.rows]:
                group.runs.append(run)
                group.rows.append(row)
                break
        else:
            groups.append(Group("", "", recipe, [run], [row], data))
    return named(groups)


def settings(groups: list[Group]) -> dict[str, list[Group]]:
    """Groups by their setting."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.setting, []).append(group)
    return found


def text(values: dict[str, Any]) -> str:
    """``lr 0.1, epochs 20``."""
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def images(data: dict[str, Any] | None) -> str:
    """``train 675 images (labels 1f3a5b7c), test 661 images (labels 9d8e7f60)``, or unknown images."""
    splits = data["splits"] if data else {}
    found = [f"{name} {s['images']} images (labels {s['labels_sha256'][:8]})" for name, s in splits.items()]
    return ", ".join(found) or "unknown images"


def named(groups: list[Group]) -> list[Group]:
    """The groups with ``setting`` and ``name`` filled in; no two have both the same."""
    clusters: list[list[int]] = []  # groups of one setting each
    for i, group in enumerate(groups):
        for cluster in clusters:
            first = groups[cluster[0]]
            if first.data == group.data and not recipes.differences(first.recipe, group.recipe, ignore=COMPARED):
                cluster.append(i)
                break
        else:
            clusters.append([i])
    firsts = [groups[cluster[0]].recipe for cluster in clusters]
    data = [images(groups[cluster[0]].data) for cluster in clusters]
    bases = [recipe.name.removesuffix(f"_{recipe.mixer}") for recipe in firsts]
    found = dict(enumerate(groups))
    for cluster, base, first, own in zip(clusters, bases, firsts, data, strict=True):
        alike = [other for other, b in zip(firsts, bases, strict=True) if b == base]
        different = {k for other in alike for k in recipes.differences(first, other, ignore=COMPARED)}
        values = {k: getattr(first, k) for k in recipes.schema(recipes.Recipe) if k in different}
        same = {d for d, b in zip(data, bases, strict=True) if b == base} == {own}
        setting = ", ".join(filter(None, (base, text(values), "" if same else own)))
        for i, name in zip(cluster, names([groups[i] for i in cluster]), strict=True):
            found[i] = groups[i]._replace(setting=setting, name=name)
    return [found[i] for i in range(len(groups))]


def names(groups: list[Group]) -> list[str]:
    """A name for each group of one setting: mixer, arguments that differ, epochs if unfinished, folder if need be."""
    found = []
    for group in groups:
        mixer, row = group.recipe.mixer, group.rows[0]
        rows = [g.recipe.mixer_args.get(mixer, {}) for g in groups if g.recipe.mixer == mixer]
        own = group.recipe.mixer_args.get(mixer, {})
        name = f"{mixer} {text({k: v for k, v in own.items() if any(r.get(k) != v for r in rows)})}".strip()
        done, planned = row["epochs"], row["epochs_planned"]
        found.append(name if done == planned else f"{name} ({done} of {planned} epochs)")
    folders = labels([group.runs[0] for group in groups])
    return [name if found.count(name) == 1 else f"{name} ({f})" for name, f in zip(found, folders, strict=True)]


def summary(runs: list[Path]) -> str:
    """Mean and spread over seeds as Markdown, one table per setting, the best mixer first.

    Top-1 in percent, the standard deviation is that of a sample (n - 1). Raises ``UserError``: see ``grouped``.
    """
    tables = []
    for setting, groups in settings(grouped(runs)).items():
        protocol = groups[0].rows[0]["protocol"]  # a recipe decides it, so that all groups share it
        lines = [f"| {markdown(setting)} | top-1 ({protocol}) | std | seeds | lowest | highest |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for group in sorted(groups, key=lambda g: -g.mean):
            std = "" if group.std is None else f"{group.std:.2f}"
            used, wanted = group.rows[0]["epochs_used"], group.rows[0]["epochs_wanted"]
            mean = f"{group.mean:.2f}" + (f" ({used} of {wanted} epochs)" if used < wanted else "")
            numbers = f"{mean} | {std} | {len(group.runs)} | {min(group.top1):.2f} | {max(group.top1):.2f}"
            lines.append(f"| {markdown(group.name)} | {numbers} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n\nMean, standard deviation (n - 1) and range over seeds, top-1 in percent.\n"
