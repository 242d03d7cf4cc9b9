"""Codecs and scores of a 1280x720 photograph on one core."""

import io

import numpy as np
import skimage.data
import skimage.transform
from PIL import Image
from skimage.metrics import structural_similarity

from nafnet.conventions import Convention
from nafnet.images import Picture, decode, encode
from nafnet.metrics import score
from tests.benchmarks.timing import Row, measure

HEIGHT, WIDTH = 720, 1280


def rows(runs: int) -> list[Row]:
    resized = skimage.transform.resize(skimage.data.coffee(), (HEIGHT, WIDTH), anti_aliasing=True)
    photo = np.rint(resized * 255).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 10, photo.shape)
    noisy = np.clip(photo + noise, 0, 255).astype(np.uint8)
    picture = Picture(photo, "PNG")
    ours, pillow = encode(picture), _pillow_png(photo)
    size = f"PNG encode, {len(ours) / len(pillow):.2f} of the size of Pillow's default"
    return [
        measure(size, lambda: encode(picture), lambda: _pillow_png(photo), runs),
        measure("PNG decode against Pillow's", lambda: decode(ours), lambda: Image.open(io.BytesIO(ours)).load(), runs),
        measure(
            "PSNR, SSIM-2D and SSIM-3D against scikit-image's SSIM-2D",
            lambda: score(noisy, photo, Convention("gopro")),
            lambda: _skimage_ssim(noisy, photo),
            runs,
        ),
    ]


def _pillow_png(photo: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    return buffer.getvalue()


def _skimage_ssim(image: np.ndarray, reference: np.ndarray) -> float:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(image, reference, channel_axis=-1, data_range=255, **options))
