"""Means over a sliding window, and products with them, against their definitions in float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from nafnet.model import spread
from nafnet.sliding import SlidingMeans, mean, times
from tests.nafnet import reference
from tests.nafnet.conftest import noise


def exact(x: Tensor, side: int) -> Tensor:
    """At each pixel of (H, W, C)."""
    return reference.mean(x.permute(2, 0, 1)[None].double(), side)[0].permute(1, 2, 0)


def at_each_pixel(x: Tensor, side: int, rows: int = 16) -> Tensor:
    """The sliding means, asked for `rows` at a time, their edges repeated."""
    height, width, _ = x.shape
    sliding = SlidingMeans(x, side, rows)
    assert (sliding.count, sliding.columns) == (max(height - side, 0) + 1, max(width - side, 0) + 1)
    parts = []
    for start in range(0, sliding.count, rows):
        means = sliding.next_rows(min(rows, sliding.count - start))
        assert means.dtype == x.dtype
        parts.append(means.float().clone())
    means = torch.cat(parts)
    ones = torch.ones(height, width, x.shape[2])
    return times(ones, means, -sliding.before, torch.empty_like(ones))


def worst(x: Tensor, side: int, rows: int = 16) -> float:
    """How far any mean is from the exact one."""
    return float((at_each_pixel(x, side, rows) - exact(x, side)).abs().max())


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("rows", [1, 2, 5, 50])
@pytest.mark.parametrize("side", [1, 3, 8, 13, 14, 20, 40])
@pytest.mark.parametrize("size", [(13, 20), (20, 13), (1, 9), (9, 1), (8, 8)], ids=str)
def test_sliding_means_are_the_windows_means(size, side, rows):
    assert worst(noise(*size, 3), side, rows) < 1e-7


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [5, 30])
def test_half_precision_is_summed_exactly_and_rounded_once(dtype, side):
    x = (noise(150, 29, 5) - 0.3).to(dtype)
    right = exact(x, side)
    half_a_step = right.abs() * torch.finfo(dtype).eps / 2
    assert ((at_each_pixel(x, side, rows=3) - right).abs() <= half_a_step + 1e-7).all()
    torch.testing.assert_close(mean(x).double(), x.double().mean((0, 1)), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_number_of_half_precision_is_read_and_written_right(dtype):
    """Numbers too small for a normal exponent too, and in products zeros of both signs."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()][None, None]
    assert torch.equal(mean(x).to(dtype), x[0, 0])
    assert torch.equal(SlidingMeans(x, 1, 1).next_rows(1), x)
    for factor in (1, -0.75, 1.0078125):  # nothing to round, then halves and more
        scale = torch.full_like(x, factor)
        made = times(x, scale, 0, torch.empty_like(x))
        assert torch.equal(made.view(torch.int16), (x * scale).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_finite_stays_so(dtype):
    infinite = torch.tensor([[[float("inf"), -float("inf"), float("nan")]]]).to(dtype)
    made = times(infinite, torch.ones_like(infinite), 0, torch.empty_like(infinite))
    for values in (mean(infinite), made[0, 0]):
        assert values[0] == float("inf")
        assert values[1] == -float("inf")
        assert values[2].isnan()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [(0, 0), (7, 12), (19, 29)])
def test_windows_that_hold_what_is_not_finite_have_no_finite_mean(place, value, dtype):
    x, mark = noise(20, 30, 2), torch.zeros(20, 30, 2)
    x[place], mark[place] = value, 1
    inside = exact(mark, 6) > 0
    assert inside.any()
    assert not at_each_pixel(x.to(dtype), 6, rows=4)[inside].isfinite().any()


def test_sums_of_a_large_float16_map_do_not_overflow():
    assert worst(torch.full((600, 700, 1), 8.0, dtype=torch.float16), 400) == 0


@pytest.mark.parametrize("size", [(5000, 3, 4), (3, 5000, 4)], ids=str)
def test_long_running_sums_stay_exact(size):
    """In float32 they would carry the rounding errors of 5000 steps; those of bfloat16 may, below its last digit."""
    x = noise(*size) + 100
    assert worst(x, 24) < 100 * 2**-24
    coarse = (noise(*size) + 0.1).bfloat16()
    as_it_should_be = at_each_pixel(coarse, 24) == exact(coarse, 24).bfloat16()
    assert as_it_should_be.double().mean() > 0.999  # the others lie between two numbers


@pytest.mark.parametrize("turned", [False, True])
def test_what_the_window_has_left_behind_leaves_no_trace(turned):
    x = noise(400, 30, 2)
    x[:20] += 1e6
    x = x.transpose(0, 1).contiguous() if turned else x
    error = (at_each_pixel(x, 24) - exact(x, 24)).abs()
    error = error.transpose(0, 1) if turned else error
    assert error[:20].max() > 1e-3  # a float32 holds no million better
    assert error[40:].max() < 1e-6


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (4, 1), (9, 5), (6, 11)])
@pytest.mark.parametrize("shift", [-20, -3, 0, 2, 20])
def test_times_repeats_the_edges_of_the_scale(columns, rows, shift, dtype):
    y, scale = noise(11, 9, 7).to(dtype), noise(rows, columns, 7).to(dtype)
    of_row = [min(max(row + shift, 0), rows - 1) for row in range(11)]
    across = spread(scale[of_row].permute(2, 0, 1)[None], 11, 9)[0].permute(1, 2, 0)
    out = torch.empty_like(y)
    assert times(y, scale, shift, out) is out
    assert torch.equal(out, y * across)


def test_images_at_once_do_not_disturb_one_another():
    images = [noise(60, 50, 3) + k for k in range(4)]
    alone = [at_each_pixel(image, 9, rows=2) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            together = pool.map(lambda image: at_each_pixel(image, 9, rows=2), images)
            assert all(map(torch.equal, together, alone))


def test_rows_that_are_not_there_are_refused():
    sliding = SlidingMeans(noise(10, 9, 1), 4, rows=5)
    sliding.next_rows(5)
    for rows in (0, 3, 6):
        with pytest.raises(ValueError, match=f"{rows} rows of means asked for: there are 2, given out in 5 at most"):
            sliding.next_rows(rows)


def test_products_of_what_does_not_fit_are_refused():
    y = noise(4, 5, 3)
    for scale in (noise(1, 6, 3), noise(1, 5, 2), noise(0, 5, 3), noise(1, 0, 3)):
        with pytest.raises(ValueError, match="cannot be scaled by"):
            times(y, scale, 0, torch.empty_like(y))
    with pytest.raises(ValueError, match="cannot be scaled by"):
        times(y, y, 0, torch.empty(3, 5, 3))
    with pytest.raises(ValueError, match=r"one dtype needed, got torch.float32, torch.bfloat16 and torch.float32"):
        times(y, y.bfloat16(), 0, torch.empty_like(y))
