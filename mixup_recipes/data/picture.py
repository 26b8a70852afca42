"""An encoded image whose size is known before it is decoded, so that of a large JPEG fewer pixels are decoded."""

import functools
import io
import math
import warnings

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mixup_recipes.data.decoding import LIMIT, check_size, decode, jpeg_head, noted_orientation, turned, view

FACTORS = (8, 4, 2)  # what libjpeg can divide the sides of a picture by while it decodes
SPARE = 2
"""The sides of a reduced part are at least this many times those of what is made of it.

``benchmarks/reduced.py`` measures what that changes, docs/speed_measured.md has the table.
"""
LARGE = 400_000
"""Pixels of a picture from which on this is faster."""
Part = tuple[int, int, int, int]
"""Top, left, height and width, in pixels of the whole picture."""


class Picture:
    """The image that ``decode`` makes of the same arguments. All but ``__init__`` can raise ``BadImage`` as it does."""

    def __init__(self, data: bytes, limit: int = LIMIT, upright: bool = False):
        self.data, self.limit, self.upright = data, limit, upright
        self.head = jpeg_head(data)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """(3, H, W) of the pixels; for a JPEG read off its head."""
        if self.head is None or self.orientation is None:
            return self.pixels.shape
        check_size(self.head.width, self.head.height, self.limit, self.data)
        sides = self.head.height, self.head.width
        return 3, *(sides[::-1] if self.orientation >= 5 else sides)

    @functools.cached_property
    def orientation(self) -> int | None:
        """By which the pixels of a JPEG are turned, 1 to 8; None where Pillow cannot open it to say so."""
        if not (self.upright and self.head and self.head.notes):
            return 1
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(self.data), formats=["JPEG"]) as image:
                return noted_orientation(image)
        except Exception:  # a stranger's file can make Pillow raise anything; ``decode`` says what
            return None

    @functools.cached_property
    def pixels(self) -> Tensor:
        """The whole picture, uint8 (3, H, W)."""
        if self.head is None or self.orientation is None:
            return decode(self.data, self.limit, self.upright)
        return turned(decode(self.data, self.limit), self.orientation)

    def reduced(self, part: Part, size: tuple[int, int], interpolation: str) -> Tensor | None:
        """A part scaled to ``size``, uint8 (3, *size), of a JPEG decoded at 1/2, 1/4 or 1/8; None to decode it whole.

        It is decoded at the smallest size at which the part keeps ``SPARE`` times ``size`` in both directions, and
        whole where no factor does, where the picture is not ``LARGE``, or where Pillow has anything to say against the
        file. The corner of the part is moved to the nearest pixel of the reduced picture, by less than 1 / ``SPARE``
        pixels of the result.
        """
        by, (_, *sides) = factor(part, size), self.shape
        if by == 1 or math.prod(sides) < LARGE or self.head is None or self.orientation is None:
            return None
        rows, columns = sides[::-1] if self.orientation >= 5 else sides
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(self.data), formats=["JPEG"]) as image:
                image.draft(None, (columns // by, rows // by))
                if image.size != (math.ceil(columns / by), math.ceil(rows / by)):
                    return None
                part = lying(part, rows, columns, self.orientation)
                top, left, height, width = aligned(part, by, rows, columns)
                box = left // by, top // by, left // by + math.ceil(width / by), top // by + math.ceil(height / by)
                pixels = view(image.crop(box).convert("RGB"))
        except Exception:  # a stranger's file can make Pillow raise anything; ``decode`` has the last word
            return None
        wanted = size[::-1] if self.orientation >= 5 else size
        # the last row and column may be of fewer pixels; a product just below a whole number would be rounded down
        factors = tuple(s * by / side * (1 + 1e-9) for s, side in zip(wanted, (height, width), strict=True))
        scaled = F.interpolate(pixels[None], scale_factor=factors, mode=interpolation, antialias=True)[0]
        return turned(scaled, self.orientation)


def factor(part: Part, size: tuple[int, int]) -> int:
    """By what a picture may be divided, so that the sides of a part keep ``SPARE`` times those of ``size``, or 1."""
    room = min(side // (SPARE * wanted) for side, wanted in zip(part[2:], size, strict=True))
    return next((n for n in FACTORS if n <= room), 1)


def aligned(part: Part, by: int, rows: int, columns: int) -> Part:
    """A part of a picture with its corner moved to the nearest multiple of ``by``."""
    top, left, height, width = part
    return (
        min(round(top / by), (rows - height) // by) * by,
        min(round(left / by), (columns - width) // by) * by,
        height,
        width,
    )


def lying(part: Part, rows: int, columns: int, orientation: int) -> Part:
    """A part of the upright picture in the picture of ``rows`` and ``columns`` that ``turned`` makes upright."""
    top, left, height, width = part
    if orientation >= 5:
        rows, columns = columns, rows
    if orientation in (3, 4, 7, 8):
        top = rows - top - height
    if orientation in (2, 3, 6, 7):
        left = columns - left - width
    return (left, top, width, height) if orientation >= 5 else (top, left, height, width)
