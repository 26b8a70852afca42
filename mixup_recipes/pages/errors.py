"""The errors that a model was most confident of, as a sheet of pictures with the names of their files."""

import dataclasses
import io
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from mixup_recipes import files
from mixup_recipes.data.decoding import BadImage, decode
from mixup_recipes.data.opening import is_here
from mixup_recipes.data.origin import Origin, encoded, origin
from mixup_recipes.data.splits import load_split
from mixup_recipes.pages.fonts import drawable, fitting, font
from mixup_recipes.pages.markdown import prose
from mixup_recipes.recipe import Recipe
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError

MOST = 24
COLUMNS, SIDE, GAP, SMALL, LARGE = 6, 180, 12, 13, 17  # pictures in a row; the others in pixels
GREY, INK, RED = "#777777", "#222222", "#b03a00"


@dataclasses.dataclass(frozen=True)
class Error:
    """An image that the model takes for a class that it is not of."""

    row: int
    """In the evaluation split."""
    true: str
    said: str
    confidence: float
    file: str = ""
    """Its name, where the images are at hand and have names."""
    picture: Image.Image | None = None
    why: str = ""
    """Why there is no picture."""


def most_confident(columns: dict[str, NDArray], classes: list[str]) -> list[Error]:
    """Up to ``MOST`` errors by their confidence, then by how unlikely the label was, without files and pictures."""
    best, sure = columns["top"][:, 0], columns["confidence"]
    order = np.lexsort((columns["index"], -columns["nll"], -sure))
    wrong = order[(best != columns["label"])[order]][:MOST]
    return [
        Error(int(columns["index"][i]), classes[columns["label"][i]], classes[best[i]], float(sure[i])) for i in wrong
    ]


# --------------------------------------------------------------------------------------------- the images


def with_images(run: Run, found: list[Error]) -> tuple[list[Error], str]:
    """The errors with their files and pictures, and what to say of these; no pictures without the run's own images.

    Nothing is downloaded for them.
    """
    recipe = run.recipe_here
    try:
        if recipe.streaming:
            raise UserError("the run read a stream, whose images cannot be found again")
        if not is_here(recipe):
            raise UserError(f"dataset {recipe.dataset!r} is not on this machine")
        split = load_split(recipe, recipe.eval_split, recipe.max_eval_samples, like=run.data.classes)
        if change := run.data.difference(recipe.eval_split, split.identity, split.classes):
            raise UserError(f"the images here are not those of the run: {change}")
    except UserError as e:
        return found, f"No pictures: {e}."
    marked = run.data.splits[recipe.eval_split].get("fingerprint") and split.identity.get("fingerprint")
    note = (
        "" if marked else ("The run has no fingerprint of its images, so only their number and labels were compared.")
    )
    at = origin(split.table)
    return [with_image(error, split.table[error.row], recipe, at) for error in found], note


def with_image(error: Error, row: dict[str, Any], recipe: Recipe, at: Origin | None) -> Error:
    """An error with its file, and with its picture, small, or why there is none. ``at``: see ``origin``."""
    image = row[recipe.image_column]
    path = image if isinstance(image, str) else (image or {}).get("path") or ""
    folder = os.path.abspath(os.path.expanduser(recipe.dataset))
    file = os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path
    try:
        pixels = decode(encoded(image, at), upright=recipe.exif_orientation)
        whole = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    except BadImage as e:
        return dataclasses.replace(error, file=file, why=str(e))
    return dataclasses.replace(
        error, file=file, picture=ImageOps.contain(whole, (SIDE, SIDE), Image.Resampling.BICUBIC)
    )


# --------------------------------------------------------------------------------------------- the sheet


def write_sheet(found: list[Error], title: str, out: Path) -> None:
    """Draw the errors as a PNG, each as its picture, file, what the model says and how surely, and its class."""
    columns = min(COLUMNS, len(found))
    tile = (SIDE + GAP, SIDE + 3 * (SMALL + 4) + 2 * GAP)
    top = LARGE + 2 * GAP
    size = (max(columns, 3) * tile[0] + GAP, -(-len(found) // COLUMNS) * tile[1] + top)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), fitting(title, size[0] - 2 * GAP, LARGE), fill=INK, font=font(LARGE))
    for number, error in enumerate(found):
        left, upper = GAP + number % COLUMNS * tile[0], top + number // COLUMNS * tile[1]
        draw_error(sheet, pen, error, left, upper)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    files.write_into(out, buffer.getvalue())


def draw_error(sheet: Image.Image, pen: ImageDraw.ImageDraw, error: Error, left: int, top: int) -> None:
    """One tile."""
    if error.picture is None:
        pen.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill="#eeeeee", outline="#cccccc")
        why = "\n".join(textwrap.wrap(drawable(f"cannot be read: {error.why}"), 22, max_lines=8, placeholder=" …"))
        pen.multiline_text((left + 8, top + 8), why, fill=GREY, font=font(SMALL), spacing=4)
    else:
        place = (left + (SIDE - error.picture.width) // 2, top + (SIDE - error.picture.height) // 2)
        pen.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill="#f4f4f4")
        sheet.paste(error.picture, place)
    name = os.path.basename(error.file) or f"row {error.row}"
    sure = f" {100 * error.confidence:.1f} %"
    said = fitting(error.said, SIDE - font(SMALL).getlength(sure), SMALL) + sure
    lines = [(name, GREY), (said, RED), (f"is {error.true}", INK)]
    for number, (text, colour) in enumerate(lines):
        where = (left, top + SIDE + 4 + number * (SMALL + 4))
        pen.text(where, fitting(text, SIDE, SMALL), fill=colour, font=font(SMALL))


def sheet(run: Run, title: str, found: list[Error], folder: Path) -> tuple[list[Error], str]:
    """The errors with their files, drawn as ``errors.png`` where the images are at hand; and what a page says of it."""
    most, note = with_images(run, found)
    note = prose(note)
    if any(error.picture or error.why for error in most):
        write_sheet(
            most, f"{title}: the most confident errors, with the answers of the model in red", folder / "errors.png"
        )
        note = f"![The most confident errors](errors.png)\n\n{note}".rstrip()
    return most, note
