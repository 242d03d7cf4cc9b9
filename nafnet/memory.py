"""What a restoration takes, known before anything is allocated, and what to do when it is too much.

The numbers are plans, checked against measured peaks in the tests. They decide how large a tile may be: whole images
where they fit, else the largest side of `LADDER` that does.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from nafnet.model import NetConfig, Network, parameters
from nafnet.recipe import Precision

# Sides of tiles in px that "auto", and running out of memory, choose from: fixed, so that runs can be compared.
LADDER = (4096, 3072, 2048, 1536, 1024, 768, 640, 512)
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
STRIP_BYTES = 2**22  # of the widest map in a strip of `nafnet.strips`, for each thread

_LIBRARIES_BYTES = 560 * 2**20  # a process that has imported torch and Ray and compiled loops, but restored nothing
_STRIP_MAPS = 6  # of at most STRIP_BYTES a thread, alive at once
_GAPS_BYTES = 192 * 2**20  # that strips which come and go leave between what stays
_SHARE = 0.6  # of a machine's memory; the rest is for its other work
_DEVICE_SHARE = 0.9  # of what is free on a GPU
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc's


def network_bytes(
    config: NetConfig, height: int, width: int, *, precision: Precision = "float32", device: str = "cpu"
) -> int:
    """Peak of the feature maps while one image of height x width px passes through the network.

    On a CPU (`nafnet.strips`) that is what a block's gate lets through, at full resolution, and the skip connections:
    each level's map is half as large as that of the level above it. On a GPU a block also holds, at worst, the skip
    connection, the two outputs of dw_expand times `width` channels around the depthwise convolution, one output of its
    activation, and running sums in float32.
    """
    pixels = _padded(height, config) * _padded(width, config)
    number = DTYPES[precision].itemsize
    image = 4 * config.image_channels * pixels
    inner = config.width * config.dw_expand // (2 if config.activation == "gate" else 1)
    if device == "cpu":
        maps = (2 * config.width + inner) * pixels * number
        return 2 * image + maps + _STRIP_MAPS * STRIP_BYTES * torch.get_num_threads() + _GAPS_BYTES
    local = 0 if config.attention == "none" else 2 * 4 * inner * pixels
    return 3 * image + (3 + 2 * config.dw_expand) * config.width * pixels * number + local


def weights_bytes(configs: Iterable[NetConfig], *, precision: Precision = "float32") -> int:
    """The networks' parameters: in float32, and in `precision` too, since that may have to fall back."""
    count = sum(_parameters(config) for config in configs)
    return count * (4 if precision == "float32" else 4 + DTYPES[precision].itemsize)


def image_bytes(height: int, width: int, channels: int, *, sums: int) -> int:
    """What is held of the image itself: as read and as it will be written, and float32 `sums` of tiles or of views."""
    return height * width * channels * (2 * 2 + 4 * sums)


def process_bytes(
    configs: Sequence[NetConfig],
    height: int,
    width: int,
    *,
    tile: int | None = None,
    precision: Precision = "float32",
    device: str = "cpu",
    self_ensemble: bool = False,
) -> int:
    """The peak of a process that restores one image (px) in tiles of `tile` px, or whole when it is None.

    On a GPU it is the device's memory that counts: weights and feature maps.
    """
    piece = (height, width) if tile is None else (min(height, tile), min(width, tile))
    maps = max(network_bytes(config, *piece, precision=precision, device=device) for config in configs)
    maps += weights_bytes(configs, precision=precision)
    if device != "cpu":
        return maps
    channels = max(config.image_channels for config in configs)
    sums = (piece != (height, width)) + self_ensemble + (len(configs) > 1)  # what a step of a chain starts from, too
    return _LIBRARIES_BYTES + maps + image_bytes(height, width, channels, sums=sums)


def rungs(height: int, width: int, *, least: int, first: int | None = None) -> list[int | None]:
    """The ladder for one image: `first` (None: the whole image), then every smaller side, down to `least` px."""
    top = first or max(height, width)
    return [first, *(side for side in LADDER if least <= side < min(top, max(height, width)))]


def available_bytes(device: str = "cpu", share: float = 1.0) -> int:
    """What a process with this share of a GPU's memory, or of this machine's (or container's), should use."""
    if device != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        return int(min(free, total * share) * _DEVICE_SHARE)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return int(total * share * _SHARE)


def make_room(planned: int, most: int, at_once: int) -> None:
    """Let the system have what the C library keeps, where this process would come to hold more than planned.

    What is freed is kept for later, in pieces between others that stay: the next image of another size finds few that
    fit, and takes as much again.

    Args:
        planned: `process_bytes` of the next image.
        most: of the largest image so far.
        at_once: images that are being restored now, with the next.
    """
    if _trim is None:
        return
    needed, allowed = planned - _LIBRARIES_BYTES, _LIBRARIES_BYTES + at_once * (most - _LIBRARIES_BYTES)
    if resident_bytes() + needed > allowed:
        _trim(0)


def resident_bytes() -> int:
    """What this process holds now, but for memory shared with others; 0 where the system does not say (macOS)."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return 0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssFile"))) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is memory that could not be had, and nothing else that a device may suffer from."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # On a CPU torch raises a plain RuntimeError, which only its words tell from others.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _padded(side: int, config: NetConfig) -> int:
    return side + -side % config.stride


@lru_cache
def _parameters(config: NetConfig) -> int:
    with torch.device("meta"):
        return parameters(Network(config))
