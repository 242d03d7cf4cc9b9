"""The table of known checkpoints: what the authors published, and the file in this package."""

import pytest

from nafnet import checkpoint
from nafnet.catalog import CATALOG, MIRRORS, find_hash
from nafnet.conventions import PROTOCOLS
from nafnet.model import NetConfig

GOPRO = ((1, 1, 1, 28), 1, (1, 1, 1, 1))
SIDD = ((2, 2, 4, 8), 12, (2, 2, 2, 2))
# layout, width, dw_expand, protocol, TLC, PSNR, SSIM-3D
PUBLISHED = {
    "NAFNet-GoPro-width32": (GOPRO, 32, 2, "gopro", True, 32.8705, 0.9606),
    "NAFNet-GoPro-width64": (GOPRO, 64, 2, "gopro", True, 33.7103, 0.9668),
    "NAFNet-SIDD-width32": (SIDD, 32, 2, "sidd", False, 39.9672, 0.9599),
    "NAFNet-SIDD-width64": (SIDD, 64, 2, "sidd", False, 40.3045, 0.9614),
    "NAFNet-REDS-width64": (GOPRO, 64, 2, "reds", True, 29.0903, 0.8671),
    "Baseline-GoPro-width32": (GOPRO, 32, 1, "gopro", True, 32.4799, 0.9575),
    "Baseline-GoPro-width64": (GOPRO, 64, 2, "gopro", True, 33.3960, 0.9649),
    "Baseline-SIDD-width32": (SIDD, 32, 1, "sidd", False, 39.8857, 0.9596),
    "Baseline-SIDD-width64": (SIDD, 64, 2, "sidd", False, 40.2970, 0.9617),
}
SHA256 = {
    "NAFNet-GoPro-width32": "19394e6155d12ef6371d1d57496f87f0ec88f92bdffa27c0792690722d5d1a5c",
    "NAFNet-GoPro-width64": "329d3ab4077b8d6b7ff61de376e483714667960bf85be027bf4335cda701196f",
    "NAFNet-SIDD-width32": "89c70e808d1783b6c07911306e106aaf0d4f7f3da8c61078b99ff7f8929a26f4",
    "NAFNet-SIDD-width64": "cd685efaae01f7c4e9951f2deab05780079c8eb1e49ed664b72f6db04dabb445",
    "NAFNet-REDS-width64": "175fe8b3cdf3abedfbc87769779c3d9f491e05bb2e73ea9d627883f90a4b2df3",
}


def test_nine_published_checkpoints_and_one_of_ours():
    assert set(CATALOG) == {*PUBLISHED, "demo"}
    assert all(name == entry.name for name, entry in CATALOG.items())
    assert all(entry.protocol in PROTOCOLS for entry in CATALOG.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows(name):
    (enc, middle, dec), width, dw_expand, protocol, tlc, psnr, ssim_3d = PUBLISHED[name]
    entry = CATALOG[name]
    family = name.split("-")[0]
    config = NetConfig(width=width, enc_blocks=enc, middle_blocks=middle, dec_blocks=dec, dw_expand=dw_expand)
    if family == "Baseline":
        config = NetConfig(
            width=width,
            enc_blocks=enc,
            middle_blocks=middle,
            dec_blocks=dec,
            dw_expand=dw_expand,
            activation="gelu",
            attention="ca",
        )
    assert entry.config == config
    assert entry.config.family == family
    assert (entry.protocol, entry.tlc, entry.train_size) == (protocol, tlc, 256)
    assert (entry.psnr, entry.ssim_3d) == (psnr, ssim_3d)
    assert entry.file == f"{name}.pth"
    assert entry.sha256 == SHA256.get(name)
    assert entry.bundled_path() is None


def test_files_are_named_by_their_content_and_where_to_get_them():
    for name, sha256 in SHA256.items():
        assert find_hash(sha256) is CATALOG[name]
    assert find_hash("0" * 64) is None
    assert [f"https://huggingface.co/{who}/nafnet-models/resolve/main" for who in ("nyanko7", "mikestealth")] == [
        *MIRRORS
    ]


def test_sizes_fit_the_parameters():
    """A .pth holds four bytes a parameter and less than 1 % of names."""
    sizes = {name: entry.size for name, entry in CATALOG.items() if entry.size and not entry.bundled}
    assert sizes == {
        "NAFNet-GoPro-width32": 68_671_121,
        "NAFNet-GoPro-width64": 271_778_961,
        "NAFNet-SIDD-width64": 464_154_961,
        "NAFNet-REDS-width64": 271_756_689,
    }
    for name, parameters in [("NAFNet-GoPro-width32", 17_111_907), ("NAFNet-SIDD-width64", 115_982_915)]:
        assert 1 < sizes[name] / (4 * parameters) < 1.01


def test_the_bundled_weights_are_what_their_row_says():
    entry = CATALOG["demo"]
    path = entry.bundled_path()
    assert path is not None
    assert path.stat().st_size <= 3_000_000
    loaded = checkpoint.load(path, expected_sha256=entry.sha256)
    assert loaded.network.config == entry.config
    assert loaded.train_size == entry.train_size
    assert loaded.metadata["data"] == "procedural scenes"
