"""Bytes to pixels and back, without losing what a photograph carries: bit depth, alpha, grey, ICC and EXIF.

Pillow reads 16-bit colour PNG and TIFF as 8-bit, and has a limit of its own for WebP, so imagecodecs (libpng,
libtiff, libwebp) decodes those; Pillow decodes the others. The header is checked before any pixel is decoded.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from nafnet import metadata
from nafnet.metadata import TiffDirectory

Pixels = npt.NDArray[Any]

# Ancillary data that unpacks to more than this is an attack, not a profile; it is what a JPEG can hold.
_MAX_ICC_BYTES = 255 * 65519
# Genuine progressive files have about ten scans. Each costs a pass over all pixels, and as little as ten bytes.
_MAX_JPEG_SCANS = 100

_DAMAGE = (*metadata.DAMAGE, imagecodecs.PngError, imagecodecs.TiffError, imagecodecs.WebpError)

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
# Pillow's time for one row grows with the square of its length: at 100 million pixels it takes minutes.
_PILLOW_SIDE = 65535


class _Format(NamedTuple):
    """What one file format can hold: `sides` in pixels."""

    extension: str
    channels: set[int]
    depths: set[int]
    sides: int
    lossy: bool = False


_FORMATS = {
    "PNG": _Format(".png", {1, 2, 3, 4}, {8, 16}, 1_000_000),  # libpng's own limit
    "JPEG": _Format(".jpg", {1, 3}, {8}, 65500, lossy=True),
    "TIFF": _Format(".tif", {1, 2, 3, 4}, {8, 16, 32}, 2**31 - 1),
    "WEBP": _Format(".webp", {3, 4}, {8}, 16383, lossy=True),
    "BMP": _Format(".bmp", {1, 3, 4}, {8}, _PILLOW_SIDE),
}
# As Pillow counts them
_SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
# Pillow mode -> the mode its pixels are taken in
_MODES = {"1": "L", "L": "L", "LA": "LA", "P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}
_XMP, _ICC_PROFILE = 700, 34675  # TIFF tags
# Markers of a header with a size: those without are tables (0xC4, 0xCC) and a reserved one
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
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
    outside [0, 1], palettes and CMYK of more than 65535 px a side).
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
    subsampling: str | None = None,
    note: str | None = None,
) -> bytes:
    """The bytes of a file with this picture: same channels and depth, with ICC and EXIF.

    `format` is PNG, JPEG, TIFF, WEBP or BMP, by default the picture's own; `quality` and `subsampling` are as
    in `check_output`. `note`, up to 1000 printable ASCII characters, says where the file came from: `read_note`
    and ordinary tools find it as the text "Software" of a PNG, the comment of a JPEG, and xmp:CreatorTool of a
    TIFF or WebP. BMP holds no ICC, EXIF or note: they are left out. A lossy WebP leaves out alpha that is opaque
    everywhere.

    Raises ValueError when the format cannot hold the picture: nothing is converted silently.
    """
    name = format or picture.format
    check_output(name, quality, subsampling)
    _check_holds(name, picture)
    if note is not None:
        metadata.check_note(note)
    if name == "PNG":
        return _write_png(picture, note)
    if name == "TIFF":
        return _write_tiff(picture, note)
    if name == "BMP" and picture.channels == 4:
        return _write_bmp_with_alpha(picture)
    return _write_with_pillow(picture, name, quality, subsampling, note)


def check_output(
    format: str,  # noqa: A002 - as in `encode`
    quality: int | None = None,
    subsampling: str | None = None,
) -> None:
    """Raise ValueError with all that is wrong with these options of `encode`, before there is a picture.

    `quality` is 1 to 100: of a JPEG, by default 95, or of a lossy WebP, which is lossless without one.
    `subsampling` is of the chroma of a JPEG: 4:4:4 (the default), 4:2:2 or 4:2:0; grey ones have no chroma.
    """
    problems = []
    if format not in _FORMATS:
        problems.append(f"cannot write format {format!r}; use one of {', '.join(_FORMATS)}")
    elif quality is not None and not _FORMATS[format].lossy:
        problems.append(f"{format} is lossless and has no quality; leave it out, or write JPEG or WEBP")
    if quality is not None and not 1 <= quality <= 100:
        problems.append(f"quality must be 1 to 100, got {quality}")
    if subsampling is not None and format in _FORMATS and format != "JPEG":
        problems.append(f"{format} has no chroma subsampling to choose; leave it out, or write JPEG")
    if subsampling is not None and subsampling not in _SUBSAMPLINGS:
        problems.append(f"subsampling must be {', '.join(_SUBSAMPLINGS)}, got {subsampling!r}")
    if problems:
        raise ValueError("; ".join(problems))


def extension(format: str) -> str:  # noqa: A002
    """What names of such files end in: .png, .jpg, .tif, .webp or .bmp. ValueError for another format."""
    check_output(format)
    return _FORMATS[format].extension


def holds_depth(format: str, bits: int) -> bool:  # noqa: A002
    """Whether such files hold samples of 8, 16 or 32 (float) bits. ValueError for another format."""
    check_output(format)
    return bits in _FORMATS[format].depths


def read_note(data: bytes) -> str | None:
    """The note that `encode` put into a file; None where there is none, in BMP, and in bytes that are no image.

    Of files from elsewhere it is what their own writer says in that place, so look at how it begins.
    """
    try:
        kind = _sniff(data)
        if kind == "PNG":
            keyword, _, text = metadata.png_chunks(data).get(b"tEXt", b"").partition(b"\0")
            return text.decode("latin-1") if keyword == b"Software" else None
        if kind == "JPEG":
            comments = (body for marker, body in metadata.jpeg_segments(data) if marker == 0xFE)
            return next((comment.decode("latin-1") for comment in comments), None)
        if kind == "TIFF":
            return metadata.note_in_xmp(TiffDirectory.read(data).content(_XMP))
        if kind == "WEBP":
            return metadata.note_in_xmp(dict(metadata.riff_chunks(data)).get(b"XMP "))
    except _DAMAGE:  # RefusedImage and UnreadableImage among them
        pass
    return None


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
    chunks = metadata.png_chunks(data)
    if b"IEND" not in chunks:  # libpng is content once it has the pixels
        raise UnreadableImage(f"PNG data is cut short ({len(data)} bytes, no IEND); fetch the file again")
    if b"acTL" in chunks:
        _check_frames(*struct.unpack_from(">I", chunks[b"acTL"]))
    icc = _unpack_profile(chunks[b"iCCP"]) if b"iCCP" in chunks else None
    pixels = _with_channels(imagecodecs.png_decode(data))
    orientation, exif = metadata.reset_orientation(chunks.get(b"eXIf"))
    return Picture(_upright(pixels, orientation), "PNG", icc, exif)


def _unpack_profile(chunk: bytes) -> bytes:
    """The ICC profile in an iCCP chunk: name, NUL, compression method, zlib stream."""
    unpacker = zlib.decompressobj()
    profile = unpacker.decompress(chunk.partition(b"\0")[2][1:], _MAX_ICC_BYTES)
    if unpacker.unconsumed_tail:
        raise RefusedImage(f"its colour profile unpacks to more than {_MAX_ICC_BYTES} bytes; export it without")
    return profile


def _read_tiff(data: bytes, max_pixels: int) -> Picture:
    tags = TiffDirectory.read(data)
    _check_size(tags.number(256), tags.number(257), max_pixels)
    if 322 in tags.entries or 323 in tags.entries:
        _check_size(tags.number(322), tags.number(323), max_pixels)  # a tile, which libtiff allocates whole
    _check_frames(2 if tags.following else 1)
    depth, tile_depth = tags.number(32997, 1), tags.number(32998, 1)
    if (depth, tile_depth) != (1, 1):
        raise RefusedImage(f"a volume of {depth} slices in tiles of {tile_depth}; save the slices as images first")
    photometric = tags.number(262)
    kinds = {(bits, kind) for bits in tags.numbers(258, 1) for kind in tags.numbers(339, 1)}
    if photometric in (0, 1, 2) and kinds in ({(8, 1)}, {(16, 1)}, {(32, 3)}):
        pixels = _upright(_tiff_pixels(data, tags), tags.number(metadata.ORIENTATION, 1))
        return Picture(pixels, "TIFF", tags.content(_ICC_PROFILE), metadata.rewritten_exif(data))
    if any(bits > 8 or kind != 1 for bits, kind in kinds):
        samples = ", ".join(f"{bits}-bit {_SAMPLE_FORMATS.get(kind, kind)}" for bits, kind in sorted(kinds))
        raise RefusedImage(
            f"TIFF with {samples} samples in colour space {photometric}; "
            "8-bit, 16-bit unsigned and 32-bit float in grey or RGB are restored"
        )
    # Palettes, 1 to 4 bits, CMYK, YCbCr. Pillow turns a TIFF upright by itself.
    pixels = _pillow_pixels(TiffImageFile(BytesIO(data)), max_pixels)
    icc = None if photometric == 5 else tags.content(_ICC_PROFILE)
    return Picture(pixels, "TIFF", icc, metadata.rewritten_exif(data))


def _tiff_pixels(data: bytes, tags: TiffDirectory) -> Pixels:
    """Grey or RGB samples as (H, W, C), not upright; alpha unassociated, black at zero."""
    samples, colours = tags.number(277, 1), 3 if tags.number(262) == 2 else 1
    if not 0 <= samples - colours <= 1:
        raise RefusedImage(f"TIFF of {samples} samples a pixel; grey or RGB with at most an alpha is restored")
    pixels = imagecodecs.tiff_decode(data)
    if tags.number(284, 1) == 2 and samples > 1:  # stored plane by plane
        pixels = pixels.transpose(1, 2, 0)
    pixels = _with_channels(pixels)
    declared = tags.number(257), tags.number(256), samples
    if pixels.shape != declared:
        raise UnreadableImage(f"TIFF holds {pixels.shape}, its header says {declared}")
    if pixels.dtype == np.float32 and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise RefusedImage(f"float TIFF with values {pixels.min():g} to {pixels.max():g}; scale it to [0, 1] first")
    top = pixels.dtype.type(1 if pixels.dtype == np.float32 else np.iinfo(pixels.dtype).max)
    if tags.number(262) == 0:  # white is zero
        pixels = np.concatenate([top - pixels[:, :, :1], pixels[:, :, 1:]], axis=2)
    if samples == colours:
        return pixels
    alpha_kind = tags.number(338, 2)  # 0 unspecified data, 1 premultiplied alpha, 2 plain alpha
    if alpha_kind == 0:
        return pixels[:, :, :colours]
    return _divide_alpha_out(pixels, top) if alpha_kind == 1 else pixels


def _divide_alpha_out(pixels: Pixels, top: float) -> Pixels:
    alpha = pixels[:, :, -1:].astype(np.float64)
    plain = np.minimum(pixels[:, :, :-1] * (top / np.where(alpha > 0, alpha, np.inf)), top)
    if pixels.dtype.kind == "u":
        plain = np.rint(plain)
    return np.concatenate([plain.astype(pixels.dtype), pixels[:, :, -1:]], axis=2)


def _read_jpeg(data: bytes, max_pixels: int) -> Picture:
    scans = 0
    # libjpeg paints grey over what a download left as zeros: this looks for the end marker, too
    for marker, body in metadata.jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            bits, height, width = struct.unpack_from(">BHH", body)
            _check_size(width, height, max_pixels)
            if bits != 8:
                raise RefusedImage(f"JPEG with {bits}-bit samples; convert it to a 16-bit PNG or TIFF first")
        scans += marker == 0xDA
    if scans > _MAX_JPEG_SCANS:
        raise RefusedImage(f"JPEG of {scans} scans, over the limit of {_MAX_JPEG_SCANS}; export it again")
    image = JpegImageFile(BytesIO(data))
    pixels = _pillow_pixels(image, max_pixels)
    orientation, exif = metadata.reset_orientation(image.info.get("exif"))
    icc = None if image.mode == "CMYK" else image.info.get("icc_profile")
    return Picture(_upright(pixels, orientation), "JPEG", icc or None, exif)


def _read_webp(data: bytes, max_pixels: int) -> Picture:
    chunks: dict[bytes, bytes] = {}
    frames = 0
    for kind, body in metadata.riff_chunks(data):
        chunks.setdefault(kind, body)
        frames += kind == b"ANMF"
        if kind == b"VP8X":
            width, height = (1 + int.from_bytes(body[at : at + 3], "little") for at in (4, 7))
            _check_size(width, height, max_pixels)
        elif kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", body, 6)
            _check_size(width & 0x3FFF, height & 0x3FFF, max_pixels)
        elif kind == b"VP8L":
            (sides,) = struct.unpack_from("<I", body, 1)
            _check_size(1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF), max_pixels)
    _check_frames(frames)
    pixels = imagecodecs.webp_decode(data)
    orientation, exif = metadata.reset_orientation(chunks.get(b"EXIF"))
    return Picture(_upright(pixels, orientation), "WEBP", chunks.get(b"ICCP") or None, exif)


def _read_bmp(data: bytes, max_pixels: int) -> Picture:
    (header,) = struct.unpack_from("<I", data, 14)
    if header not in (12, 40, 52, 56, 64, 108, 124):
        raise ValueError(f"a header of {header} bytes")
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    _check_size(width, abs(height), max_pixels)
    return Picture(_pillow_pixels(BmpImageFile(BytesIO(data)), max_pixels), "BMP")


def _pillow_pixels(image: ImageFile, max_pixels: int) -> Pixels:
    """As (H, W, C). The caller opened it by its class: `Image.open` has its own limit, for the whole process."""
    _check_size(*image.size, max_pixels)
    if max(image.size) > _PILLOW_SIDE:
        width, height = image.size
        raise RefusedImage(f"{image.format} of {width}x{height} px, over {_PILLOW_SIDE} a side; split it into pieces")
    image.load()
    target = _MODES.get(image.mode)
    if target is None:
        raise RefusedImage(f"{image.format} with colour mode {image.mode}; convert it to grey, RGB or RGBA first")
    return _with_channels(np.array(image if image.mode == target else image.convert(target)))


_READERS: dict[str, Callable[[bytes, int], Picture]] = {
    "PNG": _read_png,
    "JPEG": _read_jpeg,
    "TIFF": _read_tiff,
    "WEBP": _read_webp,
    "BMP": _read_bmp,
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


# Writing


def _check_holds(name: str, picture: Picture) -> None:
    kind = _FORMATS[name]
    if picture.bit_depth not in kind.depths:
        fitting = " or ".join(other for other in _FORMATS if holds_depth(other, picture.bit_depth))
        raise ValueError(f"{name} cannot hold {picture.bit_depth}-bit samples; use {fitting}")
    if picture.channels not in kind.channels:
        colours = ("grey", "grey with alpha", "RGB", "RGBA")[picture.channels - 1]
        raise ValueError(f"{name} cannot hold {colours}; use PNG or TIFF, or convert the pixels first")
    if max(picture.height, picture.width) > kind.sides:
        size = f"{picture.width}x{picture.height} px"
        raise ValueError(f"{name} cannot hold {size}, only up to {kind.sides} a side; use TIFF")
    if name != "BMP" and len(picture.icc or b"") > _MAX_ICC_BYTES:
        raise ValueError(f"its colour profile has {len(picture.icc or b'')} bytes, over {_MAX_ICC_BYTES}; leave it out")


def _write_png(picture: Picture, note: str | None) -> bytes:
    # Run lengths of Paeth residuals: 40 ms for 1280x720, as small as Pillow's default, which takes 370 ms.
    png = imagecodecs.png_encode(
        # It refuses sides of 1 whose stride is not the usual one, such as that of [:, :, None].
        picture.pixels.reshape(-1).reshape(picture.pixels.shape),
        level=1,
        strategy=imagecodecs.PNG.STRATEGY.RLE,
        filter=imagecodecs.PNG.FILTER.PAETH,
    )
    extra = b""
    if picture.icc:
        extra += metadata.png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(picture.icc))
    if picture.exif:
        extra += metadata.png_chunk(b"eXIf", picture.exif)
    if note is not None:
        extra += metadata.png_chunk(b"tEXt", b"Software\0" + note.encode())
    after_header = 8 + 12 + 13  # signature, then the IHDR chunk and its 13-byte body
    return bytes(png[:after_header]) + extra + bytes(png[after_header:])


def _write_tiff(picture: Picture, note: str | None) -> bytes:
    """One strip, deflate, horizontal differences for integers. imagecodecs' own writer takes no EXIF."""
    pixels, channels, integers = picture.pixels, picture.channels, picture.bit_depth < 32
    if not integers and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"float pixels must be in [0, 1], got {pixels.min():g} to {pixels.max():g}")
    if integers:
        pixels = np.concatenate([pixels[:, :1], pixels[:, 1:] - pixels[:, :-1]], axis=1)
    strip = imagecodecs.deflate_encode(pixels.astype(pixels.dtype.newbyteorder("<")).tobytes(), 3)
    tags = ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    exif = metadata.rewritten_exif(picture.exif or b"")  # what cannot be written again is left out
    for tag, value in (metadata.description(exif) if exif else {}).items():
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
    if picture.icc:
        tags[_ICC_PROFILE] = picture.icc
    if note is not None:
        tags[_XMP] = metadata.xmp_of(note)  # Software and ImageDescription are the camera's or photographer's own
    stream = BytesIO()
    tags.save(stream)
    if stream.tell() + len(strip) >= 2**32:
        raise ValueError(f"TIFF cannot hold {len(strip)} bytes of compressed pixels, only 4 GiB; split the image")
    stream.write(strip)
    return stream.getvalue()


def _write_bmp_with_alpha(picture: Picture) -> bytes:
    """32 bits and a mask for every channel (BITMAPV4HEADER): without masks the fourth byte is padding."""
    rows = picture.pixels[::-1, :, [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    bits, by_masks, pixels_per_metre = 32, 3, 2835
    size = struct.pack("<IiiHHII", 108, picture.width, picture.height, 1, bits, by_masks, len(rows))
    header = size + struct.pack("<iiII", pixels_per_metre, pixels_per_metre, 0, 0) + masks + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + 108 + len(rows), 0, 0, 14 + 108) + header + rows


def _write_with_pillow(
    picture: Picture, name: str, quality: int | None, subsampling: str | None, note: str | None
) -> bytes:
    options: dict[str, Any] = {}
    if name == "JPEG":
        options = {"quality": quality or 95, "subsampling": _SUBSAMPLINGS[subsampling or "4:4:4"]}
    elif name == "WEBP" and quality is None:
        # For lossless files `quality` is the effort: 100 ms for 1280x720; 15 % smaller takes five times that.
        options = {"lossless": True, "exact": True, "method": 0, "quality": 50}
    elif name == "WEBP":
        options = {"quality": quality}
    if name != "BMP":
        if picture.icc:
            options["icc_profile"] = picture.icc
        if picture.exif:
            options["exif"] = b"Exif\0\0" + picture.exif
        if note is not None:
            options |= {"comment": note} if name == "JPEG" else {"xmp": metadata.xmp_of(note)}
    stream = BytesIO()
    grey = picture.channels == 1
    Image.fromarray(picture.pixels[:, :, 0] if grey else picture.pixels).save(stream, name, **options)
    data = stream.getvalue()
    return _with_opaque_alpha(data) if options.get("lossless") and picture.channels == 4 else data


def _with_opaque_alpha(webp: bytes) -> bytes:
    """The same lossless WebP, marked as one with alpha: libwebp leaves the marks out when all is opaque."""
    data, alpha, at = bytearray(webp), 0x10, 12
    if data[at : at + 4] == b"VP8X":
        data[at + 8] |= alpha
    while data[at : at + 4] != b"VP8L":
        (length,) = struct.unpack_from("<I", data, at + 4)
        at += 8 + length + length % 2
    data[at + 8 + 4] |= alpha
    return bytes(data)
