import io
import json
import math
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nafnet.recipe import Recipe, Step
from pipelines.records import REPORT_SCHEMA, Status
from pipelines.report import (
    MAX_SEQUENCES,
    ReportError,
    by_sequence,
    count_line,
    extremes,
    fact_table,
    read_rows,
    seconds_text,
    sequence,
    summarize,
    summary_markdown,
    write_summary,
)
from pipelines.report_html import MAX_FAILED, MAX_LISTED, slowest, worst, write_report
from pipelines.report_plots import MAX_POINTS, bars, plots
from pipelines.report_sheet import CROP, load_strips, most_detailed, sheet_png, sheet_size
from pipelines.storage import Store

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
RUN = {
    "started_at": "2026-01-02T12:00:00Z",
    "recipe": {"hash": "r1", "tile": 512},
    "weights": {"sha256": "ab" * 32},
    "versions": {"torch": "2.9"},
    "machine": {"gpus": [{"name": "<b>GPU</b>"}], "note": None},
    "job": {"include": ["*.png", "*.jpg"], "empty": {}},
    "steps": ({"tlc": True}, {"tlc": False}),
}


def row(key: str, **fields: Any) -> dict[str, Any]:
    base = dict.fromkeys(REPORT_SCHEMA.names) | {
        "key": key,
        "status": "restored",
        "recipe": "r1",
        "source": f"/nowhere/{key}",
        "size": 1,
        "fingerprint": "f",
        "finished_at": NOON,
    }
    return base | fields


def scored(key: str, before: float, after: float, **fields: Any) -> dict[str, Any]:
    scores = {"psnr_input": before, "psnr": after, "ssim_2d_input": 0.5, "ssim_2d": 0.75, "protocol": "gopro"}
    size = {"width": 1000, "height": 500, "channels": 3, "bit_depth": 8, "seconds": 2.0}
    return row(key, **{**size, **scores, **fields})


def write_part(output: Store, name: str, rows: list[dict[str, Any]]) -> None:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=REPORT_SCHEMA), file)
    output.write(f"report/{name}.parquet", file.getvalue())


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=REPORT_SCHEMA)


@pytest.fixture
def output(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


@pytest.fixture
def photos(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows of three scored images of three sizes, with their files; gains of 1, 2 and 3 dB."""
    rows = []
    for index, (name, wide, high) in enumerate([("a", 600, 300), ("b", 300, 280), ("sub/c", 97, 60)]):
        pixels = np.random.default_rng(index).integers(0, 256, (high, wide, 3)).astype(np.uint8)
        places = {}
        for field in ("source", "output", "reference"):
            path = tmp_path / field / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            places[field] = str(path)
        rows.append(scored(f"{name}.png", 20.0, 21.0 + index, width=wide, height=high, **places))
    return rows


class Page(HTMLParser):
    """The text, tags and attributes of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
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

    def values(self, tag: str, name: str) -> list[str]:
        return [value for where, what, value in self.attributes if (where, what) == (tag, name)]


def render(output: Store, rows: pa.Table, run: dict[str, Any] | None = None) -> tuple[str, Page]:
    url = write_report(output, rows, summarize(rows, wall_seconds=10.0), RUN if run is None else run)
    assert url == output.url("report.html")
    source = output.read("report.html").decode()
    return source, Page(source)


def test_rows_are_one_per_key_sorted_and_the_latest_finished_counts(output: Store) -> None:
    late = NOON + timedelta(seconds=1)
    write_part(output, "z", [row("b", status="crashed", reason="killed"), row("a")])
    write_part(output, "a", [row("b", finished_at=late), row("c", recipe="r2", finished_at=late)])
    write_part(output, "m", [row("c", status="missing", reason="gone")])
    rows = read_rows(output)
    assert rows.schema.equals(REPORT_SCHEMA)
    assert rows.select(["key", "status"]).to_pylist() == [
        {"key": "a", "status": "restored"},
        {"key": "b", "status": "restored"},
        {"key": "c", "status": "restored"},
    ]
    assert read_rows(output, recipe="r1")["status"].to_pylist() == ["restored", "restored", "missing"]
    assert read_rows(output, recipe="other").num_rows == 0


def test_no_parts_give_an_empty_table_and_a_whole_report(output: Store) -> None:
    rows = read_rows(output)
    assert rows.num_rows == 0
    assert rows.schema.equals(REPORT_SCHEMA)
    summary = summarize(rows)
    assert count_line(summary) == "0 images"
    assert summary["psnr"] is None
    assert summary["worst"] is None
    json.dumps(summary, allow_nan=False)
    assert summary_markdown(summary).startswith("**0 images**")
    _, page = render(output, rows, {})
    assert "0 images restored" in page.text
    assert load_strips(rows) == ()
    assert Image.open(io.BytesIO(sheet_png(()))).size == sheet_size(())


@pytest.mark.parametrize("damage", ["truncated", "text", "foreign", "null key"])
def test_a_file_that_is_no_report_part_is_named(output: Store, damage: str) -> None:
    write_part(output, "good", [row("a")])
    file = io.BytesIO()
    if damage == "null key":
        schema = pa.schema([field.with_nullable(True) for field in REPORT_SCHEMA])
        pq.write_table(pa.Table.from_pylist([row("a") | {"key": None}], schema=schema), file)
    else:
        pq.write_table(pa.table({"key": ["a"]}), file)
    data = {"truncated": output.read("report/good.parquet")[:-20], "text": b"no parquet"}
    output.write("report/bad.parquet", data.get(damage, file.getvalue()))
    with pytest.raises(ReportError, match=r"report/bad\.parquet is not a whole report part"):
        read_rows(output)


def test_summary_counts_every_status_and_keeps_infinities_out_of_the_means() -> None:
    failed = [row(f"bad/{status}", status=status.value, reason="why") for status in Status]
    rows = table(
        scored("a", 20.0, 30.0),
        scored("b", 22.0, 25.0, seconds=4.0),
        scored("c", 24.0, 23.0),
        scored("same before", math.inf, 40.0),
        scored("same after", 10.0, math.inf, ssim_2d_input=None),
        scored("crashed", 1.0, 99.0, status="crashed"),
        *[bad for bad in failed if bad["status"] != "restored"],
        row("unscored", width=1000, height=1000, seconds=None),
    )
    summary = summarize(rows, wall_seconds=8.0, wall_images=4)
    assert summary["images"] == 13
    assert summary["counts"] == {
        "restored": 6,
        "unreadable": 1,
        "missing": 1,
        "mismatched": 1,
        "refused": 1,
        "suspect": 1,
        "crashed": 2,
    }
    assert (summary["scored"], summary["gain_images"]) == (5, 3)
    assert (summary["identical_input"], summary["identical_restored"]) == (1, 1)
    assert summary["psnr_input"] == pytest.approx((20 + 22 + 24 + 10) / 4)
    assert summary["psnr"] == pytest.approx((30 + 25 + 23 + 40) / 4)
    assert summary["gain"] == pytest.approx((10 + 3 - 1) / 3)
    assert (summary["ssim_2d_input"], summary["ssim_2d"], summary["ssim_3d"]) == (0.5, 0.75, None)
    assert summary["worst"] == {"key": "c", "gain": -1.0}
    assert summary["median"] == {"key": "b", "gain": 3.0}
    assert summary["best"] == {"key": "a", "gain": 10.0}
    assert summary["protocols"] == ["gopro"]
    assert summary["conventions"] == ["the NAFNet authors' PSNR and SSIM-3D, prediction rounded"]
    assert summary["megapixels"] == pytest.approx(5 * 0.5 + 1)
    assert summary["network_seconds"] == pytest.approx(12)
    assert summary["network_seconds_mean"] == pytest.approx(2.4)
    assert summary["network_seconds_p50"] == pytest.approx(2)
    assert summary["network_seconds_p95"] == pytest.approx(3.6)
    assert summary["megapixels_per_network_second"] == pytest.approx(2.5 / 12)
    assert summary["images_per_second"] == pytest.approx(0.5)
    assert count_line(summary) == (
        "13 images: 6 restored, 1 unreadable, 1 missing, 1 mismatched, 1 refused, 1 suspect, 2 crashed"
    )


def test_summary_json_is_what_was_summarized(output: Store) -> None:
    summary = summarize(table(scored("a", math.inf, math.inf)))
    assert write_summary(output, summary) == output.url("summary.json")
    assert json.loads(output.read("summary.json")) == summary
    assert summary["psnr"] is None
    assert summary["gain"] is None
    assert count_line(summary) == "1 image: 1 restored"


def test_markdown_shows_the_numbers_and_escapes_keys() -> None:
    text = summary_markdown(summarize(table(scored("<script>|`*x*`\n# y", 30.0, 28.5)), wall_seconds=200.0))
    assert "| PSNR | 30.00 dB | 28.50 dB | \N{MINUS SIGN}1.50 dB |" in text
    assert "| SSIM 2D | 0.5000 | 0.7500 | +0.2500 |" in text
    assert "| Wall time | 3 min 20 s |" in text
    assert "&lt;script&gt;\\|\\`\\*x\\*\\` # y |" in text
    assert "<script>" not in text


def test_the_ssim_of_the_convention_comes_first_and_the_convention_is_named(
    output: Store, photos: list[dict[str, Any]]
) -> None:
    rows = table(*(photo | {"ssim_3d_input": 0.6, "ssim_3d": 0.9} for photo in photos))
    text = summary_markdown(summarize(rows))
    assert text.index("| SSIM 3D | 0.6000 | 0.9000 |") < text.index("| SSIM 2D | 0.5000 | 0.7500 |")
    assert "| Scores | the NAFNet authors&#x27; PSNR and SSIM-3D, prediction rounded |" in text
    assert {strip.crops[1].caption.split(" · ")[1] for strip in load_strips(rows)} == {"SSIM\u00a03D\u00a00.9000"}

    rows = table(*(photo | {"protocol": "gopro+basicsr+y+crop4"} for photo in photos))
    _, page = render(output, rows)
    words = "BasicSR's PSNR and SSIM-2D of the Y channel without 4 px on each side, prediction rounded"
    assert f"Scoring protocol gopro+basicsr+y+crop4 Scores {words}" in page.text
    assert "SSIM 3D" not in page.text


def facts_of(rows: pa.Table, recipe: Recipe | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    summary = summarize(rows, recipe=recipe)
    return summary, dict(fact_table(summary))


def test_tiles_are_counted_and_called_approximate_where_a_step_has_no_tlc(output: Store) -> None:
    rows = table(
        row("a"), row("b", tile=512, tiles=4), row("c", tile=432, tiles=7), row("d", status="suspect", tile=512)
    )
    local, whole = Step("a"), Step("b", tlc=False)
    summary, facts = facts_of(rows, Recipe((local,)))
    assert (summary["tiled"], facts["Restored in tiles"]) == (2, "2")
    summary, facts = facts_of(rows, Recipe((local, whole)))
    said = "2: tiles are approximate: without TLC a tile's means are not the image's"
    assert facts["Restored in tiles"] == said
    assert "tiles are approximate: without TLC a tile&#x27;s means" in summary_markdown(summary)
    write_report(output, rows, summary, RUN)
    assert said in Page(output.read("report.html").decode()).text
    summary, facts = facts_of(rows.slice(0, 1), Recipe((whole,)))
    assert summary["tiled"] == 0
    assert "Restored in tiles" not in facts


def test_notes_are_counted_and_the_most_frequent_shown(output: Store) -> None:
    notes = [name for name, times in zip("abcdefg", (1, 2, 3, 4, 5, 6, 7), strict=True) for _ in range(times)]
    rows = table(row("clean"), *(row(f"{i:02}", note=f"<note> {name}") for i, name in enumerate(notes)))
    summary, facts = facts_of(rows)
    assert summary["noted"] == 28
    assert summary["notes"] == [{"note": f"<note> {name}", "images": 7 - i} for i, name in enumerate("gfedc")]
    assert facts["Noted of 7 images"] == "<note> g"
    assert facts["With other notes"] == "3"
    assert "| Noted of 3 images | &lt;note&gt; c |" in summary_markdown(summary)
    _, page = render(output, rows)
    assert "Noted of 7 images <note> g" in page.text
    assert "<note> b" not in page.text
    summary, facts = facts_of(rows.slice(0, 1))
    assert (summary["noted"], summary["notes"]) == (0, [])
    assert not any("ote" in what for what in facts)


def test_notes_of_as_many_images_are_all_shown() -> None:
    rows = table(row("a", note="one"), row("b", note="another"))
    shown = fact_table(summarize(rows))
    assert ("Noted of 1 image", "one") in shown
    assert ("Noted of 1 image", "another") in shown


def test_a_precision_that_is_not_the_recipes_is_shown() -> None:
    rows = table(row("a", precision="bf16"), row("b", precision="float32"), row("c", precision="float32"), row("d"))
    recipe = Recipe((Step("a"),), precision="bf16")
    summary, facts = facts_of(rows, recipe)
    assert summary["other_precisions"] == {"float32": 2}
    assert facts["Restored in float32 instead"] == "2"
    assert facts_of(rows.slice(0, 1), recipe)[0]["other_precisions"] == {}
    assert not any("instead" in what for what in facts_of(rows)[1])  # nothing to compare with


def test_suspects_are_listed_with_their_reason_and_never_shown_as_restored(
    output: Store, photos: list[dict[str, Any]]
) -> None:
    suspect = photos[0] | {"status": "suspect", "reason": "the result is 0.60 of full range from its input"}
    source, page = render(output, table(suspect, *photos[1:]))
    assert "a.png suspect the result is 0.60 of full range from its input" in page.text
    assert "1 suspect" in page.text
    assert "the result was implausible, the input was written in its place" in page.text
    assert source.count("--suspect:") == 2  # a colour for light and for dark
    assert {strip.key for strip in load_strips(table(suspect, *photos[1:]))} == {"b.png", "sub/c.png"}
    assert load_strips(table(suspect)) == ()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("GOPR0384_11_00/blur/000001.png", "GOPR0384_11_00"),
        ("test/GOPR0384_11_00/blur_gamma/000001.png", "GOPR0384_11_00"),
        ("GOPR0384_11_00-000001.png", "GOPR0384_11_00"),
        ("gopro-000000.tar/GOPR0384_11_00-000001.input.png", "GOPR0384_11_00"),
        ("000/00000009.jpg", "000"),
        ("val_blur_jpeg/000/00000009.jpg", "000"),
        ("000_00000009.png", "000"),
        ("0007_21.png", "0007"),
        ("holiday/day one/0001.png", "holiday"),
        ("shard-0.tar/holiday/0001.png", "holiday"),
        ("shard-0.tar/0001.png", None),
        ("GOPR0384.png", None),
        ("0001.png", None),
        ("photo_00000009.png", None),
    ],
)
def test_sequences_are_read_off_the_keys_of_every_layout(key: str, name: str | None) -> None:
    assert sequence(key) == name


def test_each_sequence_has_a_row_of_counts_and_means(output: Store) -> None:
    rows = table(
        scored("b/1.png", 20.0, 30.0, seconds=1.0),
        scored("b/2.png", 22.0, 26.0, seconds=3.0, ssim_2d=0.85),
        scored("b/3.png", 24.0, math.inf),
        scored("b/4.png", 1.0, 99.0, status="suspect", reason="implausible"),
        scored("a/1.png", 30.0, 29.0, seconds=0.5),
        row("c/1.png", status="missing", reason="gone"),
        scored("alone.png", 10.0, 20.0),
    )
    summary = summarize(rows)
    assert by_sequence(rows) == summary["sequences"]
    a, b, c = summary["sequences"]
    assert [each["sequence"] for each in (a, b, c)] == ["a", "b", "c"]
    assert [(each["images"], each["restored"]) for each in (a, b, c)] == [(1, 1), (4, 3), (1, 0)]
    assert (b["psnr_input"], b["psnr"], b["gain"]) == (22.0, 28.0, 7.0)
    assert b["ssim_2d"] == pytest.approx((0.75 + 0.85 + 0.75) / 3)
    assert (b["ssim_3d"], b["network_seconds_mean"]) == (None, 2.0)
    assert (a["gain"], c["psnr"], c["gain"], c["network_seconds_mean"]) == (-1.0, None, None, None)
    write_summary(output, summary)
    assert json.loads(output.read("summary.json"))["sequences"] == summary["sequences"]

    _, page = render(output, rows)
    head = "Sequences 3 Sequence Images Before, dB Restored, dB Gain, dB SSIM 2D Time"
    minus, dash = "\N{MINUS SIGN}", "\N{EN DASH}"
    first = f"a 1 30.00 29.00 {minus}1.00 0.7500 500 ms"
    second = "b 3 of 4 22.00 28.00 +7.00 0.7833 2.0 s"
    assert f"{head} {first} {second} c 0 of 1 {dash} {dash} {dash} {dash} {dash} Scores" in page.text
    assert "1 image of no sequence is left out." in page.text


def test_one_sequence_or_too_many_are_no_table(output: Store) -> None:
    def folders(count: int) -> pa.Table:
        return table(*(row(f"{index:04}/x.png") for index in range(count)))

    assert by_sequence(folders(0)) == by_sequence(folders(1)) == by_sequence(folders(MAX_SEQUENCES + 1)) == []
    assert [each["sequence"] for each in by_sequence(folders(2))] == ["0000", "0001"]
    assert len(by_sequence(folders(MAX_SEQUENCES))) == MAX_SEQUENCES
    _, page = render(output, folders(1))
    assert "Sequence" not in page.text
    _, page = render(output, folders(2))
    assert "Sequences 2 Sequence Images Time 0000 1" in page.text


def test_the_worst_and_the_slowest_images_are_listed(output: Store) -> None:
    rows = table(
        *(scored(f"{index:02}", 20.0, 19.0 + index, seconds=float(20 - index), tiles=index + 1) for index in range(12)),
        scored("equal", 20.0, math.inf, seconds=None),
        scored("suspect", 20.0, 1.0, status="suspect", reason="no", seconds=60.0, tiles=4),
    )
    found = worst(rows)
    assert [one["key"] for one in found] == [f"{index:02}" for index in range(MAX_LISTED)]
    assert found[0] == {"key": "00", "psnr_input": 20.0, "psnr": 19.0, "gain": -1.0}
    found = slowest(rows)
    assert [one["key"] for one in found] == ["suspect", *(f"{index:02}" for index in range(MAX_LISTED - 1))]
    assert found[1] == {"key": "00", "width": 1000, "height": 500, "seconds": 20.0, "tiles": 1}
    _, page = render(output, rows)
    head = "Worst and slowest Least gain Image Before, dB Restored, dB Gain, dB"
    assert f"{head} 00 20.00 19.00 \N{MINUS SIGN}1.00 01 20.00 20.00 +0.00" in page.text
    assert (
        "Longest in the network Image Size Tiles Time suspect 1000 x 500 4 60.0 s 00 1000 x 500 1 20.0 s" in page.text
    )


def test_without_a_score_of_the_input_the_lowest_psnr_is_the_worst(output: Store) -> None:
    rows = table(
        *(scored(key, 1.0, after, psnr_input=None, seconds=None) for key, after in (("b", 31.0), ("a", 32.5))),
        scored("c", 1.0, math.inf, psnr_input=None, seconds=None),
    )
    assert [(one["key"], one["gain"]) for one in worst(rows)] == [("b", None), ("a", None)]
    _, page = render(output, rows)
    assert "Worst Lowest PSNR Image PSNR, dB b 31.00 a 32.50 Environment" in page.text
    assert "Longest in the network" not in page.text
    assert page.tags.count("svg") == 2  # distributions alone
    unscored = table(row("a", reason=None))
    assert (worst(unscored), slowest(unscored)) == ([], [])
    _, page = render(output, unscored)
    assert not {"Worst", "Slowest", "Distributions"} & set(page.text.split())


def test_plots_are_of_the_conventions_ssim_and_in_the_pages_colours(output: Store) -> None:
    rows = table(scored("a", 20.0, 30.0), scored("b", 21.0, math.inf))
    source, page = render(output, rows)
    titles = [title for title, _, _ in plots(rows)]
    assert titles == [
        "PSNR, before and restored",
        "SSIM 2D, before and restored",
        "PSNR gain",
        "Gain by input quality",
        "Network time by size",
    ]
    assert all(title in page.text for title in titles)
    assert "PSNR, before and restored 1 image " in page.text  # an infinite PSNR has no place on the axis
    assert page.text.count("before restored") == 2  # the legends
    assert all(f"var(--{colour})" in source for colour in ("soft", "accent"))
    assert "#0a0b0c" not in source

    volume = plots(table(scored("a", 20.0, 30.0, ssim_3d=0.9, ssim_3d_input=0.8)))
    assert volume[1][0] == "SSIM 3D, before and restored"
    (_, _, loss), (_, _, none) = (plots(table(scored("a", 30.0, 30.0 + gain)))[3] for gain in (-1.0, 1.0))
    assert ("var(--bad)" in loss, "var(--bad)" in none) == (True, False)


def test_bars_count_every_value_once_also_on_the_edges() -> None:
    edges, counts = bars(np.array([0.3, 0.1, 0.7, 0.70001, 0.6999]), 0.1)
    np.testing.assert_allclose(edges, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert counts.tolist() == [1, 0, 1, 0, 0, 1, 2]
    values = np.random.default_rng(0).normal(30, 3, 5000).round(1)
    edges, counts = bars(values, 0.2)
    assert (counts.sum(), len(edges)) == (5000, len(counts) + 1)
    edges, counts = bars(np.array([25.0, 25.0]), 0.01)
    assert counts.tolist() == [2]
    assert edges[0] == pytest.approx(25)


def test_the_environment_is_shown_in_groups_and_the_rest_folded(output: Store) -> None:
    source, page = render(output, table(row("a")), RUN | {"ray": {"nodes": 1, "pool": {"actors": 2}}})
    shown = page.text[page.text.index("Environment") : page.text.index("More about this run")]
    assert shown.startswith("Environment Versions torch 2.9 Machine gpus[0].name <b>GPU</b> note none Ray nodes 1 ")
    assert shown.endswith("pool.actors 2 Recipe hash r1 tile 512 ")
    folded = page.text[page.text.index("More about this run") :]
    assert f"weights.sha256 {'ab' * 32} job.include *.png, *.jpg" in folded
    assert "torch" not in folded
    assert source.index("<h2>Environment</h2>") < source.index('<details class="run">')
    _, page = render(output, table(row("a")), {"job": {"limit": 3}, "ray": None, "machine": {}})
    assert "Environment" not in page.text
    assert page.text.endswith(f"This run output {output.url()} job.limit 3 ray none machine none")


def test_extremes_take_the_lower_median_and_ignore_nan() -> None:
    assert extremes(np.array([np.nan, 3.0, 1.0, 2.0, 4.0])) == (2, 3, 4)
    assert extremes(np.array([5.0])) == (0, 0, 0)
    assert extremes(np.array([np.nan])) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (4.25, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (None, "\N{EN DASH}")],
)
def test_seconds_read_as_a_person_would_write_them(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text


def test_page_shows_headline_crops_plots_and_run(output: Store, photos: list[dict[str, Any]]) -> None:
    bad = [row(f"bad/{status}.png", status=status.value, reason=f"reason {status}") for status in Status]
    source, page = render(output, table(*photos, *bad[1:]))
    assert not page.open
    assert "20.00 → 22.00 dB mean PSNR +2.00 dB" in page.text
    assert "9 images: 3 restored, 1 unreadable, 1 missing, 1 mismatched, 1 refused, 1 suspect, 1 crashed." in page.text
    for label, key, gain in (("worst", "a.png", 1), ("median", "b.png", 2), ("best", "sub/c.png", 3)):
        assert f"{label} {key} +{gain}.00 dB" in page.text
    assert "restored 23.00 dB · SSIM 2D 0.7500" in page.text
    assert page.tags.count("svg") == 5
    assert len(page.values("img", "src")) == 9
    assert page.values("img", "width") == ["256"] * 6 + ["97"] * 3
    assert all(f"reason {status}" in page.text for status in list(Status)[1:])
    assert "Machine gpus[0].name <b>GPU</b> note none Recipe hash r1 tile 512 More about this run" in page.text
    assert "job.include *.png, *.jpg job.empty none" in page.text
    assert "steps[0].tlc True steps[1].tlc False" in page.text
    assert "<b>" not in source


def test_page_loads_nothing(output: Store, photos: list[dict[str, Any]]) -> None:
    source, page = render(output, table(*photos, row("x", status="missing", reason="see https://a.example/x")))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    links = [
        value
        for _, name, value in page.attributes
        if name.rpartition(":")[2] in {"src", "href", "srcset", "action", "poster", "data"}
    ]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "@import" not in source
    assert "url(http" not in source.replace(" ", "")


def test_everything_from_data_is_escaped(output: Store, photos: list[dict[str, Any]]) -> None:
    hostile = "<script>alert(1)</script>\"'>.png"
    rows = [
        photos[0] | {"key": hostile},
        row("</table>" + hostile, status="missing", reason=f"no {hostile}"),
        row("odd", status='"><script>x</script>', reason=None),
    ]
    run = {hostile: {"</details>": [hostile]}, "started_at": hostile, "machine": {hostile: hostile}, "ray": hostile}
    source, page = render(output, table(*rows), run)
    assert "script" not in page.tags
    assert "<script" not in source
    assert f"</table>{hostile}" in page.text
    assert f"no {hostile}" in page.text
    assert f"Machine {hostile} {hostile} More about this run" in page.text
    assert "Sequences 2 " in page.text  # "<" and "<", which the slashes of the closing tags end
    assert not page.open


def test_without_references_the_sizes_pick_the_images(output: Store, photos: list[dict[str, Any]]) -> None:
    none = dict.fromkeys(("reference", "psnr", "psnr_input", "ssim_2d", "ssim_2d_input", "protocol"))
    rows = table(*(photo | none for photo in photos))
    _, page = render(output, rows)
    assert "3 images restored 0.3 megapixels" in page.text
    assert "No references were given" in page.text
    for label, key in (("smallest", "sub/c.png"), ("median", "b.png"), ("largest", "a.png")):
        assert f"{label} {key}" in page.text
    assert len(page.values("img", "src")) == 6
    assert page.tags.count("svg") == 1
    assert Image.open(io.BytesIO(sheet_png(load_strips(rows)))).width == 2 * CROP + 3 * 16


def test_images_gone_damaged_resized_or_huge_become_notes(
    output: Store, photos: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "source/a.png").unlink()
    (tmp_path / "output/a.png").write_bytes(b"not a picture")
    Image.new("RGB", (50, 40)).save(tmp_path / "source/b.png")
    rows = table(photos[0], photos[1], photos[2] | {"width": 9000, "height": 8000})
    worst, median, best = load_strips(rows)
    assert [crop.pixels is None for crop in worst.crops] == [True, True, False]
    assert worst.crops[0].note == "not shown: the file is gone"
    assert worst.crops[1].note.startswith("not shown: ")
    assert median.crops[0].note == "not the size of the others: 50 x 40"
    assert {crop.note for crop in best.crops} == {"not shown: 72 megapixels, more than 64"}
    _, page = render(output, rows)
    assert "not shown: the file is gone" in page.text
    assert len(page.values("img", "src")) == 3


def test_sheet_has_the_crops_in_their_own_pixels(photos: list[dict[str, Any]], tmp_path: Path) -> None:
    pixels = np.full((400, 700, 3), 90, np.uint8)
    pixels[80:336, 400:656] = np.random.default_rng(0).integers(0, 256, (256, 256, 3))
    for field in ("source", "output", "reference"):
        Image.fromarray(pixels).save(tmp_path / field / "a.png")
    strips = load_strips(table(*(photo | {"width": 700, "height": 400} for photo in photos[:1]), *photos[1:]))
    assert [strip.label for strip in strips] == ["worst", "median", "best"]
    assert strips[0].caption == "+1.00 dB, 700 x 400 pixels, crop from 400, 80"
    sheet = Image.open(io.BytesIO(sheet_png(strips)))
    assert sheet.size == sheet_size(strips) == (3 * 256 + 4 * 16, 16 + 3 * (48 + 256 + 44))
    for column in range(3):
        left = 16 + column * (256 + 16)
        shown = np.asarray(sheet.crop((left, 64, left + 256, 64 + 256)))
        np.testing.assert_array_equal(shown, pixels[80:336, 400:656])


@pytest.mark.parametrize(("count", "labels"), [(1, ["the only image"]), (2, ["worst", "best"])])
def test_few_images_are_shown_once(photos: list[dict[str, Any]], count: int, labels: list[str]) -> None:
    assert [strip.label for strip in load_strips(table(*photos[:count]))] == labels


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 300, 1), (256, 256, 4), (255, 257, 2), (600, 90, 3)])
def test_window_lies_inside_the_image(shape: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(0).random(shape, dtype=np.float32)
    top, left = most_detailed(pixels)
    assert 0 <= top <= max(0, shape[0] - CROP)
    assert 0 <= left <= max(0, shape[1] - CROP)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16"])
def test_crops_of_every_kind_of_pixel_are_rgb8(photos: list[dict[str, Any]], mode: str) -> None:
    values = np.linspace(0, 255, 280 * 300).reshape(280, 300).astype(np.uint8)
    for field in ("source", "output", "reference"):
        if mode == "I;16":
            Image.fromarray(values.astype(np.uint16) * 257).save(photos[1][field])
        else:
            Image.fromarray(values).convert(mode).save(photos[1][field])
    (strip,) = load_strips(table(photos[1]))
    for crop in strip.crops:
        assert crop.pixels is not None
        assert crop.pixels.dtype == np.uint8
        assert crop.pixels.shape == (256, 256, 3)
        assert abs(int(crop.pixels.astype(int).mean()) - int(values.mean())) < 12


def test_many_rows_stay_a_small_page_the_same_every_time(output: Store) -> None:
    count = 100_000
    rng = np.random.default_rng(0)
    one = table(scored("a", 20.0, 30.0))
    many = one.take(np.zeros(count, np.int64))
    for name, values in {
        "key": [f"{index % 150:03}/{index:08}.png" for index in range(count)],
        "psnr_input": rng.normal(20, 2, count),
        "psnr": rng.normal(30, 2, count),
        "ssim_2d": rng.random(count),
        "seconds": rng.random(count),
    }.items():
        many = many.set_column(many.column_names.index(name), one.schema.field(name), pa.array(values))
    bad = [row(f"bad{index:04}", status="missing", reason="gone") for index in range(MAX_FAILED + 1234)]
    rows = pa.concat_tables([many, table(*bad)])
    source, page = render(output, rows)
    assert len(source) < 1_000_000
    assert f"{MAX_POINTS:,} of 100,000 images, drawn at random" in page.text
    assert "bad0099" in page.text
    assert "bad0100" not in page.text
    assert "and 1,234 more" in page.text
    assert "Sequences 150 " in page.text
    assert "1,334 images of no sequence are left out." in page.text
    assert render(output, rows)[0] == source


@pytest.mark.parametrize("gain", [0.0, 1e-9, -3.0])
def test_equal_gains_still_make_a_page(output: Store, gain: float) -> None:
    _, page = render(output, table(scored("a", 30.0, 30.0 + gain), scored("b", 30.0, 30.0 + gain)))
    assert page.tags.count("svg") == 5


def test_identical_images_are_told_not_averaged(output: Store) -> None:
    _, page = render(output, table(scored("a", 20.0, 25.0), scored("b", 20.0, math.inf)))
    assert "left out of the means: 0 before, 1 restored" in page.text
    _, page = render(output, table(scored("b", 20.0, math.inf)))
    assert "Every scored image equals its reference." in page.text
