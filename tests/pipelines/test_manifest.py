"""Listing, pairing, and leaving out what is finished."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.manifest import plan, write_parts, written_as
from pipelines.parts import PartWriter
from pipelines.records import REPORT_SCHEMA
from pipelines.settings import RestoreJob
from pipelines.storage import StorageError, Store


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)
    return folder


def job(tmp_path: Path, **settings: object) -> RestoreJob:
    values = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), **settings}
    return RestoreJob.model_validate(values)


def report_rows(rows: pa.Table, status: str, recipe: str, protocol: str | None = None) -> pa.Table:
    made = [
        {**row, "status": status, "recipe": recipe, "finished_at": datetime.now(UTC), "protocol": protocol}
        for row in rows.to_pylist()
    ]
    return pa.Table.from_pylist([{k: row.get(k) for k in REPORT_SCHEMA.names} for row in made], schema=REPORT_SCHEMA)


def test_globs_choose_whatever_their_case_and_limit_counts_what_they_chose(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.PNG", "b/c.jpeg", "b/skip/d.png", "notes.txt", "e.tif")
    todo = plan(job(tmp_path, exclude=("b/skip/*",)), "r", "stored")
    assert todo.pairs["key"].to_pylist() == ["a.PNG", "b/c.jpeg", "e.tif"]
    assert todo.pairs["output"].to_pylist()[1] == f"{tmp_path}/out/images/b/c.jpeg"
    assert plan(job(tmp_path, limit=2), "r", "stored").pairs["key"].to_pylist() == ["a.PNG", "b/c.jpeg"]


def test_nothing_that_matches_is_an_error_that_says_where_it_looked(tmp_path: Path) -> None:
    make(tmp_path / "in", "notes.txt")
    with pytest.raises(StorageError, match=rf"no file below {tmp_path}/in matches \*\.png.*check the folder"):
        plan(job(tmp_path), "r", "stored")


def test_an_image_without_reference_has_its_row_at_once(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "b.png")
    make(tmp_path / "ref", "a.tif", "c.png")
    todo = plan(job(tmp_path, reference=str(tmp_path / "ref")), "r", "stored")
    assert todo.pairs["reference"].to_pylist() == [f"{tmp_path}/ref/a.tif"]
    (row,) = todo.decided.to_pylist()
    assert (row["key"], row["status"]) == ("b.png", "missing")
    assert "looked for b.png" in row["reason"]
    assert todo.matched == len(todo.pairs) + len(todo.decided)


def test_a_name_that_no_output_can_have_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in", "a\\b.png", "c.png")
    todo = plan(job(tmp_path), "r", "stored")
    assert todo.pairs["key"].to_pylist() == ["c.png"]
    assert todo.decided["status"].to_pylist() == ["refused"]


def test_what_is_finished_is_left_out_until_it_changes(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "b.png")
    first = plan(job(tmp_path), "r", "stored")
    writer = PartWriter(Store(str(tmp_path / "out")))
    writer.write(report_rows(first.pairs.slice(0, 1), "restored", "r"))
    writer.write(report_rows(first.pairs.slice(1, 1), "unreadable", "r"))

    again = plan(job(tmp_path), "r", "stored")
    assert (len(again.pairs), again.finished, again.matched) == (0, 2, 2)
    assert plan(job(tmp_path, retry_failed=True), "r", "stored").pairs["key"].to_pylist() == ["b.png"]
    writer.write(report_rows(first.pairs.slice(1, 1), "suspect", "r"))
    assert len(plan(job(tmp_path), "r", "stored").pairs) == 0
    assert plan(job(tmp_path, retry_failed=True), "r", "stored").pairs["key"].to_pylist() == ["b.png"]
    assert len(plan(job(tmp_path), "another recipe", "stored").pairs) == 2

    (tmp_path / "in" / "a.png").write_bytes(b"changed")
    make(tmp_path / "in", "new.png")
    assert plan(job(tmp_path), "r", "stored").pairs["key"].to_pylist() == ["a.png", "new.png"]


def test_another_recipe_in_between_makes_the_first_be_done_again(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png")
    pairs = plan(job(tmp_path), "first", "stored").pairs
    writer = PartWriter(Store(str(tmp_path / "out")))
    for recipe in ("first", "second"):
        writer.write(report_rows(pairs, "restored", recipe))
    assert len(plan(job(tmp_path), "second", "stored").pairs) == 0
    assert len(plan(job(tmp_path), "first", "stored").pairs) == 1  # its image was replaced


def test_another_convention_makes_what_was_scored_be_done_again(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "unscored.png")
    pairs = plan(job(tmp_path), "r", "gopro").pairs
    writer = PartWriter(Store(str(tmp_path / "out")))
    writer.write(report_rows(pairs.slice(0, 1), "restored", "r", "gopro"))
    writer.write(report_rows(pairs.slice(1, 1), "restored", "r"))
    assert len(plan(job(tmp_path), "r", "gopro").pairs) == 0  # a row from before there were profiles stays valid
    for other in ("gopro+basicsr", "gopro+mmagic", "sidd"):
        assert plan(job(tmp_path), "r", other).pairs["key"].to_pylist() == ["a.png"]
    writer.write(report_rows(pairs.slice(0, 1), "restored", "r", "gopro+basicsr"))
    assert len(plan(job(tmp_path), "r", "gopro+basicsr").pairs) == 0
    for other in ("gopro", "gopro+basicsr+y", "gopro+basicsr+crop4"):
        assert plan(job(tmp_path), "r", other).pairs["key"].to_pylist() == ["a.png"]


def test_a_name_that_is_not_text_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    make(tmp_path / "in", "good.png", os.fsdecode(b"caf\xe9.png"))
    todo = plan(job(tmp_path), "r", "stored")
    assert todo.pairs["key"].to_pylist() == ["good.png"]
    assert todo.decided["key"].to_pylist() == ["caf\\xe9.png"]
    assert todo.keys.to_pylist() == ["caf\\xe9.png", "good.png"]


def test_a_reference_that_comes_or_changes_makes_its_image_be_done_again(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png")
    make(tmp_path / "ref", "a.png")
    writer = PartWriter(Store(str(tmp_path / "out")))
    writer.write(report_rows(plan(job(tmp_path), "r", "stored").pairs, "restored", "r"))
    scored = job(tmp_path, reference=str(tmp_path / "ref"))
    todo = plan(scored, "r", "stored")
    assert len(todo.pairs) == 1
    writer.write(report_rows(todo.pairs, "restored", "r"))
    assert len(plan(scored, "r", "stored").pairs) == 0
    (tmp_path / "ref" / "a.png").write_bytes(b"sharper")
    assert len(plan(scored, "r", "stored").pairs) == 1


@pytest.mark.parametrize(
    ("key", "image_format", "written"),
    [
        ("a/b.png", "same", "a/b.png"),
        ("a/b.png", "jpeg", "a/b.jpg"),
        ("a.b/c.d.PNG", "tiff", "a.b/c.d.tif"),
        ("a.b/plain", "webp", "a.b/plain.webp"),
        ("a/.png", "bmp", "a/.png.bmp"),
        ("b.JPEG", "jpeg", "b.jpg"),
    ],
)
def test_a_result_ends_as_its_format_does(key: str, image_format: str, written: str) -> None:
    assert written_as(key, image_format) == written


def test_of_two_keys_that_would_share_a_name_the_second_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "a.tif", "b/a.tif", "c.TIF", "c.png")
    as_png = job(tmp_path, format="png")
    todo = plan(as_png, "r", "stored")
    assert todo.pairs["key"].to_pylist() == ["a.png", "b/a.tif", "c.TIF"]
    outputs = todo.pairs["output"].to_pylist()
    assert outputs == [f"{tmp_path}/out/images/{name}" for name in ("a.png", "b/a.png", "c.png")]
    refused = {row["key"]: (row["status"], row["reason"]) for row in todo.decided.to_pylist()}
    assert refused == {
        "a.tif": ("refused", "its result would be a.png, which is that of a.png: rename one of them"),
        "c.png": ("refused", "its result would be c.png, which is that of c.TIF: rename one of them"),
    }
    assert len(plan(job(tmp_path), "r", "stored").pairs) == 5  # every name is its own where formats are kept

    writer = PartWriter(Store(str(tmp_path / "out")))
    writer.write(report_rows(todo.pairs, "restored", "r"))
    writer.write(todo.decided)
    again = plan(as_png, "r", "stored")
    assert (len(again.pairs), len(again.decided), again.finished) == (0, 0, 5)
    retried = plan(job(tmp_path, format="png", retry_failed=True), "r", "stored")
    assert (len(retried.pairs), retried.decided["key"].to_pylist()) == (0, ["a.tif", "c.png"])


@pytest.mark.parametrize(("status", "owner"), [("restored", "a.tif"), ("suspect", "a.tif"), ("refused", "a.png")])
def test_a_result_that_is_there_keeps_its_name(tmp_path: Path, status: str, owner: str) -> None:
    make(tmp_path / "in", "a.png", "a.tif")
    first = plan(job(tmp_path, format="png", include=("*.tif",)), "r", "stored")
    PartWriter(Store(str(tmp_path / "out"))).write(report_rows(first.pairs, status, "r"))
    wider = plan(job(tmp_path, format="png"), "r", "stored")
    assert wider.finished == 1
    if owner == "a.tif":  # a.png would have replaced its image
        assert "which is that of a.tif" in wider.decided["reason"][0].as_py()
    assert wider.pairs["key"].to_pylist() == (["a.png"] if owner == "a.png" else [])


def test_parts_hold_all_pairs(tmp_path: Path) -> None:
    make(tmp_path / "in", *(f"{i}.png" for i in range(5)))
    todo = plan(job(tmp_path), "r", "stored")
    write_parts(todo, Store(str(tmp_path / "out")))
    (part,) = (tmp_path / "out" / "manifest").iterdir()
    assert pa.parquet.read_table(part).equals(todo.pairs)
