"""Tables on storage: whole Parquet files, and the one writer of report rows."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.arrow import arrow_file
from pipelines.records import REPORT_SCHEMA, WRITTEN
from pipelines.report import part_names, read_parts
from pipelines.storage import Store

_LARGE_ROWS = 100_000  # of a folded part: tens of megabytes, which is what is held while folding
_AT_ONCE = 16  # small parts that are read together
_FLUSH_ROWS = 512
_FLUSH_SECONDS = 1.0  # what a kill can lose: the rows, never the images, of the last so many seconds


def write_parquet(output: Store, key: str, table: pa.Table) -> None:
    """Write one Parquet file, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    output.write(key, sink.getvalue().to_pybytes())


def read_parquet(output: Store, key: str) -> pa.Table:
    """Read what `write_parquet` wrote."""
    return pq.read_table(arrow_file(output.read(key)))


class PartWriter:
    """Collects report rows and writes them below `report/` as whole parts, each under a name of its own."""

    def __init__(self, output: Store) -> None:
        self._output = output
        self._waiting: list[pa.Table] = []
        self._written = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what waits, on the way out of an error too: the images of those rows are there."""
        self._flush()

    def add(self, rows: pa.Table) -> None:
        """Take rows in `REPORT_SCHEMA`; they are on storage after a few seconds, a few hundred more, or at the end."""
        self._waiting.append(rows)
        late = time.monotonic() - self._written > _FLUSH_SECONDS
        if late or sum(len(rows) for rows in self._waiting) >= _FLUSH_ROWS:
            self._flush()

    def write(self, rows: pa.Table) -> None:
        """Write one part now."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        write_parquet(self._output, f"report/{stamp}-{uuid.uuid4().hex[:12]}.parquet", rows.cast(REPORT_SCHEMA))

    def _flush(self) -> None:
        if self._waiting:
            self.write(pa.concat_tables(self._waiting))
            self._waiting = []
        self._written = time.monotonic()


@dataclass(frozen=True, slots=True)
class Folded:
    """What `compact` did: how many parts there were and are, and how many rows it kept and dropped."""

    before: int
    after: int
    rows: int
    dropped: int


def compact(output: Store) -> Folded:
    """Fold the report's parts into few large ones with one row per key: the latest, the one that readers count.

    The caller holds the output's lease. Old parts go when the new ones are there, so that a kill at any moment leaves
    at worst rows that stand there twice.
    """
    names = part_names(output)
    lengths, latest = _latest(output, names)
    rows = int(np.count_nonzero(latest))
    if len(names) <= -(-rows // _LARGE_ROWS) and latest.all():
        return Folded(len(names), len(names), rows, 0)
    writer, waiting, after, start = PartWriter(output), REPORT_SCHEMA.empty_table(), 0, 0
    for part, length in zip(_few_at_once(output, names), lengths, strict=True):
        waiting = pa.concat_tables([waiting, part.filter(latest[start : start + length])])
        start += length
        while len(waiting) >= _LARGE_ROWS or (len(waiting) and start == len(latest)):
            writer.write(waiting.slice(0, _LARGE_ROWS))
            waiting, after = waiting.slice(_LARGE_ROWS), after + 1
    for name in names:
        output.delete(f"report/{name}")
    return Folded(len(names), after, rows, len(latest) - rows)


def _few_at_once(output: Store, names: list[str]) -> Iterator[pa.Table]:
    for start in range(0, len(names), _AT_ONCE):
        yield from read_parts(output, names=names[start : start + _AT_ONCE])


def _latest(output: Store, names: list[str]) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """How many rows each part has; and of all of them, which is its key's latest: one a key."""
    parts = list(read_parts(output, ("key", "finished_at"), names=names))
    if not parts:
        return [], np.zeros(0, np.bool_)
    rows = pa.concat_tables(parts)
    codes = rows["key"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.lexsort((rows["finished_at"].cast(pa.int64()).to_numpy(), codes))
    latest = np.zeros(len(rows), np.bool_)
    latest[order[np.append(codes[order][1:] != codes[order][:-1], True)]] = True
    return [len(part) for part in parts], latest


def set_aside(output: Store) -> pa.ChunkedArray:
    """Move the report's parts to `report-before/`, where nothing counts them; returns the URLs of their images.

    The caller holds the output's lease. A kill leaves some parts still in `report/`, none lost.
    """
    names = part_names(output)
    images = [pa.nulls(0, pa.string())]
    for part in read_parts(output, ("status", "output"), names=names):
        images += part.filter(pc.is_in(part["status"], value_set=pa.array(WRITTEN)))["output"].chunks
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    for name in names:
        output.write(f"report-before/{stamp}/{name}", output.read(f"report/{name}"))
        output.delete(f"report/{name}")
    return pa.chunked_array([pc.unique(pa.chunked_array(images))])
