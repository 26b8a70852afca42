"""Whether what a repository says is so: its card, its results, its log, its predictions and its weights.

Everything is computed again from what lies below it: the reported number from the log, the scores from the
predictions, and the predictions from the weights on the data.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mixup_recipes import fetch
from mixup_recipes.data import images
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.opening import is_large, is_local
from mixup_recipes.data.splits import load_split
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.runs.run import Data, Run
from mixup_recipes.training import backbones, evaluation, launch
from mixup_recipes.training.log import reported, summary_csv
from mixup_recipes.training.protocols import NAMES, headline, plainly
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

NEEDED = (
    "data.json", "log.jsonl", "summary.csv", "eval_results.json", "predictions.safetensors", "config.json",
    "model.safetensors",
)  # fmt: skip
# Another device and another version of a library move a logit by rounding, and so a few of the images near a tie.
TOP1, NLL = 0.1, 1e-3  # points, and relative
Claim = tuple[str, bool | None]
"""What is claimed, and whether it holds; None where that cannot be told."""
WORDS = {True: "agrees", False: "differs", None: "unknown"}


class Reported(NamedTuple):
    """What the weights are held to: scores of the main classifier, and the identity of the data behind them."""

    number: float
    """The headline, top-1 or mAP."""
    nll: float
    data: Data


def verify(run: Run, dataset: str | None = None, batch_size: int = 64) -> tuple[str, bool]:
    """A line per claim of a run, and whether none is wrong.

    ``dataset``: where the recipe's data lie on this machine. Raises ``UserError`` when something cannot be looked at.
    """
    if missing := [f for f in NEEDED if not (run.folder / f).is_file()]:
        return f"differs  {run.name} lacks {', '.join(missing)}", False
    try:
        rows: list[Claim] = list(of_files(run))
        claimed = Reported(
            float(run.exported[run.prefix + headline(run.recipe)]),
            float(run.exported[f"{run.prefix}nll"]),
            run.data,
        )
    except UserError as e:
        raise UserError(str(e) if run.name in str(e) else f"{run.name}: {e}") from None
    except Exception as e:  # a stranger's files can make their readers raise anything
        raise UserError(f"{run.name}: damaged files: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None
    rows += of_weights(run, claimed, dataset, batch_size)
    text = "\n".join(f"{WORDS[good]:7}  {what}" for what, good in rows)
    return text, all(good is not False for _, good in rows)


def of_files(run: Run) -> Iterator[tuple[str, bool]]:
    """What the files say of each other: a claim, and whether it holds."""
    results, exported, recipe = run.results, run.exported, run.recipe
    metric = headline(recipe)
    lines = [row.line for row in run.log.train] + [row.line for row in run.log.val]
    again = reported(lines, recipe)
    rule = plainly(again["reported"]["protocol"])
    yield (
        f"log and eval_results.json: {again['reported'][metric]:.2f} by the log ({rule}), "
        f"{results['reported'][metric]:.2f} reported",
        {k: results[k] for k in again} == again,
    )
    rows = [row.result for row in run.log.val]
    yield f"log and eval_results.json: epoch {exported['epoch']} exported", exported in rows
    yield "log and summary.csv", summary_csv(lines) == run.summary_csv
    scores = evaluation.score(run.predictions)
    same = all(math.isclose(scores[k], exported[run.prefix + k], rel_tol=1e-5, abs_tol=1e-6) for k in scores)
    of = f"{NAMES[metric]} {scores[metric]:.2f} over {many(int(scores['count']), 'image')}"
    yield f"predictions and eval_results.json: {of}", same
    if "weights_sha256" in results:
        yield "weights and eval_results.json: SHA-256", results["weights_sha256"] == run.weights_hash
    kind, classes = recipe.model.split(".")[0], run.data.classes
    yield f"config.json and recipe: {run.config['architecture']}", run.config["architecture"] == kind
    yield f"config.json and data.json: {many(len(classes), 'class')}", run.config.get("label_names") == classes
    yield from of_card(run.card or "", exported[run.prefix + metric], metric)


def of_card(text: str, number: float, metric: str) -> Iterator[tuple[str, bool]]:
    """Every headline that the card claims in its metadata, which speak of the exported weights."""
    parts = re.split(r"---\r?\n", text, maxsplit=2)
    try:
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        found = None
    claims, name = list(claims_of(found, metric)), NAMES[metric]
    if not claims:
        yield f"card: claims no {name}", False
    for value in claims:
        words = f"card and eval_results.json: {name} {value:.2f} in the card, {number:.2f} exported"
        yield words, abs(value - number) < 0.006


def claims_of(found: Any, headline: str) -> Iterator[float]:
    """Top-1, or mAP, of our own in a card's ``model-index``, in percent."""
    for model in (found or {}).get("model-index") or ():
        for result in model["results"]:
            for metric in result["metrics"]:
                named = NAMES[headline].lower() in str(metric.get("name", "")).lower()
                if named or metric.get("type") == headline:
                    yield float(metric["value"])


def of_split(data: Data, split: str, identity: dict[str, Any], classes: list[str]) -> Claim:
    """Whether the images of a split are those that the run noted."""
    change = data.difference(split, identity, classes)
    compared = "" if "fingerprint" in data.splits[split] else " (by number and labels alone)"
    return f"data: {many(identity['images'], 'image')} of {split}, {change or f'as noted{compared}'}", change is None


def of_training(data: Data, recipe: Recipe) -> Claim:
    """The same of the images that the run was trained on, which need not be on this machine."""
    split = recipe.train_split
    try:
        found = load_split(recipe, split, recipe.max_train_samples, like=data.classes)
    except UserError as e:
        return f"data: {split} was not compared: {e}", None
    return of_split(data, split, found.identity, found.classes)


def of_weights(run: Run, claimed: Reported, dataset: str | None, batch_size: int) -> Iterator[Claim]:
    """The data on this machine, and the weights, evaluated again by the recipe's protocol on them."""
    changes: dict[str, Any] = {"batch_size": batch_size, "per_device_train_batch_size": batch_size}
    changes |= {"sync_bn": False, "torch_compile": False} | ({"dataset": dataset} if dataset else {})
    recipe = changed(run.recipe_here, **changes)
    net = fetch.model_of(run.folder, run.name)
    backbones.check_input(net, batch_size, recipe.eval_size, run.name, training=False)
    accelerator = launch.accelerator(recipe, Path("."))
    found = load_split(recipe, recipe.eval_split, recipe.max_eval_samples, like=run.data.classes)
    table, classes, identity = found.table, found.classes, found.identity
    backbones.check_classes(net, classes, run.name)
    yield of_split(claimed.data, recipe.eval_split, identity, classes)
    if is_large(recipe):
        yield f"data: {recipe.train_split} was not compared, as opening it may copy it", None
    elif is_local(recipe):
        yield of_training(claimed.data, recipe)
    transform = images.EvalTransform.of(recipe)
    samples = Samples(table, recipe, transform, "skip")
    net = launch.on_device(net, recipe, accelerator)
    workers = launch.workers(None, accelerator, recipe)
    columns = evaluation.predict_all(net, samples, recipe, accelerator, workers)
    try:
        scores = evaluation.score(columns)
    except ValueError as e:  # weights that give no numbers
        yield f"weights: {e}", False
        return
    # one image near a tie may be more than TOP1
    metric = headline(recipe)
    slack = {metric: max(TOP1, 100 / len(table) + 1e-9), "nll": NLL * scores["nll"]}
    for key, value, label in ((metric, claimed.number, NAMES[metric]), ("nll", claimed.nll, "NLL")):
        yield (
            f"weights: {label} {scores[key]:.4g} evaluated again, {value:.4g} claimed",
            abs(scores[key] - value) <= slack[key],
        )
