"""The network in strips against the paper's equations written plainly, at the sizes that people restore."""

from dataclasses import replace
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nafnet import strips
from nafnet.device import DeviceNetwork
from nafnet.model import NetConfig, Network
from nafnet.strips import StripNetwork
from nafnet.tlc import localize
from tests.nafnet import reference

GOPRO = {"enc_blocks": (1, 1, 1, 28), "middle_blocks": 1, "dec_blocks": (1, 1, 1, 1)}
SIDD = {"enc_blocks": (2, 2, 4, 8), "middle_blocks": 12, "dec_blocks": (2, 2, 2, 2)}
FAMILY = {
    "NAFNet": {},
    "Baseline": {"activation": "gelu", "attention": "ca", "dw_expand": 1},
    "PlainNet": {"norm": "none", "activation": "relu", "attention": "none", "dw_expand": 1},
}
CASES = [
    pytest.param(family, layout, width, size, crop, id=f"{family}-{name}-{width}-{size[1]}x{size[0]}-{crop or 0}")
    for family in FAMILY
    for name, layout in (("GoPro", GOPRO), ("SIDD", SIDD))
    for width in (8, 32)
    for size in ((97, 131), (150, 700), (720, 1280))
    for crop in (None, 256)
    if not (family == "PlainNet" and crop)  # it has no attention
    # The largest only with most parts, and narrow: at width 32, a minute each, `make bench` prints their difference.
    if size[0] < 720 or (width == 8 and (crop or family == "PlainNet"))
]
SMALL = NetConfig(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1))


def network_of(config, seed=0):
    """Random; what it adds to an image is about as large as the image."""
    network = reference.randomize(Network(config), seed)
    with torch.no_grad():
        network.ending.weight *= 0.5
    return network


@lru_cache(maxsize=1)
def picture(height, width):
    """Noise on slopes, (1, 3, height, width) in [0, 1]: its means differ from place to place."""
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height * width))
    return noise * (torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 1, width)) / 2


def expected(network, image, train_size):
    config = network.config
    with torch.inference_mode():
        return reference.network(
            network.state_dict(), image, activation=config.activation, sigma=config.sigma, train_size=train_size
        )


def walks_of(rows):
    """In place of `strips._rows`: strips of so many rows, which hold no whole image."""
    return lambda _, *, least=1: rows * least


def in_strips(network, image, dtype=torch.float32):
    return StripNetwork(network, dtype)(image[0].permute(1, 2, 0)).permute(2, 0, 1)[None]


@pytest.mark.parametrize(("family", "layout", "width", "size", "train_size"), CASES)
def test_equals_the_plain_transcription(family, layout, width, size, train_size):
    network = network_of(NetConfig(width=width, **layout, **FAMILY[family]))
    image = picture(*size)
    right = expected(network, image, train_size)
    if train_size:
        localize(network, train_size)
    assert 0.1 < float((right - image).std()) < 3  # of order 1, so that a difference of 1e-5 is small
    torch.testing.assert_close(in_strips(network, image), right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (16, 16), (17, 31), (33, 64)], ids=str)
@pytest.mark.parametrize("family", FAMILY)
def test_odd_sizes(family, size):
    network = network_of(replace(SMALL, **FAMILY[family]))
    right = expected(network, picture(*size), 16)
    torch.testing.assert_close(in_strips(localize(network, 16), picture(*size)), right, atol=1e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(1, 4),
    st.sampled_from([None, 16, 24]),
    st.sampled_from([1, 3, 99]),
)
def test_any_size_is_padded_with_zeros_and_cut_back(height, width, levels, train_size, rows):
    network = network_of(NetConfig(width=4, enc_blocks=(1,) * levels, middle_blocks=1, dec_blocks=(1,) * levels))
    image = picture(height, width)
    right = expected(network, image, train_size)
    if train_size:
        localize(network, train_size)
    with torch.inference_mode():
        with patch.object(strips, "_rows", walks_of(rows)):
            walked = in_strips(network, image)
        for restored in (network(image), walked):
            assert restored.shape == image.shape
            torch.testing.assert_close(restored, right, atol=1e-5, rtol=0)
        stride = 2**levels
        padded = torch.nn.functional.pad(image, (0, -width % stride, 0, -height % stride))
        by_hand = network(padded)[..., :height, :width]
    torch.testing.assert_close(by_hand, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma", ["relu", "gelu", "sigmoid", "silu"])
def test_ablations_of_the_gate(sigma):
    network = network_of(replace(SMALL, sigma=sigma))
    right = expected(network, picture(40, 56), None)
    torch.testing.assert_close(in_strips(network, picture(40, 56)), right, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.1), (torch.float16, 0.01)])
@pytest.mark.parametrize("height", [1, 2, 3, 7, 100])
def test_the_height_of_a_strip_does_not_matter(height, dtype, close, monkeypatch):
    network = localize(network_of(SMALL), 32)
    image = picture(90, 70)
    usual = in_strips(network, image)
    monkeypatch.setattr(strips, "_rows", walks_of(height))
    torch.testing.assert_close(in_strips(network, image, dtype), usual, atol=close, rtol=0)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("train_size", [None, 16, 256])
@pytest.mark.parametrize("family", FAMILY)
def test_images_together_are_what_each_is_alone(family, train_size, dtype, close, monkeypatch):
    """Of five, a strip holds none at full resolution, one on the level below, three on the next, and all deeper."""
    network = network_of(NetConfig(width=8, enc_blocks=(1, 1, 1), dec_blocks=(1, 1, 1), **FAMILY[family]))
    config = network.config
    if train_size and config.attention != "none":
        localize(network, train_size)
    at_once, method = set(), strips._Block._at_once

    def watched(block, x):
        at_once.add(len(x))
        method(block, x)

    monkeypatch.setattr(strips._Block, "_at_once", watched)
    widest = 40 * 56 * config.width * max(config.dw_expand, config.ffn_expand) * dtype.itemsize
    monkeypatch.setattr(strips, "STRIP_BYTES", widest * 3 // 4 // torch.get_num_threads())
    in_dtype = StripNetwork(network, dtype)
    images = torch.cat([picture(38, 52) * (i + 1) / 5 for i in range(5)]).permute(0, 2, 3, 1)
    together = in_dtype(images)
    assert at_once == (set() if train_size == 16 and config.attention != "none" else {1, 2, 3, 5})
    for image, one in zip(images, together, strict=True):
        torch.testing.assert_close(one, in_dtype(image), atol=close, rtol=0)


@pytest.mark.parametrize("compile_after", [1e9, 0.0], ids=["eager", "compiled"])
def test_layer_by_layer_is_the_same_network(compile_after):
    """The way of GPUs. Compiled for the first size seen after the work it has to have done, and right for others."""
    network = localize(network_of(replace(SMALL, enc_blocks=(1,), middle_blocks=0, dec_blocks=(0,))), 32)
    layered = DeviceNetwork(network, torch.float32, "cpu", compile_after=compile_after)
    for size in ((64, 80), (70, 131), (20, 20)):
        image = picture(*size)
        restored = layered(image[0].permute(1, 2, 0)).permute(2, 0, 1)[None]
        torch.testing.assert_close(restored, in_strips(network, image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    network = localize(network_of(SMALL), 32)
    image = picture(60, 75)
    exact = in_strips(network, image)
    close = in_strips(network, image, dtype)
    assert close.dtype == torch.float32
    assert 1e-6 < float((close - exact).abs().max()) < 0.1


@pytest.mark.parametrize("family", FAMILY)
def test_its_weights_are_its_own(family):
    network = network_of(NetConfig(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1), **FAMILY[family]))
    image = picture(40, 52)[0].permute(1, 2, 0)
    strips = StripNetwork(network)
    before = strips(image)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    assert torch.equal(strips(image), before)
