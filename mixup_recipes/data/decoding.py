"""From a row's encoded bytes to a uint8 image, within bounds, whatever a stranger put there.

- Formats are those of ``FORMATS``, told by content; none of them starts a program.
- A picture has at most ``LIMIT`` pixels (Pillow's own bound), which is read off its head before anything is decoded;
  nor is one decoded that takes far more time or memory than its size (``check``).
- Grey pictures of 16 bits keep the upper 8, as Pillow does with coloured ones; floats from 0 to 1 become 0 to 255.
  Integers of 32 bits and other floats have no white of their own, and are refused.
- EXIF orientation is applied where a recipe says so, and nowhere else; timm's and torchvision's ImageNet practice is
  not to. Of all formats Pillow turns TIFF by itself when it loads it, which is kept from it here.
"""

import contextlib
import io
import os
import stat
import warnings
from importlib.util import find_spec
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

AVIF = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()  # since Pillow 11.3
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", *AVIF, "TIFF", "JPEG2000", "PPM")
LIMIT = 178_956_970
"""Pixels of a picture."""
LARGEST_FILE = 2**30  # bytes
SCAN, SCAN_BYTES = b"\xff\xda", 10  # the marker before each scan of a JPEG, and the bytes that each has at least
SCANS = 100  # of a progressive JPEG of LIMIT pixels; a smaller one may have as many more
BY_PYTHON = 2**22  # pixels of a picture that Pillow decodes without C, which takes a microsecond or more for each
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
Image.MAX_IMAGE_PIXELS = None  # the limit here is one for all decoders, and can be chosen


class BadImage(Exception):
    """An image that cannot be used; the message says why."""


def read(path: str | os.PathLike[str]) -> bytes:
    """A regular file's content; it does not wait for a pipe or a device. Raises ``BadImage``."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_FILE:
                raise BadImage(f"{size:,} bytes, more than {LARGEST_FILE:,}")
            return file.read()
    except OSError as e:
        raise BadImage(e.strerror or str(e)) from None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading; see ``read``. Raises ``BadImage``, and ``OSError`` where there is none."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise BadImage("not a regular file")
    return os.fdopen(number, "rb")


def decode(data: bytes, limit: int = LIMIT, upright: bool = False) -> Tensor:
    """Encoded image to RGB uint8 (3, H, W), pixel-identical whichever decoder reads it.

    torchvision's libjpeg-turbo for JPEG, Pillow for everything else and for what the former refuses. ``limit``: pixels.
    ``upright``: turned as the camera noted it. Raises ``BadImage`` for truncated, unknown and too large pictures.
    """
    try:
        with warnings.catch_warnings():  # Pillow warns of oddities, torchvision of torchcodec, which rotates by EXIF
            warnings.simplefilter("ignore")
            if head := jpeg_head(data):  # most pictures by far, in a tenth of the time that Pillow takes to open one
                check_size(head.width, head.height, limit, data)
                if not (upright and head.notes) and (pixels := by_libjpeg(data)) is not None:
                    return pixels
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check(image, data, limit)
                # of a TIFF before Pillow turns it; of others once they are loaded, as errors of that must be seen
                seen = noted_orientation(image) if image.format == "TIFF" else None
                if image.format in ("JPEG", "MPO") and (pixels := by_libjpeg(data)) is not None:
                    return turned(pixels, noted_orientation(image)) if upright else pixels
                pixels = view(eight_bits(image).convert("RGB"))
                return turned(pixels, seen or noted_orientation(image)) if upright else pixels
    except UnidentifiedImageError:
        raise BadImage("not an image of a known format" if data else "no data") from None
    except BadImage:
        raise
    except Exception as e:  # a stranger's file can make a decoder raise anything
        raise BadImage(" ".join(str(e).split())[:200] or type(e).__name__) from None


class Head(NamedTuple):
    """What a JPEG says of itself before its first scan."""

    width: int
    height: int
    notes: bool
    """Whether there are any of a camera or a program, among which an orientation may be."""


def jpeg_head(data: bytes) -> Head | None:
    """The head of a plain JPEG; None for anything else or unusual, which Pillow has to look at."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, size, notes = 2, None, False
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xDA:
            return Head(*size, notes) if size and min(size) else None
        if marker in (0xC0, 0xC1, 0xC2) and size is None:
            size = int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
        elif marker not in (0xC4, 0xDB, 0xDD, 0xFE) and not 0xE0 <= marker <= 0xEF:
            return None
        notes |= marker == 0xE1
        at += 2 + length
    return None


def by_libjpeg(data: bytes) -> Tensor | None:
    """A JPEG as torchvision decodes it, (3, H, W); None where it refuses to: Pillow has the last word."""
    with contextlib.suppress(RuntimeError):
        pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return pixels
    return None


def noted_orientation(image: Image.Image) -> int:
    """What EXIF says of an image, 1 to 8; 1, upright, where it says nothing, another number or is damaged.

    The image says 1 from here on: by this note Pillow would turn a TIFF when it loads it. Of a PNG reading it loads the
    picture.
    """
    try:
        exif = image.getexif()
        orientation = int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # a stranger's EXIF can make its reader raise anything
        return 1
    exif[ExifTags.Base.Orientation] = 1
    return orientation if 1 <= orientation <= 8 else 1


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """(3, H, W) as it is seen: the first row of 5 to 8 becomes a column, then some are mirrored."""
    if orientation == 1:
        return pixels
    pixels = pixels.transpose(1, 2) if orientation >= 5 else pixels
    mirrored = {2: [2], 3: [1, 2], 4: [1], 5: [], 6: [2], 7: [1, 2], 8: [1]}[orientation]
    return pixels.flip(mirrored).contiguous()


def check(image: ImageFile, data: bytes, limit: int) -> None:
    """Raise ``BadImage`` for a picture that would fill the memory, or be decoded for minutes, whatever its size."""
    check_size(image.width, image.height, limit, data if image.format in ("JPEG", "MPO") else b"")
    pixels = image.width * image.height
    if isinstance(image, TiffImageFile):
        width, length = (image.tag_v2.get(tag, 1) for tag in (TILE_WIDTH, TILE_LENGTH))
        if width * length > limit:
            raise BadImage(f"tiles of {width:,} x {length:,} pixels, more than the {limit:,} of --max_image_pixels")
    if pixels > BY_PYTHON and any(tile[0] in Image.DECODERS for tile in image.tile):
        raise BadImage(f"{pixels:,} pixels in a form of {image.format} that is slow to decode; save it in another form")


def check_size(width: int, height: int, limit: int, jpeg: bytes) -> None:
    """Raise ``BadImage`` for more than ``limit`` pixels, and for a JPEG of so many scans that it would take minutes."""
    pixels, bound = width * height, SCANS * LIMIT
    if pixels > limit:
        raise BadImage(f"{width:,} x {height:,} pixels, more than the {limit:,} of --max_image_pixels")
    if len(jpeg) // SCAN_BYTES * pixels > bound and (scans := jpeg.count(SCAN)) * pixels > bound:
        raise BadImage(f"{scans:,} scans of {pixels:,} pixels, which would take minutes")


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits with 8; any other as it is. Raises ``BadImage``."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "I":
        raise BadImage("32-bit integers, which do not say how bright white is; convert it to 8 or 16 bits")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # nan is neither
            raise BadImage(f"floats from {values.min():g} to {values.max():g}, expected 0 to 1; convert it to 8 bits")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    return image


def view(image: Image.Image) -> Tensor:
    """Pillow RGB to uint8 (3, H, W) that lies as (H, W, 3): it is there, and scaled, in half of the time."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """Pillow RGB to uint8 (3, H, W): band by band, in half of the time that turning the pixels takes."""
    bands = np.empty((3, image.height, image.width), np.uint8)
    for number, band in enumerate(image.split()):
        bands[number] = np.asarray(band)
    return torch.from_numpy(bands)
