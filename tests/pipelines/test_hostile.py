"""Whatever lies in a folder: each file ends as one row, nothing is written elsewhere, and memory stays in plan.

All of it goes through plan and stages in a process of its own, so that a crash, a hang or a peak of memory is seen.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from nafnet.images import decode
from nafnet.metadata import png_chunk
from nafnet.model import NetConfig
from nafnet.restore import Restorer
from pipelines.actor import RestoreActor
from pipelines.manifest import plan
from pipelines.records import Status
from pipelines.report import read_rows
from pipelines.settings import RestoreJob
from pipelines.stages import Work, fetch, finish
from pipelines.storage import Store, readable
from tests.conftest import random_network, save_published
from tests.peak import peak_bytes

MAX_PIXELS = 1_000_000
# Of decoding and restoring the largest image allowed; a hostile file that gets more is one that was believed.
MAX_GROWTH = 250 * 2**20
SECONDS = 120

Files = Iterator[tuple[str, bytes]]


# The corpus


def smooth(mode: str, size: tuple[int, int] = (28, 20)) -> Image.Image:
    """A gradient in any mode that Pillow knows."""
    gradient = Image.linear_gradient("L").resize(size)
    if mode in {"La", "RGBa", "LAB", "PA", "I;16", "I;16B", "I;16L", "I;16N"}:
        via = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB", "PA": "P"}.get(mode, "I")
        try:
            return gradient.convert(via).convert(mode)
        except ValueError:
            return Image.new(mode, size)
    return gradient.convert("RGB").convert(mode)


def saved(image: Image.Image, name: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def written_by_pillow() -> Files:
    """Every mode in every format that holds it, and in every compression of TIFF."""
    Image.init()
    for name in sorted(Image.SAVE):
        for mode in Image.MODES:
            try:
                yield f"{mode.replace(';', '-')}.{name.lower()}", saved(smooth(mode), name)
            except Exception:  # noqa: BLE001, S112 - a mode that this format does not hold, each in its own words
                continue
    for compression in ("group3", "group4", "jpeg", "lzma", "packbits", "tiff_adobe_deflate", "tiff_lzw", "zstd"):
        for mode in ("1", "L", "P", "RGB", "CMYK", "I;16", "F"):
            name = f"{mode.replace(';', '-')}-{compression}.tif"
            try:
                yield name, saved(smooth(mode), "TIFF", compression=compression)
            except Exception:  # noqa: BLE001, S112
                continue
    yield "progressive.jpg", saved(smooth("RGB"), "JPEG", progressive=True)
    yield "animated.gif", moving("GIF")
    yield "animated.webp", moving("WEBP")
    yield "animated.png", moving("PNG")
    yield "animated.avif", moving("AVIF")
    yield "pages.tif", moving("TIFF")
    yield "pictures.mpo", moving("MPO")


def moving(name: str) -> bytes:
    frames = [smooth("RGB"), smooth("RGB").rotate(180), smooth("RGB").rotate(90)]
    return saved(frames[0], name, save_all=True, append_images=frames[1:])


def damaged() -> Files:
    """Each of our formats cut, with bits flipped, with zeros in it, called otherwise, empty, or followed by more."""
    image = smooth("RGB", (128, 96))
    for name, ending in (("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif"), ("WEBP", "webp"), ("BMP", "bmp")):
        data = saved(image, name)
        for share in (0.01, 0.3, 0.9, 0.999):
            yield f"cut-{share}.{ending}", data[: int(len(data) * share)]
        for seed in range(4):
            rng = np.random.default_rng(seed)
            flipped = bytearray(data)
            for at in rng.integers(0, len(data), 1 + seed * 3):
                flipped[at] ^= 1 << int(rng.integers(8))
            yield f"flipped-{seed}.{ending}", bytes(flipped)
        yield f"zeroed-start.{ending}", bytes(64) + data[64:]
        yield f"zeroed-middle.{ending}", data[: len(data) // 3] + bytes(len(data) // 3) + data[2 * (len(data) // 3) :]
        yield f"zeroed-end.{ending}", data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
        yield f"zeros.{ending}", bytes(len(data))
        yield f"empty.{ending}", b""
        yield f"followed.{ending}", data + b"PK\3\4" + bytes(1000)
        yield f"called-a-{ending}.{'jpg' if ending == 'png' else 'png'}", data
    yield "text.png", b"<html>404</html>"
    yield "script.jpg", b"#!/bin/sh\nexit 1\n"


def huge() -> Files:
    """Headers that declare far more than there is, from sides of two thousand million to just over the limit."""
    image = smooth("RGB")
    png, jpeg, bmp, webp = (saved(image, name) for name in ("PNG", "JPEG", "BMP", "WEBP"))
    for width, height in ((2**31 - 1, 2**31 - 1), (100_000, 100_000), (1, 2**31 - 1), (1001, 1000), (0, 5)):
        size = f"{width}x{height}"
        header = struct.pack(">II", width, height) + png[24:29]
        yield f"{size}.png", png[:8] + png_chunk(b"IHDR", header) + png[33:]
        yield f"{size}.bmp", bmp[:18] + struct.pack("<ii", width, height) + bmp[26:]
        if width < 65536 and height < 65536:
            at = jpeg.index(b"\xff\xc0") + 5
            yield f"{size}.jpg", jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]
        strip = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 9}
        yield f"{size}.tif", tiff(strip)
        tile = {256: 20, 257: 20, 258: 8, 259: 1, 262: 1, 277: 1, 322: width, 323: height, 324: 8, 325: 9}
        yield f"tile-{size}.tif", tiff(tile)
    canvas = struct.pack("<4sIB3x", b"VP8X", 10, 0) + b"\xff" * 6
    yield "canvas.webp", webp[:4] + struct.pack("<I", len(webp) - 8 + 18) + b"WEBP" + canvas + webp[12:]


def tiff(tags: dict[int, int], following: int = 0) -> bytes:
    """A little-endian TIFF of one directory of 32-bit numbers."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in sorted(tags.items()))
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", following)


def deep_metadata() -> Files:
    """Profiles, EXIF and text that are nested, endless, enormous when unpacked, or point at themselves."""
    png, jpeg = saved(smooth("RGB"), "PNG"), saved(smooth("RGB"), "JPEG")
    bomb = zlib.compress(bytes(50_000_000), 1)

    def with_chunks(*chunks: bytes) -> bytes:
        return png[:33] + b"".join(chunks) + png[33:]

    yield "text-20000.png", with_chunks(*[png_chunk(b"tEXt", b"a\0b")] * 20_000)
    yield "text-bomb.png", with_chunks(png_chunk(b"zTXt", b"a\0\0" + bomb))
    yield "profile-bomb.png", with_chunks(png_chunk(b"iCCP", b"a\0\0" + bomb))
    yield "profile-no-zlib.png", with_chunks(png_chunk(b"iCCP", b"a\0\0nonsense"))
    xml = b"<x>" * 20_000 + b"</x>" * 20_000
    yield "xmp-deep.png", with_chunks(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xml))
    # A directory that is its own EXIF, GPS and interoperability directory, and its own successor
    loop = tiff({34665: 8, 34853: 8, 40965: 8, 330: 8, 274: 6}, following=8)
    for name, block in (("loop", loop), ("cut", loop[:20]), ("zeros", bytes(5000)), ("claims", exif_that_claims())):
        yield f"exif-{name}.png", with_chunks(png_chunk(b"eXIf", block))
        segment = b"Exif\0\0" + block
        yield f"exif-{name}.jpg", jpeg[:2] + struct.pack(">HH", 0xFFE1, len(segment) + 2) + segment + jpeg[2:]
    filler = struct.pack(">HH", 0xFFEF, 65535) + bytes(65533)
    yield "segments-300.jpg", jpeg[:2] + filler * 300 + jpeg[2:]
    yield "comments-20000.jpg", jpeg[:2] + (struct.pack(">HH", 0xFFFE, 3) + b"x") * 20_000 + jpeg[2:]
    yield "loop.tif", tiff({256: 3, 257: 3, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 3, 279: 9}, following=8)


def exif_that_claims() -> bytes:
    """A thousand tags that each claim the same 50 kB."""
    entries = b"".join(struct.pack("<HHII", 37500 + i, 7, 50_000, 8) for i in range(1000))
    return struct.pack("<2sHIH", b"II", 42, 8, 1000) + entries + bytes(4)


NAMES = (
    *("with space.png", " leading.png", "trailing .png", "tab\t.png", "new\nline.png", "carriage\rreturn.png"),
    *("\u00fcml\u00e4ut.png", "u\u0308nicode.png", "\u65e5\u672c.png", "\U0001f600.png", "\u202egnp.exe.png"),
    *(".hidden.png", "..twice.png", "...png", ".hidden/a.png", "..folder/a.png", "a..b/c..d.png", "-rf.png", "~.png"),
    *("100%.png", "%2e%2e%2fescape.png", "%s%n.png", "%00.png", "a?b#c&d=e.png", "*.png", "[x].png", "{1..3}.png"),
    *("$HOME.png", "`id`.png", "';drop table.png", "<b>.png", '"quoted".png', "a:b.png", "a|b.png", "s3:/b/k.png"),
    *("CON.png", "nul.png", "case.png", "CASE.png", "Case.PNG", "case/x.png", "CASE/x.png", "png", "x.", ".png"),
    *("n" * 251 + ".png", "/".join(["f" * 224] * 4) + ".png", "/".join(["d"] * 200) + ".png"),
    *("images/x.png", "report/x.parquet.png", "x.parquet", "x.part", ".0123456789abcdef.part", "run.json"),
)
FORBIDDEN = ("back\\slash.png", "..\\..\\escape.png", "caf\\xe9.png")
SAME_STEM = ("stem.png", "stem.jpg", "stem.JPG", "stem.tiff", "stem", "other/stem.png")
# What an object store may hold and no folder can
OBJECTS = ("../escape.png", "a/../../escape.png", "a//b.png", "./a.png", "a/./b.png", "b/..", "c/.")


def corpus(folder: Path) -> int:
    """Write everything below `folder`; how many files that are, links to files among them."""
    groups = {"pillow": written_by_pillow, "damaged": damaged, "huge": huge, "deep": deep_metadata}
    for group, files in groups.items():
        for name, data in files():
            place = folder / group / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    png = saved(smooth("RGB"), "PNG")
    names = [os.fsencode(name) for name in (*NAMES, *FORBIDDEN, *SAME_STEM)] + [b"caf\xe9.png", b"caf\xe9/a.png"]
    for name in names:
        path = os.path.join(os.fsencode(folder), b"names", name)  # noqa: PTH118 - a Path holds no bytes
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(png)
    links = folder / "links"
    links.mkdir()
    (links / "up").symlink_to(links)
    (links / "around").symlink_to(links / "about")
    (links / "about").symlink_to(links / "around")
    (links / "itself.png").symlink_to("itself.png")
    (links / "nowhere.png").symlink_to("nothing.png")
    (links / "outside.png").symlink_to(folder / "names" / "stem.png")
    (links / "endless.png").symlink_to("/dev/zero")
    (links / "folder.png").mkdir()
    os.mkfifo(links / "pipe.png")
    return sum(len(files) for _, _, files in os.walk(folder))


# The process that everything goes through


def work_of(job: RestoreJob, weights: str) -> Work:
    recipe = Restorer.load(weights, output=job.format if job.format == "same" else job.format.upper()).recipe
    return Work(job.source, None, job.output, (weights,), recipe, "stored", "cpu", MAX_PIXELS)


def through(job: RestoreJob, weights: str) -> list[dict[str, Any]]:
    """The rows of everything that the job selects."""
    work = work_of(job, weights)
    planned = plan(job, work.recipe.hash, "stored")
    rows: list[dict[str, Any]] = read_rows(Store(job.output)).to_pylist()  # what the plan decided
    restore = RestoreActor(work)
    for pairs in planned.tables():
        for start in range(0, len(pairs), 16):
            for table in fetch(pairs.slice(start, 16), work):
                rows += finish(restore(table), work).to_pylist()
    return rows


def main(source: str, output: str, weights: str, image_format: str) -> None:
    job = RestoreJob.model_validate({"source": source, "output": output, "include": ("*",), "format": image_format})
    with tempfile.TemporaryDirectory() as home:  # the largest image allowed takes what the plan says
        (Path(home) / "in").mkdir()
        (Path(home) / "in" / "x.png").write_bytes(saved(smooth("RGBA", (1000, 1000)), "PNG"))
        allowed = RestoreJob(source=f"{home}/in", output=f"{home}/out")
        assert [row["status"] for row in through(allowed, weights)] == ["restored"]
    before = peak_bytes()
    rows = through(job, weights)
    growth = peak_bytes() - before
    kept = [{name: row[name] for name in ("key", "status", "reason", "output")} for row in rows]
    print(json.dumps({"rows": kept, "growth": growth}))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = NetConfig(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,))
    return save_published(tmp_path_factory.mktemp("hostile") / "tiny.pth", random_network(tiny))


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("hostile") / "in"
    folder.mkdir()
    return folder, corpus(folder)


def check_rows(rows: list[dict[str, Any]], files: int) -> None:
    """One row for each, each with a known end and a reason, and no two with one output."""
    assert len(rows) == files
    assert [key for key, times in Counter(row["key"] for row in rows).items() if times > 1] == []
    assert {row["status"] for row in rows} <= set(Status) - {Status.CRASHED}
    assert [row["key"] for row in rows if row["status"] != "restored" and not row["reason"]] == []
    outputs = [row["output"] for row in rows if row["output"]]
    assert len(outputs) == len(set(outputs)) == sum(row["status"] in {"restored", "suspect"} for row in rows)


def written_below(folder: Path) -> set[str]:
    """Every file there, whatever its name, but the tables that a plan leaves."""
    found = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)  # noqa: PTH118
    return {name for name in found if not name.startswith((f"{folder}/out/manifest/", f"{folder}/out/report/"))}


@pytest.mark.filterwarnings("ignore:Tag data larger than file:UserWarning")  # Pillow's, of what it damaged itself
@pytest.mark.parametrize("image_format", ["same", "webp"])
def test_every_file_ends_as_one_row(
    tmp_path: Path, collection: tuple[Path, int], weights: Path, image_format: str
) -> None:
    source, files = collection
    output = tmp_path / "out"
    command = [sys.executable, __file__, str(source), str(output), str(weights), image_format]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    rows = result["rows"]
    check_rows(rows, files)
    made = written_below(tmp_path)
    assert made == {row["output"] for row in rows if row["output"]}  # nothing beside them, nothing half done
    assert all(name.startswith(f"{output}/images/") for name in made)
    for name in made:
        decode(Path(name).read_bytes())
    ends = {row["key"]: row["status"] for row in rows}
    assert [ends[readable(f"names/{name}")] for name in FORBIDDEN] == ["refused"] * len(FORBIDDEN)
    assert result["growth"] < MAX_GROWTH


def test_keys_that_only_an_object_store_can_hold(tmp_path: Path, weights: Path) -> None:
    memory, png = fsspec.filesystem("memory"), saved(smooth("RGB"), "PNG")
    keys = (*OBJECTS, *NAMES, *FORBIDDEN, "n" * 300 + ".png")
    for key in keys:  # as they are: its own door would tidy them
        memory.store[f"/hostile/{key}"] = fsspec.implementations.memory.MemoryFile(memory, f"/hostile/{key}", png)
    try:
        job = RestoreJob(source="memory://hostile", output=str(tmp_path / "out"), include=("*",))
        rows = through(job, str(weights))
    finally:
        memory.store.clear()
    check_rows(rows, len(keys))
    ends = {row["key"]: row["status"] for row in rows}
    refused = (*OBJECTS, *FORBIDDEN, "n" * 300 + ".png")
    assert ends == {**dict.fromkeys(NAMES, "restored"), **{readable(key): "refused" for key in refused}}
    assert written_below(tmp_path) == {str(tmp_path / "out" / "images" / name) for name in NAMES}


def test_names_on_an_object_store(tmp_path: Path, weights: Path, s3_url: str) -> None:
    store, png = Store(f"{s3_url}/hostile"), saved(smooth("RGB"), "PNG")
    keys = [name for name in (*NAMES, *SAME_STEM) if len(name) < 1000]
    for key in keys:
        store.write(key, png)
    job = RestoreJob(source=store.url(), output=f"{s3_url}/hostile-out", include=("*",), format="png")
    rows = through(job, str(weights))
    check_rows(rows, len(keys))
    images = {entry.key for entry in Store(f"{s3_url}/hostile-out/images").list()}
    assert images == {row["output"].removeprefix(f"{s3_url}/hostile-out/images/") for row in rows if row["output"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
