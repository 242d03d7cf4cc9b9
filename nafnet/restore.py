"""One image in, one image out: a `Recipe` says all that decides the pixels, a `Restorer` carries it out."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch

from nafnet import catalog, checkpoint
from nafnet.metrics import data_range_of, quantize
from nafnet.model import NetConfig, Network, parameters
from nafnet.tiling import Tile, plan_tiles, restore_tiles
from nafnet.tlc import localize, windows

Precision = Literal["float32", "bf16", "float16"]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.float32]

_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
}
_LIBRARIES_BYTES = 500 * 2**20  # a process that has imported torch and Ray, before it restores anything
_PIXELS_REVISION = 1  # raised when a change to this package changes restored pixels beyond rounding


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the pixels, and nothing else: equal recipes restore an image equally, on any machine.

    Attributes:
        weights: SHA-256 of the checkpoint file.
        tlc: local attention windows (see `nafnet.tlc`) instead of global means.
        train_size: side of the training crops in px, which fixes the windows; None without TLC.
        precision: dtype of the network; the image itself stays float32.
        tile: side of the tiles in px, or None for the whole image at once.
        halo: px around a tile that are restored and thrown away; 0 without tiles.
        tf32: on NVIDIA GPUs, let float32 convolutions round their inputs to 10 bits.
    """

    weights: str
    tlc: bool = True
    train_size: int | None = 256
    precision: Precision = "float32"
    tile: int | None = None
    halo: int = 192
    tf32: bool = False

    def __post_init__(self) -> None:
        """Drop what has no effect, so that recipes that act alike hash alike; ValueError for impossible ones."""
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        if self.tlc and (self.train_size is None or self.train_size < 1):
            raise ValueError(f"TLC needs the side of the training crops: train_size is {self.train_size}")
        if self.halo < 0:
            raise ValueError(f"halo is a number of px, got {self.halo}")
        if not self.tlc:
            object.__setattr__(self, "train_size", None)
        if self.tile is None:
            object.__setattr__(self, "halo", 0)

    @property
    def hash(self) -> str:
        """16 hex digits that differ when any field, or the meaning of the fields, differs."""
        content = json.dumps({"revision": _PIXELS_REVISION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class Restorer:
    """A network ready to restore images on one device. Calls do not change it."""

    def __init__(self, network: Network, recipe: Recipe, *, device: str = "cpu") -> None:
        """Take over `network` (float32, eval mode): it is localized, cast and moved in place.

        Raises:
            ValueError: the tile is no larger than the TLC window, which would silently turn TLC off, or keeps nothing.
        """
        config = network.config
        if recipe.train_size is not None:
            localize(network, recipe.train_size)
        if recipe.tile is not None:
            plan_tiles(1, 1, tile_px=recipe.tile, halo_px=recipe.halo, stride=config.stride)
            window = windows(config, recipe.train_size)[0] if recipe.train_size is not None else 0
            if recipe.tile - config.stride < window:
                raise ValueError(
                    f"tile {recipe.tile} px must exceed the TLC window of {window} px by {config.stride} px or more: "
                    "in a smaller tile the local means would silently become global ones"
                )
        self.recipe = recipe
        self.device = device
        dtype = _DTYPES[recipe.precision]
        self.network = network.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    @classmethod
    def load(
        cls,
        weights: str | Path,
        *,
        tlc: bool | None = None,
        train_size: int | None = None,
        precision: Precision = "float32",
        tile: int | None = None,
        halo: int = 192,
        tf32: bool = False,
        device: str = "cpu",
    ) -> "Restorer":
        """Load a checkpoint: a path, or the name of the bundled one ("demo").

        `tlc` and `train_size` left out are what the catalog, then the file, says; else TLC is on for crops of 256.
        The other keywords are `Recipe`'s fields; `device` is torch's name for it and not part of the recipe.

        Raises:
            nafnet.checkpoint.CheckpointError: the file is no network of this family, or damaged.
            FileNotFoundError, ValueError: no such file; an impossible recipe.
        """
        named = catalog.CATALOG.get(str(weights))
        path = named.bundled_path() if named else None
        if named and path is None and not Path(weights).exists():
            raise FileNotFoundError(f"{named.name} is not bundled: fetch {named.file} and give its path here")
        loaded = checkpoint.load(path or weights, expected_sha256=named.sha256 if named and path else None)
        entry = catalog.find_hash(loaded.sha256)
        if tlc is None:
            tlc = entry.tlc if entry else True
        if train_size is None:
            train_size = loaded.train_size or (entry.train_size if entry else 256)
        recipe = Recipe(
            weights=loaded.sha256,
            tlc=tlc,
            train_size=train_size,
            precision=precision,
            tile=tile,
            halo=halo,
            tf32=tf32,
        )
        return cls(loaded.network, recipe, device=device)

    def __call__(self, image: Pixels) -> Pixels:
        """Restore (H, W) or (H, W, C), uint8, uint16 or float32 in [0, 1]; the same shape and kind out.

        C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA). Alpha passes through. Grey enters an RGB network as three
        equal channels, whose results are averaged. Integers are rounded half to even, as the published scores are.

        Raises:
            ValueError: another shape or dtype, an empty image, or float values outside [0, 1].
        """
        _check(image)
        pixels = image if image.ndim == 3 else image[..., None]
        alpha = pixels.shape[-1] in (2, 4)
        colour = pixels[..., :-1] if alpha else pixels
        restored = self._restore(to_float(colour))
        out = np.empty_like(pixels)
        out[..., : colour.shape[-1]] = quantize(restored, pixels.dtype)
        if alpha:
            out[..., -1] = pixels[..., -1]
        return out.reshape(image.shape)

    def tiles(self, height: int, width: int) -> int:
        """How many tiles an image of this size (px) takes; 1 for a whole image."""
        return len(self._plan(height, width)) or 1

    def _plan(self, height: int, width: int) -> list[Tile]:
        """The tiles, or none when the image goes through at once."""
        if self.recipe.tile is None or max(height, width) <= self.recipe.tile:
            return []
        stride = self.network.config.stride
        return plan_tiles(height, width, tile_px=self.recipe.tile, halo_px=self.recipe.halo, stride=stride)

    def _restore(self, colour: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(H, W, 1 or 3) float32 to the same, not clamped."""
        channels = self.network.config.image_channels
        grey = colour.shape[-1] == 1 and channels == 3
        if grey:
            colour = np.repeat(colour, 3, axis=-1)
        if colour.shape[-1] != channels:
            raise ValueError(f"the network takes {channels} channels, the image has {colour.shape[-1]}")
        plan = self._plan(*colour.shape[:2])
        restored = restore_tiles(colour, plan, self._run) if plan else self._run(colour)
        if grey:
            restored = restored.mean(axis=-1, keepdims=True)
        return restored

    def _run(self, piece: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        # (1, H, W, C) memory seen as (1, C, H, W): channels-last, copied only where torch cannot read it (read-only).
        tensor = torch.from_numpy(np.require(piece, requirements=["C", "W"]))[None].permute(0, 3, 1, 2).to(self.device)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=self.recipe.tf32):
            restored = self.network(tensor)[0].permute(1, 2, 0).float()
        return cast(npt.NDArray[np.float32], restored.cpu().numpy())


def memory_bytes(config: NetConfig, pixels: int, *, precision: Precision = "float32") -> int:
    """Peak memory in bytes of a CPU process that restores `pixels` at once: libraries, weights, the widest moment.

    At full resolution a block holds at worst the skip connection, its input, the two outputs of dw_expand times `width`
    channels around the depthwise convolution, and one output of its activation.
    """
    number = _DTYPES[precision].itemsize
    live = 3 + 2 * config.dw_expand
    with torch.device("meta"):
        weights = parameters(Network(config))
    return _LIBRARIES_BYTES + weights * number + live * config.width * pixels * number


def _check(image: Pixels) -> None:
    if image.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(f"image must be uint8, uint16 or float32, got {image.dtype}")
    if image.ndim not in (2, 3) or image.size == 0 or (image.ndim == 3 and not 1 <= image.shape[-1] <= 4):
        raise ValueError(f"image must be (H, W) or (H, W, 1 to 4) and not empty, got {image.shape}")
    if image.dtype == np.float32:
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise ValueError(f"float images must lie in [0, 1], got [{low:g}, {high:g}]: divide by their range first")


def to_float(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Integers of their full range, or floats as they are, as float32 in [0, 1]: what the network takes."""
    values = pixels.astype(np.float32, copy=False)
    return values if pixels.dtype == np.float32 else values / np.float32(data_range_of(pixels.dtype))
