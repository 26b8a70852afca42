"""Test sets whose classes are ImageNet's, by name: how their folders are labelled, and how they are scored.

imagenet-a: Natural Adversarial Examples. Hendrycks, Zhao, Basart, Steinhardt, Song. CVPR 2021.
https://arxiv.org/abs/1907.07174. imagenet-r: The Many Faces of Robustness. Hendrycks et al. ICCV 2021.
https://arxiv.org/abs/2006.16241. Both have 200 of the thousand classes, and logits are restricted to these.
imagenet-v2: Do ImageNet Classifiers Generalize to ImageNet? Recht, Roelofs, Schmidt, Shankar. ICML 2019.
https://arxiv.org/abs/1902.10811; its folders are the numbers of the classes. imagenet-sketch: Learning Robust Global
Representations by Penalizing Local Predictive Power. Wang, Ge, Lipton, Xing. NeurIPS 2019.
https://arxiv.org/abs/1905.13549. real: Are we done with ImageNet? Beyer, Henaff, Kolesnikov, Zhai, van den Oord. 2020.
https://arxiv.org/abs/2006.07159: the validation images, each with all labels that people found right.

The lists of classes and the ReaL labels are those that timm carries.
"""

import json
import pkgutil
import posixpath
import re
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from mixup_recipes.data import zips
from mixup_recipes.data.classes import SYNSET, synsets
from mixup_recipes.data.identity import some
from mixup_recipes.data.splits import Split, load_split, relabelled
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.robustness.passes import Bench, Columns, percent
from mixup_recipes.runs.models import is_multi_label
from mixup_recipes.training import backbones
from mixup_recipes.training.evaluation import of_one, score
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

PARTIAL = {"imagenet-a": "imagenet_a", "imagenet-r": "imagenet_r"}
"""Subset -> what timm calls its list of 200 classes."""
NUMBERED, REAL = "imagenet-v2", "real"
SUBSETS = (*PARTIAL, NUMBERED, "imagenet-sketch", REAL)
FILE = re.compile(r"ILSVRC2012_val_(\d{8})(?=[._]|$)")
"""How ImageNet calls a validation image; the Hub's copy has the class behind the number."""


def thousand() -> list[str]:
    """ImageNet's synsets in the order of their numbers."""
    info: Any = ImageNetInfo()
    return list(info.label_names())


def of_timm(name: str) -> str:
    """A file that timm carries."""
    content = pkgutil.get_data("timm.data", f"_info/{name}")
    assert content is not None
    return content.decode()


def classes_of(subset: str) -> list[str]:
    """The synsets of a subset's classes."""
    return of_timm(f"{PARTIAL[subset]}_synsets.txt").split() if subset in PARTIAL else thousand()


def outputs_of(net: nn.Module) -> list[str] | None:
    """The synset of each output of a model whose classes are ImageNet's thousand; None for all other models.

    One without names of classes and with a thousand outputs has them in ImageNet's order.
    """
    known: Any = backbones.cfg_of(net).get("label_names")
    count: Any = net.num_classes
    found = synsets(known or None, count)
    return found if found is not None and sorted(found) == sorted(thousand()) else None


def check(net: nn.Module, name: str, subset: str) -> list[str]:
    """``outputs_of``. Raises ``UserError`` for a model of other classes, or several labels. ``name``: of the model."""
    outputs = None if is_multi_label(net) else outputs_of(net)
    if outputs is None:
        count: Any = net.num_classes
        raise UserError(
            f"--subset {subset} needs a model whose classes are ImageNet's thousand, and {name} has "
            f"{many(count, 'class')}" + (" of another kind" if count == 1000 else "")
        )
    return outputs


def load(recipe: Recipe, subset: str, outputs: list[str]) -> Split:
    """The images of a subset, labelled by the outputs of a model: its classes are the synsets of these.

    Raises ``UserError`` for folders that are called otherwise than those of the subset.
    """
    split = recipe.eval_split
    whole_folder = changed(recipe, train_split=split, holdout=recipe.holdout or 0.2)  # 0 would want a folder of splits
    found = load_split(whole_folder, split, recipe.max_eval_samples)
    told = synsets_of(found.classes, subset, f"dataset {recipe.dataset!r}, split {split!r}")
    place = {synset: i for i, synset in enumerate(outputs)}
    table = relabelled(found.table, recipe.label_column, [place[synset] for synset in told], outputs)
    whole = len(classes_of(subset))
    note = f"{len(told)} of the {whole} classes of {subset} have images" if len(told) < whole else ""
    return found._replace(table=table, classes=outputs, notes=found.notes + [note] * bool(note))


def synsets_of(classes: Sequence[str], subset: str, where: str) -> list[str]:
    """The synset that each class folder of a subset stands for, by its name."""
    known = classes_of(subset)
    names = {*known}
    if subset == NUMBERED:  # sorted as words, 10 would come before 2
        wrong = [name for name in classes if not (re.fullmatch(r"\d{1,4}", name) and int(name) < len(known))]
        expected = "numbers of classes, 0 to 999"
    else:
        wrong = [name for name in classes if name not in names]
        expected = f"WordNet ids such as {known[0]}, of its {len(known)} classes"
    if wrong:
        other = [name for name in SUBSETS[:-1] if name != subset and fits(classes, name)]
        hint = f"; they are called like those of {' and '.join(other)}" if other else ""
        raise UserError(f"{where}: expected class folders of {subset}, which are {expected}; got {some(wrong)}{hint}")
    return [known[int(name)] for name in classes] if subset == NUMBERED else list(classes)


def fits(classes: Sequence[str], subset: str) -> bool:
    """Whether classes are called like those of a subset."""
    if subset == NUMBERED:
        return all(re.fullmatch(r"\d{1,4}", name) and int(name) < 1000 for name in classes)
    return {*classes} <= {*classes_of(subset)} and all(map(SYNSET.fullmatch, classes))


# --------------------------------------------------------------------------------------------- scores


def score_subset(bench: Bench, subset: str, outputs: list[str]) -> tuple[dict[str, Any], Columns]:
    """Scores of a subset, and the columns of ``evaluation.predict``.

    Of A and R the scores over all outputs, and ``restricted_`` to those of the subset's classes, which is the published
    way. Of ReaL those by the data set's own labels, and ``real_top1`` and ``real_top5``, which count an answer as right
    where it is among the image's labels, over the ``real_count`` images that have some.
    """
    real = real_labels(bench.table, bench.recipe, outputs) if subset == REAL else None
    own_classes = {*classes_of(subset)}
    others = torch.tensor([synset not in own_classes for synset in outputs])

    def look(_index: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = bench.of_bytes(images)
        found = of_one(logits, labels)
        if subset in PARTIAL:
            restricted = of_one(logits.masked_fill(others.to(logits.device), -torch.inf), labels)
            found |= {f"restricted_{k}": v for k, v in restricted.items() if k != "label"}
        return found

    columns = bench.over(look)
    own = {k: v for k, v in columns.items() if not k.startswith("restricted_")}
    scores: dict[str, Any] = score(own)
    if subset in PARTIAL:
        restricted = {k: columns[f"restricted_{k}"] for k in ("top", "confidence", "nll")} | {"label": columns["label"]}
        scores |= {f"restricted_{k}": v for k, v in score(restricted).items() if k != "count"}
    if real is not None:
        scores |= by_real(columns["top"], [real[i] for i in columns["index"].tolist()])
    return scores, own


def real_labels(table: Any, recipe: Recipe, outputs: list[str]) -> list[list[int]]:
    """The outputs that are right for each image, by the name of its file; none for images without ReaL labels.

    Raises ``UserError`` for images that are not called like ImageNet's of validation.
    """
    every = json.loads(of_timm("imagenet_real_labels.json"))
    place = {synset: i for i, synset in enumerate(outputs)}
    here = [place[synset] for synset in thousand()]
    found, wrong = [], []
    for base in file_names(table, recipe.image_column):
        match = FILE.match(base)
        if match is None or not 1 <= int(match[1]) <= len(every):
            wrong.append(base or "an image without a name")
            continue
        found.append([here[k] for k in every[int(match[1]) - 1]])
    if wrong:
        raise UserError(
            f"dataset {recipe.dataset!r}: ReaL labels belong to names such as ILSVRC2012_val_00000001.JPEG; "
            f"{many(len(wrong), 'image is', 'images are')} called otherwise: {some(wrong)}"
        )
    return found


def file_names(table: datasets.Dataset, column: str) -> list[str]:
    """The name of each image's file, without folders; empty where it has none. No image is read."""
    column_of = table.select_columns([column])
    if isinstance(table.features[column], datasets.Value):
        return [posixpath.basename(zips.name_of(path)) for path in column_of[:][column]]
    path = f"{column}.path"
    return [posixpath.basename(name or "") for name in column_of.flatten().select_columns([path])[:][path]]


def by_real(top: np.ndarray, labels: list[list[int]]) -> dict[str, Any]:
    """``real_top1``, ``real_top5`` in percent and ``real_count`` of predictions (N, 5), best first, by ReaL labels."""
    rows = [(said, right) for said, right in zip(top.tolist(), labels, strict=True) if right]
    if not rows:
        raise UserError("none of these images has ReaL labels")
    first = percent(np.array([said[0] in right for said, right in rows]))
    five = percent(np.array([bool({*said} & {*right}) for said, right in rows]))
    return {"real_top1": first, "real_top5": five, "real_count": len(rows)}
