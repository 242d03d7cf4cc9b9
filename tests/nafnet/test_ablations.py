"""The paper's ablations: every row builds and runs in both layouts, and rows that are one network are one config."""

from dataclasses import replace

import pytest
import torch

from nafnet.ablations import ABLATIONS, LAYOUTS, build, config, near, select
from nafnet.catalog import CATALOG
from nafnet.model import Network, parameters
from nafnet.strips import StripNetwork
from tests.nafnet import reference

# SIDD, GoPro: PSNR in dB
PUBLISHED = {
    "table1/plainnet": (39.29, 28.51),
    "table1/plainnet+ln": (39.73, 31.90),
    "table1/plainnet+ln+gelu": (39.71, 32.11),
    "table1/baseline": (39.85, 32.35),
    "table2/baseline": (39.85, 32.35),
    "table2/baseline+sg": (39.93, 32.76),
    "table2/baseline+sca": (39.95, 32.54),
    "table2/nafnet": (39.96, 32.85),
    "table3/9-blocks": (39.78, 31.79),
    "table3/18-blocks": (39.90, 32.64),
    "table3/36-blocks": (39.96, 32.85),
    "table3/72-blocks": (39.95, 32.88),
    "table5/identity": (39.96, 32.85),
    "table5/relu": (39.98, 32.59),
    "table5/gelu": (39.97, 32.72),
    "table5/sigmoid": (39.99, 32.50),
    "table5/silu": (39.96, 32.74),
}
# norm, activation, attention, sigma, dw_expand
DIALS = {
    "table1/plainnet": ("none", "relu", "none", "identity", 1),
    "table1/plainnet+ln": ("layer", "relu", "none", "identity", 1),
    "table1/plainnet+ln+gelu": ("layer", "gelu", "none", "identity", 1),
    "table2/baseline": ("layer", "gelu", "ca", "identity", 1),
    "table2/baseline+sg": ("layer", "gate", "ca", "identity", 2),
    "table2/baseline+sca": ("layer", "gelu", "sca", "identity", 1),
    "table5/silu": ("layer", "gate", "sca", "silu", 2),
}
EQUAL = (
    ("table1/baseline", "table2/baseline"),
    ("table2/nafnet", "table3/36-blocks"),
    ("table2/nafnet", "table5/identity"),
)
DISTINCT = [name for name in ABLATIONS if name not in {other for _, other in EQUAL}]


def test_rows_are_the_papers():
    assert {name: (row.psnr_sidd, row.psnr_gopro) for name, row in ABLATIONS.items()} == PUBLISHED
    assert all(name == row.name and name.startswith(f"table{row.table}/") for name, row in ABLATIONS.items())
    assert {row.name: row.learning_rate for row in select("table1")} == {
        "table1/plainnet": 1e-4,
        "table1/plainnet+ln": 1e-3,
        "table1/plainnet+ln+gelu": 1e-3,
        "table1/baseline": 1e-3,
    }
    assert [row.latency_ms for row in select("table3")] == [154.7, 151.7, 177.1, 230.1]
    for name, dials in DIALS.items():
        c = config(name, "gopro")
        assert (c.norm, c.activation, c.attention, c.sigma, c.dw_expand) == dials


@pytest.mark.parametrize("data", LAYOUTS)
def test_rows_that_are_one_network_have_equal_configs(data):
    for one, other in EQUAL:
        assert config(one, data) == config(other, data)
    assert len({config(name, data) for name in ABLATIONS}) == len(ABLATIONS) - len(EQUAL)
    released = {"gopro": "GoPro", "sidd": "SIDD"}[data]
    assert config("table1/baseline", data) == CATALOG[f"Baseline-{released}-width32"].config
    assert config("table2/nafnet", data) == CATALOG[f"NAFNet-{released}-width32"].config


@pytest.mark.parametrize("data", LAYOUTS)
def test_numbers_of_blocks_are_those_of_the_row(data):
    for row in ABLATIONS.values():
        c = row.config(data)
        assert sum(c.enc_blocks) + c.middle_blocks + sum(c.dec_blocks) == row.blocks
        assert c.width == 32
        assert c.levels == 4
        assert min(*c.enc_blocks, c.middle_blocks, *c.dec_blocks) >= 1
    assert {row.blocks for row in select("table1", "table2", "table5")} == {36}
    assert [row.blocks for row in select("table3")] == [9, 18, 36, 72]


def test_parameters():
    with torch.device("meta"):
        count = {name: parameters(build(name, "gopro")) for name in DISTINCT if "table5" not in name}
        assert parameters(build("table2/nafnet", "sidd")) == 29_159_715
    assert count["table2/nafnet"] == 17_111_907
    assert count["table1/baseline"] == 17_023_875
    assert count["table1/plainnet"] < count["table1/plainnet+ln"] == count["table1/plainnet+ln+gelu"]
    assert count["table1/plainnet+ln"] < count["table2/baseline+sca"] < count["table1/baseline"]
    assert count["table1/baseline"] < count["table2/nafnet"] < count["table2/baseline+sg"]
    assert count["table3/9-blocks"] < count["table3/18-blocks"] < count["table2/nafnet"] < count["table3/72-blocks"]


@pytest.mark.parametrize("data", LAYOUTS)
@pytest.mark.parametrize("name", DISTINCT)
def test_every_row_runs_as_the_papers_equations_say(name, data):
    """At width 4: the network, which restores in strips on a CPU, against plain arithmetic."""
    c = replace(config(name, data), width=4)
    network = reference.randomize(Network(c))
    image = torch.rand(1, 3, 17, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = reference.network(network.state_dict(), image, activation=c.activation, sigma=c.sigma)
        restored = StripNetwork(network)(image[0].permute(1, 2, 0)).permute(2, 0, 1)[None]
    scale = float((plain - image).abs().max())
    assert scale > 1e-3  # it does something
    torch.testing.assert_close(restored, plain, rtol=0, atol=1e-5 * max(scale, 1))


def test_a_set_of_rows_by_name_table_or_glob():
    assert [row.name for row in select("table5/relu", "table3", "table3/9-blocks")] == [
        *(name for name in PUBLISHED if name.startswith("table3/")),
        "table5/relu",
    ]
    assert [row.name for row in select("*/*baseline*")] == [name for name in PUBLISHED if "baseline" in name]
    assert [row.name for row in select("*")] == list(PUBLISHED)


def test_a_wrong_name_is_told_the_near_ones():
    with pytest.raises(ValueError, match=r"no ablation is called 'table1/PlainNett': near it are table1/plainnet,"):
        build("table1/PlainNett", "gopro")
    with pytest.raises(ValueError, match=r"'sigmoyd': near it are table5/sigmoid; .*'qqq': table1/plainnet, .*silu$"):
        select("sigmoyd", "table3", "qqq")
    with pytest.raises(ValueError, match="data must be one of gopro, sidd, got 'reds'"):
        config("table2/nafnet", "reds")
    assert near("NAFNET-gopro-width-32", CATALOG)[0] == "NAFNet-GoPro-width32"
