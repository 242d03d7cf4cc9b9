"""Numbers of 16 bits in compiled loops: neither numpy nor Numba has both kinds, so their bits are passed."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def numbers_of(x: Tensor) -> npt.NDArray[Any]:
    """Of a float32, bfloat16 or float16 tensor, in the same memory."""
    bits = _BITS.get(x.dtype)
    return (x if bits is None else x.view(bits)).numpy()


def as_float32(number: Any) -> Any:
    """What `numbers_of` gave, in a compiled loop: a name for what `_to_float32` puts there."""
    raise NotImplementedError  # outside a compiled loop a number does not tell which of the three it is


@overload(as_float32)
def _to_float32(number):  # type: ignore[no-untyped-def] # numba compares these signatures
    if isinstance(number, types.Float):
        return lambda number: number
    if number == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda number: np.uint32(np.uint32(number) << 16).view(np.float32)
    factor = np.float32(2.0**112)

    def of_half(number):  # type: ignore[no-untyped-def]
        # Sign, exponent (biased by 15) and fraction of a float16 are put in their places in a float32 (biased by 127).
        bits = np.uint32(np.uint16(number))
        placed = np.uint32((bits & np.uint32(0x8000)) << 16 | (bits & np.uint32(0x7FFF)) << 13)
        finite = placed.view(np.float32) * factor
        endless = np.uint32(placed | np.uint32(0x7F800000)).view(np.float32)
        return endless if bits & np.uint32(0x7C00) == np.uint32(0x7C00) else finite

    return of_half


def put(out: Any, i: int, value: Any) -> None:
    """out[i] = value rounded half to even, in a compiled loop: a name for what `_rounded` puts there."""
    raise NotImplementedError  # outside a compiled loop an array of bits does not tell which of the three it holds


@overload(put)
def _rounded(out, i, value):  # type: ignore[no-untyped-def] # noqa: ARG001 - numba compares these signatures
    if isinstance(out.dtype, types.Float):

        def as_it_is(out, i, value):  # type: ignore[no-untyped-def]
            out[i] = value

        return as_it_is
    if out.dtype == types.uint16:

        def to_bfloat16(out, i, value):  # type: ignore[no-untyped-def]
            # NaN stays NaN: what computations make, and what is read of a bfloat16, has zeros in its lower half.
            bits = np.float32(value).view(np.uint32)
            out[i] = np.uint16((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))

        return to_bfloat16
    factor = np.float32(2.0**-112)

    def to_half(out, i, value):  # type: ignore[no-untyped-def]
        bits = np.float32(value).view(np.uint32)
        size = np.uint32(bits & np.uint32(0x7FFFFFFF))
        placed = np.float32(size.view(np.float32) * factor).view(np.uint32)
        half = np.uint32((placed + np.uint32(0xFFF) + (placed >> np.uint32(13) & np.uint32(1))) >> np.uint32(13))
        half = min(half, np.uint32(0x7C00))  # infinity
        half = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else half  # NaN
        out[i] = np.int16(np.uint16(half | (bits >> np.uint32(16) & np.uint32(0x8000))))

    return to_half
