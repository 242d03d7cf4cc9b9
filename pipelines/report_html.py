"""report.html: the summary, the plots and the comparison sheet as one file that loads nothing else."""

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.records import Status
from pipelines.report import (
    Summary,
    column,
    count_line,
    counted,
    decibels,
    fact_table,
    gains,
    megapixels,
    restored_only,
    score_table,
)
from pipelines.report_sheet import Crop, Strip, load_strips, png
from pipelines.storage import Store

MAX_FAILED = 100  # rows of the table of images that were not restored
MAX_POINTS = 2000  # of a scatter plot; more are sampled

_MEANING = {
    Status.RESTORED: "restored and written",
    Status.UNREADABLE: "not an image, or damaged",
    Status.MISSING: "the image or its reference is not there",
    Status.MISMATCHED: "the reference has another size or number of channels",
    Status.REFUSED: "an image that this job does not touch",
    Status.SUSPECT: "the result was implausible, the input was written in its place",
    Status.CRASHED: "the process failed while it held this image",
}

# Drawn in colours that nothing else uses, then swapped for the page's own: plots follow light and dark.
_INK, _ACCENT, _BAD = "#010203", "#040506", "#070809"
_SWAP = {_INK: "currentColor", _ACCENT: "var(--accent)", _BAD: "var(--bad)"}
_STYLE: dict[Any, Any] = {  # matplotlib types its keys as a literal of hundreds
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.12,
    "grid.color": _INK,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def write_report(
    output: Store,
    rows: pa.Table,
    summary: Summary,
    run: Mapping[str, Any],
    *,
    strips: Sequence[Strip] | None = None,
) -> str:
    """Write `report.html` and return its URL.

    Args:
        output: the run's output prefix.
        rows: from `report.read_rows`.
        summary: from `report.summarize`, of the same rows.
        run: the content of `run.json`, nested as it likes.
        strips: from `load_strips(rows)`, where they are at hand already.
    """
    page = render(output.url(), rows, summary, run, load_strips(rows) if strips is None else strips)
    output.write("report.html", page.encode())
    return output.url("report.html")


def render(place: str, rows: pa.Table, summary: Summary, run: Mapping[str, Any], strips: Sequence[Strip]) -> str:
    """The page as HTML. `place` is the URL of the output prefix, shown as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_url": _crop_url, "decibels": decibels}
    failed = rows.filter(pc.not_equal(rows["status"], Status.RESTORED.value))
    return environment.get_template("report.html.j2").render(
        place=place,
        summary=summary,
        count_line=count_line(summary),
        scores=score_table(summary),
        facts=fact_table(summary),
        statuses=[(status, count) for status, count in summary["counts"].items() if count],
        known=[status.value for status in Status],
        meaning={status.value: text for status, text in _MEANING.items()},
        plots=_plots(restored_only(rows)),
        strips=strips,
        failed=failed.slice(0, MAX_FAILED).select(["key", "status", "reason"]).to_pylist(),
        failed_more=max(0, len(failed) - MAX_FAILED),
        run=list(_flat(run)),
        run_name=str(run.get("started_at") or ""),
    )


def data_url(data: bytes) -> str:
    """A PNG as a URL that holds it whole."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _crop_url(crop: Crop) -> str:
    return data_url(b"" if crop.pixels is None else png(crop.pixels))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested JSON as (dotted path, text)."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping | list | tuple) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{index}]")
    elif isinstance(value, list | tuple):
        yield path, ", ".join(map(str, value)) or "none"
    elif path:
        yield path, "none" if value is None or value == {} else str(value)


def _plots(done: pa.Table) -> list[tuple[str, str, str]]:
    """(title, note, SVG) of every plot that `done`, the restored rows, has data for."""
    plots = []
    gain, before, after = gains(done), column(done, "psnr_input"), column(done, "psnr")
    scored = np.flatnonzero(~np.isnan(gain))
    if len(scored):
        plots.append(("PSNR gain", counted(len(scored), "image"), _histogram(gain[scored])))
        shown, note = _sample(scored)
        points = (before[shown], after[shown])
        plots.append(("PSNR before and after", note, _before_after(*points)))
    pixels, seconds = megapixels(done), column(done, "seconds")
    timed = np.flatnonzero(np.isfinite(seconds) & np.isfinite(pixels))
    if len(timed):
        shown, note = _sample(timed)
        plots.append(("Network time by size", note, _speed(pixels[shown], seconds[shown])))
    return plots


def _sample(positions: np.ndarray[Any, np.dtype[np.intp]]) -> tuple[Any, str]:
    """At most `MAX_POINTS` of `positions`, the same ones every time, and a note that says how many."""
    count = len(positions)
    if count <= MAX_POINTS:
        return positions, counted(count, "image")
    sample = np.random.default_rng(0).choice(positions, MAX_POINTS, replace=False)
    return sample, f"{MAX_POINTS:,} of {count:,} images, drawn at random"


def _histogram(gain: Any) -> str:
    """Gains in dB as bars; bars below zero in the colour of trouble."""
    low, high = min(0.0, gain.min()), max(0.0, gain.max())
    step = _round_step((high - low or 1.0) / min(32, max(8, 2 * len(gain) ** 0.5)))
    edges = np.arange(np.floor(low / step), max(1, np.ceil(high / step)) + 0.5) * step  # zero is an edge
    counts, _ = np.histogram(gain, edges)
    figure, axes = _axes("gain, dB", "images")
    colours = [_ACCENT if edge > -step / 2 else _BAD for edge in edges[:-1]]
    axes.bar(edges[:-1], counts, width=step * 0.92, align="edge", color=colours)
    axes.axvline(gain.mean(), color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"mean {decibels(gain.mean())}",
        (gain.mean(), 1),
        color=_INK,
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")
    return _svg(figure, "Histogram of the PSNR gain")


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(step))
    return float(next(power * mark for mark in (1, 2, 5, 10) if power * mark >= step * 0.999))


def _before_after(before: Any, after: Any) -> str:
    low, high = min(before.min(), after.min()), max(before.max(), after.max())
    room = 0.06 * (high - low) or 1.0
    ends = (low - room, high + room)
    figure, axes = _axes("before, dB", "restored, dB")
    axes.plot(ends, ends, color=_INK, linewidth=0.8, alpha=0.5, linestyle=(0, (4, 3)))
    axes.text(0.98, 0.7, "no change", color=_INK, transform=axes.transAxes, ha="right", va="top")
    _dots(axes, before, after)
    axes.set(xlim=ends, ylim=ends)
    return _svg(figure, "PSNR after restoring against PSNR before")


def _speed(pixels: Any, seconds: Any) -> str:
    figure, axes = _axes("megapixels", "seconds")
    _dots(axes, pixels, seconds)
    axes.set(xlim=(0, pixels.max() * 1.08), ylim=(0, seconds.max() * 1.12 or 1.0))
    return _svg(figure, "Seconds in the network against megapixels")


def _dots(axes: Axes, x: Any, y: Any) -> None:
    few = len(x) <= 200
    axes.plot(x, y, "o", color=_ACCENT, markersize=5 if few else 2.5, alpha=0.8 if few else 0.35, markeredgewidth=0)


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.tick_params(length=0, pad=5)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """`figure` as an inline SVG in the page's font and colours."""
    file = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": label}):  # a salt a plot: no two share an id
        blank = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=blank)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", svg)
    for drawn, shown in _SWAP.items():
        svg = svg.replace(drawn, shown)
    return svg
