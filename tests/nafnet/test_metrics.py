"""Scores against hand-computed values, a dense reference written here, and scikit-image."""

import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from nafnet.metrics import PROTOCOLS, data_range_of, psnr, quantize, score, ssim_2d, ssim_3d, y_channel

RANGES = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


def scene(height, width, channels, dtype="uint8", seed=0):
    """A smooth pattern with a flat half, and the same with noise: (reference, restored)."""
    rng = np.random.default_rng(seed)
    rows, columns, depth = np.ogrid[0:height, 0:width, 0:channels]
    pattern = 0.5 + 0.4 * np.sin(rows / 3 + depth) * np.cos(columns / 5)
    pattern[:, : width // 2] = 0.9
    noisy = np.clip(pattern + rng.normal(0, 0.03, pattern.shape), 0, 1)
    return quantize(pattern, dtype), quantize(noisy, dtype)


def dense_ssim_3d(x, y, data_range):
    """The 11x11x11 convolution as the authors wrote it: 1331 taps, edges replicated, float64."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    line /= line.sum()
    height, width, channels = x.shape

    def mean(volume):
        padded = np.pad(volume, 5, mode="edge")
        total = np.zeros_like(volume)
        for i, j, k in np.ndindex(11, 11, 11):
            weight = line[i] * line[j] * line[k]
            total += weight * padded[i : i + height, j : j + width, k : k + channels]
        return total

    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)).mean()


def test_psnr_by_hand():
    reference = np.full((4, 5, 3), 100, np.uint8)
    assert psnr(reference, reference, data_range=255) == math.inf
    assert psnr(reference + 1, reference, data_range=255) == pytest.approx(48.1308036)
    assert psnr(reference - 1, reference, data_range=255) == pytest.approx(48.1308036)  # no uint8 wrap
    one_pixel = reference.copy()
    one_pixel[0, 0, 0] = 130  # mse = 30^2 / 60 = 15
    assert psnr(one_pixel, reference, data_range=255) == pytest.approx(10 * math.log10(255**2 / 15))
    assert psnr(one_pixel[:, :, 0], reference[:, :, 0], data_range=1) == pytest.approx(-10 * math.log10(45))


def test_ssim_of_flat_images_is_the_luminance_term():
    x, y = np.full((16, 13, 3), 50, np.uint8), np.full((16, 13, 3), 200, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 50 * 200 + c1) / (50**2 + 200**2 + c1)
    assert ssim_2d(x, y, data_range=255) == pytest.approx(expected, abs=1e-9)
    assert ssim_3d(x, y, data_range=255) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("shape", [(23, 17, 3), (60, 50, 3), (4, 7, 3), (14, 12, 1), (12, 13, 4)])
def test_ssim_3d_equals_the_dense_convolution(shape, dtype):
    reference, restored = scene(*shape, dtype=dtype)
    expected = dense_ssim_3d(restored, reference, RANGES[dtype])
    assert ssim_3d(restored, reference, data_range=RANGES[dtype]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("shape", [(11, 11, 3), (37, 101, 3), (97, 53, 1), (150, 110, 4)])
def test_ssim_2d_equals_scikit_image(shape, dtype):
    reference, restored = scene(*shape, dtype=dtype)
    expected = structural_similarity(
        restored,
        reference,
        data_range=RANGES[dtype],
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim_2d(restored, reference, data_range=RANGES[dtype]) == pytest.approx(expected, abs=1e-6)


def test_flat_bright_16_bit_regions_keep_their_digits():
    reference = np.full((20, 20, 3), 65000, np.uint16)
    restored = reference.copy()
    restored[::2] += 3  # variance of 2 on squares of 4e9
    assert ssim_3d(restored, reference, data_range=65535) == pytest.approx(
        dense_ssim_3d(restored, reference, 65535), abs=1e-9
    )


def test_grey_plane_and_single_channel_are_the_same_image():
    reference, restored = scene(30, 20, 1)
    for metric in (psnr, ssim_2d, ssim_3d):
        volume = metric(restored, reference, data_range=255)
        assert metric(restored[:, :, 0], reference[:, :, 0], data_range=255) == volume


def test_crop_border_scores_what_is_left():
    reference, restored = scene(40, 36, 3)
    for metric in (psnr, ssim_2d, ssim_3d):
        expected = metric(restored[4:-4, 4:-4], reference[4:-4, 4:-4], data_range=255)
        assert metric(restored, reference, data_range=255, crop_border=4) == expected
        assert metric(restored, reference, data_range=255) != expected


def test_y_channel_has_matlab_studio_range():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0]]], np.uint8)
    # rgb2ycbcr of black, white, red, green before MATLAB rounds them
    np.testing.assert_allclose(y_channel(colours), [[16, 235, 81.481, 144.553]], atol=1e-9)
    np.testing.assert_allclose(y_channel(colours / 255.0) * 255, y_channel(colours), atol=1e-9)
    np.testing.assert_allclose(y_channel(colours.astype(np.uint16) * 257), y_channel(colours) * 257)
    with_alpha = np.concatenate([colours, np.full((1, 4, 1), 7, np.uint8)], axis=2)
    np.testing.assert_array_equal(y_channel(with_alpha), y_channel(colours))
    np.testing.assert_array_equal(y_channel(colours[:, :, :1]), colours[:, :, 0])


def test_rounding_is_what_tells_gopro_from_sidd():
    reference = np.full((12, 12, 3), 100, np.uint8)
    prediction = np.full((12, 12, 3), 100.4 / 255, np.float32)
    assert score(prediction, reference, PROTOCOLS["gopro"]).psnr == math.inf
    assert score(prediction, reference, PROTOCOLS["reds"]).psnr == math.inf
    unrounded = score(prediction, reference, PROTOCOLS["sidd"]).psnr
    assert unrounded == pytest.approx(20 * math.log10(255 / 0.4), abs=1e-3)


def test_halves_round_to_even():
    ties = np.array([0.5, 1.5, 2.5, 254.5]) / 255
    np.testing.assert_array_equal(quantize(ties, np.uint8), [0, 2, 2, 254])
    np.testing.assert_array_equal(quantize(np.array([-0.2, 1.2]), np.uint16), [0, 65535])


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_pixel_above_one_or_a_dark_image_cannot_move_the_range(protocol):
    reference, noisy = scene(24, 24, 3)
    prediction = noisy.astype(np.float32) / 255
    inside = score(prediction, reference, protocol)
    prediction[0, 0, 0] = 1.0
    at_one = score(prediction, reference, protocol)
    prediction[0, 0, 0] = 1.0001
    assert score(prediction, reference, protocol) == at_one
    assert at_one.psnr == pytest.approx(inside.psnr, abs=0.1)
    dark = np.zeros((12, 12, 3), np.uint8)
    assert score(dark + np.uint8(1), dark, protocol).psnr == pytest.approx(48.1308036)


def test_score_is_the_three_metrics():
    reference, restored = scene(50, 60, 3)
    scores = score(restored, reference, PROTOCOLS["gopro"])
    assert scores.psnr == psnr(restored, reference, data_range=255)
    assert scores.ssim_2d == ssim_2d(restored, reference, data_range=255)
    assert scores.ssim_3d == ssim_3d(restored, reference, data_range=255)
    as_float = score(restored.astype(np.float32) / 255, reference, PROTOCOLS["gopro"])
    assert as_float == scores
    assert score(restored, reference, PROTOCOLS["sidd"]).psnr == pytest.approx(scores.psnr, abs=1e-9)


def test_stored_uses_the_bit_depth_of_the_reference():
    reference, restored = scene(20, 20, 3, "uint16")
    stored = PROTOCOLS["stored"]
    expected = psnr(restored, reference, data_range=65535)
    assert score(restored, reference, stored).psnr == expected
    assert score(restored / 65535.0, reference, stored).psnr == expected
    reference, restored = scene(20, 20, 3, "float32")
    assert score(restored, reference, stored).psnr == psnr(restored, reference, data_range=1)
    reference, restored = scene(20, 20, 3)
    assert score(restored, reference, stored) == score(restored, reference, PROTOCOLS["gopro"])


def test_alpha_is_ignored():
    for channels in (1, 3):
        reference, restored = scene(20, 20, channels)
        expected = score(restored, reference, PROTOCOLS["gopro"])
        opaque, clear = np.full((20, 20, 1), 255, np.uint8), np.zeros((20, 20, 1), np.uint8)
        pair = np.concatenate([restored, opaque], axis=2), np.concatenate([reference, clear], axis=2)
        assert score(*pair, PROTOCOLS["gopro"]) == expected


def test_small_images_have_no_2d_score():
    reference, restored = scene(10, 40, 3)
    scores = score(restored, reference, PROTOCOLS["gopro"])
    assert scores.ssim_2d is None
    assert scores.ssim_3d == pytest.approx(dense_ssim_3d(restored, reference, 255), abs=1e-9)
    with pytest.raises(ValueError, match=r"both sides at least 11 px.*10x40"):
        ssim_2d(restored, reference, data_range=255)


def test_published_counts():
    assert {name: protocol.images for name, protocol in PROTOCOLS.items()} == {
        "gopro": 1111,
        "reds": 300,
        "sidd": 1280,
        "stored": None,
    }


def test_errors_say_what_was_found():
    image = np.zeros((12, 12, 3), np.uint8)
    for metric in (psnr, ssim_2d, ssim_3d):
        with pytest.raises(ValueError, match=r"\(12, 12, 3\) and \(12, 11, 3\)"):
            metric(image, image[:, 1:], data_range=255)
        with pytest.raises(ValueError, match=r"data_range must be .* got 0"):
            metric(image, image, data_range=0)
        with pytest.raises(ValueError, match="crop_border must be 0 or more and leave some of 12x12, got 6"):
            metric(image, image, data_range=255, crop_border=6)
        with pytest.raises(ValueError, match="NaN or infinite"):
            metric(np.full((12, 12, 3), np.nan), image, data_range=255)
        with pytest.raises(ValueError, match="complex128"):
            metric(image.astype(complex), image, data_range=255)
    with pytest.raises(ValueError, match="not empty"):
        psnr(image[:0], image[:0], data_range=255)


def test_score_refuses_what_it_would_have_to_guess():
    image = np.zeros((12, 12, 3), np.uint8)
    deep = image.astype(np.uint16)
    with pytest.raises(ValueError, match="'gopro' scores against uint8 references, got uint16"):
        score(deep, deep, PROTOCOLS["gopro"])
    with pytest.raises(ValueError, match="a uint16 image cannot stand for uint8"):
        score(deep, image, PROTOCOLS["gopro"])
    with pytest.raises(ValueError, match="432 of 432 values are NaN"):
        score(np.full((12, 12, 3), np.nan, np.float32), image, PROTOCOLS["sidd"])
    with pytest.raises(ValueError, match=r"prediction must be .* got shape \(12, 12\)"):
        score(image[:, :, 0], image, PROTOCOLS["gopro"])
    with pytest.raises(ValueError, match="got int64"):
        data_range_of(np.dtype(np.int64))
