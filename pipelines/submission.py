"""The files that SIDD's benchmark server takes: CSV (`ID,BLOCK`, base64 of each raw block) or the older MATLAB array.

The place of block j of image i in them is i * 32 + j.
"""

import base64
import csv
import io
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

    Returns its URL and how many blocks it holds.

    Raises:
        StorageError: a block is missing, is not 8-bit RGB of its size, or reads back otherwise.
    """
    images, store = Store(f"{run}/images"), Store(run)
    keys = [entry.key for entry in images.list()]
    count = -(-len(keys) // _BLOCKS)
    wanted = [block_key(i, j) for i in range(count) for j in range(_BLOCKS)]
    if keys != wanted:
        gone = sorted(set(wanted) - set(keys))[:3]
        raise StorageError(
            f"{images.url()} does not hold whole images of {_BLOCKS} blocks, 0000_00.png and on: "
            + (f"{', '.join(gone)} missing" if gone else f"{len(keys)} files")
        )
    blocks = [decode(images.read(key)).pixels for key in keys]
    if {(block.shape, block.dtype.name) for block in blocks} != {(blocks[0].shape, "uint8")} or blocks[0].ndim != 3:
        raise StorageError(f"the blocks in {images.url()} are not all 8-bit and of one size")
    array: Pixels = np.stack(blocks).reshape(count, _BLOCKS, *blocks[0].shape)
    place = _NAMES[form]
    store.write(place, _csv(array) if form == "csv" else _mat(array))
    again = (_read_csv if form == "csv" else _read_mat)(store.read(place), array.shape)
    if not np.array_equal(again, array):
        raise StorageError(f"{store.url(place)} reads back otherwise than it was written")
    return store.url(place), len(blocks)


def _csv(array: Pixels) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("ID", "BLOCK"))
    for number, block in enumerate(array.reshape(-1, *array.shape[2:])):
        writer.writerow((number, base64.b64encode(block.tobytes()).decode()))
    return file.getvalue().encode()


def _read_csv(data: bytes, shape: tuple[int, ...]) -> Pixels:
    lines = data.decode().splitlines()[1:]  # the csv module stops at fields of 128 KiB
    numbers, blocks = zip(*(line.split(",") for line in lines), strict=True)
    if [int(number) for number in numbers] != list(range(len(lines))):
        raise StorageError("the IDs do not count from 0")
    return np.stack([np.frombuffer(base64.b64decode(block), np.uint8) for block in blocks]).reshape(shape)


def _mat(array: Pixels) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, {"DenoisedBlocksSrgb": array}, do_compression=True)
    return file.getvalue()


def _read_mat(data: bytes, shape: tuple[int, ...]) -> Pixels:
    return np.asarray(scipy.io.loadmat(io.BytesIO(data))["DenoisedBlocksSrgb"], np.uint8).reshape(shape)
