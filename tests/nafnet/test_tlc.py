"""Local means against windows averaged one by one, and what `localize` does to a network."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nafnet.model import NetConfig, Network, spread
from nafnet.sliding import SlidingMeans
from nafnet.tlc import LocalAvgPool2d, localize, windows
from tests.nafnet import reference

PUBLISHED = NetConfig(width=4, enc_blocks=(1, 1, 1, 2), middle_blocks=1, dec_blocks=(1, 1, 1, 1))
SIDE = 7
SIZES = [4, 6, 7, 8, 12, 15]  # smaller than the window, equal to it, larger


def numbers(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def local_means(x, side):
    return spread(LocalAvgPool2d(side)(x), *x.shape[-2:]).expand(x.shape)


def brute_force(x, side):
    """The mean over each pixel's window, in float64 and one at a time."""
    height, width = x.shape[-2:]
    out = torch.empty(x.shape, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            rows, columns = min(side, height), min(side, width)
            top = min(max(i - (rows - 1) // 2, 0), height - rows)
            left = min(max(j - (columns - 1) // 2, 0), width - columns)
            out[..., i, j] = x[..., top : top + rows, left : left + columns].double().mean((-2, -1))
    return out


@pytest.mark.parametrize("side", [SIDE, SIDE + 1, 1])
@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("height", SIZES)
def test_local_means_equal_windows_averaged_one_by_one(height, width, side):
    x = numbers(2, 3, height, width)
    torch.testing.assert_close(local_means(x, side).double(), brute_force(x, side), atol=1e-6, rtol=0)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 70), st.integers(1, 20))
def test_windows_of_any_side_on_images_of_any_size(height, width, side, rows):
    """Both ways of taking the means, which share nothing."""
    x = numbers(1, 2, height, width, seed=height * width)
    right = reference.mean(x.double(), side)
    torch.testing.assert_close(local_means(x, side).double(), right, atol=1e-6, rtol=0)
    sliding = SlidingMeans(x[0].permute(1, 2, 0).contiguous(), side, rows)
    counts = [min(rows, sliding.count - start) for start in range(0, sliding.count, rows)]
    means = torch.cat([sliding.next_rows(count).clone() for count in counts])
    made = spread(means.permute(2, 0, 1)[None], height, width).expand_as(right)
    torch.testing.assert_close(made.double(), right, atol=1e-6, rtol=0)


@settings(max_examples=300, deadline=None)
@given(st.integers(16, 2000), st.integers(1, 4))
def test_windows_halve_from_one_and_a_half_crops(train_size, levels):
    sides = windows(NetConfig(width=4, enc_blocks=(1,) * levels, dec_blocks=(1,) * levels), train_size)
    assert sides == tuple(reference.window(train_size, level) for level in range(levels + 1))
    assert sides[0] == int(1.5 * train_size)
    assert all(0 <= upper - 2 * lower <= 3 for upper, lower in itertools.pairwise(sides))


def test_the_reference_averages_the_same_windows():
    x = numbers(1, 2, 12, 9)
    for side in (1, 4, 9, 10, 12):
        torch.testing.assert_close(reference.mean(x, side).double(), brute_force(x, side), atol=1e-7, rtol=0)


def test_memory_order_does_not_matter():
    x = numbers(2, 3, 15, 12)
    other = LocalAvgPool2d(SIDE)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(LocalAvgPool2d(SIDE)(x), other, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("size", "pooled"),
    [((7, 7), (1, 1)), ((3, 7), (1, 1)), ((8, 7), (2, 1)), ((7, 9), (1, 3)), ((10, 12), (4, 6)), ((1, 9), (1, 3))],
)
def test_only_a_window_that_covers_both_sides_is_global(size, pooled):
    x = numbers(1, 2, *size)
    means = LocalAvgPool2d(SIDE)(x)
    assert tuple(means.shape[-2:]) == pooled
    differs = (local_means(x, SIDE) - x.mean((2, 3), keepdim=True)).abs().max() > 1e-3
    assert bool(differs) == (pooled != (1, 1))


def test_a_long_axis_stays_exact():
    x = numbers(1, 1, 3000, 40)
    expected = reference.mean(x.double(), 384)
    error = ((local_means(x, 384) - expected).abs() / expected).max()
    assert error < 1e-6


def test_what_lies_outside_a_window_leaves_no_trace():
    """A running sum that went on for ever would keep the rounding errors of the brightest place it passed."""
    x = numbers(1, 2, 400, 30)
    x[:, :, :20] += 1e6
    expected = reference.mean(x.double(), 48)
    error = (local_means(x, 48) - expected).abs() / expected
    assert error[:, :, 150:].max() < 1e-6  # from there on windows begin a fresh sum, at rows 96, 144 and so on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    big = torch.full((1, 2, 90, 70), 30_000.0, dtype=dtype)  # three of them overflow float16
    for side in (24, 90):
        means = local_means(big, side)
        assert means.dtype == dtype
        assert torch.equal(means, big)
    x = numbers(1, 2, 500, 60).to(dtype)
    expected = reference.mean(x.double(), 48)
    # Nothing but the rounding of the result: half a unit in the last place.
    assert ((local_means(x, 48) - expected).abs() / expected).max() <= torch.finfo(dtype).eps / 2 * 1.001


def test_windows_of_the_published_crops():
    assert windows(PUBLISHED, 256) == (384, 192, 96, 48, 24)
    assert windows(PUBLISHED, 32) == tuple(reference.window(32, level) for level in range(5)) == (48, 24, 12, 6, 3)
    assert windows(NetConfig(width=4, enc_blocks=(1,), dec_blocks=(1,)), 101) == (151, 74)  # 50 * 151 // 101


def test_windows_refuse_a_crop_that_vanishes():
    with pytest.raises(ValueError, match="train_size 15 is too small for a network of 4 levels"):
        windows(PUBLISHED, 15)


@pytest.mark.parametrize("attention", ["sca", "ca"])
def test_localize_sets_every_attention_and_no_weight(attention):
    config = NetConfig(width=4, enc_blocks=(2, 1, 1, 2), middle_blocks=3, dec_blocks=(1, 2, 1, 2), attention=attention)
    network = reference.randomize(Network(config))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert localize(network, 256) is network
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)

    sides = {name: module.side for name, module in network.named_modules() if isinstance(module, LocalAvgPool2d)}
    pool = {"sca": "sca.0", "ca": "se.0"}[attention]
    expected = {}
    for group, blocks, side in [
        *((f"encoders.{level}", config.enc_blocks[level], 384 >> level) for level in range(4)),
        ("middle_blks", 3, 24),
        *((f"decoders.{i}", config.dec_blocks[i], 48 << i) for i in range(4)),
    ]:
        expected |= {f"{group}.{block}.{pool}": side for block in range(blocks)}
    assert sides == expected
    assert "side=384" in repr(network.encoders[0])


def test_a_network_without_attention_is_left_alone():
    network = Network(NetConfig(width=4, enc_blocks=(1,), dec_blocks=(1,), attention="none"))
    assert not any(isinstance(module, LocalAvgPool2d) for module in localize(network, 256).modules())


@torch.no_grad()
def test_a_localized_network_is_the_global_one_until_the_image_outgrows_its_window():
    network = reference.randomize(Network(PUBLISHED))
    local = localize(reference.randomize(Network(PUBLISHED)), 32)
    fits, too_wide = numbers(1, 3, 48, 48), numbers(1, 3, 48, 112) * torch.linspace(0, 1, 112)
    torch.testing.assert_close(local(fits), network(fits), atol=1e-5, rtol=0)
    assert (local(too_wide) - network(too_wide)).abs().max() > 1e-3
    localize(local, 64)  # again, for other crops
    torch.testing.assert_close(local(numbers(1, 3, 96, 90)), network(numbers(1, 3, 96, 90)), atol=1e-5, rtol=0)
