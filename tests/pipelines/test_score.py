"""Scoring one folder against another."""

from pathlib import Path

import numpy as np
import pytest

from nafnet.conventions import Convention
from nafnet.images import Picture, encode
from nafnet.metrics import score
from pipelines.score import score_folders
from pipelines.storage import StorageError


def test_scores_are_those_of_the_convention_in_order_of_keys(tmp_path: Path, rng: np.random.Generator) -> None:
    pairs = {}
    for name in ("b.png", "a/c.png"):
        pairs[name] = [rng.integers(0, 256, (30, 40, 3), dtype=np.uint8) for _ in range(2)]
        for folder, pixels in zip(("restored", "reference"), pairs[name], strict=True):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(Picture(pixels, "PNG")))
    (tmp_path / "restored" / "c.png").write_bytes(b"no picture")
    (tmp_path / "reference" / "c.png").write_bytes(b"no picture")
    convention = Convention("gopro", "basicsr", crop_border=2)
    scored = list(score_folders(str(tmp_path / "restored"), str(tmp_path / "reference"), convention))
    assert [one.key for one in scored] == ["a/c.png", "b.png", "c.png"]
    assert scored[0].scores == score(*pairs["a/c.png"], convention)
    assert scored[2].scores is None
    assert scored[2].reason


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing to score"):
        list(score_folders(str(tmp_path), str(tmp_path), Convention("stored")))
