"""compare.html and compare.json: the verdict, the numbers side by side, two plots a run, and what differs most."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from nafnet.restore import to_float
from pipelines.compare import LETTERS, Comparison, Pairing, Run, as_json, decibels, inputs_hash, table, value_text
from pipelines.report import Floats, column, counted
from pipelines.report_html import data_url

# Private there, and needed here so that both pages draw alike.
from pipelines.report_plots import _ACCENT, _INK, _axes, _round_step, _sample, _svg
from pipelines.report_sheet import Crop, Pixels, Strip, _load, _to_rgb8, png
from pipelines.storage import Store

MAX_SHOWN = 12  # images on the page, over all runs
MAX_LISTED = 100  # rows of any table
CROP = 128  # pixels a side, shown twice as large
_BAND = 256  # rows compared at once: no wide copy of a whole image
_PARTS = {
    "protocol": "scoring",
    "versions": "versions",
    "machine": "machine of the driver",
    "precision": "precision flags",
    "ray": "Ray",
    "job": "job",
}


@dataclass(frozen=True, slots=True)
class Look:
    """One image in both runs. `largest` and `mean` are absolute differences of its samples, of `top` at full range.

    They are None where the two cannot be compared; the crops of `strip` then say why.
    """

    key: str
    psnr: tuple[float, float]  # NaN without a score
    difference: float
    strip: Strip
    largest: float | None = None
    mean: float | None = None
    top: int = 255


@dataclass(frozen=True, slots=True)
class _Differences:
    largest: float
    mean: float
    place: tuple[int, int]  # row and column of the largest


def write_comparison(output: Store, comparison: Comparison) -> str:
    """Write `compare.json` and `compare.html` below `output`; return the URL of the page."""
    looks = {pairing.letter: look_at(comparison, pairing) for pairing in comparison.pairings}
    found = as_json(comparison)
    for pairing in found["against_first"]:
        pairing["most_different"] = [_look_json(look) for look in looks[pairing["letter"]]]
    output.write("compare.json", json.dumps(found, indent=2, allow_nan=False).encode() + b"\n")
    output.write("compare.html", render(comparison, looks).encode())
    return output.url("compare.html")


def look_at(comparison: Comparison, pairing: Pairing) -> tuple[Look, ...]:
    """The images that differ most, decoded one after the other; only their crops are kept."""
    first, other = comparison.runs[0], comparison.runs[LETTERS.index(pairing.letter)]
    share = max(1, MAX_SHOWN // len(comparison.pairings))
    return tuple(_look(first, other, pairing, at) for at in pairing.most_different(share))


def _look(first: Run, other: Run, pairing: Pairing, at: int) -> Look:
    rows = [rows.slice(at, 1).to_pylist()[0] for rows in (pairing.first, pairing.other)]
    scores = tuple(float("nan") if row["psnr"] is None else float(row["psnr"]) for row in rows)
    loaded = [_read(run, row) for run, row in zip((first, other), rows, strict=True)]
    titles = ("A", pairing.letter)
    captions = ["" if np.isnan(score) else _psnr(score) for score in scores]
    key, difference = rows[0]["key"], float(pairing.psnr[at])
    a, b = (pixels for pixels, _ in loaded)
    notes = [note for _, note in loaded]
    if a is not None and b is not None and a.shape != b.shape:
        notes = [f"not of one size: {_size(a)} in A, {_size(b)} in {pairing.letter}"] * 2
        a = b = None
    if a is None or b is None:
        both = zip(titles, captions, notes, strict=True)
        crops = [Crop(title, caption, None, note or "not compared") for title, caption, note in both]
        return Look(key, (scores[0], scores[1]), difference, Strip("", key, "not compared", tuple(crops)))
    if a.dtype != b.dtype:
        a, b = to_float(a), to_float(b)
    top = int(np.iinfo(a.dtype).max) if a.dtype.kind == "u" else 1
    found = differences(a, b)
    row, left = (_start(place, side) for place, side in zip(found.place, a.shape[:2], strict=True))
    window = np.s_[row : row + CROP, left : left + CROP]
    amplified, factor = _amplified(a[window], b[window], found.largest)
    crops = [
        Crop(titles[0], captions[0], _to_rgb8(a[window])),
        Crop(titles[1], captions[1], _to_rgb8(b[window])),
        Crop("difference", f"times {factor:,.4g}" if found.largest else "none", amplified),
    ]
    caption = f"{_size(a)}, crop from {left}, {row}, where the difference is largest"
    strip = Strip("", key, caption, tuple(crops))
    return Look(key, (scores[0], scores[1]), difference, strip, found.largest, found.mean, top)


def _read(run: Run, row: dict[str, Any]) -> tuple[Pixels | None, str]:
    """The written image, looked for where the run is now: rows keep the place where it was made."""
    made, written = run.record.get("job"), row["output"] or ""
    home = f"{made.get('output')}/" if isinstance(made, dict) else ""
    try:
        url = Store(run.url).url(written.removeprefix(home)) if home and written.startswith(home) else row["output"]
    except ValueError as error:  # UnsafeKey
        return None, f"not shown: {error}"
    return _load(url, (row["width"] or 0) * (row["height"] or 0) / 1e6)


def differences(a: Pixels, b: Pixels) -> _Differences:
    """The largest and the mean absolute difference of two images (H, W, C) of one dtype, and where the largest is."""
    largest, total, place = -1.0, 0.0, (0, 0)
    for top in range(0, len(a), _BAND):
        band = _distance(a[top : top + _BAND], b[top : top + _BAND])
        total += float(band.sum(dtype=np.float64))
        at = np.unravel_index(np.argmax(band), band.shape)
        if band[at] > largest:
            largest, place = float(band[at]), (top + int(at[0]), int(at[1]))
    return _Differences(largest, total / a.size, place)


def _distance(a: Pixels, b: Pixels) -> npt.NDArray[Any]:
    """Absolute differences; integers stay integers, NaN counts as 0."""
    if a.dtype.kind != "u":
        a, b = np.nan_to_num(a), np.nan_to_num(b)
    return np.subtract(np.maximum(a, b), np.minimum(a, b))


def _start(place: int, side: int) -> int:
    """Where a window of `CROP` px starts that has `place` in its middle, as far as the image allows."""
    return max(0, min(place - CROP // 2, side - CROP))


def _amplified(a: Pixels, b: Pixels, largest: float) -> tuple[npt.NDArray[np.uint8], float]:
    """The difference as (h, w, 3) uint8, its largest value white, and how many times a screen's levels that is."""
    distance = _distance(a, b).astype(np.float32)
    top = np.iinfo(a.dtype).max if a.dtype.kind == "u" else 1
    shown = distance / np.float32(largest or 1)
    return _to_rgb8(shown.clip(0, 1)), top / (largest or top)


def _psnr(score: float) -> str:
    return "identical to the reference" if np.isinf(score) else f"{score:.4f}\u00a0dB"


def _size(pixels: Pixels) -> str:
    channels = pixels.shape[2]
    return f"{pixels.shape[1]} x {pixels.shape[0]} pixels of {counted(channels, 'channel')}"


def _level(value: float | None, top: int) -> str:
    if value is None:
        return ""
    return f"{value:,.6g}" if top == 1 else f"{value:,.4g} of {top:,}"


def _look_json(look: Look) -> dict[str, Any]:
    first, other, difference = (
        None if np.isnan(score) else "infinite" if np.isinf(score) else score for score in (*look.psnr, look.difference)
    )
    found = {"key": look.key, "psnr_first": first, "psnr_other": other, "psnr": difference}
    return {**found, "largest": look.largest, "mean": look.mean, "full_range": look.top}


def render(comparison: Comparison, looks: dict[str, tuple[Look, ...]]) -> str:
    """The page as HTML; it loads nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_url": _crop_url, "decibels": decibels, "value": value_text, "psnr": _psnr}
    environment.globals |= {"counted": counted, "level": _level}
    return environment.get_template("compare.html.j2").render(
        comparison=comparison,
        runs=list(zip(LETTERS, comparison.runs, strict=False)),
        inputs={letter: inputs_hash(run.rows) for letter, run in zip(LETTERS, comparison.runs, strict=False)},
        table=table(comparison),
        plots={pairing.letter: plots(pairing) for pairing in comparison.pairings},
        looks=looks,
        parts=_PARTS,
        most=MAX_LISTED,
    )


def _crop_url(crop: Crop) -> str:
    return data_url(b"" if crop.pixels is None else png(crop.pixels))


def plots(pairing: Pairing) -> list[tuple[str, str, str]]:
    """(title, note, SVG): PSNR against PSNR, and the differences; none without scores."""
    finite = np.flatnonzero(np.isfinite(pairing.psnr) & np.isfinite(column(pairing.first, "psnr")))
    if not len(finite):
        return []
    letter, change = pairing.letter, pairing.psnr[finite]
    shown, note = _sample(finite)
    points = column(pairing.first, "psnr")[shown], column(pairing.other, "psnr")[shown]
    return [
        (f"PSNR of {letter} against PSNR of A", note, _scatter(letter, *points)),
        ("PSNR difference", counted(len(finite), "image"), _histogram(letter, change, pairing.tolerance)),
    ]


def _scatter(letter: str, first: Floats, other: Floats) -> str:
    low, high = min(first.min(), other.min()), max(first.max(), other.max())
    room = 0.06 * (high - low) or 1.0
    ends = (low - room, high + room)
    figure, axes = _axes("PSNR of A, dB", f"PSNR of {letter}, dB")
    axes.plot(ends, ends, color=_INK, linewidth=0.8, alpha=0.5, linestyle=(0, (4, 3)))
    few = len(first) <= 200
    size, alpha = (5, 0.8) if few else (2.5, 0.35)
    axes.plot(first, other, "o", color=_ACCENT, markersize=size, alpha=alpha, markeredgewidth=0)
    axes.set(xlim=ends, ylim=ends)
    return _svg(figure, f"PSNR of {letter} against PSNR of A")


def _histogram(letter: str, change: Floats, tolerance: float) -> str:
    """Differences in dB as bars around zero, and the tolerance as lines where they come near it."""
    far = float(np.abs(change).max())
    step = _round_step((2 * far or tolerance or 1.0) / min(32, max(8, 2 * len(change) ** 0.5)))
    last = max(1, int(np.ceil(far / step - 0.5)))
    middles = np.arange(-last, last + 1) * step  # no difference at all is the middle of a bar
    counts, _ = np.histogram(change, np.append(middles - step / 2, middles[-1] + step / 2))
    figure, axes = _axes(f"PSNR of {letter} less that of A, dB", "images")
    axes.bar(middles, counts, width=step * 0.92, color=_ACCENT)
    if 0 < tolerance <= 3 * (far or tolerance):
        for edge in (-tolerance, tolerance):
            axes.axvline(edge, color=_INK, linewidth=0.8, alpha=0.5, linestyle=(0, (4, 3)))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(visible=False, axis="x")
    return _svg(figure, f"Histogram of the PSNR of {letter} less that of A")
