"""Evaluation on any number of processes: each image counts exactly once."""

import contextlib
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from mixup_recipes.data.images import normalise
from mixup_recipes.data.loading import Loaded, Samples, Source
from mixup_recipes.metrics.calibration.formula import calibration
from mixup_recipes.metrics.multi_label.formula import multi_label_scores
from mixup_recipes.metrics.topk_accuracy.formula import topk_accuracy
from mixup_recipes.recipe import Recipe
from mixup_recipes.training import sharding
from mixup_recipes.training.signals import Stop
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


@torch.no_grad()
def predict(
    models: dict[str, nn.Module],
    batches: Iterable[Loaded],
    rounds: int | None,
    total: int,
    recipe: Recipe,
    accelerator: Any,
    stop: Stop | None = None,
) -> dict[str, dict[str, np.ndarray]] | None:
    """What the metrics need of each model, one row per image, on every process, sorted by image; in one pass.

    ``rounds``: loop iterations, the same on every process (a process may have no batch in the last one), so that all
    agree when a signal asks to stop; then None comes back. None: as many as the process with the most batches has,
    which they find out as they go. ``total``: images that must have been seen, each once. Columns: index, label, top
    (up to 5 classes, best first), nll (nats), confidence, bad. Where an image may have several labels: index, label
    (K,) of 0 and 1, score (K,), the probabilities, nll, the mean over classes, bad. Raises ``UserError`` on every
    process where a stream has not as many images as its card says.
    """
    were_training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    parts: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in models}
    iterator = iter(batches) if stop is None else stop.watched(iter(batches))
    try:
        for _ in itertools.count() if rounds is None else range(rounds):
            if stop is not None and stop.agreed(accelerator, "evaluation"):
                return None
            batch = next(iterator, None)
            if rounds is None and not accelerator.reduce(
                torch.tensor(int(batch is not None), device=accelerator.device)
            ):
                break
            if batch is None:
                for model in models.values():
                    sharding.accompany(model, recipe.eval_size, accelerator.device)
                continue
            images, labels, index, bad = batch
            x = normalise(images, recipe, accelerator.device)
            labels = labels.to(accelerator.device, non_blocking=True)
            for name, model in models.items():
                with accelerator.autocast() if accelerator.mixed_precision != "no" else contextlib.nullcontext():
                    logits = model(x).float()
                said = of_several(logits, labels) if recipe.multi_label else of_one(logits, labels)
                parts[name].append({"index": index, **said, "bad": bad})
    finally:
        for name, model in models.items():
            model.train(were_training[name])
    return {name: gathered(found, rounds, total, recipe) for name, found in parts.items()}


def gathered(parts: list[dict[str, Tensor]], rounds: int | None, total: int, recipe: Recipe) -> dict[str, np.ndarray]:
    """The batches of all processes as the columns of ``predict``, checked."""
    mine = {k: torch.cat([p[k].cpu() for p in parts]).numpy() for k in parts[0]} if parts else {}
    rows = [r for r in gather_object([mine]) if r]
    columns = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
    order = np.argsort(columns["index"], kind="stable")
    columns = {k: v[order] for k, v in columns.items()}
    if rounds is None:  # a stream's index only says where an image stands among the others
        columns["index"] = np.unique(columns["index"], return_inverse=True)[1]
    if rounds is None and len(columns["index"]) != total:
        raise UserError(
            f"dataset {recipe.dataset!r}: the card says {many(total, 'image')}, {len(columns['index']):,} were read; "
            "fix its dataset_info"
        )
    if not np.array_equal(columns["index"], np.arange(total)):
        raise RuntimeError(
            f"expected an evaluation of {total} different images, got {many(len(columns['index']), 'image')}"
        )
    kept = columns["bad"] == 0
    return {k: v[kept] for k, v in columns.items()}


def of_one(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Columns of ``predict`` for images of one label (B,)."""
    log_p = logits.log_softmax(1)
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    return {"label": labels, "top": top, "nll": nll, "confidence": log_p.gather(1, top[:, :1])[:, 0].exp()}


def of_several(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Columns of ``predict`` for images whose labels are multi-hot (B, K)."""
    nll = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    return {"label": labels.to(torch.uint8), "score": logits.sigmoid(), "nll": nll}


def predict_all(
    model: nn.Module, samples: Source, recipe: Recipe, accelerator: Any, workers: int
) -> dict[str, np.ndarray]:
    """``predict`` over a whole split, dealt over the processes, of one model; no signal stops it."""
    found = predict_each({"": model}, samples, recipe, accelerator, workers)
    assert found is not None
    return found[""]


def predict_each(
    models: dict[str, nn.Module],
    samples: Source,
    recipe: Recipe,
    accelerator: Any,
    workers: int,
    stop: Stop | None = None,
) -> dict[str, dict[str, np.ndarray]] | None:
    """``predict`` over a whole split, dealt over the processes."""
    size, batch = len(samples), recipe.per_device_train_batch_size
    rank, world = accelerator.process_index, accelerator.num_processes
    rounds = math.ceil(math.ceil(size / world) / batch) if isinstance(samples, Samples) else None
    batches = samples.eval_batches(rank, world, batch, workers, accelerator.device)
    return predict(models, batches, rounds, size, recipe, accelerator, stop)


def evaluate(
    models: dict[str, nn.Module],
    samples: Source,
    recipe: Recipe,
    accelerator: Any,
    workers: int,
    stop: Stop | None = None,
) -> tuple[dict[str, float], dict[str, dict[str, np.ndarray]]] | None:
    """Scores of all models, each with its model's name in front (``""`` adds nothing), and the columns by model.

    None when a signal asked to stop.
    """
    columns = predict_each(models, samples, recipe, accelerator, workers, stop)
    if columns is None:
        return None
    scores: dict[str, float] = {}
    for name, found in columns.items():
        scores |= {f"{name}_{k}" if name else k: v for k, v in score(found).items()}
    return scores, columns


def score(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """top1, top5 and ece in percent, nll in nats, count of images. With fewer than 5 classes top5 takes them all.

    Where an image may have several labels: map, f1 and f1_macro in percent, nll where there is such a column, count.
    """
    if "score" in columns:
        scores = multi_label_scores(columns["label"], columns["score"])
        nll = {"nll": float(columns["nll"].mean(dtype=np.float64))} if "nll" in columns else {}
        return scores | nll | {"count": len(columns["label"])}
    width = columns["top"].shape[1]
    accuracy = topk_accuracy(columns["top"], columns["label"], ks=(1, width))
    correct = columns["top"][:, 0] == columns["label"]
    scores = {"top1": accuracy["top1"], "top5": accuracy[f"top{width}"]}
    scores |= calibration(columns["confidence"], correct, columns["nll"])
    return {k: float(v) for k, v in scores.items()} | {"count": len(correct)}


def scores_line(scores: dict[str, float]) -> str:
    """The scores of the main classifier, and the headline of each of the others, in one line."""
    return ", ".join(f"{k} {v:.4g}" for k, v in scores.items() if "_" not in k or k.endswith(("_top1", "_map")))
