"""Small data sets in the formats in which GoPro, SIDD and REDS are distributed, so that every path runs anywhere.

The pictures are procedural (`nafnet.degrade.scene`) and the degradations simple: a camera's path for GoPro and REDS,
noise that grows with the signal for SIDD. The same arguments write the same data set. They are no substitute for the
real ones: what a network scores on them compares with nothing published.
"""

import io
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import scipy.io

from nafnet.degrade import scene
from nafnet.images import Picture, decode, encode
from pipelines.containers import block_key
from pipelines.datasets import DataName

Pixels = npt.NDArray[np.uint8]

LAYOUTS: dict[DataName, tuple[str, ...]] = {  # the first is the default
    "gopro": ("tree", "flat", "lmdb", "tar"),
    "sidd": ("mat", "benchmark", "lmdb"),
    "reds": ("tree", "lmdb"),
}
_MOST = {"gopro": 1111, "sidd": 40, "reds": 300}
_SIZE = (720, 1280)
_BLOCKS, _BLOCK_PX = 32, 256  # SIDD: blocks of a scene, and their side
_FRAMES = {"gopro": 101, "reds": 10}  # scored frames of a sequence
_EXPOSURES = 7  # sharp frames that a blurred one is the mean of
_REACH = 2  # px that the camera moves between them, at most
_SCENE_PX = 256
_SHARD = 100  # samples in a tar

# The other blur averages light: values to the power of 2.2. As tables, so that every machine rounds alike.
_TO_LIGHT = np.rint(65535 * (np.arange(256) / 255) ** 2.2).astype(np.uint32)
_FROM_LIGHT = np.rint(255 * (np.arange(65536) / 65535) ** (1 / 2.2)).astype(np.uint8)


def make(
    like: DataName,
    folder: Path,
    *,
    images: int,
    layout: str | None = None,
    size: tuple[int, int] = _SIZE,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a data set like `like` below `folder` and return the place that a benchmark takes.

    Args:
        like: which data set.
        folder: made if need be; nothing may be in it.
        images: scored images; for SIDD scenes, of 32 blocks each.
        layout: of `LAYOUTS[like]`; None for the first.
        size: height and width in px; SIDD's blocks are 256 px a side whatever it is.
        seed: another one gives other pictures.
        report: called with how many images are done, and of how many.

    Raises:
        FileExistsError: something is in the folder.
        ValueError: no such layout, or more images than the data set has; all that is wrong at once.
    """
    layout = layout or LAYOUTS[like][0]
    problems = []
    if layout not in LAYOUTS[like]:
        problems.append(f"{like} has no layout {layout!r}: there are {', '.join(LAYOUTS[like])}")
    if not 1 <= images <= _MOST[like]:
        problems.append(f"images must be 1 to {_MOST[like]}, as the real {like} has, got {images}")
    if min(size) < 32:
        problems.append(f"a side needs 32 px or more, got {size[1]}x{size[0]}")
    if problems:
        raise ValueError("; ".join(problems))
    folder.mkdir(parents=True, exist_ok=True)
    if there := sorted(path.name for path in folder.iterdir())[:5]:
        raise FileExistsError(f"{folder} is not empty ({', '.join(there)}): give another folder")
    writers = {"gopro": _make_gopro, "sidd": _make_sidd, "reds": _make_reds}
    writers[like](folder, images, layout, size, seed, report or _say_nothing)
    return folder


def _say_nothing(_done: int, _total: int) -> None:
    pass


# GoPro and REDS: a camera moves over a wall of scenes


def _make_gopro(
    folder: Path, images: int, layout: str, size: tuple[int, int], seed: int, report: Callable[[int, int], None]
) -> None:
    test = folder / "test"
    sequences = _sequences("gopro", images)
    names = [f"GOPR{384 + i // 3 * 12:04d}_11_{i % 3:02d}" for i in range(len(sequences))]
    write = partial(_gopro_sequence, test, layout, size, seed)
    _all(write, list(zip(range(len(sequences)), names, sequences, strict=True)), images, report)
    if layout == "lmdb":
        for name in ("input", "target"):
            _pack_lmdb(test / name, test / f"{name}.lmdb")
    if layout == "tar":
        _pack_shards(test, test / "gopro")


def _gopro_sequence(test: Path, layout: str, size: tuple[int, int], seed: int, sequence: tuple[int, str, int]) -> int:
    number, name, frames = sequence
    for i, (sharp, blur, gamma) in enumerate(_film(seed * 1000 + number, frames, size), start=1):
        files = {"blur": blur, "blur_gamma": gamma, "sharp": sharp}
        if layout == "tree":
            for kind, pixels in files.items():
                _write_png(test / name / kind / f"{i:06d}.png", pixels)
        else:
            for kind, place in (("blur", "input"), ("sharp", "target")):
                _write_png(test / place / f"{name}-{i:06d}.png", files[kind])
    return frames


def _make_reds(
    folder: Path, images: int, layout: str, size: tuple[int, int], seed: int, report: Callable[[int, int], None]
) -> None:
    val = folder / "val"
    sequences = _sequences("reds", images)
    _all(partial(_reds_sequence, val, layout, size, seed), list(enumerate(sequences)), images, report)
    if layout == "lmdb":
        for name, packed in (("val_blur_jpeg", "blur_300"), ("val_sharp", "sharp_300")):
            _pack_lmdb(val / name, val / f"{packed}.lmdb")


def _reds_sequence(val: Path, layout: str, size: tuple[int, int], seed: int, sequence: tuple[int, int]) -> int:
    number, frames = sequence
    # The scored frames 9, 19 and so on, and in the tree two more that do not count.
    numbers = [10 * i + 9 for i in range(frames)] + ([0, 1] if layout == "tree" else [])
    film = _film(seed * 1000 + 500 + number, len(numbers), size)
    for i, (sharp, blur, _) in zip(numbers, film, strict=True):
        name = f"{number:03d}/{i:08d}"
        jpeg = encode(Picture(blur, "JPEG"), quality=75, subsampling="4:2:0")
        place = val / "val_blur_jpeg" / f"{name}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(jpeg)
        _write_png(val / "val_sharp" / f"{name}.png", sharp)
    return frames


def _sequences(like: str, images: int) -> list[int]:
    """Scored frames of each sequence: at least two sequences, where there are two images."""
    most = min(_FRAMES[like], max(1, -(-images // 2)))
    return [min(most, images - start) for start in range(0, images, most)]


def _film(seed: int, frames: int, size: tuple[int, int]) -> Iterator[tuple[Pixels, Pixels, Pixels]]:
    """Sharp, blurred and otherwise blurred frames (H, W, 3)."""
    rng = np.random.default_rng([seed, 0xF11])
    height, width = size
    margin = _EXPOSURES * _REACH
    wall = _wall(seed, height + 2 * margin, width + 2 * margin)
    for _ in range(frames):
        path = rng.integers(-_REACH, _REACH, (_EXPOSURES, 2), endpoint=True).cumsum(axis=0)
        path -= path[_EXPOSURES // 2]
        views = [wall[margin + y :, margin + x :][:height, :width] for y, x in path.tolist()]
        half = _EXPOSURES // 2
        blur = (np.sum(views, axis=0, dtype=np.uint32) + half) // _EXPOSURES
        light = np.zeros((height, width, 3), np.uint32)
        for view in views:
            light += _TO_LIGHT[view]
        yield (
            np.ascontiguousarray(views[half]),
            np.asarray(blur, np.uint8),
            _FROM_LIGHT[(light + half) // _EXPOSURES],
        )
        wall = np.roll(wall, tuple(rng.integers(-9, 9, 2, endpoint=True).tolist()), (0, 1))


def _wall(seed: int, height: int, width: int) -> Pixels:
    """Scenes side by side."""
    side = min(_SCENE_PX, max(height, width))
    down, across = -(-height // side), -(-width // side)
    rows = [np.hstack([scene(seed * 100 + y * across + x, side) for x in range(across)]) for y in range(down)]
    return np.ascontiguousarray(np.vstack(rows)[:height, :width])


# SIDD: blocks with noise


def _make_sidd(
    folder: Path, images: int, layout: str, _size: tuple[int, int], seed: int, report: Callable[[int, int], None]
) -> None:
    shape = (images, _BLOCKS, _BLOCK_PX, _BLOCK_PX, 3)
    clean, noisy = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    for image in range(images):
        wall = _wall(seed * 1000 + 900 + image, 4 * _BLOCK_PX, 8 * _BLOCK_PX)
        blocks = wall.reshape(4, _BLOCK_PX, 8, _BLOCK_PX, 3).swapaxes(1, 2).reshape(shape[1:])
        rng = np.random.default_rng([seed, image, 0x51DD])
        noise = rng.standard_normal(blocks.shape) * np.sqrt(blocks * 0.8 + 20)  # shot noise above that of reading
        clean[image], noisy[image] = blocks, np.rint(blocks + noise).clip(0, 255)
        report(image + 1, images)
    if layout == "lmdb":
        for name, array in (("input_crops", noisy), ("gt_crops", clean)):
            _write_lmdb(
                folder / "val" / f"{name}.lmdb",
                ((block_key(i, j)[:-4], array[i, j]) for i in range(images) for j in range(_BLOCKS)),
            )
        return
    names = {"mat": ("ValidationNoisy", "ValidationGt"), "benchmark": ("BenchmarkNoisy",)}[layout]
    for name, array in zip(names, (noisy, clean), strict=False):
        stem = f"{name}BlocksSrgb"
        file = io.BytesIO()
        scipy.io.savemat(file, {stem: array}, do_compression=True)
        data = bytearray(file.getvalue())
        data[:116] = b"MATLAB 5.0 MAT-file, made".ljust(116)  # where scipy writes the time
        (folder / f"{stem}.mat").write_bytes(data)


# Files


def _all(write: Callable[[Any], int], items: list[Any], total: int, report: Callable[[int, int], None]) -> None:
    """Sequences on all cores."""
    done = 0
    if len(items) < 3:
        for item in items:
            report(done := done + write(item), total)
        return
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for count in pool.map(write, items):
            report(done := done + count, total)


def _write_png(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(Picture(pixels, "PNG")))


def _pack_lmdb(folder: Path, target: Path) -> None:
    """A folder of images as the authors' LMDB, and the folder gone."""

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = ("_".join(path.relative_to(folder).with_suffix("").parts) for path in paths)
    _write_lmdb(target, ((name, decode(path.read_bytes()).pixels) for name, path in zip(names, paths, strict=True)))
    shutil.rmtree(folder)


def _write_lmdb(folder: Path, images: Iterable[tuple[str, Pixels]]) -> None:
    """The authors' format: PNG bytes under names, which meta_info.txt lists with shape and compression level."""
    folder.mkdir(parents=True)
    lines = []
    with lmdb.open(str(folder), map_size=2**40, lock=False) as environment, environment.begin(write=True) as write:
        for name, pixels in images:
            write.put(name.encode(), encode(Picture(np.ascontiguousarray(pixels), "PNG")))
            height, width, channels = pixels.shape
            lines.append(f"{name}.png ({height},{width},{channels}) 1\n")
    (folder / "meta_info.txt").write_text("".join(lines))


def _pack_shards(test: Path, prefix: Path) -> None:
    """`input/` and `target/` as shards of a WebDataset, and the folders gone."""
    names = sorted(path.stem for path in (test / "input").iterdir())
    for shard, start in enumerate(range(0, len(names), _SHARD)):
        with tarfile.open(f"{prefix}-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for name in names[start : start + _SHARD]:
                for kind in ("input", "target"):
                    data = (test / kind / f"{name}.png").read_bytes()
                    member = tarfile.TarInfo(f"{name}.{kind}.png")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    for kind in ("input", "target"):
        shutil.rmtree(test / kind)
