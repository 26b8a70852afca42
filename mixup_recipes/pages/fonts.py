"""Letters in pictures: the font that comes with matplotlib, which is the same everywhere, and text cut to a width."""

import functools
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

SANS = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


@functools.cache
def letters() -> frozenset[int]:
    """Code points that the font can draw."""
    return frozenset(FT2Font(str(SANS)).get_charmap())


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font for Pillow. Letters are set one by one, whatever else Pillow was built with."""
    return ImageFont.truetype(str(SANS), size, layout_engine=ImageFont.Layout.BASIC)


def drawable(text: str) -> str:
    """The text with a question mark for each character that the font lacks."""
    return "".join(c if c.isprintable() and ord(c) in letters() else "?" for c in text)


def shortened(text: str, most: int) -> str:
    """Text of at most so many characters, the middle left out: what tells files apart is at their ends."""
    head = most // 2
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"


def fitting(text: str, width: float, size: int) -> str:
    """What of a text can be drawn in so many pixels."""
    text, most = shortened(drawable(text), 100), 100
    while font(size).getlength(text) > width:
        most = min(most, len(text)) - 1
        text = shortened(text, most)
    return text
