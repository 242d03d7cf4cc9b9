"""The comparison sheet: before, restored and reference, cut from the same place of three telling images.

At most nine images are decoded, one after the other, and only their crops are kept.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from nafnet.images import decode
from pipelines.containers import open_item
from pipelines.report import decibels, extremes, gains, megapixels, restored_only
from pipelines.storage import StorageError

Pixels = npt.NDArray[Any]

CROP = 256  # source pixels a side, at most
MAX_MEGAPIXELS = 64  # what the driver is willing to decode
_BLOCK = 8  # detail is variance at this scale, so one hard edge does not outweigh texture
_TITLES = ("before", "restored", "reference")


@dataclass(frozen=True, slots=True)
class Crop:
    """One picture of a strip: `pixels` (h, w, 3) uint8, or None and a `note` that says why."""

    title: str
    caption: str
    pixels: npt.NDArray[np.uint8] | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Strip:
    """The crops of one image, all from the same place; `caption` says which image and where."""

    label: str
    key: str
    caption: str
    crops: tuple[Crop, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its crops in pixels."""
        shapes = [crop.pixels.shape[:2] for crop in self.crops if crop.pixels is not None]
        return (int(shapes[0][0]), int(shapes[0][1])) if shapes else (CROP, CROP)


def load_strips(rows: pa.Table) -> tuple[Strip, ...]:
    """Strips of the worst, median and best image by PSNR gain; unscored, of the smallest, median, largest.

    An image that cannot be read any more becomes a note. Nothing restored gives no strips.
    """
    labels, done = _telling(rows)
    return tuple(_load_strip(label, done.slice(at, 1).to_pylist()[0]) for at, label in labels.items())


def telling(rows: pa.Table) -> pa.Array:
    """The keys of the images that `load_strips` shows: it gives the same strips for their rows alone."""
    labels, done = _telling(rows)
    return done["key"].take(pa.array(labels, pa.int64())).combine_chunks()


def _telling(rows: pa.Table) -> tuple[dict[int, str], pa.Table]:
    """What to call which of the restored rows, and those rows."""
    done = restored_only(rows)
    names: tuple[str, str, str] = ("worst", "median", "best")
    found = extremes(gains(done))
    if found is None:
        names, found = ("smallest", "median", "largest"), extremes(megapixels(done))
    if found is None:
        return {}, done
    low, middle, high = found
    if low == high:
        return {low: "the only image"}, done
    return {low: names[0]} | ({middle: names[1]} if middle not in {low, high} else {}) | {high: names[2]}, done


def _load_strip(label: str, row: dict[str, Any]) -> Strip:
    size: tuple[int, int] | None = None
    top = left = 0
    crops: dict[str, Crop] = {}
    # The cleanest picture comes first: it decides the window.
    for title, field in (("reference", "reference"), ("restored", "output"), ("before", "source")):
        if title == "reference" and row[field] is None:
            continue
        pixels, note = _load(row[field], (row["width"] or 0) * (row["height"] or 0) / 1e6)
        cut = None
        if pixels is not None:
            if size is None:
                size = (pixels.shape[0], pixels.shape[1])
                top, left = most_detailed(pixels)
            if size == pixels.shape[:2]:
                cut = _to_rgb8(pixels[top : top + CROP, left : left + CROP])
            else:
                note = f"not the size of the others: {pixels.shape[1]} x {pixels.shape[0]}"
        crops[title] = Crop(title, _scores(title, row), cut, note)
    place = f"{row['width']} x {row['height']} pixels, crop from {left}, {top}"
    before, after = row["psnr_input"], row["psnr"]
    scored = None not in (before, after) and np.isfinite(after - before)
    gain = f"{decibels(after - before)}, " if scored else ""
    return Strip(label, row["key"], gain + place, tuple(crops[title] for title in _TITLES if title in crops))


def _load(url: str | None, size: float) -> tuple[Pixels | None, str]:
    """Pixels (H, W, C) of one image, or None and a note. `size` is in megapixels, as the row has it."""
    if size > MAX_MEGAPIXELS:
        return None, f"not shown: {size:.0f} megapixels, more than {MAX_MEGAPIXELS}"
    if url is None:
        return None, "not shown: the report names no file"
    try:
        store, name = open_item(url)
        return decode(store.read(name), max_pixels=MAX_MEGAPIXELS * 1_000_000).pixels, ""
    except FileNotFoundError:
        return None, "not shown: the file is gone"
    except (OSError, ValueError, StorageError) as error:
        return None, f"not shown: {error}"


def most_detailed(pixels: Pixels) -> tuple[int, int]:
    """Top and left of the `CROP` window with the most fine detail in `pixels` (H, W, C), in steps of 8."""
    plane = pixels[..., 1 if pixels.shape[2] >= 3 else 0]  # green stands in for luma
    down, across = plane.shape[0] // _BLOCK, plane.shape[1] // _BLOCK
    if not down or not across:
        return 0, 0
    variance = np.empty((down, across))
    for row in range(down):  # a row of blocks at a time: no float copy of a whole 64-megapixel plane
        band = plane[row * _BLOCK : (row + 1) * _BLOCK, : across * _BLOCK].reshape(_BLOCK, across, _BLOCK)
        variance[row] = np.nan_to_num(band.astype(np.float32)).var(axis=(0, 2))
    total = np.pad(variance.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    high, wide = min(CROP // _BLOCK, down), min(CROP // _BLOCK, across)
    sums = total[high:, wide:] - total[:-high, wide:] - total[high:, :-wide] + total[:-high, :-wide]
    top, left = np.unravel_index(np.argmax(sums), sums.shape)
    return int(top) * _BLOCK, int(left) * _BLOCK


def _to_rgb8(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """(h, w, C) of any depth -> (h, w, 3) uint8 for a screen; alpha is left out."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        pixels = (np.nan_to_num(pixels).clip(0, 1) * 255).round().astype(np.uint8)
    colour = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    return np.ascontiguousarray(colour)


def _scores(title: str, row: dict[str, Any]) -> str:
    suffix = {"before": "_input", "restored": ""}.get(title)
    if suffix is None:
        return ""
    psnr = row[f"psnr{suffix}"]
    texts = ["" if psnr is None else "identical" if np.isinf(psnr) else f"{psnr:.2f}\u00a0dB"]
    planar, volume = row[f"ssim_2d{suffix}"], row[f"ssim_3d{suffix}"]
    if volume is not None:  # then it is the one of the convention
        texts.append(f"SSIM\u00a03D\u00a0{volume:.4f}")
    elif planar is not None:
        texts.append(f"SSIM\u00a02D\u00a0{planar:.4f}")
    return " · ".join(text for text in texts if text)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """(h, w, 3) uint8 as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


_GAP, _HEAD, _FOOT = 16, 48, 44  # pixels: around cells, above a strip, below a crop
_INK, _FAINT, _EMPTY = "#1b1f24", "#68707a", "#eceef1"


def sheet_size(strips: Sequence[Strip]) -> tuple[int, int]:
    """Width and height in pixels of `sheet_png(strips)`."""
    columns = max((len(strip.crops) for strip in strips), default=2)
    return _GAP + columns * (CROP + _GAP), _GAP + max(1, len(strips)) * (_HEAD + CROP + _FOOT)


def sheet_png(strips: Sequence[Strip]) -> bytes:
    """All strips on one white sheet, source pixels at 1:1, as PNG. No strips give a sheet that says so."""
    sheet = Image.new("RGB", sheet_size(strips), "white")
    draw = ImageDraw.Draw(sheet)
    if not strips:
        draw.text((_GAP, _GAP), "No image was restored.", _FAINT, _font())
    for index, strip in enumerate(strips):
        top = _GAP + index * (_HEAD + CROP + _FOOT)
        _write(draw, (_GAP, top), f"{strip.label}: {strip.key}", _INK, sheet.width - 2 * _GAP)
        _write(draw, (_GAP, top + 20), strip.caption, _FAINT, sheet.width - 2 * _GAP)
        for column, crop in enumerate(strip.crops):
            x, y = _GAP + column * (CROP + _GAP), top + _HEAD
            draw.rectangle((x, y, x + CROP - 1, y + CROP - 1), _EMPTY)
            if crop.pixels is None:
                _write(draw, (x + 12, y + CROP // 2 - 8), crop.note, _FAINT, CROP - 24)
            else:
                high, wide = strip.size
                sheet.paste(Image.fromarray(crop.pixels), (x + (CROP - wide) // 2, y + (CROP - high) // 2))
            text = f"{crop.title}  {crop.caption}"
            _write(draw, (x, y + CROP + 5), text, _FAINT, CROP)
    return png(np.asarray(sheet))


def _font() -> ImageFont.FreeTypeFont:
    # matplotlib's own copy: the same on every machine, and it knows most scripts.
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 13)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, ink: str, room: int) -> None:
    """One line of `text`, shortened in its middle to `room` pixels."""
    font = _font()
    words = " ".join(text.split())[:1000]
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words)
    keep = len(text)
    short = text
    while font.getlength(short) > room and keep > 2:
        keep -= 1
        short = f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}"
    draw.text(place, short, ink, font)
