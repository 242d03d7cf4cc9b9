"""The one writer of report rows, and what becomes of its parts."""

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import parts
from pipelines.arrow import arrow_file
from pipelines.parts import Folded, PartWriter, read_parquet, write_parquet
from pipelines.records import REPORT_SCHEMA
from pipelines.report import part_names, read_parts, read_rows, summarize
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


def test_arrow_holds_nothing_of_the_interpreter_s_when_the_process_ends() -> None:
    data = bytes(bytearray(1000))
    before = sys.getrefcount(data)
    file = arrow_file(data)
    assert sys.getrefcount(data) == before
    assert file.read() == data


def write(store: Store, name: str, part: pa.Table) -> None:
    write_parquet(store, f"report/{name}.parquet", part)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An output whose report has a row of b thrice (once twice the same), and what a kill and a person left there."""
    store = Store(str(tmp_path))
    for name, keys in (("1", "ab"), ("2", "cb"), ("3", "d")):
        write(store, name, rows(*keys))
    write(store, "4", read_parquet(store, "report/2.parquet"))  # as after a kill while folding
    store.write("report/.0123456789abcdef.part", b"PAR1 half of it")
    store.write("report/notes.txt", b"looked at on Friday")
    return store


def test_folding_leaves_one_row_a_key_and_what_is_no_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_AT_ONCE", 2)
    monkeypatch.setattr(parts, "_LARGE_ROWS", 3)
    before = read_rows(store)
    assert before["key"].to_pylist() == ["a", "b", "c", "d"]
    assert parts.compact(store) == Folded(before=4, after=2, rows=4, dropped=3)
    assert read_rows(store).equals(before)
    assert sorted(len(part) for part in read_parts(store)) == [1, 3]
    others = {entry.key for entry in Store(store.url("report")).list() if not entry.key.endswith(".parquet")}
    assert others == {".0123456789abcdef.part", "notes.txt"}
    names = part_names(store)
    assert parts.compact(store) == Folded(before=2, after=2, rows=4, dropped=0)
    assert part_names(store) == names  # nothing was left to fold


@pytest.mark.parametrize("change", range(8))
def test_folding_that_is_killed_at_any_moment_loses_and_doubles_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    """It makes 2 writes and 4 deletions: whichever it dies at, all rows are there, once each."""
    monkeypatch.setattr(parts, "_LARGE_ROWS", 3)
    before, left = read_rows(store), change

    def dies(method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            method(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("write", "delete"):
            patch.setattr(Store, name, dies(getattr(Store, name)))
        if change < 6:
            with pytest.raises(KeyboardInterrupt):
                parts.compact(store)
        else:
            parts.compact(store)
    assert read_rows(store).equals(before)
    assert summarize(read_rows(store))["images"] == 4
    parts.compact(store)
    assert read_rows(store).equals(before)
    assert len(part_names(store)) == 2


def test_no_report_has_nothing_to_fold(tmp_path: Path) -> None:
    assert parts.compact(Store(str(tmp_path))) == Folded(0, 0, 0, 0)


def test_rows_of_few_columns_keys_and_a_recipe(store: Store) -> None:
    found = read_rows(store, ("status", "key"), keys=pa.array(["b", "d", "x"]))
    assert found.column_names == ["status", "key"]
    assert found["key"].to_pylist() == ["b", "d"]
    assert len(read_rows(store, ("key",), recipe="another")) == 0


def test_moving_aside_that_is_killed_goes_on_the_next_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {key for part in read_parts(store, ("key",)) for key in part["key"].to_pylist()}
    delete, left = Store.delete, 2

    def dies(self: Store, key: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        delete(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", dies)
        with pytest.raises(KeyboardInterrupt):
            parts.set_aside(store)
    assert len(part_names(store)) == 2
    parts.set_aside(store)
    assert part_names(store) == []
    aside = [entry.key for entry in Store(store.url("report-before")).list()]
    kept = {key for name in aside for key in read_parquet(store, f"report-before/{name}")["key"].to_pylist()}
    assert kept == before
