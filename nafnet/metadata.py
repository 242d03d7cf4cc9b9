"""What a file holds around its pixels: chunks, segments and directories, EXIF, and a note of where it came from.

Bytes to bytes, no pixels. Damaged bytes raise ValueError, LookupError or struct.error, which `decode` reports.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape, unescape
from io import BytesIO
from typing import Any

from PIL import Image

# What parsers raise on damaged bytes, found by fuzzing.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,  # a TIFF tag that is missing,
    TypeError,  # or of another type than its number says
    ArithmeticError,
    UserWarning,  # Pillow's, of tags that it cannot read, where warnings are errors
    struct.error,
    zlib.error,
)

ORIENTATION = 274
_EXIF_IFD, _GPS_IFD, _INTEROP_IFD = 34665, 34853, 40965
# The TIFF tags that describe the photograph; the others describe how one file stores it. Description, make,
# model, orientation, x and y resolution and its unit, software, date, artist, copyright.
_DESCRIPTIVE_TAGS = (270, 271, 272, ORIENTATION, 282, 283, 296, 305, 306, 315, 33432)


# Containers


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    """The body of the first chunk of every kind but the pixels."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at + 12 <= len(data):  # length, kind, body, CRC
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        if kind != b"IDAT":
            chunks.setdefault(kind, data[at + 8 : at + 8 + length])
        at += 12 + length
    return chunks


def riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of every chunk of a WebP file."""
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    at = 12
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        yield kind, data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


# A marker, but neither a stuffed zero, a restart, nor another that stands alone; and the end marker, which does.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


def jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker (0xC0..0xFE) and body of every segment, past the scans; ValueError when there is no end marker."""
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker = found[0][1]
        if marker == 0xD9:
            return
        (length,) = struct.unpack_from(">H", data, found.end())
        at = found.end() + length
        yield marker, data[found.end() + 2 : at]
    raise ValueError("no end marker")


# TIFF's types by number: the bytes of a value, and how the unsigned integers are unpacked
_TIFF_TYPE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), 1)) | {16: 8, 17: 8, 18: 8}
_TIFF_UNSIGNED = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}


@dataclass(frozen=True, slots=True)
class TiffDirectory:
    """The entries of one directory of a TIFF, BigTIFF or EXIF block, by tag as (type, count, where it lies).

    Of a tag that is listed twice the first counts, as for libtiff: a later width would slip past the size limit.
    """

    data: bytes
    order: str
    start: int
    following: int
    entries: dict[int, tuple[int, int, int]]

    @classmethod
    def read(cls, data: bytes, start: int | None = None) -> "TiffDirectory":
        """The directory at `start`, by default the first; ValueError when it is cut short or an attack."""
        order, big = {b"II": ("<", data[2:3]), b"MM": (">", data[3:4])}[data[:2]]
        count_as, entry_as, offset_as = ("Q", "HHQ", "Q") if big == b"\x2b" else ("H", "HHI", "I")
        inline = struct.calcsize(order + offset_as)
        if start is None:
            (start,) = struct.unpack_from(order + offset_as, data, inline)
        (count,) = struct.unpack_from(order + count_as, data, start)
        if count > 4096:  # libtiff's limit
            raise ValueError(f"a TIFF directory of {count} entries")
        entries: dict[int, tuple[int, int, int]] = {}
        at, claimed = start + struct.calcsize(order + count_as), 0
        for _ in range(count):
            tag, kind, number = struct.unpack_from(order + entry_as, data, at)
            where = at + struct.calcsize(order + entry_as)
            at = where + inline
            size = number * _TIFF_TYPE_BYTES.get(kind, 0)
            if size > inline:
                (where,) = struct.unpack_from(order + offset_as, data, where)
                claimed += max(0, min(size, len(data) - where))
            entries.setdefault(tag, (kind, number, where))
        if claimed > len(data):  # thousands of tags that share their bytes would be copied one by one
            raise ValueError(f"a TIFF directory whose tags hold {claimed} bytes, more than the file")
        (following,) = struct.unpack_from(order + offset_as, data, at)
        return cls(data, order, start, following, entries)

    def numbers(self, tag: int, *default: int) -> tuple[int, ...]:
        """The unsigned integers of a tag; LookupError when it is missing and has no default."""
        if tag not in self.entries:
            if default:
                return default
            raise LookupError(f"TIFF tag {tag} is missing")
        kind, number, where = self.entries[tag]
        if kind not in _TIFF_UNSIGNED or not 1 <= number <= 64:
            raise ValueError(f"TIFF tag {tag} has {number} values of type {kind}")
        return struct.unpack_from(f"{self.order}{number}{_TIFF_UNSIGNED[kind]}", self.data, where)

    def number(self, tag: int, *default: int) -> int:
        return self.numbers(tag, *default)[0]

    def content(self, tag: int) -> bytes | None:
        """The bytes of a tag, None when it is missing, empty or lies outside the file."""
        kind, number, where = self.entries.get(tag, (1, 0, 0))
        size = number * _TIFF_TYPE_BYTES.get(kind, 0)
        content = self.data[where : where + size]
        return content if content and len(content) == size else None


# EXIF


def reset_orientation(exif: bytes | None) -> tuple[int, bytes | None]:
    """The orientation and the same block with 1 in its place; (1, None) without a block that can be parsed.

    Patched in place: rewriting the block would break the absolute offsets in camera makers' notes.
    """
    block = bytearray((exif or b"").removeprefix(b"Exif\0\0"))
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(block[:4]))
    if order is None:
        return 1, None
    try:
        (directory,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", block, entry)
            if tag == ORIENTATION and kind in (3, 4):
                (orientation,) = struct.unpack_from(order + _TIFF_UNSIGNED[kind], block, entry + 8)
                struct.pack_into(order + _TIFF_UNSIGNED[kind], block, entry + 8, 1)
                return orientation, bytes(block)
    except struct.error:
        return 1, None
    return 1, bytes(block)


def description(block: bytes) -> dict[int, Any]:
    """The tags of a TIFF file or EXIF block that describe the photograph, EXIF and GPS directories nested."""
    first = TiffDirectory.read(block)
    exif = Image.Exif()
    exif.endian, exif.bigtiff = first.order, 43 in block[2:4]
    exif.load_from_fp(BytesIO(block), first.start)
    tags = {tag: exif[tag] for tag in _DESCRIPTIVE_TAGS if tag in exif}
    for directory in (_EXIF_IFD, _GPS_IFD):
        if directory in first.entries:
            TiffDirectory.read(block, first.number(directory))  # Pillow would copy whatever the tags claim
        nested = {tag: value for tag, value in exif.get_ifd(directory).items() if tag != _INTEROP_IFD}
        if nested:
            tags[directory] = nested
    if ORIENTATION in tags:
        tags[ORIENTATION] = 1
    return tags


def rewritten_exif(block: bytes) -> bytes | None:
    """`description` of a TIFF file or EXIF block as a fresh EXIF block; None when it is empty or damaged."""
    try:
        exif = Image.Exif()
        exif.update(description(block))
        return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else None
    except (*DAMAGE, AttributeError):  # text where Pillow expects a number, or the reverse
        return None


# Notes

_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:CreatorTool="{}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
_CREATOR_TOOL = re.compile(rb"""xmp:CreatorTool(?:="|='|>)([^"'<]*)""")


def check_note(note: str) -> None:
    """A note is 1 to 1000 printable ASCII characters, which every container holds as they are; else ValueError."""
    if not (note.isascii() and note.isprintable() and 1 <= len(note) <= 1000):
        raise ValueError(f"a note is 1 to 1000 printable ASCII characters, got {len(note)}: {note[:40]!r}")


def xmp_of(note: str) -> bytes:
    """An XMP packet that names the note as the tool that made the file."""
    return _PACKET.format(escape(note)).encode()


def note_in_xmp(packet: bytes | None) -> str | None:
    found = _CREATOR_TOOL.search(packet or b"")
    return unescape(found[1].decode("utf-8", "replace")) if found else None
