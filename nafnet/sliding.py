"""Means over a window that slides over an image, as TLC asks for at every pixel, and products with them, on the CPU.

A running sum takes one addition and one subtraction a pixel, but each step waits for the one before. With the channels
side by side there are as many sums to run as channels, and a compiled loop does a vector of them at a time. Written as
operations on whole maps the same takes a dozen passes over memory, which cost more than the arithmetic.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import carray
from torch import Tensor

from nafnet.halves import as_float32, numbers_of, put
from nafnet.team import SIZES, Loop, take, threads

# Sums run for as long as the image is, so they are kept with more than twice the digits of what is summed: the rounding
# errors that gather in them stay far below the last digit of the largest numbers that they have held.
_SUMS: dict[Any, Any] = {
    np.dtype(np.float32): np.dtype(np.float64),
    np.dtype(np.uint16): np.dtype(np.float32),
    np.dtype(np.int16): np.dtype(np.float32),
}


class SlidingMeans:
    """`nafnet.tlc.LocalAvgPool2d` of (H, W, C) in memory order, a few rows after another, without a map of all means.

    Where x is not finite, neither are the means of windows that hold it, nor of some that come after.

    Attributes:
        count: rows of windows, max(H - side, 0) + 1.
        columns: windows in a row, max(W - side, 0) + 1.
        before: rows of the image above the middle of the first window, whose means they share.
    """

    def __init__(self, x: Tensor, side: int, rows: int) -> None:
        """At most `rows` rows of windows will be asked for at once."""
        height, width, channels = x.shape
        self._x, self._tall, wide = x, min(side, height), min(side, width)
        self.count, self.columns = height - self._tall + 1, width - wide + 1
        self.before = (height - self.count) // 2
        self._done = 0
        self._means = x.new_empty(rows, self.columns, channels)
        self._share = np.array([1 / (self._tall * wide)])
        sums = _sums_of_columns(x[: self._tall])
        # Each part has the columns of its windows to itself, wide - 1 of which it shares with the next: adding them up
        # twice takes less than memory that two cores write to and that goes to and fro between them.
        self._parts = threads(self.columns)
        most = -(-self.columns // self._parts) + wide - 1
        self._sums = np.empty((self._parts, most, channels), sums.dtype)
        for part in range(self._parts):
            first, last = (k * self.columns // self._parts for k in (part, part + 1))
            self._sums[part, : last - first + wide - 1] = sums[first : last + wide - 1]

    def next_rows(self, rows: int) -> Tensor:
        """Means (rows, columns, C) in x's dtype, good until the next are asked for."""
        if not 0 < rows <= min(len(self._means), self.count - self._done):
            raise ValueError(
                f"{rows} rows of means asked for: there are {self.count - self._done}, given out in "
                f"{len(self._means)} at most"
            )
        start, stop = self._done, self._done + rows
        if start == 0:  # the window is where the first row wants it: what enters and what leaves are the same
            self._move(self._x[:1], self._x[:1], self._means[:1])
            start = 1
        if start < stop:
            enters, leaves = self._x[start + self._tall - 1 : stop + self._tall - 1], self._x[start - 1 : stop - 1]
            self._move(enters, leaves, self._means[start - self._done : rows])
        self._done = stop
        return self._means[:rows]

    def _move(self, enters: Tensor, leaves: Tensor, means: Tensor) -> None:
        new, old = numbers_of(enters), numbers_of(leaves)
        sizes = self._parts, *new.shape, self.columns, self._sums.shape[1]
        _slide(new.dtype)(sizes, new, old, self._sums, self._share, numbers_of(means))


def mean(x: Tensor) -> Tensor:
    """Of each channel of (H, W, C), in float32."""
    height, width, _ = x.shape
    return torch.from_numpy(_sums_of_columns(x).sum(0, dtype=np.float64) / (height * width)).float()


def times(y: Tensor, scale: Tensor, shift: int, out: Tensor) -> Tensor:
    """y (h, w, C) times scale (n, m, C), spread over it as `nafnet.model.spread` says, into out (h, w, C).

    Row i has scale i + `shift`, or the first or the last. All are of one dtype, m at most w.
    """
    if out.shape != y.shape or not 0 < scale.shape[1] <= y.shape[1] or scale.shape[2] != y.shape[2] or not len(scale):
        raise ValueError(f"{tuple(y.shape)} cannot be scaled by {tuple(scale.shape)} into {tuple(out.shape)}")
    if not y.dtype == scale.dtype == out.dtype:
        raise ValueError(f"one dtype needed, got {y.dtype}, {scale.dtype} and {out.dtype}")
    height, width, channels = y.shape
    numbers = numbers_of(y)
    sizes = threads(height), height, width, channels, *scale.shape[:2], shift
    _multiply(numbers.dtype)(sizes, numbers, numbers_of(scale), numbers_of(out))
    return out


def _sums_of_columns(x: Tensor) -> npt.NDArray[Any]:
    """(h, W, C) to (W, C)."""
    numbers = numbers_of(x)
    sums: npt.NDArray[Any] = np.zeros(numbers.shape[1:], _SUMS[numbers.dtype])
    _add_rows(numbers.dtype)((threads(len(sums)), len(numbers), sums.size), numbers, sums)
    return sums


@cache
def _add_rows(number: np.dtype[Any]) -> Loop:
    """Adds the rows of (h, n) to sums (n,)."""
    of_sums = _SUMS[number]
    wide = of_sums.type

    def loop(call: Any) -> None:
        sizes = carray(call[1], (SIZES,), np.int64)
        parts, height, size = sizes[0], sizes[1], sizes[2]
        x = carray(call[2], (height, size), number)
        sums = carray(call[3], (size,), of_sums)
        while True:
            part = take(call[0])
            if part >= parts:
                break
            start, stop = part * size // parts, (part + 1) * size // parts
            mine = sums[start:stop]
            fours = height - height % 4
            for row in range(0, fours, 4):  # four at once: the sums come from further than the numbers
                a, b = x[row, start:stop], x[row + 1, start:stop]
                c, d = x[row + 2, start:stop], x[row + 3, start:stop]
                for i in range(stop - start):
                    two = wide(as_float32(a[i])) + wide(as_float32(b[i]))
                    mine[i] += two + (wide(as_float32(c[i])) + wide(as_float32(d[i])))
            for row in range(fours, height):
                a = x[row, start:stop]
                for i in range(stop - start):
                    mine[i] += wide(as_float32(a[i]))

    return Loop(loop)


@cache
def _slide(number: np.dtype[Any]) -> Loop:
    """Moves the window down by a row for each row of means (h, m, C): `share` times the sums over the window.

    A part goes along some of the windows in a row. Its sums are those over the window's rows, of each column that these
    windows reach. A step adds a row of enters (h, W, C) to them and takes one of leaves away.
    """
    of_sums = _SUMS[number]
    wide = of_sums.type

    def loop(call: Any) -> None:
        sizes = carray(call[1], (SIZES,), np.int64)
        parts, height, width, channels, m, most = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
        enters = carray(call[2], (height, width, channels), number)
        leaves = carray(call[3], (height, width, channels), number)
        of_parts = carray(call[4], (parts, most, channels), of_sums)
        share = wide(carray(call[5], (1,), np.float64)[0])
        means = carray(call[6], (height, m, channels), number)
        side = width - m + 1
        window = np.empty(channels, of_sums)  # its own memory, no other array's, which helps the compiler
        while True:
            part = take(call[0])
            if part >= parts:
                break
            start, stop = part * m // parts, (part + 1) * m // parts
            columns = of_parts[part]
            for row in range(height):
                window[:] = 0
                for i in range(start, stop + side - 1):
                    new, old, column = enters[row, i], leaves[row, i], columns[i - start]
                    for c in range(channels):  # not in one with the next: over so many arrays it is not vectorized
                        column[c] += wide(as_float32(new[c])) - wide(as_float32(old[c]))
                    first = i - side + 1
                    if first < start:
                        for c in range(channels):
                            window[c] += column[c]
                    else:
                        behind, result = columns[first - start], means[row, first]
                        for c in range(channels):
                            total = window[c] + column[c]
                            put(result, c, total * share)
                            window[c] = total - behind[c]

    return Loop(loop)


@cache
def _multiply(number: np.dtype[Any]) -> Loop:
    """Does what `times` says."""

    def loop(call: Any) -> None:
        sizes = carray(call[1], (SIZES,), np.int64)
        parts, height, width, channels = sizes[0], sizes[1], sizes[2], sizes[3]
        rows, m, shift = sizes[4], sizes[5], sizes[6]
        y = carray(call[2], (height, width, channels), number)
        scale = carray(call[3], (rows, m * channels), number)
        out = carray(call[4], (height, width, channels), number)
        left = (width - m) // 2
        while True:
            part = take(call[0])
            if part >= parts:
                break
            for row in range(part * height // parts, (part + 1) * height // parts):
                of_row = scale[min(max(row + shift, 0), rows - 1)]
                for i in range(left):
                    a, b = y[row, i], out[row, i]
                    for c in range(channels):
                        put(b, c, as_float32(a[c]) * as_float32(of_row[c]))
                a, b = y[row, left : left + m].reshape(m * channels), out[row, left : left + m].reshape(m * channels)
                for c in range(m * channels):
                    put(b, c, as_float32(a[c]) * as_float32(of_row[c]))
                last = of_row[(m - 1) * channels :]
                for i in range(left + m, width):
                    a, b = y[row, i], out[row, i]
                    for c in range(channels):
                        put(b, c, as_float32(a[c]) * as_float32(last[c]))

    return Loop(loop)
