"""What mixers do to a few images, before any training: a contact sheet of methods by images."""

import copy
import functools
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mixers import Step, build, signature, taps
from mixers.base import Plan, plan_alone
from mixers.registry import usable
from mixup_recipes import files
from mixup_recipes.data import images, prepare
from mixup_recipes.data.decoding import BadImage, decode, read, to_tensor
from mixup_recipes.data.origin import encoded, origin
from mixup_recipes.data.pictures import check_png, to_uint8
from mixup_recipes.data.splits import load_split
from mixup_recipes.fetch import is_hub
from mixup_recipes.mixer_args import check_mixer_name, counting
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe, resolve
from mixup_recipes.runs.run import RECIPE, Run
from mixup_recipes.training import known_weights  # noqa: F401  names of teachers
from mixup_recipes.training.update import criterion
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

SIDE = 128  # pixels of a picture on the sheet; the patches of the small transformer fit
GAP, EDGE, HEAD, TITLE, CAPTION = 8, 24, 40, 30, 36
COLUMN, ROW = SIDE + GAP, TITLE + SIDE + CAPTION
WIDEST = 1500  # pixels: many methods of a few images stand in blocks side by side
SYNTHETIC = "synthetic"


class Photos(NamedTuple):
    """Images to mix: uint8 (3, H, W) of any size, a name for each, and where they come from."""

    images: list[Tensor]
    names: list[str]
    source: str


def preview(names: list[str], mixers: list[str], count: int, photos: str | None, path: Path) -> str:
    """Write the sheet as a PNG; returns a line that says what it shows.

    One row per recipe in ``names``, or with ``mixers`` per mixer under the first recipe's setting; without recipes
    per mixer (all, when none is named) with its published defaults. ``photos``: a folder of images, turned as the
    camera noted it where the first recipe says so or there is none, "synthetic" for drawn shapes, None for the first
    recipe's own data when they are on this machine, else the prepared groceries, else shapes. Column i shows image i in
    update i of the recipe's seed, so that each has a draw of its own. Raises ``UserError``.
    """
    check_png(path)
    rows = chosen(names, mixers)
    missing = [] if names or mixers else [recipe.mixer for recipe in rows if not teacher_there(recipe)]
    rows = [recipe for recipe in rows if recipe.mixer not in missing]
    if not 2 <= count <= 32:
        raise UserError(f"images: expected 2 to 32, got {count}")
    given = find_photos(rows[0], photos, count)
    sheet = draw([(recipe, mixed(recipe, given)) for recipe in rows], given)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    files.write(path, buffer.getvalue())
    without = f"; without the weights of their teachers: {' '.join(missing)}" if missing else ""
    return f"{path}: {many(len(rows), 'method')} by {many(len(given.images), 'image')} ({given.source}){without}"


def chosen(names: list[str], mixers: list[str]) -> list[Recipe]:
    """A recipe for each row."""
    for name in mixers:
        check_mixer_name(name)
    if names and mixers:
        if len(names) > 1:
            raise UserError(f"--mixers takes its setting from one recipe, got {len(names)}: {' '.join(names)}")
        setting = str(Run.open(names[0]).folder / RECIPE) if is_run(names[0]) else names[0]
        return [resolve(setting, {"mixer": mixer, "name": mixer})[0] for mixer in mixers]
    if names:
        return [recipe_of(name) for name in names]
    plain: dict[str, Any] = {"dataset": SYNTHETIC, "model": "test_resnet", "image_size": SIDE}
    return [Recipe(name=m, mixer=m, mixer_args={m: defaults(m)}, **plain) for m in mixers or usable()]


def is_run(name: str) -> bool:
    """Whether a name is a run folder or a run on the Hub, and not a recipe."""
    return is_hub(name) or Path(name).is_dir()


def recipe_of(name: str) -> Recipe:
    """The recipe of a run, or of a recipe's name."""
    return Run.open(name).recipe if is_run(name) else load_recipe(name)


def teacher_there(recipe: Recipe) -> bool:
    """Whether a mixer with a trained teacher can have it; True for a mixer without."""
    teacher = recipe.mixer_args[recipe.mixer].get("teacher")
    try:
        return teacher is None or taps.pretrained(teacher) is not None
    except taps.NoWeights:
        return False


def defaults(mixer: str) -> dict[str, Any]:
    """A mixer's published defaults."""
    return {name: p.default for name, p in signature(mixer).parameters.items() if p.default is not p.empty}


# --------------------------------------------------------------------------------------------- images


def find_photos(recipe: Recipe, photos: str | None, count: int) -> Photos:
    """``count`` images of as many classes as there are, always the same ones."""
    if photos == SYNTHETIC:
        return shapes(count)
    if photos is not None:
        return folder_photos(Path(photos).expanduser(), count, recipe.exif_orientation or recipe.dataset == SYNTHETIC)
    if Path(recipe.dataset).expanduser().exists():
        return table_photos(recipe, count)
    if recipe.dataset in prepare.PREPARED and prepare.find_prepared(recipe.dataset):
        return table_photos(recipe, count)
    if prepare.find_prepared("groceries"):
        return table_photos(load_recipe("quickstart"), count)
    return shapes(count)


def varied(labels: Sequence[int | str], count: int) -> list[int]:
    """Positions of the first image of each class, then of the second, and so on."""
    seen: Counter[int | str] = Counter()
    turn = []
    for label in labels:
        turn.append(seen[label])
        seen[label] += 1
    return sorted(range(len(labels)), key=lambda i: (turn[i], labels[i], i))[:count]


def table_photos(recipe: Recipe, count: int) -> Photos:
    """Images of the recipe's training split."""
    if recipe.multi_label:
        raise UserError(f"{recipe.name}: its images may have several labels, and a preview shows one; pass --photos")
    split = load_split(recipe, recipe.train_split, None)
    labels, at = [int(label) for label in split.table[recipe.label_column]], origin(split.table)
    found: list[tuple[Tensor, str]] = []
    for i in varied(labels, len(labels)):
        try:
            content = encoded(split.table[i][recipe.image_column], at)
            found.append((decode(content, upright=recipe.exif_orientation), split.classes[labels[i]]))
        except BadImage:
            continue
        if len(found) == count:
            break
    return several(found, f"dataset {recipe.dataset}")


def folder_photos(folder: Path, count: int, upright: bool) -> Photos:
    """Images of a folder, named by their class folder, or by their own name when there are none.

    ``upright``: turned as the camera noted it.
    """
    if not folder.is_dir():
        raise UserError(f"photos: expected a folder of images or {SYNTHETIC!r}, got {str(folder)!r}")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    names = [p.stem if p.parent == folder else p.parent.name for p in files]
    found: list[tuple[Tensor, str]] = []
    for i in varied(names, len(names)):
        try:
            found.append((decode(read(files[i]), upright=upright), names[i]))
        except BadImage:
            continue
        if len(found) == count:
            break
    return several(found, f"photos of {folder}")


def several(found: list[tuple[Tensor, str]], source: str) -> Photos:
    """Raise ``UserError`` when there is nothing to mix."""
    if len(found) < 2:
        raise UserError(f"{source}: expected at least 2 images that can be read, found {len(found)}")
    return Photos([image for image, _ in found], [name for _, name in found], source)


def shapes(count: int, side: int = 224) -> Photos:
    """Coloured shapes, drawn here: free of anyone's rights, and the same everywhere."""
    kinds = {"disc": 0, "triangle": 3, "square": 4, "pentagon": 5, "star": 10, "hexagon": 6, "ring": 0, "diamond": 4}
    made, names = [], []
    big = 4 * side  # drawn four times as large: smooth edges
    for i in range(count):
        name, corners = list(kinds.items())[i % len(kinds)]
        hue = int(255 * (i * 0.381966 % 1))  # the golden ratio keeps neighbours apart
        paper, ink, second = (
            Image.new("HSV", (1, 1), (h % 256, s, v)).convert("RGB").getpixel((0, 0))
            for h, s, v in ((hue, 90, 245), (hue + 128, 200, 200), (hue + 60, 160, 150))
        )
        image = Image.new("RGB", (big, big), paper)
        pen = ImageDraw.Draw(image)
        for stripe in range(0, big, big // 8):  # a background by which a box is seen too
            line = [(stripe, 0), (stripe, big)] if i % 2 else [(0, stripe), (big, stripe)]
            pen.line(line, fill=second, width=big // 100)
        around = [0.36 * big * (0.45 if name == "star" and k % 2 else 1) for k in range(corners)]
        start = -math.pi / 2 + (math.pi / 4 if name == "square" else 0)
        points = [
            (
                big / 2 + r * math.cos(start + 2 * math.pi * k / corners),
                big / 2 + r * math.sin(start + 2 * math.pi * k / corners),
            )
            for k, r in enumerate(around)
        ]
        box = (0.16 * big, 0.16 * big, 0.84 * big, 0.84 * big)
        if points:
            pen.polygon(points, fill=ink)
        elif name == "disc":
            pen.ellipse(box, fill=ink)
        else:
            pen.ellipse(box, outline=ink, width=big // 9)
        made.append(to_tensor(image.resize((side, side), Image.Resampling.LANCZOS)))
        names.append(name)
    return Photos(made, names, "drawn shapes")


# --------------------------------------------------------------------------------------------- mixing


class Row(NamedTuple):
    """One method: sample i as mixed in update i."""

    pixels: Tensor
    """uint8 (N, 3, S, S)."""
    shares: Tensor
    """(N, N): ``shares[i, j]`` is the share of image j in the label of sample i."""
    notes: list[str]
    looks: int
    """In how many updates a network looked."""


def mixed(recipe: Recipe, photos: Photos, given: Step | None = None) -> Row:
    """Mix the photos, one class each, so that the target tells the sources.

    ``given``: the recipe's mixer on a trained network, of as many classes as there are photos; else the network of
    ``step_for`` looks where one has to, which is not trained.
    """
    shrink = images.EvalTransform(recipe.image_size, recipe.image_size, "bicubic")
    x = images.normalise(torch.stack([shrink(image) for image in photos.images]), recipe, torch.device("cpu"))
    classes = len(x)
    if recipe.mixer_args[recipe.mixer].get("teacher") and not given:  # knows the classes of the recipe
        classes = max(classes, recipe.num_classes)
    y = torch.eye(classes)[: len(x)]
    step, notes, looks = given or step_for(recipe, classes), set(), 0
    results = []
    for update in range(len(x)):
        drawn = draw_plan(step, x, y, functools.partial(np.random.default_rng, (recipe.seed, update)))
        if drawn.looked:
            notes.add("by trained model" if given else "by untrained model")
            looks += 1
        with torch.no_grad():
            images_, target = step.mixer.mix(x, y, **drawn.plan)
        if in_features(step, x, y, images_, target):
            notes.add("mixes features")
        results.append((images_[update], target[update, : len(x)]))
    made, shares = (torch.stack(values) for values in zip(*results, strict=True))
    return Row(to_uint8(made, recipe), shares, sorted(notes), looks)


class Drawn(NamedTuple):
    """What a mixer decided for a batch."""

    plan: Plan
    looked: bool
    """Whether it looked at the network to decide."""


def draw_plan(step: Step, x: Tensor, y: Tensor, rng: Callable[[], np.random.Generator]) -> Drawn:
    """The plan of an update. ``rng``: makes the generator of the update, at its beginning each time.

    The step itself runs only where the mixer asks for more than the batch. A mixer with a history is shown as in its
    second update, behind one in which each image stood in the next one's place; ``step`` stays without a history.
    """
    plan = plan_alone(step.mixer, x, y, rng())
    if plan is not None:
        return Drawn(plan, False)
    if step.mixer.history_bytes(1, 1) > 0:
        step = copy.deepcopy(step)
        step(x.roll(1, 0), y.roll(1, 0), rng())
        step.mixer.after_step(step.model, 0.0)
        return Drawn(step(x, y, rng()).plan, False)
    return Drawn(step(x, y, rng()).plan, True)


def in_features(step: Step, x: Tensor, y: Tensor, mixed: Tensor, target: Tensor) -> bool:
    """Whether an update mixes features inside of the network: the labels are mixed, and the images are as before."""
    return step.mixer.needs == "step" and torch.equal(mixed, x) and not torch.allclose(target, y, atol=0.01)


def step_for(recipe: Recipe, classes: int) -> Step:
    """The mixer on the recipe's model; without a recipe on a tiny network, or a tiny ViT where it must be one."""
    try:
        mixer = build(recipe.mixer, **recipe.mixer_args[recipe.mixer])
    except ValueError as error:  # of a package that is not here, or is another one now
        raise UserError(str(error)) from None
    for part in counting(mixer):
        part.class_counts = None  # of the recipe's classes, where each photo here is of its own
    refusal = None
    for name in (recipe.model,) if recipe.dataset != SYNTHETIC else ("test_resnet", "test_vit"):
        args = {"dynamic_img_size": True} if name == "test_vit" else dict(recipe.model_args)
        torch.manual_seed(recipe.seed)
        try:
            return Step(timm.create_model(name, num_classes=classes, **args), mixer, criterion(recipe))
        except ValueError as error:
            refusal = error
    raise UserError(f"mixer {recipe.mixer!r} with model {recipe.model!r}: {refusal}")


# --------------------------------------------------------------------------------------------- drawing


def corner(block: int, row: int, column: int, count: int) -> tuple[int, int]:
    """Where a picture's upper left corner is; row 0 of each block shows the ``count`` images themselves."""
    return EDGE + block * (count * COLUMN + EDGE) + column * COLUMN, HEAD + row * ROW + TITLE


def draw(rows: list[tuple[Recipe, Row]], photos: Photos) -> Image.Image:
    """The sheet: blocks side by side, in each the images themselves, then a row per method.

    Under a mixed image stands how much of its label is its own, and how much that of its partner, which has a number.
    """
    count = len(photos.images)
    blocks = max(1, min(WIDEST // (count * COLUMN + EDGE), math.ceil(len(rows) / 8)))
    each = math.ceil(len(rows) / blocks)
    width, (right, bottom) = count * COLUMN - GAP, corner(blocks, each + 1, 0, count)
    sheet = Image.new("RGB", (right, bottom - TITLE), "white")
    pen = ImageDraw.Draw(sheet)
    shrink = images.EvalTransform(SIDE, SIDE, "bicubic")
    small = [shrink(image) for image in photos.images]
    head = "Column i: image i, mixed in update i. Under it: the share of its own label + that of its partner."
    write(pen, (EDGE, 10), head, right - 2 * EDGE, 20)
    for block in range(blocks):
        for i, name in enumerate(photos.names):
            x, y = corner(block, 0, i, count)
            sheet.paste(picture(small[i], SIDE), (x, y))
            write(pen, (x, y + SIDE + 4), f"{i + 1} {name}", SIDE, 18)
    for r, (recipe, made) in enumerate(rows):
        block, row = divmod(r, each)
        x, y = corner(block, row + 1, 0, count)
        used = write(pen, (x, y - TITLE + 2), recipe.name, width, 22)
        beside = arguments(recipe, made, pen, width - used - 12)
        write(pen, (x + used + 12, y - TITLE + 7), beside, width, 16, "dimgray")
        for i, shares in enumerate(made.shares):
            x, y = corner(block, row + 1, i, count)
            sheet.paste(picture(made.pixels[i], SIDE), (x, y))
            others = shares.index_fill(0, torch.tensor([i]), 0)
            partner, text = int(others.argmax()), f"{shares[i]:.2f}"
            if others[partner] > 0.005:
                more = " + …" if others.sum() - others[partner] > 0.005 else ""
                text += f" + {others[partner]:.2f} of {partner + 1}{more}"
            write(pen, (x, y + SIDE + 4), text, SIDE, 18)
    return sheet


def arguments(recipe: Recipe, made: Row, pen: ImageDraw.ImageDraw, width: int) -> str:
    """What is to be known of a method beside its name, as much as fits whole."""
    words = [*made.notes, *(f"{k} {v}" for k, v in recipe.mixer_args[recipe.mixer].items())]
    for shown in range(len(words), 0, -1):
        rest = f", and {len(words) - shown} more" if shown < len(words) else ""
        text = ", ".join(words[:shown]) + rest
        if pen.textlength(text, ImageFont.load_default(16)) <= width:
            return text
    return ""


def write(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, size: int, fill: str = "black") -> int:
    """Write a line, smaller where it is too wide, and cut only where that does not help; returns its width."""
    while size > 11 and pen.textlength(text, ImageFont.load_default(size)) > width:
        size -= 1
    font = ImageFont.load_default(size)
    while pen.textlength(text, font) > width:
        text = text[:-2] + "…"
    pen.text(at, text, fill=fill, font=font)
    return int(pen.textlength(text, font))


def picture(image: Tensor, side: int) -> Image.Image:
    """uint8 (3, H, W) as a square picture."""
    made = Image.fromarray(image.permute(1, 2, 0).numpy())
    return made if made.size == (side, side) else made.resize((side, side), Image.Resampling.BICUBIC)
