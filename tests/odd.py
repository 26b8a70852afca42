"""What the fuzz makes odd pictures and tables of, and how it judges what becomes of them."""

import contextlib
import faulthandler
import io
import json
import os
import resource
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mixup_recipes.data.images import EvalTransform
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import Key
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError

TAKEN, BAD, LEFT = "taken", "a bad image", "left out"
Maker = Callable[[Path], Any]
"""Makes the files of a kind in a folder."""


def photo(mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Smooth colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (48, 40), **options: Any) -> bytes:
    """A photo of this mode as a file."""
    buffer = io.BytesIO()
    photo(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def pages(kind: str) -> bytes:
    """Three photos in one file."""
    return saved(kind, save_all=True, append_images=[photo().rotate(90), photo().rotate(180)])


def array(values: Any, dtype: Any) -> bytes:
    """A TIFF of 4 x 4 times the same value."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), values, dtype)).save(buffer, "TIFF")
    return buffer.getvalue()


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """Other bytes in one place."""
    return data[:at] + new + data[at + len(new) :]


def big(*numbers: int, bits: int = 32) -> bytes:
    """Whole numbers, the high byte first."""
    return b"".join(n.to_bytes(bits // 8, "big") for n in numbers)


JPEG, PNG, GIF, BMP, WEBP = map(saved, ("JPEG", "PNG", "GIF", "BMP", "WEBP"))
PROGRESSIVE = saved("JPEG", progressive=True)
SCAN = JPEG.index(b"\xff\xda")


def segment(marker: int, body: bytes = b"", times: int = 1) -> bytes:
    """A JPEG with another segment at its start, several times."""
    return JPEG[:2] + (bytes([0xFF, marker]) + big(len(body) + 2, bits=16) + body) * times + JPEG[2:]


def frame(data: bytes, at: int, new: bytes) -> bytes:
    """A JPEG with other bytes in the header of its frame; 5 is where height and width are."""
    return patched(data, data.index(b"\xff\xc2" if b"\xff\xc2" in data else b"\xff\xc0") + at, new)


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    """A chunk of a PNG."""
    return big(len(body)) + kind + body + big(zlib.crc32(kind + body))


def with_chunk(kind: bytes, body: bytes = b"", times: int = 1) -> bytes:
    """A PNG with another chunk behind its header, several times."""
    return PNG[:33] + chunk(kind, body) * times + PNG[33:]


def png(width: int, height: int, bits: int, colour: int, rows: bytes, more: bytes = b"", interlaced: int = 0) -> bytes:
    """A PNG by its header. ``rows``: each begins with its filter."""
    header = big(width, height) + bytes([bits, colour, 0, 0, interlaced])
    return PNG[:8] + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")


def bmp(width: int, height: int, bits: int, rows: bytes, compression: int = 0, colours: int = 0) -> bytes:
    """A BMP by its header; a height below 0 means that the first row comes first."""
    palette = bytes(range(256)) * 4 if colours else b""
    start = 54 + len(palette)
    size = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(rows), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + size + palette + rows


def tiff(tags: dict[int, int | list[int] | None], rows: bytes = b"\x55" * 256, following: int | None = None) -> bytes:
    """A grey TIFF of 4 x 4 pixels by its tags; None leaves one out. ``following``: where the next page is."""
    usual = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(rows)}
    wanted = {tag: value for tag, value in sorted((usual | tags).items()) if value is not None}
    start = 8 + len(rows)
    entries, lists = b"", b""
    for tag, value in wanted.items():
        values = value if isinstance(value, list) else [value]
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            lists, packed = lists + packed, struct.pack("<I", start + 6 + 12 * len(wanted) + len(lists))
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    page = struct.pack("<H", len(wanted)) + entries + struct.pack("<I", following or 0)
    return b"II*\0" + struct.pack("<I", start) + rows + page + lists


def jp2(box: tuple[int, int] | None = None, stream: tuple[int, int] | None = None) -> bytes:
    """A JPEG 2000 picture that says another width and height in its box, or in the stream itself."""
    data = saved("JPEG2000")
    if box:
        data = patched(data, data.index(b"ihdr") + 4, big(*box[::-1]))
    return patched(data, data.index(b"\xff\x51") + 6, big(*stream)) if stream else data


def put(name: str, data: bytes = JPEG) -> Maker:
    """Makes a file of this name, which may be one that is no text."""

    def make(folder: Path) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        return name

    return make


def deep(name: str, levels: int) -> Maker:
    """Makes a file below as many folders of this name, step by step: the path may be longer than the system takes."""

    def make(folder: Path) -> str:
        home = os.getcwd()
        os.chdir(folder)
        for _ in range(levels):
            os.mkdir(name)
            os.chdir(name)
        Path("0.jpg").write_bytes(JPEG)
        os.chdir(home)
        return f"{name}/" * levels + "0.jpg"

    return make


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROW = {"bytes": JPEG, "path": None}
CLASSES = {"_type": "ClassLabel", "names": ["ant", "bee"]}
PLAIN = object()  # no word on what the columns are


def said(image: Any = {"_type": "Image"}, label: Any = CLASSES, **more: Any) -> str:  # noqa: B006
    """What a file says of its columns, as ``datasets`` writes it."""
    return json.dumps({"info": {"features": {"image": image, "label": label, **more}}})


def table(images: Any = None, labels: Any = None, head: Any = PLAIN, **more: Any) -> pa.Table:
    """Two rows; columns are arrays, or rows of bytes and path. ``head``: what the file says of its columns."""
    images = [ROW, ROW] if images is None else images
    images = images if isinstance(images, pa.Array) else pa.array(images, STRUCT)
    labels = pa.array([0, 1][: len(images)] if labels is None else labels)
    found = pa.table({"image": images, "label": labels, **more})
    return found if head is PLAIN else found.replace_schema_metadata({"huggingface": head})


def as_bytes(found: pa.Table, **options: Any) -> bytes:
    """A table as a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(found, sink, **options)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def same_again(image: bytes, rows: int) -> pa.Table:
    """A table whose every row is the same image, which takes next to nothing in a file."""
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([image], pa.binary()))
    structs = pa.StructArray.from_arrays([images, pa.nulls(rows, pa.string())], ["bytes", "path"])
    return pa.table({"image": structs, "label": np.zeros(rows, np.int64)})


def no_text(length: int) -> pa.Array:
    """Texts whose bytes are no UTF-8."""
    offsets = pa.py_buffer(np.arange(length + 1, dtype=np.int32).tobytes())
    return pa.Array.from_buffers(pa.string(), length, [None, offsets, pa.py_buffer(b"\xff" * length)])


def member(name: str, data: bytes = JPEG, at: int = 124, field: bytes = b"", **head: Any) -> bytes:
    """A file of a tar: header and content. ``head``: of ``TarInfo``; ``field``: other bytes in one place of the header,
    by default where the size is."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in head.items():
        setattr(info, key, value)
    whole = info.tobuf(tarfile.PAX_FORMAT)  # more than one header, where the name asks for it
    last = patched(patched(whole[-512:], at, field), 148, b" " * 8)
    last = patched(last, 148, b"%06o\0 " % sum(last))
    return whole[:-512] + last + data + bytes(-len(data) % 512)


END = bytes(1024)  # of a tar


def sample(key: str, label: int | bytes = 0, data: bytes = JPEG) -> bytes:
    """An image and its class in a tar; a label of bytes is a JSON document."""
    if isinstance(label, bytes):
        return member(f"{key}.jpg", data) + member(f"{key}.json", label)
    return member(f"{key}.cls", b"%d" % label) + member(f"{key}.jpg", data)


def recipe(dataset: Path | str = "") -> Recipe:
    """The recipe that opens a folder."""
    return Recipe(dataset=str(dataset), eval_split="train", num_classes=2)


def judged(found: Any, index: int) -> str:
    """What becomes of an image of a split's table when bad ones are skipped."""
    samples = Samples(found.select([index]), recipe(), EvalTransform(4, 4, "bilinear"), "skip")
    try:
        image, label, _, bad = samples[Key(0, 0, 0)]
    except UserError as e:
        assert str(e) == "no image of the dataset can be read"
        return BAD
    assert (image.dtype, image.shape, bad) == (torch.uint8, (3, 4, 4), 0) and label == found[index]["label"]
    return TAKEN


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails what takes 20 seconds or half a gigabyte; what no signal reaches for a minute ends the process."""

    def late(*_: Any) -> None:
        pytest.fail("not done after 20 seconds")

    before, memory = signal.signal(signal.SIGALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(20)
    faulthandler.dump_traceback_later(60, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**19  # kB
