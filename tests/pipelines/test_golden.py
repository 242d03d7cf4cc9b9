"""The same numbers on every machine."""

import json
from pathlib import Path

import pytest

from pipelines.datasets import DataName
from tests.data.made_scores import GOLDEN, SETS, scores


@pytest.mark.parametrize("data", SETS)
def test_the_bundled_weights_score_what_they_did(
    data: DataName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "cache"))
    golden = json.loads(GOLDEN.read_text())[data]
    found = scores(data, tmp_path)
    assert found.keys() == golden.keys()
    assert len(found) == (32 if data == "sidd" else 4)
    for key, row in found.items():
        for name, value in row.items():
            tolerance = 1e-3 if name.startswith("psnr") else 1e-4
            assert value == pytest.approx(golden[key][name], abs=tolerance), (key, name)
