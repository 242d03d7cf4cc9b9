"""One row at a time, without a cluster: fetch, restore, finish."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageCms

import nafnet
from nafnet import catalog
from nafnet.checkpoint import CheckpointError
from nafnet.conventions import Convention
from nafnet.images import Picture, decode, encode, read_note
from nafnet.metrics import psnr, quantize, score, ssim_3d
from nafnet.recipe import Step
from nafnet.restore import Restored, Restorer, has_arithmetic, to_float
from pipelines import stages
from pipelines.actor import RestoreActor
from pipelines.manifest import plan
from pipelines.records import REPORT_SCHEMA
from pipelines.settings import RestoreJob
from pipelines.stages import PIXEL_SCHEMA, Work, fetch, finish, pixels_of, rows_of, table_of
from pipelines.storage import Store
from tests.conftest import GOPRO_LIKE, random_network, save_published


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
    return work, next(plan(job, recipe.hash, protocol, place=Store(str(places / "plan"))).tables())


def walk(work: Work, pairs: pa.Table) -> list[dict[str, object]]:
    actor = RestoreActor(work)
    rows = pa.concat_tables(finish(actor(table), work) for table in fetch(pairs, work))
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
    assert "an unexpected error while writing it" in str(rows[0]["reason"])


def test_an_actor_looks_for_weights_where_the_plan_had_them(
    places: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node that knows no place of its own."""
    work, _ = work_and_pairs(places, checkpoint_file)
    file, [step] = checkpoint_file, work.recipe.steps
    entry = catalog.CatalogEntry(
        "Ours", file.name, GOPRO_LIKE, True, "gopro", step.weights, file.stat().st_size, 30.0, 0.9, 256
    )
    monkeypatch.setattr(catalog, "CATALOG", {"Ours": entry})
    monkeypatch.setattr(catalog, "MIRRORS", ())
    monkeypatch.setenv("NAFNET_CACHE", str(places / "cache"))
    monkeypatch.setenv("NAFNET_WEIGHTS", "set, so that it is put back afterwards")
    monkeypatch.delenv("NAFNET_WEIGHTS")
    named = replace(work, weights=("Ours",))
    with pytest.raises(CheckpointError, match="could not be fetched"):
        RestoreActor(named)
    RestoreActor(replace(named, weights_from=str(file.parent)))
    assert (places / "cache" / file.name).exists()


def test_an_actor_refuses_weights_that_are_not_the_plans(places: Path, checkpoint_file: Path) -> None:
    work, _ = work_and_pairs(places, checkpoint_file)
    with pytest.raises(ValueError, match="another file here"):
        RestoreActor(replace(work, recipe=replace(work.recipe, steps=(Step("0" * 64),))))


@pytest.fixture(scope="session")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose result lies about 0.6 of full range over their input."""
    network = random_network(GOPRO_LIKE)
    assert network.ending.bias is not None
    torch.nn.init.constant_(network.ending.bias, 0.6)
    return save_published(tmp_path_factory.mktemp("weights") / "far.pth", network)


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are finite, and whose result is not."""
    network = random_network(GOPRO_LIKE)
    torch.nn.init.constant_(network.ending.weight, 3e38)
    return save_published(tmp_path_factory.mktemp("weights") / "overflowing.pth", network)


def put(folder: Path, name: str, picture: Picture) -> Picture:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(encode(picture))
    return picture


def written(places: Path, name: str) -> Picture:
    return decode((places / "out" / "images" / name).read_bytes())


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("overflowing", "restored values are not finite; the input was written instead"),
        ("far", "of full range from its input (root mean square), over 0.25"),
    ],
)
def test_an_implausible_result_gives_the_input_and_a_reason(
    places: Path, weights: str, reason: str, request: pytest.FixtureRequest
) -> None:
    rows = walk(*work_and_pairs(places, request.getfixturevalue(weights)))
    assert {str(row["key"]): row["status"] for row in rows} == dict.fromkeys(
        ["alpha.png", "colour.png", "deep.png", "grey.png"], "suspect"
    )
    for row in rows:
        name = str(row["key"])
        assert reason in str(row["reason"])
        np.testing.assert_array_equal(written(places, name).pixels, decode((places / "in" / name).read_bytes()).pixels)
        assert row["output"] == f"{places}/out/images/{name}"
        assert row["psnr"] == row["psnr_input"] == np.inf  # the reference is the same file


def test_a_suspect_is_written_in_the_chosen_format_from_its_own_values(places: Path, overflowing: Path) -> None:
    ends = {row["key"]: row["status"] for row in walk(*work_and_pairs(places, overflowing, output="BMP"))}
    assert ends["deep.png"] == "suspect"
    deep = decode((places / "in" / "deep.png").read_bytes()).pixels
    np.testing.assert_array_equal(written(places, "deep.bmp").pixels, deep // 257)


def test_without_the_guard_a_far_result_is_written_and_one_that_is_not_finite_refused(
    places: Path, far: Path, overflowing: Path
) -> None:
    rows = walk(*work_and_pairs(places, far, guard=False))
    assert {row["status"] for row in rows} == {"restored"}
    degraded = decode((places / "in" / "colour.png").read_bytes()).pixels
    assert written(places, "colour.png").pixels.mean() > degraded.mean() + 80
    shutil.rmtree(places / "out")
    rows = walk(*work_and_pairs(places, overflowing, guard=False))
    assert {row["status"] for row in rows} == {"refused"}
    assert "values are NaN or infinite" in str(rows[0]["reason"])
    assert not (places / "out").exists()


@pytest.mark.parametrize("protocol", ["stored", "sidd"])
def test_the_format_that_is_written_does_not_touch_the_scores(
    places: Path, checkpoint_file: Path, protocol: str
) -> None:
    if protocol == "sidd":
        (places / "in" / "deep.png").unlink()
    kept, as_jpeg = (
        {row["key"]: row for row in walk(*work_and_pairs(places, checkpoint_file, protocol=protocol, output=output))}
        for output in ("same", "JPEG")
    )
    assert as_jpeg["alpha.png"]["status"] == "refused"
    assert as_jpeg["alpha.png"]["reason"] == (
        "read, but cannot be written back: JPEG cannot hold RGBA; use PNG or TIFF, or convert the pixels first"
    )
    for key in set(kept) - {"alpha.png"}:
        for score_name in ("psnr", "ssim_3d", "ssim_2d", "psnr_input"):
            assert as_jpeg[key][score_name] == kept[key][score_name], (key, score_name)


def test_a_chosen_format_takes_the_unrounded_result_of_a_deeper_source(
    tmp_path: Path, checkpoint_file: Path, rng: np.random.Generator
) -> None:
    colour, grey = photo(rng, 40, 56), photo(rng, 33, 21, 1)
    sources = {
        "deep.tif": Picture(colour.astype(np.uint16) * 255, "TIFF"),
        "float.tif": Picture(to_float(colour), "TIFF"),
        "grey.png": Picture(grey, "PNG"),
        "plain.png": Picture(colour, "PNG"),
    }
    for name, picture in sources.items():
        put(tmp_path / "in", name, picture)
    restorer = Restorer.load(checkpoint_file)

    def expected(name: str, dtype: type, **options: Any) -> np.ndarray:
        """What encoding the float result once, as `dtype`, gives."""
        restored = quantize(np.asarray(restorer(to_float(sources[name].pixels))), dtype)
        return decode(encode(Picture(restored, "PNG"), **options)).pixels

    rows = walk(*work_and_pairs(tmp_path, checkpoint_file, output="JPEG", quality=80, subsampling="4:2:2"))
    assert [row["status"] for row in rows] == ["restored"] * 4
    assert [row["bit_depth"] for row in rows] == [16, 32, 8, 8]  # of the sources
    for name in sources:
        options = {"format": "JPEG", "quality": 80, "subsampling": "4:2:2"}
        found = written(tmp_path, f"{name[:-4]}.jpg").pixels
        np.testing.assert_array_equal(found, expected(name, np.uint8, **options))
    assert written(tmp_path, "grey.jpg").channels == 1

    rows = walk(*work_and_pairs(tmp_path, checkpoint_file, output="WEBP", quality=70))
    assert [row["status"] for row in rows] == ["restored", "restored", "refused", "restored"]
    assert "WEBP cannot hold grey" in str(rows[2]["reason"])
    found = written(tmp_path, "plain.webp").pixels
    np.testing.assert_array_equal(found, expected("plain.png", np.uint8, format="WEBP", quality=70))

    walk(*work_and_pairs(tmp_path, checkpoint_file, output="PNG"))
    for name, dtype in {"deep.tif": np.uint16, "float.tif": np.uint16, "grey.png": np.uint8}.items():
        found = written(tmp_path, f"{name[:-4]}.png").pixels
        np.testing.assert_array_equal(found, expected(name, dtype))


@pytest.mark.parametrize(
    ("output", "name"), [("same", "a.png"), ("TIFF", "a.tif"), ("JPEG", "a.jpg"), ("WEBP", "a.webp")]
)
def test_profile_and_exif_survive_and_a_note_says_what_made_the_image(
    tmp_path: Path, checkpoint_file: Path, rng: np.random.Generator, output: str, name: str
) -> None:
    exif = Image.Exif()
    exif[315] = "A. Photographer"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    put(tmp_path / "in", "a.png", Picture(photo(rng, 24, 32), "PNG", profile, exif.tobytes().removeprefix(b"Exif\0\0")))
    work, pairs = work_and_pairs(tmp_path, checkpoint_file, output=output)
    assert [row["status"] for row in walk(work, pairs)] == ["restored"]
    picture = written(tmp_path, name)
    assert picture.icc == profile
    read_back = Image.Exif()
    read_back.load(b"Exif\0\0" + (picture.exif or b""))
    assert read_back[315] == "A. Photographer"
    weights = hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    note = read_note((tmp_path / "out" / "images" / name).read_bytes())
    assert note == f"nafnet-pipelines {nafnet.__version__}: recipe {work.recipe.hash}, weights {weights}"


def test_rows_say_in_what_tiles_an_image_went_through(
    tmp_path: Path, checkpoint_file: Path, rng: np.random.Generator
) -> None:
    put(tmp_path / "in", "small.png", Picture(photo(rng, 20, 40), "PNG"))
    put(tmp_path / "in", "wide.png", Picture(photo(rng, 20, 600), "PNG"))

    def took(**settings: Any) -> list[tuple[object, ...]]:
        share = settings.pop("memory_share", 1.0)
        work, pairs = work_and_pairs(tmp_path, checkpoint_file, **settings)
        rows = walk(replace(work, memory_share=share), pairs)
        return [tuple(row[name] for name in ("status", "tile", "tiles", "precision", "note")) for row in rows]

    whole = ("restored", None, 1, "float32", None)
    assert took() == [whole, whole]
    assert took(memory_share=1e-6) == [whole, ("restored", 512, 2, "float32", None)]
    assert took(tile=432) == [whole, ("restored", 432, 7, "float32", None)]
    assert took(tile="whole", memory_share=1e-6) == [whole, whole]


def test_rows_say_that_low_precision_was_given_up(
    places: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_arithmetic("bf16"):
        monkeypatch.setattr("nafnet.restore.has_arithmetic", lambda _: False)
    rows = walk(*work_and_pairs(places, checkpoint_file, precision="bf16"))
    why = "this CPU has no bf16 arithmetic, and would be slow in it: float32 instead"
    assert {(row["status"], row["precision"], row["note"]) for row in rows} == {("restored", "float32", why)}
    exact = Restorer.load(checkpoint_file)(decode((places / "in" / "colour.png").read_bytes()).pixels)
    np.testing.assert_array_equal(written(places, "colour.png").pixels, exact)


def test_an_image_for_which_memory_runs_out_is_refused_and_the_others_go_on(
    places: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Restorer.restore

    def short_of_memory(self: Restorer, image: Any) -> Restored:
        if image.shape[:2] == (40, 56):
            raise MemoryError("out of memory as a whole: give the actor more memory, or set a smaller tile")
        return restore(self, image)

    monkeypatch.setattr(Restorer, "restore", short_of_memory)
    rows = {row["key"]: row for row in walk(*work_and_pairs(places, checkpoint_file))}
    ends = {key: row["status"] for key, row in rows.items()}
    assert ends == {**dict.fromkeys(rows, "restored"), "colour.png": "refused"}
    assert "give the actor more memory" in str(rows["colour.png"]["reason"])
    assert not (places / "out" / "images" / "colour.png").exists()


def test_pixels_of_all_kinds_pass_through_a_table(rng: np.random.Generator) -> None:
    """Each as it was, aligned as its numbers want it, in parts of a table, too."""
    kinds: list[tuple[str, tuple[int, int, int]] | None] = [
        ("uint8", (1, 3, 1)), ("float32", (2, 5, 3)), None, ("uint16", (3, 1, 1)), ("float32", (1, 1, 4)),
    ]  # fmt: skip
    arrays = [None if kind is None else (rng.random(kind[1]) * 200).astype(kind[0]) for kind in kinds]
    rows = [
        {
            **dict.fromkeys(PIXEL_SCHEMA.names),
            **({} if array is None else dict(zip(("height", "width", "channels"), array.shape, strict=True))),
            "dtype": None if array is None else array.dtype.name,
            "pixels": array,
            "restored": None if array is None else memoryview(array[::-1].tobytes()),
        }
        for array in arrays
    ]
    whole = table_of(rows)
    assert whole.schema == PIXEL_SCHEMA
    whole.validate(full=True)
    for table, first in ((whole, 0), (whole.slice(1, 3), 1), (pa.concat_tables([whole.slice(3), whole]), 3)):
        for row, array in zip(rows_of(table), [*arrays[first:], *arrays][: len(table)], strict=True):
            if array is None:
                assert row["pixels"] is row["restored"] is None
                continue
            found = pixels_of(row, "pixels", row["dtype"])
            assert found.flags.aligned
            np.testing.assert_array_equal(found, array)
            np.testing.assert_array_equal(pixels_of(row, "restored", row["dtype"]), array[::-1])


def test_fetching_gives_tables_away_by_what_they_hold_decoded(
    places: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(places / "ref")
    for i in range(4):
        (places / "in" / f"small {i}.png").write_bytes(encode(Picture(np.full((8, 8, 3), i, np.uint8), "PNG")))
    work, pairs = work_and_pairs(places, checkpoint_file)
    monkeypatch.setattr(stages, "BLOCK_BYTES", 40 * 56 * 3)
    tables = list(fetch(pairs.sort_by("key"), work))
    assert [table["key"].to_pylist() for table in tables] == [
        ["alpha.png", "colour.png"],  # the second one fills it
        ["deep.png", "grey.png", "small 0.png", "small 1.png", "small 2.png", "small 3.png"],
    ]


@pytest.mark.parametrize(("threads", "batch", "calls"), [(1, 2, [2, 2]), (2, 2, [2, 2]), (1, 8, [4]), (2, 8, [2, 2])])
def test_the_actor_restores_images_of_one_size_together_and_keeps_their_order(
    places: Path,
    checkpoint_file: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    batch: int,
    calls: list[int],
) -> None:
    shutil.rmtree(places / "ref")
    for i in range(3):
        (places / "in" / f"e{i}.png").write_bytes(encode(Picture(photo(rng, 40, 56), "PNG")))
    work, pairs = work_and_pairs(places, checkpoint_file)
    actor = RestoreActor(replace(work, threads=threads))
    monkeypatch.setattr(actor.restorer, "batch", lambda *_: batch)
    sizes, together = list[int](), actor.restorer.restore_batch

    def noted(images: list[Any]) -> list[Restored]:
        sizes.append(len(images))
        return [restored for image in images for restored in together([image])]

    monkeypatch.setattr(actor.restorer, "restore_batch", noted)
    [fetched] = fetch(pairs, work)
    rows = actor(fetched)
    assert rows["key"].to_pylist() == pairs["key"].to_pylist()
    assert sorted(sizes) == [1, 1, 1, *calls]  # colour.png and e0 to e2 are of one size
    restorer = Restorer.load(checkpoint_file)
    for row in rows.to_pylist():
        expected = restorer(decode((places / "in" / row["key"]).read_bytes()).pixels)
        np.testing.assert_array_equal(np.frombuffer(row["restored"], expected.dtype), expected.ravel())


def test_an_actor_called_for_two_tables_at_once_shares_its_threads_out(
    places: Path, checkpoint_file: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(places / "ref")
    for i in range(6):
        (places / "in" / f"e{i}.png").write_bytes(encode(Picture(photo(rng, 40, 56), "PNG")))
    work, pairs = work_and_pairs(places, checkpoint_file)
    actor = RestoreActor(replace(work, threads=2))
    [fetched] = fetch(pairs, work)
    alone = actor(fetched)
    used, most, lock, together = 0, 0, Lock(), actor.restorer.restore_batch

    def noted(images: list[Any]) -> list[Restored]:
        nonlocal used, most
        mine = torch.get_num_threads()
        with lock:
            used += mine
            most = max(most, used)
        try:
            return together(images)
        finally:
            with lock:
                used -= mine

    monkeypatch.setattr(actor.restorer, "restore_batch", noted)
    with ThreadPoolExecutor(2) as callers:
        both = list(callers.map(actor, [fetched, fetched]))
    assert most == 2
    for rows in both:
        assert rows.drop_columns("seconds").equals(alone.drop_columns("seconds"))


def test_one_image_that_cannot_be_restored_does_not_take_its_batch_along(
    places: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(places / "ref")
    shutil.copy(places / "in" / "colour.png", places / "in" / "colour again.png")
    work, pairs = work_and_pairs(places, checkpoint_file)
    actor = RestoreActor(work)
    monkeypatch.setattr(actor.restorer, "batch", lambda *_: 8)
    restore = actor.restorer.restore

    def some_fit(images: list[Any]) -> list[Restored]:
        if len(images) > 1 or images[0].shape[-1] == 4:
            raise MemoryError("not enough")
        return [restore(images[0])]

    monkeypatch.setattr(actor.restorer, "restore_batch", some_fit)
    [fetched] = fetch(pairs, work)
    ends = {row["key"]: row["status"] for row in actor(fetched).to_pylist()}
    assert ends == {**dict.fromkeys(ends, None), "alpha.png": "refused"}
