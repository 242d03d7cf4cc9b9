"""What a job would cost, measured on a sample of it, without writing anything."""

import time
from dataclasses import dataclass

import numpy as np

from nafnet.images import RefusedImage, UnreadableImage, decode
from nafnet.restore import Restorer
from pipelines.containers import Collection
from pipelines.manifest import Plan

_SAMPLE = 16  # images opened to learn their sizes
_PROBE_PX = 256


@dataclass(frozen=True, slots=True)
class Estimate:
    """`megapixels` is extrapolated from the sampled images; times are for one actor on this machine."""

    sampled: int
    megapixels: float
    largest: tuple[int, int]  # height, width in px
    tile: int | None  # side of the largest one's tiles in px; None: whole
    tiles: int  # of the largest
    memory_bytes: int  # of one actor restoring the largest
    seconds: float


def estimate(plan: Plan, source: Collection, restorer: Restorer, *, max_pixels: int) -> Estimate:
    """Open a few images spread over the plan, time the network on a small one, and extrapolate."""
    keys = plan.pairs["key"].to_pylist()
    sizes = []
    for key in keys[:: max(1, -(-len(keys) // _SAMPLE))]:
        try:
            picture = decode(source.read(key), max_pixels=max_pixels)
        except (UnreadableImage, RefusedImage, FileNotFoundError):
            continue  # it will have its row; it costs next to nothing
        sizes.append((picture.height, picture.width))
    if not sizes:
        return Estimate(0, 0.0, (0, 0), None, 0, 0, 0.0)
    megapixels = sum(h * w for h, w in sizes) / 1e6 * len(keys) / len(sizes)
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    tile, tiles = restorer.tile(height, width), restorer.tiles(height, width)
    repeated = tiles * tile**2 / (height * width) if tile else 1  # halos are restored more than once
    channels = restorer.configs[0].image_channels
    probe = np.zeros((_PROBE_PX, _PROBE_PX, channels), np.uint8)
    restorer(probe)  # the first call allocates
    started = time.perf_counter()
    restorer(probe)
    per_pixel = (time.perf_counter() - started) / _PROBE_PX**2
    return Estimate(
        sampled=len(sizes),
        megapixels=megapixels,
        largest=(height, width),
        tile=tile,
        tiles=tiles,
        memory_bytes=restorer.process_bytes(height, width, tile),
        seconds=per_pixel * megapixels * 1e6 * repeated,
    )
