"""Damaged files of every kind: no crash, no hang, no memory beyond a plan, and only the two errors that are declared.

It is done in a process of its own, so that a segmentation fault or a hang is a failure that names its case. More of
it, with another seed: `PYTHONPATH=. python tests/nafnet/test_fuzz.py MUTATIONS_PER_CASE SEED`.
"""

import faulthandler
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from nafnet.images import Picture, RefusedImage, UnreadableImage, decode, encode, read_note
from tests.peak import peak_bytes

MUTATIONS = 250
SECONDS = 10
MAX_PIXELS = 1_000_000
# The largest picture allowed is 16 MB (four floats a pixel). Reading and writing hold a few copies of it.
MAX_GROWTH = 200 * 2**20
MAX_FAILURES = 20


# Valid files


def noise(channels, dtype="uint8", height=19, width=28):
    rng = np.random.default_rng(channels)
    if dtype == "float32":
        return rng.random((height, width, channels), np.float32)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def smooth(channels):
    rows, columns = np.mgrid[0:40, 0:48]
    return (
        np.stack([rows * 6, columns * 5, rows + columns, 255 - rows], axis=2).astype(np.uint8)[:, :, :channels].copy()
    )


def exif():
    block = Image.Exif()
    block[0x010F], block[0x0112], block[0x011A] = "A maker", 6, 72.0
    block.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    block.get_ifd(0x8825)[0x0002] = (1.0, 2.0, 3.5)
    return block


def pillow(pixels, name, **options):
    image = Image.fromarray(pixels.squeeze()) if isinstance(pixels, np.ndarray) else pixels
    stream = BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def tiff(pixels, **options):
    stream = BytesIO()
    tifffile.imwrite(stream, pixels.squeeze(), metadata=None, **options)
    return stream.getvalue()


def rewritten(data, **options):
    """The same picture as we write it, with all that it can hold."""
    return encode(decode(data), note="nafnet-pipelines 0.1: recipe 0123456789abcdef", **options)


def png_cases():
    icc = zlib.compress(bytes(3000))
    for channels, mode in enumerate(("L", "LA", "RGB", "RGBA"), 1):
        yield f"8-bit {mode}", pillow(noise(channels), "PNG", exif=exif())
        yield f"16-bit {mode}", encode(Picture(noise(channels, "uint16"), "PNG"), note="a note")
    palette = Image.fromarray(noise(3)).quantize(16)
    yield "palette", pillow(palette, "PNG", icc_profile=icc)
    yield "palette with alpha", pillow(palette, "PNG", transparency=bytes(range(16)))
    yield "1-bit", pillow(Image.fromarray(noise(1)[:, :, 0] > 128), "PNG")
    yield "deflated hard", pillow(smooth(3), "PNG", optimize=True)


def jpeg_cases():
    yield "baseline", pillow(smooth(3), "JPEG", exif=exif(), icc_profile=bytes(3000))
    yield "progressive", pillow(smooth(3), "JPEG", progressive=True, subsampling=2)
    yield "grey", pillow(smooth(1), "JPEG")
    yield "grey progressive", pillow(smooth(1), "JPEG", progressive=True)
    yield "CMYK", pillow(Image.fromarray(smooth(3)).convert("CMYK"), "JPEG", quality=90)
    yield "CMYK progressive", pillow(Image.fromarray(smooth(3)).convert("CMYK"), "JPEG", progressive=True)
    yield "restarts", pillow(smooth(3), "JPEG", restart_marker_blocks=2)
    yield "ours", rewritten(pillow(smooth(3), "JPEG", exif=exif()), subsampling="4:2:2")


def tiff_cases():
    rgb = {"photometric": "rgb"}
    for dtype in ("uint8", "uint16", "float32"):
        yield f"{dtype} strips", tiff(noise(3, dtype), rowsperstrip=4, **rgb)
        yield f"{dtype} tiles", tiff(noise(3, dtype), tile=(16, 16), **rgb)
        yield f"{dtype} planes", tiff(noise(3, dtype).transpose(2, 0, 1).copy(), planarconfig="separate", **rgb)
        yield f"{dtype} deflate", tiff(noise(4, dtype), compression="zlib", extrasamples=["unassalpha"], **rgb)
        yield f"{dtype} LZW", tiff(noise(3, dtype), compression="lzw", predictor=dtype != "float32", **rgb)
        yield f"{dtype} big", tiff(noise(1, dtype), bigtiff=True, photometric="minisblack", software="A tool")
        yield f"{dtype} ours", rewritten(tiff(noise(3, dtype), **rgb, extratags=[(271, 2, 0, "A maker", True)]))
    yield "planar tiles", tiff(noise(3).transpose(2, 0, 1).copy(), planarconfig="separate", tile=(16, 16), **rgb)
    yield "big tiles deflate", tiff(noise(3, "uint16"), bigtiff=True, tile=(16, 16), compression="zlib", **rgb)
    yield "big-endian", tiff(noise(3, "uint16"), byteorder=">", predictor=True, compression="zlib", **rgb)
    yield "premultiplied", tiff(noise(4, "uint16"), extrasamples=["assocalpha"], **rgb)
    yield "white is zero", tiff(noise(1), photometric="miniswhite")
    yield "grey alpha", pillow(noise(2), "TIFF", exif=exif())
    yield "palette", pillow(Image.fromarray(noise(3)).quantize(16), "TIFF", compression="tiff_lzw")
    yield "fax", pillow(Image.fromarray(noise(1)[:, :, 0] > 128), "TIFF", compression="group4")
    yield "packbits", pillow(smooth(3), "TIFF", compression="packbits")
    yield "JPEG within", tiff(smooth(3), compression="jpeg", **rgb)
    for compression in (None, "tiff_adobe_deflate"):
        image = Image.fromarray(smooth(3)).convert("CMYK")
        yield f"CMYK {compression}", pillow(image, "TIFF", compression=compression, exif=exif())


def webp_cases():
    extras = {"exif": exif(), "icc_profile": bytes(3000), "xmp": b"<x/>"}
    yield "lossy", pillow(smooth(3), "WEBP", quality=50)
    yield "lossless", pillow(smooth(3), "WEBP", lossless=True)
    yield "lossless noise", pillow(noise(4), "WEBP", lossless=True, exact=True)
    yield "lossy alpha", pillow(smooth(4), "WEBP", quality=50, **extras)
    yield "ours", rewritten(pillow(smooth(4), "WEBP", **extras))
    frames = [Image.fromarray(smooth(3)), Image.fromarray(255 - smooth(3))]
    yield "one frame", one_frame(pillow(frames[0], "WEBP", save_all=True, append_images=frames[1:]))


def one_frame(data):
    """An animation without its last frame: that much the reader takes for a still image."""
    end = data.rindex(b"ANMF")
    return data[:4] + struct.pack("<I", end - 8) + data[8:end]


def bmp_cases():
    yield "RGB", pillow(noise(3), "BMP")
    yield "grey", pillow(noise(1), "BMP")
    yield "RGBA", rewritten(pillow(noise(4), "PNG"), format="BMP")
    yield "padded", pillow(noise(4), "BMP")
    yield "palette", pillow(Image.fromarray(noise(3)).quantize(16), "BMP")
    yield "1-bit", pillow(Image.fromarray(noise(1)[:, :, 0] > 128), "BMP")
    header = struct.pack("<IiiHHIIiiII", 40, 12, 6, 1, 16, 0, 0, 0, 0, 0, 0)
    yield (
        "5 bits a channel",
        b"BM" + struct.pack("<IHHI", 54 + 144, 0, 0, 54) + header + noise(1, height=1, width=144).tobytes(),
    )
    runs = b"\5\1\7\2\0\0" + b"\0\6abcdef" + b"\6\3\0\0" + b"\0\2\3\1" + b"\4\7\0\0" + b"\x0c\1\0\0" * 3 + b"\0\1"
    palette = bytes(range(1, 65))
    for bits, kind in ((8, 1), (4, 2)):
        header = struct.pack("<IiiHHIIiiII", 40, 12, 6, 1, bits, kind, len(runs), 0, 0, 16, 0)
        offset = 54 + len(palette)
        yield (
            f"runs of {bits} bits",
            b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + header + palette + runs,
        )


CASES = {"PNG": png_cases, "JPEG": jpeg_cases, "TIFF": tiff_cases, "WEBP": webp_cases, "BMP": bmp_cases}


# Damage


def mutated(data, rng):
    """One to five times: bits flipped, bytes and numbers replaced, pieces cut, inserted, repeated or moved."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        size = len(damaged)
        # as often in the header, or near the end, as anywhere
        at = rng.randrange(max(1, rng.choice((size, min(size, 200)))))
        at = size - 1 - at if rng.random() < 0.2 else at
        piece = damaged[at : at + rng.choice((1, 2, 4, 12, 50, 1000))]
        action = rng.randrange(9)
        if action <= 1:
            damaged[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            damaged[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif action <= 4:
            format = rng.choice(("<H", ">H", "<I", ">I", "<Q"))  # noqa: A001
            number = rng.choice((0, 1, 2, 3, 5, 6, 7, 8, 16, 255, 256, 1000, 65535, 10**6, 2**31 - 1, 2**31, 2**32 - 1))
            number = rng.choice((number, number, rng.randrange(2**16)))
            packed = struct.pack(format, number % 2 ** (8 * struct.calcsize(format)))
            damaged[at : at + len(packed)] = packed
        elif action == 5:
            del damaged[at : at + rng.choice((1, 2, 10, 100, size))]
        elif action == 6:
            damaged[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif action == 7:
            damaged[at:at] = piece * rng.choice((1, 1, 2, 20))
        else:
            there = rng.randrange(size)
            damaged[there : there + len(piece)] = piece
        if not damaged:
            return b""
    return with_checksums(damaged) if data.startswith(b"\x89PNG") and rng.random() < 0.7 else bytes(damaged)


def with_checksums(data):
    """A PNG whose checksums are right again, so that the damage is not noticed at once."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 <= len(data):
            data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def survives(data):
    """Whether there is still a picture in it. Anything but the two declared errors is a failure."""
    read_note(data)
    try:
        picture = decode(data, max_pixels=MAX_PIXELS)
    except (UnreadableImage, RefusedImage) as error:
        if not str(error):
            raise
        return False
    assert 0 < picture.height * picture.width <= MAX_PIXELS
    try:
        written = encode(picture, note="again")
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        return True
    if picture.pixels.size < 100_000:
        again = decode(written)
        assert again.pixels.shape == picture.pixels.shape
        assert again.format == "JPEG" or np.array_equal(again.pixels, picture.pixels)
    return True


# The process that does it


def mutation(name, case, data, seed, number):
    """What failures call it, and the bytes: `dict(CASES[name]())[case]`, damaged the same way every time."""
    what = f"{name}, {case}, seed {seed}, mutation {number}"
    return what, mutated(data, random.Random(what))  # noqa: S311 - it is not for secrets


def campaign(mutations, seed, progress, *names):
    """Mutate every case of these formats. What is being done stands in the file `progress`, failures on stdout."""
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)  # a hang shows where it is, then ends the process
    warnings.simplefilter("ignore")
    cases = [(name, case, data) for name in names for case, data in CASES[name]()]
    for name, case, data in cases:
        assert survives(data), f"{name}, {case} is not valid to begin with"
    before = peak_bytes()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * MAX_GROWTH,) * 2)
    pictures = failures = 0
    with Path(progress).open("wb", buffering=0) as place:
        for name, case, data in cases:
            for number in range(mutations):
                what, damaged = mutation(name, case, data, seed, number)
                place.seek(0)
                place.write(what.ljust(100).encode())
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                try:
                    pictures += survives(damaged)
                except Exception:  # noqa: BLE001 - this is what is looked for
                    failures += 1
                    print(f"{what}\n{traceback.format_exc()}", flush=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
                if failures == MAX_FAILURES:
                    sys.exit("too many failures")
    growth = peak_bytes() - before
    print(f"{len(cases) * mutations} mutations, {pictures} still pictures, memory grew by {growth / 2**20:.0f} MiB")
    if growth > MAX_GROWTH:
        sys.exit(f"which is over {MAX_GROWTH / 2**20:.0f} MiB")
    sys.exit(failures > 0)


def run(mutations, seed, *names):
    """Exit status and output of a campaign in a process of its own, and what it was doing when it ended."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile() as progress:
        command = [sys.executable, __file__, str(mutations), str(seed), progress.name, *names]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, errors="replace")
        return done.returncode, done.stdout + done.stderr[-3000:], progress.read().decode().strip()


def test_damaged_files():
    status, output, at = run(MUTATIONS, 0, *CASES)
    assert status == 0, f"exit status {status} at {at}\n{output}"


if __name__ == "__main__":
    campaign(int(sys.argv[1]), int(sys.argv[2]), *(sys.argv[3:] or [os.devnull, *CASES]))
