"""Files written by Pillow, tifffile and hand, read by `decode`; files written by `encode`, read by them."""

import contextlib
import struct
import time
import tracemalloc
import zlib
from io import BytesIO
from xml.etree import ElementTree

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from nafnet.images import (
    Picture,
    RefusedImage,
    UnreadableImage,
    check_output,
    decode,
    encode,
    extension,
    holds_depth,
    read_note,
)

# Pillow warns of the TIFF directories that these tests cut short.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_ICC = ICC[:16] + b"GRAY" + ICC[20:]  # libpng checks that the profile's colour space is the image's
HOLDS = {
    "PNG": [(channels, dtype) for channels in (1, 2, 3, 4) for dtype in ("uint8", "uint16")],
    "TIFF": [(channels, dtype) for channels in (1, 2, 3, 4) for dtype in ("uint8", "uint16", "float32")],
    "WEBP": [(3, "uint8"), (4, "uint8")],
    "BMP": [(1, "uint8"), (3, "uint8"), (4, "uint8")],
    "JPEG": [(1, "uint8"), (3, "uint8")],
}
NOTE = "nafnet-pipelines 0.1: recipe 0123456789abcdef, weights a682d467"
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


@pytest.mark.parametrize("icc", [None, b"VP8L in a profile"])
def test_webp_keeps_alpha_that_is_opaque(icc):
    pixels = np.concatenate([pixels_of(3), np.full((19, 26, 1), 255, np.uint8)], axis=2)
    data = encode(Picture(pixels, "WEBP", icc))
    picture = decode(data)
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.icc == icc
    with Image.open(BytesIO(data)) as image:
        np.testing.assert_array_equal(np.array(image), pixels)


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


@pytest.mark.parametrize("name", HOLDS)
def test_notes_are_found_and_do_not_pile_up(name):
    for channels, dtype in HOLDS[name]:
        icc = GREY_ICC if channels <= 2 else ICC
        picture = Picture(pixels_of(channels, dtype), name, *((None, None) if name == "BMP" else (icc, exif_block())))
        assert read_note(encode(picture)) is None
        noted = encode(picture, note=NOTE)
        assert read_note(noted) == (None if name == "BMP" else NOTE)
        assert noted.count(NOTE.encode()) == (name != "BMP")
        again = decode(noted)
        np.testing.assert_array_equal(again.pixels, decode(encode(picture)).pixels)
        assert (again.icc, again.exif) == (picture.icc, decode(encode(picture)).exif)
        assert encode(decode(encode(picture)), note=NOTE) == encode(decode(encode(picture, note="earlier")), note=NOTE)


def test_other_tools_read_the_note():
    picture = Picture(pixels_of(3), "PNG", ICC, exif_block())
    note = NOTE + ' <"&>'
    with Image.open(BytesIO(encode(picture, note=note))) as image:
        assert image.text == {"Software": note}
    with Image.open(BytesIO(encode(picture, format="JPEG", note=note))) as image:
        assert image.info["comment"] == note.encode()
    for name in ("TIFF", "WEBP"):
        data = encode(picture, format=name, note=note)
        with Image.open(BytesIO(data)) as image:
            packet = ElementTree.fromstring(image.info["xmp"].decode())  # noqa: S314 - our own
        (tool,) = packet.findall(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
        assert tool.get("{http://ns.adobe.com/xap/1.0/}CreatorTool") == note == read_note(data)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_note_leaves_the_cameras_software_and_description(name):
    exif = Image.Exif()
    exif[270], exif[305] = "A picture", "Camera 1.2"
    picture = Picture(pixels_of(3), name, None, exif.tobytes().removeprefix(b"Exif\0\0"))
    with Image.open(BytesIO(encode(decode(encode(picture)), note=NOTE))) as image:
        assert (image.getexif()[270], image.getexif()[305]) == ("A picture", "Camera 1.2")


def test_notes_of_other_files():
    assert [read_note(data) for data in (b"", b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"words", b"GIF89a")] == [None] * 6
    assert read_note(pillow_bytes(pixels_of(3), "JPEG", comment=b"CREATOR: x\xff")) == "CREATOR: x\xff"
    texts = [png_chunk(b"tEXt", text) for text in (b"Software\0first", b"Software\0second")]
    assert read_note(png_bytes(1, 1, 8, 0, [b"\0"], *texts)) == "first"
    assert read_note(png_bytes(1, 1, 8, 0, [b"\0"], png_chunk(b"tEXt", b"Title\0A picture"))) is None
    element = b"<x><xmp:CreatorTool>A &amp; B</xmp:CreatorTool></x>"
    assert read_note(pillow_bytes(pixels_of(3), "WEBP", xmp=element)) == "A & B"
    assert read_note(pillow_bytes(pixels_of(3), "TIFF", tiffinfo={305: "GIMP"})) is None


@pytest.mark.parametrize("note", ["", "two\nlines", "caf\xe9", "a" * 1001, "\0"])
def test_notes_that_not_every_format_holds(note):
    with pytest.raises(ValueError, match="1 to 1000 printable ASCII characters, got"):
        encode(Picture(pixels_of(3), "BMP"), note=note)


@pytest.mark.parametrize("data_of", [lambda name: encode(Picture(pixels_of(3), name, None, exif_block()), note=NOTE)])
@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_looking_for_a_note_never_raises(name, data_of):
    data = data_of(name)
    for end in range(0, len(data), 7):
        assert read_note(data[:end]) in (None, *(NOTE[:length] for length in range(len(NOTE) + 1)))


@pytest.mark.parametrize(
    ("subsampling", "luma"), [(None, (1, 1)), ("4:4:4", (1, 1)), ("4:2:2", (2, 1)), ("4:2:0", (2, 2))]
)
def test_chroma_subsampling(subsampling, luma):
    data = encode(Picture(pixels_of(3), "JPEG"), subsampling=subsampling, quality=80)
    with Image.open(BytesIO(data)) as image:
        assert [component[1:3] for component in image.layer] == [luma, (1, 1), (1, 1)]
    assert decode(encode(Picture(pixels_of(1), "JPEG"), subsampling=subsampling)).channels == 1


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        (("GIF", None, None), ["cannot write format 'GIF'; use one of PNG, JPEG, TIFF, WEBP, BMP"]),
        (("PNG", 90, None), ["PNG is lossless and has no quality; leave it out, or write JPEG or WEBP"]),
        (("TIFF", 90, None), ["TIFF is lossless and has no quality"]),
        (("BMP", 90, "4:4:4"), ["BMP is lossless and has no quality", "BMP has no chroma subsampling to choose"]),
        (("WEBP", 90, "4:2:0"), ["WEBP has no chroma subsampling to choose; leave it out, or write JPEG"]),
        (("JPEG", 0, "4:1:1"), ["quality must be 1 to 100, got 0", "must be 4:4:4, 4:2:2, 4:2:0, got '4:1:1'"]),
        (("JPEG", 101, None), ["quality must be 1 to 100, got 101"]),
        (("gif", 0, "x"), ["cannot write format 'gif'", "quality must be", "subsampling must be"]),
    ],
)
def test_options_are_checked_all_at_once(options, problems):
    for check in (check_output, lambda *options: encode(Picture(pixels_of(3), options[0]), **named(*options))):
        with pytest.raises(ValueError, match=problems[0]) as raised:
            check(*options)
        assert all(problem in str(raised.value) for problem in problems)


def named(_name, quality, subsampling):
    return {"quality": quality, "subsampling": subsampling}


def test_options_that_are_fine():
    for name in HOLDS:
        check_output(name)
    for options in (("JPEG", 1, "4:2:0"), ("JPEG", 100, "4:4:4"), ("WEBP", 50, None)):
        check_output(*options)


def test_formats_say_what_they_hold():
    assert [extension(name) for name in HOLDS] == [".png", ".tif", ".webp", ".bmp", ".jpg"]
    depths = {8: "uint8", 16: "uint16", 32: "float32"}
    for name, kinds in HOLDS.items():
        held = {dtype for _, dtype in kinds}
        assert [holds_depth(name, bits) for bits in depths] == [dtype in held for dtype in depths.values()]
    for ask in (extension, lambda name: holds_depth(name, 8)):
        with pytest.raises(ValueError, match="cannot write format 'GIF'"):
            ask("GIF")


# Any picture that a format holds

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def pictures(draw, name):
    """Noise, sparse extremes or one value, with texts, profiles and notes of any content."""
    channels, dtype = draw(st.sampled_from(HOLDS[name]))
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 40)), channels
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pixels = draw(
        st.sampled_from([rng.random(shape), rng.random(shape) > 0.9, np.full(shape, rng.random()), np.ones(shape)])
    )
    top = 1 if dtype == "float32" else np.iinfo(dtype).max
    exif = Image.Exif()
    exif[0x010F] = draw(st.text("abc \xe9", max_size=30))
    exif[0x011A] = draw(st.fractions(0, 1000, max_denominator=1000))
    exif.get_ifd(0x8769)[0x9286] = draw(st.binary(max_size=70))
    block = draw(st.sampled_from([None, exif.tobytes().removeprefix(b"Exif\0\0")]))
    icc = draw(st.sampled_from([None, GREY_ICC if channels <= 2 else ICC, draw(st.binary(min_size=1, max_size=200))]))
    note = draw(st.none() | st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=1000))
    return Picture((pixels * top).astype(dtype), name, icc, block), note


@pytest.mark.parametrize("name", HOLDS)
def test_any_picture_round_trips(name):
    @PROPERTY
    @given(pictures(name))
    def check(case):
        picture, note = case
        data = encode(picture, note=note, quality=100 if name == "JPEG" else None)
        again = decode(data)
        assert again.pixels.dtype == picture.pixels.dtype
        assert again.pixels.shape == picture.pixels.shape
        # At quality 100 what is left of JPEG's losses is the rounding of YCbCr and of the cosine transform.
        difference = np.abs(again.pixels.astype(float) - picture.pixels.astype(float)).max()
        assert difference <= (6 if name == "JPEG" else 0)
        if name == "BMP":
            return
        assert (again.icc, read_note(data)) == (picture.icc, note)
        if name != "TIFF":  # which has other tags of its own among them
            assert again.exif == picture.exif
        elif picture.exif:
            ours, theirs = Image.Exif(), Image.Exif()
            ours.load(again.exif)
            theirs.load(picture.exif)
            assert dict(ours) | {0x8769: 0} == dict(theirs) | {0x8769: 0}
            assert ours.get_ifd(0x8769) == theirs.get_ifd(0x8769)

    check()


# What others write


def foreign():
    """name, what Pillow saves, the pixels expected, options: every kind of every format that Pillow can write."""
    grey, two, rgb, rgba = (pixels_of(channels) for channels in (1, 2, 3, 4))
    bits = Image.fromarray(grey[:, :, 0] > 128)
    palette = Image.fromarray(rgb).quantize(16)
    colours = np.array(palette.convert("RGB"))
    deep = Image.fromarray(pixels_of(1, "uint16")[:, :, 0])
    for name in ("PNG", "TIFF"):
        yield name, Image.fromarray(grey[:, :, 0]), grey
        yield name, Image.fromarray(two), two
        yield name, Image.fromarray(rgba), rgba
        yield name, deep, pixels_of(1, "uint16")
    for name in ("PNG", "TIFF", "BMP"):
        yield name, bits, np.array(bits)[:, :, None] * np.uint8(255)
        yield name, palette, colours
        yield name, Image.fromarray(rgb), rgb
    yield "BMP", Image.fromarray(grey[:, :, 0]), grey
    yield "BMP", Image.fromarray(rgba), rgba[:, :, :3]  # Pillow leaves the masks out: the fourth byte is padding
    yield "WEBP", Image.fromarray(rgb), rgb
    yield "WEBP", Image.fromarray(rgba), rgba
    yield "TIFF", Image.fromarray(pixels_of(1, "float32")[:, :, 0]), pixels_of(1, "float32")
    yield "TIFF", Image.fromarray(rgb).convert("CMYK"), rgb
    yield "TIFF", Image.fromarray(rgba).convert("PA"), np.array(Image.fromarray(rgba).convert("PA").convert("RGBA"))
    smooth = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    yield "JPEG", Image.fromarray(smooth), smooth
    yield "JPEG", Image.fromarray(smooth[:, :, 0]), smooth[:, :, :1]
    yield "JPEG", Image.fromarray(smooth).convert("CMYK"), smooth


@pytest.mark.parametrize(("name", "image", "expected"), list(foreign()), ids=lambda value: getattr(value, "mode", None))
def test_every_kind_comes_back_with_profile_and_exif(name, image, expected):
    options = {"lossless": True, "exact": True} if name == "WEBP" else {}
    if name != "BMP":
        exif = Image.Exif()
        exif.load(exif_block(6))  # to be turned by a quarter
        icc = GREY_ICC if expected.shape[2] <= 2 else ICC
        options |= {"icc_profile": icc, "exif": exif}
        expected = np.rot90(expected, -1)
    first = decode(pillow_bytes(image, name, **options))
    again = decode(encode(first))
    for picture in (first, again):
        assert picture.pixels.dtype == expected.dtype
        assert picture.pixels.shape == expected.shape
        assert np.abs(picture.pixels.astype(float) - expected).max() <= (3 if name == "JPEG" else 0)
        assert picture.format == name
        if name != "BMP":
            kept = Image.Exif()
            kept.load(picture.exif)
            assert (kept[0x010F], kept[0x0112]) == ("A maker", 1)
            assert kept.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"
            assert picture.icc == (None if image.mode == "CMYK" else icc)


def test_a_bmp_has_alpha_when_it_has_a_mask_for_it():
    pixels = pixels_of(4)
    data = encode(Picture(pixels, "BMP"))
    with Image.open(BytesIO(data)) as image:
        np.testing.assert_array_equal(np.array(image), pixels)
    np.testing.assert_array_equal(
        imagecodecs.bmp_decode(encode(Picture(pixels[:, :, :3].copy(), "BMP"))), pixels[:, :, :3]
    )
    unmasked = bytearray(data)
    struct.pack_into("<I", unmasked, 14 + 52, 0)
    np.testing.assert_array_equal(decode(bytes(unmasked)).pixels, pixels[:, :, :3])


def test_jpeg_within_tiff():
    smooth = np.full((32, 48, 3), (200, 100, 50), np.uint8)
    for data in (
        pillow_bytes(smooth, "TIFF", compression="jpeg"),
        tiff_bytes(smooth, photometric="rgb", compression="jpeg"),
    ):
        assert np.abs(decode(data).pixels.astype(int) - smooth).max() <= 3


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
    picture = decode(tiff_bytes(pixels, photometric="rgb", bigtiff=True, software="A tool"))
    np.testing.assert_array_equal(picture.pixels, pixels)
    exif = Image.Exif()
    exif.load(picture.exif)
    assert exif[305] == "A tool"


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


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_an_orientation_of_four_bytes(byteorder):
    head = b"II*\0" if byteorder == "<" else b"MM\0*"
    block = head + struct.pack(byteorder + "IHHHIII", 8, 1, 0x0112, 4, 1, 6, 0)
    picture = decode(encode(Picture(pixels_of(3), "PNG", None, block)))
    np.testing.assert_array_equal(picture.pixels, np.rot90(pixels_of(3), -1))
    assert picture.exif == head + struct.pack(byteorder + "IHHHIII", 8, 1, 0x0112, 4, 1, 1, 0)


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
    yield "bmp-rgba", encode(Picture(pixels_of(4, width=28), "BMP"))
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


def webp_bytes(kind, body):
    chunk = kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def bmp_header(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


def jpeg_of_size(width, height):
    data = bytearray(SOURCES["jpeg"])
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def bomb_headers():
    yield "png", png_bytes(100_000, 100_000, 8, 2, [b""])
    yield "bmp", bmp_header(100_000, 100_000)
    yield "bmp-upside-down", bmp_header(100_000, -100_000)
    yield "jpeg", jpeg_of_size(65535, 65535)
    yield "webp", webp_bytes(b"VP8X", bytes(4) + struct.pack("<I", 99_999)[:3] * 2)
    yield "webp-lossy", webp_bytes(b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f")
    yield "webp-lossless", webp_bytes(b"VP8L", b"\x2f" + struct.pack("<I", 2**28 - 1))
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
    with pytest.raises(RefusedImage, match="over the limit"):
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


@pytest.mark.parametrize(
    "data",
    [
        png_bytes(0, 5, 8, 2, [b""]),
        bmp_header(0, 5),
        jpeg_of_size(0, 5),
        webp_bytes(b"VP8 ", b"\0\0\0\x9d\x01\x2a\0\0\5\0"),
        with_tiff_tags(tiff_bytes(pixels_of(3, height=5)), (256,), 0),
    ],
    ids=["PNG", "BMP", "JPEG", "WEBP", "TIFF"],
)
def test_nothing_is_refused(data):
    with pytest.raises(RefusedImage, match="0x5 px: there is nothing to restore"):
        decode(data)


@pytest.mark.parametrize("name", ["BMP", "TIFF"])
def test_rows_that_would_take_minutes_are_refused(name):
    data = pillow_bytes(Image.new("P", (65536, 1)), name)
    with pytest.raises(RefusedImage, match="65536x1 px, over 65535 a side"):
        decode(data)
    assert decode(pillow_bytes(Image.new("P", (1, 65535)), name)).height == 65535


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ([(323, 65000)], UnreadableImage, "TIFF tag 323 is missing"),
        ([(322, 65000)], UnreadableImage, "TIFF tag 322 is missing"),
        ([(305, 32998)], RefusedImage, "a volume of 1 slices in tiles of 1000000"),
        ([(305, 32997)], RefusedImage, "a volume of 1000000 slices in tiles of 1"),
    ],
)
def test_tiles_that_libtiff_cannot_allocate(changes, error, message):
    """The bytes of a tile are a product of more factors than its width and length."""
    data = bytearray(tiff_bytes(pixels_of(3), tile=(16, 16), photometric="rgb", software="A tool"))
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    found = {struct.unpack_from("<H", data, at)[0]: at for at in range(directory + 2, directory + 2 + 12 * entries, 12)}
    for before, after in changes:
        struct.pack_into("<HHII", data, found[before], after, 4, 1, 1_000_000)
    with pytest.raises(error, match=message):
        decode(bytes(data))


def test_of_a_tag_listed_twice_the_first_counts():
    """As for libtiff, which would make room for the width that it reads there."""
    data = with_tiff_tags(tiff_bytes(pixels_of(3)), (256,))
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    width = data.index(struct.pack("<HHII", 256, 4, 1, 100_000), directory)
    twice = [data[width : width + 12], struct.pack("<HHII", 256, 4, 1, 26)]
    twice += [data[at : at + 12] for at in range(directory + 2, directory + 2 + 12 * entries, 12) if at != width]
    moved = data[:4] + struct.pack("<I", len(data)) + data[8:] + struct.pack("<H", entries + 1) + b"".join(twice)
    with pytest.raises(RefusedImage, match="100000x19"):
        decode(moved + bytes(4), max_pixels=1_000_000)


@pytest.mark.parametrize("nested", [None, 0x8769, 0x8825])
def test_tags_that_share_their_bytes_are_not_copied_one_by_one(nested):
    size = 1_000_000
    entries = [struct.pack("<HHII", tag, 7, size, 0) for tag in range(40_000, 43_000)]
    hostile = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    tags = [struct.pack("<HHII", 271, 2, 3, 0x00434241)]
    if nested:
        tags.append(struct.pack("<HHII", nested, 4, 1, 8 + 2 + 24 + 4))
        first = struct.pack("<H", 2) + b"".join(tags) + bytes(4)
    else:
        first, hostile = hostile, b""
    block = b"II*\0\x08\0\0\0" + first + hostile
    picture = Picture(pixels_of(3), "PNG", None, block + bytes(size))
    tracemalloc.start()
    kept = decode(encode(picture, format="TIFF")).exif
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept is None
    assert peak < 20 * size


def test_a_jpeg_of_endless_scans_is_refused():
    data = SOURCES["jpeg-progressive"]
    last = data.rindex(b"\xff\xda")
    scan = data[last : last + 2 + struct.unpack_from(">H", data, last + 2)[0]]
    decode(data[:-2] + scan * 50 + data[-2:])
    with pytest.raises(RefusedImage, match=r"JPEG of \d+ scans, over the limit of 100"):
        decode(data[:-2] + scan * 100 + data[-2:])


def test_a_12_bit_jpeg_is_refused():
    data = bytearray(SOURCES["jpeg"])
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(RefusedImage, match="JPEG with 12-bit samples"):
        decode(bytes(data))


def test_a_profile_that_unpacks_without_end_is_refused():
    bomb = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(20 * 2**20)))
    with pytest.raises(RefusedImage, match="colour profile"):
        decode(png_bytes(1, 1, 8, 0, [b"\0"], bomb))


def test_tiffs_of_other_kinds_are_refused():
    for dtype, found in (
        ("uint32", "32-bit unsigned"),
        ("int16", "16-bit signed"),
        ("float64", "64-bit float"),
        ("int8", "8-bit signed"),
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
    with pytest.raises(ValueError, match="PNG cannot hold 1000001x1 px, only up to 1000000 a side"):
        encode(Picture(np.zeros((1, 1_000_001, 1), np.uint8), "PNG"))
    with pytest.raises(ValueError, match="BMP cannot hold 1x65536 px, only up to 65535 a side"):
        encode(Picture(np.zeros((65536, 1, 3), np.uint8), "BMP"))
    with pytest.raises(ValueError, match="its colour profile has 20000000 bytes, over 16707345"):
        encode(Picture(pixels_of(3), "JPEG", bytes(20_000_000)))
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
