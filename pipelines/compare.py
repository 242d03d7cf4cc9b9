"""Runs of `restore` side by side: the same recipe or not, the same pixels or not, how far apart, what each cost.

Only what the runs left behind is read: run.json, summary.json and the report's rows. Every run is compared with the
first one, A; the others are B, C and so on. `compare_html` draws the page from the same numbers.
"""

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nafnet.recipe import Recipe
from pipelines.listing import ROWS
from pipelines.records import Status
from pipelines.report import (
    UNKNOWN,
    Floats,
    Summary,
    _markdown,  # the one way in which text from data is made inert
    column,
    count_line,
    counted,
    read_rows,
    seconds_text,
    summarize,
)
from pipelines.storage import StorageError, Store

TOLERANCE = 0.01  # dB
LETTERS = string.ascii_uppercase  # what the runs are called
UNRECORDED = "not recorded"

_SLACK = 1e-9  # dB: 30.01 - 30.00 is a little more than 0.01
_NAMED = 3  # keys named in a sentence
_WRITTEN = pa.array([Status.RESTORED.value, Status.SUSPECT.value])  # ends that left an image
# Parts of run.json beside the recipe, in the order they are shown. Of the job, only what the recipe does not say.
_PARTS = ("versions", "machine", "precision", "ray", "job")
_OF_THE_JOB = (
    "source",
    "reference",
    "pair",
    "include",
    "exclude",
    "limit",
    "actors",
    "max_actors",
    "gpus_per_actor",
    "ray_address",
    "max_megapixels",
    "retry_failed",
)


class NotARun(ValueError):  # noqa: N818 - it names what is wrong with the place
    """A place that holds no run of `restore`."""


class Verdict(StrEnum):
    """What a comparison came to."""

    IDENTICAL = "identical"  # one recipe, and every image has the same pixels
    WITHIN = "equal within tolerance"  # one recipe, and every PSNR is as near as was asked for
    RECIPES = "different recipes"
    DIFFER = "differ"

    @property
    def alike(self) -> bool:
        """Whether the runs agree."""
        return self in {Verdict.IDENTICAL, Verdict.WITHIN}


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What one run left: the content of run.json, its rows (`REPORT_SCHEMA`, one a key) and their summary."""

    url: str
    record: dict[str, Any]
    rows: pa.Table
    summary: Summary

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self.url.rstrip("/").rpartition("/")[2] or self.url

    @property
    def protocols(self) -> str:
        """The conventions that its scores are under."""
        return ", ".join(self.summary["protocols"])


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took. None is unknown.

    `seconds` is the time in the network over all workers, of images whose size is known too (`megapixels`).
    GPU-seconds are those times the share of a GPU that an actor reserves: an actor that copies one image while it
    restores another counts both, so they are a bound from above. CPU-seconds are times the network's threads.
    """

    seconds: float
    megapixels: float
    seconds_per_megapixel: float | None
    gpu_seconds_per_megapixel: float | None
    cpu_seconds_per_megapixel: float | None
    wall_seconds: float | None
    images_per_second: float | None


@dataclass(frozen=True, slots=True)
class Field:
    """A value of run.json that is not the same in both runs; `UNRECORDED` where one has no such field."""

    name: str
    first: Any
    other: Any


@dataclass(frozen=True, slots=True, eq=False)
class Pairing:
    """One run against the first.

    Attributes:
        letter: of the other run.
        recipe: what decides the pixels and differs.
        fields: what else differs, by part of run.json; it may change speed, and the last bits.
        only_first, only_other: keys that one run alone has.
        statuses: (key, first, other) of those that ended otherwise.
        first, other: the rows of the images that both runs wrote with the same status, in the same order.
        psnr, ssim: the other's less the first's, dB and SSIM; NaN where there is no score in both under one
            convention, 0 where both PSNRs are infinite.
        ssim_name: the column that `ssim` is of.
        digests: whether the written pixels are the same, by their digests; null where a row has none.
        inputs: how many keys of both have another fingerprint (a copied file has, its time being part of it).
        tiles, precisions: how many of the images went in other tiles, or in another precision: what memory was short
            of and what a CPU cannot do is not the recipe's.
    """

    letter: str
    recipe: tuple[Field, ...]
    fields: dict[str, tuple[Field, ...]]
    only_first: tuple[str, ...]
    only_other: tuple[str, ...]
    statuses: tuple[tuple[str, str, str], ...]
    first: pa.Table
    other: pa.Table
    psnr: Floats
    ssim: Floats
    ssim_name: str
    digests: pa.Array
    inputs: int
    tiles: int
    precisions: int
    tolerance: float

    @property
    def not_same(self) -> npt.NDArray[np.bool_]:
        """Which images are not known to have the same pixels."""
        return ~_mask(self.digests)

    @property
    def different(self) -> tuple[str, ...]:
        """Keys of the images whose pixels differ."""
        return tuple(self.first["key"].filter(pc.invert(self.digests).fill_null(False)).to_pylist())

    @property
    def unweighed(self) -> tuple[str, ...]:
        """Keys of the images that are not known to be the same, and have no two PSNRs that say how far apart."""
        return tuple(self.first["key"].filter(pa.array(self.not_same & np.isnan(self.psnr), pa.bool_())).to_pylist())

    @property
    def over(self) -> int:
        """How many images have PSNRs further apart than the tolerance."""
        return int(np.count_nonzero(np.abs(self.psnr) > self.tolerance + _SLACK))

    @property
    def verdict(self) -> Verdict:
        """In one word."""
        if self.recipe:
            return Verdict.RECIPES
        if self.only_first or self.only_other or self.statuses or self.over or self.unweighed:
            return Verdict.DIFFER
        return Verdict.WITHIN if self.not_same.any() else Verdict.IDENTICAL

    @property
    def line(self) -> str:
        """The verdict and what it rests on, in one line."""
        return f"{self.letter} against A: {self.verdict}: {'; '.join(self.findings)}"

    @property
    def findings(self) -> tuple[str, ...]:
        """What was seen, the weightiest first."""
        found = [f"{field.name}: {_short(field.first)} in A, {_short(field.other)} here" for field in self.recipe]
        for keys, where in ((self.only_first, "in A alone"), (self.only_other, "here alone")):
            if keys:
                found.append(f"{counted(len(keys), 'image')} {where} ({_some(keys)})")
        if self.statuses:
            ends = [f"{key}: {first}, here {other}" for key, first, other in self.statuses]
            found.append(f"{counted(len(ends), 'image')} ended otherwise ({_some(ends, between='; ')})")
        if len(self.first) and not self.not_same.any():
            found.append(f"the same pixels in {counted(len(self.first), 'image')}")
        elif not len(self.first):
            found.append("no image that both wrote")
        if self.different:
            found.append(f"other pixels in {len(self.different):,} of {counted(len(self.first), 'image')}")
        if self.digests.null_count:
            found.append(f"no digest of the pixels of {counted(self.digests.null_count, 'image')}")
        if (largest := self.largest("psnr")) and (largest[1] or self.not_same.any()):
            over = f", by more than {self.tolerance:g} dB in {counted(self.over, 'image')}" if self.over else ""
            found.append(f"PSNR is off by {decibels(largest[1])} at most ({largest[0]}){over}")
        if self.unweighed:
            found.append(f"no PSNR to compare {counted(len(self.unweighed), 'image')} by ({_some(self.unweighed)})")
        if protocol := self.fields.get("protocol"):
            found.append(f"scored as {protocol[0].first} in A and as {protocol[0].other} here")
        for count, what in ((self.tiles, "tiles"), (self.precisions, "precision")):
            if count:
                found.append(f"{counted(count, 'image')} in other {what}")
        return tuple(found)

    def largest(self, score: str) -> tuple[str, float] | None:
        """Key and signed difference of the image whose `score` ("psnr", "ssim") differs most; None without any."""
        values = self.psnr if score == "psnr" else self.ssim
        if np.isnan(values).all():
            return None
        at = int(np.nanargmax(np.abs(values)))
        return self.first["key"][at].as_py(), float(values[at])

    def most_different(self, count: int) -> list[int]:
        """Rows of the images that differ most, by PSNR; those without one last, equal pixels never."""
        weight = np.where(np.isnan(self.psnr), -1.0, np.abs(self.psnr))
        order = np.argsort(-weight, kind="stable")
        return [int(at) for at in order[self.not_same[order]][:count]]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """All runs, and each but the first against the first."""

    runs: tuple[Run, ...]
    pairings: tuple[Pairing, ...]
    tolerance: float  # dB

    @property
    def alike(self) -> bool:
        """Whether all agree with the first."""
        return all(pairing.verdict.alike for pairing in self.pairings)

    @property
    def verdict(self) -> Verdict:
        """That of the run that is furthest from the first."""
        order = list(Verdict)
        return max((pairing.verdict for pairing in self.pairings), key=order.index)

    @property
    def lines(self) -> tuple[str, ...]:
        """One for each run but the first."""
        return tuple(pairing.line for pairing in self.pairings)


def load_run(url: str) -> Run:
    """Read the run whose output prefix is `url`.

    Raises:
        NotARun: there is no run. Says what was looked for.
        StorageError, ReportError: it cannot be read, or a part of its report is damaged.
    """
    store = Store(url)
    record = _read_json(store, "run.json")
    if record is None:
        raise NotARun(f"no run at {store.url()}: looked for a run.json there; give the OUTPUT of nafnet restore")
    recipe = _at(record, "recipe", "hash")
    if not isinstance(recipe, str):
        raise NotARun(f"{store.url('run.json')} is not that of a run: looked for recipe.hash in it")
    rows = read_rows(store, recipe=recipe)
    if not len(rows):
        raise NotARun(f"no run at {store.url()}: looked for rows of recipe {recipe} in report/*.parquet")
    return Run(store.url(), record, rows, summarize(rows) | _timing(store, record))


def _read_json(store: Store, key: str) -> dict[str, Any] | None:
    """A JSON object, None where there is no such file."""
    try:
        found = json.loads(store.read(key))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise NotARun(f"{store.url(key)} is damaged, or is no JSON: {error}") from error
    except Exception as error:  # every fsspec backend has its own (botocore's are no OSErrors)
        hint = "check the path, the bucket and the credentials"
        raise StorageError(f"cannot read {store.url(key)}: {type(error).__name__}: {error}: {hint}") from error
    if not isinstance(found, dict):
        raise NotARun(f"{store.url(key)} is not that of a run: looked for a JSON object")
    return found


def _timing(store: Store, record: dict[str, Any]) -> dict[str, float | None]:
    """Wall time of the run that did the work: a later one that found nothing to do leaves none in summary.json."""
    stored = _read_json(store, "summary.json") or {}
    wall, rate = _number(stored.get("wall_seconds")), _number(stored.get("images_per_second"))
    if wall is None:
        try:
            started, finished = (datetime.fromisoformat(record[name]) for name in ("started_at", "finished_at"))
            wall = (finished - started).total_seconds()
        except (KeyError, TypeError, ValueError):
            wall = None
        attempted = _number(_at(record, "plan", "attempted"))
        rate = attempted / wall if attempted and wall else None
    return {"wall_seconds": wall, "images_per_second": rate}


def compare(runs: Sequence[Run], tolerance: float = TOLERANCE) -> Comparison:
    """Compare every run with the first. `tolerance` is the largest PSNR difference, in dB, that counts as equal.

    Raises:
        ValueError: fewer than two runs or too many, or a tolerance that is none.
    """
    if not 2 <= len(runs) <= len(LETTERS):
        raise ValueError(f"give two runs or more to compare, at most {len(LETTERS)}: got {len(runs)}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is a number of dB from zero up, got {tolerance}")
    others = zip(LETTERS[1:], runs[1:], strict=False)
    pairings = tuple(_pair(letter, runs[0], other, tolerance) for letter, other in others)
    return Comparison(tuple(runs), pairings, tolerance)


def _pair(letter: str, first: Run, other: Run, tolerance: float) -> Pairing:
    keys, other_keys = (run.rows["key"].combine_chunks() for run in (first, other))
    place = pc.index_in(keys, value_set=other_keys)
    a, b = first.rows.filter(place.is_valid()), other.rows.take(place.drop_null())
    same_end = pc.equal(a["status"], b["status"])
    ended = zip(*(c.filter(pc.invert(same_end)).to_pylist() for c in (a["key"], a["status"], b["status"])), strict=True)
    inputs = _count_different(a, b, "fingerprint")
    written = pc.and_(same_end, pc.is_in(a["status"], value_set=_WRITTEN))
    a, b = a.filter(written), b.filter(written)
    comparable = _mask(pc.equal(a["protocol"], b["protocol"]))
    ssim_name = "ssim_2d" if a["ssim_3d"].null_count == len(a) else "ssim_3d"
    recipe, fields = _fields(first.record, other.record)
    if first.protocols != other.protocols:
        fields = {"protocol": (Field("protocol", first.protocols or "none", other.protocols or "none"),), **fields}
    return Pairing(
        letter=letter,
        recipe=recipe,
        fields=fields,
        only_first=tuple(keys.filter(place.is_null()).to_pylist()),
        only_other=tuple(other_keys.filter(pc.invert(pc.is_in(other_keys, value_set=keys))).to_pylist()),
        statuses=tuple(ended),
        first=a,
        other=b,
        psnr=_minus(column(b, "psnr"), column(a, "psnr"), comparable),
        ssim=_minus(column(b, ssim_name), column(a, ssim_name), comparable),
        ssim_name=ssim_name,
        digests=pc.equal(a["digest"], b["digest"]).combine_chunks(),
        inputs=inputs,
        tiles=_count_different(a, b, "tile"),
        precisions=_count_different(a, b, "precision"),
        tolerance=tolerance,
    )


def _minus(left: Floats, right: Floats, where: npt.NDArray[np.bool_]) -> Floats:
    result = np.full(len(left), np.nan)
    np.subtract(left, right, out=result, where=where & (left != right))
    result[where & (left == right)] = 0  # two infinities too
    return result


def _mask(values: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Booleans, null being False."""
    return np.asarray(values.fill_null(False).to_numpy(zero_copy_only=False), dtype=bool)


def _count_different(a: pa.Table, b: pa.Table, name: str) -> int:
    """Of rows in the same order; a null is a value of its own."""
    return sum(x != y for x, y in zip(a[name].to_pylist(), b[name].to_pylist(), strict=True))


def _fields(
    first: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[tuple[Field, ...], dict[str, tuple[Field, ...]]]:
    """What differs: of the recipe, and of the other parts of run.json."""
    recipe: tuple[Field, ...] = ()
    if _at(first, "recipe", "hash") != _at(other, "recipe", "hash"):
        found = _different(first["recipe"], other["recipe"])
        # Alike in every field: another version of the package means something else by them.
        recipe = tuple(field for field in found if field.name != "hash") or tuple(found)
    parts: dict[str, tuple[Field, ...]] = {}
    for part in _PARTS:
        a, b = first.get(part, {}), other.get(part, {})
        if part == "job" and isinstance(a, Mapping) and isinstance(b, Mapping):
            a, b = ({name: job[name] for name in _OF_THE_JOB if name in job} for job in (a, b))
        if found := _different(a, b):
            parts[part] = tuple(found)
    return recipe, parts


def _different(first: Any, other: Any) -> list[Field]:
    a, b = dict(_leaves(first)), dict(_leaves(other))
    fields = [Field(name, a.get(name, UNRECORDED), b.get(name, UNRECORDED)) for name in a | b]
    return [field for field in fields if field.first != field.other]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested JSON as (dotted path, plain value or list of plain values)."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(inner, Mapping | list) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def cost(run: Run) -> Cost:
    """What `run` took."""
    seconds, size = column(run.rows, "seconds"), column(run.rows, "width") * column(run.rows, "height") / 1e6
    timed = np.isfinite(seconds) & np.isfinite(size)
    total, megapixels = float(seconds[timed].sum()), float(size[timed].sum())
    each = total / megapixels if megapixels else None
    gpus = _number(_at(run.record, "ray", "pool", "gpus"))
    if gpus is None:  # the last run of several had nothing left for Ray to do
        gpus = _number(_at(run.record, "job", "gpus_per_actor"))
    threads = _number(_at(run.record, "ray", "threads"))
    if _at(run.record, "recipe", "deterministic") is True:
        threads = 1
    return Cost(
        seconds=total,
        megapixels=megapixels,
        seconds_per_megapixel=each,
        gpu_seconds_per_megapixel=each * gpus if each is not None and gpus else None,
        cpu_seconds_per_megapixel=each * threads if each is not None and threads and gpus == 0 else None,
        wall_seconds=run.summary["wall_seconds"],
        images_per_second=run.summary["images_per_second"],
    )


def _at(value: Any, *names: str) -> Any:
    """`value[a][b]`, None where there is nothing: records of earlier versions hold less."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def table(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """(what, one text a run) for all that is worth reading side by side; rows that no run has are left out."""
    runs = comparison.runs
    costs = [cost(run) for run in runs]
    pairs: list[Pairing | None] = [None, *comparison.pairings]
    rows = [
        ("images", [f"{run.summary['images']:,}" for run in runs]),
        ("restored", [f"{run.summary['counts'][Status.RESTORED.value]:,}" for run in runs]),
        ("scored as", [run.protocols for run in runs]),
        ("mean PSNR before", [_text("{:.4f} dB", run.summary["psnr_input"]) for run in runs]),
        ("mean PSNR", [_text("{:.4f} dB", run.summary["psnr"]) for run in runs]),
        ("mean SSIM-3D", [_text("{:.4f}", run.summary["ssim_3d"]) for run in runs]),
        ("mean SSIM-2D", [_text("{:.4f}", run.summary["ssim_2d"]) for run in runs]),
        ("PSNR less that of A, mean", [_text("{:+.4f} dB", _mean(pair.psnr) if pair else None) for pair in pairs]),
        ("PSNR less that of A, largest", [_largest(pair, "psnr", "{:+.4f} dB") for pair in pairs]),
        ("SSIM less that of A, largest", [_largest(pair, "ssim", "{:+.6f}") for pair in pairs]),
        ("pixels differ in", [_pixels(pair) for pair in pairs]),
        ("device", [_device(run) for run in runs]),
        ("network time", [seconds_text(cost.seconds or None) for cost in costs]),
        ("network s/MP", [_text("{:.4f}", cost.seconds_per_megapixel) for cost in costs]),
        ("GPU-s/MP", [_text("{:.4f}", cost.gpu_seconds_per_megapixel) for cost in costs]),
        ("CPU-s/MP", [_text("{:.4f}", cost.cpu_seconds_per_megapixel) for cost in costs]),
        ("wall time", [seconds_text(cost.wall_seconds) for cost in costs]),
        ("images/s", [_text("{:.2f}", cost.images_per_second) for cost in costs]),
    ]
    return [(what, [value or UNKNOWN for value in values]) for what, values in rows if {*values} - {"", UNKNOWN}]


def _mean(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _largest(pair: Pairing | None, score: str, form: str) -> str:
    found = pair and pair.largest(score)
    return _text(form, found[1]) if found else ""


def _pixels(pair: Pairing | None) -> str:
    known = pair and len(pair.first) - pair.digests.null_count
    return f"{len(pair.different):,} of {known:,}" if pair and known else ""


def _device(run: Run) -> str:
    """What the network ran on: the kinds there are among the cluster's machines, or, unknown, the driver's."""
    on_gpu = bool(_number(_at(run.record, "ray", "pool", "gpus")) or _number(_at(run.record, "job", "gpus_per_actor")))
    machines = _at(run.record, "ray", "machines") or [_at(run.record, "machine")]
    known = [machine for machine in machines if isinstance(machine, Mapping)] if isinstance(machines, list) else []
    if not on_gpu:
        return " and ".join(sorted({str(machine["cpu"]) for machine in known if machine.get("cpu")}))
    gpus = {str(gpu) for machine in known for gpu in machine.get("gpus") or ()}
    return " and ".join(sorted(gpus)) or "a GPU"


def decibels(difference: float) -> str:
    """A difference in dB with its sign, fine enough for rounding's last digits."""
    return _text("{:+.4f} dB", difference)


def _text(form: str, value: float | None) -> str:
    if value is None:
        return ""
    if np.isinf(value):
        return "infinite"
    return form.format(value).replace("-", "\N{MINUS SIGN}")


def _some(keys: Sequence[str], *, between: str = ", ") -> str:
    more = f" and {len(keys) - _NAMED:,} more" if len(keys) > _NAMED else ""
    return between.join(keys[:_NAMED]) + more


def _short(value: Any) -> str:
    """A value of run.json in a sentence; hashes shortened."""
    text = value_text(value)
    return text if len(text) <= 32 else f"{text[:12]}\N{HORIZONTAL ELLIPSIS}"


def value_text(value: Any) -> str:
    """A value of run.json as text."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None or value == {} else str(value)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers, ready for JSON: None is unknown, an infinite difference is the word "infinite"."""
    return {
        "verdict": comparison.verdict.value,
        "alike": comparison.alike,
        "tolerance_db": comparison.tolerance,
        "runs": [
            {
                "letter": letter,
                "place": run.url,
                "recipe": run.record["recipe"]["hash"],
                "started_at": run.record.get("started_at"),
                "inputs": inputs_hash(run.rows),
                "count_line": count_line(run.summary),
                **{name: run.summary[name] for name in ("images", "counts", "protocols", "psnr_input", "psnr")},
                **{name: run.summary[name] for name in ("ssim_3d_input", "ssim_3d", "ssim_2d_input", "ssim_2d")},
                "cost": {name: getattr(cost(run), name) for name in Cost.__slots__},
            }
            for letter, run in zip(LETTERS, comparison.runs, strict=False)
        ],
        "against_first": [_pairing_json(pairing) for pairing in comparison.pairings],
    }


def _pairing_json(pairing: Pairing) -> dict[str, Any]:
    return {
        "letter": pairing.letter,
        "verdict": pairing.verdict.value,
        "findings": list(pairing.findings),
        "recipe": _fields_json(pairing.recipe),
        "fields": {part: _fields_json(fields) for part, fields in pairing.fields.items()},
        "only_in_first": list(pairing.only_first),
        "only_in_other": list(pairing.only_other),
        "statuses": [dict(zip(("key", "first", "other"), end, strict=True)) for end in pairing.statuses],
        "images": len(pairing.first),
        "psnr": {**_score_json(pairing, "psnr"), "over_tolerance": pairing.over, "unweighed": list(pairing.unweighed)},
        "ssim": {"column": pairing.ssim_name, **_score_json(pairing, "ssim")},
        "pixels": {
            "different": len(pairing.different),
            "unknown": pairing.digests.null_count,
            "keys": list(pairing.different),
        },
        "other_inputs": pairing.inputs,
        "other_tiles": pairing.tiles,
        "other_precision": pairing.precisions,
    }


def _fields_json(fields: Sequence[Field]) -> list[dict[str, Any]]:
    return [{"name": field.name, "first": field.first, "other": field.other} for field in fields]


def _score_json(pairing: Pairing, score: str) -> dict[str, Any]:
    values = pairing.psnr if score == "psnr" else pairing.ssim
    key, largest = pairing.largest(score) or (None, None)
    word = "infinite" if largest is not None and np.isinf(largest) else largest
    return {"compared": int(np.count_nonzero(~np.isnan(values))), "mean": _mean(values), "largest": word, "key": key}


def terminal(comparison: Comparison) -> str:
    """The runs, their numbers in columns, and the verdict."""
    letters = LETTERS[: len(comparison.runs)]
    lines = [f"{letter}  {run.url}" for letter, run in zip(letters, comparison.runs, strict=True)]
    rows = [("", list(letters)), *table(comparison)]
    first = max(len(what) for what, _ in rows)
    widths = [max(len(values[i]) for _, values in rows) for i in range(len(letters))]
    for what, values in rows:
        cells = (value.rjust(width) for value, width in zip(values, widths, strict=True))
        lines.append(f"{what:<{first}}  {'  '.join(cells)}".rstrip())
    return "\n".join([*lines, *comparison.lines])


def markdown(comparison: Comparison) -> str:
    """The same as Markdown, with everything that came from data escaped."""
    letters = LETTERS[: len(comparison.runs)]
    lines = [f"**{line}**\n" for line in map(_markdown, comparison.lines)]
    lines += [f"| | {' | '.join(letters)} |", f"|---|{'--:|' * len(letters)}"]
    lines += [f"| {what} | {' | '.join(map(_markdown, values))} |" for what, values in table(comparison)]
    places = zip(letters, comparison.runs, strict=True)
    return "\n".join([*lines, "", *(f"- {letter}: {_markdown(run.url)}" for letter, run in places)]) + "\n"


def inputs_hash(rows: pa.Table) -> str:
    """SHA-256 over the sorted (key, fingerprint) pairs: what a run was made of. Takes any table with those columns.

    A fingerprint is the store's etag, or size and time of a file: equal hashes are the same inputs, while copies of
    the same files may have another hash.
    """
    content = hashlib.sha256()
    pairs = rows.select(["key", "fingerprint"])
    pairs = pairs.sort_by([(name, "ascending") for name in pairs.column_names])
    for some in pairs.to_batches(max_chunksize=ROWS):
        for pair in zip(*(values.to_pylist() for values in some.columns), strict=True):
            content.update(json.dumps(pair).encode() + b"\n")
    return content.hexdigest()


def precision_flags(recipe: Recipe, threads: int | None) -> dict[str, Any]:
    """The switches of torch that the recipe sets (`nafnet.restore`), and the threads of an actor's network."""
    return {
        "dtype": recipe.precision,
        "tf32": recipe.tf32,
        "deterministic": recipe.deterministic,
        "cudnn_deterministic": recipe.deterministic,
        "cudnn_benchmark": False,
        "threads": 1 if recipe.deterministic else threads,
    }
