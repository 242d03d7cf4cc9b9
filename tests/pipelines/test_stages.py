"""One row at a time, without a cluster: fetch, restore, finish."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nafnet.conventions import Convention
from nafnet.images import Picture, decode, encode
from nafnet.metrics import psnr, score, ssim_3d
from nafnet.recipe import Step
from nafnet.restore import Restorer, to_float
from pipelines.manifest import plan
from pipelines.records import REPORT_SCHEMA
from pipelines.settings import RestoreJob
from pipelines.stages import RestoreActor, Work, fetch, finish


def photo(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width, 0:1][:2]
    base = 120 + 60 * np.sin(rows / 9) + 40 * np.cos(columns / 7)
    return np.clip(base + rng.normal(0, 12, (height, width, channels)), 0, 255).astype(np.uint8)


@pytest.fixture
def places(tmp_path: Path, rng: np.random.Generator) -> Path:
    for name, pixels in {
        "colour.png": photo(rng, 40, 56),
        "grey.png": photo(rng, 33, 21, 1),
        "alpha.png": photo(rng, 24, 24, 4),
        "deep.png": photo(rng, 24, 30).astype(np.uint16) * 257,
    }.items():
        for folder in ("in", "ref"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(encode(Picture(pixels, "PNG")))
    return tmp_path


def work_and_pairs(
    places: Path, checkpoint: Path, *, protocol: str = "stored", **settings: Any
) -> tuple[Work, pa.Table]:
    """The work on `places`, without references where there is no "ref"; `settings` are `Restorer.load`'s."""
    reference = str(places / "ref") if (places / "ref").exists() else None
    recipe = Restorer.load(checkpoint, **settings).recipe
    written = {"format": recipe.output.lower()}
    job = RestoreJob.model_validate(
        {"source": str(places / "in"), "output": str(places / "out"), "reference": reference, **written}
    )
    work = Work(
        source=job.source,
        reference=job.reference,
        output=job.output,
        weights=(str(checkpoint),),
        recipe=recipe,
        protocol=protocol,
        device="cpu",
        max_pixels=10**6,
    )
    return work, plan(job, recipe.hash, protocol).pairs


def walk(work: Work, pairs: pa.Table) -> list[dict[str, object]]:
    rows = finish(RestoreActor(work)(fetch(pairs, work)), work)
    assert rows.schema == REPORT_SCHEMA
    return rows.to_pylist()


def test_every_kind_of_image_goes_through_and_is_what_the_restorer_alone_gives(
    places: Path, checkpoint_file: Path
) -> None:
    work, pairs = work_and_pairs(places, checkpoint_file)
    restorer = Restorer.load(checkpoint_file)
    rows = walk(work, pairs)
    assert [row["status"] for row in rows] == ["restored"] * 4
    for row in rows:
        degraded = decode((places / "in" / str(row["key"])).read_bytes())
        written = decode((places / "out" / "images" / str(row["key"])).read_bytes())
        np.testing.assert_array_equal(written.pixels, restorer(degraded.pixels))
        assert (row["height"], row["width"], row["channels"]) == degraded.pixels.shape
        assert row["bit_depth"] == degraded.bit_depth
        assert row["psnr_input"] == np.inf  # the reference is the same file
        assert row["tiles"] == 1
    colour = next(row for row in rows if row["key"] == "colour.png")
    reference = decode((places / "ref" / "colour.png").read_bytes()).pixels
    restored = decode((places / "out" / "images" / "colour.png").read_bytes()).pixels
    assert colour["psnr"] == psnr(restored, reference, data_range=255)
    assert colour["ssim_3d"] == pytest.approx(ssim_3d(restored, reference, data_range=255), abs=1e-9)


def test_sidd_is_scored_before_rounding_and_written_after(places: Path, checkpoint_file: Path) -> None:
    (places / "in" / "deep.png").unlink()
    work, pairs = work_and_pairs(places, checkpoint_file, protocol="sidd")
    rows = {row["key"]: row for row in walk(work, pairs)}
    degraded = decode((places / "in" / "colour.png").read_bytes()).pixels
    exact = np.asarray(Restorer.load(checkpoint_file)(to_float(degraded)))
    expected = psnr(exact, to_float(degraded), data_range=1.0)
    assert rows["colour.png"]["psnr"] == pytest.approx(expected, abs=1e-9)
    assert rows["colour.png"]["protocol"] == "sidd"
    assert decode((places / "out" / "images" / "colour.png").read_bytes()).pixels.dtype == np.uint8


@pytest.mark.parametrize("protocol", ["stored+basicsr", "stored+basicsr+y+crop4", "stored+mmagic", "stored+mmagic+y"])
def test_a_row_has_the_scores_of_its_convention(places: Path, checkpoint_file: Path, protocol: str) -> None:
    work, pairs = work_and_pairs(places, checkpoint_file, protocol=protocol)
    rows = {row["key"]: row for row in walk(work, pairs)}
    convention, restorer = Convention.parse(protocol), Restorer.load(checkpoint_file)
    for key, row in rows.items():
        degraded = decode((places / "in" / str(key)).read_bytes()).pixels
        prediction = restorer(degraded if convention.rounds else to_float(degraded))
        expected = score(prediction, degraded, convention)  # the reference is the same file
        assert row["protocol"] == protocol
        assert (row["psnr_input"], row["ssim_3d_input"], row["ssim_3d"]) == (np.inf, None, None)
        assert row["psnr"] == pytest.approx(expected.psnr, abs=1e-9)
        assert row["ssim_2d"] == pytest.approx(expected.ssim_2d, abs=1e-9)


def test_bad_images_end_as_rows_with_a_reason(places: Path, checkpoint_file: Path, rng: np.random.Generator) -> None:
    whole = (places / "in" / "colour.png").read_bytes()
    bad = {"cut.png": whole[: len(whole) // 2], "empty.png": b"", "text.png": b"hello", "huge.png": b""}
    bad["huge.png"] = encode(Picture(np.zeros((1001, 1000, 3), np.uint8), "PNG"))
    for name, data in bad.items():
        (places / "in" / name).write_bytes(data)
        (places / "ref" / name).write_bytes(whole)
    (places / "ref" / "grey.png").write_bytes(encode(Picture(photo(rng, 33, 22, 1), "PNG")))
    (places / "ref" / "alpha.png").write_bytes(b"not an image")
    work, pairs = work_and_pairs(places, checkpoint_file)
    (places / "in" / "deep.png").unlink()  # gone between listing and reading
    rows = {row["key"]: row for row in walk(work, pairs)}
    assert {key: row["status"] for key, row in rows.items()} == {
        "alpha.png": "unreadable",
        "colour.png": "restored",
        "cut.png": "unreadable",
        "deep.png": "missing",
        "empty.png": "unreadable",
        "grey.png": "mismatched",
        "huge.png": "refused",
        "text.png": "unreadable",
    }
    assert all(row["reason"] for row in rows.values() if row["status"] != "restored")
    assert "21x33 px with 1 channel against a reference of 22x33 px" in str(rows["grey.png"]["reason"])
    assert sorted(path.name for path in (places / "out" / "images").iterdir()) == ["colour.png"]


def test_an_unexpected_error_is_raised_unless_the_work_is_contained(places: Path, checkpoint_file: Path) -> None:
    work, pairs = work_and_pairs(places, checkpoint_file)
    (places / "out").write_bytes(b"a file where the output folder should be")
    with pytest.raises(OSError, match="out"):
        walk(work, pairs)
    rows = walk(replace(work, contained=True), pairs)
    assert {row["status"] for row in rows} == {"crashed"}
    assert "an unexpected error while scoring or writing it" in str(rows[0]["reason"])


def test_an_actor_refuses_weights_that_are_not_the_plans(places: Path, checkpoint_file: Path) -> None:
    work, _ = work_and_pairs(places, checkpoint_file)
    with pytest.raises(ValueError, match="another file here"):
        RestoreActor(replace(work, recipe=replace(work.recipe, steps=(Step("0" * 64),))))
