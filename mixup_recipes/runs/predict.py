"""What a trained model says of images that have no labels: the likeliest classes of each, with their probabilities."""

import contextlib
import csv
import glob
import io
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixup_recipes import files
from mixup_recipes.data import decoding, images
from mixup_recipes.data.folder import Entry, images_below, shown
from mixup_recipes.data.identity import some
from mixup_recipes.data.multi_label import BETWEEN
from mixup_recipes.data.picture import Picture
from mixup_recipes.metrics.multi_label.formula import THRESHOLD
from mixup_recipes.runs.models import (
    eval_transform,
    evaluation_recipe,
    is_multi_label,
    open_model,
    output_names,
)
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.tta import Views
from mixup_recipes.training import backbones, launch
from mixup_recipes.typed import UserError, printable
from mixup_recipes.words import many

FORMATS = (".csv", ".jsonl")
ANSWER = ("label", "probability")


class Prediction(NamedTuple):
    """What the model says of one image, the likeliest class first."""

    path: Path
    labels: list[str]
    probabilities: list[float]
    error: str = ""
    """Why the image cannot be read; then there are no labels."""
    present: list[str] | None = None
    """Of a model for images that may have several labels: the classes of probability 0.5 or more; else None."""


def predict(name: str, given: list[str], top_k: int, batch_size: int, out: Path | None, tta: str = "none") -> int:
    """``mixup-recipes predict``: print the predictions, or write them to ``out``; returns the exit status.

    ``name``: a run folder, timm name or ``hf-hub:owner/name``. ``given``: files, folders and globs. ``tta``: see
    ``runs/tta.py``. 1 when no image could be read. Raises ``UserError`` before anything is computed.
    """
    if out is not None and out.suffix not in FORMATS:
        raise UserError(f"expected a file name that ends in {' or '.join(FORMATS)}, got {out}")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    for what, number in (("top_k", top_k), ("batch_size", batch_size)):
        if number < 1:
            raise UserError(f"{what}: expected an integer at least 1, got {number}")
    paths, notes = paths_of(given)
    net, run = open_model(name)
    if out is not None and out.suffix == ".csv" and is_multi_label(net):
        check_between(output_names(net))
    found = []
    for prediction in predictions(name, net, run, paths, top_k, batch_size, tta):
        found.append(prediction)
        if out is None:
            print(line(prediction), flush=True)
    for note in notes:
        print(note, file=sys.stderr)
    bad = sum(bool(p.error) for p in found)
    if out is not None:
        files.write(out, as_csv(found) if out.suffix == ".csv" else as_jsonl(found))
        print(f"{out}: {many(len(found), 'image')}" + (f", of which {bad} cannot be read" if bad else ""))
    return int(bad == len(found))


def check_between(classes: list[str]) -> None:
    """Raise ``UserError`` for a class whose name holds what stands between two labels of an image in a CSV file."""
    if inside := [name for name in classes if BETWEEN in name]:
        raise UserError(
            f"class {inside[0]!r} contains {BETWEEN!r}, which separates the labels of an image in a .csv; write a "
            ".jsonl file"
        )


def paths_of(given: list[str]) -> tuple[list[Path], list[str]]:
    """The images that files, folders and globs name, in the order given, folders whole and sorted; what is left out."""
    if not given:
        raise UserError("no images were given; pass files, folders or globs after the model")
    found: list[Path] = []
    left_out: dict[str, list[str]] = {}
    for name in given:
        matches = [Path(name)] if os.path.exists(name) else [Path(p) for p in sorted(glob.glob(name, recursive=True))]
        if not matches:
            what = "no file or folder matches" if glob.has_magic(name) else "no file or folder"
            raise UserError(f"{what} {name!r}")
        # ** finds folder and files
        found += dict.fromkeys(file for match in matches for file in images_in(match, left_out))
    return found, notes_of(left_out)


def notes_of(left_out: dict[str, list[str]]) -> list[str]:
    """A line for each reason for which files are left out."""
    each = {why: list(dict.fromkeys(names)) for why, names in sorted(left_out.items())}
    return [f"{len(names):,} left out ({why}): {some(names)}" for why, names in each.items()]


def images_in(path: Path, left_out: dict[str, list[str]]) -> list[Path]:
    """A file itself; of a folder all images that training finds in a class, see ``data.folder``, but for hidden ones.

    What is none is noted in ``left_out`` by its reason. Raises ``UserError`` for a folder without an image, and for one
    that cannot be read.
    """
    if not path.is_dir():
        return [path]
    status, others, inside = path.stat(), dict[str, list[str]](), []
    root = Entry(f"{path.name}/", path.name, str(path), "folder", 0, (status.st_dev, status.st_ino))
    try:
        for name, _ in images_below(root, "", {root.place}, others):
            if "/." in name:
                others.setdefault("hidden", []).append(name)
            else:
                inside.append(path / name[1:])
    except OSError as e:
        raise UserError(f"cannot read folder {str(e.filename)!r}: {e.strerror}") from None
    others = {why: [shown(str(path / name.removeprefix("/"))) for name in names] for why, names in others.items()}
    if not inside:
        raise UserError("; ".join([f"no image in folder {str(path)!r}", *notes_of(others)]))
    for why, names in others.items():
        left_out.setdefault(why, []).extend(names)
    return inside


@torch.no_grad()
def predictions(
    name: str, net: Any, run: Run | None, paths: list[Path], top_k: int, batch_size: int, tta: str = "none"
) -> Iterator[Prediction]:
    """A prediction for each path, in order, batch by batch; images are treated as in an evaluation of the model.

    ``name``, ``net``, ``run``: the model, see ``open_model``.
    """
    recipe = evaluation_recipe(net, name, run, {})
    transform = eval_transform(net, recipe, own=run is None)
    views = Views(tta, transform)
    backbones.check_input(net, min(batch_size, len(paths)), tuple(transform.size), name, training=False)
    classes = output_names(net)
    accelerator = launch.accelerator(recipe, Path("."))
    net = views.averaged(launch.on_device(net, recipe, accelerator), recipe.multi_label).eval()

    def read(path: Path) -> Tensor | str:
        try:
            return views.transform(Picture(decoding.read(path), upright=recipe.exif_orientation), ())
        except decoding.BadImage as e:
            return str(e)

    # the filters of warnings belong to all threads, and ``decode`` puts them back for each image
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        for batch in (paths[start : start + batch_size] for start in range(0, len(paths), batch_size)):
            content = dict(zip(batch, readers.map(read, batch), strict=True))
            whole = {path: pixels for path, pixels in content.items() if isinstance(pixels, Tensor)}
            said: dict[Path, tuple[list[float], list[int]]] = {}
            present: dict[Path, list[str]] = {}
            if whole:
                x = images.normalise(torch.stack(list(whole.values())), recipe, accelerator.device)
                with accelerator.autocast() if accelerator.mixed_precision != "no" else contextlib.nullcontext():
                    logits = net(x).float()
                likely = logits.sigmoid() if recipe.multi_label else logits.softmax(1)
                top = likely.topk(min(top_k, logits.shape[1]))
                if recipe.multi_label:
                    rows = (likely >= THRESHOLD).tolist()
                    present = {p: list(itertools.compress(classes, row)) for p, row in zip(whole, rows, strict=True)}
                said = dict(zip(whole, zip(top.values.tolist(), top.indices.tolist(), strict=True), strict=True))
            for path in batch:
                probabilities, indices = said.get(path, ([], []))
                error = content[path] if path not in said else ""
                yield Prediction(path, [classes[i] for i in indices], probabilities, str(error), present.get(path))


def line(prediction: Prediction) -> str:
    """One line for people, whatever names hold."""
    if prediction.error:
        return printable(f"{shown(str(prediction.path))}: cannot be read: {prediction.error}")
    pairs = zip(prediction.labels, prediction.probabilities, strict=True)
    head = "" if prediction.present is None else f"{BETWEEN.join(prediction.present) or 'no label'}; "
    likely = ", ".join(f"{label} {probability:.4f}" for label, probability in pairs)
    return printable(f"{shown(str(prediction.path))}: {head}{likely}")


def as_csv(predictions: list[Prediction]) -> str:
    """A row for each image: ``path``, ``label``, ``probability``, ``label_2``, ``probability_2``, ..., ``error``.

    ``error`` says why an image cannot be read, and is empty else. Where images may have several labels, a column
    ``labels`` behind ``path`` has those that are present, joined by ``|``. All cells are quoted where one has a
    carriage return.
    """
    text = io.StringIO()
    several = any(found.present is not None for found in predictions)
    ranks = max([1, *(len(found.labels) for found in predictions)])
    columns = [f"{what}_{rank}" if rank > 1 else what for rank in range(1, ranks + 1) for what in ANSWER]
    names = ["path", *["labels"] * several, *columns, "error"]
    # readers take a carriage return for the end of a row, unless it is quoted
    words = (word for found in predictions for word in (str(found.path), *found.labels, found.error))
    quoting: Any = csv.QUOTE_ALL if any("\r" in word for word in words) else csv.QUOTE_MINIMAL
    rows = csv.DictWriter(text, names, restval="", lineterminator="\n", quoting=quoting)
    rows.writeheader()
    for found in predictions:
        row: dict[str, Any] = {"path": shown(str(found.path)), "error": found.error}
        row |= {"labels": BETWEEN.join(found.present or [])} if several else {}
        pairs = zip(found.labels, found.probabilities, strict=True)
        rows.writerow(row | dict(zip(columns, itertools.chain.from_iterable(pairs), strict=False)))
    return text.getvalue()


def as_jsonl(predictions: list[Prediction]) -> str:
    """A line for each image: path, and labels with probabilities, or the error; ``labels``: those that are present."""
    lines = []
    for found in predictions:
        pairs = zip(found.labels, found.probabilities, strict=True)
        said: dict[str, Any] = {} if found.present is None else {"labels": found.present}
        said |= {"predictions": [{"label": label, "probability": p} for label, p in pairs]}
        lines.append(json.dumps({"path": str(found.path)} | ({"error": found.error} if found.error else said)) + "\n")
    return "".join(lines)
