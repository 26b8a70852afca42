"""Images in a zip, each read from its place in it: nothing is unpacked, and no member gets a name on the disk.

A zip's directory says where its members are. The address of one is ``zip:<zip>::<first byte>-<end>-<size>::<name>``,
where the zip is a file or on the Hub and the size is that of the packed data, so that whoever reads it asks for its
bytes and for no directory.
"""

import itertools
import re
import struct
import zipfile
import zlib
from typing import BinaryIO

from mixup_recipes.data.decoding import LARGEST_FILE, BadImage

ADDRESS = re.compile(r"zip:(?P<zip>.+?)::(?P<first>\d+)-(?P<end>\d+)-(?P<size>\d+)::(?P<name>.*)", re.DOTALL)
HEAD = struct.Struct("<4s2xHH16xHH")  # of a member: signature, flags, method, lengths of name and extra field
ENCRYPTED = 1


def addresses(archive: str, file: BinaryIO) -> dict[str, str]:
    """The address of each member of a zip by its name. Raises ``zipfile.BadZipFile``."""
    with zipfile.ZipFile(file) as opened:
        members = sorted(opened.infolist(), key=lambda member: member.header_offset)
        starts = [member.header_offset for member in members] + [opened.start_dir]
    ends = {start: end for start, end in itertools.pairwise(sorted({*starts}))}
    return {
        m.filename: f"zip:{archive}::{m.header_offset}-{ends[m.header_offset]}-{m.compress_size}::{m.filename}"
        for m in members
        if m.header_offset in ends
    }


def name_of(path: str) -> str:
    """The name of a member by its address; a path itself."""
    member = ADDRESS.fullmatch(path)
    return member["name"] if member else path


def unpacked(part: bytes, size: int) -> bytes:
    """A member's content, of the bytes from its first to its end; ``size``: of its data. Raises ``BadImage``."""
    if len(part) < HEAD.size or part[:4] != b"PK\3\4":
        raise BadImage("not a member of a zip")
    _, flags, method, name, extra = HEAD.unpack_from(part)
    data = part[HEAD.size + name + extra :][:size]
    if flags & ENCRYPTED:
        raise BadImage("encrypted in its zip")
    if len(data) < size:
        raise BadImage("cut short in its zip")
    if method == zipfile.ZIP_STORED:
        return data
    if method != zipfile.ZIP_DEFLATED:
        raise BadImage(f"compressed in its zip by method {method}; expected stored or deflated")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(data, LARGEST_FILE)
    except zlib.error as e:
        raise BadImage(f"damaged in its zip: {e}") from None
    if not unpacker.eof:
        raise BadImage(f"cut short in its zip, or more than {LARGEST_FILE:,} bytes")
    return content
