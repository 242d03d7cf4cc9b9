"""Tables on storage: whole Parquet files, and the one writer of report rows."""

import time
import uuid
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.records import REPORT_SCHEMA
from pipelines.storage import Store

_FLUSH_ROWS = 512
_FLUSH_SECONDS = 1.0  # what a kill can lose: the rows, never the images, of the last so many seconds


def write_parquet(output: Store, key: str, table: pa.Table) -> None:
    """Write one Parquet file, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    output.write(key, sink.getvalue().to_pybytes())


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
