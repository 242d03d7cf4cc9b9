"""1x1 convolutions with oneDNN and without, against the same in float64."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from nafnet import pointwise
from nafnet.model import NetConfig
from nafnet.pointwise import Pointwise, PointwiseSum, has_onednn
from nafnet.strips import StripNetwork
from nafnet.tlc import localize
from tests.nafnet.test_strips import FAMILY, expected, network_of, picture

THENS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid}
SHAPES = [(1, 1, 8, 16), (1, 7, 32, 64), (3, 5, 64, 32), (60, 150, 24, 40)]  # h, w, c, d; the last is over a strip's
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch alone"])
def onednn(request, monkeypatch):
    """With what this machine has, and as on one that has no oneDNN."""
    if not request.param:
        monkeypatch.setattr(pointwise, "has_onednn", lambda _: False)


def numbers(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("then", THENS)
@pytest.mark.parametrize(("h", "w", "c", "d"), SHAPES)
@pytest.mark.usefixtures("onednn")
def test_layer(h, w, c, d, then, dtype):
    x, weight, bias = numbers(h, w, c, dtype=dtype), numbers(d, c, dtype=dtype) / c**0.5, numbers(d, dtype=dtype)
    right = THENS[then](F.linear(x.double(), weight.double(), bias.double()))
    kept = x.clone()
    with torch.inference_mode():
        out = Pointwise(weight, bias, then)(x)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(x, kept)


@pytest.mark.usefixtures("onednn")
def test_layer_without_bias():
    x, weight = numbers(4, 5, 8, dtype=torch.float32), numbers(16, 8, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(Pointwise(weight, None)(x), F.linear(x, weight), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("h", "w", "c", "d"), SHAPES)
@pytest.mark.usefixtures("onednn")
def test_sum_is_added_in_place_to_some_rows_of_a_map(h, w, c, d, dtype):
    x, weight, bias = numbers(h, w, c, dtype=dtype), numbers(d, c, dtype=dtype) / c**0.5, numbers(d, dtype=dtype)
    image = numbers(h + 2, w, d, dtype=dtype, seed=1)
    right = image.double()
    right[1:-1] += F.linear(x.double(), weight.double(), bias.double())
    with torch.inference_mode():
        PointwiseSum(weight, bias)(image[1:-1], x)
    torch.testing.assert_close(image.double(), right, atol=2 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("family", "train_size"), [(family, None) for family in FAMILY] + [("NAFNet", 16), ("Baseline", 16)]
)
@pytest.mark.usefixtures("onednn")
def test_network(family, train_size):
    network = network_of(NetConfig(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1), **FAMILY[family]))
    image = picture(40, 52)
    right = expected(network, image, train_size)
    if train_size:
        localize(network, train_size)
    restored = StripNetwork(network)(image[0].permute(1, 2, 0)).permute(2, 0, 1)[None]
    torch.testing.assert_close(restored, right, atol=1e-5, rtol=0)


def test_without_onednn_in_torch_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not any(has_onednn(dtype) for dtype in TOLERANCE)
