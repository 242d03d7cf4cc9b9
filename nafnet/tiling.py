"""Large images in pieces: a plan on integers, and the blending of restored pieces on arrays.

A tile is restored with a margin, the halo, that is thrown away, so that every pixel that is kept saw at least `halo`
px of its surroundings (or the image's own border). Neighbours cross-fade over a narrow band inside what both keep.
Tiles start on multiples of the network's stride, so that its down-sampling grid is that of the whole image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLEND_PX = 16


@dataclass(frozen=True, slots=True)
class Span:
    """A tile along one axis, px: it reads [start, stop) and fades over the bands at its inner ends.

    `fade_in` and `fade_out` are the first px of the band shared with the neighbour before and after, or None at the
    image's border.
    """

    start: int
    stop: int
    fade_in: int | None
    fade_out: int | None

    @property
    def kept(self) -> slice:
        """The px of the image that this tile has a share in."""
        low = self.start if self.fade_in is None else self.fade_in
        high = self.stop if self.fade_out is None else self.fade_out + BLEND_PX
        return slice(low, high)

    def weights(self) -> npt.NDArray[np.float32]:
        """This tile's share of each kept px; neighbours' shares add up to 1."""
        kept = self.kept
        share = np.ones(kept.stop - kept.start, np.float32)
        ramp = (np.arange(BLEND_PX, dtype=np.float32) + 0.5) / BLEND_PX
        if self.fade_in is not None:
            share[:BLEND_PX] = ramp
        if self.fade_out is not None:
            share[-BLEND_PX:] = 1 - ramp
        return share


@dataclass(frozen=True, slots=True)
class Tile:
    """One piece of the plan."""

    rows: Span
    columns: Span


def plan_tiles(height: int, width: int, *, tile_px: int, halo_px: int, stride: int) -> list[Tile]:
    """Cover height x width px with tiles of at most `tile_px` a side; one tile when the image is no larger.

    Raises:
        ValueError: tiles so small that halo and blending leave nothing of them.
    """
    least = least_tile(halo_px, stride)
    if tile_px < least:
        raise ValueError(
            f"a tile of {tile_px} px with a halo of {halo_px} px keeps nothing: take {least} px or more, or less halo"
        )
    rows = _plan_axis(height, tile_px, halo_px, stride)
    columns = _plan_axis(width, tile_px, halo_px, stride)
    return [Tile(r, c) for r in rows for c in columns]


def least_tile(halo_px: int, stride: int) -> int:
    """The side in px of the smallest tile that keeps something."""
    # A tile's two bands must not meet. The last tile may start as little as a stride after the one before it, which
    # brings the bands together by half a step: hence two widths of a band and not one.
    return 2 * halo_px + BLEND_PX + max(2 * BLEND_PX, stride)


def restore_tiles(
    image: npt.NDArray[Any],
    tiles: list[Tile],
    restore: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]],
) -> npt.NDArray[np.float32]:
    """Apply `restore` (same shape out, in float32) to each tile of `image` (H, W, C) and blend the results."""
    out = np.zeros(image.shape, np.float32)
    for tile in tiles:
        rows, columns = tile.rows, tile.columns
        piece = restore(image[rows.start : rows.stop, columns.start : columns.stop])
        kept_rows, kept_columns = rows.kept, columns.kept
        share = rows.weights()[:, None, None] * columns.weights()[None, :, None]
        inner = piece[
            kept_rows.start - rows.start : kept_rows.stop - rows.start,
            kept_columns.start - columns.start : kept_columns.stop - columns.start,
        ]
        out[kept_rows, kept_columns] += inner * share
        del piece, inner  # not beside the maps of the next tile
    return out


def _plan_axis(length: int, tile_px: int, halo_px: int, stride: int) -> list[Span]:
    starts = list(_starts(length, tile_px, halo_px, stride))
    stops = [min(start + tile_px, length) for start in starts]
    # The band sits in the middle of the overlap: both neighbours have at least a halo around it.
    bands = [(start + stop - BLEND_PX) // 2 for start, stop in zip(starts[1:], stops[:-1], strict=True)]
    return [
        Span(start, stop, fade_in, fade_out)
        for start, stop, fade_in, fade_out in zip(starts, stops, [None, *bands], [*bands, None], strict=True)
    ]


def _starts(length: int, tile_px: int, halo_px: int, stride: int) -> Iterator[int]:
    yield 0
    step = (tile_px - 2 * halo_px - BLEND_PX) // stride * stride
    last = -(-(length - tile_px) // stride) * stride
    yield from range(step, last, step)
    if last > 0:
        yield last
