"""How far a large JPEG that is decoded at 1/2, 1/4 or 1/8 is from the whole decode, and what it saves.

    python benchmarks/reduced.py                    # photos of the groceries, stitched to 4000 x 3000 pixels
    python benchmarks/reduced.py --photos FOLDER    # large JPEGs of your own

Crops as training draws them and the picture as evaluation scales it, for several values of ``picture.SPARE``, beside
the whole decode of the same part (``--crops`` of each photo). Levels are of 255; "99.9 %" is of the values of one
image, the median and the most of all images. The time is that of the processor in one thread, decoding and scaling, of
all images together. The classifier is that of the prepared weights `efficientnet_lite0`, on crops for training.
Prints Markdown.
"""

import argparse
import functools
import io
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from mixup_recipes.data import images, keys, picture
from mixup_recipes.data.picture import Part, Picture
from mixup_recipes.data.splits import load_splits
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.known_weights import find_weights

SPARES = (1, 2, 3)
METHOD = "bicubic"


def main() -> None:
    """A row for each value of ``SPARE`` and kind of image."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a folder with large JPEGs")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--crops", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoded = stitched() if args.photos is None else [f.read_bytes() for f in sorted(args.photos.rglob("*.jp*g"))]
    net = timm.create_model(f"local-dir:{find_weights('efficientnet_lite0')}", pretrained=True).eval()
    print("| spare | kind | images | of 1/2, 1/4, 1/8 | mean | 99.9 %, median | most | largest | time | other class |")
    print("|---:|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for spare in SPARES:
        picture.SPARE = spare
        for kind in ("training", "evaluation"):
            print(f"| {spare} | {kind} | {row(encoded, kind, args.size, args.crops, net)} |", flush=True)


def row(encoded: Iterable[bytes], kind: str, size: int, crops: int, net: nn.Module) -> str:
    """The other cells of a row."""
    apart: list[np.ndarray] = []
    seconds = {"whole": 0.0, "reduced": 0.0}
    factors, others, count = dict.fromkeys(picture.FACTORS, 0), 0, 0
    for data in encoded:
        rows, columns = Picture(data).shape[1:]
        covering = size / 0.875 / min(rows, columns)
        parts: list[tuple[Part, tuple[int, int]]] = [
            ((0, 0, rows, columns), (int(rows * covering), int(columns * covering)))
        ]
        if kind == "training":
            draws = (keys.rng(keys.SAMPLE, rows, columns, i) for i in range(crops))
            parts = [(images.box(Picture(data), (0.08, 1.0), (3 / 4, 4 / 3), draw), (size, size)) for draw in draws]
        for drawn, wanted in parts:
            count += 1
            by = picture.factor(drawn, wanted)
            if by == 1:
                continue
            part = picture.aligned(drawn, by, rows, columns)
            factors[by] += 1
            reduced = timed(functools.partial(once, data, part, wanted), seconds, "reduced")
            whole = timed(functools.partial(at_length, data, part, wanted), seconds, "whole")
            apart.append((whole.int() - reduced.int()).abs().flatten().numpy())
            if kind == "training":
                x = (torch.stack([whole, reduced]).float() / 255 - 0.5) / 0.5
                with torch.no_grad():
                    first, second = net(x).argmax(1).tolist()
                others += first != second
    if not apart:
        return f"{count} | none | | | | | |"
    tail = [float(np.percentile(values, 99.9)) for values in apart]
    mean, most = float(np.mean([values.mean() for values in apart])), max(int(values.max()) for values in apart)
    cells = [count, ", ".join(str(factors[n]) for n in (2, 4, 8)), f"{mean:.2f}", f"{np.median(tail):.0f}"]
    cells += [f"{max(tail):.0f}", most, f"{seconds['reduced'] / seconds['whole']:.2f}x"]
    return " | ".join(map(str, [*cells, f"{others} of {len(apart)}" if kind == "training" else ""]))


def once(data: bytes, part: Part, size: tuple[int, int]) -> Tensor:
    """The part from a reduced decode."""
    found = Picture(data).reduced(part, size, METHOD)
    assert found is not None
    return found


def at_length(data: bytes, part: Part, size: tuple[int, int]) -> Tensor:
    """The part from the whole decode."""
    return images.cut(Picture(data).pixels, part, size, METHOD, "v2")


def timed(work: Callable[[], Tensor], seconds: dict[str, float], name: str) -> Tensor:
    """What it returns; its processor time is added."""
    began = time.process_time()
    found = work()
    seconds[name] += time.process_time() - began
    return found


def stitched() -> list[bytes]:
    """Photos of the groceries side by side, 4000 x 3000 pixels, the smallest sides that they have."""
    rows = load_splits(load_recipe("quickstart_vanilla")).eval
    side, across, down = 348, 12, 9
    found = []
    for start in range(0, len(rows) - across * down + 1, across * down):
        sheet = Image.new("RGB", (across * side, down * side))
        for place in range(across * down):
            photo = Image.open(io.BytesIO(rows[start + place]["image"]["bytes"]))
            sheet.paste(photo.crop((0, 0, side, side)), (place % across * side, place // across * side))
        buffer = io.BytesIO()
        sheet.crop((0, 0, 4000, 3000)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


if __name__ == "__main__":
    main()
