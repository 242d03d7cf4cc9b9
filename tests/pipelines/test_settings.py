"""What a person may set, and what is refused before anything starts."""

import pytest
from pydantic import ValidationError

from pipelines.settings import RestoreJob


def test_defaults_are_a_whole_job() -> None:
    job = RestoreJob(source="/data/in", output="/data/out")
    assert job.checkpoint == ("demo",)
    assert job.precision == "float32"
    assert job.include == ("*.png", "*.jpg", "*.jpeg", "*.tif", "*.tiff", "*.webp", "*.bmp")


def test_all_bad_parameters_are_named_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        RestoreJob.model_validate(
            {"source": "/in", "output": "/out", "tile": 3, "actors": 0, "precision": "fp8", "colour": "red"}
            | {
                "strength": 2,
                "guard": "maybe",
                "format": "gif",
                "quality": 0,
                "subsampling": "4:1:1",
                "checkpoint": [],
            }
        )
    bad = {"tile", "actors", "precision", "colour"}
    bad |= {"strength", "guard", "format", "quality", "subsampling", "checkpoint"}
    assert {error["loc"][0] for error in caught.value.errors()} == bad
    assert caught.value.error_count() == len(bad)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tile": "big"}, "tile\n.*takes auto, whole, or a side of 32 px or more, got 'big'"),
        ({"tile": 31}, "got 31"),
        ({"tile": True}, "got True"),
        ({"strength": 0}, "strength\n.*greater than 0"),
        ({"strength": 1.5}, "strength\n.*less than or equal to 1"),
        ({"checkpoint": ()}, "checkpoint\n.*at least 1 item"),
        ({"deterministic": True}, "deterministic needs a tile of so many px or 'whole'"),
        ({"quality": 90}, "quality and subsampling need a format"),
        ({"subsampling": "4:2:0"}, "quality and subsampling need a format"),
        ({"format": "png", "subsampling": "4:2:0"}, "PNG has no chroma subsampling"),
        ({"format": "tiff", "quality": 90}, "TIFF is lossless and has no quality"),
        ({"format": "webp", "quality": 101}, "quality\n.*less than or equal to 100"),
    ],
)
def test_an_impossible_choice_is_refused_with_what_would_be_possible(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        RestoreJob.model_validate({"source": "/in", "output": "/out", **settings})
    assert caught.value.error_count() == 1


def test_choices_that_do_not_go_together_are_named_at_once() -> None:
    settings = {"deterministic": True, "format": "bmp", "quality": 90, "subsampling": "4:2:2"}
    with pytest.raises(ValidationError) as caught:
        RestoreJob.model_validate({"source": "/in", "output": "/in/out", **settings})
    for words in ("lies inside source", "deterministic needs", "BMP is lossless", "BMP has no chroma subsampling"):
        assert words in str(caught.value)


def test_a_tile_may_come_as_text() -> None:
    places = {"source": "/in", "output": "/out"}
    tiles = [RestoreJob.model_validate({**places, "tile": tile}).tile for tile in ("512", 512, "whole", "auto")]
    assert tiles == [512, 512, "whole", "auto"]


def test_the_authors_scores_have_no_variants_and_that_is_said_with_the_rest() -> None:
    places = {"source": "/in", "output": "/out"}
    with pytest.raises(ValidationError, match="use metrics basicsr or mmagic") as caught:
        RestoreJob.model_validate({**places, "crop_border": 4, "y_channel": True, "tile": 3})
    assert {error["loc"][0] for error in caught.value.errors()} == {"crop_border", "y_channel", "tile"}
    with pytest.raises(ValidationError) as caught:
        RestoreJob.model_validate({**places, "metrics": "lpips", "crop_border": -1})
    assert {error["loc"][0] for error in caught.value.errors()} == {"metrics", "crop_border"}
    job = RestoreJob.model_validate({**places, "metrics": "mmagic", "crop_border": 4, "y_channel": True})
    assert (job.metrics, job.crop_border, job.y_channel) == ("mmagic", 4, True)


def test_local_paths_become_absolute_and_urls_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.chdir(str(tmp_path))
    job = RestoreJob(source="photos/", output="s3://bucket/out/")
    assert job.source == f"{tmp_path}/photos"
    assert job.output == "s3://bucket/out"


@pytest.mark.parametrize(
    ("source", "output", "reference", "words"),
    [
        ("/a", "/a/out", None, "output /a/out lies inside source /a"),
        ("/a/in", "/a", None, "source /a/in lies inside output /a"),
        ("/a", "/a", None, "lies inside"),
        ("/a", "/b/out", "/b", "output /b/out lies inside reference /b"),
        ("/a", "/b", "/a", "the same place"),
        ("/a", "file:///a/out", None, "lies inside"),
        ("/x/../a", "/a/out", None, "lies inside"),
    ],
)
def test_places_must_not_overlap(source: str, output: str, reference: str | None, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RestoreJob(source=source, output=output, reference=reference)


def test_a_folder_whose_name_only_begins_alike_is_another_place() -> None:
    assert RestoreJob(source="/a/in", output="/a/in-restored").output == "/a/in-restored"


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValidationError, match="never into a URL") as caught:
        RestoreJob(source="s3://key:hunter2@bucket/in", output="/out", checkpoint="https://me:hunter2@host/w.pth")
    assert "hunter2" not in str(caught.value)
    assert {error["loc"][0] for error in caught.value.errors()} == {"source", "checkpoint"}
    with pytest.raises(ValidationError, match="may hold a signature"):
        RestoreJob(source="/in", output="/out", checkpoint="https://host/w.pth?X-Amz-Signature=hunter2")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_secret_in_any_of_several_checkpoints_is_refused_and_not_repeated(place: int) -> None:
    for secret in ("https://me:hunter2@host/w.pth", "https://host/w.pth?X-Amz-Signature=hunter2"):
        chain = ["demo", "/w.pth", "s3://bucket/w.pth"]
        chain[place] = secret
        with pytest.raises(ValidationError) as caught:
            RestoreJob.model_validate({"source": "/in", "output": "/out", "checkpoint": chain})
        assert [error["loc"] for error in caught.value.errors()] == [("checkpoint",)]
        assert "hunter2" not in str(caught.value)


def test_account_names_are_no_credentials() -> None:
    url = "abfs://container@account.dfs.core.windows.net/x"
    assert RestoreJob(source=url, output="/out").source == url


def test_where_the_work_runs_fits_together() -> None:
    places = {"source": "/in", "output": "/out"}
    for wrong, words in (
        ({"actors": 3, "max_actors": 2}, "max_actors 2 is less than actors 3"),
        ({"ray_wheel": "/x.whl"}, "ray_wheel goes with a job that is submitted"),
        ({"ray_address": "http://head:8265", "storage": "block:lab"}, "known to Prefect, not to a cluster"),
        ({"ray_address": "http://me:hunter2@head:8265"}, "never into a URL"),
        ({"ray_wheel": "/x.zip", "ray_address": "http://head:8265"}, "should match pattern"),
        ({"time_limit": 0}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=words) as caught:
            RestoreJob.model_validate({**places, **wrong})
        assert "hunter2" not in str(caught.value)
    job = RestoreJob.model_validate({**places, "ray_address": "https://head:8265", "ray_wheel": "s3://b/x-1.whl"})
    assert job.ray_wheel == "s3://b/x-1.whl"
