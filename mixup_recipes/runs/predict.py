"""What a trained model says of images that have no labels: the likeliest classes of each, with their probabilities."""

import contextlib
import csv
import glob
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mixup_recipes import files
from mixup_recipes.data import decoding, images
from mixup_recipes.data.folder import shown
from mixup_recipes.runs.models import class_names, eval_transform, evaluation_recipe, open_model
from mixup_recipes.training import backbones, launch
from mixup_recipes.typed import UserError

FORMATS = (".csv", ".jsonl")


class Prediction(NamedTuple):
    """What the model says of one image, the likeliest class first."""

    path: Path
    labels: list[str]
    probabilities: list[float]
    error: str = ""
    """Why the image cannot be read; then there are no labels."""


def predict(name: str, given: list[str], top_k: int, batch_size: int, out: Path | None) -> int:
    """``mixup-recipes predict``: print the predictions, or write them to ``out``; returns the exit status.

    ``name``: a run folder, timm name or ``hf-hub:owner/name``. ``given``: files, folders and globs. 1 when no image
    could be read. Raises ``UserError`` before anything is computed.
    """
    if out is not None and out.suffix not in FORMATS:
        raise UserError(f"predictions are written as {' or '.join(FORMATS)}; expected a name that ends so, got {out}")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    for what, number in (("top_k", top_k), ("batch_size", batch_size)):
        if number < 1:
            raise UserError(f"{what}: expected an integer at least 1, got {number}")
    found = []
    for prediction in predictions(name, paths_of(given), top_k, batch_size):
        found.append(prediction)
        if out is None:
            print(line(prediction), flush=True)
    bad = sum(bool(p.error) for p in found)
    if out is not None:
        files.write(out, as_csv(found) if out.suffix == ".csv" else as_jsonl(found))
        print(f"{out}: {len(found)} images" + (f", of which {bad} cannot be read" if bad else ""))
    return int(bad == len(found))


def paths_of(given: list[str]) -> list[Path]:
    """The images that files, folders and globs name, in the order given; folders whole and sorted."""
    if not given:
        raise UserError("which images? pass files, folders or globs after the model")
    found: list[Path] = []
    for name in given:
        matches = [Path(name)] if os.path.exists(name) else [Path(p) for p in sorted(glob.glob(name, recursive=True))]
        if not matches:
            what = "no file or folder matches" if glob.has_magic(name) else "no file or folder"
            raise UserError(f"{what} {name!r}")
        found += dict.fromkeys(file for match in matches for file in images_in(match))  # ** finds folder and files
    return found


def images_in(path: Path) -> list[Path]:
    """A file itself; of a folder all files that are called like images, hidden ones left out."""
    if not path.is_dir():
        return [path]
    known = Image.registered_extensions()
    below = sorted(Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
    inside = [p for p in below if p.suffix.lower() in known and p.is_file()]
    inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not inside:
        raise UserError(f"no image in folder {str(path)!r}")
    return inside


@torch.no_grad()
def predictions(name: str, paths: list[Path], top_k: int, batch_size: int) -> Iterator[Prediction]:
    """A prediction for each path, in order, batch by batch; images are treated as in an evaluation of the model."""
    net: Any
    net, run = open_model(name)
    recipe = evaluation_recipe(net, name, run, {})
    transform = eval_transform(net, recipe, own=run is None)
    backbones.check_input(net, min(batch_size, len(paths)), tuple(transform.size), name, training=False)
    classes = class_names(net)
    accelerator = launch.accelerator(recipe, Path("."))
    net = launch.on_device(net, recipe, accelerator).eval()

    def read(path: Path) -> Tensor | str:
        try:
            return transform(decoding.decode(decoding.read(path), upright=recipe.exif_orientation))
        except decoding.BadImage as e:
            return str(e)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        for batch in (paths[start : start + batch_size] for start in range(0, len(paths), batch_size)):
            content = dict(zip(batch, readers.map(read, batch), strict=True))
            whole = {path: pixels for path, pixels in content.items() if isinstance(pixels, Tensor)}
            said: dict[Path, tuple[list[float], list[int]]] = {}
            if whole:
                x = images.normalise(torch.stack(list(whole.values())), recipe, accelerator.device)
                with accelerator.autocast() if accelerator.mixed_precision != "no" else contextlib.nullcontext():
                    logits = net(x).float()
                top = logits.softmax(1).topk(min(top_k, logits.shape[1]))
                said = dict(zip(whole, zip(top.values.tolist(), top.indices.tolist(), strict=True), strict=True))
            for path in batch:
                probabilities, indices = said.get(path, ([], []))
                error = content[path] if path not in said else ""
                yield Prediction(path, [classes[i] for i in indices], probabilities, str(error))


def line(prediction: Prediction) -> str:
    """One line for people."""
    if prediction.error:
        return f"{shown(str(prediction.path))}: cannot be read: {prediction.error}"
    pairs = zip(prediction.labels, prediction.probabilities, strict=True)
    return f"{shown(str(prediction.path))}: " + ", ".join(f"{label} {probability:.4f}" for label, probability in pairs)


def as_csv(predictions: list[Prediction]) -> str:
    """A row for each image and rank; one that cannot be read has a row with the reason."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("path", "rank", "label", "probability", "error"))
    for found in predictions:
        if found.error:
            rows.writerow((shown(str(found.path)), "", "", "", found.error))
        for rank, (label, probability) in enumerate(zip(found.labels, found.probabilities, strict=True), 1):
            rows.writerow((shown(str(found.path)), rank, label, probability, ""))
    return text.getvalue()


def as_jsonl(predictions: list[Prediction]) -> str:
    """A line for each image: path, and labels with probabilities, or the error."""
    lines = []
    for found in predictions:
        pairs = zip(found.labels, found.probabilities, strict=True)
        said = {"predictions": [{"label": label, "probability": p} for label, p in pairs]}
        lines.append(json.dumps({"path": str(found.path)} | ({"error": found.error} if found.error else said)) + "\n")
    return "".join(lines)
