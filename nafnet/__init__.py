"""NAFNet, Baseline and PlainNet with TLC, tiling and the published scoring protocols."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nafnet.checkpoint import CheckpointError
    from nafnet.images import Picture, RefusedImage, UnreadableImage, decode, encode
    from nafnet.metrics import psnr, ssim_2d, ssim_3d
    from nafnet.model import NetConfig, Network
    from nafnet.recipe import Recipe, Step
    from nafnet.restore import Restored, Restorer

__version__ = "0.1.0"

_MODULES = {
    "checkpoint": ("CheckpointError",),
    "images": ("Picture", "RefusedImage", "UnreadableImage", "decode", "encode"),
    "metrics": ("psnr", "ssim_2d", "ssim_3d"),
    "model": ("NetConfig", "Network"),
    "recipe": ("Recipe", "Step"),
    "restore": ("Restored", "Restorer"),
}

__all__ = [
    "CheckpointError",
    "NetConfig",
    "Network",
    "Picture",
    "Recipe",
    "RefusedImage",
    "Restored",
    "Restorer",
    "Step",
    "UnreadableImage",
    "decode",
    "encode",
    "psnr",
    "ssim_2d",
    "ssim_3d",
]

if not TYPE_CHECKING:  # whose tools would take any name for one of this package

    def __getattr__(name: str) -> Any:
        """Import what is asked for then: processes that read, score and write images can do without torch."""
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"nafnet.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
