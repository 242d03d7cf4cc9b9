"""What happens to one row on its way: fetch it, restore it, finish it. Plain functions over Arrow tables.

Between the stages a row carries pixels; what `finish` returns does not. A stage leaves a row alone once it has a
status. Bad images become a status and a reason; anything else that goes wrong (credentials, a full disk, a bug) is
raised, unless the work is contained (see `Work`).
"""

import hashlib
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from threading import Condition, Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

import nafnet
from nafnet import checkpoint
from nafnet.conventions import Convention
from nafnet.images import Picture, RefusedImage, UnreadableImage, decode, encode, holds_depth
from nafnet.memory import available_bytes
from nafnet.metrics import Scores, quantize, score
from nafnet.recipe import Recipe
from nafnet.restore import Pixels, Restored, Restorer, to_float
from pipelines.containers import open_collection
from pipelines.records import MANIFEST_SCHEMA, REPORT_SCHEMA, ReportRow, Status
from pipelines.retry import counted
from pipelines.storage import Store, UnsafeKey, in_force, use
from pipelines.storage_options import StorageOptions
from pipelines.weights import locate

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

BLOCK_BYTES = 16 * 2**20  # decoded, from which `fetch` gives a table away: its encoded size does not tell
_REQUESTS = 8  # under way at once in one task: they wait for the network far more than they compute
_ON_GPU = 2  # one image is copied while another is restored


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
            held += len(rows[-1]["pixels"] or b"")
            if held >= BLOCK_BYTES:
                yield pa.Table.from_pylist(rows, schema=PIXEL_SCHEMA)
                rows, held = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=PIXEL_SCHEMA)


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
        return _end(row, Status.MISSING, "listed, but gone when it was to be read: run again to list anew")
    except UnreadableImage as error:
        return _end(row, Status.UNREADABLE, str(error))
    except (RefusedImage, UnsafeKey) as error:
        return _end(row, Status.REFUSED, str(error))
    except work.caught as error:
        return _crashed(row, "reading it", error)
    return {
        **row,
        "format": picture.format,
        "icc": picture.icc,
        "exif": picture.exif,
        "height": picture.height,
        "width": picture.width,
        "channels": picture.channels,
        "dtype": picture.pixels.dtype.name,
        "pixels": picture.pixels.tobytes(),
        "fetch_seconds": read.seconds + time.perf_counter() - started,
    }


def load_restorer(
    weights: Sequence[str], recipe: Recipe, *, device: str = "cpu", memory: int | None = None
) -> Restorer:
    """The restorer that a settled recipe describes, from `weights` as a person names them (file, URL, catalog name).

    Raises:
        CheckpointError, ValueError: the weights cannot be found or read here, or are not those of the recipe.
    """
    loaded = [checkpoint.load(locate(name)) for name in weights]
    for name, found, step in zip(weights, loaded, recipe.steps, strict=True):
        if found.sha256 != step.weights:
            raise ValueError(f"{name} is another file here than where the job was planned: {step.weights}")
    return Restorer([found.network for found in loaded], recipe, device=device, memory=memory)


class _Threads:
    """The threads of an actor, shared out among the calls of the network that are under way."""

    def __init__(self, count: int) -> None:
        self.all = self._free = count
        self._expected = 0
        self._changed = Condition()
        self._turn = Lock()  # of who waits: else one that needs all of them would never get them

    @contextmanager
    def expect(self, calls: int) -> Iterator[None]:
        """So many calls will want threads in this context."""
        with self._changed:
            self._expected += calls
        try:
            yield
        finally:
            with self._changed:
                self._expected -= calls

    @contextmanager
    def take(self, at_once: int) -> Iterator[int]:
        """Wait for the threads of a call that may be under way with up to `at_once` such calls; gives their number."""
        with self._turn, self._changed:
            count = max(1, self.all // min(at_once, self._expected))
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield count
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


class RestoreActor:
    """Holds the network, built once, and restores the pixels of each row that is on its way."""

    def __init__(self, work: Work) -> None:
        """Load and check the weights. Raises CheckpointError or ValueError when they are not the recipe's."""
        use(work.storage)
        torch.set_num_threads(work.threads)
        if work.recipe.deterministic:  # cuBLAS reads it when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.work = work
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        memory = available_bytes(work.device, work.memory_share) // (1 if work.device == "cpu" else _ON_GPU)
        self.restorer = load_restorer(work.weights, work.recipe, device=work.device, memory=memory)
        self._threads = _Threads(work.threads if work.device == "cpu" else _ON_GPU)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`PIXEL_SCHEMA` in and out. Images of one size and kind pass through the network together where that pays.

        Called for two tables at once, no thread is idle while the last images of one are under way.
        """
        rows = list(_rows(batch))
        groups = defaultdict[tuple[Any, ...], list[int]](list)  # their places in `rows`
        for i, row in enumerate(rows):
            if not row["status"]:
                groups[row["height"], row["width"], row["channels"], row["dtype"], row["reference"] is None].append(i)
        calls = list[tuple[list[int], int]]()
        for (height, width, *_), places in groups.items():
            most, at_once = self.restorer.batch(height, width), self._at_once(height, width)
            calls += [(places[i : i + most], at_once) for i in range(0, len(places), most)]
        with self._threads.expect(len(calls)), ThreadPoolExecutor(max(1, min(self._threads.all, len(calls)))) as pool:
            done = pool.map(lambda call: self._restore([rows[i] for i in call[0]], call[1]), calls)
            for (places, _), restored in zip(calls, done, strict=True):
                for i, row in zip(places, restored, strict=True):
                    rows[i] = row
        return pa.Table.from_pylist(rows, schema=PIXEL_SCHEMA)

    def _at_once(self, height: int, width: int) -> int:
        """How many calls of the network on images of this size (px) may be under way at once.

        On a CPU each image has a thread of its own where memory allows: threads that share one wait for the slowest
        of them at every strip, which is the one whose core scoring and encoding use meanwhile.
        """
        if self.work.device != "cpu":
            return _ON_GPU
        fits = self.work.threads * self.restorer.process_bytes(height, width, None) <= self.restorer.memory
        return self.work.threads if fits else 1

    def _restore(self, rows: list[Row], at_once: int) -> list[Row]:
        """Rows of one size and kind, which share their time in the network, with up to that many such calls."""
        with self._threads.take(at_once) as threads:
            if self.work.device == "cpu":  # each thread of Python has a setting of its own
                torch.set_num_threads(threads)
            return self._restore_with(rows, threads / self._threads.all)

    def _restore_with(self, rows: list[Row], share: float) -> list[Row]:
        """The same, with this share of the actor's threads."""
        started = time.perf_counter()
        try:
            restored = self.restorer.restore_batch([self._input(row) for row in rows])
        except (ValueError, MemoryError) as error:  # such as colour for a network of grey images, or far too large
            if len(rows) > 1:
                return [end for row in rows for end in self._restore_with([row], share)]
            return [_end(rows[0], Status.REFUSED, str(error))]
        except self.work.caught as error:
            return [_crashed(row, "restoring it", error) for row in rows]
        seconds = (time.perf_counter() - started) * share / len(rows)
        return [self._output(row, one, seconds) for row, one in zip(rows, restored, strict=True)]

    def _input(self, row: Row) -> Pixels:
        pixels = _pixels(row, "pixels", row["dtype"])
        scored_unrounded = row["reference"] is not None and not Convention.parse(self.work.protocol).rounds
        if scored_unrounded or _written_dtype(row, self.work) != row["dtype"]:
            return to_float(pixels)  # rounded once, by whoever needs integers
        return pixels

    def _output(self, row: Row, restored: Restored, seconds: float) -> Row:
        return {
            **row,
            "pixels": row["pixels"] if row["reference"] is not None else None,  # needed again only to score
            "restored": restored.pixels.tobytes(),
            "restored_dtype": restored.pixels.dtype.name,
            "seconds": seconds,
            "tiles": restored.tiles,
            "tile": restored.tile,
            "precision": restored.precision,
            "suspect": restored.suspect,
            "note": restored.note,
            "worker": self.worker,
        }


def finish(batch: pa.Table, work: Work) -> pa.Table:
    """Score, encode and write each restored row; `REPORT_SCHEMA` out. The image is written before its row is made."""
    use(work.storage)
    rows = list(_rows(batch))
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
        row |= _end(row, error.status, str(error))
    except work.caught as error:
        row |= _crashed(row, "scoring it", error)
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
                row |= _end(row, Status.REFUSED, str(error))
            except work.caught as error:
                row |= _crashed(row, "writing it", error)
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
    degraded = _pixels(row, "pixels", row["dtype"])
    restored = _pixels(row, "restored", row["restored_dtype"])
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
    restored = quantize(_pixels(row, "restored", row["restored_dtype"]), _written_dtype(row, work))
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


def _written_dtype(row: Row, work: Work) -> str:
    """The source's depth, or the next lower one that a chosen format holds."""
    dtype, chosen = str(row["dtype"]), work.recipe.output
    if chosen == "same":
        return dtype
    return next(name for name in (dtype, "uint16", "uint8") if holds_depth(chosen, np.dtype(name).itemsize * 8))


def _rows(batch: pa.Table) -> Iterable[Row]:
    """Rows as dictionaries; pixels stay views of the table's memory."""
    names = [name for name in batch.column_names if name not in {"pixels", "restored"}]
    for i, row in enumerate(batch.select(names).to_pylist()):
        for name in ("pixels", "restored"):
            buffer = batch[name][i].as_buffer()
            row[name] = memoryview(buffer) if buffer is not None else None
        yield row


def _pixels(row: Row, column: str, dtype: str) -> npt.NDArray[Any]:
    flat = np.frombuffer(row[column], dtype)
    return flat.reshape(row["height"], row["width"], row["channels"])


def _colours(pixels: npt.NDArray[Any]) -> int:
    return 1 if pixels.shape[-1] < 3 else 3


def _size(pixels: npt.NDArray[Any]) -> str:
    height, width, channels = pixels.shape
    return f"{width}x{height} px with {channels} channel{'s' if channels > 1 else ''}"


def _end(row: Row, status: Status, reason: str) -> Row:
    return {
        **dict.fromkeys(PIXEL_SCHEMA.names),
        **row,
        "status": str(status),
        "reason": reason,
        "pixels": None,
    }


def _crashed(row: Row, doing: str, error: Exception) -> Row:
    return _end(row, Status.CRASHED, f"an unexpected error while {doing}: {type(error).__name__}: {error}")
