"""What happens to one row before and after its network: fetch it, finish it. Plain functions over Arrow tables.

Between the stages a row carries pixels; what `finish` returns does not. A stage leaves a row alone once it has a
status. Bad images become a status and a reason; anything else that goes wrong (credentials, a full disk, a bug) is
raised, unless the work is contained (see `Work`). Nothing here needs torch, which takes its processes longer to
import, and more memory, than all else.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import nafnet
from nafnet.conventions import Convention
from nafnet.images import Picture, RefusedImage, UnreadableImage, decode, encode, holds_depth
from nafnet.metrics import Scores, quantize, score
from nafnet.recipe import Recipe
from pipelines.containers import open_collection
from pipelines.records import MANIFEST_SCHEMA, REPORT_SCHEMA, ReportRow, Status
from pipelines.retry import counted
from pipelines.storage import Store, UnsafeKey, in_force, use
from pipelines.storage_options import StorageOptions

Row = dict[str, Any]

PIXEL_SCHEMA = pa.schema(
    [
        *MANIFEST_SCHEMA,
        pa.field("status", pa.string()),  # null: on its way
        pa.field("reason", pa.string()),
        pa.field("format", pa.string()),
        pa.field("icc", pa.binary()),
        pa.field("exif", pa.binary()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("channels", pa.int32()),
        pa.field("dtype", pa.string()),
        pa.field("pixels", pa.large_binary()),  # height x width x channels of dtype
        pa.field("fetch_seconds", pa.float64()),
        pa.field("retries", pa.int32()),
        pa.field("restored_dtype", pa.string()),
        pa.field("restored", pa.large_binary()),
        pa.field("seconds", pa.float64()),
        pa.field("tiles", pa.int32()),
        pa.field("tile", pa.int32()),
        pa.field("precision", pa.string()),
        pa.field("suspect", pa.string()),
        pa.field("note", pa.string()),
        pa.field("worker", pa.string()),
    ]
)
_PIXELS = ("pixels", "restored")

BLOCK_BYTES = 16 * 2**20  # decoded, from which `fetch` gives a table away: its encoded size does not tell
_REQUESTS = 8  # under way at once in one task: they wait for the network far more than they compute


@dataclass(frozen=True, slots=True)
class Work:
    """What every stage knows of the job.

    Attributes:
        protocol: name of the convention that scores are under, as the report carries it.
        weights: the checkpoints as a person names them, found on the machine that restores; their hashes must be the
            recipe's.
        threads: threads of the network in one actor.
        memory_share: what an actor may use of its machine's memory, or of its GPU's.
        storage: what file systems are opened with.
        weights_from: where checkpoints that go by name lie, for machines that know no place of their own.
        contained: unexpected errors of one row become its status `crashed` instead of ending the block. Used to
            find out which row of a failed block was the bad one.
    """

    source: str
    reference: str | None
    output: str
    weights: tuple[str, ...]
    recipe: Recipe
    protocol: str
    device: str
    max_pixels: int
    threads: int = 1
    memory_share: float = 1.0
    storage: StorageOptions = field(default_factory=StorageOptions)
    weights_from: str | None = None
    contained: bool = False

    @property
    def caught(self) -> tuple[type[Exception], ...]:
        """The unexpected errors that a row may end with."""
        return (Exception,) if self.contained else ()


def fetch(batch: pa.Table, work: Work) -> Iterator[pa.Table]:
    """Read and decode each pair of a manifest table; `PIXEL_SCHEMA` out, with pixels or with a status and reason.

    Files are read several at once and decoded one by one. A table is given away once it holds `BLOCK_BYTES` of pixels.
    """
    use(work.storage)
    rows, held = list[Row](), 0
    pairs = batch.to_pylist()
    with ThreadPoolExecutor(_REQUESTS) as readers:
        for pair, read in zip(pairs, readers.map(partial(_read_pair, work), pairs), strict=True):
            rows.append({**_decode_one(pair, read, work), "retries": read.retries})
            held += 0 if rows[-1]["pixels"] is None else rows[-1]["pixels"].nbytes
            if held >= BLOCK_BYTES:
                yield table_of(rows)
                rows, held = [], 0
    if rows:
        yield table_of(rows)


@dataclass(frozen=True, slots=True)
class _Read:
    """What came of a request: the file, or what went wrong, which whoever asked for it raises."""

    data: bytes | Exception
    seconds: float
    retries: int

    def get(self) -> bytes:
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


def _read_pair(work: Work, pair: Row) -> _Read:
    return _try_read(work.source, pair["key"], pair["size"])


def _try_read(source: str, key: str, size: int | None = None) -> _Read:
    """A file of which `size` bytes were listed; None where it was not listed."""
    started = time.perf_counter()
    with counted() as count:
        try:
            collection = open_collection(source)
            data: bytes | Exception = (
                collection.read(key, size=size) if isinstance(collection, Store) else collection.read(key)
            )
        except Exception as error:  # noqa: BLE001 - raised again by `get`
            data = error
    return _Read(data, time.perf_counter() - started, count.retries)


def _decode_one(row: Row, read: _Read, work: Work) -> Row:
    started = time.perf_counter()
    try:
        picture = decode(read.get(), max_pixels=work.max_pixels)
    except FileNotFoundError:
        return ended(row, Status.MISSING, "listed, but gone when it was to be read: run again to list anew")
    except UnreadableImage as error:
        return ended(row, Status.UNREADABLE, str(error))
    except (RefusedImage, UnsafeKey) as error:
        return ended(row, Status.REFUSED, str(error))
    except work.caught as error:
        return crashed(row, "reading it", error)
    return {
        **row,
        "format": picture.format,
        "icc": picture.icc,
        "exif": picture.exif,
        "height": picture.height,
        "width": picture.width,
        "channels": picture.channels,
        "dtype": picture.pixels.dtype.name,
        "pixels": picture.pixels,
        "fetch_seconds": read.seconds + time.perf_counter() - started,
    }


def finish(batch: pa.Table, work: Work) -> pa.Table:
    """Score, encode and write each restored row; `REPORT_SCHEMA` out. The image is written before its row is made."""
    use(work.storage)
    rows = list(rows_of(batch))
    with ThreadPoolExecutor(_REQUESTS) as requests:
        references = requests.map(partial(_try_reference, work), rows)
        writes = [
            requests.submit(_write_one, _encode_one(row, reference, work), work)
            for row, reference in zip(rows, references, strict=True)
        ]
        return pa.Table.from_pylist([asdict(write.result()) for write in writes], schema=REPORT_SCHEMA)


def _try_reference(work: Work, row: Row) -> _Read | None:
    """The row's reference; None where there is nothing to score."""
    if row["status"] or row["reference"] is None or work.reference is None:
        return None
    references = open_collection(work.reference)
    return _try_read(work.reference, references.key(row["reference"]))


def _encode_one(row: Row, reference: _Read | None, work: Work) -> Row:
    """The row with its scores, digest and `file`, the bytes to write; without a file when it has ended."""
    started = time.perf_counter()
    row |= {"file": None, "digest": None, "scores": {}}
    row["retries"] = (row["retries"] or 0) + (reference.retries if reference is not None else 0)
    if row["status"]:
        return row
    try:
        if reference is not None:
            row["scores"] = _score_one(row, reference, work)
        picture = _picture(row, work)
        row |= {"file": _encode(picture, work), "digest": digest(picture.pixels)}
    except _Mismatch as error:
        row |= ended(row, error.status, str(error))
    except work.caught as error:
        row |= crashed(row, "scoring it", error)
    row["finish_seconds"] = time.perf_counter() - started + (reference.seconds if reference is not None else 0)
    return row


def _write_one(row: Row, work: Work) -> ReportRow:
    """Write the row's file, if it has one, and only then say so."""
    started = time.perf_counter()
    if row["file"] is not None:
        with counted() as count:
            try:
                output = _store(work.output, os.getpid(), in_force())
                output.write(output.key(row["output"]), row["file"])
                row |= {"status": Status.SUSPECT if row["suspect"] else Status.RESTORED, "reason": row["suspect"]}
            except UnsafeKey as error:  # a name that the output cannot hold
                row |= ended(row, Status.REFUSED, str(error))
            except work.caught as error:
                row |= crashed(row, "writing it", error)
        row["retries"] += count.retries
    written = row["status"] in (Status.RESTORED, Status.SUSPECT)
    return ReportRow(
        **{name: row[name] for name in ("key", "status", "source", "size", "fingerprint", "reason", "reference")},
        **{name: row[name] for name in ("width", "height", "channels", "fetch_seconds", "worker")},
        bit_depth=np.dtype(row["dtype"]).itemsize * 8 if row["dtype"] else None,
        recipe=work.recipe.hash,
        seconds=row["seconds"],
        **{name: row[name] for name in ("tiles", "tile", "precision", "note", "retries")},
        digest=row["digest"] if written else None,
        output=row["output"] if written else None,
        finish_seconds=row["finish_seconds"] + time.perf_counter() - started if written else None,
        finished_at=datetime.now(UTC),
        protocol=work.protocol if row["reference"] is not None else None,
        **row["scores"],
    )


@lru_cache(maxsize=4)
def _store(url: str, _process: int, _options: StorageOptions) -> Store:
    """Opened once for each process: a file system must be made inside the one that uses it."""
    return Store(url)


class _Mismatch(Exception):  # noqa: N818 - a row's end, not a failure of the program
    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _score_one(row: Row, read: _Read, work: Work) -> dict[str, Any]:
    """The score columns of one row. Raises _Mismatch when it and its reference cannot be compared."""
    try:
        reference = decode(read.get(), max_pixels=work.max_pixels).pixels
    except FileNotFoundError as error:
        raise _Mismatch(Status.MISSING, f"its reference {row['reference']} is gone") from error
    except (UnreadableImage, RefusedImage) as error:
        raise _Mismatch(Status.UNREADABLE, f"its reference {row['reference']}: {error}") from error
    degraded = pixels_of(row, "pixels", row["dtype"])
    restored = pixels_of(row, "restored", row["restored_dtype"])
    if reference.shape[:2] != restored.shape[:2] or _colours(reference) != _colours(restored):
        raise _Mismatch(
            Status.MISMATCHED,
            f"{_size(restored)} against a reference of {_size(reference)}: {row['reference']}",
        )
    convention = Convention.parse(work.protocol)
    try:
        before, after = score(degraded, reference, convention), score(restored, reference, convention)
    except ValueError as error:
        raise _Mismatch(Status.MISMATCHED, f"cannot be scored as {convention.name}: {error}") from error
    return {**_columns(before, "_input"), **_columns(after, "")}


def _columns(scores: Scores, suffix: str) -> dict[str, float | None]:
    return {f"{name}{suffix}": value for name, value in asdict(scores).items()}


def digest(pixels: npt.NDArray[Any]) -> str:
    """16 hex digits that differ when the shape (H, W, C), the dtype or any value differs."""
    content = hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode())
    content.update(np.ascontiguousarray(pixels).data)
    return content.hexdigest()[:16]


def _picture(row: Row, work: Work) -> Picture:
    """The restored image at the depth it is written in."""
    restored = quantize(pixels_of(row, "restored", row["restored_dtype"]), written_dtype(row, work))
    return Picture(restored, _written_format(row, work), row["icc"], row["exif"])


def _encode(picture: Picture, work: Work) -> bytes:
    """The image file. Raises _Mismatch when the format cannot hold it."""
    recipe = work.recipe
    try:
        return encode(
            picture,
            quality=recipe.quality,
            subsampling=recipe.subsampling,
            note=f"nafnet-pipelines {nafnet.__version__}: recipe {recipe.hash}, weights {recipe.weights}",
        )
    except ValueError as error:
        raise _Mismatch(Status.REFUSED, f"read, but cannot be written back: {error}") from error


def _written_format(row: Row, work: Work) -> str:
    return str(row["format"]) if work.recipe.output == "same" else work.recipe.output


def written_dtype(row: Row, work: Work) -> str:
    """The source's depth, or the next lower one that a chosen format holds."""
    dtype, chosen = str(row["dtype"]), work.recipe.output
    if chosen == "same":
        return dtype
    return next(name for name in (dtype, "uint16", "uint8") if holds_depth(chosen, np.dtype(name).itemsize * 8))


def table_of(rows: Sequence[Row]) -> pa.Table:
    """`PIXEL_SCHEMA`, of rows whose pixels are arrays or views; each is copied once.

    pyarrow (26.0) keeps what a memoryview that it converts shows for good: a process would grow by each image.
    """
    plain = pa.Table.from_pylist([{**row, **dict.fromkeys(_PIXELS)} for row in rows], schema=PIXEL_SCHEMA)
    for name in _PIXELS:
        parts = [row.get(name) for row in rows]
        ends = np.cumsum([0, *(0 if part is None else part.nbytes for part in parts)], dtype=np.int64)
        there = pa.array([part is not None for part in parts]).buffers()[1]
        content = b"".join(np.ascontiguousarray(part).data for part in parts if part is not None)
        buffers = [there, pa.py_buffer(ends), pa.py_buffer(content)]
        column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(rows), buffers)
        plain = plain.set_column(plain.schema.get_field_index(name), PIXEL_SCHEMA.field(name), column)
    return plain


def rows_of(batch: pa.Table) -> Iterable[Row]:
    """Rows as dictionaries; pixels stay views of the table's memory."""
    names = [name for name in batch.column_names if name not in _PIXELS]
    views = [_views(batch[name]) for name in _PIXELS]
    for row, *pixels in zip(batch.select(names).to_pylist(), *views, strict=True):
        yield row | dict(zip(_PIXELS, pixels, strict=True))


def _views(column: pa.ChunkedArray) -> Iterator[memoryview | None]:
    """The values as views: pyarrow's own way to one of them copies it."""
    for chunk in column.chunks:
        _, ends, content = chunk.buffers()
        at = np.frombuffer(ends, np.int64)[chunk.offset :]
        for i, there in enumerate(chunk.is_valid().to_pylist()):
            yield memoryview(content)[at[i] : at[i + 1]] if there else None


def pixels_of(row: Row, column: str, dtype: str) -> npt.NDArray[Any]:
    """The column "pixels" or "restored" as (height, width, channels)."""
    flat = np.require(np.frombuffer(row[column], dtype), requirements="A")  # after an image of bytes it may not be
    return flat.reshape(row["height"], row["width"], row["channels"])


def _colours(pixels: npt.NDArray[Any]) -> int:
    return 1 if pixels.shape[-1] < 3 else 3


def _size(pixels: npt.NDArray[Any]) -> str:
    height, width, channels = pixels.shape
    return f"{width}x{height} px with {channels} channel{'s' if channels > 1 else ''}"


def ended(row: Row, status: Status, reason: str) -> Row:
    """The row without pixels, which later stages leave alone."""
    return {
        **dict.fromkeys(PIXEL_SCHEMA.names),
        **row,
        "status": str(status),
        "reason": reason,
        "pixels": None,
    }


def crashed(row: Row, doing: str, error: Exception) -> Row:
    """The row's end by an error that no stage expects."""
    return ended(row, Status.CRASHED, f"an unexpected error while {doing}: {type(error).__name__}: {error}")
