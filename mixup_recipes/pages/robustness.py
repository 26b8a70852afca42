"""What the suite of robustness found, as tables and as a sheet of examples."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mixup_recipes import files
from mixup_recipes.pages.fonts import fitting, font
from mixup_recipes.pages.markdown import code, escaped, line, markdown_table, prose
from mixup_recipes.robustness.corruptions import GROUPS
from mixup_recipes.robustness.examples import Row
from mixup_recipes.runs import robustness_file
from mixup_recipes.runs.robustness_file import Keys, at
from mixup_recipes.runs.run import Run, labels
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

Lines = list[tuple[str, Keys]]
"""What a number is called, and where it stands in ``robustness.json``."""
CLEAN: Lines = [
    ("as they are: top-1", ("clean", "top1")),
    ("as they are: top-5", ("clean", "top5")),
    ("as they are: NLL", ("clean", "nll")),
    ("as they are: ECE", ("clean", "ece")),
]
CORRUPTIONS: Lines = [
    ("corruptions: mean error", ("corruptions", "mean")),
    ("corruptions: mCE, AlexNet 100", ("corruptions", "mce")),
    *((f"corruptions, {group}: mean error", ("corruptions", "groups", group)) for group in GROUPS),
]
OCCLUSION: Lines = [
    *((f"{share:.0%} occluded: top-1", ("occlusion", "accuracy", str(share))) for share in (0.3, 0.5, 0.7)),
    ("occlusion from 0 to 90 %: mean top-1", ("occlusion", "auc")),
]
CALIBRATION: Lines = [
    ("fitted temperature", ("calibration", "temperature")),
    ("half of the images: ECE", ("calibration", "before", "ece")),
    ("half of the images: ECE at that temperature", ("calibration", "after", "ece")),
    ("half of the images: NLL", ("calibration", "before", "nll")),
    ("half of the images: NLL at that temperature", ("calibration", "after", "nll")),
    *(
        (f"mixed by {title}: {words}", ("calibration", kind, key))
        for kind, title in (("mixup", "Mixup"), ("cutmix", "CutMix"))
        for key, words in (("top1", "larger label is top-1"), ("ece", "ECE"))
    ),
]
OOD: Lines = [
    (f"second data set by {title}: {words}", ("ood", score, key))
    for score, title in (("max_softmax", "max softmax"), ("energy", "energy"))
    for key, words in (("auroc", "AUROC"), ("fpr95", "FPR at 95 % TPR"), ("aupr", "AUPR"))
]
PLAIN = ("nll", "temperature")
"""Numbers with three digits; all others are in percent."""


def attacks(found: Sequence[dict[str, Any]]) -> Lines:
    """The lines of all budgets of attacks that any of several results has."""
    lines: dict[str, Keys] = {}
    for kind in ("fgsm", "pgd"):
        tables = [content.get("attacks", {}).get(kind) for content in found]
        budgets = {eps for table in tables if isinstance(table, dict) for eps in table}
        for eps in sorted(budgets, key=lambda eps: (len(eps), eps)):
            lines[f"{kind.upper()}, {eps}/255: top-1"] = ("attacks", kind, eps)
    return list(lines.items())


def rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each number that any of several results has, a column for each of these."""
    made = []
    for words, keys in [*CLEAN, *attacks(found), *CORRUPTIONS, *OCCLUSION, *CALIBRATION, *OOD]:
        values = [at(content, keys) for content in found]
        digits = 3 if keys[-1] in PLAIN else 2
        if any(value is not None for value in values):
            made.append([words, *("-" if value is None else f"{value:.{digits}f}" for value in values)])
    return made


def corruption_rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each corruption: its mean error over the severities in each of several results."""
    made = []
    for name in (name for group in GROUPS.values() for name in group):
        cells = []
        for content in found:
            table = content.get("corruptions", {}).get("errors")
            errors = table.get(name) if isinstance(table, dict) else None
            cells.append(f"{np.mean(errors):.2f}" if isinstance(errors, list) and errors else "-")
        if {*cells} != {"-"}:
            made.append([f"{name.replace('_', ' ')}: mean error", *cells])
    return made


def notes(content: dict[str, Any]) -> Iterator[str]:
    """What a reader needs to know about the numbers of one result, in sentences."""
    data = content["data"]
    yield (
        f"Measured on {many(content['clean']['count'], 'image')} of the split {code(data['split'])} of "
        f"{code(data['dataset'])}."
    )
    yield (
        "Numbers are in percent, except NLL (in nats) and the temperature. All that is random follows from seed "
        f"{content['seed']}."
    )
    if at(content, ("corruptions", "mean")) is not None and at(content, ("corruptions", "mce")) is None:
        yield (
            "There is no mCE, because AlexNet's errors are known only for ImageNet's thousand classes, each with an "
            "image, at 224 pixels. The mean error is given instead."
        )
    second = content.get("ood", {}).get("data")
    if isinstance(second, dict):
        images = at(content, ("ood", "images")) or 0
        yield f"The second data set has {many(int(images), 'image')} of {code(second.get('dataset'))}."


def table(content: dict[str, Any]) -> str:
    """All numbers of one result as a Markdown table, and what they are."""
    head = ["robustness", escaped(line(content["model"]))]
    shown = markdown_table(head, rows([content]) + corruption_rows([content]), right=1)
    return f"{shown}\n\n{' '.join(notes(content))}\n"


# --------------------------------------------------------------------------------------------- several runs


def side_by_side(places: Sequence[Path]) -> str:
    """Several results as a Markdown table, a column for each, and in which they were not measured alike.

    ``places``: run folders, or files that ``--output`` wrote. Raises ``UserError`` where one has no results.
    """
    if not places:
        raise UserError("no runs were given; pass run folders, or files that evaluate --suite robustness wrote")
    runs = [Run.open(place) for place in places if not place.is_file()]
    names = iter(labels(runs))
    titles = [place.stem if place.is_file() else next(names) for place in places]
    of_runs = iter(runs)
    found = [robustness_file.read(place) if place.is_file() else own(next(of_runs)) for place in places]
    head = ["robustness", *map(escaped, titles)]
    shown = markdown_table(head, rows(found) + corruption_rows(found), right=1)
    told = [" ".join(notes(content)) for content in found]
    same = len({*told}) == 1
    words = told[:1] if same else [f"{prose(title)}: {text}" for title, text in zip(titles, told, strict=True)]
    first, *others = found
    for title, content in zip(titles[1:], others, strict=True):
        if apart := differences(first, content):
            words.append(f"{prose(title)} cannot be compared with {prose(titles[0])}: {', '.join(apart)}.")
    return "\n\n".join([shown, *words]) + "\n"


def own(run: Run) -> dict[str, Any]:
    """The results of a run. Raises ``UserError`` where it has none, or where they are of other weights."""
    found = run.robustness
    again = f"mixup-recipes evaluate {run.folder} --suite robustness"
    if found is None:
        raise UserError(f"{run.folder} has no {robustness_file.NAME}; make it with {again}")
    if found.get("weights_sha256") != run.weights_hash:
        raise UserError(f"{run.folder / robustness_file.NAME} belongs to other weights; make it again with {again}")
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """In what two results were not measured alike, in words."""
    told = []
    keys = ("images", "labels_sha256", "fingerprint")
    if any(one["data"].get(key) != other["data"].get(key) for key in keys):
        told.append("the images differ")
    if one.get("transform") != other.get("transform"):
        told.append(f"the preparation of the images differs ({one.get('transform')}; {other.get('transform')})")
    for key, what in (("mixed_precision", "mixed precision"), ("device", "device")):
        if one.get(key) != other.get(key):
            told.append(f"the {what} differs ({one.get(key)}; {other.get(key)})")
    shared = one["budgets"].keys() & other["budgets"].keys()
    told += [
        f"the budgets of {part} differ" for part in sorted(shared) if one["budgets"][part] != other["budgets"][part]
    ]
    if "ood" in shared and one["ood"].get("data") != other["ood"].get("data"):
        told.append("the second data set differs")
    return told


def section(run: Run) -> str:
    """The section of a card; empty where the suite was not run."""
    found = run.robustness
    if found is None:
        return ""
    if found.get("weights_sha256") != run.weights_hash:
        return (
            "## Robustness\n\n`robustness.json` belongs to other weights, so nothing is known of the robustness of "
            "these."
        )
    text = ["## Robustness", markdown_table(["", "these weights"], rows([found]), right=1), " ".join(notes(found))]
    if each := corruption_rows([found]):
        inside = markdown_table(["corruption", "mean error"], each, right=1)
        text.append(f"<details><summary>Each corruption</summary>\n\n{inside}\n\n</details>")
    picture = run.folder / robustness_file.PICTURE
    if picture.is_file() and files.file_hash(picture) == found.get("picture_sha256"):  # not one of other results
        text.append(f"![images as the suite changes them, and what the model says]({robustness_file.PICTURE})")
    name = robustness_file.NAME
    text.append(f"Measured by `mixup-recipes evaluate RUN --suite robustness`. The budgets are in [{name}]({name}).")
    return "\n\n".join(text)


# --------------------------------------------------------------------------------------------- files


def before(path: Path, about: dict[str, Any], run: Run | None) -> dict[str, Any]:
    """What stands in a file already, whose parts stay beside new ones; empty where there is no file.

    ``about``: what the new results are of. Results that a ``run`` has of weights before its own are given up, since the
    card does not show them. Raises ``UserError`` where the others were not measured alike.
    """
    if not path.is_file():
        return {}
    old = robustness_file.read(path)
    which = "weights_sha256" if run else "model"
    other = old.get(which) != about[which]
    if run and other and path == run.folder / robustness_file.NAME:
        return {}
    apart = ["the weights differ"] * other + differences(old, about | {"budgets": {}})
    if apart:
        raise UserError(
            f"new results cannot be added to {path}: {', '.join(apart)}; pass --output FILE.json to write another "
            "file, or remove this one"
        )
    return old


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Results of before, and new ones in place of the same parts."""
    return old | new | {"budgets": old.get("budgets", {}) | new["budgets"]}


def write(content: dict[str, Any], examples: list[Row], path: Path) -> str:
    """Write the results to a JSON file and the sheet of examples beside it; returns the table."""
    picture = path.with_suffix(".png")
    drawn = sheet(examples, f"{line(content['model'])}: right answers are green, wrong ones are red")
    files.write(picture, drawn)
    files.write_json(path, content | {"picture_sha256": hashlib.sha256(drawn).hexdigest()})
    return f"{table(content)}\n{path}\n{picture}"


SIDE, GAP, SMALL, LARGE = 128, 12, 13, 17  # pixels
GREY, INK, GREEN, RED = "#777777", "#222222", "#1a7f37", "#b03a00"


def sheet(examples: list[Row], title: str) -> bytes:
    """A PNG: a row for each image, a column for each change, and below each picture what the model says."""
    columns = max(len(row.examples) for row in examples)
    tile, top = (SIDE + GAP, SIDE + 2 * (SMALL + 4) + GAP), 2 * GAP + LARGE + SMALL + 4
    size = (columns * tile[0] + GAP, len(examples) * tile[1] + top + GAP)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    pen.text((GAP, GAP), fitting(title, size[0] - 2 * GAP, LARGE), fill=INK, font=font(LARGE))
    for column, example in enumerate(examples[0].examples):
        where = (GAP + column * tile[0], top - SMALL - 6)
        pen.text(where, fitting(example.title, SIDE, SMALL), fill=GREY, font=font(SMALL))
    for number, row in enumerate(examples):
        for column, example in enumerate(row.examples):
            left, upper = GAP + column * tile[0], top + number * tile[1]
            picture = Image.fromarray(example.pixels.permute(1, 2, 0).contiguous().numpy())
            page.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, upper))
            sure = f" {100 * example.confidence:.0f} %"
            said = fitting(example.said, SIDE - font(SMALL).getlength(sure), SMALL) + sure
            pen.text((left, upper + SIDE + 2), said, fill=GREEN if example.right else RED, font=font(SMALL))
            if column == 0:
                pen.text(
                    (left, upper + SIDE + SMALL + 6), fitting(f"is {row.name}", SIDE, SMALL), fill=INK, font=font(SMALL)
                )
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
