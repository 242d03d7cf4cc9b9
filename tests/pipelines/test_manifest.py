"""Listing, pairing, and leaving out what is finished."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines import listing, manifest
from pipelines.manifest import Plan, left_behind, plan, remaining, written_as
from pipelines.parts import PartWriter, set_aside
from pipelines.records import MANIFEST_SCHEMA, REPORT_SCHEMA
from pipelines.report import read_rows
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


def pairs_of(todo: Plan) -> pa.Table:
    return pa.concat_tables([MANIFEST_SCHEMA.empty_table(), *todo.tables()])


def decided(todo: Plan) -> dict[str, tuple[str, str]]:
    """Status and reason of what has its row before anything is opened, by key."""
    rows = read_rows(todo.place).filter(pc.is_in(read_rows(todo.place)["key"], value_set=todo.keys))
    found = {row["key"]: (row["status"], row["reason"]) for row in rows.to_pylist() if row["worker"] is None}
    assert len(found) == todo.decided
    return found


def report_rows(rows: pa.Table, status: str, recipe: str, protocol: str | None = None) -> pa.Table:
    made = [
        {
            **row,
            "status": status,
            "recipe": recipe,
            "finished_at": datetime.now(UTC),
            "protocol": protocol,
            "worker": "w",
        }
        for row in rows.to_pylist()
    ]
    return pa.Table.from_pylist([{k: row.get(k) for k in REPORT_SCHEMA.names} for row in made], schema=REPORT_SCHEMA)


def test_globs_choose_whatever_their_case_and_limit_counts_what_they_chose(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.PNG", "b/c.jpeg", "b/skip/d.png", "notes.txt", "e.tif")
    todo = plan(job(tmp_path, exclude=("b/skip/*",)), "r", "stored")
    assert pairs_of(todo)["key"].to_pylist() == ["a.PNG", "b/c.jpeg", "e.tif"]
    assert pairs_of(todo)["output"].to_pylist()[1] == f"{tmp_path}/out/images/b/c.jpeg"
    assert pairs_of(plan(job(tmp_path, limit=2), "r", "stored"))["key"].to_pylist() == ["a.PNG", "b/c.jpeg"]


def test_nothing_that_matches_is_an_error_that_says_where_it_looked(tmp_path: Path) -> None:
    make(tmp_path / "in", "notes.txt")
    with pytest.raises(StorageError, match=rf"no file below {tmp_path}/in matches \*\.png.*check the folder"):
        plan(job(tmp_path), "r", "stored")


def test_an_image_without_reference_has_its_row_at_once(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "b.png")
    make(tmp_path / "ref", "a.tif", "c.png")
    todo = plan(job(tmp_path, reference=str(tmp_path / "ref")), "r", "stored")
    assert pairs_of(todo)["reference"].to_pylist() == [f"{tmp_path}/ref/a.tif"]
    (row,) = read_rows(todo.place).to_pylist()
    assert (row["key"], row["status"], row["source"]) == ("b.png", "missing", f"{tmp_path}/in/b.png")
    assert row["reason"] == (f"no reference: looked for b.png (or its name with another extension) in {tmp_path}/ref")
    assert (row["recipe"], row["size"], row["worker"]) == ("r", 10, None)
    assert (todo.matched, todo.to_restore, todo.decided) == (2, 1, 1)


def test_a_name_that_no_output_can_have_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in", "a\\b.png", "c.png")
    todo = plan(job(tmp_path), "r", "stored")
    assert pairs_of(todo)["key"].to_pylist() == ["c.png"]
    (row,) = read_rows(todo.place).to_pylist()
    assert (row["key"], row["status"], row["source"]) == ("a\\\\b.png", "refused", f"{tmp_path}/in")
    assert "is not a plain relative path: rename the file" in row["reason"]


def test_what_is_finished_is_left_out_until_it_changes(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "b.png")
    first = plan(job(tmp_path), "r", "stored")
    writer = PartWriter(Store(str(tmp_path / "out")))
    writer.write(report_rows(pairs_of(first).slice(0, 1), "restored", "r"))
    writer.write(report_rows(pairs_of(first).slice(1, 1), "unreadable", "r"))

    again = plan(job(tmp_path), "r", "stored")
    assert (again.to_restore, again.finished, again.matched) == (0, 2, 2)
    assert pairs_of(plan(job(tmp_path, retry_failed=True), "r", "stored"))["key"].to_pylist() == ["b.png"]
    writer.write(report_rows(pairs_of(first).slice(1, 1), "suspect", "r"))
    assert plan(job(tmp_path), "r", "stored").to_restore == 0
    assert pairs_of(plan(job(tmp_path, retry_failed=True), "r", "stored"))["key"].to_pylist() == ["b.png"]
    assert plan(job(tmp_path), "another recipe", "stored").to_restore == 2

    (tmp_path / "in" / "a.png").write_bytes(b"changed")
    make(tmp_path / "in", "new.png")
    assert pairs_of(plan(job(tmp_path), "r", "stored"))["key"].to_pylist() == ["a.png", "new.png"]


def test_another_recipe_in_between_makes_the_first_be_done_again(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png")
    pairs = pairs_of(plan(job(tmp_path), "first", "stored"))
    writer = PartWriter(Store(str(tmp_path / "out")))
    for recipe in ("first", "second"):
        writer.write(report_rows(pairs, "restored", recipe))
    assert plan(job(tmp_path), "second", "stored").to_restore == 0
    assert plan(job(tmp_path), "first", "stored").to_restore == 1  # its image was replaced


def test_another_convention_makes_what_was_scored_be_done_again(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "unscored.png")
    pairs = pairs_of(plan(job(tmp_path), "r", "gopro"))
    writer = PartWriter(Store(str(tmp_path / "out")))
    writer.write(report_rows(pairs.slice(0, 1), "restored", "r", "gopro"))
    writer.write(report_rows(pairs.slice(1, 1), "restored", "r"))
    assert plan(job(tmp_path), "r", "gopro").to_restore == 0  # a row from before there were profiles stays valid
    for other in ("gopro+basicsr", "gopro+mmagic", "sidd"):
        assert pairs_of(plan(job(tmp_path), "r", other))["key"].to_pylist() == ["a.png"]
    writer.write(report_rows(pairs.slice(0, 1), "restored", "r", "gopro+basicsr"))
    assert plan(job(tmp_path), "r", "gopro+basicsr").to_restore == 0
    for other in ("gopro", "gopro+basicsr+y", "gopro+basicsr+crop4"):
        assert pairs_of(plan(job(tmp_path), "r", other))["key"].to_pylist() == ["a.png"]


def test_a_name_that_is_not_text_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    make(tmp_path / "in", "good.png", os.fsdecode(b"caf\xe9.png"))
    todo = plan(job(tmp_path), "r", "stored")
    assert pairs_of(todo)["key"].to_pylist() == ["good.png"]
    assert decided(todo) == {"caf\\xe9.png": ("refused", "key 'caf\\\\xe9.png' is not UTF-8: rename the file")}
    assert todo.keys.to_pylist() == ["caf\\xe9.png", "good.png"]


def test_a_reference_that_comes_or_changes_makes_its_image_be_done_again(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png")
    make(tmp_path / "ref", "a.png")
    writer = PartWriter(Store(str(tmp_path / "out")))
    writer.write(report_rows(pairs_of(plan(job(tmp_path), "r", "stored")), "restored", "r"))
    scored = job(tmp_path, reference=str(tmp_path / "ref"))
    todo = plan(scored, "r", "stored")
    assert todo.to_restore == 1
    writer.write(report_rows(pairs_of(todo), "restored", "r"))
    assert plan(scored, "r", "stored").to_restore == 0
    (tmp_path / "ref" / "a.png").write_bytes(b"sharper")
    assert plan(scored, "r", "stored").to_restore == 1


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
    assert written_as(pa.chunked_array([[key]]), image_format).to_pylist() == [written]


def test_of_two_keys_that_would_share_a_name_the_second_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "a.tif", "b/a.tif", "c.TIF", "c.png")
    as_png = job(tmp_path, format="png")
    todo = plan(as_png, "r", "stored")
    assert pairs_of(todo)["key"].to_pylist() == ["a.png", "b/a.tif", "c.TIF"]
    outputs = pairs_of(todo)["output"].to_pylist()
    assert outputs == [f"{tmp_path}/out/images/{name}" for name in ("a.png", "b/a.png", "c.png")]
    assert decided(todo) == {
        "a.tif": ("refused", "its result would be a.png, which is that of a.png: rename one of them"),
        "c.png": ("refused", "its result would be c.png, which is that of c.TIF: rename one of them"),
    }
    aside = Store(str(tmp_path / "aside"))
    kept = plan(job(tmp_path), "kept", "stored", place=aside)
    assert (kept.to_restore, kept.decided) == (5, 0)  # every name is its own where formats are kept

    writer = PartWriter(Store(str(tmp_path / "out")))
    writer.write(report_rows(pairs_of(todo), "restored", "r"))
    again = plan(as_png, "r", "stored")
    assert (again.to_restore, again.decided, again.finished) == (0, 0, 5)
    retried = plan(job(tmp_path, format="png", retry_failed=True), "r", "stored", place=aside)
    assert (retried.to_restore, list(decided(retried))) == (0, ["a.tif", "c.png"])


@pytest.mark.parametrize(("status", "owner"), [("restored", "a.tif"), ("suspect", "a.tif"), ("refused", "a.png")])
def test_a_result_that_is_there_keeps_its_name(tmp_path: Path, status: str, owner: str) -> None:
    make(tmp_path / "in", "a.png", "a.tif")
    first = plan(job(tmp_path, format="png", include=("*.tif",)), "r", "stored")
    PartWriter(Store(str(tmp_path / "out"))).write(report_rows(pairs_of(first), status, "r"))
    wider = plan(job(tmp_path, format="png"), "r", "stored")
    assert wider.finished == 1
    if owner == "a.tif":  # a.png would have replaced its image
        assert "which is that of a.tif" in decided(wider)["a.png"][1]
    assert pairs_of(wider)["key"].to_pylist() == (["a.png"] if owner == "a.png" else [])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "ROWS", 2)
    monkeypatch.setattr(listing, "ROWS", 3)


@pytest.mark.usefixtures("small_parts")
def test_parts_hold_all_pairs_in_order_however_they_are_cut(tmp_path: Path) -> None:
    make(tmp_path / "in", *(f"{i}.png" for i in range(9)), "no text.txt", "x\\y.png")
    make(tmp_path / "ref", *(f"{i}.tif" for i in range(9) if i != 4))
    scored = job(tmp_path, reference=str(tmp_path / "ref"))
    todo = plan(scored, "r", "stored")
    assert todo.keys.to_pylist() == [*(f"{i}.png" for i in range(9)), "x\\\\y.png"]
    assert (todo.matched, todo.to_restore, todo.decided, todo.finished) == (10, 8, 2, 0)
    assert {key: status for key, (status, _) in decided(todo).items()} == {"4.png": "missing", "x\\\\y.png": "refused"}
    files = sorted((tmp_path / "out" / "manifest").iterdir())
    assert [len(pq.read_table(file)) for file in files] == [2, 2, 1, 2, 1]
    assert pa.concat_tables([pq.read_table(file) for file in files]).equals(pairs_of(todo))
    keys = [str(i) for i in range(9) if i != 4]
    assert pairs_of(todo).to_pylist() == [
        {
            "key": f"{i}.png",
            "source": f"{tmp_path}/in/{i}.png",
            "reference": f"{tmp_path}/ref/{i}.tif",
            "output": f"{tmp_path}/out/images/{i}.png",
            "size": 10,
            "fingerprint": pairs_of(todo)["fingerprint"][at].as_py(),
        }
        for at, i in enumerate(keys)
    ]
    writer = PartWriter(Store(str(tmp_path / "out")))
    writer.write(report_rows(pairs_of(todo).slice(0, 5), "restored", "r"))
    assert pairs_of(plan(scored, "r", "stored"))["key"].to_pylist() == ["6.png", "7.png", "8.png"]


@pytest.mark.usefixtures("small_parts")
def test_names_are_owned_across_parts(tmp_path: Path) -> None:
    make(tmp_path / "in", *(f"{i}.{ending}" for i in range(4) for ending in ("png", "tif")))
    first = plan(job(tmp_path, format="png", include=("2.tif",)), "r", "stored")
    PartWriter(Store(str(tmp_path / "out"))).write(report_rows(pairs_of(first), "restored", "r"))
    todo = plan(job(tmp_path, format="png"), "r", "stored")
    assert pairs_of(todo)["key"].to_pylist() == ["0.png", "1.png", "3.png"]
    assert list(decided(todo)) == ["0.tif", "1.tif", "2.png", "3.tif"]
    assert "that of 2.tif" in decided(todo)["2.png"][1]


@pytest.mark.usefixtures("small_parts")
def test_source_and_reference_in_one_place_are_listed_once(tmp_path: Path) -> None:
    make(tmp_path / "in", *(f"s/{kind}/{i}.png" for kind in ("blur", "sharp") for i in range(3)))
    (tmp_path / "in" / "s" / "sharp" / "1.png").unlink()
    both = job(tmp_path, reference=str(tmp_path / "in"), pair="blur=sharp", include=("*/blur/*",))
    todo = plan(both, "r", "stored")
    assert pairs_of(todo)["reference"].to_pylist() == [f"{tmp_path}/in/s/sharp/{i}.png" for i in (0, 2)]
    reason = decided(todo)["s/blur/1.png"][1]
    assert reason.endswith(f"in {tmp_path}/in under the rule blur=sharp")


@pytest.mark.usefixtures("small_parts")
def test_a_written_list_is_planned_in_its_own_order(tmp_path: Path) -> None:
    make(tmp_path, *(f"in/{i}.png" for i in range(6)), *(f"ref/{i}.png" for i in range(5)))
    lines = [f"in/{i}.png,{f'ref/{i}.png' if i != 2 else ''}" for i in (5, 3, 2, 4, 0)]
    (tmp_path / "pairs.csv").write_text("\n".join(["source,reference", *lines]) + "\n")
    todo = plan(job(tmp_path, source=str(tmp_path / "pairs.csv"), limit=4), "r", "stored")
    assert todo.keys.to_pylist() == ["5.png", "3.png", "2.png", "4.png"]
    assert pairs_of(todo)["reference"].to_pylist() == [f"{tmp_path}/ref/{i}.png" for i in (5, 3, 4)]
    assert list(decided(todo)) == ["2.png"]


def test_a_plan_for_elsewhere_leaves_the_output_alone(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "b\\c.png")
    todo = plan(job(tmp_path), "r", "stored", place=Store(str(tmp_path / "aside")))
    assert (pairs_of(todo)["key"].to_pylist(), list(decided(todo))) == (["a.png"], ["b\\\\c.png"])
    assert not (tmp_path / "out").exists()


def test_starting_anew_counts_no_earlier_row_and_says_what_it_leaves_behind(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "b.png", "bad.png")
    output = Store(str(tmp_path / "out"))
    first = plan(job(tmp_path), "r", "stored")
    writer = PartWriter(output)
    writer.write(report_rows(pairs_of(first).slice(0, 2), "restored", "r"))
    writer.write(report_rows(pairs_of(first).slice(2, 1), "unreadable", "r"))
    as_tiff = plan(job(tmp_path, format="tiff", include=("a.*",)), "t", "stored")
    writer.write(report_rows(pairs_of(as_tiff), "suspect", "t"))
    before = read_rows(output)

    (tmp_path / "in" / "b.png").unlink()
    fresh = job(tmp_path, fresh=True)
    images = set_aside(output)
    assert sorted(images.to_pylist()) == [f"{tmp_path}/out/images/{name}" for name in ("a.png", "a.tif", "b.png")]
    todo = plan(fresh, "r", "stored")
    assert pairs_of(todo)["key"].to_pylist() == ["a.png", "bad.png"]
    assert left_behind(todo, images) == 2  # a.tif and b.png
    assert len(read_rows(output)) == 0
    (aside,) = (tmp_path / "out" / "report-before").iterdir()
    (tmp_path / "again").mkdir()
    aside.rename(tmp_path / "again" / "report")
    assert read_rows(Store(str(tmp_path / "again"))).equals(before)
    assert len(set_aside(output)) == left_behind(todo, set_aside(output)) == 0


def test_what_remains_of_a_plan_is_what_has_no_row_since(tmp_path: Path) -> None:
    make(tmp_path / "in", *(f"{i}.png" for i in range(5)))
    output, writer = Store(str(tmp_path / "out")), PartWriter(Store(str(tmp_path / "out")))
    first = plan(job(tmp_path), "r", "stored")
    writer.write(report_rows(pairs_of(first).slice(0, 2), "crashed", "r"))
    again = plan(job(tmp_path, retry_failed=True), "r", "stored")
    assert again.to_restore == 5
    assert remaining(again, output).to_restore == 5  # an earlier run's rows are what is to be tried again
    writer.write(report_rows(pairs_of(again).slice(1, 3), "restored", "r"))
    writer.write(report_rows(pairs_of(again).slice(0, 1), "restored", "of another recipe"))
    left = remaining(again, output)
    assert pairs_of(left)["key"].to_pylist() == ["0.png", "4.png"]
    assert (left.to_restore, left.matched) == (2, 5)
    writer.write(report_rows(pairs_of(left), "restored", "r"))
    assert (remaining(left, output).to_restore, remaining(left, output).parts) == (0, ())
