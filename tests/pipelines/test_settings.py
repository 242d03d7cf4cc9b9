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
        )
    assert {error["loc"][0] for error in caught.value.errors()} == {"tile", "actors", "precision", "colour"}


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


def test_account_names_are_no_credentials() -> None:
    url = "abfs://container@account.dfs.core.windows.net/x"
    assert RestoreJob(source=url, output="/out").source == url
