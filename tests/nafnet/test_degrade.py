"""Degradations measured: how strong the noise is, where a blurred point goes, what stays as it was."""

import numpy as np
import pytest

from nafnet.degrade import defocus_blur, gaussian_noise, jpeg, motion_blur, poisson_gaussian_noise, scene

BLURS = [
    *((motion_blur, (length, angle)) for length in (1, 4, 7.5, 9) for angle in (0, 33, 90, 135)),
    *((defocus_blur, (radius,)) for radius in (0.4, 1, 2.5, 5)),
]


def random_image(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).random((height, width, channels), np.float32)


def point(height=61, width=65):
    """One bright pixel in the middle."""
    image = np.zeros((height, width, 1), np.float32)
    image[height // 2, width // 2] = 1
    return image


def moments(blurred):
    """Mass, centroid from the middle (y, x) and covariance (y, x) of a blurred point."""
    weights = blurred[..., 0].astype(np.float64)
    height, width = weights.shape
    y, x = np.mgrid[:height, :width]
    offsets = np.stack([y - height // 2, x - width // 2]).reshape(2, -1)
    weights = weights.ravel()
    centre = offsets @ weights / weights.sum()
    spread = offsets - centre[:, None]
    return weights.sum(), centre, (weights * spread) @ spread.T / weights.sum()


# Noise


def test_gaussian_noise_has_the_deviation_asked_for():
    image = random_image(256, 256)
    noise = gaussian_noise(image, 25 / 255, np.random.default_rng(1)).astype(np.float64) - image
    assert noise.std() == pytest.approx(25 / 255, rel=0.01)
    assert abs(noise.mean()) < 0.001
    # White: neighbours and channels know nothing of each other.
    for a, b in [(noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 0], noise[..., 1])]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


@pytest.mark.parametrize(("shot", "read"), [(0.01, 0.02), (0.05, 0.0), (0.0, 0.1)])
def test_poisson_gaussian_noise_has_a_variance_that_grows_with_the_signal(shot, read):
    for value in (0.0, 0.2, 0.5, 1.0):
        image = np.full((300, 300, 1), value, np.float32)
        noisy = poisson_gaussian_noise(image, shot, read, np.random.default_rng(2))
        assert noisy.astype(np.float64).var() == pytest.approx(shot * value + read**2, rel=0.03, abs=1e-12)
        assert noisy.mean() == pytest.approx(value, abs=0.003)


def test_noise_of_a_seed_is_the_same_noise():
    image = random_image(16, 17)
    for noise in (
        lambda seed: gaussian_noise(image, 0.1, np.random.default_rng(seed)),
        lambda seed: poisson_gaussian_noise(image, 0.02, 0.01, np.random.default_rng(seed)),
    ):
        np.testing.assert_array_equal(noise(3), noise(3))
        assert np.abs(noise(3) - noise(4)).max() > 0.01
        assert noise(3).dtype == np.float32


def test_no_noise_is_no_change_and_nothing_is_clipped():
    image = random_image(16, 16)
    np.testing.assert_array_equal(gaussian_noise(image, 0.0, np.random.default_rng(0)), image)
    strong = gaussian_noise(image, 0.5, np.random.default_rng(0))
    assert strong.min() < 0
    assert strong.max() > 1


# Blur


@pytest.mark.parametrize("angle", [0, 30, 45, 90, 120, 180, 270])
@pytest.mark.parametrize("length", [0.5, 1, 2, 3, 4, 5, 6.5, 8, 9, 15, 16, 21])
def test_motion_blur_draws_a_centred_line(length, angle):
    mass, centre, covariance = moments(motion_blur(point(), length, angle))
    assert mass == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(centre, 0, atol=1e-4)  # even lengths too: the picture does not shift
    # A line of even density has the variance length**2 / 12; sharing samples among pixels adds at most 1/4 either way.
    direction = np.array([np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))])
    across = np.array([-direction[1], direction[0]])
    along = direction @ covariance @ direction
    assert length**2 / 12 - 0.01 <= along <= length**2 / 12 + 0.26
    assert -1e-4 <= across @ covariance @ across <= 0.26


def test_motion_blur_along_rows_is_an_even_box():
    row = motion_blur(point(), 8, 0)[30, :, 0]
    taps = row[32 - 5 : 32 + 6]
    # 8 px around a pixel's middle: 7 whole pixels and half of two.
    np.testing.assert_allclose(taps, np.array([0, 1, 2, 2, 2, 2, 2, 2, 2, 1, 0]) / 16, atol=0.01)
    np.testing.assert_allclose(taps, taps[::-1], atol=1e-6)
    column = motion_blur(point(), 8, 90)[:, 32, 0]
    np.testing.assert_allclose(column[30 - 5 : 30 + 6], taps, atol=1e-6)


def test_motion_blur_turns_clockwise():
    blurred = motion_blur(point(), 15, 45)[..., 0]
    assert blurred[30 + 4, 32 + 4] > 0.04  # down and right
    assert blurred[30 - 4, 32 - 4] > 0.04
    assert blurred[30 + 4, 32 - 4] < 1e-6


@pytest.mark.parametrize("radius", [1, 1.5, 2, 3, 4.7, 8])
def test_defocus_blur_draws_a_centred_disc(radius):
    blurred = defocus_blur(point(), radius)
    mass, centre, covariance = moments(blurred)
    assert mass == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(centre, 0, atol=1e-4)
    # A disc's variance along any direction is radius**2 / 4; its soft edge adds a little.
    np.testing.assert_allclose(covariance, np.eye(2) * covariance[0, 0], atol=1e-3)
    assert radius**2 / 4 < covariance[0, 0] < (radius + 0.3) ** 2 / 4
    y, x = np.mgrid[-30:31, -32:33]
    distance = np.hypot(y, x)
    plane = blurred[..., 0]
    inside, outside = distance <= radius - 0.5, distance >= radius + 0.5
    np.testing.assert_allclose(plane[inside], plane[30, 32], atol=1e-6)  # flat
    np.testing.assert_allclose(plane[outside], 0, atol=1e-6)
    assert plane[30, 32] == pytest.approx(1 / (np.pi * radius**2), rel=0.15)


def test_blur_of_nothing_is_no_change():
    image = random_image(13, 18)
    np.testing.assert_allclose(motion_blur(image, 0, 77), image, atol=1e-6)
    np.testing.assert_allclose(defocus_blur(image, 0), image, atol=1e-6)


@pytest.mark.parametrize(("blur", "options"), BLURS)
def test_constant_images_stay_constant(blur, options):
    image = np.full((23, 31, 3), 0.3, np.float32)
    blurred = blur(image, *options)
    assert blurred.dtype == np.float32
    np.testing.assert_allclose(blurred, image, atol=1e-6)


@pytest.mark.parametrize(("blur", "options"), BLURS)
def test_blur_repeats_edges_and_does_not_wrap(blur, options):
    """Against a sum over shifted copies, with the weights that a point shows."""
    image = random_image(14, 19)
    kernel = blur(point(), *options)[..., 0]
    reach = 8
    taps = kernel[30 - reach : 31 + reach, 32 - reach : 33 + reach]
    assert taps.sum() == pytest.approx(1, abs=1e-5)
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge").astype(np.float64)
    expected = sum(
        taps[reach + dy, reach + dx] * padded[reach - dy : reach - dy + 14, reach - dx : reach - dx + 19]
        for dy in range(-reach, reach + 1)
        for dx in range(-reach, reach + 1)
    )
    np.testing.assert_allclose(blur(image, *options), expected, atol=1e-5)


def test_blur_longer_than_the_image():
    image = random_image(3, 4)
    assert motion_blur(image, 41, 20).shape == image.shape
    bright_corner = np.zeros((30, 30, 1), np.float32)
    bright_corner[0, 0] = 1
    assert defocus_blur(bright_corner, 6)[15:, 15:].max() < 1e-6  # nothing comes round the other side


# JPEG


def test_jpeg_loses_more_the_lower_its_quality():
    image = scene(5, 96).astype(np.float32) / 255
    errors = [np.square(jpeg(image, quality) - image).mean() for quality in (95, 80, 60, 40, 20, 5)]
    assert errors == sorted(errors)
    assert 0 < errors[0] < errors[-1] / 4


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_shape_and_range(channels):
    image = random_image(17, 23, channels) * 1.5 - 0.25  # beyond what a file holds
    stored = jpeg(image, 90)
    assert stored.shape == image.shape
    assert stored.dtype == np.float32
    assert stored.min() >= 0
    assert stored.max() <= 1
    np.testing.assert_array_equal(np.rint(stored * 255), stored * 255)
    grey = np.full((16, 16, channels), 128 / 255, np.float32)
    np.testing.assert_array_equal(jpeg(grey, 30), grey)


# Scenes


def test_a_scene_of_a_seed_is_the_same_scene():
    first = scene(11, 64)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(scene(11, 64), first)


def test_scenes_differ_and_hold_something():
    scenes = [scene(seed, 64).astype(float) for seed in range(6)]
    for i, one in enumerate(scenes):
        assert one.std() > 5
        assert all(np.abs(one - other).mean() > 5 for other in scenes[:i])
