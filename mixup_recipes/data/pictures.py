"""Pictures of batches: normalised images back to pixels, and sheets of mixed images with their labels."""

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mixup_recipes.files import write
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError


def check_png(path: Path) -> None:
    """Raise ``UserError`` unless a picture's name says what it will be."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: pictures are written as PNG; expected a name that ends in .png")


def to_uint8(images: Tensor, recipe: Recipe) -> Tensor:
    """Normalised (B, 3, H, W) to uint8 on the host."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    return ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


def sample_sheet(images: Tensor, targets: Tensor, recipe: Recipe, classes: list[str], path: Path) -> Path:
    """Up to 8 mixed training images with their labels as a PNG. images normalised (B, 3, H, W), targets (B, K).

    Returns ``path``.
    """
    pixels, targets = to_uint8(images[:8], recipe), targets[:8].float().cpu()
    side, line = max(160, images.shape[-1]), 13
    sheet = Image.new("RGB", (4 * side, (len(pixels) + 3) // 4 * (side + 2 * line + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, target) in enumerate(zip(pixels, targets, strict=True)):
        x, y = i % 4 * side, i // 4 * (side + 2 * line + 4)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side - 4, side - 4), Image.Resampling.BICUBIC)
        sheet.paste(picture, (x + 2, y + 2))
        shares = target.topk(min(2, len(target)))
        for row, (share, k) in enumerate(zip(shares.values.tolist(), shares.indices.tolist(), strict=True)):
            if share > 0.005:
                draw.text((x + 4, y + side + row * line), f"{share:.2f} {classes[k]}"[: side // 6], fill="black")
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write(path, buffer.getvalue())
    return path
