"""The one writer of report rows."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.parts import PartWriter
from pipelines.records import REPORT_SCHEMA
from pipelines.report import read_rows
from pipelines.storage import Store


def rows(*keys: str) -> pa.Table:
    required = {"status": "restored", "recipe": "r", "source": "s", "size": 1, "fingerprint": "f"}
    made = [{**required, "key": key, "finished_at": datetime.now(UTC)} for key in keys]
    return pa.Table.from_pylist(made, schema=REPORT_SCHEMA)


def test_rows_are_collected_into_few_parts(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with PartWriter(store) as writer:
        for i in range(1100):
            writer.add(rows(f"{i:04d}"))
    assert len(read_rows(store)) == 1100
    assert len(list((tmp_path / "report").iterdir())) == 3


def test_rows_are_kept_when_the_run_fails(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    writer = PartWriter(store)

    def run_that_fails() -> None:
        with writer:
            writer.add(rows("a", "b"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run_that_fails()
    assert read_rows(store)["key"].to_pylist() == ["a", "b"]
