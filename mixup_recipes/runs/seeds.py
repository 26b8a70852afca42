"""Runs grouped by what they repeat: seeds of one recipe, recipes of one setting. Only like is compared with like."""

import statistics
from typing import Any, NamedTuple

from mixup_recipes.data.identity import comparable
from mixup_recipes.recipe import Recipe, differences, schema
from mixup_recipes.runs.run import Run, Summary, labels
from mixup_recipes.training.protocols import NAMES
from mixup_recipes.typed import UserError
from mixup_recipes.words import many, with_spread

COMPARED = ("name", "mixer", "mixer_args", "seed")
"""Recipe fields in which runs may differ and still be compared: one table, one panel."""


class Group(NamedTuple):
    """Runs that differ in the seed only."""

    setting: str
    """What the compared runs have in common: the setting's name, and fields that tell it from others of that name."""
    name: str
    """The mixer, and what tells it from others of the setting where that isn't enough."""
    runs: list[Run]
    """One per seed."""

    @property
    def recipe(self) -> Recipe:
        """Of the first run."""
        return self.runs[0].recipe

    @property
    def summary(self) -> Summary:
        """The reported numbers of the first run; what is the same for all seeds can be taken from it."""
        return self.runs[0].summary

    @property
    def values(self) -> list[float]:
        """The reported number of each run in percent: top-1, or mAP where an image may have several labels."""
        return [run.summary.reading.value for run in self.runs]

    @property
    def metric(self) -> str:
        """What ``values`` are called."""
        return NAMES[self.summary.metric]

    @property
    def mean(self) -> float:
        """Mean of ``values``."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of ``values`` (n - 1); None for a single seed."""
        return statistics.stdev(self.values) if len(self.runs) > 1 else None

    @property
    def number(self) -> str:
        """Mean and standard deviation as text: ``59.61 ± 0.42``."""
        return with_spread(self.mean, self.std)


def grouped(runs: list[Run]) -> list[Group]:
    """Group runs by recipe, seeds aside, in order of appearance.

    Runs on the same images that got equally far make a group, each seed once: what repeats recipe and seed stands
    alone, and so does a run that is unfinished. Raises ``UserError``: see ``Run``.
    """
    if not runs:
        raise UserError("no run folders given")
    groups: list[Group] = []
    for run in runs:
        for group in groups:
            far = run.summary.epochs == group.summary.epochs
            new = run.summary.seed not in [other.summary.seed for other in group.runs]
            if far and new and alike(run, group.runs[0], ("name", "seed")):
                group.runs.append(run)
                break
        else:
            groups.append(Group("", "", [run]))
    return named(groups)


def alike(one: Run, other: Run, ignore: tuple[str, ...]) -> bool:
    """Whether two runs saw the same images and are of one recipe but for some fields."""
    first, second = identity(one), identity(other)
    if first and second:
        first, second = comparable(first, second)
    return first == second and not differences(one.recipe, other.recipe, ignore)


def identity(run: Run) -> dict[str, Any] | None:
    """What a run says of its images; None for one that does not have ``data.json``."""
    return run.data.identity if (run.folder / "data.json").exists() else None


def by_setting(groups: list[Group]) -> dict[str, list[Group]]:
    """Groups by their setting."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.setting, []).append(group)
    return found


def values_in_words(values: dict[str, Any]) -> str:
    """``lr 0.1, epochs 20``."""
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def images_in_words(run: Run) -> str:
    """``train 675 images (labels 1f3a5b7c), test 661 images (labels 9d8e7f60)``, or unknown images."""
    splits = (identity(run) or {"splits": {}})["splits"]
    found = [f"{name} {many(s['images'], 'image')} (labels {s['labels_sha256'][:8]})" for name, s in splits.items()]
    return ", ".join(found) or "unknown images"


def named(groups: list[Group]) -> list[Group]:
    """The groups with ``setting`` and ``name`` filled in; no two have both the same."""
    clusters: list[list[int]] = []  # groups of one setting each
    for i, group in enumerate(groups):
        for cluster in clusters:
            if alike(groups[cluster[0]].runs[0], group.runs[0], COMPARED):
                cluster.append(i)
                break
        else:
            clusters.append([i])
    firsts = [groups[cluster[0]].recipe for cluster in clusters]
    data = [images_in_words(groups[cluster[0]].runs[0]) for cluster in clusters]
    bases = [recipe.name.removesuffix(f"_{recipe.mixer}") for recipe in firsts]
    found = dict(enumerate(groups))
    for cluster, base, first, own in zip(clusters, bases, firsts, data, strict=True):
        namesakes = [other for other, b in zip(firsts, bases, strict=True) if b == base]
        different = {k for other in namesakes for k in differences(first, other, ignore=COMPARED)}
        values = {k: getattr(first, k) for k in schema(Recipe) if k in different}
        same = {d for d, b in zip(data, bases, strict=True) if b == base} == {own}
        setting = ", ".join(filter(None, (base, values_in_words(values), "" if same else own)))
        for i, name in zip(cluster, names([groups[i] for i in cluster]), strict=True):
            found[i] = groups[i]._replace(setting=setting, name=name)
    return [found[i] for i in range(len(groups))]


def names(groups: list[Group]) -> list[str]:
    """A name for each group of one setting: mixer, arguments that differ, epochs if unfinished, folder if need be."""
    found = []
    for group in groups:
        mixer = group.recipe.mixer
        rows = [g.recipe.mixer_args.get(mixer, {}) for g in groups if g.recipe.mixer == mixer]
        own = group.recipe.mixer_args.get(mixer, {})
        name = f"{mixer} {values_in_words({k: v for k, v in own.items() if any(r.get(k) != v for r in rows)})}".strip()
        done, planned = group.summary.epochs, group.summary.epochs_planned
        found.append(name if done == planned else f"{name} ({done} of {many(planned, 'epoch')})")
    folders = labels([group.runs[0] for group in groups])
    return [name if found.count(name) == 1 else f"{name} ({f})" for name, f in zip(found, folders, strict=True)]
