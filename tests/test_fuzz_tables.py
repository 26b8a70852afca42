"""Promise: an odd table has all of its rows, each an image or a bad one, or is refused in one line.

The dictionaries say what becomes of each kind. None is waited for, writes anything, fills the memory, lets a warning
out or leads to a file that lies elsewhere.
"""

import gzip
import os
import struct
from typing import Any

import pyarrow as pa
import pytest
from odd import (
    BAD,
    CLASSES,
    END,
    JPEG,
    ROW,
    STRUCT,
    TAKEN,
    as_bytes,
    bounded,
    deep,
    judged,
    member,
    no_text,
    put,
    recipe,
    said,
    same_again,
    sample,
    table,
)  # fmt: skip

from mixup_recipes.data import opening
from mixup_recipes.data.splits import load_split
from mixup_recipes.typed import UserError

WHOLE, NO_IMAGES, NO_TYPE = (
    "does not hold whole numbers",
    "does not hold images",
    "not have a datasets dtype equivalent",
)
UNOPENED, OTHERS, NO_FOLDER = (
    "cannot open dataset",
    "the same columns and class names",
    "has no folder for split 'train'",
)
AGAIN, NO_LABEL = "in memory; expected images", "row 1: expected a word or a whole number"


def rows(*args, **options):
    """Makes train.parquet of a table."""
    return put("train.parquet", as_bytes(table(*args, **options)))


def raw(content):
    """Makes train.parquet of these bytes."""
    return put("train.parquet", content)


def shards(*tables):
    """Makes the files of a split, each of another table."""
    return both(*(put(f"train-{i:05}-of-{len(tables):05}.parquet", as_bytes(each)) for i, each in enumerate(tables)))


def of(values, kind):
    return pa.array(values, kind)


def mapped(column):
    """Makes a table with a map in a column."""
    return rows(**{column: of([[(1, 1)]] * 2, pa.map_(pa.int8(), pa.int8()))})


def names(*words):
    """Makes a table of classes of these names."""
    return rows(head=said(label=CLASSES | {"names": list(words)}))


def beside(text):
    """Makes train.parquet, folders in one another and the head of a README."""
    return both(raw(PARQUET), deep("d", 8), put("README.md", f"---\n{text}\n---\n".encode()))


def both(*makers):
    return lambda folder: [make(folder) for make in makers]


PARQUET = as_bytes(table())
PATHS = ["/etc/passwd", "../../x.jpg", "https://example.com/a.jpg", "/dev/zero", "~/x", "hf://datasets/a", "zip://x::y"]
LISTS = pa.list_(pa.list_(pa.uint8()))
WRONG_PATH = pa.StructArray.from_arrays([of([JPEG] * 2, pa.binary()), no_text(2)], ["bytes", "path"])
MORE_ROWS = said()[:-2] + ', "splits": {"train": {"num_examples": 1000000000000000, "num_bytes": 1000000000000000}}}}'
OTHER_ORDER = said(label=CLASSES | {"names": ["bee", "ant"]})
UNKNOWN: list[object] = ["Hologram", "os", "generate_from_dict", 3, [], None]
TWICE = pa.table([pa.array([1, 2])] * 2, names=["label", "label"])
# A folder with a table: kind -> what makes it, and how many good and bad images it has, or what the refusal says.
TABLES: dict[str, tuple[Any, Any]] = {
    "nothing said of columns": (rows(), (2, 0)), "images and classes said": (rows(head=said()), (2, 0)),
    "no rows": (rows([], []), "is empty"),
    "no columns": (raw(as_bytes(pa.table({}))), "no column 'image'; valid names: none"),
    "an image is null": (rows([None, ROW]), (1, 1)), "images are null": (rows(pa.nulls(2)), (0, 2)),
    "no bytes": (rows([ROW, ROW | {"bytes": None}]), (1, 1)),
    "empty bytes": (rows([ROW, ROW | {"bytes": b""}]), (1, 1)), "a label is null": (rows(labels=[0, None]), "row 2"),
    "labels are null": (rows(labels=pa.nulls(2)), "2 rows have no label in column 'label', the first is row 1"),
    **{f"labels like {value!r}": (rows(labels=[value] * 2), NO_LABEL) for value in (0.5, b"a", {"x": 0}, 1e300)},
    "labels like True": (rows(labels=[True, False]), (2, 0)), "labels like 1.0": (rows(labels=[1.0, 0.0]), (2, 0)),
    **{f"classes like {value!r}": (rows(labels=[value] * 2, head=said()), (2, 0)) for value in (1.0, True)},
    "labels in lists": (rows(labels=[[0]] * 2), "holds lists: an image may have several labels"),
    "classes in lists": (rows(labels=[[0]] * 2, head=said()), "holds lists: an image may have several labels"),
    "labels below 0": (rows(labels=[0, -5]), "unlabelled images (label -5)"),
    "labels of 2^62": (rows(labels=[0, 2**62]), "is too large for a class"),
    "more labels than classes": (rows(labels=[0, 2], head=said()), "has label 2, but only 2 class names"),
    "labels of 2^64": (rows(labels=of([0, 2**64 - 1], pa.uint64())), "is too large for a class"),
    "labels of 8 bits": (rows(labels=of([0, 1], pa.int8())), (2, 0)),
    "days": (rows(labels=of([0, 1], pa.date32())), NO_LABEL + ", got 1970-01-01"),
    "labels in a dictionary": (rows(labels=of([0, 1], pa.int64()).dictionary_encode()), (2, 0)),
    "maps": (mapped("labels"), NO_TYPE),
    "binary": (rows(of([JPEG] * 2, pa.binary())), (2, 0)),
    "large binary": (rows(of([JPEG] * 2, pa.large_binary())), (2, 0)),
    "binary in a dictionary": (rows(of([JPEG] * 2, pa.binary()).dictionary_encode()), (2, 0)),
    "paths as text": (rows(of(PATHS, pa.string()), [0] * 7), (0, 7)),
    "paths of images": (rows([{"bytes": None, "path": path} for path in PATHS], [0] * 7, said()), (0, 7)),
    "paths as large text": (rows(of(PATHS, pa.large_string()), [0] * 7), (0, 7)),
    "path that is no text": (rows(WRONG_PATH), "Invalid UTF8"),
    **{f"images like {value!r}": (rows(pa.array([value] * 2)), NO_IMAGES) for value in (1, 0.5, True, [1], ["a"], [])},
    "pixels": (rows(of([[[1, 2], [3, 4]]] * 2, LISTS)), NO_IMAGES),
    "ragged pixels": (rows(of([[[1, 2], [3]]] * 2, LISTS)), NO_IMAGES),
    "list of images": (rows(of([[ROW]] * 2, pa.list_(STRUCT))), NO_IMAGES),
    "images of 4 bytes": (rows(of([b"abcd"] * 2, pa.binary(4))), NO_IMAGES),
    "more fields": (rows(pa.array([ROW | {"more": 1}] * 2)), (2, 0)),
    "fields swapped": (rows(of([ROW] * 2, pa.struct([STRUCT[1], STRUCT[0]]))), (2, 0)),
    "bytes only": (rows(pa.array([{"bytes": JPEG}] * 2)), (2, 0)),
    "path only": (rows(pa.array([{"path": "/etc/passwd"}] * 2)), (0, 2)),
    "other fields": (rows(pa.array([{"x": 1}] * 2)), (0, 2)),
    "bytes are text": (rows(pa.array([{"bytes": "text"}] * 2)), (0, 2)),
    "bytes are a number": (rows(pa.array([{"bytes": 1}] * 2)), NO_IMAGES),
    **{f"said to be {kind}": (rows(head=said({"_type": kind})), NO_IMAGES) for kind in ("Audio", "Video", "Pdf")},
    "said to be pixels": (rows(head=said({"_type": "Array2D", "shape": [1, 1], "dtype": "int8"})), (2, 0)),
    **{
        f"said to be {kind!r}": (rows(head=said({"_type": kind})), UNOPENED)
        for kind in UNKNOWN
    },
    **{
        f"said {value!r}": (rows(head=said(value)), UNOPENED)
        for value in (None, 3, "Image", {"_type": "Value", "dtype": "x"})
    },
    **{
        f"head {head[:30]}": (rows(head=head), UNOPENED)
        for head in ("{", "", "[]", "null", '{"info": null}', '{"info": {"features": []}}', "9" * 5000, "[" * 5000)
    },
    "head that is no text": (rows(head=b"\xff"), UNOPENED), "empty head": (rows(head="{}"), (2, 0)),
    "columns that are not there": (rows(head=said(mask={"_type": "Image"})), (2, 0)),
    "rows that are not there": (rows(head=MORE_ROWS), (2, 0)),
    "two classes of a name": (names("a", "a"), "duplicated"),
    "two names that look alike": (names(1, "1"), "duplicated"), "no class": (names(), "only 0 class names"),
    "names as numbers": (names(7, 8), (2, 0)), "blank names": (names("", " "), (2, 0)),
    "names on lines": (names("a\nb", "\x1b[2J"), (2, 0)),
    "names that are no text": (names("\ud800", "b"), "a class name that is not text: '\\ud800'"),
    "names of a file": (rows(head=said(label={"_type": "ClassLabel", "names_file": "/etc/passwd"})), UNOPENED),
    "names as a table": (rows(head=said(label=CLASSES | {"names": {"0": "a"}})), UNOPENED),
    "columns of the same name": (raw(as_bytes(TWICE)), "exists 2 times"),
    "a column on two lines": (raw(as_bytes(pa.table({"im\nage": [1], "la\x1bbel": [1]}))), "no column 'image'"),
    "no images": (raw(as_bytes(table().select(["label"]))), "no column 'image'"),
    "no labels": (raw(as_bytes(table().select(["image"]))), "no column 'label'"),
    "a column that is a map": (mapped("more"), NO_TYPE),
    "a column without a name": (rows(**{"": [1, 2]}), (2, 0)),
    "a shard of other columns": (shards(table(), table(more=[1, 2])), OTHERS),
    "a shard of other types": (shards(table(), table(labels=of([0, 1], pa.int32()))), OTHERS),
    "a shard of other classes": (shards(table(head=said()), table(head=OTHER_ORDER)), OTHERS),
    "an empty shard": (shards(table(), table([], of([], pa.int64()))), (2, 0)),
    "a broken shard": (
        both(shards(table(), table()), put("train-00001-of-00002.parquet", b"PAR1")), "train-00001-of-00002.parquet: "
    ),
    "shards that are not there": (put("train-00000-of-99999.parquet", PARQUET), "99993 more of 99999 are missing"),
    "no shards": (put("train-00000-of-00000.parquet", PARQUET), "1 file for 0 shards"),
    "a number too high": (put("train-00007-of-00002.parquet", PARQUET), "shards 0, 1 of 2 are missing"),
    **{f"cut at {at}": (raw(PARQUET[:at]), UNOPENED) for at in (0, 1, 4, 500, len(PARQUET) - 1)},
    "start cut off": (raw(PARQUET[100:]), UNOPENED),
    "a broken footer": (raw(PARQUET[:-300] + b"\xff" * 100 + PARQUET[-200:]), UNOPENED),
    "zeros": (raw(PARQUET[:4] + bytes(600) + PARQUET[604:]), UNOPENED),
    **{
        f"footer of {n}": (raw(PARQUET[:-8] + struct.pack("<I", n) + b"PAR1"), UNOPENED)
        for n in (0, 2**31 - 1, 2**32 - 1)
    },
    "encrypted": (raw(PARQUET[:-4] + b"PARE"), "encrypted"),
    "wrong magic": (raw(PARQUET[:-4] + b"XXXX"), "magic bytes"), "text": (raw(b"no parquet\n"), "magic bytes"),
    "twice the magic": (raw(b"PAR1PAR1"), UNOPENED),
    **{
        f"by {name}": (raw(as_bytes(table(), compression=name)), (2, 0))
        for name in ("none", "gzip", "zstd", "brotli", "lz4")
    },
    "groups of one": (raw(as_bytes(table(), row_group_size=1)), (2, 0)),
    "pages of version 2": (raw(as_bytes(table(), data_page_version="2.0")), (2, 0)),
    "the same image again and again": (raw(as_bytes(same_again(bytes(100_000), 3000))), AGAIN),
    "and in plain columns": (raw(as_bytes(same_again(bytes(100_000), 3000), store_schema=False)), AGAIN),
    "ten million rows": (raw(as_bytes(same_again(b"", 10**7), row_group_size=10**7)), "10,000,000 rows in"),
    "folder called .parquet": (lambda folder: (folder / "train.parquet").mkdir(), NO_FOLDER),
    "FIFO": (lambda folder: os.mkfifo(folder / "train.parquet"), NO_FOLDER),
    "device": (lambda folder: (folder / "train.parquet").symlink_to("/dev/zero"), NO_FOLDER),
    "dangling": (lambda folder: (folder / "train.parquet").symlink_to("gone"), NO_FOLDER),
    "nothing": (lambda folder: None, NO_FOLDER), "upper case": (put("train.PARQUET", PARQUET), (2, 0)),
    "hidden": (put(".train.parquet", PARQUET), NO_FOLDER),
    "name on two lines": (put("tr\nain.parquet", PARQUET), "has no split 'train'"),
    "two on three lines": (
        both(put("a\nb/train.parquet", PARQUET), put("c/train.parquet", PARQUET)), "2 configurations: a\\nb, c"
    ),
    "no text": (put("\udcff/train.parquet", PARQUET), "surrogates not allowed"),
    "name like a column": (put("label=7/train.parquet", PARQUET), (2, 0)),
}  # fmt: skip
STARS, PATTERN = "**/" * 40, "configs: [{{data_files: {{train: {}}}}}]"
NO_FILE, UNREAD = "names no file that is there", "the configs of README.md cannot be read"
LAUGHS = ", ".join(f"&{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))
ABROAD = ["../*/*.parquet", "/etc/**", "~/*", "hf://datasets/a/b/train.parquet", "zip://train.parquet::x.zip"]


def configs(*rows):
    """Configurations of these names and files."""
    return "configs: [" + ", ".join(f"{{config_name: {name}, data_files: {files}}}" for name, files in rows) + "]"


# The head of a README beside train.parquet: kind -> text, rows or what the refusal says.
READMES = {
    "nothing": ("", 2), "null": ("configs:", 2), "number": ("configs: 3", 2), "no list": ("configs: []", 2),
    "dates": ("x: 2020-99-99", 2), "no bool": ("x: !!bool maybe", 2),
    "Python": ("x: !!python/object/apply:os.system ['touch here']", 2), "not YAML": ("x: [", 2), "tab": ("\tx: 1", 2),
    "circle": ("configs: &a [*a]", UNREAD), "circle of files": (PATTERN.format("&a [*a]"), UNREAD),
    "Python there": ("configs: [!!python/object/apply:os.system ['touch here']]", 2),
    "unclosed": ("configs: [", UNREAD), "deep": ("configs: " + "[" * 300, UNREAD),
    "unknown alias": ("configs: *a", UNREAD),
    "bomb": (f"configs: [&a {['x'] * 9}, {LAUGHS}]", 2),
    "bomb of files": (f"configs: [&a {['x'] * 9}, {LAUGHS}, {{data_files: {{train: *k}}}}]", NO_FILE),
    "long": ("configs:\n" + "- a\n" * 40_000, "has configs of 160,00"),
    "numbers": (configs((2019, "train.parquet")), 2),
    "split 2019": ("configs: [{data_files: [{split: 2019, path: x}]}]", "valid names: 2019"),
    "two lines": (configs(('"a\\nb"', "x"), ("c", "x")), "2 configurations: a\\nb, c"),
    "no default": (configs(("a, default: false", "x"), ("b, default: true", "train.parquet")), 2),
    "list as a name": (configs(("[x]", "x")), 2),
    "no path": ("configs: [{data_files: [{split: train}]}]", NO_FILE), "no files": ("configs: [{config_name: a}]", 2),
    **{
        f"pattern {text[:30]}": (PATTERN.format(f"'{text}'"), NO_FILE)
        for text in (
            *ABROAD, f"{STARS}*.txt", f"{'**/a/' * 9}x", "*a" * 99, "tr[ain.parquet", "tr[z-a]in.parquet", "", ".",
            "x" * 5000, "README.md",
        )
    },
    "all": (PATTERN.format("'**'"), 2), "stars": (PATTERN.format(f"'{STARS}*.parquet'"), 2),
    "dots": (PATTERN.format("./././train.parquet"), 2),
    "pattern in lists": (PATTERN.format("[[train.parquet]]"), NO_FILE),
    "pattern with NUL": (PATTERN.format('"tr\\0ain.parquet"'), NO_FILE),
    "no text": (PATTERN.format('"\\ud800"'), NO_FILE),
}  # fmt: skip
TABLES |= {
    f"README: {kind}": (beside(text), (2, 0) if wanted == 2 else wanted) for kind, (text, wanted) in READMES.items()
}


def tar(*members, end=END):
    """Makes train.tar of these members."""
    return put("train.tar", b"".join(members) + end)


A, B = sample("a"), sample("b", 1)
DAMAGED, NO_SAMPLE = "train.tar is not a whole tar: ", "no sample has an image and a label; samples have "
HUGE = b"77777777777\0"
FAR = b"\x80" + struct.pack(">Qxxx", 2**62)  # a size in binary
PAX = b"28 size=4611686018427387904\n"
# A folder with a tar: as in ``TABLES``.
TARS = {
    "two samples": (tar(A, B), (2, 0)), "folders in names": (tar(sample("x/y/a"), sample("x/z/a", 1)), (2, 0)),
    "a bad image": (tar(A, sample("b", 1, b"no image")), (1, 1)), 
    "an empty image": (tar(A, sample("b", 1, b"")), (1, 1)),
    "truncated content": (tar(A, B[:-600], end=b""), DAMAGED), "truncated header": (tar(A, B[:100], end=b""), DAMAGED),
    "no end": (tar(A, B, end=b""), DAMAGED + "its end is missing"), "empty": (tar(end=b""), DAMAGED),
    "zeros": (tar(), NO_SAMPLE + "no members"), "no tar": (tar(JPEG * 9), DAMAGED),
    "wrong checksum": (tar(b"z" + A[1:], B), DAMAGED),
    "wrong checksum of the second": (tar(A, b"z" + B[1:]), DAMAGED + "expected a header at byte"),
    "two tars in one": (tar(A, END, B), DAMAGED + "expected a header at byte"),
    "names with ..": (tar(sample("../a"), sample("../../../../tmp/b", 1)), (2, 0)),
    "absolute names": (tar(sample("/etc/a"), sample("/dev/b", 1)), (2, 0)),
    "names on two lines": (tar(sample("a\nb"), sample("\x1b[2J", 1)), (2, 0)),
    "names that are no text": (tar(A, B, sample("c\udcff")), (2, 0)),
    **{
        f"a member of type {kind}": (tar(A, member("b.jpg", b"", type=b"%d" % kind, linkname="/etc/passwd"), B), (2, 0))
        for kind in range(1, 7)
    },
    "a link in place of the image": (
        tar(A, member("b.jpg", b"", type=b"2", linkname="a.jpg"), member("b.cls", b"1")), (1, 0)
    ),
    "a sparse image": (tar(A, member("b.jpg", b"", 483, HUGE, type=b"S"), member("b.cls", b"1")), (1, 0)),
    "hidden members": (tar(member("._a.jpg"), A, member("__MACOSX.jpg"), B), (2, 0)),
    "a class that is a word": (tar(A, member("b.cls", b"bee"), member("b.jpg")), "its cls, cannot be read"),
    "a class of a thousand digits": (tar(A, member("b.cls", b"9" * 1000), member("b.jpg")), "a word or a whole number"),
    "a class below 0": (tar(A, sample("b", -1)), "unlabelled images (label -1)"),
    "an endless class": (tar(A, member("b.cls", bytes(2**20 + 1)), member("b.jpg")), "more than 1,048,576"),
    **{
        f"a size of {size!r}": (tar(A, member("b.jpg", field=size), END), DAMAGED)
        for size in (HUGE, FAR, b"\xff" * 12, b"zzzzzzzzzzz\0")
    },
    "a size in a head of its own": (tar(A, member("pax", PAX, type=b"x"), B), DAMAGED),
    "a head that is far too long": (tar(A, member("pax", PAX, field=FAR, type=b"x"), B), DAMAGED),
    "two images of a sample": (tar(A, member("a.png"), B), "the sample 'a' has images jpg, png; choose one by --image"),
    "the same member twice": (tar(A, member("a.jpg")), "the sample 'a' has two members .jpg"),
    "a sample in two places": (tar(A, B, A), "the sample 'a' is there twice"),
    "no labels": (tar(member("a.jpg"), member("b.jpg")), NO_SAMPLE + "jpg (set"),
    "no images": (tar(member("a.cls", b"0"), member("b.npy")), NO_SAMPLE + "cls, npy (set"),
    "one without a label": (tar(A, B, member("c.jpg")), (2, 0)),
    "one without a suffix": (tar(A, B, member("c")), (2, 0)),
    "words": (tar(sample("a", b'{"label": "ant"}'), sample("b", b'{"label": "bee"}'), sample("c", b"{}")), (2, 0)),
    "true and false in JSON": (tar(sample("a", b'{"label": true}'), sample("b", b'{"label": false}')), (2, 0)),
    **{
        f"a class like {text!r}": (tar(A, member("b.cls", text), member("b.jpg")), "expected a whole number in digits")
        for text in (b"1_0", b"+1", b" 1", b"1 ", b"-0", b"", b"\n1", b"\xd9\xa1", b"1.0")
    },
    "a class and the end of a line": (tar(A, member("b.cls", b"01\r\n"), member("b.jpg")), (2, 0)),
    "null and NaN": (tar(A, B, sample("c", b'{"label": null}'), sample("d", b'{"label": NaN}')), (2, 0)),
    "numbers in JSON": (tar(sample("a", b'{"label": 0}'), sample("b", b'{"label": 1.0}')), (2, 0)),
    **{
        f"JSON like {text[:18]!r}": (tar(sample("a", text)), "its json, cannot be read")
        for text in (
            b"[0]", b"{", b"", b"\xff", b"[" * 9999, b'{"label": []}', b'{"label": 0.5}', b'{"label": "\\ud800"}'
        )
    },
    "compressed": (put("train.tar.gz", gzip.compress(A + END)), "is compressed, and its images cannot be reached"),
    **{
        f"beside {name}": (both(tar(A, B), put(name, gzip.compress(A + END))), f"{name} is compressed, and its images")
        for name in ("train-1.tar.gz", "train-1.TGZ")
    },
    "upper case": (both(put("train-0.tar", A + END), put("train-1.TAR", B + END)), (2, 0)),
    "compressed under another name": (put("train.tar", gzip.compress(A + END)), DAMAGED),
    "pipe": (lambda folder: os.mkfifo(folder / "train.tar"), NO_FOLDER),
    "beside a table": (both(raw(PARQUET), tar(A, B)), "holds parquet files and tars, such as train.tar"),
    "of two splits by name": (put("in1k-train-0.tar", A + END), "called in1k-train; name those to train"),
    **{
        f"a shard that is missing, {name}": (put(f"{name}.tar", A + END), "shards 0 of 2 are missing")
        for name in ("train-00001-of-00002", "train-1-of-2", "train_000001-of-000002", "train/0001-of-0002")
    },
}  # fmt: skip
TABLES |= {f"tar: {kind}": row for kind, row in TARS.items()}


@pytest.mark.parametrize("kind", TABLES)
def test_an_odd_table_has_its_rows_or_is_refused_in_one_line(tmp_path, monkeypatch, kind):
    make, wanted = TABLES[kind]
    (tmp_path / "set").mkdir()
    make(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with bounded():
        if isinstance(wanted, str):
            with pytest.raises(UserError) as caught:
                load_split(recipe(tmp_path / "set"), "train", None)
            assert wanted in str(caught.value) and str(caught.value).isprintable()
        else:
            found = load_split(recipe(tmp_path / "set"), "train", None).table
            fates = [judged(found, index) for index in range(len(found))]
            assert (fates.count(TAKEN), fates.count(BAD)) == wanted
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["a shard of other columns", "a shard of other classes", "a broken shard"])
def test_the_shards_of_a_large_table_are_compared_before_anything_is_copied(tmp_path, monkeypatch, kind):
    make, wanted = TABLES[kind]
    make(tmp_path)
    monkeypatch.setattr(opening, "SMALL", 0)
    monkeypatch.setattr(opening, "announce_copy", lambda *_: pytest.fail("copied"))
    with pytest.raises(UserError, match=wanted):
        load_split(recipe(tmp_path), "train", None)
