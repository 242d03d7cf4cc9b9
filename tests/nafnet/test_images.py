"""Files written by Pillow, tifffile and hand, read by `decode`; files written by `encode`, read by them."""

import contextlib
import struct
import time
import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps

from nafnet.images import Picture, RefusedImage, UnreadableImage, decode, encode

# Pillow warns of the TIFF directories that these tests cut short.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_ICC = ICC[:16] + b"GRAY" + ICC[20:]  # libpng checks that the profile's colour space is the image's
HOLDS = {
    "PNG": [(channels, dtype) for channels in (1, 2, 3, 4) for dtype in ("uint8", "uint16")],
    "TIFF": [(channels, dtype) for channels in (1, 2, 3, 4) for dtype in ("uint8", "uint16", "float32")],
    "WEBP": [(3, "uint8"), (4, "uint8")],
    "BMP": [(1, "uint8"), (3, "uint8")],
    "JPEG": [(1, "uint8"), (3, "uint8")],
}
LOSSLESS = [(name, *kind) for name in ("PNG", "TIFF", "WEBP", "BMP") for kind in HOLDS[name]]


def pixels_of(channels, dtype="uint8", height=19, width=26):
    """Noise over every value of the dtype, with neighbours that differ by more than half the range."""
    rng = np.random.default_rng(channels)
    if dtype == "float32":
        return rng.random((height, width, channels), np.float32)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def exif_block(orientation=1):
    exif = Image.Exif()
    exif[0x010F] = "A maker"
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8825)[0x0001] = "N"
    return exif.tobytes().removeprefix(b"Exif\0\0")


def pillow_bytes(image, name, **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    stream = BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def tiff_bytes(pixels, **options):
    stream = BytesIO()
    tifffile.imwrite(stream, pixels, metadata=None, **options)
    return stream.getvalue()


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bytes(width, height, bit_depth, colour_type, rows, *extra):
    """A PNG by hand: `rows` are packed scanlines without their filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", body), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# What comes back


@pytest.mark.parametrize(("name", "channels", "dtype"), LOSSLESS)
def test_lossless_round_trip(name, channels, dtype):
    pixels = pixels_of(channels, dtype)
    icc = (GREY_ICC if channels <= 2 else ICC) if name != "BMP" else None
    exif = exif_block() if name != "BMP" else None
    picture = decode(encode(Picture(pixels, name, icc, exif)))
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.pixels.dtype == dtype
    assert (picture.format, picture.icc) == (name, icc)
    assert (picture.height, picture.width, picture.channels) == pixels.shape
    if exif:
        kept = Image.Exif()
        kept.load(picture.exif)
        assert kept[0x010F] == "A maker"
        assert kept.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"
        assert kept.get_ifd(0x8825)[0x0001] == "N"


@pytest.mark.parametrize(("name", "channels", "dtype"), [*LOSSLESS, ("JPEG", 1, "uint8"), ("JPEG", 3, "uint8")])
def test_nothing_is_added(name, channels, dtype):
    picture = decode(encode(Picture(pixels_of(channels, dtype), name)))
    assert picture.icc is None
    assert picture.exif is None


@pytest.mark.parametrize(("channels", "dtype"), HOLDS["TIFF"])
def test_other_readers_read_our_tiff(channels, dtype):
    pixels = pixels_of(channels, dtype)
    data = encode(Picture(pixels, "TIFF", ICC * 30, exif_block()))  # strips start beyond 65535
    np.testing.assert_array_equal(tifffile.imread(BytesIO(data)).reshape(pixels.shape), pixels)
    if dtype == "uint8":
        with Image.open(BytesIO(data)) as image:
            np.testing.assert_array_equal(np.array(image).reshape(pixels.shape), pixels)
            assert image.info["icc_profile"] == ICC * 30
            assert image.getexif()[0x010F] == "A maker"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_other_readers_read_our_png(channels):
    pixels = pixels_of(channels)
    icc = GREY_ICC if channels <= 2 else ICC
    with Image.open(BytesIO(encode(Picture(pixels, "PNG", icc, exif_block())))) as image:
        np.testing.assert_array_equal(np.array(image).reshape(pixels.shape), pixels)
        assert image.info["icc_profile"] == icc
        assert image.getexif()[0x010F] == "A maker"


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_444_at_95(channels):
    rows, columns = np.mgrid[0:48, 0:64]
    pixels = np.stack([rows * 5, columns * 3, rows + columns], axis=2).astype(np.uint8)[:, :, :channels].copy()
    data = encode(Picture(pixels, "JPEG", ICC, exif_block()))
    picture = decode(data)
    assert picture.pixels.shape == pixels.shape
    assert np.abs(picture.pixels.astype(int) - pixels).max() <= 4
    assert (picture.icc, picture.exif) == (ICC, exif_block())
    with Image.open(BytesIO(data)) as image:
        assert {component[1:3] for component in image.layer} == {(1, 1)}
    assert len(encode(Picture(pixels, "JPEG"), quality=50)) < len(encode(Picture(pixels, "JPEG")))


def test_webp_is_lossless_unless_asked():
    pixels = np.repeat(pixels_of(4), 8, axis=1)
    pixels[:4, :, 3] = 0  # colours under transparent pixels stay
    np.testing.assert_array_equal(decode(encode(Picture(pixels, "WEBP"))).pixels, pixels)
    assert len(encode(Picture(pixels, "WEBP"), quality=50)) < len(encode(Picture(pixels, "WEBP")))


def test_a_dark_16_bit_image_stays_16_bit():
    pixels = np.arange(48, dtype=np.uint16).reshape(4, 4, 3)
    for name in ("PNG", "TIFF"):
        picture = decode(encode(Picture(pixels, name)))
        assert picture.bit_depth == 16
        np.testing.assert_array_equal(picture.pixels, pixels)


def test_the_format_can_be_changed():
    picture = Picture(pixels_of(3), "BMP", ICC, exif_block())
    for name in ("PNG", "TIFF", "WEBP"):
        changed = decode(encode(picture, format=name))
        assert (changed.format, changed.icc) == (name, ICC)
        np.testing.assert_array_equal(changed.pixels, picture.pixels)


# What others write


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("options", [{}, {"compression": "lzw", "predictor": True}, {"tile": (16, 16)}], ids=str)
def test_tiff_variants(dtype, byteorder, options):
    if dtype == "float32":
        options = {key: value for key, value in options.items() if key != "predictor"}
    for channels, photometric in ((1, "minisblack"), (3, "rgb"), (4, "rgb")):
        pixels = pixels_of(channels, dtype)
        stored = pixels[:, :, 0] if channels == 1 else pixels
        extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
        data = tiff_bytes(stored, photometric=photometric, byteorder=byteorder, **options, **extra)
        np.testing.assert_array_equal(decode(data).pixels, pixels)


def test_bigtiff():
    pixels = pixels_of(3, "uint16")
    np.testing.assert_array_equal(decode(tiff_bytes(pixels, photometric="rgb", bigtiff=True)).pixels, pixels)


def test_tiff_planes_inverted_grey_and_odd_alphas():
    pixels = pixels_of(3, "uint16")
    planes = tiff_bytes(pixels.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(decode(planes).pixels, pixels)
    for dtype, top in (("uint8", 255), ("uint16", 65535), ("float32", 1)):
        grey = pixels_of(1, dtype)
        np.testing.assert_array_equal(decode(tiff_bytes(grey[:, :, 0], photometric="miniswhite")).pixels, top - grey)
    pixels = pixels_of(4)
    unspecified = tiff_bytes(pixels, photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(decode(unspecified).pixels, pixels[:, :, :3])
    premultiplied = np.array([[[50, 100, 0, 128], [9, 9, 9, 0], [7, 8, 9, 255]]], np.uint8)
    divided = decode(tiff_bytes(premultiplied, photometric="rgb", extrasamples=["assocalpha"])).pixels
    assert divided.tolist() == [[[100, 199, 0, 128], [0, 0, 0, 0], [7, 8, 9, 255]]]


@pytest.mark.parametrize("name", ["PNG", "TIFF", "BMP"])
def test_palettes_become_rgb(name):
    palette_image = Image.fromarray(pixels_of(3)).quantize(16)
    picture = decode(pillow_bytes(palette_image, name))
    np.testing.assert_array_equal(picture.pixels, np.array(palette_image.convert("RGB")))


def test_palette_with_transparency_becomes_rgba():
    palette_image = Image.fromarray(pixels_of(3)).quantize(16)
    data = pillow_bytes(palette_image, "PNG", transparency=3)
    with Image.open(BytesIO(data)) as image:
        np.testing.assert_array_equal(decode(data).pixels, np.array(image.convert("RGBA")))


@pytest.mark.parametrize("name", ["PNG", "TIFF", "BMP"])
def test_one_bit_becomes_grey(name):
    bits = pixels_of(1)[:, :, 0] > 128
    np.testing.assert_array_equal(decode(pillow_bytes(Image.fromarray(bits), name)).pixels[:, :, 0], bits * 255)


def test_png_small_depths_and_transparent_keys():
    key = png_chunk(b"tRNS", struct.pack(">H", 1))
    two_bit = png_bytes(4, 1, 2, 0, [bytes([0b00011011])])
    assert decode(two_bit).pixels[:, :, 0].tolist() == [[0, 85, 170, 255]]
    deep = struct.pack(">3H", 1, 256, 65535)
    assert decode(png_bytes(3, 1, 16, 0, [deep])).pixels[:, :, 0].tolist() == [[1, 256, 65535]]
    keyed = decode(png_bytes(3, 1, 16, 0, [deep], key)).pixels
    assert keyed.tolist() == [[[1, 0], [256, 65535], [65535, 65535]]]


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb_without_its_profile(name):
    cmyk = Image.fromarray(np.full((8, 8, 3), (200, 100, 50), np.uint8)).convert("CMYK")
    picture = decode(pillow_bytes(cmyk, name, icc_profile=ICC))
    assert np.abs(picture.pixels.astype(int) - (200, 100, 50)).max() <= 3
    assert picture.icc is None


def test_first_picture_of_a_multi_picture_jpeg():
    first, second = Image.new("RGB", (16, 8), (200, 10, 10)), Image.new("RGB", (16, 8), (10, 10, 200))
    picture = decode(pillow_bytes(first, "MPO", save_all=True, append_images=[second]))
    assert picture.format == "JPEG"
    assert np.abs(picture.pixels.astype(int) - (200, 10, 10)).max() <= 3


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_orientation_is_applied_once(name, orientation):
    upright = np.kron(pixels_of(3, height=2, width=3), np.ones((8, 8, 1), np.uint8))
    exif = Image.Exif()
    exif.load(exif_block(orientation))
    options = {"quality": 100, "subsampling": 0} if name == "JPEG" else {"lossless": True}
    data = pillow_bytes(upright, name, exif=exif, **options)
    with Image.open(BytesIO(data)) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    picture = decode(data)
    np.testing.assert_array_equal(picture.pixels, expected)
    kept = Image.Exif()
    kept.load(picture.exif)
    assert (kept[0x0112], kept[0x010F]) == (1, "A maker")
    again = decode(encode(picture))
    assert again.pixels.shape == picture.pixels.shape


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_every_kind_of_tiff(orientation):
    pixels = pixels_of(3)
    tags = [(274, "H", 1, orientation, True)]
    deep = tiff_bytes(pixels.astype(np.uint16), photometric="rgb", extratags=tags)
    palette_image = Image.fromarray(pixels).quantize(16)
    palette = pillow_bytes(palette_image, "TIFF", tiffinfo={274: orientation})
    exif = Image.Exif()
    exif[274] = orientation
    for data, stored in ((deep, pixels), (palette, np.array(palette_image.convert("RGB")))):
        reference = Image.fromarray(stored)
        reference.getexif()[274] = orientation
        np.testing.assert_array_equal(decode(data).pixels, np.array(ImageOps.exif_transpose(reference)))


def test_exif_that_cannot_be_parsed_is_dropped():
    for block in (b"", b"junk", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\x00\x05\x01"):
        data = pillow_bytes(pixels_of(3), "JPEG", exif=b"Exif\0\0" + block)
        picture = decode(data)
        assert picture.exif is None
        assert picture.pixels.shape == (19, 26, 3)


# Damaged and hostile bytes


def sources():
    colour = pixels_of(3)
    yield "png", encode(Picture(colour, "PNG", ICC, exif_block()))
    yield "png16", encode(Picture(pixels_of(4, "uint16"), "PNG"))
    yield "png-palette", pillow_bytes(Image.fromarray(colour).quantize(9), "PNG")
    yield "jpeg", encode(Picture(colour, "JPEG", None, exif_block()))
    yield "jpeg-progressive", pillow_bytes(colour, "JPEG", progressive=True)
    yield "tiff", encode(Picture(colour, "TIFF"))
    yield "tiff-float", encode(Picture(pixels_of(1, "float32"), "TIFF"))
    yield "tiff-plain", tiff_bytes(colour)
    yield "tiff-palette", pillow_bytes(Image.fromarray(colour).quantize(9), "TIFF")
    yield "webp", encode(Picture(colour, "WEBP", None, exif_block()))
    yield "webp-lossy", pillow_bytes(colour, "WEBP", quality=50)
    # 28 wide: rows end on four bytes, so that the last byte is a pixel and not padding
    yield "bmp", encode(Picture(pixels_of(3, width=28), "BMP"))
    yield "bmp-grey", encode(Picture(pixels_of(1, width=28), "BMP"))


SOURCES = dict(sources())


@pytest.mark.parametrize("name", SOURCES)
def test_every_truncation_is_an_error(name):
    data = SOURCES[name]
    decode(data)
    ends = {*range(min(len(data), 400)), *range(len(data) - 40, len(data)), *range(0, len(data), 37)}
    for end in sorted(ends):
        with pytest.raises((UnreadableImage, RefusedImage)):
            decode(data[:end])


@pytest.mark.parametrize("name", SOURCES)
def test_damage_never_raises_anything_else(name):
    rng = np.random.default_rng(0)
    data = SOURCES[name]
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 200), 3):
            damaged[position] = rng.integers(256)
        with contextlib.suppress(UnreadableImage, RefusedImage):
            decode(bytes(damaged), max_pixels=1_000_000)


@pytest.mark.parametrize("name", ["jpeg", "jpeg-progressive", "png"])
def test_a_tail_of_zeros_is_noticed(name):
    data = SOURCES[name]
    cut = len(data) * 9 // 10
    with pytest.raises(UnreadableImage, match=r"no end marker|no IEND"):
        decode(data[:cut] + bytes(len(data) - cut))


def test_bytes_after_the_end_are_ignored():
    for name in ("jpeg", "png", "tiff"):
        picture = decode(SOURCES[name] + b"appended by a camera" * 50)
        np.testing.assert_array_equal(picture.pixels, decode(SOURCES[name]).pixels)


def test_flipped_bits_in_png_pixels_are_noticed():
    data = encode(Picture(pixels_of(3), "PNG"))
    for position in range(data.index(b"IDAT") + 4, len(data) - 16, 50):
        damaged = bytearray(data)
        damaged[position] ^= 1
        with pytest.raises(UnreadableImage, match="damaged or cut short"):
            decode(bytes(damaged))


@pytest.mark.parametrize("data", [b"", b"\0" * 1000, b"<html>404</html>", b"BM and other words", b"\x89PNG"])
def test_what_is_no_image_is_unreadable(data):
    with pytest.raises(UnreadableImage, match=rf"\({len(data)} bytes"):
        decode(data)


def test_other_formats_are_named():
    with pytest.raises(RefusedImage, match="this is GIF; convert it"):
        decode(pillow_bytes(Image.new("P", (8, 8)), "GIF"))
    with pytest.raises(RefusedImage, match="this is AVIF"):
        decode(b"\0\0\0\x20ftypavif" + b"\0" * 40)
    with pytest.raises(RefusedImage, match="this is big-endian BigTIFF"):
        decode(tiff_bytes(pixels_of(3), bigtiff=True, byteorder=">"))


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(name):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    data = pillow_bytes(frames[0], name, save_all=True, append_images=frames[1:])
    with pytest.raises(RefusedImage, match="GIF" if name == "GIF" else "frames or pages"):
        decode(data)


def bomb_headers():
    yield "png", png_bytes(100_000, 100_000, 8, 2, [b""])
    yield "bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 100_000, 100_000, 1, 24, *[0] * 6)
    jpeg = bytearray(SOURCES["jpeg"])
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = b"\xff\xff\xff\xff"
    yield "jpeg", bytes(jpeg)
    canvas = struct.pack("<I", 99_999)[:3]
    yield (
        "webp",
        b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + canvas * 2 + b"VP8 \0\0\0\0",
    )
    yield "tiff", with_tiff_tags(tiff_bytes(pixels_of(3)), (256, 257))
    yield "tiff-tile", with_tiff_tags(tiff_bytes(pixels_of(3), tile=(16, 16)), (322, 323))


def with_tiff_tags(data, tags, value=100_000):
    """A little-endian TIFF with a large value in some of its tags."""
    data = bytearray(data)
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
        (tag,) = struct.unpack_from("<H", data, entry)
        if tag in tags:
            struct.pack_into("<HHII", data, entry, tag, 4, 1, value)
    return bytes(data)


BOMBS = dict(bomb_headers())


@pytest.mark.parametrize("name", BOMBS)
def test_a_huge_header_is_refused_before_memory_is_taken(name):
    tracemalloc.start()
    start = time.perf_counter()
    # Older libwebp bindings cannot make a canvas of this size and call it damage.
    with pytest.raises((RefusedImage, UnreadableImage) if name == "webp" else RefusedImage):
        decode(BOMBS[name])
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 10 * 2**20


def test_the_limit_is_the_callers():
    data = encode(Picture(pixels_of(3, height=10, width=10), "PNG"))
    assert decode(data, max_pixels=100).pixels.shape == (10, 10, 3)
    with pytest.raises(RefusedImage, match=r"10x10 is .* over the limit of .*; allow more .max_pixels"):
        decode(data, max_pixels=99)
    with pytest.raises(RefusedImage, match="0x5 px: there is nothing to restore"):
        decode(png_bytes(0, 5, 8, 2, [b""]))


def test_a_profile_that_unpacks_without_end_is_refused():
    bomb = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(20 * 2**20)))
    with pytest.raises(RefusedImage, match="colour profile"):
        decode(png_bytes(1, 1, 8, 0, [b"\0"], bomb))


def test_tiffs_of_other_kinds_are_refused():
    for dtype, found in (
        ("uint32", "32-bit unsigned"),
        ("int16", "16-bit signed"),
        ("float64", "64-bit float"),
    ):
        with pytest.raises(RefusedImage, match=f"TIFF with {found}"):
            decode(tiff_bytes(np.zeros((8, 8), dtype)))
    with pytest.raises(RefusedImage, match="5 samples a pixel"):
        decode(tiff_bytes(pixels_of(5), photometric="rgb"))
    with pytest.raises(RefusedImage, match=r"colour mode LAB"):
        decode(pillow_bytes(Image.new("LAB", (8, 8)), "TIFF"))
    out_of_range = pixels_of(1, "float32")[:, :, 0] * 4 - 1
    with pytest.raises(RefusedImage, match=r"values -0\.9\d+ to 2\.9\d+; scale it to \[0, 1\]"):
        decode(tiff_bytes(out_of_range))
    out_of_range[3, 3] = np.nan
    with pytest.raises(RefusedImage, match="nan to nan"):
        decode(tiff_bytes(out_of_range))


# What cannot be written


@pytest.mark.parametrize(
    ("name", "channels", "dtype", "message"),
    [
        ("JPEG", 4, "uint8", "JPEG cannot hold RGBA"),
        ("JPEG", 3, "uint16", "JPEG cannot hold 16-bit samples; use PNG or TIFF"),
        ("BMP", 2, "uint8", "BMP cannot hold grey with alpha"),
        ("WEBP", 1, "uint8", "WEBP cannot hold grey"),
        ("PNG", 3, "float32", "PNG cannot hold 32-bit samples; use TIFF"),
        ("GIF", 3, "uint8", "cannot write format 'GIF'; use one of PNG, JPEG, TIFF, WEBP, BMP"),
    ],
)
def test_a_format_that_cannot_hold_the_picture(name, channels, dtype, message):
    with pytest.raises(ValueError, match=message):
        encode(Picture(pixels_of(channels, dtype), "PNG"), format=name)


def test_sides_ranges_and_quality_are_checked():
    with pytest.raises(ValueError, match="WEBP cannot hold 16384x1 px, only up to 16383 a side"):
        encode(Picture(np.zeros((1, 16384, 3), np.uint8), "WEBP"))
    with pytest.raises(ValueError, match=r"float pixels must be in \[0, 1\], got 0 to 1.5"):
        encode(Picture(np.array([[[0.0], [1.5]]], np.float32), "TIFF"))
    with pytest.raises(ValueError, match="quality must be 1 to 100, got 0"):
        encode(Picture(pixels_of(3), "JPEG"), quality=0)


def test_a_picture_checks_its_pixels():
    with pytest.raises(ValueError, match=r"got shape \(4, 4\)"):
        Picture(np.zeros((4, 4), np.uint8), "PNG")
    with pytest.raises(ValueError, match="got int64"):
        Picture(np.zeros((4, 4, 1), np.int64), "PNG")
    with pytest.raises(ValueError, match="contiguous"):
        Picture(np.zeros((4, 4, 3), np.uint8)[::-1], "PNG")
