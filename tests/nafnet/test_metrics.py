"""Scores against hand-computed values, scikit-image, and plain transcriptions of the conventions written here."""

import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from nafnet.conventions import PROFILES, PROTOCOLS, Convention
from nafnet.metrics import Scores, data_range_of, psnr, quantize, score, ssim_2d, ssim_3d, y_channel

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


def pair(kind, channels=3):
    """(reference uint8, prediction as uint8 or as float32 that exceeds [0, 1]), 3 channels of which differ."""
    reference, _ = scene(33, 29, channels)
    noise = np.random.default_rng(1).normal(0, 0.01, reference.shape)
    prediction = (reference / 255 + noise + 0.02 * np.arange(channels)).astype(np.float32)
    prediction[:2] += 0.3
    assert prediction.max() > 1
    return reference, prediction if kind == "float32" else quantize(prediction, np.uint8)


def unit(prediction):
    return prediction / 255 if prediction.dtype == np.uint8 else np.clip(prediction.astype(np.float64), 0, 1)


def windowed_ssim(x, y):
    """One (H, W) channel of range 255 in the arrays' own precision: 121 taps, only where they all fall inside."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = (np.outer(line, line) / line.sum() ** 2).astype(x.dtype)

    def mean(field):
        views = np.lib.stride_tricks.sliding_window_view(field, (11, 11))
        return (views * window).sum(axis=(2, 3))

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 2.55**2, 7.65**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean()


def luma(image):
    """(H, W, 3) RGB of range 255 in float32 -> (H, W, 1): BT.601 on [0, 1], kept as float32, scaled back."""
    red, green, blue = np.moveaxis(image / np.float32(255), 2, 0).astype(np.float64)
    scaled = (65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255
    return scaled.astype(np.float32)[:, :, None] * np.float32(255)


def basicsr(prediction, reference, crop_border, y):
    """What basicsr/metrics/psnr_ssim.py computes of what `tensor2img` makes of a prediction: (PSNR, SSIM)."""
    if prediction.dtype != np.uint8:
        prediction = (prediction.clip(0, 1) * np.float32(255)).round().astype(np.uint8)
    height, width, channels = reference.shape
    inner = slice(crop_border, height - crop_border), slice(crop_border, width - crop_border)
    images = [prediction[inner], reference[inner]]
    if y and channels == 3:
        images = [luma(image.astype(np.float32)) for image in images]
    a, b = (image.astype(np.float64) for image in images)
    ssims = [windowed_ssim(a[:, :, channel], b[:, :, channel]) for channel in range(a.shape[2])]
    return 10 * np.log10(255**2 / ((a - b) ** 2).mean()), np.mean(ssims)


def mmagic(prediction, reference, crop_border, y):
    """What mmagic/evaluation/metrics computes of a prediction clamped to [0, 255], all in float32: (PSNR, SSIM)."""
    if prediction.dtype == np.uint8:
        prediction = prediction / np.float32(255)
    a, b = (prediction * np.float32(255)).clip(0, 255), reference.astype(np.float32)
    if y:
        a, b = luma(a), luma(b)
    height, width = reference.shape[:2]
    inner = slice(crop_border, height - crop_border), slice(crop_border, width - crop_border)
    a, b = a[inner], b[inner]
    mse = ((a - b) ** 2).mean()
    assert mse.dtype == np.float32
    ssims = [windowed_ssim(a[:, :, channel], b[:, :, channel]) for channel in range(a.shape[2])]
    return 20 * np.log10(255 / np.sqrt(mse)), np.mean(ssims)


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
    assert score(prediction, reference, Convention("gopro")).psnr == math.inf
    assert score(prediction, reference, Convention("reds")).psnr == math.inf
    unrounded = score(prediction, reference, Convention("sidd")).psnr
    assert unrounded == pytest.approx(20 * math.log10(255 / 0.4), abs=1e-3)


def test_halves_round_to_even():
    ties = np.array([0.5, 1.5, 2.5, 254.5]) / 255
    np.testing.assert_array_equal(quantize(ties, np.uint8), [0, 2, 2, 254])
    np.testing.assert_array_equal(quantize(np.array([-0.2, 1.2]), np.uint16), [0, 65535])


@pytest.mark.parametrize("metrics", PROFILES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pixel_above_one_or_a_dark_image_cannot_move_the_range(protocol, metrics):
    convention = Convention(protocol, metrics)
    reference, noisy = scene(24, 24, 3)
    prediction = noisy.astype(np.float32) / 255
    inside = score(prediction, reference, convention)
    prediction[0, 0, 0] = 1.0
    at_one = score(prediction, reference, convention)
    prediction[0, 0, 0] = 1.0001
    assert score(prediction, reference, convention) == at_one
    assert at_one.psnr == pytest.approx(inside.psnr, abs=0.1)
    dark = np.zeros((12, 12, 3), np.uint8)
    assert score(dark + np.uint8(1), dark, convention).psnr == pytest.approx(48.1308036)


def test_score_is_the_three_metrics():
    reference, restored = scene(50, 60, 3)
    scores = score(restored, reference, Convention("gopro"))
    assert scores.psnr == psnr(restored, reference, data_range=255)
    assert scores.ssim_2d == ssim_2d(restored, reference, data_range=255)
    assert scores.ssim_3d == ssim_3d(restored, reference, data_range=255)
    as_float = score(restored.astype(np.float32) / 255, reference, Convention("gopro"))
    assert as_float == scores
    assert score(restored, reference, Convention("sidd")).psnr == pytest.approx(scores.psnr, abs=1e-9)


def test_stored_uses_the_bit_depth_of_the_reference():
    reference, restored = scene(20, 20, 3, "uint16")
    stored = Convention("stored")
    expected = psnr(restored, reference, data_range=65535)
    assert score(restored, reference, stored).psnr == expected
    assert score(restored / 65535.0, reference, stored).psnr == expected
    reference, restored = scene(20, 20, 3, "float32")
    assert score(restored, reference, stored).psnr == psnr(restored, reference, data_range=1)
    reference, restored = scene(20, 20, 3)
    assert score(restored, reference, stored) == score(restored, reference, Convention("gopro"))


def test_alpha_is_ignored():
    for channels in (1, 3):
        reference, restored = scene(20, 20, channels)
        expected = score(restored, reference, Convention("gopro"))
        opaque, clear = np.full((20, 20, 1), 255, np.uint8), np.zeros((20, 20, 1), np.uint8)
        pair = np.concatenate([restored, opaque], axis=2), np.concatenate([reference, clear], axis=2)
        assert score(*pair, Convention("gopro")) == expected


def test_small_images_have_no_2d_score():
    reference, restored = scene(10, 40, 3)
    scores = score(restored, reference, Convention("gopro"))
    assert scores.ssim_2d is None
    assert scores.ssim_3d == pytest.approx(dense_ssim_3d(restored, reference, 255), abs=1e-9)
    with pytest.raises(ValueError, match=r"both sides at least 11 px.*10x40"):
        ssim_2d(restored, reference, data_range=255)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize(("protocol", "rounds"), [("gopro", True), ("reds", True), ("sidd", False), ("stored", True)])
def test_authors_is_the_papers_way(protocol, rounds, kind):
    reference, prediction = pair(kind)
    scores = score(prediction, reference, Convention(protocol))
    x, y = unit(prediction), reference / 255
    if rounds:
        x, y = np.round(x * 255), reference.astype(np.float64)
    data_range = 255 if rounds else 1
    assert scores.psnr == pytest.approx(20 * math.log10(data_range / np.sqrt(((x - y) ** 2).mean())), abs=1e-5)
    assert scores.ssim_3d == pytest.approx(dense_ssim_3d(x, y, data_range), abs=1e-6)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("crop_border", [0, 3])
@pytest.mark.parametrize("y", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("protocol", ["gopro", "sidd"])
def test_basicsr_is_what_its_own_metrics_give(protocol, channels, y, crop_border, kind):
    reference, prediction = pair(kind, channels)
    scores = score(prediction, reference, Convention(protocol, "basicsr", crop_border, y))
    expected_psnr, expected_ssim = basicsr(prediction, reference, crop_border, y)
    assert scores.psnr == pytest.approx(expected_psnr, abs=1e-5)  # BasicSR's own luma is float32
    assert scores.ssim_2d == pytest.approx(expected_ssim, abs=1e-6)
    assert scores.ssim_3d is None


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("crop_border", [0, 3])
@pytest.mark.parametrize("y", [False, True])
@pytest.mark.parametrize("protocol", ["gopro", "sidd"])
def test_mmagic_is_what_its_own_metrics_give(protocol, y, crop_border, kind):
    reference, prediction = pair(kind)
    scores = score(prediction, reference, Convention(protocol, "mmagic", crop_border, y))
    expected_psnr, expected_ssim = mmagic(prediction, reference, crop_border, y)
    assert scores.psnr == pytest.approx(expected_psnr, abs=1e-4)  # MMagic's own arithmetic is float32
    assert scores.ssim_2d == pytest.approx(expected_ssim, abs=1e-5)
    assert scores.ssim_3d is None


def test_mmagic_of_grey_has_no_colour_to_convert():
    reference, prediction = pair("float32", channels=1)
    expected_psnr, expected_ssim = mmagic(prediction, reference, 0, y=False)
    for y in (False, True):
        scores = score(prediction, reference, Convention("gopro", "mmagic", y_channel=y))
        assert (scores.psnr, scores.ssim_2d) == pytest.approx((expected_psnr, expected_ssim), abs=1e-4)


def test_profiles_differ_as_the_published_numbers_do():
    """GoPro: 33.7246 unrounded against 33.7103, SSIM .9668 in 3-D against .9479 in 2-D. SIDD: rounding costs."""
    reference, noisy = (0.3 * plane + [0.2, 0.4, 0.6] for plane in scene(60, 50, 1, "float32"))  # a coloured picture
    reference, prediction = quantize(reference, np.uint8), noisy.astype(np.float32)
    authors, rounded, unrounded = (score(prediction, reference, Convention("gopro", metrics)) for metrics in PROFILES)
    assert unrounded.psnr > rounded.psnr + 1e-3
    assert rounded.psnr == authors.psnr
    assert rounded.ssim_2d == authors.ssim_2d != unrounded.ssim_2d
    assert authors.ssim_3d > authors.ssim_2d + 0.01
    authors, rounded, unrounded = (score(prediction, reference, Convention("sidd", metrics)) for metrics in PROFILES)
    assert rounded.psnr < authors.psnr - 1e-3
    assert unrounded.psnr == authors.psnr


@pytest.mark.parametrize("metrics", PROFILES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_identical_images_are_infinite_whatever_holds_them(protocol, metrics):
    reference, _ = scene(20, 24, 3)
    for same in (reference, reference.astype(np.float32) / np.float32(255), reference / 255):
        scores = score(same, reference, Convention(protocol, metrics))
        assert scores.psnr == math.inf
        assert scores.ssim_2d == pytest.approx(1, abs=1e-12)
        assert scores.ssim_3d == (pytest.approx(1, abs=1e-12) if metrics == "authors" else None)


@pytest.mark.parametrize("y", [False, True])
def test_profiles_score_16_bits_on_their_own_scale(y):
    """Neither reference implementation reads 16 bits; the same picture must score the same."""
    reference, prediction = pair("uint8")
    for metrics in ("basicsr", "mmagic"):
        convention = Convention("stored", metrics, crop_border=2, y_channel=y)
        expected = score(prediction, reference, convention)
        deep = score(prediction.astype(np.uint16) * 257, reference.astype(np.uint16) * 257, convention)
        assert (deep.psnr, deep.ssim_2d) == pytest.approx((expected.psnr, expected.ssim_2d), abs=1e-9)


def test_the_luma_of_another_number_of_channels_is_no_match():
    reference, prediction = pair("uint8")
    with pytest.raises(ValueError, match="must have the same shape"):
        score(prediction[:, :, :1], reference, Convention("gopro", "basicsr", y_channel=True))


def test_a_crop_can_leave_too_little():
    reference, prediction = scene(16, 40, 3)
    scores = score(prediction, reference, Convention("gopro", "basicsr", crop_border=3))
    assert scores == Scores(psnr(prediction, reference, data_range=255, crop_border=3), None, None)
    with pytest.raises(ValueError, match="leave some of 16x40, got 8"):
        score(prediction, reference, Convention("gopro", "basicsr", crop_border=8))


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
        score(deep, deep, Convention("gopro"))
    with pytest.raises(ValueError, match="a uint16 image cannot stand for uint8"):
        score(deep, image, Convention("gopro"))
    with pytest.raises(ValueError, match="432 of 432 values are NaN"):
        score(np.full((12, 12, 3), np.nan, np.float32), image, Convention("sidd"))
    with pytest.raises(ValueError, match=r"prediction must be .* got shape \(12, 12\)"):
        score(image[:, :, 0], image, Convention("gopro"))
    with pytest.raises(ValueError, match="got int64"):
        data_range_of(np.dtype(np.int64))
