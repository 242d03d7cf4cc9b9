"""All that decides the pixels of a restored image, as one frozen value with a hash."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Precision = Literal["float32", "bf16", "float16"]
Tile = int | Literal["auto", "whole"]

_PIXELS_REVISION = 2  # raised when a change to this package changes restored pixels beyond rounding


@dataclass(frozen=True, slots=True)
class Step:
    """One network of a chain.

    Attributes:
        weights: SHA-256 of the checkpoint file.
        tlc: local attention windows (see `nafnet.tlc`) instead of global means.
        train_size: side of the training crops in px, which fixes the windows; None without TLC.
    """

    weights: str
    tlc: bool = True
    train_size: int | None = 256

    def __post_init__(self) -> None:
        """Drop a train_size without effect; ValueError for TLC without one."""
        if self.tlc and (self.train_size is None or self.train_size < 1):
            raise ValueError(f"TLC needs the side of the training crops: train_size is {self.train_size}")
        if not self.tlc:
            object.__setattr__(self, "train_size", None)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the pixels, and nothing else: equal recipes restore an image equally, on any machine.

    Where memory is short an image may take smaller tiles than on another machine (`tile="auto"`, or after running out
    of memory), and low precision may fall back to float32: the image's row says so.

    Attributes:
        steps: the networks, each restoring what the one before it made.
        precision: dtype of the networks; the image itself stays float32.
        tile: side of the tiles in px, "whole" for no tiles, or "auto": whole if it fits into memory, else the largest
            tile that does.
        halo: px around a tile that are restored and thrown away; 0 when tiles are never used.
        strength: share of the restored image in the result, the rest being the input; above 0 and up to 1.
        self_ensemble: the mean over the eight flips and rotations of the image.
        guard: a result that is not finite, or is implausibly far from its input, is given up for the input.
        deterministic: the same bits however the work is spread; one thread on a CPU, deterministic kernels on a GPU.
        tf32: on NVIDIA GPUs, let float32 convolutions round their inputs to 10 bits.
        output: file format, "same" for that of the source.
        quality, subsampling: of a lossy output format; None for its default.
    """

    steps: tuple[Step, ...]
    precision: Precision = "float32"
    tile: Tile = "auto"
    halo: int = 192
    strength: float = 1.0
    self_ensemble: bool = False
    guard: bool = True
    deterministic: bool = False
    tf32: bool = False
    output: str = "same"
    quality: int | None = None
    subsampling: str | None = None

    def __post_init__(self) -> None:
        """Drop what has no effect, so that recipes that act alike hash alike; ValueError for impossible ones."""
        object.__setattr__(self, "strength", float(self.strength))  # 1 and 1.0 would hash differently
        if not self.steps:
            raise ValueError("a recipe needs at least one checkpoint")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        if isinstance(self.tile, str) and self.tile not in ("auto", "whole"):
            raise ValueError(f"tile must be a number of px, 'auto' or 'whole', got {self.tile!r}")
        if self.halo < 0:
            raise ValueError(f"halo is a number of px, got {self.halo}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}")
        if self.deterministic and self.tile == "auto":
            raise ValueError(
                "a deterministic recipe cannot leave the tile to the memory at hand: set tile to a number of px or to "
                "'whole'"
            )
        if self.tile == "whole" and self.deterministic:
            object.__setattr__(self, "halo", 0)

    @property
    def weights(self) -> str:
        """The SHA-256 of each checkpoint, in order, with '+' between them."""
        return "+".join(step.weights for step in self.steps)

    @property
    def hash(self) -> str:
        """16 hex digits that differ when any field, or the meaning of the fields, differs."""
        content = json.dumps({"revision": _PIXELS_REVISION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]
