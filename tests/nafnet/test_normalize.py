"""The compiled layer norm against its definition in float64, and torch's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from nafnet.normalize import normalize
from tests.nafnet.conftest import noise

CHANNELS = (1, 2, 3, 8, 16, 33, 64, 512)


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, and what float32's last digit of x is worth in it."""
    x = x.double()
    apart = x - x.mean(-1, keepdim=True)
    deviation = (apart.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return apart / deviation, (1 + x.abs().amax(-1, keepdim=True) / deviation) * 2**-24


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (20, 31)], ids=str)
def test_equals_the_definition(size, channels):
    x = noise(*size, channels)
    made = normalize(x)
    assert made.shape == x.shape
    right, digit = exact(x)
    assert ((made.double() - right).abs() <= 4 * digit).all()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, channels):
    x = (noise(20, 31, channels) - 0.3).to(dtype)
    made = normalize(x)
    assert made.dtype == dtype
    right, digit = exact(x)
    half_a_step = right.abs() * torch.finfo(dtype).eps / 2
    assert ((made.double() - right).abs() <= half_a_step + 4 * digit).all()


def test_keeps_its_digits_as_torchs_does():
    """Where all channels are far from zero, and where one of them is."""
    apart = noise(30, 40, 32) + 1000
    alone = noise(30, 40, 32)
    alone[..., 5] *= 1e4
    for x in (apart, alone):
        right, digit = exact(x)
        made = normalize(x), F.layer_norm(x, (32,), eps=1e-6)
        ours, torchs = (float(((values.double() - right).abs() / digit).max()) for values in made)
        assert ours < max(2 * torchs, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_channels_become_zero(dtype):
    assert not normalize(torch.full((3, 5, 32), 0.75, dtype=dtype)).any()


def test_does_the_same_bits_alone_as_among_others():
    x = noise(24, 17, 40)
    whole = normalize(x)
    assert torch.equal(whole[5:6, :3], normalize(x[5:6, :3].contiguous()))
    assert torch.equal(whole[3:20], normalize(x[3:20]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_pixel_that_is_not_finite_stays_so_alone(value, dtype):
    x = noise(4, 6, 16).to(dtype)
    x[2, 3, 7] = value
    made = normalize(x)
    assert not made[2, 3].isfinite().any()
    made[2, 3] = 0
    assert made.isfinite().all()


def test_maps_in_another_order_are_refused():
    with pytest.raises(ValueError, match="side by side"):
        normalize(noise(4, 5, 6).transpose(0, 1))
