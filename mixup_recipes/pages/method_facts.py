"""What only torch can tell of a method: which networks it takes, what a loop hands over, and its picture.

``mixup-recipes methods draw`` writes ``model_cards/methods.csv`` and the pictures in ``docs/methods``; the pages are
made from them without torch.
"""

import copy
import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageDraw
from torch import nn

from mixers import Step, build, signature, weights
from mixers.registry import docstring
from mixup_recipes import files
from mixup_recipes.data import images
from mixup_recipes.pages import preview
from mixup_recipes.pages.method_page import NETWORKS, check, facts
from mixup_recipes.pages.methods import kinds, own, parse
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.known_weights import find_weights
from mixup_recipes.training.update import criterion
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

TRAINED = "efficientnet_lite0"  # what looks in the pictures, and the teacher
TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("test_resnet", {}),
    "vit": ("test_vit", {"dynamic_img_size": True}),
}
FIELDS = ["mixer", "needs", *NETWORKS, "seed", "looked"]
FRUIT = ("Galia-Melon", "Red-Delicious", "Watermelon")  # of the groceries, three that are told apart at a glance
PHOTOS, SEEDS = len(FRUIT), 20
WORDS = {"Galia-Melon": "melon", "Red-Delicious": "apple", "Watermelon": "watermelon"}
SIDE_TEXT = 60  # pixels of the three lines under a tile of an overview
QUALITY = 75  # of the JPEGs, some 35 KB each
TABLE = files.shipped("model_cards") / "methods.csv"


def tried(name: str, args: dict[str, Any]) -> dict[str, str]:
    """What a loop hands over, and whether ``setup`` takes a small CNN and a small ViT."""
    row = {"mixer": name, "needs": build(name, **args).needs}
    for key, (model, more) in TRIED.items():
        try:
            build(name, **args).setup(timm.create_model(model, num_classes=PHOTOS, **more))
            row[key] = "yes"
        except ValueError:
            row[key] = "no"
    return row


def trained() -> nn.Module:
    """The network that looks, with a new classifier that is the same each time. Raises ``UserError``."""
    model = weights.load(find_weights(TRAINED), TRAINED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.reset_classifier(PHOTOS)  # type: ignore[operator]
    return model


def shown(name: str, args: dict[str, Any], photos: preview.Photos, network: nn.Module) -> tuple[Recipe, preview.Row]:
    """A method on the photos, with the first draws that show it best.

    Best is where most photos and their labels change, and where a network that has to look did so most often.
    """
    plain: dict[str, Any] = {"dataset": preview.SYNTHETIC, "model": "test_resnet", "image_size": preview.SIDE}
    recipe = Recipe(name=name, mixer=name, mixer_args={name: preview.defaults(name) | args}, **plain)
    best: tuple[tuple[int, int, int], Recipe, preview.Row] | None = None
    for seed in range(SEEDS):
        recipe = dataclasses.replace(recipe, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of what setup draws
            made = preview.mixed(recipe, photos, step_on(network, recipe))
        own = made.shares.diagonal()
        differs = changed(made, photos)
        seen = (int((differs & (own > 0.1) & (own < 0.9)).sum()), made.looks, int(differs.sum()))
        if best is None or seen > best[0]:
            best = seen, recipe, made
        if seen[0] == PHOTOS and (made.looks == PHOTOS or build(name, **args).needs == "batch"):
            break
    assert best is not None
    return best[1], best[2]


def step_on(network: nn.Module, recipe: Recipe) -> Step | None:
    """The mixer on a copy of the trained network, or None where it takes no such network."""
    try:
        return Step(copy.deepcopy(network), build(recipe.mixer, **recipe.mixer_args[recipe.mixer]), criterion(recipe))
    except ValueError:
        return None


def changed(made: preview.Row, photos: preview.Photos) -> torch.Tensor:
    """(N,): which photos look otherwise than before; a level is the rounding of normalising them."""
    shrink = images.EvalTransform(preview.SIDE, preview.SIDE, "bicubic")
    before = torch.stack([shrink(image) for image in photos.images])
    return (made.pixels.int() - before.int()).abs().amax((1, 2, 3)) > 2


def fruit() -> preview.Photos:
    """The three photos of the groceries. Raises ``UserError`` where these are not prepared."""
    found = preview.table_photos(load_recipe("quickstart"), 14)  # one of each class
    at = [found.names.index(name) for name in FRUIT]
    return preview.Photos([found.images[i] for i in at], list(FRUIT), found.source)


def picture(recipe: Recipe, made: preview.Row, photos: preview.Photos) -> bytes:
    """A JPEG: the sheet of a preview without the line above it, which the page says in other words."""
    sheet = preview.draw([(recipe, made)], photos)
    return jpeg(sheet.crop((0, preview.HEAD, *sheet.size)))


def jpeg(image: Image.Image) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    return buffer.getvalue()


def saved(image: Image.Image, path: Path) -> Path:
    """Write an image to a JPEG file. Raises ``UserError`` for another ending."""
    if path.suffix.lower() not in (".jpg", ".jpeg"):
        raise UserError(f"{path}: expected a file that ends in .jpg")
    files.write_into(path, jpeg(image))
    return path


def write(rows: dict[str, dict[str, str]], table: Path) -> None:
    """The table, in the order of the methods."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in own() if name in rows)
    files.write(table, out.getvalue())


def draw(names: list[str], photos: str | None, folder: Path, table: Path = TABLE) -> str:
    """Try methods and draw their pictures, all of ours when none is named; returns a line that says what was made.

    ``photos``: as for a preview; None for the groceries. Rows of ``table`` of other methods stay. Raises ``UserError``.
    """
    for name in names:
        check(name)
        if name not in own():
            raise UserError(f"{name} is not a method of this package, and only these have pages; see: methods show")
    given = fruit() if photos is None else preview.find_photos(Recipe(dataset=preview.SYNTHETIC), photos, PHOTOS)
    network = trained()
    rows, drawn = {name: row for name, row in facts().items() if name in own()}, 0
    for name in names or own():
        teacher = signature(name).parameters.get("teacher")
        args = {"teacher": TRAINED} if teacher and teacher.default else {}
        recipe, made = shown(name, args, given, network)
        row, path = tried(name, args), folder / f"{name}.jpg"
        row |= {"seed": "", "looked": ""}
        if changed(made, given).any():
            looks = ["teacher"] * bool(args)
            if "feature" not in kinds(parse(docstring(name)))[0]:  # that goes through the network and looks at nothing
                looks += [note.split()[1] for note in made.notes if note.endswith("trained model")]
            row |= {"seed": str(recipe.seed), "looked": next(iter(looks), "")}
            files.write_into(path, picture(recipe, made, given))
            drawn += 1
        else:
            path.unlink(missing_ok=True)
        rows[name] = row
        write(rows, table)  # at once: a method that fails takes nothing with it
    return f"{table}: {many(len(names or own()), 'method')}; {folder}: {many(drawn, 'picture')} ({given.source})"


def overview(names: list[str], columns: int = 6) -> Image.Image:
    """A tile for each method: one photo that it mixed, its name, and the label of the mixed photo.

    Of the photos of the groceries it is the one whose label is divided most evenly. Raises ``UserError`` for an unknown
    method, or one that leaves the photos as they are.
    """
    photos, network = fruit(), trained()
    down, across = SIDE_TEXT + preview.SIDE + 2 * preview.GAP, preview.SIDE + preview.GAP
    size = columns * across - preview.GAP, math.ceil(len(names) / columns) * down - 2 * preview.GAP
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(names):
        check(name)
        teacher = signature(name).parameters.get("teacher")
        _, made = shown(name, {"teacher": TRAINED} if teacher and teacher.default else {}, photos, network)
        differs, own_share = changed(made, photos), made.shares.diagonal()
        if not differs.any():
            raise UserError(f"{name} changes no photo, so there is nothing to show; leave it out")
        best = int((own_share - 0.5).abs().masked_fill(~differs, 1).argmin())
        (row, column), shares = divmod(place, columns), made.shares[best]
        x, y = column * across, row * down
        sheet.paste(preview.picture(made.pixels[best], preview.SIDE), (x, y))
        preview.write(pen, (x, y + preview.SIDE + 3), name, preview.SIDE, 18)
        parts = [
            f"{shares[i]:.2f} {WORDS[FRUIT[int(i)]]}" for i in shares.argsort(descending=True) if shares[i] > 0.005
        ]
        for line, text in enumerate(parts[:2]):
            preview.write(pen, (x, y + preview.SIDE + 24 + 17 * line), text, preview.SIDE, 14, "dimgray")
    return sheet
