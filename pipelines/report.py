"""What a run came to, in numbers: report parts -> one row per key -> summary, count line, Markdown.

`report_html` draws the page from the same rows and the same tables, so the two never disagree.
"""

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nafnet.conventions import Convention
from nafnet.recipe import Recipe
from pipelines.arrow import arrow_file
from pipelines.listing import mapped
from pipelines.records import REPORT_SCHEMA, Status
from pipelines.storage import Store

Floats = npt.NDArray[np.float64]
Summary = dict[str, Any]  # JSON-ready: see `summarize`

UNKNOWN = "\N{EN DASH}"
_APPROXIMATE = "tiles are approximate: without TLC a tile's means are not the image's"
MAX_NOTES = 5  # of the rows' different notes, the most frequent first
MAX_SEQUENCES = 200  # more would be folders that hold a few images each: another way of listing all images
_READERS = 8  # parts that are fetched at once: they are small, and a bucket takes its time for each
SCORES = ("psnr_input", "psnr", "ssim_3d_input", "ssim_3d", "ssim_2d_input", "ssim_2d")
# What the summary and the page are made of: a third of a row, the rest of which is URLs and how it was made.
SHOWN = (
    *("key", "status", "reason", "width", "height", "protocol", *SCORES),
    *("seconds", "tiles", "tile", "precision", "note", "retries"),
)
_SEQUENCES = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        r"(?:^|/)(GOPR\d+_\d+_\d+)[-/]",  # GoPro's tree, its flat repacks, LMDB, shards
        r"(?:^|/)(\d{3})[_/]\d{8}\.\w+$",  # REDS: folders, LMDB
        r"(?:^|/)(\d{4})_\d{2}\.\w+$",  # SIDD's blocks: the scene
        r"^(?:[^/]+\.tar/)?(?![^/]+\.tar/)([^/]+)/",  # anything else: the first folder, within a shard
    )
)


class ReportError(Exception):
    """A file below `report/` that is not a whole report part."""


def read_rows(
    output: Store,
    columns: Sequence[str] = REPORT_SCHEMA.names,
    *,
    recipe: str | None = None,
    keys: pa.Array | None = None,
) -> pa.Table:
    """One row per key, sorted by key, with these columns of `REPORT_SCHEMA`; of a repeated key the latest counts.

    With `recipe` (a hash), only rows of that recipe are looked at, with `keys` (a few) only theirs. No parts give an
    empty table.

    Raises:
        ReportError: a part is truncated, or is not a report part. Names the file.
    """
    needed = dict.fromkeys((*columns, "key", "finished_at"))
    empty = pa.schema([REPORT_SCHEMA.field(name) for name in needed]).empty_table()
    table = pa.concat_tables([empty, *read_parts(output, needed, recipe=recipe, keys=keys)])
    order = pc.sort_indices(table, sort_keys=[("key", "ascending"), ("finished_at", "descending")])
    keys = table["key"].take(order).combine_chunks()
    latest = pa.concat_arrays([pa.array([True] * bool(len(keys)), pa.bool_()), pc.not_equal(keys[1:], keys[:-1])])
    return table.select(list(columns)).take(order.filter(latest))


def part_names(output: Store) -> list[str]:
    """The names of the report's parts, sorted, which is by the second they were written in.

    What is no `.parquet` file, such as the rest of a write that was killed, is left alone.
    """
    if not output.exists("report"):
        return []
    return [entry.key for entry in Store(output.url("report")).list() if entry.key.endswith(".parquet")]


def read_parts(
    output: Store,
    columns: Iterable[str] = REPORT_SCHEMA.names,
    *,
    names: Iterable[str] | None = None,
    recipe: str | None = None,
    keys: pa.Array | None = None,
) -> Iterator[pa.Table]:
    """Each of the report's parts, or of those with these names, with these columns; a key may be in several.

    With `recipe` (a hash) only rows of that recipe, with `keys` (a few) only theirs.

    Raises:
        ReportError: a part is truncated, or is not a report part. Names the file.
    """
    names = part_names(output) if names is None else names
    store = Store(output.url("report"))
    read = partial(_read_part, store, columns=list(columns), recipe=recipe, keys=keys)
    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(read, names)


def _read_part(store: Store, name: str, columns: list[str], recipe: str | None, keys: pa.Array | None) -> pa.Table:
    data = store.read(name)
    try:
        file = pq.ParquetFile(arrow_file(data))
        there = file.schema_arrow.names
        if lacking := [field.name for field in REPORT_SCHEMA if not field.nullable and field.name not in there]:
            raise KeyError(f"it lacks {', '.join(lacking)}")
        wanted = [field for field in REPORT_SCHEMA if field.name in {*columns, "key", "recipe"}]
        part = file.read([field.name for field in wanted if field.name in there])
        for field in wanted:
            if field.name not in there:  # of an earlier version, which had fewer columns
                part = part.append_column(field, pa.nulls(len(part), field.type))
        part = part.select([field.name for field in wanted]).cast(pa.schema(wanted))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ReportError(
            f"{store.url(name)} is not a whole report part ({error}): move it out of the folder, "
            "then run the job again to redo its images"
        ) from error
    if recipe is not None:
        part = part.filter(pc.equal(part["recipe"], recipe))
    if keys is not None:
        part = part.filter(pc.is_in(part["key"], value_set=keys))
    return part.select(columns)


def restored_only(rows: pa.Table) -> pa.Table:
    """The rows whose image was restored."""
    return rows.filter(pc.equal(rows["status"], Status.RESTORED.value))


def column(rows: pa.Table, name: str) -> Floats:
    """A numeric column as float64, NaN for null."""
    return np.asarray(rows[name].cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def megapixels(rows: pa.Table) -> Floats:
    """Megapixels of every row, NaN where nothing was decoded."""
    return column(rows, "width") * column(rows, "height") / 1e6


def gains(rows: pa.Table) -> Floats:
    """PSNR gain of every row in dB; NaN where it has no score or one of its two PSNRs is infinite."""
    before, after = column(rows, "psnr_input"), column(rows, "psnr")
    gain = np.full(len(before), np.nan)
    np.subtract(after, before, out=gain, where=np.isfinite(before) & np.isfinite(after))
    return gain


def sequence(key: str) -> str | None:
    """What `key` is one image of: a GoPro or REDS sequence, a SIDD scene, else its first folder; None without one."""
    found = next(filter(None, (pattern.search(key) for pattern in _SEQUENCES)), None)
    return found[1] if found else None


def by_sequence(rows: pa.Table) -> list[dict[str, Any]]:
    """What each sequence came to, sorted by name; empty unless there are 2 to `MAX_SEQUENCES` of them.

    `images` and `restored` are counts. The rest are means over its restored rows with finite values, None where there
    is none: the scores under their columns' names, `gain` in dB, `network_seconds_mean`. Keys of no sequence are
    left out.
    """
    names = mapped(rows["key"], sequence).combine_chunks().dictionary_encode()
    found = sorted((name, code) for code, name in enumerate(names.dictionary.to_pylist()))
    if not 2 <= len(found) <= MAX_SEQUENCES:
        return []
    codes = pc.fill_null(names.indices, -1).to_numpy()
    restored = rows["status"].to_numpy(zero_copy_only=False) == Status.RESTORED.value
    values = {name: column(rows, name) for name in SCORES}
    values |= {"gain": gains(rows), "network_seconds_mean": column(rows, "seconds")}
    means = []
    for name, code in found:
        images = np.flatnonzero(codes == code)
        done = images[restored[images]]
        scores = {what: _mean(numbers[done]) for what, numbers in values.items()}
        means.append({"sequence": name, "images": len(images), "restored": len(done), **scores})
    return means


def extremes(values: Floats) -> tuple[int, int, int] | None:
    """Positions of the least, the (lower) median and the greatest value; None when all are NaN."""
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
    return (int(order[0]), int(order[(len(order) - 1) // 2]), int(order[-1])) if len(order) else None


def summarize(
    rows: pa.Table, *, recipe: Recipe | None = None, wall_seconds: float | None = None, wall_images: int | None = None
) -> Summary:
    """The run in numbers, ready for JSON: None stands for what is unknown, never NaN or infinity.

    Every mean is over restored rows with a finite value; `gain` needs both PSNRs finite, so it can differ
    from the difference of the two means. An infinite PSNR (the image equals its reference) is counted in
    `identical_input` or `identical_restored`. PSNR and gain in dB, times in seconds. `protocols` names the
    convention the scores are under, as the rows do, and `conventions` says it in words; more than one of them
    means that the means mix what cannot be compared. `tiled` counts the restored images that went through in tiles,
    `noted` all rows with a note; `notes` are the `MAX_NOTES` most frequent ones. `sequences` is from `by_sequence`.

    Args:
        rows: from `read_rows`.
        recipe: that of the rows; without it nothing is said of what differs from it.
        wall_seconds: how long the run took.
        wall_images: how many of the rows were made in that time (fewer than all of them after a resume).
    """
    done = restored_only(rows)
    values = {name: column(done, name) for name in SCORES}
    gain, pixels, seconds = gains(done), megapixels(done), column(done, "seconds")
    timed = np.isfinite(seconds) & np.isfinite(pixels)
    network = float(seconds[timed].sum())
    found = {item["values"]: item["counts"] for item in pc.value_counts(rows["status"]).to_pylist()}
    counts = {status.value: found.pop(status.value, 0) for status in Status} | found
    handled = len(rows) if wall_images is None else wall_images
    protocols = sorted(pc.unique(done["protocol"].drop_null()).to_pylist())
    return {
        "images": len(rows),
        "counts": counts,
        "scored": int(np.count_nonzero(~np.isnan(values["psnr"]))),
        "protocols": protocols,
        "conventions": [Convention.parse(name).words for name in protocols],
        **{name: _mean(scores) for name, scores in values.items()},
        "gain": _mean(gain),
        "gain_images": int(np.count_nonzero(~np.isnan(gain))),
        "identical_input": int(np.isinf(values["psnr_input"]).sum()),
        "identical_restored": int(np.isinf(values["psnr"]).sum()),
        **_named_extremes(done, gain),
        "tiled": len(done) - done["tile"].null_count,
        "tiles_approximate": recipe is not None and not all(step.tlc for step in recipe.steps),
        "other_precisions": {name: n for name, n in _counts(done, "precision") if recipe and name != recipe.precision},
        "noted": len(rows) - rows["note"].null_count,
        "notes": [{"note": note, "images": n} for note, n in _counts(rows, "note")[:MAX_NOTES]],
        "megapixels": float(np.nansum(pixels)),
        "network_seconds": network,
        "network_seconds_mean": _mean(seconds),
        "network_seconds_p50": _percentile(seconds, 50),
        "network_seconds_p95": _percentile(seconds, 95),
        "megapixels_per_network_second": float(pixels[timed].sum()) / network if network > 0 else None,
        "wall_seconds": wall_seconds,
        "images_per_second": handled / wall_seconds if wall_seconds and handled else None,
        "storage_retries": pc.sum(rows["retries"]).as_py() or 0,
        "sequences": by_sequence(rows),
    }


def _counts(rows: pa.Table, name: str) -> list[tuple[str, int]]:
    """The values of a column and how many rows have them, most frequent first, nulls left out."""
    found = pc.value_counts(rows[name].drop_null()).to_pylist()
    return sorted(((item["values"], item["counts"]) for item in found), key=lambda item: -item[1])


def _mean(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _percentile(values: Floats, percent: float) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.percentile(finite, percent)) if len(finite) else None


def _named_extremes(rows: pa.Table, gain: Floats) -> dict[str, dict[str, Any] | None]:
    names = ("worst", "median", "best")
    found = extremes(gain)
    if found is None:
        return dict.fromkeys(names)
    return {
        name: {"key": rows["key"][at].as_py(), "gain": float(gain[at])} for name, at in zip(names, found, strict=True)
    }


def count_line(summary: Summary) -> str:
    """One line such as "12 images: 10 restored, 1 unreadable, 1 missing"."""
    total = summary["images"]
    counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items() if count)
    return f"{total} {'image' if total == 1 else 'images'}" + (f": {counts}" if counts else "")


def counted(count: int, noun: str) -> str:
    """Such as "1 image" or "1,200 images"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def write_summary(output: Store, summary: Summary) -> str:
    """Write `summary.json` and return its URL."""
    output.write("summary.json", json.dumps(summary, indent=2, allow_nan=False).encode() + b"\n")
    return output.url("summary.json")


def score_table(summary: Summary) -> list[tuple[str, str, str, str]]:
    """(score, before, restored, change) for the scores this run has; no rows when nothing was scored.

    The SSIM of the convention comes first: SSIM 3D where there is one, which the others leave out.
    """
    rows = [("PSNR", "psnr", "{:.2f} dB", summary["gain"])]
    for name, label in (("ssim_3d", "SSIM 3D"), ("ssim_2d", "SSIM 2D")):
        before, after = summary[f"{name}_input"], summary[name]
        rows.append((label, name, "{:.4f}", None if None in (before, after) else after - before))
    return [
        (
            label,
            number_text(summary[f"{name}_input"], form),
            number_text(summary[name], form),
            number_text(change, form.replace(":", ":+")),
        )
        for label, name, form, change in rows
        if summary[name] is not None or summary[f"{name}_input"] is not None
    ]


def fact_table(summary: Summary) -> list[tuple[str, str]]:
    """(what, value) for everything else worth reading; what is unknown is left out."""
    approximate = f": {_APPROXIMATE}" if summary["tiles_approximate"] else ""
    others = summary["noted"] - sum(note["images"] for note in summary["notes"])
    facts = [
        ("Images", f"{summary['images']:,}"),
        ("Restored", f"{summary['counts'][Status.RESTORED.value]:,}"),
        ("Scored against a reference", f"{summary['scored']:,}"),
        ("Scoring protocol", ", ".join(summary["protocols"])),
        ("Scores", "; ".join(summary["conventions"])),
        ("Same as reference, before", f"{summary['identical_input'] or ''}"),
        ("Same as reference, restored", f"{summary['identical_restored'] or ''}"),
        *((f"{name.title()} gain", _pick(summary[name])) for name in ("worst", "median", "best")),
        ("Restored in tiles", f"{summary['tiled']:,}{approximate}" if summary["tiled"] else ""),
        *((f"Restored in {name} instead", f"{count:,}") for name, count in summary["other_precisions"].items()),
        *((f"Noted of {counted(note['images'], 'image')}", note["note"]) for note in summary["notes"]),
        ("With other notes", f"{others:,}" if others else ""),
        ("Restored pixels", f"{summary['megapixels']:,.1f} MP"),
        ("Network time, all workers", seconds_text(summary["network_seconds"])),
        ("Network time, mean per image", seconds_text(summary["network_seconds_mean"])),
        ("Network time, median", seconds_text(summary["network_seconds_p50"])),
        ("Network time, 95th percentile", seconds_text(summary["network_seconds_p95"])),
        ("Megapixels per network second", number_text(summary["megapixels_per_network_second"], "{:,.2f}")),
        ("Wall time", seconds_text(summary["wall_seconds"])),
        ("Images per second", number_text(summary["images_per_second"], "{:,.2f}")),
        ("Storage retries", f"{summary['storage_retries']:,}" if summary["storage_retries"] else ""),
    ]
    return [(what, value) for what, value in facts if value not in {"", UNKNOWN}]


def summary_markdown(summary: Summary) -> str:
    """The numbers of the page's summary as Markdown, with everything that came from data escaped."""
    lines = [f"**{_markdown(count_line(summary))}**", ""]
    scores = score_table(summary)
    if scores:
        lines += ["| Score, mean | Before | Restored | Change |", "|---|--:|--:|--:|"]
        lines += [f"| {' | '.join(row)} |" for row in scores] + [""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {what} | {_markdown(value)} |" for what, value in fact_table(summary)]
    return "\n".join(lines) + "\n"


def seconds_text(seconds: float | None) -> str:
    """A duration as a person would write it: 85 ms, 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def decibels(gain: float) -> str:
    """A gain with its sign."""
    return number_text(gain, "{:+.2f} dB")


def number_text(value: float | None, form: str) -> str:
    """`value` in a format such as "{:+.2f} dB", with a typographic minus; a dash for None."""
    return UNKNOWN if value is None else form.format(value).replace("-", "\N{MINUS SIGN}")


def _pick(pick: Mapping[str, Any] | None) -> str:
    return UNKNOWN if pick is None else f"{decibels(pick['gain'])}, {pick['key']}"


def _markdown(text: str) -> str:
    """`text` as inert Markdown on one line: HTML and the characters that start markup escaped."""
    plain = html.escape(" ".join(text.split()))
    return "".join(f"\\{mark}" if mark in "\\`*_[]|~!" else mark for mark in plain)
