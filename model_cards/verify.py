"""Whether what a repository says is so: its card, its results, its log, its predictions and its weights.

Everything is computed again from what lies below it: the reported number from the log, the scores from the
predictions, and the predictions from the weights on the data.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import recipes
from recipes import Recipe, UserError

FILES = (
    "README.md", "recipe.yaml", "data.json", "log.jsonl", "summary.csv", "eval_results.json",
    "predictions.safetensors",
)  # fmt: skip
# Another device and another version of a library move a logit by rounding, and so a few of the images near a tie.
TOP1, NLL = 0.1, 1e-3  # points, and relative


class Claims(NamedTuple):
    """What the weights are held to: scores of the main classifier, and the run's record of the data behind them."""

    top1: float
    nll: float
    data: Any


def verify(name: str, dataset: str | None = None, batch_size: int = 64) -> tuple[str, bool]:
    """A line per claim of ``hf-hub:owner/name`` or a run folder, and whether all hold.

    ``dataset``: where the recipe's data lie on this machine. Raises ``UserError`` when something cannot be looked at.
    """
    from training import pull

    folder = pull.fetch(name, *FILES) if pull.is_hub(name) else Path(name)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{name} has no recipe.yaml: not a run")
    recipe, _ = recipes.resolve(str(folder / "recipe.yaml"))
    if missing := [f for f in (*FILES[2:], "config.json", "model.safetensors") if not (folder / f).is_file()]:
        return f"differs  {name} lacks {', '.join(missing)}", False
    try:
        rows = list(of_files(folder, recipe))
        claimed = read_claims(folder, recipe)
    except UserError as e:
        raise UserError(f"{name}: {e}") from None
    except Exception as e:  # a stranger's files can make their readers raise anything
        raise UserError(f"{name}: damaged files: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None
    rows += of_weights(folder, name, claimed, dataset, batch_size)
    text = "\n".join(f"{'agrees ' if good else 'differs'}  {what}" for what, good in rows)
    return text, all(good for _, good in rows)


def read_claims(folder: Path, recipe: Recipe) -> Claims:
    """What ``eval_results.json`` and ``data.json`` claim. Raises whatever comes for files that are none of a run's."""
    exported = json.loads((folder / "eval_results.json").read_text())["exported"]
    splits = json.loads((folder / "data.json").read_text())["splits"]
    main = "ema_" if recipe.report_ema else ""
    return Claims(float(exported[main + "top1"]), float(exported[main + "nll"]), splits[recipe.eval_split])


def of_files(folder: Path, recipe: Recipe) -> Iterator[tuple[str, bool]]:
    """What the files say of each other: a claim, and whether it holds."""
    from safetensors.numpy import load_file

    from training import evaluation, run
    from training.checkpoint import file_hash

    results = json.loads((folder / "eval_results.json").read_text())
    exported = results["exported"]
    log = run.Log.__new__(run.Log)  # reads; a Log that is opened cuts its file
    log.lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    again = run.reported(log, recipe)
    yield (
        f"log and eval_results.json: {again['reported']['top1']:.2f} by the log ({again['reported']['protocol']}), "
        f"{results['reported']['top1']:.2f} reported",
        {k: results[k] for k in again} == again,
    )
    lines = [{k: v for k, v in line.items() if k not in ("mode", "perf")} for line in log.val().values()]
    yield f"log and eval_results.json: epoch {exported['epoch']} exported", exported in lines
    yield "log and summary.csv", log.summary() == (folder / "summary.csv").read_text()
    main = "ema_" if recipe.report_ema else ""
    scores = evaluation.score(load_file(folder / "predictions.safetensors"))
    same = all(math.isclose(scores[k], exported[main + k], rel_tol=1e-5, abs_tol=1e-6) for k in scores)
    yield f"predictions and eval_results.json: top-1 {scores['top1']:.2f} over {scores['count']} images", same
    if "weights_sha256" in results:
        yield (
            "weights and eval_results.json: SHA-256",
            results["weights_sha256"] == file_hash(folder / "model.safetensors"),
        )
    config = json.loads((folder / "config.json").read_text())
    kind, classes = recipe.model.split(".")[0], json.loads((folder / "data.json").read_text())["classes"]
    yield f"config.json and recipe: {config['architecture']}", config["architecture"] == kind
    yield f"config.json and data.json: {len(classes)} classes", config.get("label_names") == classes
    yield from of_card(folder, exported[main + "top1"])


def of_card(folder: Path, number: float) -> Iterator[tuple[str, bool]]:
    """Every top-1 that the card claims in its metadata, which speak of the exported weights."""
    import yaml

    text = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    parts = text.split("---\n", 2)
    try:
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        found = None
    claims = list(top1_claims(found))
    if not claims:
        yield "card: claims no top-1", False
    for value in claims:
        words = f"card and eval_results.json: top-1 {value:.2f} in the card, {number:.2f} exported"
        yield words, abs(value - number) < 0.006


def top1_claims(found: Any) -> Iterator[float]:
    """Top-1 of our own in a card's ``model-index``, in percent."""
    for model in (found or {}).get("model-index") or ():
        for result in model["results"]:
            for metric in result["metrics"]:
                if "top-1" in str(metric.get("name", "")).lower() or metric.get("type") == "top1":
                    yield float(metric["value"])


def of_weights(
    folder: Path, name: str, claimed: Claims, dataset: str | None, batch_size: int
) -> Iterator[tuple[str, bool]]:
    """The weights, evaluated again by the recipe's protocol on its data."""
    from training import backbones, data, evaluation, images, launch, pull

    changes: dict[str, Any] = {"batch_size": batch_size, "per_device_train_batch_size": batch_size}
    changes |= {"sync_bn": False, "torch_compile": False} | ({"dataset": dataset} if dataset else {})
    recipe, _ = recipes.resolve(str(folder / "recipe.yaml"), changes)
    net = pull.load(folder, name)
    backbones.check_input(net, batch_size, recipe.eval_size, name, training=False)
    accelerator = launch.accelerator(recipe, Path("."))
    table, classes = data.load_split(recipe, recipe.eval_split, recipe.max_eval_samples)
    backbones.check_classes(net, classes, name)
    found = {"images": len(table), "labels_sha256": data.labels_hash(table, recipe.label_column)}
    yield f"data: {len(table)} images of {recipe.eval_split}, as recorded", claimed.data == found
    transform = images.EvalTransform(recipe.eval_resize, recipe.eval_size, recipe.interpolation)
    samples = data.Samples(table, recipe, transform, "skip")
    net = launch.on_device(net, recipe, accelerator)
    workers = launch.workers(None, accelerator)
    columns = evaluation.predict_all(net, samples, recipe, accelerator, workers)
    assert columns is not None
    try:
        scores = evaluation.score(columns)
    except ValueError as e:  # weights that give no numbers
        yield f"weights: {e}", False
        return
    # one image near a tie may be more than TOP1
    slack = {"top1": max(TOP1, 100 / len(table) + 1e-9), "nll": NLL * scores["nll"]}
    for key, value, label in (("top1", claimed.top1, "top-1"), ("nll", claimed.nll, "NLL")):
        yield (
            f"weights: {label} {scores[key]:.4g} evaluated again, {value:.4g} claimed",
            abs(scores[key] - value) <= slack[key],
        )
