"""What happens to one row on its way: fetch it, restore it, finish it. Plain functions over Arrow tables.

Between the stages a row carries pixels; what `finish` returns does not. A stage leaves a row alone once it has a
status. Bad images become a status and a reason; anything else that goes wrong (credentials, a full disk, a bug) is
raised, unless the work is contained (see `Work`).
"""

import hashlib
import os
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
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
from nafnet.restore import Restored, Restorer, to_float
from pipelines.containers import Collection, open_collection
from pipelines.records import MANIFEST_SCHEMA, REPORT_SCHEMA, ReportRow, Status
from pipelines.retry import counted
from pipelines.storage import Store, UnsafeKey, use
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

_READERS = 8  # requests under way at once in one fetch task: they wait for the network far more than they compute


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


def fetch(batch: pa.Table, work: Work) -> pa.Table:
    """Read and decode each pair of a manifest table; `PIXEL_SCHEMA` out, with pixels or with a status and reason."""
    use(work.storage)
    with ThreadPoolExecutor(_READERS) as readers:
        rows = list(readers.map(lambda row: _fetch_counted(row, work), batch.to_pylist()))
    return pa.Table.from_pylist(rows, schema=PIXEL_SCHEMA)


def _fetch_counted(row: Row, work: Work) -> Row:
    with counted() as count:
        fetched = _fetch_one(row, work)
    return {**fetched, "retries": count.retries}


def _fetch_one(row: Row, work: Work) -> Row:
    started = time.perf_counter()
    try:
        picture = _read(open_collection(work.source), row["key"], work.max_pixels, row["size"])
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
        "fetch_seconds": time.perf_counter() - started,
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
        # On a GPU one image is copied while another is restored; on a CPU both would want the same cores.
        self._at_once = 1 if work.device == "cpu" else 2
        memory = int(available_bytes(work.device, work.memory_share) / self._at_once)
        self.restorer = load_restorer(work.weights, work.recipe, device=work.device, memory=memory)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`PIXEL_SCHEMA` in and out."""
        with ThreadPoolExecutor(self._at_once) as threads:
            rows = list(threads.map(lambda row: row if row["status"] else self._restore_one(row), _rows(batch)))
        return pa.Table.from_pylist(rows, schema=PIXEL_SCHEMA)

    def _restore_one(self, row: Row) -> Row:
        started = time.perf_counter()
        pixels = _pixels(row, "pixels", row["dtype"])
        scored_unrounded = row["reference"] is not None and not Convention.parse(self.work.protocol).rounds
        if scored_unrounded or _written_dtype(row, self.work) != row["dtype"]:
            pixels = to_float(pixels)  # rounded once, by whoever needs integers
        try:
            restored: Restored = self.restorer.restore(pixels)
        except (ValueError, MemoryError) as error:  # such as colour for a network of grey images, or far too large
            return _end(row, Status.REFUSED, str(error))
        except self.work.caught as error:
            return _crashed(row, "restoring it", error)
        return {
            **row,
            "pixels": row["pixels"] if row["reference"] is not None else None,  # needed again only to score
            "restored": restored.pixels.tobytes(),
            "restored_dtype": restored.pixels.dtype.name,
            "seconds": time.perf_counter() - started,
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
    rows = [asdict(_finish_counted(row, work)) for row in _rows(batch)]
    return pa.Table.from_pylist(rows, schema=REPORT_SCHEMA)


def _finish_counted(row: Row, work: Work) -> ReportRow:
    with counted() as count:
        finished = _finish_one(row, work)
    return replace(finished, retries=(row["retries"] or 0) + count.retries)


def _finish_one(row: Row, work: Work) -> ReportRow:
    started = time.perf_counter()
    scores: dict[str, Any] = {}
    if row["status"] is None:
        try:
            scores = _score_one(row, work)
            output, picture = Store(work.output), _picture(row, work)
            output.write(output.key(row["output"]), _encode(picture, work))
            row["digest"] = digest(picture.pixels)
            row["status"] = Status.SUSPECT if row["suspect"] else Status.RESTORED
            row["reason"] = row["suspect"]
        except _Mismatch as error:
            row = _end(row, error.status, str(error))
        except work.caught as error:
            row = _crashed(row, "scoring or writing it", error)
    depth = np.dtype(row["dtype"]).itemsize * 8 if row["dtype"] else None
    written = row["status"] in (Status.RESTORED, Status.SUSPECT)
    return ReportRow(
        **{name: row[name] for name in ("key", "status", "source", "size", "fingerprint", "reason", "reference")},
        **{name: row[name] for name in ("width", "height", "channels", "fetch_seconds", "worker")},
        bit_depth=depth,
        recipe=work.recipe.hash,
        seconds=row["seconds"],
        **{name: row[name] for name in ("tiles", "tile", "precision", "note")},
        digest=row.get("digest"),
        output=row["output"] if written else None,
        finish_seconds=time.perf_counter() - started if written else None,
        finished_at=datetime.now(UTC),
        protocol=work.protocol if row["reference"] is not None else None,
        **scores,
    )


class _Mismatch(Exception):  # noqa: N818 - a row's end, not a failure of the program
    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _score_one(row: Row, work: Work) -> dict[str, Any]:
    """The score columns of one row, none without a reference. Raises _Mismatch when they cannot be compared."""
    if row["reference"] is None or work.reference is None:
        return {}
    try:
        references = open_collection(work.reference)
        reference = _read(references, references.key(row["reference"]), work.max_pixels).pixels
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


def _read(collection: Collection, key: str, max_pixels: int, size: int | None = None) -> Picture:
    data = collection.read(key, size=size) if isinstance(collection, Store) else collection.read(key)
    return decode(data, max_pixels=max_pixels)


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
