"""The files that SIDD's benchmark server takes: CSV (`ID,BLOCK`, base64 of each raw block) or the older MATLAB array.

The place of block j of image i in them is i * 32 + j.
"""

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.io

from nafnet.images import decode
from pipelines.containers import block_key
from pipelines.storage import StorageError, Store

_BLOCKS = 32  # of an image
_NAMES = {"csv": "SubmitSrgb.csv", "mat": "SubmitSrgb.mat"}

Pixels = npt.NDArray[np.uint8]


def write_submission(run: str, form: Literal["csv", "mat"]) -> tuple[str, int]:
    """Write the restored blocks below `run`/images as one file beside them, and read that back.

    Returns its URL and how many blocks it holds. Memory holds the file, of the MATLAB form the array and a copy too.

    Raises:
        StorageError: a block is missing, is not 8-bit RGB of its size, or reads back otherwise.
    """
    images, store = Store(f"{run}/images"), Store(run)
    keys = [entry.key for entry in images.list()]
    count = -(-len(keys) // _BLOCKS)
    wanted = [block_key(i, j) for i in range(count) for j in range(_BLOCKS)]
    if not keys or keys != wanted:
        gone = sorted(set(wanted) - set(keys))[:3]
        raise StorageError(
            f"{images.url()} does not hold whole images of {_BLOCKS} blocks, 0000_00.png and on: "
            + (f"{', '.join(gone)} missing" if gone else f"{len(keys)} files")
        )
    blocks = _Decoded(images, keys)
    place = _NAMES[form]
    store.write(place, _csv(blocks) if form == "csv" else _mat(blocks))
    again = _read_csv(store, place) if form == "csv" else _read_mat(store, place)
    if [_digest(block) for block in again] != blocks.digests:
        raise StorageError(f"{store.url(place)} reads back otherwise than it was written")
    return store.url(place), len(keys)


class _Decoded:
    """The blocks in order, decoded one by one; `digests` are of those that went by."""

    def __init__(self, images: Store, keys: Sequence[str]) -> None:
        self._images, self._keys = images, keys
        self.digests: list[bytes] = []
        self.shape = decode(images.read(keys[0])).pixels.shape

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Pixels]:
        for key in self._keys:
            block = decode(self._images.read(key)).pixels
            if block.dtype != np.uint8 or block.shape != self.shape or block.shape[2] != 3:
                raise StorageError(f"the blocks in {self._images.url()} are not all 8-bit RGB and of one size: {key}")
            self.digests.append(_digest(block))
            yield block


def _digest(block: Pixels | bytes) -> bytes:
    return hashlib.sha256(block if isinstance(block, bytes) else block.tobytes()).digest()


def _csv(blocks: _Decoded) -> bytes:
    file = io.BytesIO()
    file.write(b"ID,BLOCK\n")
    for number, block in enumerate(blocks):
        file.write(b"%d,%b\n" % (number, base64.b64encode(block.tobytes())))
    return file.getvalue()


def _read_csv(store: Store, place: str) -> Iterator[bytes]:
    with store.open(place) as file:
        file.readline()
        for expected, line in enumerate(file):
            number, _, block = line.partition(b",")
            if int(number) != expected:
                raise StorageError(f"the IDs in {store.url(place)} do not count from 0: {expected} is {int(number)}")
            yield base64.b64decode(block)


def _mat(blocks: _Decoded) -> bytes:
    array: Pixels = np.empty((len(blocks), *blocks.shape), np.uint8)
    for number, block in enumerate(blocks):
        array[number] = block
    file = io.BytesIO()
    whole = array.reshape(-1, _BLOCKS, *blocks.shape)
    scipy.io.savemat(file, {"DenoisedBlocksSrgb": whole}, do_compression=True)
    return file.getvalue()


def _read_mat(store: Store, place: str) -> Iterator[Pixels]:
    with store.open(place) as file:
        array: Pixels = scipy.io.loadmat(file)["DenoisedBlocksSrgb"]
    for image in array:
        yield from image
