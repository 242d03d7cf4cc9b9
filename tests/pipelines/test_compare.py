"""Runs that were made by hand, compared: numbers, verdicts, the page, the command and the flow."""

import io
import json
import math
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from nafnet.images import Picture, encode
from nafnet.recipe import Recipe, Step
from pipelines import compare_html
from pipelines.cli import app
from pipelines.compare import (
    LETTERS,
    UNRECORDED,
    Comparison,
    Field,
    NotARun,
    Pairing,
    Verdict,
    as_json,
    compare,
    cost,
    decibels,
    inputs_hash,
    load_run,
    markdown,
    precision_flags,
    table,
    terminal,
)
from pipelines.compare_html import CROP, MAX_LISTED, MAX_SHOWN, differences, look_at, write_comparison
from pipelines.machine import describe_machine
from pipelines.records import REPORT_SCHEMA
from pipelines.stages import digest
from pipelines.storage import StorageError, Store

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
RECIPE = {"hash": "r1", "steps": [{"weights": "ab" * 32, "tlc": True}], "precision": "float32", "strength": 1.0}
RECORD: dict[str, Any] = {
    "recipe": {**RECIPE, "deterministic": False},
    "versions": {"torch": "2.9"},
    "machine": {"host": "one", "cpu": "EPYC"},
    "job": {"source": "/in", "gpus_per_actor": 0.0, "limit": None, "max_failed": 0},
    "plan": {"attempted": 3},
    "ray": {"pool": {"actors": 2, "gpus": 0}, "threads": 4},
    "started_at": "2026-01-02T12:00:00+00:00",
    "finished_at": "2026-01-02T12:00:30+00:00",
}

MakeRun = Callable[..., str]


def pictures(*keys: str, seed: int = 0, size: tuple[int, int] = (60, 80)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.integers(10, 240, (*size, 3), dtype=np.uint8) for key in keys}


def make_row(output: Path, key: str, pixels: np.ndarray | None, recipe: str) -> dict[str, Any]:
    row = dict.fromkeys(REPORT_SCHEMA.names) | {"key": key, "recipe": recipe, "source": f"/in/{key}", "size": 1}
    row |= {"fingerprint": "f", "finished_at": NOON, "status": "crashed", "reason": "killed"}
    if pixels is None:
        return row
    path = output / "images" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(Picture(pixels, "PNG")))
    row |= {"status": "restored", "reason": None, "output": str(path), "digest": digest(pixels), "seconds": 0.5}
    row |= {"height": pixels.shape[0], "width": pixels.shape[1], "channels": pixels.shape[2], "bit_depth": 8}
    scores = {"psnr_input": 20.0, "psnr": 30.0, "ssim_2d_input": 0.5, "ssim_2d": 0.75}
    return row | scores | {"ssim_3d_input": 0.6, "ssim_3d": 0.9, "protocol": "gopro", "precision": "float32"}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run: its images (None for one that failed), and what rows and run.json have otherwise."""

    def make(
        name: str,
        images: dict[str, np.ndarray | None],
        rows: dict[str, dict[str, Any]] | None = None,
        summary: dict[str, Any] | None = None,
        **record: Any,
    ) -> str:
        output = tmp_path / name
        content = RECORD | {"job": RECORD["job"] | {"output": str(output)}} | record
        made = [
            make_row(output, key, pixels, content["recipe"]["hash"]) | (rows or {}).get(key, {})
            for key, pixels in images.items()
        ]
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(made, schema=REPORT_SCHEMA), file)
        store = Store(str(output))
        store.write("report/part.parquet", file.getvalue())
        store.write("run.json", json.dumps(content).encode())
        if summary is not None:
            store.write("summary.json", json.dumps(summary).encode())
        return str(output)

    return make


def pair(*places: str, tolerance: float = 0.01) -> Pairing:
    (pairing,) = compare([load_run(place) for place in places], tolerance).pairings
    return pairing


class Page(HTMLParser):
    """The text and tags of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = {"src", "href", "srcset", "action", "poster", "data"}
        self.links += [value or "" for name, value in attrs if name.rpartition(":")[2] in loading]
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open[: len(self.open) - (tag not in {"meta", "img", "br"})]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += f" {data}"


def render(comparison: Comparison, output: Path) -> tuple[str, Page, dict[str, Any]]:
    assert write_comparison(Store(str(output)), comparison) == str(output / "compare.html")
    source = (output / "compare.html").read_text()
    page = Page(source)
    assert not page.open
    return source, page, json.loads((output / "compare.json").read_text())


def test_identical_runs(make_run: MakeRun, tmp_path: Path) -> None:
    images = pictures("a.png", "sub/b.png")
    places = [make_run(name, images | {"bad.png": None}) for name in ("one", "two")]
    comparison = compare([load_run(place) for place in places])
    (pairing,) = comparison.pairings
    assert comparison.alike
    assert comparison.verdict is Verdict.IDENTICAL
    assert comparison.lines == ("B against A: identical: the same pixels in 2 images",)
    assert (pairing.recipe, pairing.fields, pairing.different, pairing.statuses) == ((), {}, (), ())
    assert pairing.largest("psnr") == ("a.png", 0)
    assert look_at(comparison, pairing) == ()
    _, page, found = render(comparison, tmp_path / "out")
    assert "B against A: identical the same pixels in 2 images" in page.text
    assert "The same recipe, scoring, versions, machine and job." in page.text
    assert page.tags.count("svg") == 2
    assert "img" not in page.tags
    assert found["alike"] is True
    assert found["against_first"][0]["pixels"] == {"different": 0, "unknown": 0, "keys": []}


def test_one_changed_pixel_is_within_tolerance_and_found(make_run: MakeRun, tmp_path: Path) -> None:
    images = pictures("a.png", "b.png", size=(200, 300))
    changed = images["b.png"].copy()
    changed[150, 290, 1] += 5
    first = make_run("one", images)
    other = make_run("two", images | {"b.png": changed}, {"b.png": {"psnr": 29.995, "ssim_3d": 0.8999}})
    comparison = compare([load_run(first), load_run(other)])
    (pairing,) = comparison.pairings
    assert pairing.verdict is Verdict.WITHIN
    assert pairing.different == ("b.png",)
    assert pairing.line == (
        "B against A: equal within tolerance: other pixels in 1 of 2 images; "
        "PSNR is off by \N{MINUS SIGN}0.0050 dB at most (b.png)"
    )
    key, off = pairing.largest("ssim") or ("", 0)
    assert (key, off, pairing.ssim_name) == ("b.png", pytest.approx(-0.0001), "ssim_3d")

    (look,) = look_at(comparison, pairing)
    assert (look.key, look.largest, look.top) == ("b.png", 5, 255)
    assert look.mean == pytest.approx(5 / (200 * 300 * 3))
    a, b, shown = (crop.pixels for crop in look.strip.crops)
    top, left = 200 - CROP, 300 - CROP  # as far into the corner as a crop goes
    np.testing.assert_array_equal(a, images["b.png"][top:, left:])
    np.testing.assert_array_equal(b, changed[top:, left:])
    expected = np.zeros((CROP, CROP, 3), np.uint8)
    expected[150 - top, 290 - left, 1] = 255
    np.testing.assert_array_equal(shown, expected)
    assert look.strip.crops[2].caption == "times 51"
    _, page, found = render(comparison, tmp_path / "out")
    assert "b.png 30.0000 dB 29.9950 dB \N{MINUS SIGN}0.0050 dB 5 of 255 2.778e-05 of 255" in page.text
    assert found["against_first"][0]["most_different"] == [
        {
            "key": "b.png",
            "psnr_first": 30.0,
            "psnr_other": 29.995,
            "psnr": pytest.approx(-0.005),
            "largest": 5,
            "mean": look.mean,
            "full_range": 255,
        }
    ]
    assert pair(first, other, tolerance=0.001).verdict is Verdict.DIFFER


def test_the_tolerance_itself_is_within_it(make_run: MakeRun) -> None:
    images = pictures("a.png")
    first = make_run("one", images, {"a.png": {"psnr": 30.0}})
    other = make_run("two", pictures("a.png", seed=1), {"a.png": {"psnr": 30.01}})
    assert pair(first, other).verdict is Verdict.WITHIN  # 30.01 - 30 is above 0.01 as floats are
    assert pair(first, other, tolerance=0.0099).verdict is Verdict.DIFFER


def test_psnr_beyond_tolerance_differs_and_says_where(make_run: MakeRun) -> None:
    images = pictures("a.png", "b.png", "c.png")
    others = pictures("a.png", "b.png", "c.png", seed=1)
    scores = {"a.png": {"psnr": 31.5}, "b.png": {"psnr": 29.9}}
    pairing = pair(make_run("one", images), make_run("two", others, scores))
    assert pairing.verdict is Verdict.DIFFER
    assert pairing.findings == (
        "other pixels in 3 of 3 images",
        "PSNR is off by +1.5000 dB at most (a.png), by more than 0.01 dB in 2 images",
    )
    assert pairing.most_different(2) == [0, 1]


def test_another_recipe_is_told_field_by_field(make_run: MakeRun, tmp_path: Path) -> None:
    images = pictures("a.png")
    first = make_run("one", images)
    steps = [{"weights": "cd" * 32, "tlc": True}]
    recipe = RECORD["recipe"] | {"hash": "r2", "precision": "bf16", "strength": 0.8, "steps": steps}
    job = RECORD["job"] | {"limit": 5, "max_failed": 9, "output": "elsewhere"}
    other = make_run("two", images, recipe=recipe, versions={"torch": "2.10", "ray": "2.60"}, job=job)
    comparison = compare([load_run(first), load_run(other)])
    (pairing,) = comparison.pairings
    assert not comparison.alike
    assert pairing.recipe == (
        Field("steps[0].weights", "ab" * 32, "cd" * 32),
        Field("precision", "float32", "bf16"),
        Field("strength", 1.0, 0.8),
    )
    assert pairing.fields == {
        "versions": (Field("torch", "2.9", "2.10"), Field("ray", UNRECORDED, "2.60")),
        "job": (Field("limit", None, 5),),
    }
    assert pairing.line == (
        "B against A: different recipes: steps[0].weights: abababababab… in A, cdcdcdcdcdcd… here; precision: float32 "
        "in A, bf16 here; strength: 1.0 in A, 0.8 here; the same pixels in 1 image"
    )
    _, page, _ = render(comparison, tmp_path / "out")
    assert f"recipe, steps[0].weights {'ab' * 32} {'cd' * 32}" in page.text
    assert "versions, ray not recorded 2.60" in page.text
    assert "job, limit none 5" in page.text

    recipe = RECORD["recipe"] | {"hash": "r3"}  # the fields mean something else in another version of the package
    pairing = pair(first, make_run("three", images, recipe=recipe))
    assert (pairing.verdict, pairing.recipe) == (Verdict.RECIPES, (Field("hash", "r1", "r3"),))


def test_missing_keys_and_other_ends_differ(make_run: MakeRun, tmp_path: Path) -> None:
    images: dict[str, np.ndarray | None] = dict(pictures("a.png", "b.png", "c.png", "d.png"))
    first = make_run("one", {key: images[key] for key in ("a.png", "b.png", "c.png")})
    other = make_run("two", {"a.png": images["a.png"], "b.png": None, "d.png": images["d.png"]})
    comparison = compare([load_run(first), load_run(other)])
    (pairing,) = comparison.pairings
    assert pairing.verdict is Verdict.DIFFER
    assert (pairing.only_first, pairing.only_other) == (("c.png",), ("d.png",))
    assert pairing.statuses == (("b.png", "restored", "crashed"),)
    assert pairing.findings == (
        "1 image in A alone (c.png)",
        "1 image here alone (d.png)",
        "1 image ended otherwise (b.png: restored, here crashed)",
        "the same pixels in 1 image",
    )
    _, page, found = render(comparison, tmp_path / "out")
    for words in ("Ended otherwise Image A B b.png restored crashed", "In A alone c.png", "In B alone d.png"):
        assert words in page.text
    assert found["against_first"][0]["statuses"] == [{"key": "b.png", "first": "restored", "other": "crashed"}]


def test_scores_of_two_conventions_are_not_compared(make_run: MakeRun) -> None:
    images = pictures("a.png")
    first = make_run("one", images)
    scored = {"a.png": {"protocol": "gopro+basicsr", "psnr": 28.0, "ssim_3d": None}}
    pairing = pair(first, make_run("two", images, scored))
    assert pairing.verdict is Verdict.IDENTICAL
    assert pairing.largest("psnr") is None
    assert pairing.findings[-1] == "scored as gopro in A and as gopro+basicsr here"
    pairing = pair(first, make_run("three", pictures("a.png", seed=1), scored))
    assert pairing.verdict is Verdict.DIFFER
    assert "no PSNR to compare 1 image by (a.png)" in pairing.findings


def test_infinite_and_absent_scores_and_digests(make_run: MakeRun, tmp_path: Path) -> None:
    images, others = pictures("a.png", "b.png", "c.png"), pictures("a.png", "b.png", "c.png", seed=1)
    none = {"psnr": None, "ssim_3d": None, "ssim_2d": None, "protocol": None}
    rows = {"a.png": {"psnr": math.inf}, "b.png": {"psnr": math.inf}, "c.png": none}
    first = make_run("one", images, rows)
    other = make_run("two", others, {"a.png": {"psnr": math.inf}, "c.png": none})
    comparison = compare([load_run(first), load_run(other)])
    (pairing,) = comparison.pairings
    np.testing.assert_array_equal(pairing.psnr, [0, -math.inf, np.nan])
    assert pairing.unweighed == ("c.png",)
    assert "PSNR is off by infinite at most (b.png), by more than 0.01 dB in 1 image" in pairing.findings
    assert pairing.most_different(9) == [1, 0, 2]
    _, page, found = render(comparison, tmp_path / "out")
    assert "b.png identical to the reference 30.0000 dB infinite" in page.text
    assert found["against_first"][0]["psnr"]["largest"] == "infinite"

    old = {"a.png": {"digest": None}}  # of a version that had none
    pairing = pair(make_run("three", pictures("a.png"), old), make_run("four", pictures("a.png"), old))
    assert pairing.verdict is Verdict.WITHIN
    assert pairing.findings == ("no digest of the pixels of 1 image", "PSNR is off by +0.0000 dB at most (a.png)")
    assert pairing.different == ()


def test_equal_pixels_with_other_scores_differ(make_run: MakeRun) -> None:
    images = pictures("a.png")
    pairing = pair(make_run("one", images), make_run("two", images, {"a.png": {"psnr": 25.0}}))
    assert pairing.verdict is Verdict.DIFFER
    assert pairing.findings == (
        "the same pixels in 1 image",
        "PSNR is off by \N{MINUS SIGN}5.0000 dB at most (a.png), by more than 0.01 dB in 1 image",
    )


def test_rows_that_went_otherwise_than_asked_are_counted(make_run: MakeRun) -> None:
    images = pictures("a.png", "b.png")
    rows = {"a.png": {"tile": 512, "precision": "bf16", "fingerprint": "g"}}
    pairing = pair(make_run("one", images), make_run("two", images, rows))
    assert (pairing.tiles, pairing.precisions, pairing.inputs) == (1, 1, 1)
    assert pairing.findings[1:] == ("1 image in other tiles", "1 image in other precision")


def test_three_runs_in_columns(make_run: MakeRun, tmp_path: Path) -> None:
    images = pictures("a.png", size=(500, 1000))
    first = make_run("one", images, summary={"wall_seconds": 10.0, "images_per_second": 0.1})
    gpu = {"pool": {"actors": 1, "gpus": 0.5}, "threads": 1}
    machine = {"cpu": "EPYC", "gpus": ["NVIDIA H200"]}
    second = make_run("two", images, {"a.png": {"seconds": 0.25}}, ray=gpu, machine=machine)
    third = make_run("three", pictures("a.png", seed=1, size=(500, 1000)), {"a.png": {"psnr": 31.0}})
    comparison = compare([load_run(place) for place in (first, second, third)])
    assert [pairing.verdict for pairing in comparison.pairings] == [Verdict.IDENTICAL, Verdict.DIFFER]
    assert comparison.verdict is Verdict.DIFFER
    rows = dict(table(comparison))
    assert rows["mean PSNR"] == ["30.0000 dB", "30.0000 dB", "31.0000 dB"]
    assert rows["PSNR less that of A, largest"] == ["–", "+0.0000 dB", "+1.0000 dB"]  # noqa: RUF001 - an en dash
    assert rows["pixels differ in"][1:] == ["0 of 1", "1 of 1"]
    assert rows["device"] == ["EPYC", "NVIDIA H200", "EPYC"]
    assert rows["network s/MP"] == ["1.0000", "0.5000", "1.0000"]
    assert rows["GPU-s/MP"][1] == "0.2500"
    assert rows["CPU-s/MP"][::2] == ["4.0000", "4.0000"]
    assert rows["wall time"] == ["10.0 s", "30.0 s", "30.0 s"]  # the others' from run.json
    assert rows["images/s"] == ["0.10", "0.10", "0.10"]
    lines = terminal(comparison).splitlines()
    assert lines[0] == f"A  {first}"
    assert lines[3].split() == ["A", "B", "C"]
    assert lines[-1].startswith("C against A: differ: other pixels in 1 of 1 image; PSNR is off by +1.0000 dB")
    assert f"| {rows['mean PSNR'][2]} |" in markdown(comparison)
    _, page, found = render(comparison, tmp_path / "out")
    assert page.tags.count("svg") == 4
    assert len({*page.tags} & {"h1"}) == 1
    assert [run["cost"]["wall_seconds"] for run in found["runs"]] == [10, 30, 30]
    assert as_json(comparison)["against_first"][1]["letter"] == "C"


def test_the_devices_are_the_clusters_where_it_told_them(make_run: MakeRun) -> None:
    images = pictures("a.png")
    machines = [
        {"count": 2, "cpu": "Xeon", "gpus": ["NVIDIA H100"]},
        {"count": 1, "cpu": "EPYC", "gpus": ["NVIDIA A10"]},
        {"count": 3, "cpu": "Xeon"},
    ]
    gpu = {"pool": {"actors": 3, "gpus": 1}, "machines": machines}
    places = [
        make_run("gpu", images, ray=gpu),
        make_run("cpu", images, ray={**RECORD["ray"], "machines": machines}),
        make_run("unknown", images, ray={**gpu, "machines": []}),
    ]
    rows = dict(table(compare([load_run(place) for place in places])))
    assert rows["device"] == ["NVIDIA A10 and NVIDIA H100", "EPYC and Xeon", "a GPU"]


def test_cost_without_ray_and_deterministic(make_run: MakeRun) -> None:
    images = pictures("a.png", size=(500, 1000))
    recipe = RECORD["recipe"] | {"deterministic": True}
    found = cost(load_run(make_run("one", images, recipe=recipe)))
    assert (found.cpu_seconds_per_megapixel, found.gpu_seconds_per_megapixel) == (1, None)  # one thread of its four
    job = RECORD["job"] | {"gpus_per_actor": 0.25}
    found = cost(load_run(make_run("two", images, ray={}, job=job)))
    assert (found.cpu_seconds_per_megapixel, found.gpu_seconds_per_megapixel) == (None, 0.25)
    found = cost(load_run(make_run("three", {"a.png": None}, ray={})))
    assert (found.seconds, found.seconds_per_megapixel) == (0, None)


def test_a_run_that_was_moved_shows_its_own_images(make_run: MakeRun, tmp_path: Path) -> None:
    images, others = pictures("sub/a.png"), pictures("sub/a.png", seed=1)
    first, other = make_run("one", images), make_run("two", others)
    shutil.move(other, tmp_path / "moved")
    comparison = compare([load_run(first), load_run(str(tmp_path / "moved"))])
    (look,) = look_at(comparison, comparison.pairings[0])
    np.testing.assert_array_equal(look.strip.crops[1].pixels, others["sub/a.png"])


def test_images_gone_or_of_another_size_become_notes(make_run: MakeRun, tmp_path: Path) -> None:
    images, others = pictures("a.png", "b.png"), pictures("a.png", "b.png", seed=1)
    first = make_run("one", images)
    other = make_run("two", others | pictures("b.png", size=(30, 40)))
    (tmp_path / "one" / "images" / "a.png").unlink()
    comparison = compare([load_run(first), load_run(other)])
    looks = look_at(comparison, comparison.pairings[0])
    assert [[crop.note for crop in look.strip.crops] for look in looks] == [
        ["not shown: the file is gone", "not compared"],
        ["not of one size: 80 x 60 pixels of 3 channels in A, 40 x 30 pixels of 3 channels in B"] * 2,
    ]
    _, page, found = render(comparison, tmp_path / "out")
    assert "not shown: the file is gone" in page.text
    assert found["against_first"][0]["most_different"][0]["largest"] is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_differences_of_every_kind_of_sample(dtype: type[np.generic], rng: np.random.Generator) -> None:
    top = 1 if dtype is np.float32 else int(np.iinfo(dtype).max)
    a, b = ((rng.random((700, 90, 4)) * top).astype(dtype) for _ in range(2))
    found = differences(a, b)
    exact = np.abs(a.astype(np.float64) - b.astype(np.float64))
    assert found.largest == pytest.approx(exact.max())
    assert found.mean == pytest.approx(exact.mean(), rel=1e-6)
    assert exact[found.place].max() == exact.max()


def test_a_place_that_is_no_run_says_what_was_looked_for(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("nowhere", "file"):
        with pytest.raises(NotARun, match=f"no run at {tmp_path}/{place}: looked for a run.json there"):
            load_run(str(tmp_path / place))
    run = Path(make_run("one", pictures("a.png")))
    for content, said in {
        "{": "run.json is damaged, or is no JSON",
        "[]": "looked for a JSON object",
        '{"recipe": 1}': "looked for recipe.hash in it",
        '{"recipe": {"hash": "r9"}}': r"looked for rows of recipe r9 in report/\*.parquet",
    }.items():
        (run / "run.json").write_text(content)
        with pytest.raises(NotARun, match=said):
            load_run(str(run))
    with pytest.raises(StorageError, match="cannot open nowhere://x"):
        load_run("nowhere://x")


def test_impossible_wishes_are_refused(make_run: MakeRun) -> None:
    run = load_run(make_run("one", pictures("a.png")))
    for count in (0, 1, len(LETTERS) + 1):
        with pytest.raises(ValueError, match=f"give two runs or more to compare, at most 26: got {count}"):
            compare([run] * count)
    for tolerance in (-1, math.nan):
        with pytest.raises(ValueError, match="tolerance is a number of dB"):
            compare([run, run], tolerance)


def test_page_escapes_and_loads_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    keys = ("<b>.png", "</table>\"'&.png", "<script>x(1)<.png")
    images: dict[str, np.ndarray | None] = dict(pictures("<b>.png", seed=0))
    others: dict[str, np.ndarray | None] = dict(pictures("<b>.png", seed=1))
    machine = {"</td><script>": "<img src=x>", "url": "https://a.example/x"}
    first = make_run("<i>one", images | {keys[1]: None, keys[2]: None}, started_at="<script>")
    odd = {keys[2]: {"status": "<script>y</script>"}}
    other = make_run("two", others | {keys[2]: None}, odd, machine=machine)
    comparison = compare([load_run(first), load_run(other)])
    source, page, _ = render(comparison, tmp_path / "out")
    assert "script" not in page.tags
    assert not {"script", "link", "iframe", "object", "b>.png", "i"} & set(page.tags)
    assert "<script" not in source
    assert "<b>.png" not in source
    assert all(key in page.text for key in keys)
    assert page.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "@import" not in source
    assert "url(http" not in source.replace(" ", "")
    assert page.tags.count("img") == 3
    text = markdown(comparison)
    assert "<" not in text.replace("&lt;", "")
    assert "\\|" not in text.splitlines()[0]


def test_many_rows_stay_a_small_page(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, count = np.random.default_rng(0), 5000

    def rows(seed: int) -> pa.Table:
        made = [make_row(tmp_path, f"{i:05}", None, "r1") for i in range(count)]
        for row in made:
            row |= {"status": "restored", "psnr": float(rng.normal(30, 2)), "protocol": "gopro"}
            row |= {"digest": f"{seed}", "ssim_2d": 0.5, "width": 10, "height": 10, "seconds": 1.0}
        return pa.Table.from_pylist(made, schema=REPORT_SCHEMA)

    for name in ("one", "two"):
        place = Path(make_run(name, {"x": None}))
        pq.write_table(rows(len(name) + ord(name[0])), place / "report" / "part.parquet")
    comparison = compare([load_run(str(tmp_path / name)) for name in ("one", "two")])
    source, page, found = render(comparison, tmp_path / "out")
    assert len(source) < 500_000
    assert len(found["against_first"][0]["pixels"]["keys"]) == count
    assert len(found["against_first"][0]["most_different"]) == MAX_SHOWN
    assert f"and {count - MAX_LISTED:,} more, in compare.json" in page.text
    assert "2,000 of 5,000 images, drawn at random" in page.text


def test_inputs_hash_goes_by_key_and_fingerprint() -> None:
    rows = pa.table({"key": ["a", "b"], "fingerprint": ["1", "2"]})
    assert inputs_hash(rows) == inputs_hash(rows.take([1, 0]))
    others = (["a", "c"], ["1", "2"]), (["a", "b"], ["1", "3"]), (["a"], ["1"])
    hashes = {inputs_hash(pa.table({"key": keys, "fingerprint": prints})) for keys, prints in others}
    assert len(hashes | {inputs_hash(rows)}) == 4


def test_machine_names_its_processor_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = describe_machine()
    assert set(facts) == {"host", "system", "cpus", "cpu", "memory_gib", "python", "torch"}
    assert 0 < facts["memory_gib"] < 100_000
    assert (facts["cpus"], bool(facts["cpu"])) == (os.cpu_count(), True)
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.86.15'\necho 'NVIDIA H200, 570.86.15'\n")
    command.chmod(0o755)
    facts = describe_machine()
    assert facts["gpus"] == ["NVIDIA H200", "NVIDIA H200"]
    assert facts["driver"] == "570.86.15"
    assert {"cuda", "cudnn"} <= set(facts)
    command.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert "gpus" not in describe_machine()


def test_precision_flags_are_those_of_the_recipe() -> None:
    flags = precision_flags(Recipe((Step("a"),), precision="bf16", tf32=True), 4)
    assert flags == {
        "dtype": "bf16",
        "tf32": True,
        "deterministic": False,
        "cudnn_deterministic": False,
        "cudnn_benchmark": False,
        "threads": 4,
    }


def test_decibels_have_a_sign() -> None:
    assert [decibels(value) for value in (0.00126, -1, math.inf)] == [
        "+0.0013 dB",
        "\N{MINUS SIGN}1.0000 dB",
        "infinite",
    ]


def test_the_command_prints_columns_and_ends_by_the_verdict(make_run: MakeRun, tmp_path: Path) -> None:
    images = pictures("a.png")
    first, same = make_run("one", images), make_run("two", images)
    far = make_run("three", pictures("a.png", seed=1), {"a.png": {"psnr": 20.0}})
    output = str(tmp_path / "out")
    done = CliRunner().invoke(app, ["compare", first, same, "--output", output])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["B against A: identical: the same pixels in 1 image", f"report  {output}/compare.html"]
    assert (tmp_path / "out" / "compare.json").exists()
    done = CliRunner().invoke(app, ["compare", first, same, far, "--output", output])
    assert done.exit_code == 1
    assert "C against A: differ: other pixels in 1 of 1 image; PSNR is off by" in done.stdout
    done = CliRunner().invoke(app, ["compare", first, far, "--output", output, "--tolerance", "10"])
    assert done.exit_code == 0
    for words, said in (
        ([first, str(tmp_path)], f"nafnet: no run at {tmp_path}: looked for a run.json there"),
        ([first], "nafnet: give two runs or more to compare"),
        ([first, same, "--tolerance", "-1"], "nafnet: tolerance is a number of dB from zero up, got -1.0"),
    ):
        done = CliRunner().invoke(app, ["compare", *words, "--output", str(tmp_path / "none")])
        assert done.exit_code == 2
        assert done.stderr.startswith(said)
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_ends_by_the_verdict_and_shows_the_table(make_run: MakeRun, tmp_path: Path) -> None:
    from prefect import get_client

    from pipelines import flows

    images = pictures("a.png")
    first, same = make_run("one", images), make_run("two", images)
    far = make_run("three", pictures("a.png", seed=1), {"a.png": {"psnr": 20.0}})
    state = flows.compare((first, same), str(tmp_path / "out"), return_state=True)
    assert state.is_completed()
    assert state.message == "B against A: identical: the same pixels in 1 image"
    assert (tmp_path / "out" / "compare.html").exists()
    with get_client(sync_client=True) as client:
        shown = {artifact.key: artifact.data for artifact in client.read_artifacts()}
    assert "**B against A: identical" in str(shown["comparison"])
    state = flows.compare((first, far), str(tmp_path / "out"), return_state=True)
    assert state.is_failed()
    assert state.name == flows.DIFFERENT
    assert "PSNR is off by" in str(state.message)


def test_the_page_has_a_crop_for_every_shown_image(make_run: MakeRun, tmp_path: Path) -> None:
    names = [f"{i:02}.png" for i in range(MAX_SHOWN + 3)]
    first, *others = (make_run(name, pictures(*names, seed=i, size=(20, 30))) for i, name in enumerate("abc"))
    comparison = compare([load_run(place) for place in (first, *others)])
    looks = {pairing.letter: look_at(comparison, pairing) for pairing in comparison.pairings}
    assert [len(shown) for shown in looks.values()] == [MAX_SHOWN // 2] * 2
    page = Page(compare_html.render(comparison, looks))
    assert page.tags.count("img") == 3 * MAX_SHOWN


def test_a_run_in_a_bucket_against_one_on_disk(make_run: MakeRun, tmp_path: Path, s3_url: str) -> None:
    first = make_run("one", pictures("a b.png"))
    local = Store(make_run("two", pictures("a b.png", seed=1)))
    bucket = Store(f"{s3_url}/runs/two")
    for entry in list(local.list()):
        bucket.write(entry.key, local.read(entry.key))
    shutil.rmtree(local.root)
    comparison = compare([load_run(first), load_run(bucket.url())])
    page = write_comparison(Store(f"{s3_url}/compared"), comparison)
    assert page == f"{s3_url}/compared/compare.html"
    (look,) = json.loads(Store(f"{s3_url}/compared").read("compare.json"))["against_first"][0]["most_different"]
    assert look["largest"] > 100  # read from the bucket: the one on disk is gone
    with pytest.raises(NotARun, match="looked for a run"):
        load_run(f"{s3_url}/runs")
