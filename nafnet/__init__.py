"""NAFNet, Baseline and PlainNet with TLC, tiling and the published scoring protocols."""

from nafnet.checkpoint import CheckpointError
from nafnet.images import Picture, RefusedImage, UnreadableImage, decode, encode
from nafnet.metrics import psnr, ssim_2d, ssim_3d
from nafnet.model import NetConfig, Network
from nafnet.recipe import Recipe, Step
from nafnet.restore import Restored, Restorer

__version__ = "0.1.0"

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
