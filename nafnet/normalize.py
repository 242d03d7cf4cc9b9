"""The layer norm of each pixel, without scale and shift, on the CPU.

torch's takes about twice as long in bf16, and four times in float32, where it has no fast way without a scale.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from nafnet.halves import as_float32, numbers_of, put
from nafnet.team import SIZES, Loop, take, threads


def normalize(x: Tensor) -> Tensor:
    """(H, W, C) less each pixel's mean, over its standard deviation, as `nafnet.model.LayerNorm2d`; in float32 between.

    Where x is not finite, the pixel is not.
    """
    height, width, channels = x.shape
    pixels = height * width
    out = torch.empty_like(x)
    numbers = numbers_of(x)
    _normalize(numbers.dtype)((threads(pixels), pixels, channels), numbers, numbers_of(out))
    return out


@cache
def _normalize(number: np.dtype[Any]) -> Loop:
    def loop(call: Any) -> None:
        sizes = carray(call[1], (SIZES,), np.int64)
        parts, pixels, channels = sizes[0], sizes[1], sizes[2]
        x = carray(call[2], (pixels, channels), number)
        out = carray(call[3], (pixels, channels), number)
        share, epsilon, one = np.float32(1 / channels), np.float32(1e-6), np.float32(1)
        apart = np.empty(channels, np.float32)
        while True:
            part = take(call[0])
            if part >= parts:
                break
            for pixel in range(part * pixels // parts, (part + 1) * pixels // parts):
                a, b = x[pixel], out[pixel]
                total = np.float32(0)
                for c in range(channels):
                    total += as_float32(a[c])
                mean = total * share
                square = np.float32(0)
                for c in range(channels):
                    apart[c] = as_float32(a[c]) - mean
                    square += apart[c] * apart[c]
                # a root of an inverse: the compiler would turn products with the inverse of a root into quotients
                factor = np.sqrt(one / (square * share + epsilon))
                for c in range(channels):
                    put(b, c, apart[c] * factor)

    return Loop(loop, any_order=True)
