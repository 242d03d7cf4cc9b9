"""Real photographs to try everything on: those that scikit-image carries in its wheel, with seeded noise."""

from pathlib import Path

import numpy as np
import skimage.data

from nafnet.degrade import gaussian_noise
from nafnet.images import Picture, encode
from nafnet.metrics import quantize
from nafnet.restore import to_float

SIGMA = 25.0  # of 255
_PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")


def photographs() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """Name to (H, W, 3) uint8: four photographs and both eyes of a colour stereo pair. Needs no network."""
    photos = {name: getattr(skimage.data, name)() for name in _PHOTOS}
    left, right, _disparity = skimage.data.stereo_motorcycle()  # type: ignore[no-untyped-call]
    return {**photos, "motorcycle_left": left, "motorcycle_right": right}


def make_photos(folder: Path, *, sigma: float = SIGMA) -> tuple[Path, Path]:
    """Write `folder`/degraded and `folder`/original as PNG under the same names; returns both folders.

    The noise of each photograph is seeded by its place in the list, so every call writes the same bytes.
    """
    degraded, original = folder / "degraded", folder / "original"
    for place in (degraded, original):
        place.mkdir(parents=True, exist_ok=True)
    for seed, (name, photo) in enumerate(photographs().items()):
        noisy = gaussian_noise(to_float(photo), sigma / 255, np.random.default_rng(seed))
        _write(degraded / f"{name}.png", encode(Picture(quantize(noisy, np.uint8), "PNG")))
        _write(original / f"{name}.png", encode(Picture(np.ascontiguousarray(photo), "PNG")))
    return degraded, original


def _write(path: Path, data: bytes) -> None:
    # Left alone when it is the same already: a second demo then finds its inputs unchanged and does no work.
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)
