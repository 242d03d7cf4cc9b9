"""Pairs that a person wrote down, in each of the three formats."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.listing import is_listing, read_listing
from pipelines.storage import StorageError, Store

PAIRS = [{"source": "in/b/1.png", "reference": "ref/x.png"}, {"source": "in/a/2.png", "reference": "ref/y.png"}]


def write(path: Path, rows: list[dict[str, str | None]]) -> str:
    for row in rows:
        for place in row.values():
            if place and not place.startswith("/"):
                (path.parent / place).parent.mkdir(parents=True, exist_ok=True)
                (path.parent / place).write_bytes(place.encode())
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        text = [",".join(rows[0])] + [",".join(value or "" for value in row.values()) for row in rows]
        path.write_text("\n".join(text) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.csv", "pairs.jsonl"])
def test_each_format(tmp_path: Path, name: str) -> None:
    listing = read_listing(write(tmp_path / name, PAIRS))
    assert (listing.source, listing.reference) == (str(tmp_path / "in"), str(tmp_path / "ref"))
    assert listing.rows["key"].to_pylist() == ["b/1.png", "a/2.png"]
    assert listing.rows["size"].to_pylist() == [10, 10]
    assert listing.rows["partner"].to_pylist() == ["x.png", "y.png"]
    there = {entry.key: entry.fingerprint for entry in Store(str(tmp_path / "ref")).list()}
    assert listing.rows["partner_fingerprint"].to_pylist() == [there["x.png"], there["y.png"]]


def test_whole_paths_and_no_references(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", PAIRS)
    rows = [{"source": str(tmp_path / "in" / "b" / "1.png")}, {"source": f"file://{tmp_path}/in/b/gone.png"}]
    listing = read_listing(write(tmp_path / "pairs.jsonl", rows[:1] + rows[1:]))
    assert listing.source == str(tmp_path / "in" / "b")
    assert listing.reference is None
    assert listing.rows.select(["key", "size"]).to_pylist() == [
        {"key": "1.png", "size": 10},
        {"key": "gone.png", "size": 0},
    ]


def test_one_without_a_reference_has_no_partner(tmp_path: Path) -> None:
    rows: list[dict[str, str | None]] = [PAIRS[0], {"source": "in/a/2.png", "reference": None}]  # type: ignore[list-item]
    listing = read_listing(write(tmp_path / "pairs.parquet", rows))
    assert listing.rows["partner"].to_pylist() == ["x.png", None]
    assert listing.rows["partner_fingerprint"].null_count == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"path": "a.png"}], "has the columns path: source and reference are needed"),
        ([PAIRS[0], PAIRS[0]], "empty or stand there twice"),
        ([{"source": "/a/1.png"}, {"source": "s3://b/2.png"}], "share no folder"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, rows: list[dict[str, str | None]], words: str) -> None:
    with pytest.raises(StorageError, match=words):
        read_listing(write(tmp_path / "pairs.jsonl", rows))
    with pytest.raises(StorageError, match="no list of pairs at"):
        read_listing(str(tmp_path / "gone.csv"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match="that can be read"):
        read_listing(str(tmp_path / "bad.parquet"))


def test_what_counts_as_a_list() -> None:
    assert is_listing("s3://bucket/pairs.CSV")
    assert not is_listing("/data/parquet")
