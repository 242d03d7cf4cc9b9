"""Bytes to pixels and back, without losing what a photograph carries: bit depth, alpha, grey, ICC and EXIF.

Pillow reads 16-bit colour PNG and TIFF as 8-bit, so imagecodecs (libpng, libtiff) decodes those two; Pillow
decodes the others and parses EXIF. The header is checked before any pixel is decoded.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

Pixels = npt.NDArray[Any]

# Ancillary data that claims to unpack to more than this is an attack, not a profile.
_MAX_ICC_BYTES = 16 * 2**20

# What damaged bytes raise, found by fuzzing.
_DAMAGE = (
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
    imagecodecs.PngError,
    imagecodecs.TiffError,
)

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"BM", "BMP"),
)
_FOREIGN_SIGNATURES = (
    (0, b"GIF8", "GIF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"8BPS", "Photoshop"),
    (0, b"MM\0+", "big-endian BigTIFF"),  # which Pillow's TIFF directory misreads
)

_ORIENTATION = 274
_EXIF_IFD, _GPS_IFD, _INTEROP_IFD = 34665, 34853, 40965
# The TIFF tags that describe the photograph; the others describe how one file stores it. Description, make,
# model, orientation, x and y resolution and its unit, software, date, artist, copyright.
_DESCRIPTIVE_TAGS = (270, 271, 272, _ORIENTATION, 282, 283, 296, 305, 306, 315, 33432)

# format -> (channels, bit depths, longest side) it can hold
_HOLDS: dict[str, tuple[set[int], set[int], int]] = {
    "PNG": ({1, 2, 3, 4}, {8, 16}, 2**31 - 1),
    "JPEG": ({1, 3}, {8}, 65500),
    "TIFF": ({1, 2, 3, 4}, {8, 16, 32}, 2**31 - 1),
    "WEBP": ({3, 4}, {8}, 16383),
    "BMP": ({1, 3}, {8}, 2**31 - 1),
}
# Pillow mode -> the mode its pixels are taken in
_MODES = {"1": "L", "L": "L", "LA": "LA", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}
# TIFF tag 339
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "float"}
_BIT_DEPTHS = {np.dtype(np.uint8): 8, np.dtype(np.uint16): 16, np.dtype(np.float32): 32}


class UnreadableImage(ValueError):  # noqa: N818 - it names what is wrong with the bytes
    """The bytes are not an image, or are damaged or cut short."""


class RefusedImage(ValueError):  # noqa: N818 - it names what was done with the image
    """An image that this project will not touch: too large, empty, several frames, an unsupported kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One upright image.

    `pixels` is contiguous (H, W, C), C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA (alpha not premultiplied),
    as uint8, uint16, or float32 in [0, 1]; ValueError for another shape or dtype. `format` is Pillow's name
    of the file format. `exif` is a TIFF block without the `Exif\\0\\0` prefix, its orientation 1.
    """

    pixels: Pixels
    format: str
    icc: bytes | None = None
    exif: bytes | None = None

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or not 1 <= self.pixels.shape[2] <= 4 or self.pixels.size == 0:
            raise ValueError(f"pixels must be (height, width, 1 to 4 channels), got shape {self.pixels.shape}")
        if self.pixels.dtype not in _BIT_DEPTHS:
            raise ValueError(f"pixels must be uint8, uint16 or float32, got {self.pixels.dtype}")
        if not self.pixels.flags.c_contiguous:
            raise ValueError("pixels must be contiguous: pass np.ascontiguousarray(pixels)")

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def channels(self) -> int:
        return int(self.pixels.shape[2])

    @property
    def bit_depth(self) -> int:
        """8, 16, or 32 for floats."""
        return _BIT_DEPTHS[self.pixels.dtype]


def decode(data: bytes, *, max_pixels: int = 250_000_000) -> Picture:
    """The picture in the bytes of a PNG, JPEG, TIFF, WebP or BMP file, upright, at the depth of the file.

    Palettes become RGB or RGBA, 1 to 4-bit grey becomes 8-bit, CMYK becomes RGB (its profile no longer
    applies and is dropped), premultiplied TIFF alpha is divided out, the first image of a multi-picture JPEG
    is the photograph. EXIF orientation is applied to the pixels. EXIF that cannot be parsed is dropped.

    Raises `UnreadableImage` for bytes that are no image or are damaged, and `RefusedImage` for more than
    `max_pixels` (height x width), several frames or pages, or a kind outside the above (16-bit CMYK, floats
    outside [0, 1]).
    """
    kind = _sniff(data)
    try:
        return _READERS[kind](data, max_pixels)
    except (UnreadableImage, RefusedImage):
        raise
    except Image.DecompressionBombError as error:
        raise RefusedImage(f"{kind} header declares a hostile size: {error}") from error
    except _DAMAGE as error:
        raise UnreadableImage(
            f"{kind} data is damaged or cut short ({len(data)} bytes): {error}; fetch or export it again"
        ) from error


def encode(
    picture: Picture,
    *,
    format: str | None = None,  # noqa: A002 - Pillow's word, and Picture's
    quality: int | None = None,
) -> bytes:
    """The bytes of a file with this picture: same channels and depth, with ICC and EXIF (BMP holds neither).

    `format` is PNG, JPEG, TIFF, WEBP or BMP, by default the picture's own. JPEG is written without chroma
    subsampling, at `quality` 1..100, by default 95; WebP losslessly unless `quality` is given. Raises
    ValueError when the format cannot hold the picture: nothing is converted silently.
    """
    name = format or picture.format
    if name not in _HOLDS:
        raise ValueError(f"cannot write format {name!r}; use one of {', '.join(_HOLDS)}")
    channels, depths, longest = _HOLDS[name]
    if picture.bit_depth not in depths:
        fitting = " or ".join(kind for kind, (_, held, _) in _HOLDS.items() if picture.bit_depth in held)
        raise ValueError(f"{name} cannot hold {picture.bit_depth}-bit samples; use {fitting}")
    if picture.channels not in channels:
        kind = ("grey", "grey with alpha", "RGB", "RGBA")[picture.channels - 1]
        raise ValueError(f"{name} cannot hold {kind}; use PNG or TIFF, or convert the pixels first")
    if max(picture.height, picture.width) > longest:
        size = f"{picture.width}x{picture.height} px"
        raise ValueError(f"{name} cannot hold {size}, only up to {longest} a side; use PNG or TIFF")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, got {quality}")
    if name == "PNG":
        return _write_png(picture)
    if name == "TIFF":
        return _write_tiff(picture)
    return _write_with_pillow(picture, name, quality)


# Reading


def _sniff(data: bytes) -> str:
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    for offset, signature, kind in _FOREIGN_SIGNATURES:
        if data.startswith(signature, offset):
            raise RefusedImage(f"this is {kind}; convert it to PNG, JPEG, TIFF, WebP or BMP first")
    raise UnreadableImage(
        f"looked for a PNG, JPEG, TIFF, WebP or BMP signature, found {data[:12]!r} ({len(data)} bytes); "
        "leave the file out or fetch it again"
    )


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise RefusedImage(f"the header declares {width}x{height} px: there is nothing to restore")
    if width * height > max_pixels:
        raise RefusedImage(
            f"{width}x{height} is {width * height / 1e6:.1f} megapixels, over the limit of "
            f"{max_pixels / 1e6:.1f}; allow more (max_pixels, --max-megapixels) if it is genuine"
        )


def _check_frames(frames: int) -> None:
    if frames > 1:
        raise RefusedImage(f"{frames} frames or pages, and only still images are restored; split the file first")


def _read_png(data: bytes, max_pixels: int) -> Picture:
    width, height = struct.unpack_from(">II", data, 16)
    _check_size(width, height, max_pixels)
    chunks = _png_chunks(data)
    if b"IEND" not in chunks:  # libpng is content once it has the pixels
        raise UnreadableImage(f"PNG data is cut short ({len(data)} bytes, no IEND); fetch the file again")
    if b"acTL" in chunks:
        _check_frames(*struct.unpack_from(">I", chunks[b"acTL"]))
    icc = _unpack_profile(chunks[b"iCCP"]) if b"iCCP" in chunks else None
    pixels = _with_channels(imagecodecs.png_decode(data))
    orientation, exif = _reset_orientation(chunks.get(b"eXIf"))
    return Picture(_upright(pixels, orientation), "PNG", icc, exif)


def _png_chunks(data: bytes) -> dict[bytes, bytes]:
    """The first chunk of every kind but the pixels."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at + 12 <= len(data):  # length, kind, body, CRC
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        if kind != b"IDAT":
            chunks.setdefault(kind, data[at + 8 : at + 8 + length])
        at += 12 + length
    return chunks


def _unpack_profile(chunk: bytes) -> bytes:
    """The ICC profile in an iCCP chunk: name, NUL, compression method, zlib stream."""
    unpacker = zlib.decompressobj()
    profile = unpacker.decompress(chunk.partition(b"\0")[2][1:], _MAX_ICC_BYTES)
    if unpacker.unconsumed_tail:
        raise RefusedImage(f"its colour profile unpacks to more than {_MAX_ICC_BYTES} bytes; export it without")
    return profile


def _read_tiff(data: bytes, max_pixels: int) -> Picture:
    stream = BytesIO(data)
    tags = ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])  # 43: BigTIFF
    first = tags.next
    stream.seek(first)
    tags.load(stream)
    if tags.next == first:
        raise UnreadableImage(f"TIFF directory is cut short ({len(data)} bytes); fetch the file again")
    _check_size(tags[256], tags[257], max_pixels)
    _check_size(tags.get(322, 1), tags.get(323, 1), max_pixels)  # a tile, which libtiff allocates whole
    _check_frames(2 if tags.next else 1)
    photometric = tags[262]
    kinds = {(bits, kind) for bits in tags.get(258, (1,)) for kind in tags.get(339, (1,))}
    if photometric in (0, 1, 2) and kinds in ({(8, 1)}, {(16, 1)}, {(32, 3)}):
        pixels = _upright(_tiff_pixels(data, tags), tags.get(_ORIENTATION, 1))
        return Picture(pixels, "TIFF", tags.get(34675), _rewritten_exif(data))
    if any(bits > 8 for bits, _ in kinds):
        samples = ", ".join(f"{bits}-bit {_SAMPLE_FORMATS.get(kind, kind)}" for bits, kind in sorted(kinds))
        raise RefusedImage(
            f"TIFF with {samples} samples in colour space {photometric}; "
            "8-bit, 16-bit unsigned and 32-bit float in grey or RGB are restored"
        )
    # Palettes, 1 to 4 bits, CMYK, YCbCr. Pillow turns a TIFF upright by itself.
    picture = _read_with_pillow(TiffImageFile, data, max_pixels)
    return Picture(picture.pixels, "TIFF", picture.icc, _rewritten_exif(data))


def _tiff_pixels(data: bytes, tags: ImageFileDirectory_v2) -> Pixels:
    """Grey or RGB samples as (H, W, C), not upright; alpha unassociated, black at zero."""
    samples, colours = tags.get(277, 1), 3 if tags[262] == 2 else 1
    if not 0 <= samples - colours <= 1:
        raise RefusedImage(f"TIFF of {samples} samples a pixel; grey or RGB with at most an alpha is restored")
    pixels = imagecodecs.tiff_decode(data)
    if tags.get(284) == 2 and samples > 1:  # stored plane by plane
        pixels = pixels.transpose(1, 2, 0)
    pixels = _with_channels(pixels)
    if pixels.shape != (tags[257], tags[256], samples):
        raise UnreadableImage(f"TIFF holds {pixels.shape}, its header says {(tags[257], tags[256], samples)}")
    if pixels.dtype == np.float32 and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise RefusedImage(f"float TIFF with values {pixels.min():g} to {pixels.max():g}; scale it to [0, 1] first")
    top = pixels.dtype.type(1 if pixels.dtype == np.float32 else np.iinfo(pixels.dtype).max)
    if tags[262] == 0:  # white is zero
        pixels = np.concatenate([top - pixels[:, :, :1], pixels[:, :, 1:]], axis=2)
    if samples == colours:
        return pixels
    alpha_kind = tags.get(338, (2,))[0]  # 0 unspecified data, 1 premultiplied alpha, 2 plain alpha
    if alpha_kind == 0:
        return pixels[:, :, :colours]
    return _divide_alpha_out(pixels, top) if alpha_kind == 1 else pixels


def _divide_alpha_out(pixels: Pixels, top: float) -> Pixels:
    alpha = pixels[:, :, -1:].astype(np.float64)
    plain = np.minimum(pixels[:, :, :-1] * (top / np.where(alpha > 0, alpha, np.inf)), top)
    if pixels.dtype.kind == "u":
        plain = np.rint(plain)
    return np.concatenate([plain.astype(pixels.dtype), pixels[:, :, -1:]], axis=2)


def _read_with_pillow(opener: Callable[[BytesIO], ImageFile], data: bytes, max_pixels: int) -> Picture:
    """Through the format's own class: `Image.open` has its own pixel limit, for the whole process."""
    stream = BytesIO(data)
    image = opener(stream)
    header_end = stream.tell()
    _check_size(*image.size, max_pixels)
    _check_frames(getattr(image, "n_frames", 1))
    icc, exif = image.info.get("icc_profile"), image.info.get("exif")
    kind = image.format or ""
    # libjpeg paints grey over what a download left as zeros; an end marker cannot occur in scan data
    if kind == "JPEG" and data.find(b"\xff\xd9", header_end) < 0:
        raise UnreadableImage(f"JPEG has no end marker ({len(data)} bytes); fetch the file again")
    image.load()
    target = "RGBA" if image.mode == "P" and "transparency" in image.info else _MODES.get(image.mode)
    if target is None:
        raise RefusedImage(f"{kind} with colour mode {image.mode}; convert it to grey, RGB or RGBA first")
    if image.mode == "CMYK":
        icc = None
    pixels = _with_channels(np.array(image if image.mode == target else image.convert(target)))
    orientation, exif = _reset_orientation(exif)
    return Picture(_upright(pixels, orientation), kind, icc, exif)


_READERS: dict[str, Callable[[bytes, int], Picture]] = {
    "PNG": _read_png,
    "TIFF": _read_tiff,
    "JPEG": partial(_read_with_pillow, JpegImageFile),
    "WEBP": partial(_read_with_pillow, WebPImageFile),
    "BMP": partial(_read_with_pillow, BmpImageFile),
}


def _with_channels(pixels: Pixels) -> Pixels:
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """(H, W, C) as EXIF orientation 1..8 says it is to be seen; other values are ignored, as viewers do."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# EXIF


def _reset_orientation(exif: bytes | None) -> tuple[int, bytes | None]:
    """The orientation and the same block with 1 in its place; (1, None) without a block that can be parsed.

    Patched in place: rewriting the block would break the absolute offsets in camera makers' notes.
    """
    if exif is None:
        return 1, None
    block = bytearray(exif.removeprefix(b"Exif\0\0"))
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(block[:4]))
    if order is None:
        return 1, None
    try:
        (directory,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            if struct.unpack_from(order + "H", block, entry) == (_ORIENTATION,):
                (orientation,) = struct.unpack_from(order + "H", block, entry + 8)
                struct.pack_into(order + "H", block, entry + 8, 1)
                return orientation, bytes(block)
    except struct.error:
        return 1, None
    return 1, bytes(block)


def _description(block: bytes) -> dict[int, Any]:
    """The tags of a TIFF file or EXIF block that describe the photograph, EXIF and GPS directories nested."""
    exif = Image.Exif()
    exif.load(block)
    tags = {tag: exif[tag] for tag in _DESCRIPTIVE_TAGS if tag in exif}
    for directory in (_EXIF_IFD, _GPS_IFD):
        nested = {tag: value for tag, value in exif.get_ifd(directory).items() if tag != _INTEROP_IFD}
        if nested:
            tags[directory] = nested
    if _ORIENTATION in tags:
        tags[_ORIENTATION] = 1
    return tags


def _rewritten_exif(block: bytes) -> bytes | None:
    """`_description` of a TIFF file or EXIF block as a fresh EXIF block; None when it is empty or damaged."""
    try:
        exif = Image.Exif()
        exif.update(_description(block))
        return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else None
    except (*_DAMAGE, AttributeError):  # text where Pillow expects a number, or the reverse
        return None


# Writing


def _write_png(picture: Picture) -> bytes:
    # Run lengths of Paeth residuals: 40 ms for 1280x720, as small as Pillow's default, which takes 370 ms.
    png = imagecodecs.png_encode(
        picture.pixels,
        level=1,
        strategy=imagecodecs.PNG.STRATEGY.RLE,
        filter=imagecodecs.PNG.FILTER.PAETH,
    )
    extra = b""
    if picture.icc is not None:
        extra += _png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(picture.icc))
    if picture.exif is not None:
        extra += _png_chunk(b"eXIf", picture.exif)
    after_header = 8 + 12 + 13  # signature, then the IHDR chunk and its 13-byte body
    return bytes(png[:after_header]) + extra + bytes(png[after_header:])


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _write_tiff(picture: Picture) -> bytes:
    """One strip, deflate, horizontal differences for integers. imagecodecs' own writer takes no EXIF."""
    pixels, channels, integers = picture.pixels, picture.channels, picture.bit_depth < 32
    if not integers and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"float pixels must be in [0, 1], got {pixels.min():g} to {pixels.max():g}")
    if integers:
        pixels = np.concatenate([pixels[:, :1], pixels[:, 1:] - pixels[:, :-1]], axis=1)
    strip = imagecodecs.deflate_encode(pixels.astype(pixels.dtype.newbyteorder("<")).tobytes(), 3)
    tags = ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    exif = _rewritten_exif(picture.exif or b"")  # what cannot be written again is left out
    for tag, value in _description(exif or b"").items():
        tags[tag] = value
    tags[256], tags[257] = picture.width, picture.height
    tags[258] = (picture.bit_depth,) * channels
    tags[259] = 8  # deflate
    tags[262] = 1 if channels <= 2 else 2  # grey, RGB
    tags[273], tags[278], tags[279] = 0, picture.height, len(strip)  # Pillow adds the directory's end to 273
    tags[277] = channels
    tags[317] = 2 if integers else 1
    if channels in (2, 4):
        tags[338] = 2  # alpha, not premultiplied
    tags[339] = (1 if integers else 3,) * channels
    if picture.icc is not None:
        tags[34675] = picture.icc
    stream = BytesIO()
    tags.save(stream)
    stream.write(strip)
    return stream.getvalue()


def _write_with_pillow(picture: Picture, name: str, quality: int | None) -> bytes:
    options: dict[str, Any] = {}
    if name == "JPEG":
        options = {"quality": quality or 95, "subsampling": 0}
    elif name == "WEBP" and quality is None:
        # For lossless files `quality` is the effort: 100 ms for 1280x720; 15 % smaller takes five times that.
        options = {"lossless": True, "exact": True, "method": 0, "quality": 50}
    elif name == "WEBP":
        options = {"quality": quality}
    if name != "BMP" and picture.icc is not None:
        options["icc_profile"] = picture.icc
    if name != "BMP" and picture.exif is not None:
        options["exif"] = b"Exif\0\0" + picture.exif
    stream = BytesIO()
    grey = picture.channels == 1
    Image.fromarray(picture.pixels[:, :, 0] if grey else picture.pixels).save(stream, name, **options)
    return stream.getvalue()
