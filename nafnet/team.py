"""Compiled loops whose parts are shared out among the threads that torch computes with.

torch's OpenMP threads wait for their next work by spinning, so threads of somebody else on the same cores would stand
in their way. A loop is started here as compilers start a parallel region, in the runtime that torch has loaded:
through `GOMP_parallel`, which those of GCC, LLVM and Intel have. Where torch has none, a loop runs in one thread.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

_CALL = types.void(types.CPointer(types.voidptr))
# Loops compiled before stay on disk with this number and `take` in them: after a change here, touch their files too.
SIZES = 8  # whole numbers that a loop has room for


def threads(most: int) -> int:
    """Parts worth making of something that has `most` of them: no more than torch has threads now."""
    return min(torch.get_num_threads(), most) if _parallel else 1


class Loop:
    """A compiled loop: compiled when made, and kept on disk, beside its file or in the user's cache (NUMBA_CACHE_DIR).

    `function(call)` finds its whole numbers, the number of parts first, as `carray(call[1], (SIZES,), np.int64)`, and
    its arrays at call[2], call[3] and so on. It does part `take(call[0])` until that is the number of parts. Nobody
    hears of an exception in it: whatever can be wrong is checked before. With `any_order` sums of floats are added up
    in whatever order is fast, with no rounding of products in them, the same each time.
    """

    def __init__(self, function: Callable[[Any], None], *, any_order: bool = False) -> None:
        liberties = {"reassoc", "contract"} if any_order else set[str]()
        try:
            self._compiled = cfunc(_CALL, cache=True, fastmath=liberties)(function)
        except RuntimeError:  # nowhere to write to: each process compiles for itself, about a second
            self._compiled = cfunc(_CALL, fastmath=liberties)(function)

    def __call__(self, sizes: tuple[int, ...], *arrays: npt.NDArray[Any]) -> None:
        """Run it to its end. `sizes` starts with the number of parts; arrays that are not C-contiguous are refused."""
        if not all(array.flags.c_contiguous for array in arrays):
            raise ValueError("a compiled loop takes arrays whose numbers lie side by side")
        taken = ctypes.c_int64(0)
        numbers = (ctypes.c_int64 * SIZES)(*sizes)
        addresses = ctypes.addressof(taken), ctypes.addressof(numbers), *(array.ctypes.data for array in arrays)
        call = (ctypes.c_void_p * len(addresses))(*addresses)
        if sizes[0] > 1 and _parallel:
            # As many threads as torch has, even for fewer parts: GCC's runtime ends those that one region can spare
            # and starts them anew for the next (pytorch issue 32008).
            _parallel(self._compiled.address, call, torch.get_num_threads(), 0)
        else:
            self._compiled.ctypes(ctypes.cast(call, ctypes.POINTER(ctypes.c_void_p)))


@intrinsic  # type: ignore[untyped-decorator]
def take(typing: Any, counter: Any) -> Any:  # noqa: ARG001 - numba's signature
    """In a compiled loop: the next part that no thread has taken. Parts go on without end."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001 - numba's signature
        number = ir.IntType(64)
        place = builder.bitcast(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(number, 1), "seq_cst")

    return types.int64(counter), code


def _find() -> Any:
    """`GOMP_parallel(function, its argument, threads, flags)`, or None."""
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    for library in (None, torch._C.__file__):  # what the process has for everybody comes first for torch, too
        try:
            parallel = ctypes.CDLL(library).GOMP_parallel
        except (AttributeError, OSError, TypeError):
            continue
        parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        parallel.restype = None
        return parallel
    return None


_parallel = _find()
