"""The networks against a second, plain transcription of the paper (`reference.py`) and its published sizes."""

import itertools

import pytest
import torch

import nafnet
from nafnet.catalog import CATALOG
from nafnet.model import Block, ChannelAttention, NetConfig, Network, multiply_adds, parameters, spread
from nafnet.tlc import localize
from tests.nafnet import reference

GOPRO = {"enc_blocks": (1, 1, 1, 4), "middle_blocks": 1, "dec_blocks": (1, 1, 1, 1)}  # 28 blocks in the real one
SIDD = {"enc_blocks": (2, 2, 2, 3), "middle_blocks": 3, "dec_blocks": (2, 2, 2, 2)}
FAMILIES = {
    "NAFNet": {},
    "Baseline": {"activation": "gelu", "attention": "ca", "dw_expand": 1},
    "Baseline, wide": {"activation": "gelu", "attention": "ca", "dw_expand": 2},
    "PlainNet": {"norm": "none", "activation": "relu", "attention": "none", "dw_expand": 1},
}
# name: parameters, multiply-adds of the convolutions at 256x256 in units of 1e9
PUBLISHED = {
    "NAFNet-GoPro-width32": (17_111_907, 15.96),
    "NAFNet-GoPro-width64": (67_888_835, 63.05),
    "NAFNet-SIDD-width32": (29_159_715, 16.05),
    "NAFNet-SIDD-width64": (115_982_915, 63.24),
    "NAFNet-REDS-width64": (67_888_835, 63.05),
    "Baseline-GoPro-width32": (17_023_875, 15.82),
    "Baseline-GoPro-width64": (112_036_291, 82.41),
    "Baseline-SIDD-width32": (29_056_227, 15.87),
    "Baseline-SIDD-width64": (194_419_779, 82.61),
}
BLOCK = [*(f"conv{i}.{kind}" for i in range(1, 6) for kind in ("weight", "bias")), "beta", "gamma"]
NORMS = [f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
ATTENTION = {
    "sca": ["sca.1.weight", "sca.1.bias"],
    "ca": ["se.1.weight", "se.1.bias", "se.3.weight", "se.3.bias"],
    "none": [],
}


def picture(height, width, channels=3, batch=1):
    """Noise that grows from corner to corner, so that local means are not the global one."""
    noise = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(height * width))
    return noise * (torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 1, width)) / 2


@torch.no_grad()
def both(config, image, train_size=None):
    """What the network makes of an image, and what the transcription makes of it."""
    network = reference.randomize(Network(config))
    if train_size is not None:
        localize(network, train_size)
    network.to(memory_format=torch.channels_last)
    dials = {"activation": config.activation, "sigma": config.sigma}
    expected = reference.network(network.state_dict(), image, train_size=train_size, **dials)
    assert (expected - image).abs().max() > 0.1  # the blocks matter
    if train_size is not None and config.attention != "none" and max(image.shape) > train_size * 1.5:
        with_global_means = reference.network(network.state_dict(), image, **dials)
        assert (expected - with_global_means).abs().max() > 1e-3  # the windows matter
    return network(image), expected


# Against the transcription


@pytest.mark.parametrize("train_size", [None, 32])
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("layout", [GOPRO, SIDD], ids=["GoPro", "SIDD"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_transcription(family, layout, width, train_size):
    config = NetConfig(width=width, **layout, **FAMILIES[family])
    restored, expected = both(config, picture(97, 131), train_size)
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("train_size", [None, 16])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (31, 17), (48, 24), (64, 80), (9, 301)])
def test_any_size_equals_the_transcription(size, train_size):
    restored, expected = both(NetConfig(width=8, **SIDD), picture(*size), train_size)
    assert restored.shape == (1, 3, *size)
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=0)


DIALS = [
    {"norm": norm, "activation": activation, "attention": attention, "sigma": sigma}
    for norm, activation, attention in itertools.product(
        ("layer", "none"), ("gate", "gelu", "relu"), ("sca", "ca", "none")
    )
    for sigma in (("identity", "relu", "gelu", "sigmoid", "silu") if activation == "gate" else ("identity",))
]


@pytest.mark.parametrize("dials", DIALS, ids=lambda dials: "-".join(dials.values()))
def test_every_ablation_equals_the_transcription(dials):
    config = NetConfig(width=8, enc_blocks=(1, 2), middle_blocks=1, dec_blocks=(1, 1), **dials)
    restored, expected = both(config, picture(21, 26), train_size=8)
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("blocks", [{"dw_expand": 1}, {"dw_expand": 3, "ffn_expand": 4}, {"middle_blocks": 0}])
def test_other_shapes_equal_the_transcription(blocks):
    config = NetConfig(**{"width": 8, "enc_blocks": (1, 0), "dec_blocks": (0, 2), **blocks})
    restored, expected = both(config, picture(10, 13))
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=0)


def test_grey_networks_and_batches():
    config = NetConfig(width=8, enc_blocks=(1,), dec_blocks=(1,), image_channels=1)
    image = picture(19, 22, channels=1, batch=3)
    restored, expected = both(config, image, train_size=8)
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=0)
    alone, _ = both(config, image[1:2], train_size=8)
    torch.testing.assert_close(restored[1:2], alone, atol=1e-6, rtol=0)


def test_flat_areas_stay_exact_in_low_precision():
    network = reference.randomize(Network(NetConfig(width=8, enc_blocks=(1,), dec_blocks=(1,))))
    torch.nn.init.zeros_(network.ending.weight)
    torch.nn.init.zeros_(network.ending.bias)
    image = picture(12, 15)
    restored = network.to(torch.bfloat16)(image)
    assert restored.dtype == torch.float32
    assert torch.equal(restored, image)


def test_blocks_start_as_the_identity():
    x = torch.randn(2, 8, 5, 7)
    for dials in DIALS:
        assert torch.equal(Block(8, NetConfig(width=8, **dials))(x), x)


def test_spread_puts_the_odd_row_after():
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert spread(x, 5, 3)[0, 0, :, 0].tolist() == [0, 0, 3, 3, 3]  # 3 rows missing: 1 before, 2 after
    assert spread(x, 2, 6)[0, 0, 0].tolist() == [0, 0, 1, 2, 2, 2]
    assert spread(x[:, :, :1], 9, 3).shape == (1, 1, 1, 3)  # broadcasting does the rest
    assert spread(x, 2, 3) is x


def test_attention_may_spread_after_its_convolutions():
    torch.manual_seed(0)
    y, pooled = torch.randn(1, 6, 9, 8), torch.randn(1, 6, 4, 5)
    conv = torch.nn.Conv2d(6, 6, 1)
    attention = ChannelAttention(torch.nn.Identity(), conv)
    attention[0].forward = lambda _: pooled
    torch.testing.assert_close(attention(y), y * conv(spread(pooled, 9, 8)), atol=1e-6, rtol=0)


# Sizes and names


def test_all_published_networks_are_listed():
    assert set(PUBLISHED) == {name for name, entry in CATALOG.items() if not entry.bundled}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    count, giga = PUBLISHED[name]
    config = CATALOG[name].config
    with torch.device("meta"):
        assert parameters(Network(config)) == count
    assert round(multiply_adds(config, 256, 256) / 1e9, 2) == giga


def test_multiply_adds_of_a_network_counted_by_hand():
    config = NetConfig(width=4, enc_blocks=(1,), middle_blocks=0, dec_blocks=(0,))
    pixels = 8 * 8
    block = pixels * (4 * 8 + 8 * 9 + 4 * 4 + 4 * 8 + 4 * 4) + 4 * 4  # conv1 to conv5, and SCA on one pixel
    u = pixels * (3 * 4 * 9) + pixels // 4 * (4 * 8 * 4) + pixels // 4 * (8 * 16) + pixels * (4 * 3 * 9)
    assert multiply_adds(config, 8, 8) == block + u
    assert multiply_adds(config, 7, 8) == block + u  # padded to 8


@pytest.mark.parametrize(
    ("dials", "family"),
    [
        ({}, "NAFNet"),
        ({"activation": "gelu", "attention": "ca"}, "Baseline"),
        ({"norm": "none", "activation": "relu", "attention": "none"}, "PlainNet"),
        ({"attention": "ca"}, "layer+gate+ca"),
    ],
)
def test_state_dict_names_are_those_of_the_published_files(dials, family):
    config = NetConfig(width=4, enc_blocks=(1, 2), middle_blocks=1, dec_blocks=(2, 1), **dials)
    inside = BLOCK + (NORMS if config.norm == "layer" else []) + ATTENTION[config.attention]
    blocks = ["encoders.0.0", "encoders.1.0", "encoders.1.1", "middle_blks.0"]
    blocks += ["decoders.0.0", "decoders.0.1", "decoders.1.0"]
    outside = ["intro.weight", "intro.bias", "ending.weight", "ending.bias", "ups.0.0.weight", "ups.1.0.weight"]
    outside += ["downs.0.weight", "downs.0.bias", "downs.1.weight", "downs.1.bias"]
    expected = {f"{block}.{name}" for block in blocks for name in inside} | set(outside)
    assert set(Network(config).state_dict()) == expected
    assert config.family == family


def test_shapes_are_those_of_the_published_files():
    with torch.device("meta"):
        shapes = {
            name: tuple(t.shape) for name, t in Network(CATALOG["NAFNet-GoPro-width32"].config).state_dict().items()
        }
        wide = Network(CATALOG["Baseline-SIDD-width64"].config).state_dict()
    assert shapes["intro.weight"] == (32, 3, 3, 3)
    assert shapes["encoders.0.0.beta"] == (1, 32, 1, 1)
    assert shapes["encoders.0.0.conv2.weight"] == (64, 1, 3, 3)
    assert shapes["encoders.3.27.sca.1.weight"] == (256, 256, 1, 1)
    assert shapes["middle_blks.0.norm2.weight"] == (512,)
    assert shapes["downs.3.weight"] == (512, 256, 2, 2)
    assert shapes["ups.0.0.weight"] == (1024, 512, 1, 1)
    assert "encoders.3.28.beta" not in shapes
    assert tuple(wide["middle_blks.11.se.1.weight"].shape) == (1024, 2048, 1, 1)
    assert tuple(wide["middle_blks.11.se.3.weight"].shape) == (2048, 1024, 1, 1)


# Configs


def test_config_tells_its_levels():
    assert (NetConfig().levels, NetConfig().stride) == (4, 16)
    assert (NetConfig(enc_blocks=(1,), dec_blocks=(1,)).levels, NetConfig(enc_blocks=(1,), dec_blocks=(1,)).stride) == (
        1,
        2,
    )
    assert NetConfig(width=16) == NetConfig(width=16)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"enc_blocks": (1, 1), "dec_blocks": (1,)}, "as many encoder as decoder levels"),
        ({"enc_blocks": (), "dec_blocks": ()}, "as many encoder as decoder levels"),
        ({"width": 7, "dw_expand": 1}, "must be even"),
        ({"width": 7, "ffn_expand": 3}, "must be even"),
        ({"activation": "gelu", "sigma": "relu"}, "sigma='relu' acts inside the gate"),
        ({"norm": "batch"}, "norm must be one of layer, none, got 'batch'"),
        ({"activation": "swish"}, "activation must be one of gate, gelu, relu, got 'swish'"),
        ({"attention": "se"}, "attention must be one of sca, ca, none, got 'se'"),
        ({"sigma": "tanh"}, "sigma must be one of identity, relu, gelu, sigmoid, silu, got 'tanh'"),
    ],
)
def test_impossible_configs_say_why(fields, words):
    with pytest.raises(ValueError, match=words):
        NetConfig(**fields)


def test_an_odd_width_needs_no_gate():
    config = NetConfig(width=5, enc_blocks=(1,), dec_blocks=(1,), activation="gelu", attention="ca", dw_expand=1)
    restored, expected = both(config, picture(6, 9))
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=0)


def test_the_package_has_every_name_it_lists() -> None:
    assert {name for name in nafnet.__all__ if callable(getattr(nafnet, name))} == set(nafnet.__all__)
