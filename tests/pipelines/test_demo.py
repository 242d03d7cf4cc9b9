"""The demo's photographs, and what the bundled weights make of them."""

from pathlib import Path

import numpy as np

from nafnet import Restorer, decode, psnr
from pipelines.demo import make_photos, photographs


def test_every_call_writes_the_same_files_and_leaves_them_alone(tmp_path: Path) -> None:
    degraded, original = make_photos(tmp_path)
    names = {"astronaut", "coffee", "chelsea", "rocket", "motorcycle_left", "motorcycle_right"}
    assert {path.stem for path in degraded.iterdir()} == {path.stem for path in original.iterdir()} == names
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    make_photos(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == stamps
    noise = decode((degraded / "coffee.png").read_bytes()).pixels.astype(float) - photographs()["coffee"]
    middle = np.abs(photographs()["coffee"].astype(int) - 128) < 40  # where nothing is clipped
    assert abs(noise[middle].std() - 25) < 0.2


def test_the_bundled_weights_gain_ten_decibels_on_photographs_they_never_saw(tmp_path: Path) -> None:
    degraded, _ = make_photos(tmp_path)
    restorer = Restorer.load("demo")
    gains = []
    for name, original in photographs().items():
        noisy = decode((degraded / f"{name}.png").read_bytes()).pixels
        before, after = (psnr(image, original, data_range=255) for image in (noisy, restorer(noisy)))
        gains.append(after - before)
    assert len(gains) == 6
    assert np.mean(gains) >= 10.0
