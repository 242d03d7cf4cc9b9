"""What a job would cost, measured on a sample of it, without writing anything."""

import time
from collections.abc import Iterator
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
    sizes = []
    for key in _sample(plan):
        try:
            picture = decode(source.read(key), max_pixels=max_pixels)
        except (UnreadableImage, RefusedImage, FileNotFoundError):
            continue  # it will have its row; it costs next to nothing
        sizes.append((picture.height, picture.width))
    if not sizes:
        return Estimate(0, 0.0, (0, 0), None, 0, 0, 0.0)
    megapixels = sum(h * w for h, w in sizes) / 1e6 * plan.to_restore / len(sizes)
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


def _sample(plan: Plan) -> Iterator[str]:
    """A few keys, spread evenly over those to be restored."""
    step, seen = max(1, -(-plan.to_restore // _SAMPLE)), 0
    for pairs in plan.tables():
        yield from pairs["key"].to_pylist()[-seen % step :: step]
        seen += len(pairs)
