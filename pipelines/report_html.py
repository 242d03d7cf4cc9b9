"""report.html: the summary, the plots and the comparison sheet as one file that loads nothing else."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.records import Status
from pipelines.report import (
    Floats,
    Summary,
    column,
    count_line,
    counted,
    decibels,
    fact_table,
    gains,
    number_text,
    restored_only,
    score_table,
    seconds_text,
)
from pipelines.report_plots import plots
from pipelines.report_sheet import Crop, Strip, load_strips, png
from pipelines.storage import Store

MAX_FAILED = 100  # rows of the table of images that were not restored
MAX_LISTED = 10  # rows of the tables of the worst and the slowest images
_ENVIRONMENT = ("versions", "machine", "ray", "recipe")  # of run.json, shown; the rest is folded

_MEANING = {
    Status.RESTORED: "restored and written",
    Status.UNREADABLE: "not an image, or damaged",
    Status.MISSING: "the image or its reference is not there",
    Status.MISMATCHED: "the reference has another size or number of channels",
    Status.REFUSED: "an image that this job does not touch",
    Status.SUSPECT: "the result was implausible, the input was written in its place",
    Status.CRASHED: "the process failed while it held this image",
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
    environment.filters |= {
        "data_url": _crop_url,
        "decibels": decibels,
        "number": number_text,
        "counted": counted,
        "seconds": seconds_text,
    }
    failed = rows.filter(pc.not_equal(rows["status"], Status.RESTORED.value))
    first = {name: list(_flat(run[name])) for name in _ENVIRONMENT if isinstance(run.get(name), Mapping)}
    return environment.get_template("report.html.j2").render(
        place=place,
        summary=summary,
        count_line=count_line(summary),
        scores=score_table(summary),
        facts=fact_table(summary),
        statuses=[(status, count) for status, count in summary["counts"].items() if count],
        known=[status.value for status in Status],
        meaning={status.value: text for status, text in _MEANING.items()},
        strips=strips,
        plots=plots(restored_only(rows)),
        sequences=summary["sequences"],
        sequences_without=len(rows) - sum(one["images"] for one in summary["sequences"]) if summary["sequences"] else 0,
        ssim=next((name for name in ("ssim_3d", "ssim_2d") if summary[name] is not None), None),
        worst=worst(rows),
        slowest=slowest(rows),
        failed=failed.slice(0, MAX_FAILED).select(["key", "status", "reason"]).to_pylist(),
        failed_more=max(0, len(failed) - MAX_FAILED),
        environment={name: pairs for name, pairs in first.items() if pairs},
        run=list(_flat({name: value for name, value in run.items() if not first.get(name)})),
        run_name=str(run.get("started_at") or ""),
    )


def worst(rows: pa.Table) -> list[dict[str, Any]]:
    """The `MAX_LISTED` restored rows with the least gain, or PSNR when none has a gain."""
    done = restored_only(rows)
    gain, after = gains(done), column(done, "psnr")
    by_gain = not np.isnan(gain).all()
    found = _first(done, gain if by_gain else np.where(np.isfinite(after), after, np.nan))
    return [
        row | {"gain": row["psnr"] - row["psnr_input"] if by_gain else None}
        for row in found.select(["key", "psnr_input", "psnr"]).to_pylist()
    ]


def slowest(rows: pa.Table) -> list[dict[str, Any]]:
    """The `MAX_LISTED` rows with the longest time in the network, whatever came of them: key, size, seconds, tiles."""
    found = _first(rows, -column(rows, "seconds"))
    return list(found.select(["key", "width", "height", "seconds", "tiles"]).to_pylist())


def _first(rows: pa.Table, values: Floats) -> pa.Table:
    """The rows of the `MAX_LISTED` least `values`, least first; those without (NaN) are left out."""
    order = np.argsort(values, kind="stable")
    return rows.take(order[~np.isnan(values[order])][:MAX_LISTED])


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
