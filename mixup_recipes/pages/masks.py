"""What a learned mixer has learned: its masks on photos that it was not trained on, for several lambdas."""

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mixers import AdAutoMix, AutoMix
from mixup_recipes import files
from mixup_recipes.data import images
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import Key
from mixup_recipes.data.pictures import check_png, to_uint8
from mixup_recipes.data.splits import load_split
from mixup_recipes.pages.preview import varied
from mixup_recipes.runs import replay
from mixup_recipes.runs.run import Run
from mixup_recipes.training import backbones
from mixup_recipes.training.update import new_step
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

LAMBDAS = (0.1, 0.3, 0.5, 0.7, 0.9)
SHOWN = (0.3, 0.5, 0.7)
SIDE, LINE, GAP = 120, 16, 4
FLAT = 0.02  # standard deviation over pixels


def masks(run: Run, pairs: int, path: Path) -> str:
    """Write a sheet of ``pairs`` rows as PNG; returns a table of lambda and what the masks' means are.

    A row: a photo of the evaluation split, its partner of another class, and for three lambdas the mask (white: the
    photo itself stays) and the mixed image. Weights: the run's newest checkpoint, in training mode, without
    dropout. Means are over 64 photos. Raises ``UserError``.
    """
    check_png(path)
    if not 1 <= pairs <= 16:
        raise UserError(f"pairs: expected 1 to 16, got {pairs}")
    recipe = run.recipe
    step = new_step(backbones.create_model(recipe), recipe)
    mixer = next((part for part in step.mixer.modules() if isinstance(part, AutoMix | AdAutoMix)), None)
    if mixer is None:
        raise UserError(
            f"{run.folder}: mixer {recipe.mixer!r} learns no masks; expected a run of automix, samix or adautomix"
        )
    if recipe.multi_label:
        raise UserError(f"{run.folder}: its images may have several labels, and the sheet needs photos of one class")
    kept = run.checkpoints
    if not kept:
        raise UserError(f"{run.folder} keeps no checkpoint")
    update = int(kept[-1].name.removeprefix("step-"))
    replay.load_weights(step, run, update, 0, 1)
    step.train()

    split = load_split(recipe, recipe.eval_split, None)
    transform = images.EvalTransform.of(recipe)
    samples = Samples(split.table, recipe, transform, on_bad_image="skip")
    rows = varied([int(label) for label in split.table[recipe.label_column]], min(64, len(samples)))
    seen = [samples[Key(0, row, 0)] for row in rows]
    x = images.normalise(torch.stack([pixels for pixels, *_ in seen]), recipe, torch.device("cpu"))
    index = torch.arange(len(x)).roll(-1)  # neighbours are of different classes
    with torch.no_grad():
        found = {
            lam: mixer.masks_for(x, index, torch.full((len(x),), lam)).expand(-1, 1, *x.shape[2:]) for lam in LAMBDAS
        }
        mixed = {lam: torch.lerp(x[index], x, found[lam]) for lam in SHOWN}
    pairs = min(pairs, len(x))
    names = [f"{split.classes[seen[i][1]]} / {split.classes[seen[int(index[i])][1]]}" for i in range(pairs)]
    sheet = draw(x, index, found, [to_uint8(mixed[lam], recipe) for lam in SHOWN], names, to_uint8(x, recipe))
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    files.write(path, buffer.getvalue())
    lines = ["| lambda | mean of the mask | its standard deviation over pixels |", "|---:|---:|---:|"]
    lines += [f"| {lam} | {mask.mean():.3f} | {mask.std((1, 2, 3)).mean():.3f} |" for lam, mask in found.items()]
    spread = max(mask.std((1, 2, 3)).mean() for mask in found.values())
    flat = ["", "The masks are nearly flat: so far this run mixes as Mixup does."] if spread < FLAT else []
    return "\n".join(
        [f"{recipe.name}, update {update}, {many(len(x), 'photo')} of {recipe.eval_split}", "", *lines, *flat]
    )


def draw(
    x: Tensor, index: Tensor, found: dict[float, Tensor], mixed: list[Tensor], names: list[str], pixels: Tensor
) -> Image.Image:
    """The sheet: a row for each name."""
    heads = ["photo", "partner", *(f"{what} {lam}" for lam in SHOWN for what in ("mask", "mixed"))]
    sheet = Image.new("RGB", (len(heads) * (SIDE + GAP), LINE + len(names) * (SIDE + LINE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.text((column * (SIDE + GAP) + 2, 2), head, fill="black")
    for row, name in enumerate(names):
        top = LINE + row * (SIDE + LINE + GAP)
        pictures = [pixels[row], pixels[int(index[row])]]
        for lam, image in zip(SHOWN, mixed, strict=True):
            grey = (found[lam][row] * 255).round().to(torch.uint8).expand(3, -1, -1)
            pictures += [grey, image[row]]
        for column, picture in enumerate(pictures):
            shown = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            sheet.paste(shown, (column * (SIDE + GAP), top))
        pen.text((2, top + SIDE + 1), name, fill="black")
    return sheet
