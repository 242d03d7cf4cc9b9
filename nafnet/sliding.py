"""Means over a window that slides over an image: what TLC asks for at every pixel, in one pass on the CPU.

A running sum takes one addition and one subtraction a pixel, but each step waits for the one before. With the channels
side by side there are as many sums to run as channels, and a compiled loop does a vector of them at a time. Written as
operations on whole maps the same takes a dozen passes over memory, which cost more than the arithmetic.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

_Numbers = npt.NDArray[Any]  # float32 as it is, bfloat16 as uint16, float16 as int16
_Sums = npt.NDArray[np.float64]  # running for as long as the image is: in float32 they would gather rounding errors
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def sliding_means(x: Tensor, side: int, rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """`nafnet.tlc.LocalAvgPool2d` of (H, W, C), a few rows at a time, without a map of all means.

    Yields (top, bottom, means) from the first row of the image to the last: float32 means (bottom - top, m, C), or
    (1, m, C) where all these rows share them, m = max(W - side, 0) + 1. At most `rows` rows are not shared. What is
    yielded is good until the next is asked for.
    """
    height, width, channels = x.shape
    tall, wide = min(side, height), min(side, width)
    count, m = height - tall + 1, width - wide + 1
    before = (height - count) // 2
    if count == m == 1:
        yield 0, height, mean(x)[None, None]
        return
    share = 1 / (tall * wide)
    numbers = _numbers(x)
    means = np.empty((min(rows, count), m, channels), np.float32)
    columns = _sums_of_columns(numbers[: tall - 1])
    # The window comes down to the first row from above the image: from zeros.
    _slide(numbers[tall - 1 : tall], np.zeros_like(numbers[:1]), columns, wide, share, means[:1])
    yield 0, before + 1 if count > 1 else height, torch.from_numpy(means[:1])
    for start in range(1, count, rows):
        stop = min(start + rows, count)
        enters, leaves = numbers[start + tall - 1 : stop + tall - 1], numbers[start - 1 : stop - 1]
        _slide(enters, leaves, columns, wide, share, means[: stop - start])
        yield before + start, before + stop, torch.from_numpy(means[: stop - start])
    if 1 < count < height:
        yield before + count, height, torch.from_numpy(means[stop - start - 1 : stop - start])


def mean(x: Tensor) -> Tensor:
    """Of each channel of (H, W, C), in float32."""
    return (torch.from_numpy(_sums_of_columns(_numbers(x))).mean(0) / len(x)).float()


def _numbers(x: Tensor) -> _Numbers:
    bits = _BITS.get(x.dtype)
    return (x if bits is None else x.view(bits)).numpy()


def _sums_of_columns(x: _Numbers) -> _Sums:
    """(h, W, C) to (W, C)."""
    columns = np.zeros(x.shape[1:], np.float64)
    _add_rows(x, columns)
    return columns


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled when first called, and kept on disk: beside this file, else in the user's cache (NUMBA_CACHE_DIR)."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to write to: each process compiles for itself, about a second
        return njit(nogil=True)(function)


def _float32(number: Any) -> Any:
    """One of `_Numbers`, in a compiled loop: a name for what `_to_float32` puts there."""
    raise NotImplementedError  # outside a compiled loop a number does not tell which of the three it is


@overload(_float32)
def _to_float32(number):  # type: ignore[no-untyped-def] # numba compares these signatures
    if isinstance(number, types.Float):
        return lambda number: number
    if number == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda number: np.uint32(np.uint32(number) << 16).view(np.float32)

    # float16: its sign, exponent (biased by 15) and fraction are put in their places in a float32 (biased by 127).
    # Infinity becomes 65536: what is infinite in x shows wherever x itself is used.
    factor = np.float32(2.0 ** (127 - 15))
    return lambda number: np.uint32((number & 0x8000) << 16 | (number & 0x7FFF) << 13).view(np.float32) * factor


@_compiled
def _add_rows(x: _Numbers, columns: _Sums) -> None:
    """Add (h, W, C) to (W, C)."""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            pixel, column = x[row, i], columns[i]
            for c in range(x.shape[2]):
                column[c] += _float32(pixel[c])


@_compiled
def _slide(
    enters: _Numbers, leaves: _Numbers, columns: _Sums, side: int, share: float, means: npt.NDArray[np.float32]
) -> None:
    """Move the window down by a row for each row of `means` (h, m, C): `share` times the sums over the window.

    `columns` (W, C) holds each column's sum over the window's rows. A step adds a row of `enters` (h, W, C) to it and
    takes one of `leaves` away.
    """
    _, width, channels = enters.shape
    sums = np.empty(channels)
    for row in range(enters.shape[0]):
        sums[:] = 0
        for i in range(width):
            new, old, column = enters[row, i], leaves[row, i], columns[i]
            for c in range(channels):
                column[c] = column[c] + _float32(new[c]) - _float32(old[c])
            first = i - side + 1
            if first < 0:
                for c in range(channels):
                    sums[c] += column[c]
            else:
                behind, result = columns[first], means[row, first]
                for c in range(channels):
                    total = sums[c] + column[c]
                    result[c] = total * share
                    sums[c] = total - behind[c]
