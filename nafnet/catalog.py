"""The published checkpoints, and the bundled one, as a table: which file, how to run it, and what it should score.

PSNR and SSIM-3D are those of the authors' released files under the named protocol (their repository, revision
2b4af71); the paper rounds some of them differently. SHA-256 values are as third parties record the files, since the
authors publish none; for the Baseline files nobody does.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from nafnet.model import NetConfig

# Prefixes that hold copies of the authors' files under their published names, in the order in which to try them.
MIRRORS: tuple[str, ...] = (
    "https://huggingface.co/nyanko7/nafnet-models/resolve/main",
    "https://huggingface.co/mikestealth/nafnet-models/resolve/main",
)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One known checkpoint.

    Attributes:
        tlc, train_size: whether its scores were published with TLC, and the training crops' side (px).
        protocol: the name of its scoring protocol (`nafnet.conventions.PROTOCOLS`).
        psnr, ssim_3d: published means on the protocol's data set; None for the bundled weights.
    """

    name: str
    file: str
    config: NetConfig
    tlc: bool
    protocol: str
    sha256: str | None = None
    size: int | None = None  # bytes
    psnr: float | None = None
    ssim_3d: float | None = None
    train_size: int = 256
    bundled: bool = False

    def bundled_path(self) -> Path | None:
        """Where the file lies inside this package, for the entry that is shipped with it."""
        return Path(str(resources.files("nafnet"))) / "weights" / self.file if self.bundled else None


_GOPRO = {"enc_blocks": (1, 1, 1, 28), "middle_blocks": 1, "dec_blocks": (1, 1, 1, 1)}
_SIDD = {"enc_blocks": (2, 2, 4, 8), "middle_blocks": 12, "dec_blocks": (2, 2, 2, 2)}


def _nafnet(width: int, layout: dict[str, object]) -> NetConfig:
    return NetConfig(width=width, **layout)  # type: ignore[arg-type]  # the two layouts above


def _baseline(width: int, layout: dict[str, object]) -> NetConfig:
    dw_expand = 2 if width == 64 else 1  # the released wide files, unlike the paper
    return NetConfig(width=width, dw_expand=dw_expand, activation="gelu", attention="ca", **layout)  # type: ignore[arg-type]


_ROWS = (
    CatalogEntry(
        "NAFNet-GoPro-width32",
        "NAFNet-GoPro-width32.pth",
        _nafnet(32, _GOPRO),
        tlc=True,
        protocol="gopro",
        sha256="19394e6155d12ef6371d1d57496f87f0ec88f92bdffa27c0792690722d5d1a5c",
        size=68_671_121,
        psnr=32.8705,
        ssim_3d=0.9606,
    ),
    CatalogEntry(
        "NAFNet-GoPro-width64",
        "NAFNet-GoPro-width64.pth",
        _nafnet(64, _GOPRO),
        tlc=True,
        protocol="gopro",
        sha256="329d3ab4077b8d6b7ff61de376e483714667960bf85be027bf4335cda701196f",
        size=271_778_961,
        psnr=33.7103,
        ssim_3d=0.9668,
    ),
    CatalogEntry(
        "NAFNet-SIDD-width32",
        "NAFNet-SIDD-width32.pth",
        _nafnet(32, _SIDD),
        tlc=False,
        protocol="sidd",
        sha256="89c70e808d1783b6c07911306e106aaf0d4f7f3da8c61078b99ff7f8929a26f4",
        psnr=39.9672,
        ssim_3d=0.9599,
    ),
    CatalogEntry(
        "NAFNet-SIDD-width64",
        "NAFNet-SIDD-width64.pth",
        _nafnet(64, _SIDD),
        tlc=False,
        protocol="sidd",
        sha256="cd685efaae01f7c4e9951f2deab05780079c8eb1e49ed664b72f6db04dabb445",
        size=464_154_961,
        psnr=40.3045,
        ssim_3d=0.9614,
    ),
    CatalogEntry(
        "NAFNet-REDS-width64",
        "NAFNet-REDS-width64.pth",
        _nafnet(64, _GOPRO),
        tlc=True,
        protocol="reds",
        sha256="175fe8b3cdf3abedfbc87769779c3d9f491e05bb2e73ea9d627883f90a4b2df3",
        size=271_756_689,
        psnr=29.0903,
        ssim_3d=0.8671,
    ),
    CatalogEntry(
        "Baseline-GoPro-width32",
        "Baseline-GoPro-width32.pth",
        _baseline(32, _GOPRO),
        tlc=True,
        protocol="gopro",
        psnr=32.4799,
        ssim_3d=0.9575,
    ),
    CatalogEntry(
        "Baseline-GoPro-width64",
        "Baseline-GoPro-width64.pth",
        _baseline(64, _GOPRO),
        tlc=True,
        protocol="gopro",
        psnr=33.3960,
        ssim_3d=0.9649,
    ),
    CatalogEntry(
        "Baseline-SIDD-width32",
        "Baseline-SIDD-width32.pth",
        _baseline(32, _SIDD),
        tlc=False,
        protocol="sidd",
        psnr=39.8857,
        ssim_3d=0.9596,
    ),
    CatalogEntry(
        "Baseline-SIDD-width64",
        "Baseline-SIDD-width64.pth",
        _baseline(64, _SIDD),
        tlc=False,
        protocol="sidd",
        psnr=40.2970,
        ssim_3d=0.9617,
    ),
    CatalogEntry(
        "demo",
        "demo.safetensors",
        NetConfig(width=16, enc_blocks=(2, 2, 4), middle_blocks=3, dec_blocks=(2, 2, 2)),
        tlc=False,  # measured: 10.43 dB gain on photographs, 10.40 with TLC
        protocol="stored",
        sha256="a682d46791653031d21399a0bdc936b2bbcc242bc32f9bdf4382fbd10823e9ae",
        size=2_712_428,
        train_size=96,
        bundled=True,
    ),
)

CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in _ROWS}


def find_hash(sha256: str) -> CatalogEntry | None:
    """The entry whose file has this content, whatever it is called."""
    return next((entry for entry in _ROWS if entry.sha256 == sha256), None)
