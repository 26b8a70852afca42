"""A trained model as one file for deployment, which is held against the model and its run before it is written."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixup_recipes import __version__, fetch
from mixup_recipes.data.decoding import BadImage
from mixup_recipes.data.images import EvalTransform
from mixup_recipes.data.origin import encoded, origin
from mixup_recipes.data.picture import Picture
from mixup_recipes.data.prepare import PREPARED
from mixup_recipes.data.splits import load_split
from mixup_recipes.files import file_hash, write
from mixup_recipes.metrics.multi_label.formula import THRESHOLD
from mixup_recipes.recipe import Recipe
from mixup_recipes.runs.models import eval_transform, evaluation_recipe, open_model, output_names
from mixup_recipes.runs.portable import FORMATS, Answer, Classifier
from mixup_recipes.runs.run import Run
from mixup_recipes.training import backbones
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

TIMES = (1, 3)  # images at a time, random ones: the number is free
MOST, BATCH = 256, 32  # images of the run's evaluation, and how many at a time
# How far numbers may lie apart, as a share of the largest logit. The file's logits from the model's, where sums are
# taken in another order; its log-probabilities from those of the run's evaluation, by the precision of that one.
SAME = 1e-4
ROUNDING = {"no": 0.005, "fp16": 0.01, "bf16": 0.03}  # "no" on a GPU may have multiplied in TF32


class Evaluated(NamedTuple):
    """Images of a run's evaluation, and what the run said of them."""

    images: Tensor
    """uint8 (N, 3, H, W)."""
    columns: dict[str, Tensor]
    """Of ``predictions.safetensors``."""


def deploy(name: str, format: str | None, out: Path) -> str:
    """``mixup-recipes export``: write the file; returns what it is, how it was checked, and an example of its use.

    ``name``: a run folder, timm name or ``hf-hub:owner/name``. ``format``: one of ``FORMATS``, None: by the ending of
    ``out``. Raises ``UserError``, and then leaves ``out`` alone.
    """
    format = checked_format(format, out)
    net, run = open_model(name)
    recipe = evaluation_recipe(net, name, run, {})
    transform = eval_transform(net, recipe, own=run is None)
    size = tuple(transform.size)
    backbones.check_input(net, max(TIMES), size, name, training=False)
    metadata = metadata_of(name, run, net, recipe, transform)
    classifier = Classifier(net, recipe.mean, recipe.std, recipe.multi_label)
    say(f"writing {name} as {format}")
    try:
        content = FORMATS[format].write(classifier, size, metadata)
        checks = check(classifier, FORMATS[format].open(content), run, transform)
    except Exception as e:  # what an exporter or a runtime raises is up to it
        raise UserError(f"{name} cannot be written as {format}: {' '.join(str(e).split())[:300]}") from None
    write(out, content)
    what = f"{metadata['architecture']} of {many(len(metadata['class_names']), 'class')}"
    about = f"{out}: {what}, {len(content) / 1e6:.1f} MB"
    graph = [f"{part:8}{metadata[part]}" for part in ("input", "output")]
    return "\n".join(
        (
            about,
            *graph,
            *(f"checked {line}" for line in checks),
            "",
            example(format, out, transform, recipe.exif_orientation, recipe.multi_label),
        )
    )


def say(text: str) -> None:
    """What the command is at; the result alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def checked_format(format: str | None, out: Path) -> str:
    """The format that is asked for. Raises ``UserError`` unless it can be written, to ``out``, on this machine."""
    endings = {found.ending: name for name, found in FORMATS.items()}
    if format is None and out.suffix not in endings:
        which = ", ".join(f"{ending} ({name})" for ending, name in endings.items())
        raise UserError(f"{out}: the ending of the name chooses the format; expected one of {which}, or --format")
    format = format or endings[out.suffix]
    if out.suffix != FORMATS[format].ending:
        raise UserError(f"{format}: expected a file name that ends in {FORMATS[format].ending}, got {out}")
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    if any(importlib.util.find_spec(package) is None for package in FORMATS[format].packages):
        raise UserError(f"export to {format} needs: pip install 'mixup-recipes[export]'")
    return format


def metadata_of(name: str, run: Run | None, net: nn.Module, recipe: Recipe, transform: EvalTransform) -> dict[str, Any]:
    """What goes with the graph: how a picture becomes ``pixels``, what the outputs are called, where it is all from."""
    height, width = transform.size
    classes = output_names(net)
    weights = (run.folder if run else Path(name)) / "model.safetensors"
    return {
        "made_by": f"mixup-recipes {__version__}",
        "weights": name if fetch.is_hub(name) or not Path(name).is_dir() else Path(name).resolve().name,
        **({"weights_sha256": file_hash(weights)} if weights.is_file() else {}),
        **({"recipe": run.recipe.name} if run else {}),
        "architecture": backbones.cfg_of(net)["architecture"],
        "input": f"pixels: float32 (N, 3, {height}, {width}), RGB from 0 to 1, not normalised",
        "output": f"probabilities: float32 (N, {len(classes)}), an image may have several labels"
        if recipe.multi_label
        else f"logits: float32 (N, {len(classes)}), before the softmax",
        **({"multi_label": True} if recipe.multi_label else {}),
        "resize": transform.resize,
        "interpolation": transform.interpolation,
        "crop": "center",
        "input_size": [height, width],
        "mean": recipe.mean,
        "std": recipe.std,
        "normalisation": "inside: (pixels - mean) / std",
        "orientation": "turned by EXIF" if recipe.exif_orientation else "as stored",
        "class_names": classes,
    }


def check(classifier: Classifier, answer: Answer, run: Run | None, transform: EvalTransform) -> list[str]:
    """How the file was held against the model and against its run, in words. Raises ``UserError`` where they differ."""
    say("checking it against the model")
    pixels = torch.rand(sum(TIMES), 3, *transform.size, generator=torch.Generator().manual_seed(0))
    for some in pixels.split(TIMES):
        same_logits(classifier, answer, some)
    lines = [
        f"on batches of {' and '.join(map(str, TIMES))} random images: its {classifier.output} agree with those of "
        "the model"
    ]
    found = evaluated(run, transform)
    if run is None or isinstance(found, str):
        return [*lines, f"without predictions of a run: {found}"]
    say(f"checking it against the run's predictions for {many(len(found.images), 'image')}")
    return [*lines, agreement(classifier, answer, run, found)]


def same_logits(classifier: Classifier, answer: Answer, pixels: Tensor) -> Tensor:
    """The output of the file. Raises ``UserError`` when it is not that of the model."""
    expected, found = classifier(pixels), answer(pixels)
    if found.shape != expected.shape:
        raise UserError(f"it gives {tuple(found.shape)} for {many(len(pixels), 'image')}, not {tuple(expected.shape)}")
    apart, most = (found - expected).abs().max().item(), expected.abs().max().item()
    if not apart <= SAME * most:  # nan is not
        raise UserError(
            f"its {classifier.output} differ from the model's by up to {apart:.2g}; the largest of the model's is "
            f"{most:.2g}"
        )
    return found


def evaluated(run: Run | None, transform: EvalTransform) -> Evaluated | str:
    """Up to ``MOST`` images of a run's evaluation and what it said of them, or why they cannot be had."""
    if run is None:
        return "the model is not a run folder"
    recipe = run.recipe_here
    if recipe.dataset not in PREPARED and not Path(recipe.dataset).expanduser().exists():
        return f"its data, {recipe.dataset}, are not on this machine"
    split = recipe.eval_split
    try:
        columns = run.predictions
        found = load_split(recipe, split, recipe.max_eval_samples, like=run.data.classes)
        if not run.data.splits[split].get("fingerprint"):
            return "the run has no fingerprint of its data"
        if other := run.data.difference(split, found.identity, found.classes):
            return f"the data of the run have changed: {other}"
        drawn = np.random.default_rng(0).permutation(len(columns["index"]))[:MOST]  # the first may be of one class
        some = {name: torch.from_numpy(column[np.sort(drawn)]) for name, column in columns.items()}
        at = origin(found.table)
        rows = [found.table[index] for index in some["index"].tolist()]
        images = [
            transform(Picture(encoded(row[recipe.image_column], at), upright=recipe.exif_orientation)) for row in rows
        ]
    except (UserError, BadImage) as e:
        return str(e)
    return Evaluated(torch.stack(images), some)


def agreement(classifier: Classifier, answer: Answer, run: Run, given: Evaluated) -> str:
    """How the file agrees with the run's predictions, in words. Raises ``UserError`` where by more than rounding."""
    logits = torch.cat([same_logits(classifier, answer, some / 255) for some in given.images.split(BATCH)])
    what = f"{many(len(logits), 'image')} of split {run.recipe.eval_split!r}"
    rounding = ROUNDING[run.recipe.mixed_precision]
    if run.recipe.multi_label:
        return agreement_of_several(logits, given.columns["score"], rounding, what)
    log_p = logits.log_softmax(1)
    label, top = given.columns["label"].long(), given.columns["top"][:, 0].long()
    right, said = (log_p.gather(1, column[:, None])[:, 0] for column in (label, top))
    limit = rounding * logits.abs().max()
    other, apart = int((log_p.max(1).values - said > limit).sum()), (given.columns["nll"] + right).abs().max()
    if other or not apart <= limit:
        raise UserError(
            f"of {what}, {other} get another class than in predictions.safetensors, and the NLL of an image differs "
            f"by up to {apart:.2g}; were the weights or the recipe changed?"
        )
    tied = int((log_p.argmax(1) != top).sum())
    rest = f", and {tied} get another class that is as likely within rounding" if tied else ""
    return f"on {what}: {len(logits) - tied} get the class of predictions.safetensors{rest}"


def agreement_of_several(found: Tensor, noted: Tensor, rounding: float, what: str) -> str:
    """How probabilities (N, K) agree with those that a run noted, in words. Raises as ``agreement`` does.

    ``rounding``: of logits, as a share of the largest; the slope of a sigmoid is at most a quarter.
    """
    apart, limit = (found - noted).abs().max(), rounding * found.double().logit(1e-9).abs().max() / 4
    if not apart <= limit:
        raise UserError(
            f"on {what}, the probabilities differ from those of predictions.safetensors by up to {apart:.2g}; were "
            "the weights or the recipe changed?"
        )
    same = int(((found >= THRESHOLD) == (noted >= THRESHOLD)).all(1).sum())
    return f"on {what}: {same} get the labels of predictions.safetensors, and all probabilities agree within rounding"


def example(format: str, out: Path, transform: EvalTransform, upright: bool = False, several: bool = False) -> str:
    """A program that asks the file about a photo. ``upright``: turned as its camera noted it.

    ``several``: the photo may have several labels.
    """
    photo = 'ImageOps.exif_transpose(Image.open("photo.jpg"))' if upright else 'Image.open("photo.jpg")'
    use, (height, width) = FORMATS[format].use, transform.size
    cover = transform.resize if isinstance(transform.resize, tuple) else (transform.resize,) * 2
    method = f"Image.Resampling.{transform.interpolation.upper()}"
    ask, answer = use.ask, f"{use.names}[logits[0].argmax()]"
    if several:
        ask = ask.replace("logits", "probabilities")
        answer = f"[name for name, p in zip({use.names}, probabilities[0]) if p >= {THRESHOLD}]"
    return f"""\
import json
import numpy as np
import {use.package}
from PIL import Image, ImageOps

{use.load.replace("FILE", json.dumps(str(out), ensure_ascii=False))}
photo = ImageOps.cover({photo}.convert("RGB"), {cover[::-1]}, {method})
left, top = round((photo.width - {width}) / 2), round((photo.height - {height}) / 2)
pixels = np.asarray(photo, np.float32)[None, top : top + {height}, left : left + {width}].transpose(0, 3, 1, 2) / 255
{ask}
print({answer})"""
