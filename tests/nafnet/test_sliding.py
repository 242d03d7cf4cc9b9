"""Means over a sliding window against the definition in float64."""

import pytest
import torch
from torch import Tensor

from nafnet.model import spread
from nafnet.sliding import _compiled, mean, sliding_means
from tests.nafnet import reference


def exact(x: Tensor, side: int) -> Tensor:
    """At each pixel of (H, W, C)."""
    return reference.mean(x.permute(2, 0, 1)[None].double(), side)[0].permute(1, 2, 0)


def at_each_pixel(x: Tensor, side: int, rows: int = 16) -> Tensor:
    """The sliding means, their edges repeated; also that strips follow one another from the first row to the last."""
    height, width, _ = x.shape
    strips, expected_top = [], 0
    for top, bottom, means in sliding_means(x, side, rows):
        assert top == expected_top < bottom
        assert means.dtype == torch.float32
        assert means.shape[0] in (1, bottom - top)
        assert means.shape[1] == max(width - side, 0) + 1
        across = spread(means.permute(2, 0, 1)[None], bottom - top, width)[0].permute(1, 2, 0)
        strips.append(across.expand(bottom - top, width, -1).clone())
        expected_top = bottom
    assert expected_top == height
    return torch.cat(strips)


def worst(x: Tensor, side: int, rows: int = 16) -> float:
    """How far any mean is from the exact one."""
    return float((at_each_pixel(x, side, rows) - exact(x, side)).abs().max())


def noise(*size: int) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1, 2, 5, 50])
@pytest.mark.parametrize("side", [1, 3, 8, 13, 14, 20, 40])
@pytest.mark.parametrize("size", [(13, 20), (20, 13), (1, 9), (9, 1), (8, 8)], ids=str)
def test_sliding_means_are_the_windows_means(size, side, rows):
    assert worst(noise(*size, 3), side, rows) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [5, 30])
def test_half_precision_is_summed_exactly(dtype, side):
    x = (noise(24, 29, 5) - 0.3).to(dtype)
    assert worst(x, side, rows=3) < 1e-7
    torch.testing.assert_close(mean(x).double(), x.double().mean((0, 1)), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_number_of_half_precision_is_read_right(dtype):
    """Zeros of both signs and numbers too small for a normal exponent too."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    read = mean(x[None, None]).to(dtype)
    assert torch.equal(read, x)


def test_what_is_not_finite_in_half_precision():
    infinite = torch.tensor([[[float("inf")]]])
    assert mean(infinite.bfloat16()).isinf()
    assert mean(infinite.half()) == 65536  # beyond what float16 can hold, so the mean in float16 is infinite again
    assert mean(infinite.half()).half().isinf()


def test_sums_of_a_large_float16_map_do_not_overflow():
    assert worst(torch.full((600, 700, 1), 8.0, dtype=torch.float16), 400) == 0


@pytest.mark.parametrize("size", [(5000, 3, 4), (3, 5000, 4)], ids=str)
def test_long_running_sums_stay_exact(size):
    """In float32 they would carry the rounding errors of 5000 steps."""
    assert worst(noise(*size) + 100, 24) < 100 * 2**-24


@pytest.mark.parametrize("turned", [False, True])
def test_what_the_window_has_left_behind_leaves_no_trace(turned):
    x = noise(400, 30, 2)
    x[:20] += 1e6
    x = x.transpose(0, 1).contiguous() if turned else x
    error = (at_each_pixel(x, 24) - exact(x, 24)).abs()
    error = error.transpose(0, 1) if turned else error
    assert error[:20].max() > 1e-3  # a float32 holds no million better
    assert error[40:].max() < 1e-6


def test_where_nothing_can_be_written_each_process_compiles_for_itself():
    """A function that came from no file has no place for a cache, like a package that nobody may write beside."""
    space: dict = {}
    exec("def fill(x):\n    x[:] = 7", space)  # noqa: S102
    x = torch.zeros(3)
    _compiled(space["fill"])(x.numpy())
    assert x.tolist() == [7, 7, 7]
