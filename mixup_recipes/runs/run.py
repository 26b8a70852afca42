"""A run: its folder opened once. All that describes, compares, draws, publishes or verifies runs takes a ``Run``.

``mixup_recipes/training/format.py`` says what each file holds.
"""

import json
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from mixup_recipes import fetch
from mixup_recipes.data.identity import difference
from mixup_recipes.files import file_hash
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.resolve import resolve
from mixup_recipes.runs import robustness_file
from mixup_recipes.runs.log import Rows, read_rows
from mixup_recipes.runs.shapes import (
    COUNT,
    PERCENT,
    SPLIT,
    TEXT,
    UPDATE,
    check,
    naming,
    object_in,
    read_card,
    read_object,
    read_text,
)
from mixup_recipes.training import checkpoint, protocols
from mixup_recipes.training.format import OF_SEVERAL, PLACE, PREDICTIONS, TRACKERS, check_format
from mixup_recipes.typed import UserError

RECIPE = "recipe.yaml"
FILES = (
    "README.md", RECIPE, "env.json", "data.json", "log.jsonl", "summary.csv", "eval_results.json",
    "predictions.safetensors", robustness_file.NAME,
)  # fmt: skip
"""What a repository of the Hub is asked for beside ``config.json`` and ``model.safetensors``."""
METRICS = {
    "top1": {"top1": "top-1", "top5": "top-5", "nll": "NLL", "ece": "ECE"},
    "map": {"map": "mAP", "f1": "F1 (micro)", "f1_macro": "F1 (macro)", "nll": "NLL"},
}
"""Headline -> what is reported with it -> what that is called."""
UNITS = {
    "top1": "Top-1, top-5 and ECE in percent, NLL in nats",
    "map": "mAP and F1 at probability 0.5 in percent, NLL in nats per image and class",
}
ENVIRONMENT = {"device": TEXT, "processes": COUNT, "mixed_precision": TEXT, "python": TEXT}


class Data(NamedTuple):
    """What a run says of its data: ``data.json``."""

    classes: list[str]
    images: dict[str, int]
    """Split -> number of images."""
    commit: str | None
    """The commit of the data set on the Hub that was read."""
    splits: dict[str, dict[str, Any]]
    """Split -> its identity, see ``data/identity.py``."""
    identity: dict[str, Any]
    """What tells the data from others, without the names and counts of classes: equal for runs on the same images."""
    changes: list[dict[str, Any]]
    """Where the run went on over other images: ``update``, and in words what ``changed``."""

    def difference(self, split: str, identity: dict[str, Any], classes: Sequence[str]) -> str | None:
        """In what other data differ from those of this run, in words; None where they are the same."""
        return difference(self.splits[split], identity, self.classes, classes)


@dataclass(frozen=True)
class Summary:
    """The reported numbers of a run, by its setting's protocol."""

    run: str
    """Name of the folder."""
    recipe: str
    mixer: str
    seed: int
    split: str
    """What was evaluated on."""
    count: int
    """Images that were evaluated."""
    epochs: int
    """Epochs done."""
    epochs_planned: int
    protocol: str
    """In words."""
    epochs_used: int
    """Evaluated epochs that the protocol takes."""
    epochs_wanted: int
    ema: bool
    """Whether the weights are averaged ones."""
    metric: str
    """The headline, ``top1`` or ``map``, of which the two readings are."""
    scores: dict[str, float]
    """``METRICS`` in percent, nll in nats: the median over the protocol's epochs, or of the best one."""
    reading: protocols.Reading
    """The headline as the setting's text states it."""
    tool: protocols.Reading
    """The headline as OpenMixup's tools compute it."""
    seconds: float
    """Wall time over all resumes."""
    img_per_s: float
    """Median over the rows of training."""


@dataclass(frozen=True)
class Run:
    """What a run folder says. Each file is read at most once, when it is first asked for, and checked.

    A file that is missing or damaged is one ``UserError`` that names it. What is written later shows in a run that is
    opened anew.
    """

    folder: Path
    name: str
    """As it was asked for: a folder, or ``hf-hub:owner/name``."""

    @classmethod
    def open(cls, name: str | Path) -> "Run":
        """The run in a folder, or of ``hf-hub:owner/name[@revision]``.

        Raises ``UserError`` for what is no run, and for a run that a newer version wrote (``format``).
        """
        folder = fetch.snapshot(str(name), *FILES) if fetch.is_hub(str(name)) else Path(name)
        if not folder.is_dir():
            raise UserError(f"no run folder {name}")
        if not (folder / RECIPE).is_file():
            raise UserError(f"{name} is not a run folder: {RECIPE} is missing")
        run = cls(folder, str(name))
        run.check_version()
        return run

    def check_version(self) -> None:
        """Raise ``UserError`` if a newer version wrote this. Damage is told where ``environment`` is asked for."""
        try:
            content = object_in(self.environment_text, self.folder / "env.json")
        except UserError:
            return
        check_format(content, str(self.folder / "env.json"))

    # ------------------------------------------------------------------------------------- what the files say

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe. Nobody needs the package of its mixer, in any version, to read what a run found."""
        path = self.folder / "env.json"
        try:
            names = object_in(self.environment_text, path).get("mixers") if path.is_file() else None
        except UserError:  # damage is told where it is asked for
            names = None
        return resolve(str(self.folder / RECIPE), absent=list(names) if isinstance(names, dict) else ())[0]

    @cached_property
    def log(self) -> Rows:
        """Every row of ``log.jsonl``."""
        return read_rows(self.folder / "log.jsonl")

    @cached_property
    def evaluated_log(self) -> Rows:
        """The log of a run that was trained and evaluated at least once."""
        if not (self.folder / "log.jsonl").is_file():
            raise UserError(f"{self.folder} is not a run folder: log.jsonl is missing")
        if not self.log.train or not self.log.val:
            done = "evaluated" if self.log.train else "trained"
            raise UserError(f"{self.folder}: log.jsonl has no {done} epoch yet")
        return self.log

    @cached_property
    def data(self) -> Data:
        """The data that the run was trained and evaluated on."""
        path = self.folder / "data.json"
        content = read_object(path)
        own = (self.recipe.train_split, self.recipe.eval_split)
        check(content, {"splits": dict.fromkeys(own, SPLIT)}, str(path))
        check(content, {"splits": dict.fromkeys(content["splits"], SPLIT)}, str(path))
        classes, commit = content.get("classes"), content.get("commit")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"{path}: classes: expected a list of names, got {classes!r:.60}")
        if commit is not None and not (isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit)):
            raise UserError(f"{path}: commit: expected 40 hexadecimal digits, got {commit!r:.60}")
        changes = content.get("changed", [])
        if not isinstance(changes, list):
            raise UserError(f"{path}: changed: expected a list, got {changes!r:.60}")
        for number, change in enumerate(changes):
            check(change, {"update": UPDATE, "changed": TEXT}, str(path), f"changed.{number}")
        splits = content["splits"]
        images = {split: found["images"] for split, found in splits.items()}
        told = {name: {k: v for k, v in found.items() if k != "per_class"} for name, found in splits.items()}
        # a run may be older than the field commit
        identity = {"commit": None} | {k: v for k, v in content.items() if k != "classes"} | {"splits": told}
        return Data(classes, images, commit, splits, identity, changes)

    @cached_property
    def environment_text(self) -> str:
        """``env.json`` as it is."""
        return read_text(self.folder / "env.json")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What the run was made with: ``env.json``."""
        path = self.folder / "env.json"
        content = object_in(self.environment_text, path)
        check(content, ENVIRONMENT, str(path))
        return content

    @cached_property
    def results(self) -> dict[str, Any]:
        """``eval_results.json``. Its ``exported`` is checked: the evaluation of the exported weights."""
        path = self.folder / "eval_results.json"
        content = read_object(path)
        rates = dict.fromkeys(("map",) if self.recipe.multi_label else ("top1", "top5"), PERCENT)
        wanted = {"epoch": COUNT, **{self.prefix + k: kind for k, kind in ({"count": COUNT} | rates).items()}}
        check(content.get("exported"), wanted, str(path), "exported")
        return content

    @property
    def exported(self) -> dict[str, Any]:
        """The evaluation of the exported weights: epoch, and the metrics of every classifier."""
        return self.results["exported"]

    @cached_property
    def predictions(self) -> dict[str, np.ndarray]:
        """What the exported weights say of each image, see ``format.PREDICTIONS``; it agrees with ``exported``."""
        shape = OF_SEVERAL if self.recipe.multi_label else PREDICTIONS
        path = self.folder / "predictions.safetensors"
        again = f"make it with evaluate_mixup.py {self.folder} --predictions {path}"
        if not path.is_file():
            raise UserError(f"{self.folder} has no {path.name}, without which runs cannot be paired; {again}")
        try:
            content = path.read_bytes()
            columns = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            views = header.get("__metadata__", {}).get("tta")
        except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as e:  # the last three: unknown types
            raise UserError(f"{path} is damaged ({e}); {again}") from None
        if views:
            raise UserError(
                f"{path} averages over the views of --tta {views}, and no score of the run does that; {again}"
            )
        found = {k: (str(v.dtype), v.ndim) for k, v in columns.items()}
        if found != shape or len({len(v) for v in columns.values()}) > 1 or not all(v.size for v in columns.values()):
            raise UserError(f"{path} is damaged (expected a row per image in each of {', '.join(shape)}); {again}")
        return columns

    @cached_property
    def robustness(self) -> dict[str, Any] | None:
        """What the suite of robustness found, perhaps of weights before these, see ``robustness_file``; None without.

        ``weights_sha256`` tells whose numbers they are.
        """
        path = self.folder / robustness_file.NAME
        return robustness_file.read(path) if path.is_file() else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """timm's configuration of the exported weights."""
        return read_object(self.folder / "config.json")

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the exported weights."""
        path = self.folder / "model.safetensors"
        try:
            return file_hash(path)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None

    @cached_property
    def summary_csv(self) -> str | None:
        """``summary.csv`` as it is, which a run writes last; None where there is none."""
        path = self.folder / "summary.csv"
        return read_text(path) if path.is_file() else None

    @cached_property
    def card(self) -> str | None:
        """``README.md`` as it is; None where there is none."""
        return read_card(self.folder / "README.md")

    @cached_property
    def pushed(self) -> dict[str, Any]:
        """Where the run was pushed to, and how, see ``hub.push``; empty before the first push."""
        try:
            content = json.loads((self.folder / ".hub.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @cached_property
    def tracked(self) -> dict[str, str]:
        """Where trackers show the run: name -> address, of those that have one."""
        try:
            content = json.loads((self.folder / TRACKERS).read_text())
            return {name: said["url"] for name, said in content.items() if said["url"]}
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            return {}

    # ------------------------------------------------------------------------------------- what follows from them

    @property
    def prefix(self) -> str:
        """What stands before a metric of the reported classifier in the log."""
        return "ema_" if self.recipe.report_ema else ""

    @property
    def recipe_here(self) -> Recipe:
        """The recipe with the place where its data lie on this machine, as long as the run's own note of it holds."""
        try:
            place = json.loads((self.folder / PLACE).read_text())["path"]
        except (OSError, ValueError, KeyError, TypeError):
            return self.recipe
        there = isinstance(place, str) and os.path.exists(place)
        return changed(self.recipe, dataset=place) if there else self.recipe

    @property
    def weights(self) -> dict[str, Path]:
        """The classifiers whose weights are there, by their name in the log: file."""
        main = self.prefix.removesuffix("_")
        found = [protocols.head_of(key, protocols.headline(self.recipe)) for key in self.exported]
        names = [name for name in found if name is not None]
        places = {n: self.folder if n == main else self.folder / "models" / (n or "raw") for n in names}
        safe = {n: place / "model.safetensors" for n, place in places.items() if re.fullmatch(r"\w*", n)}
        return {n: path for n, path in safe.items() if path.is_file()}

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints that are kept, oldest first."""
        return checkpoint.existing(self.folder / "checkpoints")

    @property
    def last_sheet(self) -> Path | None:
        """The newest sheet of mixed samples, by the numbers in its name: file times don't survive a copy."""

        def order(path: Path) -> tuple[list[int], str]:
            return [int(number) for number in re.findall(r"\d+", path.stem)], path.name

        return max((self.folder / "samples").glob("*.png"), key=order, default=None)

    @property
    def finished(self) -> bool:
        """Whether the last planned epoch was evaluated."""
        return self.evaluated_log.val[-1].epoch >= self.recipe.epochs

    @cached_property
    def summary(self) -> Summary:
        """The reported numbers. Raises ``UserError`` for a run without an evaluation and for metrics that lack."""
        recipe, rows = self.recipe, self.evaluated_log
        metric = protocols.headline(recipe)
        metrics = {row.epoch: {name: row.metric(self.prefix + name) for name in METRICS[metric]} for row in rows.val}
        with naming(self.folder):
            number, tool = protocols.of_run([row.line for row in rows.val], recipe)
        values = {epoch: found[metric] for epoch, found in metrics.items()}
        window = protocols.window(values, recipe.protocol, recipe.protocol_epochs, recipe.epochs)
        middle = {k: statistics.median(metrics[epoch][k] for epoch in window) for k in METRICS[metric]}
        seconds = [row.seconds for row in rows.train] + [row.seconds for row in rows.val]
        return Summary(
            run=self.folder.resolve().name,
            recipe=recipe.name,
            mixer=recipe.mixer,
            seed=recipe.seed,
            split=recipe.eval_split,
            count=int(rows.val[-1].metric("count")),
            epochs=rows.val[-1].epoch,
            epochs_planned=recipe.epochs,
            protocol=protocols.plainly(number.name) + (", EMA" if recipe.report_ema else ""),
            epochs_used=number.used,
            epochs_wanted=number.wanted,
            ema=recipe.report_ema,
            metric=metric,
            scores=middle,
            reading=number,
            tool=tool,
            seconds=max(seconds),
            img_per_s=statistics.median(row.img_per_s for row in rows.train),
        )


def labels(runs: Sequence[Run]) -> list[str]:
    """Folder names; where two are the same, with as many parents as tell the runs apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts), default=0)):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]
