"""1x1 convolutions on the CPU, with what follows them done before their result leaves the cache.

oneDNN, which torch computes with, adds the bias, the activation, and what a result is added to while it has a piece of
the result at hand. torch's public functions take a pass over memory for each of them; the operators that its compiler
puts into fused code do not, and are called here. Where torch has no oneDNN (macOS), or oneDNN no arithmetic in a dtype
on this processor, the public functions do the same.
"""

import os
from collections.abc import Callable
from typing import Literal

# What oneDNN and torch's layer above it have compiled for a shape they keep, for 1024 shapes each: images of many sizes
# took 14 to 18 MB more each. Those of one size have some 60 shapes in a network. Read when oneDNN is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

Then = Literal["none", "relu", "gelu", "sigmoid"]

_THENS: dict[Then, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu_,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid_,
}
_PIXELS = 2**13  # that weights are laid out for: about a strip; the layout serves any other number


class Pointwise:
    """A 1x1 convolution of maps (h, w, c) in memory order, then an activation."""

    def __init__(self, weight: Tensor, bias: Tensor | None, then: Then = "none") -> None:
        """Take a weight (d, c) and bias (d,). Maps are of their dtype."""
        self._bias, self._then = bias, then
        self._fused = has_onednn(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PIXELS) if self._fused else weight

    def __call__(self, x: Tensor) -> Tensor:
        """(h, w, c) to (h, w, d), new."""
        if not self._fused:
            return _THENS[self._then](F.linear(x, self._weight, self._bias))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, self._then, [], "none")
        return out


class PointwiseSum:
    """A 1x1 convolution of maps (h, w, c) in memory order, added to others (h, w, d)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """Take a weight (d, c) and bias (d,). Maps are of their dtype."""
        self.weight, self.bias = weight, bias
        self._fused = has_onednn(weight.dtype)

    def __call__(self, total: Tensor, x: Tensor) -> None:
        """Add what becomes of x (h, w, c) to total (h, w, d)."""
        if not self._fused:
            total.flatten(0, 1).add_(self.bias).addmm_(x.flatten(0, 1), self.weight.t())
            return
        # Of the operators that add, the one for convolutions alone writes to what it adds to.
        torch.ops.mkldnn._convolution_pointwise_.binary(
            as_image(total),
            as_image(x),
            self.weight[..., None, None],
            self.bias,
            [0, 0],  # padding
            [1, 1],  # stride
            [1, 1],  # dilation
            1,  # groups
            "add",
            1.0,
            None,  # no activation, nor what one would need
            [],
            None,
        )


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN, and that arithmetic in a dtype on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def as_image(x: Tensor) -> Tensor:
    """(h, w, c) as torch takes images: (1, c, h, w), channels last in memory."""
    return x[None].permute(0, 3, 1, 2)
