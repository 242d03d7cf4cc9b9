"""The network on a GPU: channels-last, compiled once that pays, transfers beside the arithmetic.

Calls may come from several threads: each has its own stream, so that one image is copied while another is restored.
"""

import copy
import logging
import threading
import time
from typing import cast

import torch
from torch import Tensor

from nafnet.model import Block, Network

logger = logging.getLogger(__name__)

# About what compiling takes when no kernel is on disk yet. Work that has not taken as long would not earn it back, so
# it stays eager to its end: nothing takes more than twice its best time for compiling.
_COMPILE_SECONDS = 60.0


class DeviceNetwork:
    """A copy of a `Network` on `device`, in `dtype`."""

    def __init__(
        self, network: Network, dtype: torch.dtype, device: str, *, compile_after: float = _COMPILE_SECONDS
    ) -> None:
        """Take the weights, and the TLC windows if it is localized, of a float32 network.

        Its blocks are compiled, once for all sizes, after `compile_after` seconds of eager work. The kernels are kept
        on disk by torch (TORCHINDUCTOR_CACHE_DIR says where) for every process on the machine and later runs.
        """
        self.device = torch.device(device)
        moved = copy.deepcopy(network).to(self.device, dtype)
        self._network = moved.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self._compile_after: float | None = compile_after
        self._eager_seconds = 0.0
        self._lock = threading.Lock()
        self._own = threading.local()

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Restore ([N,] H, W, image_channels) float32 in this machine's memory, about [0, 1]; the same out."""
        started = time.perf_counter()
        if self.device.type != "cuda":
            restored = self._run(image)
        else:
            stream = self._stream()
            with torch.cuda.stream(stream):
                upload = image.pin_memory().to(self.device, non_blocking=True)
                result = self._run(upload)
                restored = torch.empty(result.shape, pin_memory=True).copy_(result, non_blocking=True)
                stream.synchronize()
        self._count(time.perf_counter() - started)
        return restored

    def _run(self, image: Tensor) -> Tensor:
        # (N, H, W, C) memory seen as (N, C, H, W): channels-last without a copy
        batch = image if image.ndim == 4 else image[None]
        restored = cast(Tensor, self._network(batch.permute(0, 3, 1, 2)))
        return restored.permute(0, 2, 3, 1).float().reshape(image.shape)

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch's stubs lack it
        return cast(torch.cuda.Stream, self._own.stream)

    def _count(self, seconds: float) -> None:
        with self._lock:
            self._eager_seconds += seconds
            if self._compile_after is None or self._eager_seconds < self._compile_after:
                return
            self._compile_after = None
        logger.info("compiling the network's blocks after %.0f s of eager work", self._eager_seconds)
        for module in self._network.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)
