"""Block arrays in MATLAB v5 files, expanded without ever holding them in memory.

MATLAB stores the first index fastest: the pixels of one block lie all over the file. So the array is read once from
front to back, a few columns of all blocks at a time, and written in the other order, from which a block is one read.
The format is that of MathWorks' "MAT-File Format", chapter 1.
"""

import mmap
import struct
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipelines.storage import StorageError

_COMPRESSED, _MATRIX, _UINT8 = 15, 14, 2
_UINT8_CLASS = 9
_READ_BYTES = 2**20
_SLAB_BYTES = 2**24  # of columns of all blocks, held at once


class Blocks:
    """An expanded array: `blocks[image, block]` is (height, width, 3) uint8."""

    def __init__(self, path: Path) -> None:
        self._array: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")

    @property
    def shape(self) -> tuple[int, ...]:
        """(images, blocks, height, width, 3)."""
        return self._array.shape

    @property
    def bytes(self) -> int:
        """Of one block."""
        return int(np.prod(self.shape[2:]))

    def __getitem__(self, at: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """A copy. Raises FileNotFoundError outside the array."""
        if not all(0 <= index < size for index, size in zip(at, self.shape[:2], strict=True)):
            raise FileNotFoundError(f"no block {at} among {self.shape[:2]}")
        return np.array(self._array[at])


def expand(file: IO[bytes], target: Path, name: str) -> None:
    """Write the five-dimensional uint8 array of a MATLAB file to `target` as .npy, in C order.

    Raises:
        StorageError: it is no MATLAB v5 file, holds no such array, or is cut short; `name` is what it is called.
    """
    try:
        stream, shape = _find_array(file)
    except (struct.error, zlib.error, ValueError) as error:
        raise StorageError(
            f"{name}: {error or 'cut short'}: expected a MATLAB v5 file as SIDD distributes it"
        ) from error
    images, blocks, height, width, channels = shape
    out = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
    column = images * blocks * height
    step = max(1, _SLAB_BYTES // column)
    try:
        for channel in range(channels):
            for left in range(0, width, step):
                count = min(step, width - left)
                _write_slab(out, stream.take(column * count), left, channel)
    except (struct.error, zlib.error, ValueError) as error:
        target.unlink()
        raise StorageError(f"{name} is cut short or damaged: fetch it again") from error
    out.flush()


def _write_slab(out: "np.memmap[Any, np.dtype[np.uint8]]", data: bytes, left: int, channel: int) -> None:
    """Write columns of all blocks, from column `left` on, a few images at a time.

    A slab touches every page of the file, so pages are let go of within it: the file keeps what was written to them.
    """
    images, blocks, height, width, channels = out.shape
    slab = np.frombuffer(data, np.uint8).reshape((images, blocks, height, -1), order="F")
    mapped: mmap.mmap = out._mmap  # type: ignore[attr-defined]
    step = max(1, _SLAB_BYTES // (blocks * height * width * channels))
    for first in range(0, images, step):
        some = slice(first, first + step)
        out[some, :, :, left : left + slab.shape[3], channel] = slab[some]
        mapped.madvise(mmap.MADV_DONTNEED)


class _Stream:
    """Bytes of a file, or of the zlib stream in it."""

    def __init__(self, file: IO[bytes], *, compressed: bool) -> None:
        self._file = file
        self._inflate = zlib.decompressobj() if compressed else None
        self._ready = b""

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises ValueError where there are fewer."""
        if self._inflate is None:
            data = self._file.read(count)
        else:
            pieces, missing = [self._ready[:count]], count - len(self._ready)
            self._ready = self._ready[count:]
            while missing > 0:
                packed = self._inflate.unconsumed_tail or self._file.read(_READ_BYTES)
                if not packed:
                    break
                piece = self._inflate.decompress(packed, min(missing, _READ_BYTES))  # zlib holds it twice
                pieces.append(piece)
                missing -= len(piece)
            data = b"".join(pieces)
        if len(data) < count:
            raise ValueError("cut short")
        return data

    def element(self) -> tuple[int, int, bytes | None]:
        """Kind and size of the next element, and its content if it is small enough to stand in the tag."""
        tag = self.take(8)
        kind, size = struct.unpack("<II", tag)
        if kind >> 16:
            return kind & 0xFFFF, kind >> 16, tag[4 : 4 + (kind >> 16)]
        return kind, size, None

    def content(self) -> bytes:
        """That of the next element, which is small."""
        _, size, inside = self.element()
        if inside is not None:
            return inside
        if size > 2**16:
            raise ValueError("not a plain array")
        return self.take(size + -size % 8)[:size]


def _find_array(file: IO[bytes]) -> tuple[_Stream, tuple[Any, ...]]:
    """The stream at the first value of the file's first five-dimensional uint8 array, and the array's shape."""
    header = file.read(128)
    if header[:8] == b"\x89HDF\r\n\x1a\n" or b"MATLAB 7.3" in header:
        raise ValueError("a MATLAB v7.3 (HDF5) file: save it as v7 or earlier")
    if len(header) < 128 or header[126:] != b"IM":
        raise ValueError("not a MATLAB v5 file of this byte order")
    while tag := file.read(8):
        kind, size = struct.unpack("<II", tag)
        after = file.tell() + size
        stream = _Stream(file, compressed=kind == _COMPRESSED)
        if kind == _COMPRESSED:
            kind, _, _ = stream.element()
        if kind == _MATRIX:
            flags = stream.content()
            shape = np.frombuffer(stream.content(), "<i4")
            stream.content()  # its name
            if flags[0] == _UINT8_CLASS and len(shape) == 5 and shape[4] == 3:
                kind, count, _ = stream.element()
                if kind != _UINT8 or count != int(np.prod(shape, dtype=np.int64)):
                    raise ValueError("its values are not stored as bytes")
                return stream, tuple(int(side) for side in shape)
        file.seek(after)
    raise ValueError("no uint8 array of (images, blocks, height, width, 3)")
