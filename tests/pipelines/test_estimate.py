"""What a job would cost, from a sample of it."""

from pathlib import Path

import numpy as np
import pytest

from nafnet.images import Picture, encode
from nafnet.restore import Restorer
from pipelines.estimate import estimate
from pipelines.manifest import plan
from pipelines.settings import RestoreJob
from pipelines.storage import Store


def test_megapixels_tiles_and_memory_follow_the_sampled_sizes(tmp_path: Path, checkpoint_file: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(40):
        pixels = np.zeros((600, 500 if i % 2 else 300, 3), np.uint8)
        (tmp_path / "in" / f"{i:02d}.png").write_bytes(encode(Picture(pixels, "PNG")))
    (tmp_path / "in" / "00.png").write_bytes(b"not an image")
    job = RestoreJob(source=str(tmp_path / "in"), output=str(tmp_path / "out"))
    todo = plan(job, "r", "stored")
    whole = estimate(todo, Store(job.source), Restorer.load(checkpoint_file), max_pixels=10**6)
    assert whole.sampled == 13  # of 14, one is no image
    assert whole.megapixels == pytest.approx(40 * 0.24, rel=0.1)
    assert (whole.largest, whole.tile, whole.tiles) == ((600, 500), None, 1)
    assert whole.seconds > 0
    tiled = Restorer.load(checkpoint_file, tile=432, halo=160)
    cut = estimate(todo, Store(job.source), tiled, max_pixels=10**6)
    assert cut.tile == 432
    assert cut.tiles > 1
    assert 0 < cut.memory_bytes < whole.memory_bytes
