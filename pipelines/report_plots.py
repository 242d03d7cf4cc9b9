"""The report's plots as inline SVG, in the colours and the font of the page that they stand in."""

import io
import re
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.report import Floats, column, counted, decibels, gains, megapixels

Positions = npt.NDArray[np.intp]

MAX_POINTS = 2000  # of a scatter plot; more are sampled
_FINEST_DB, _FINEST_SSIM = 0.01, 0.0001  # bars no narrower than the digits that the page shows

# Drawn in colours that nothing else uses, then swapped for the page's own: plots follow light and dark.
_INK, _ACCENT, _BAD, _SOFT = "#010203", "#040506", "#070809", "#0a0b0c"
_SWAP = {_INK: "currentColor", _ACCENT: "var(--accent)", _BAD: "var(--bad)", _SOFT: "var(--soft)"}
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


def plots(done: pa.Table) -> list[tuple[str, str, str]]:
    """(title, note, SVG) of every plot that `done`, the restored rows, has data for."""
    drawn = []
    gain, before = gains(done), column(done, "psnr_input")
    ssim = "ssim_2d" if done["ssim_3d"].null_count == len(done) else "ssim_3d"  # the convention's own
    for title, name, unit, finest in (
        ("PSNR", "psnr", ", dB", _FINEST_DB),
        (ssim.replace("_", " ").upper(), ssim, "", _FINEST_SSIM),
    ):
        sides = {"before": _finite(column(done, f"{name}_input")), "restored": _finite(column(done, name))}
        if len(sides["restored"]):
            plot = _distributions(sides, f"{title}{unit}", finest)
            drawn.append((f"{title}, before and restored", counted(len(sides["restored"]), "image"), plot))
    scored = np.flatnonzero(~np.isnan(gain))
    if len(scored):
        drawn.append(("PSNR gain", counted(len(scored), "image"), _histogram(gain[scored])))
        shown, note = _sample(scored)
        drawn.append(("Gain by input quality", note, _gain_by_input(before[shown], gain[shown])))
    pixels, seconds = megapixels(done), column(done, "seconds")
    timed = np.flatnonzero(np.isfinite(seconds) & np.isfinite(pixels))
    if len(timed):
        shown, note = _sample(timed)
        drawn.append(("Network time by size", note, _speed(pixels[shown], seconds[shown])))
    return drawn


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _sample(positions: Positions) -> tuple[Positions, str]:
    """At most `MAX_POINTS` of `positions`, the same ones every time, and a note that says how many."""
    count = len(positions)
    if count <= MAX_POINTS:
        return positions, counted(count, "image")
    sample = np.random.default_rng(0).choice(positions, MAX_POINTS, replace=False)
    return sample, f"{MAX_POINTS:,} of {count:,} images, drawn at random"


def bars(values: Floats, step: float) -> tuple[Floats, npt.NDArray[np.intp]]:
    """Edges, multiples of `step`, and how many of `values` lie between each two; a value on an edge lies above it."""
    bins = np.floor(values / step + 1e-9).astype(np.intp)
    first = bins.min()
    counts = np.bincount(bins - first)
    return (first + np.arange(len(counts) + 1)) * step, counts


def _distributions(sides: dict[str, Floats], label: str, finest: float) -> str:
    """Outlines of the named distributions over common bars, filled."""
    everything = np.concatenate(list(sides.values()))
    most = min(32, max(8, 2 * len(everything) ** 0.5))
    step = _round_step(max(float(np.ptp(everything)) / most, finest))
    figure, axes = _axes(label, "images")
    for (name, values), colour in zip(sides.items(), (_SOFT, _ACCENT), strict=True):
        if len(values):
            edges, counts = bars(values, step)
            axes.stairs(counts, edges, label=name, fill=True, facecolor=(colour, 0.3), edgecolor=colour, linewidth=1.2)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0, fontsize=9, labelcolor=_INK
    )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(visible=False, axis="x")
    return _svg(figure, f"Distributions of {label} before and after restoring")


def _histogram(gain: Floats) -> str:
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


def _gain_by_input(before: Floats, gain: Floats) -> str:
    figure, axes = _axes("PSNR before, dB", "gain, dB")
    axes.axhline(0, color=_INK, linewidth=0.8, alpha=0.5, linestyle=(0, (4, 3)))
    for colour, those in ((_ACCENT, gain >= 0), (_BAD, gain < 0)):
        if those.any():
            _dots(axes, before[those], gain[those], len(gain), colour)
    low, high = min(0.0, gain.min()), max(0.0, gain.max())
    room = 0.08 * (high - low) or 1.0
    axes.set_ylim(low - room * (low < 0), high + room)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return _svg(figure, "PSNR gain against PSNR before")


def _speed(pixels: Floats, seconds: Floats) -> str:
    figure, axes = _axes("megapixels", "seconds")
    _dots(axes, pixels, seconds, len(pixels), _ACCENT)
    axes.set(xlim=(0, pixels.max() * 1.08), ylim=(0, seconds.max() * 1.12 or 1.0))
    return _svg(figure, "Seconds in the network against megapixels")


def _dots(axes: Axes, x: Floats, y: Floats, count: int, colour: str) -> None:
    """Points in `colour`; smaller and fainter where `count`, that of the whole plot, is large."""
    few = count <= 200
    axes.plot(x, y, "o", color=colour, markersize=5 if few else 2.5, alpha=0.8 if few else 0.35, markeredgewidth=0)


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
