"""Promise: every odd file of a folder is an image of the table, a bad image, or left out and named; the counts agree.

The dictionaries say which of them becomes of each kind. No file is waited for, fills the memory or lets a warning out.
"""

import gzip
import os
import pickle
import socket
import struct
import subprocess
import zlib

import PIL
import pytest
import torch
from odd import (
    BAD,
    BMP,
    GIF,
    JPEG,
    LEFT,
    PNG,
    PROGRESSIVE,
    SCAN,
    TAKEN,
    WEBP,
    array,
    big,
    bmp,
    bounded,
    chunk,
    deep,
    frame,
    jp2,
    judged,
    pages,
    patched,
    png,
    put,
    recipe,
    saved,
    segment,
    tiff,
    with_chunk,
)  # fmt: skip

from mixup_recipes.data import decoding, identity
from mixup_recipes.data.images import EvalTransform
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import Key
from mixup_recipes.data.splits import load_split
from mixup_recipes.typed import RankError, printable

CMYK, MPO = saved("JPEG", "CMYK"), pages("MPO")
EXIF = b"Exif\0\0II*\0\x08\0\0\0"
BOMB = b"k\0\0" + zlib.compress(bytes(2**21))  # more than Pillow takes
TEXT = b"k\0\0" + zlib.compress(bytes(2**20))  # not more than it takes once
HUGE = 60_000, 60_000
SCANS = b"\xff\xda\0\x08\1\1\0\1\5\0" * 400

# Content of a file that is called .jpg, and is decoded to uint8 RGB.
GOOD_PICTURES = {
    "JPEG": JPEG, "progressive": PROGRESSIVE, "grey JPEG": saved("JPEG", "L"), "CMYK": CMYK, "MPO": MPO,
    "YCCK": patched(CMYK, CMYK.index(b"Adobe") + 11, b"\2"), "CMYK without Adobe": CMYK.replace(b"Adobe", b"Nobod"),
    "RGB JPEG": saved("JPEG", keep_rgb=True), "one pixel": saved("JPEG", size=(1, 1)),
    "65500 x 1": saved("JPEG", size=(65500, 1)), "arithmetic JPEG": frame(JPEG, 1, b"\xc9"),
    "extended JPEG": frame(JPEG, 1, b"\xc1"), "JPEG cut, then ended": JPEG[: (SCAN + len(JPEG)) // 2] + b"\xff\xd9",
    "taller than its data": frame(JPEG, 5, b"\1"), "no end but garbage": JPEG[:-2] + bytes(range(255)),
    "garbage after": JPEG + b"\xff\xd8garbage" * 99, "two JPEGs": JPEG + JPEG, "zip after": JPEG + b"PK\3\4",
    "huge segments": segment(0xE5, b"x" * 65533, 50), "many comments": segment(0xFE, b"hi", 9999),
    "padding": JPEG[:2] + b"\xff" * 9999 + JPEG[2:],
    "short Adobe": segment(0xEE, b"Adobe"),
    "EXIF in a circle": segment(0xE1, EXIF + struct.pack("<HHHII", 1, 0x8769, 4, 1, 8)),
    "EXIF bomb": segment(0xE1, EXIF + b"\xff\xff" + struct.pack("<HHII", 0x11A, 5, 2**32 - 1, 8) * 2000),
    "EXIF of garbage": segment(0xE1, b"Exif\0\0garbage"), "empty EXIF": segment(0xE1, b"Exif\0\0"),
    "broken ICC": saved("JPEG", icc_profile=b"broken"), "ICC of 255 parts": segment(0xE2, b"ICC_PROFILE\0\1\xff"),
    "broken Photoshop": segment(0xED, b"Photoshop 3.0\0008BIM\3\xed\0\0" + b"\xff" * 4), "cut MPO": MPO[:1200],
    "broken MPO": segment(0xE2, b"MPF\0garbage"), "restarts that never come": segment(0xDD, b"\0\1"),
    **{f"PNG {mode}": saved("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    "PNG of 2 bits": png(4, 1, 2, 0, b"\0\x1b"), "palette and transparency": saved("PNG", "P", transparency=bytes(256)),
    "PNG RGB of 16 bits": png(1, 1, 16, 2, bytes(7)), "PNG RGBA of 16 bits": png(1, 1, 16, 6, bytes(9)),
    "interlaced PNG": png(1, 1, 8, 2, bytes(4), interlaced=1), "PNG with wrong sum": PNG[:-16] + bytes(4) + PNG[-12:],
    "PNG without end": PNG[:-12], "PNG with more pixels": png(4, 4, 8, 2, bytes(9999)), "APNG": pages("PNG"),
    "broken APNG": with_chunk(b"acTL", bytes(8)), "APNG of 2^31": with_chunk(b"acTL", big(2**31, 0)),
    "PNG without palette": png(1, 1, 8, 3, bytes(2)),
    "past the palette": png(1, 1, 8, 3, b"\0\xff", chunk(b"PLTE", b"abc")),
    "broken iCCP": with_chunk(b"iCCP", b"k\0\0no"), "broken iTXt": with_chunk(b"iTXt", b"\xff"), "GIF": GIF,
    "animated GIF": pages("GIF"), "GIF not interlaced": saved("GIF", "P", interlace=0),
    "GIF on no screen": patched(GIF, 6, bytes(4)), "endless comment": GIF[:-1] + b"!\xfe" + b"\xffx" * 999,
    **{f"BMP {mode}": saved("BMP", mode) for mode in ("1", "L", "P", "RGB", "RGBA")}, "DIB": BMP[14:],
    "BMP from the top": bmp(2, -2, 24, bytes(16)), "BMP of 16 bits": bmp(2, 2, 16, bytes(8)),
    "BMP of 4 bits": bmp(4, 2, 4, bytes(8), 0, 16), "RLE": bmp(4, 2, 8, b"\4\1\0\0\4\2\0\1", 1, 256),
    "RLE of 4 bits": bmp(4, 2, 4, b"\4\x12\0\0\4\x34\0\1", 2, 16),
    "RLE that jumps": bmp(255, 250, 8, b"\0\2\0\xff", 1, 256),
    **{f"TIFF {mode}": saved("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "LAB", "YCbCr", "I;16")},
    **{f"TIFF by {name}": saved("TIFF", compression=name) for name in ("tiff_lzw", "packbits", "jpeg")},
    "TIFF of floats": array(0.5, "float32"), "pages": pages("TIFF"), "BigTIFF": saved("TIFF", big_tiff=True),
    "pages in a circle": tiff({}, following=264),
    "planes": tiff({262: 2, 277: 3, 284: 2, 273: [8, 24, 40], 279: [16] * 3}),
    "tiles": tiff({273: None, 279: None, 278: None, 322: 16, 323: 16, 324: 8, 325: 256}),
    "strip of 2^32": tiff({278: 2**32 - 1}), "WebP": WEBP, "lossless WebP": saved("WEBP", lossless=True),
    "animated WebP": pages("WEBP"), 
    "JPEG 2000": jp2(), "J2K": saved("JPEG2000", no_jp2=True),
    **{f"PPM {mode}": saved("PPM", mode) for mode in ("1", "L", "RGB")}, "comment": b"P2\n#c\n2 2\n255\n1 2\n#d\n3 4\n",
    "PPM in ASCII": b"P3 1 1 255\n1 2 3", "PBM in ASCII": b"P1 2 1\n1 0\n", "PGM to 65535": b"P5 1 1 65535\nab",
    "PPM to 65535": b"P6 1 1 65535\nabcdef", "PGM to 100": b"P5 1 1 100\nd",
    "PFM": b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5),
}  # fmt: skip
# Content of a file that is called .jpg, and cannot be used.
BAD_PICTURES = {
    "lossless JPEG": frame(JPEG, 1, b"\xc3"), "12 bits": frame(JPEG, 4, b"\x0c"),
    "hierarchical JPEG": frame(JPEG, 1, b"\xc5"), "no height": frame(JPEG, 5, bytes(2)),
    "no width": frame(JPEG, 7, bytes(2)),
    "height comes later": frame(JPEG, 5, bytes(2))[:-2] + b"\xff\xdc\0\4\0\x28\xff\xd9",
    "huge JPEG": frame(JPEG, 5, big(65000, 65000, bits=16)),
    **{f"JPEG cut at {at}": JPEG[:at] for at in (1, 2, 100, SCAN, SCAN + 50, len(JPEG) - 30, len(JPEG) - 1)},
    "empty JPEG": b"\xff\xd8\xff\xd9", "garbage before": b"\n" + JPEG,
    "past the end": JPEG[:2] + b"\xff\xe5\xff\xff" + JPEG[2:],
    "400 scans": frame(PROGRESSIVE, 5, big(12000, 12000, bits=16))[:-2] + SCANS, "cut PNG": PNG[:500],
    "wrong header sum": patched(PNG, 29, bytes(4)), "few pixels": png(48, 40, 8, 2, bytes(100)),
    "PNG without pixels": PNG[:33] + chunk(b"IEND"), "empty pixels": PNG[:33] + chunk(b"IDAT") + chunk(b"IEND"),
    "filter 99": png(1, 1, 8, 2, b"cabc"), "huge PNG": png(*HUGE, 8, 2, b""), "PNG 0 x 0": png(0, 0, 8, 2, b""),
    "2^31 wide": png(2**31 - 1, 1, 1, 0, b""), "3 bits": png(1, 1, 3, 0, b"ab"), "colour 7": png(1, 1, 8, 7, b"ab"),
    "header twice": with_chunk(b"IHDR", big(*HUGE) + b"\x08\2\0\0\0"),
    **{f"{kind} bomb": with_chunk(kind.encode(), BOMB) for kind in ("zTXt", "iCCP")},
    "many bombs": with_chunk(b"zTXt", TEXT, 70), "iTXt bomb": with_chunk(b"iTXt", b"k\0\1\0\0" + BOMB[2:]),
    "chunk of 2^31": PNG[:8] + big(2**31) + PNG[12:], "PNG as text": PNG.replace(b"\r\n", b"\n"),
    **{f"short {kind}": with_chunk(kind.encode(), b"") for kind in ("gAMA", "pHYs", "tRNS", "acTL", "\0\0\0\0")},
    "cut GIF": GIF[: len(GIF) // 2], "GIF head": b"GIF89a", "GIF 0 x 0": b"GIF89a" + bytes(7) + b";",
    "huge GIF": patched(GIF, 6, b"\xff" * 4), "BMP of 2 bits": bmp(4, 2, 2, bytes(8), 0, 4),
    "short RLE": bmp(4, 2, 8, b"\4\1", 1, 256), "slow RLE": bmp(178_000_000, 1, 8, b"\1\1\0\0", 1, 256),
    "JPEG in a BMP": bmp(48, 40, 0, JPEG, 4), "huge BMP": bmp(*HUGE, 24, b"abcd"), "BMP 0 x 0": bmp(0, 0, 24, b""),
    "width below 0": bmp(-4, 4, 24, bytes(48)), "lowest height": bmp(4, -(2**31), 24, bytes(48)), "cut BMP": BMP[:500],
    "2^31 colours": bmp(2, 2, 8, bytes(8), 0, 2**31), "32-bit integers": array(7, "int32"),
    "floats to 255": array(255, "float32"), "not a number": array(float("nan"), "float32"),
    "infinite": array(float("inf"), "float32"), "TIFF head": b"II*\0", "page past the end": b"II*\0\xff\xff\xff\x7f",
    "no page": b"II*\0\x08\0\0\0\0\0\0\0\0\0", "strip past the end": tiff({273: 10**9}), "no strips": tiff({273: None}),
    "no TIFF width": tiff({256: None}), "huge TIFF": tiff({256: 60000, 257: 60000}),
    "65535 samples": tiff({277: 65535}),
    **{f"compression {n} of garbage": tiff({259: n}) for n in (5, 6, 7, 8, 9999, 34887, 34925, 50000)},
    "half floats": tiff({258: 16, 339: 3}),
    "huge tiles": tiff({259: 5, 273: None, 279: None, 278: None, 322: 2**15, 323: 2**15, 324: 8, 325: 64}),
    "tile of none": tiff({273: None, 279: None, 322: 0, 323: 0, 324: 8, 325: 64}), "cut WebP": WEBP[: len(WEBP) // 2],
    "WebP head": WEBP[:12], "WebP of 2^32": patched(WEBP, 4, b"\xff" * 4),
    "huge JPEG 2000": jp2(HUGE),
    "huge stream": jp2(None, HUGE), "cut JPEG 2000": jp2()[:700], "PGM to 0": b"P5 1 1 0\na",
    "PGM to a million": b"P5 1 1 1000000\na", "PGM below 0": b"P5 -1 1 255\na", "many digits": b"P6 " + b"9" * 10**5,
    "huge PPM": b"P6 60000 60000 255\n", "slow PPM": b"P3 13000 13000 255\n1 2 3",
    "only a comment": b"P6\n#" + b"x" * 10**5, "PPM of words": b"P3 1 1 255\n1 2 x",
    "past the highest": b"P3 1 1 255\n1 2 999",
    **{f"{kind} under another name": saved(kind) for kind in ("EPS", "PDF", "ICO", "TGA", "SGI")},
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PSD": b"8BPS\0\1" + bytes(6) + big(3, 40, 48) + bytes(99),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(64), "HTML": b"<html>404</html>", "nothing": b"", "zeros": bytes(5000),
    "text": "text".encode("utf-16"), "zip": b"PK\3\4" + bytes(50), "pickle": pickle.dumps(1),
    "LFS": b"version https://git-lfs.github.com/spec/v1\n", "gzip": gzip.compress(JPEG),
}  # fmt: skip
PILLOW = int(PIL.__version__.split(".")[0])
OTHERWISE = {"RLE that jumps": 12, "tile of none": 12, "TIFF YCbCr": 13}  # by earlier ones than this
if PILLOW >= 12:  # the libtiff of earlier ones has no zstd
    GOOD_PICTURES["TIFF by zstd"] = saved("TIFF", compression="zstd")
if decoding.AVIF:
    AVIF = saved("AVIF")
    GOOD_PICTURES |= {"AVIF": AVIF, "animated AVIF": pages("AVIF"), "AVIF RGBA": saved("AVIF", "RGBA")}
    BAD_PICTURES |= {"cut AVIF": AVIF[: len(AVIF) * 3 // 4]}
    BAD_PICTURES |= {"huge AVIF": patched(AVIF, AVIF.index(b"ispe") + 8, big(*HUGE))}


def socket_in(folder):
    with socket.socket(socket.AF_UNIX) as made, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # its path may have 107 bytes
        made.bind("socket.jpg")
    return "socket.jpg"


def fifo(folder):
    os.mkfifo(folder / "fifo.jpg")
    return "fifo.jpg"


def link(name, to):
    def make(folder):
        put("outside/o.jpg")(folder.parents[2])
        os.symlink(to, folder / name)
        return f"{name}/o.jpg" if to.endswith("outside") else name

    return make


def unreadable(folder):
    put("unreadable.jpg")(folder)
    os.chmod(folder / "unreadable.jpg", 0)
    return "unreadable.jpg"


# One file in the folder of a class: kind -> what makes it and returns its path, what becomes of it.
FILES = {
    "newline": (put("a\nb.jpg"), TAKEN), "quotes": (put("a'b\"c.jpg"), TAKEN), "brackets": (put("[a]*?.jpg"), TAKEN),
    "emoji": (put("\N{ant}\u200d\N{honeybee}.jpg"), TAKEN), "right to left": (put("a\u202egpj.exe.jpg"), TAKEN),
    "not UTF-8": (put("\udcff.jpg"), LEFT), "255 bytes": (put("x" * 251 + ".jpg"), TAKEN),
    "dash": (put("-rf.jpg"), TAKEN), "space": (put(" .jpg"), TAKEN), "space at the end": (put("y.jpg "), LEFT),
    "hidden": (put(".h.jpg"), TAKEN), "only a suffix": (put(".jpg"), TAKEN), "escape": (put("\x1b[2J.jpg"), TAKEN),
    "percent": (put("%s%n.jpg"), TAKEN), "backslash": (put("a\\b.jpg"), TAKEN), "composed": (put("\xe9.jpg"), TAKEN),
    "decomposed": (put("e\u0301.jpg"), TAKEN), "upper case": (put("X.JPG"), TAKEN), "no suffix": (put("bare"), TAKEN),
    "no suffix, no image": (put("notes", b"text"), LEFT), "newline, no image": (put("a\nb.txt"), LEFT),
    "escape, no image": (put("\x1b[2J.txt"), LEFT), "newline in the suffix": (put("z.j\npg"), LEFT),
    "right to left, no image": (put("\u202e.txt"), LEFT), "backup": (put("u.jpg~"), LEFT),
    "zip": (put("more.zip", b"PK\5\6" + bytes(18)), LEFT), "tar": (put("more.tar", bytes(1024)), LEFT),
    "pickle": (put("more.pkl", b"."), LEFT), "parquet": (put("more.parquet", b"PAR1"), LEFT),
    "HEIC": (put("phone.heic"), LEFT), "SVG": (put("drawing.svg"), LEFT),
    "dangling": (link("dangling.jpg", "gone"), LEFT), "a link to itself": (link("loop.jpg", "loop.jpg"), LEFT),
    "link to a file": (link("out.jpg", "../../../outside/o.jpg"), TAKEN),
    "link to a folder": (link("folder", "../../../outside"), TAKEN), "link up": (link("up", ".."), LEFT),
    "link to a device": (link("zero.jpg", "/dev/zero"), LEFT), "FIFO": (fifo, LEFT), "socket": (socket_in, LEFT),
    "folder called .jpg": (put("f.jpg/0.jpg"), TAKEN), "200 deep": (deep("n", 200), TAKEN),
    "1200 deep": (deep("m", 1200), TAKEN), "too long a path": (lambda folder: deep("d" * 250, 17)(folder)[:2000], LEFT),
}  # fmt: skip
FILES |= {f"{kind} .jpg": (put(f"good{i}.jpg", data), TAKEN) for i, (kind, data) in enumerate(GOOD_PICTURES.items())}
FILES |= {f"{kind} .jpg": (put(f"bad{i}.jpg", data), BAD) for i, (kind, data) in enumerate(BAD_PICTURES.items())}
if os.geteuid():  # who is root reads all
    FILES["unreadable"] = unreadable, BAD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All odd files in the folder of a class, scanned once: the folder, each one's path, the split."""
    root = tmp_path_factory.mktemp("fuzz") / "set"
    odd = root / "train/odd"
    put("0.jpg")(root / "train/even")
    odd.mkdir()
    places = {kind: f"odd/{make(odd)}" for kind, (make, _) in FILES.items()}
    with pytest.MonkeyPatch.context() as patch, bounded():
        patch.setattr(identity, "SHOWN", 1000)
        split = load_split(recipe(root), "train", None)
    yield root / "train", places, split
    subprocess.run(["rm", "-r", root], check=True)  # pytest would not: folders lie too deep for Python


def test_each_file_is_in_the_table_or_in_the_notes(folder):
    root, places, split = folder
    found = {os.path.relpath(path, root) for path in split.table["image"]}
    assert found == {"even/0.jpg"} | {places[kind] for kind, (_, wanted) in FILES.items() if wanted != LEFT}
    assert all(note.isprintable() for note in split.notes)
    counts = [int(note.split()[0]) for note in split.notes]
    assert sum(counts) + len(split.table) == len(FILES) + 1


@pytest.mark.parametrize("kind", FILES)
def test_an_odd_file_is_taken_or_bad_or_left_out_and_named(folder, kind):
    if OTHERWISE.get(kind.removesuffix(" .jpg"), 0) > PILLOW:
        pytest.skip("this Pillow refuses what later ones take, or the other way round")
    root, places, split = folder
    if FILES[kind][1] == LEFT:
        assert any(printable(places[kind]) in note for note in split.notes)
        return
    index = split.table["image"].index(f"{root}/{places[kind]}")
    with bounded():
        assert judged(split.table, index) == FILES[kind][1]


def test_a_bad_image_is_told_in_one_line_whatever_it_is_called(tmp_path):
    put("train/ant/a\nRankError: \x1b[2J.jpg", b"text")(tmp_path)
    samples = Samples(load_split(recipe(tmp_path), "train", None).table, recipe(), EvalTransform(4, 4, "bilinear"))
    for workers in (0, 1):
        with pytest.raises(RankError) as caught:
            list(samples.batches([[Key(0, 0, 0)]], 1, workers, torch.device("cpu")))
        assert str(caught.value).startswith("image 0 (/") and str(caught.value).isprintable()
        assert r"ant/a\nRankError: \x1b[2J.jpg) cannot be read: not an image" in str(caught.value)
