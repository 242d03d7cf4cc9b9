"""The short version of `make chaos`: an actor and the driver are killed, on local files."""

import random
from pathlib import Path

import numpy as np
import pytest

from nafnet.images import decode
from nafnet.restore import Restorer
from tests.chaos.harness import Campaign, Kill, Place, judge, make_collection

IMAGES = 64


def test_what_was_killed_goes_on_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    source, weights = make_collection(tmp_path, IMAGES)
    place = Place("local", str(source), str(tmp_path / "out"), tmp_path / "out", weights)
    campaign = Campaign(place, tmp_path / "log", print)
    campaign.go([Kill("actor", 1, 0.0), Kill("driver", 33, 0.1)], random.Random(0))  # noqa: S311
    assert [outcome.problems for outcome in campaign.outcomes] == [[], []]
    restorer = Restorer.load(weights)
    for key, path in place.images().items():
        degraded = decode((source / key).read_bytes()).pixels
        np.testing.assert_array_equal(decode(path.read_bytes()).pixels, restorer(degraded))
    verdict = judge(place, {path.name: (place.disk / "images" / path.name).read_bytes() for path in source.iterdir()})
    assert (verdict.lost, verdict.duplicated) == ([], [])
