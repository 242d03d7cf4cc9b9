"""PSNR and SSIM as the deblurring and denoising papers report them.

The data range is always given: the reference implementation guesses it from `max() <= 1`, and one float
pixel at 1.0001 then adds 48 dB. Two SSIMs are in use and differ in the second decimal, so both carry their
dimension: `ssim_2d` filters each channel (BasicSR, MMagic, scikit-image), `ssim_3d` filters across the
channels as well (`_ssim_3d` in the authors' basicsr/metrics/psnr_ssim.py, the one the paper prints). Which of
them a score is, and of what, is its convention (`nafnet.conventions`).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from nafnet.conventions import Convention

Image = npt.NDArray[Any]
_Float = npt.NDArray[np.float64]

_RADIUS = 5  # of the 11-tap window
_SIGMA = 1.5
# 48 keeps a tile's four fields in the second-level cache, and its products below the size at which
# BLAS starts threads, which cost more than they save here.
_TILE = 48

# BT.601 luma for 8-bit studio range, as MATLAB's rgb2ycbcr: black at 16, white at 235.
_LUMA = np.array([65.481, 128.553, 24.966]) / 255
_LUMA_BLACK = 16 / 255


@dataclass(frozen=True, slots=True)
class Scores:
    """One image's scores: `psnr` in dB, inf when identical.

    `ssim_3d` is None under a profile that has no such score, `ssim_2d` where a side is below 11 px.
    """

    psnr: float
    ssim_2d: float | None
    ssim_3d: float | None


def psnr(restored: Image, reference: Image, *, data_range: float, crop_border: int = 0) -> float:
    """20 log10(data_range / rmse) in dB, in float64; inf for identical images.

    Both are (H, W) or (H, W, C) of any real dtype on the same scale; `data_range` is that scale's maximum
    (255, 65535 or 1), `crop_border` the pixels left out on each side. Raises ValueError for shapes that
    differ, a crop that leaves nothing, a data range that is not positive, or values that are not finite.
    """
    restored, reference = _pair(restored, reference, data_range, crop_border)
    return _psnr(restored, reference, data_range)


def ssim_2d(restored: Image, reference: Image, *, data_range: float, crop_border: int = 0) -> float:
    """Mean SSIM per channel over the pixels whose 11x11 window (Gaussian, sigma 1.5) lies inside the image.

    Arguments and errors as in `psnr`; ValueError too when a side is below 11 px. Equals scikit-image's
    `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)`.
    """
    restored, reference = _pair(restored, reference, data_range, crop_border)
    planar, _ = _ssims(restored, reference, data_range)
    if planar is None:
        raise ValueError(
            f"ssim_2d needs both sides at least {2 * _RADIUS + 1} px for its window, got "
            f"{restored.shape[0]}x{restored.shape[1]} (height x width, after crop_border={crop_border})"
        )
    return planar


def ssim_3d(restored: Image, reference: Image, *, data_range: float, crop_border: int = 0) -> float:
    """Mean SSIM with an 11x11x11 Gaussian (sigma 1.5) over height, width and channel, edges replicated.

    Arguments and errors as in `psnr`. Any size from 1x1 is defined.
    """
    restored, reference = _pair(restored, reference, data_range, crop_border)
    return _ssims(restored, reference, data_range)[1]


def y_channel(image: Image) -> _Float:
    """BT.601 luma (H, W), not rounded, on the input's own scale: 16..235 for uint8, /255 of that for floats.

    `image` is (H, W, C), uint8, uint16 or float in [0, 1]; alpha is ignored, and grey is returned as it is,
    as BasicSR's `to_y_channel` does. Score it with the input's data range.
    """
    colour = _without_alpha(image, "image").astype(np.float64)
    if colour.shape[2] == 1:
        return colour[:, :, 0]
    return colour @ _LUMA + _LUMA_BLACK * data_range_of(image.dtype)


def score(prediction: Image, reference: Image, convention: Convention) -> Scores:
    """The scores of one image under `convention`.

    Both are (H, W, C) with C in 1..4, uint8, uint16 or float in [0, 1]; alpha (second of 2, fourth of 4) is
    ignored. A convention that rounds quantizes the prediction as the reference is: clipped and rounded, data range
    255, 65535, or 1 for floats. One that does not clips it to [0, 1] and scores it against reference / 255 (or
    / 65535) in the prediction's precision, data range 1. Then the border is cropped, then the luma taken; grey is
    its own luma, as in BasicSR (MMagic has no Y channel of grey).

    All arithmetic is float64. Theirs is float32 in places (BasicSR's luma, all of MMagic), which moves PSNR by
    less than 1e-4 dB and SSIM by less than 1e-6 on photographs, on flat bright images up to 1e-4.

    Raises ValueError when sizes differ, when the crop leaves nothing, when a side has another depth than the
    convention scores, or for values that are not finite.
    """
    reference = _without_alpha(reference, "reference")
    prediction = _without_alpha(prediction, "prediction")
    if convention.bit_depth == 8 and reference.dtype != np.uint8:
        raise ValueError(
            f"protocol {convention.protocol!r} scores against uint8 references, got {reference.dtype}; "
            "use protocol 'stored' for other depths"
        )
    if convention.rounds:
        prediction = quantize(prediction, reference.dtype)
    else:
        prediction = _as_unit(prediction)
        reference = _as_unit(reference).astype(prediction.dtype, copy=False)  # v / 255 in float32 equals itself
    data_range = data_range_of(reference.dtype)
    prediction, reference = _pair(prediction, reference, data_range, convention.crop_border)
    if convention.y_channel:
        prediction, reference = y_channel(prediction)[:, :, None], y_channel(reference)[:, :, None]
    planar, volume = _ssims(prediction, reference, data_range)
    known = "ssim_3d" in convention.scores
    return Scores(_psnr(prediction, reference, data_range), planar, volume if known else None)


def data_range_of(dtype: np.dtype[Any]) -> float:
    """The maximum an image of `dtype` holds: 255, 65535, or 1 for floats. ValueError for other dtypes."""
    if dtype in (np.uint8, np.uint16):
        return float(np.iinfo(dtype).max)
    if np.issubdtype(dtype, np.floating):
        return 1.0
    raise ValueError(f"images are uint8, uint16 or float in [0, 1], got {dtype}")


def quantize(image: Image, dtype: npt.DTypeLike) -> Image:
    """What a file of `dtype` keeps of `image`: floats are clipped to [0, 1], scaled and rounded half to even.

    An integer image that has `dtype` already comes back as it is. ValueError for values that are not finite,
    and for an integer image of another depth, which nobody asked to rescale.
    """
    dtype = np.dtype(dtype)
    data_range = data_range_of(dtype)
    if image.dtype == dtype and dtype.kind == "u":
        return image
    if image.dtype.kind != "f":
        raise ValueError(f"a {image.dtype} image cannot stand for {dtype}: give {dtype}, or float in [0, 1]")
    clipped = _clip(image)
    if dtype.kind == "f":
        return clipped.astype(dtype, copy=False)
    clipped *= data_range
    return np.rint(clipped, out=clipped).astype(dtype)


def _clip(image: Image) -> Image:
    """Clipped to [0, 1] in float32 or better (float16 cannot count to 65535), in a new array."""
    bad = image.size - np.count_nonzero(np.isfinite(image))
    if bad:
        raise ValueError(f"{bad} of {image.size} values are NaN or infinite; check the model's precision")
    clipped: Image = np.clip(image.astype(np.promote_types(image.dtype, np.float32)), 0, 1)
    return clipped


def _as_unit(image: Image) -> Image:
    if image.dtype.kind == "f":
        return _clip(image)
    return image / data_range_of(image.dtype)


def _without_alpha(image: Image, role: str) -> Image:
    if image.ndim != 3 or not 1 <= image.shape[2] <= 4:
        raise ValueError(f"the {role} must be (height, width, 1 to 4 channels), got shape {image.shape}")
    return image[:, :, : 1 if image.shape[2] <= 2 else 3]


def _pair(restored: Image, reference: Image, data_range: float, crop_border: int) -> tuple[Image, Image]:
    """Both as (H, W, C) views without their border, checked."""
    if restored.shape != reference.shape:
        raise ValueError(f"restored and reference must have the same shape, got {restored.shape} and {reference.shape}")
    if restored.ndim not in (2, 3) or restored.size == 0:
        raise ValueError(f"images must be (H, W) or (H, W, C) and not empty, got shape {restored.shape}")
    if not 0 < data_range < np.inf:
        raise ValueError(f"data_range must be a positive number (255, 65535 or 1), got {data_range}")
    height, width = restored.shape[:2]
    if not 0 <= 2 * crop_border < min(height, width):
        raise ValueError(f"crop_border must be 0 or more and leave some of {height}x{width}, got {crop_border}")
    inner = slice(crop_border, height - crop_border), slice(crop_border, width - crop_border)
    views = []
    for role, image in (("restored", restored), ("reference", reference)):
        if image.dtype.kind not in "buif":
            raise ValueError(f"the {role} image must have a real dtype, got {image.dtype}")
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise ValueError(f"the {role} image has NaN or infinite values; it cannot be scored")
        views.append(image[inner].reshape(height - 2 * crop_border, width - 2 * crop_border, -1))
    return views[0], views[1]


def _psnr(restored: Image, reference: Image, data_range: float) -> float:
    difference = np.subtract(restored, reference, dtype=np.float64).ravel()
    mse = float(difference @ difference) / difference.size
    return float("inf") if mse == 0 else float(20 * np.log10(data_range / np.sqrt(mse)))


def _ssims(restored: Image, reference: Image, data_range: float) -> tuple[float | None, float]:
    """(2-D or None where it is undefined, 3-D) of two (H, W, C) images.

    The 3-D window is separable: two spatial passes, whose result away from the edges is all that the 2-D
    score needs, then a CxC channel mix. Float64 throughout, because E[x^2] - mu^2 cancels on flat regions.
    """
    height, width, channels = restored.shape
    edges = ((_RADIUS, _RADIUS), (_RADIUS, _RADIUS), (0, 0))
    restored, reference = np.pad(restored, edges, mode="edge"), np.pad(reference, edges, mode="edge")
    mix = _channel_mix(channels)
    planar_sum = volume_sum = 0.0
    for top in range(0, height, _TILE):
        rows = min(_TILE, height - top)
        for left in range(0, width, _TILE):
            columns = min(_TILE, width - left)
            tile = slice(top, top + rows + 2 * _RADIUS), slice(left, left + columns + 2 * _RADIUS)
            means = _band(rows) @ _fields(restored[tile], reference[tile]) @ _band(columns).T
            valid = (
                slice(max(_RADIUS - top, 0), max(height - _RADIUS - top, 0)),
                slice(max(_RADIUS - left, 0), max(width - _RADIUS - left, 0)),
            )
            planar_sum += float(_ssim_map(means, data_range)[:, *valid].sum())
            volume_sum += float(_ssim_map(mix @ means.reshape(4, channels, -1), data_range).sum())
    valid_pixels = max(height - 2 * _RADIUS, 0) * max(width - 2 * _RADIUS, 0)
    planar = planar_sum / (valid_pixels * channels) if valid_pixels else None
    return planar, volume_sum / (height * width * channels)


def _fields(x: Image, y: Image) -> _Float:
    """(h, w, C) twice -> (4, C, h, w): x, y, x^2 + y^2 and xy, whose means are all that SSIM needs."""
    height, width, channels = x.shape
    fields = np.empty((4, channels, height, width))
    fields[0], fields[1] = x.transpose(2, 0, 1), y.transpose(2, 0, 1)
    np.multiply(fields[0], fields[0], out=fields[2])
    fields[2] += fields[1] * fields[1]
    np.multiply(fields[0], fields[1], out=fields[3])
    return fields


def _ssim_map(means: _Float, data_range: float) -> _Float:
    """(4, ...) Gaussian means of `_fields` -> (...) SSIM, with C1 = (.01 L)^2 and C2 = (.03 L)^2."""
    x, y, square_sum, product = means
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    twice_xy = 2 * x * y
    mean_squares = x * x + y * y
    numerator = (twice_xy + c1) * (2 * product - twice_xy + c2)
    denominator = (mean_squares + c1) * (square_sum - mean_squares + c2)
    result: _Float = numerator / denominator
    return result


def _taps() -> _Float:
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    taps: _Float = weights / weights.sum()
    return taps


@lru_cache
def _band(length: int) -> _Float:
    """(length, length + 10): the 11-tap pass as a matrix, on a line that has 5 px more at both ends."""
    taps = _taps()
    band = np.zeros((length, length + 2 * _RADIUS))
    for row in range(length):
        band[row, row : row + taps.size] = taps
    return band


def _channel_mix(channels: int) -> _Float:
    """(C, C): the pass across channels, most of whose 11 taps fall on the replicated first and last."""
    mix = np.zeros((channels, channels))
    for channel in range(channels):
        sources = np.clip(np.arange(channel - _RADIUS, channel + _RADIUS + 1), 0, channels - 1)
        np.add.at(mix[channel], sources, _taps())
    return mix
