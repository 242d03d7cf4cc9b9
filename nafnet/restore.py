"""One image in, one image out: everything between pixels of a file and the network."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Condition, Lock
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nafnet import catalog, checkpoint
from nafnet.device import DeviceNetwork
from nafnet.memory import DTYPES, available_bytes, is_out_of_memory, make_room, process_bytes, rungs
from nafnet.metrics import data_range_of, quantize
from nafnet.model import Network, parameters
from nafnet.pointwise import has_onednn
from nafnet.recipe import Precision, Recipe, Step, Tile
from nafnet.tiling import Tile as Piece
from nafnet.tiling import least_tile, plan_tiles, restore_tiles
from nafnet.tlc import localize, windows

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.float32]
Floats = npt.NDArray[np.float32]

# Low precision is given up when on a crop of the first image it agrees with float32 by less than this. An error 50 dB
# below full range takes 0.02 dB from an image that is restored to 27 dB, and 0.09 dB at 33 dB.
AGREEMENT_DB = 50.0
_CROP_PX = 256
# A result that differs from its input by more than this (root mean square, of full range) is not a restoration of it:
# the strongest noise that networks are trained on (sigma 50 of 255) is 0.2.
SUSPECT_RMS = 0.25
_BAND_VALUES = 2**22  # converted at once between integers and floats
BATCH_PIXELS = 2**22  # in one pass through the network on a GPU: enough to fill one
CPU_BATCH_PIXELS = 2**16  # with more, calling torch for each image is no longer what takes the time
_SIDES = (-3, -2)  # the axes of height and width


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """A restored image, and what it took.

    Attributes:
        pixels: of the input's shape and dtype.
        tile: side of the tiles in px, None when the image went through whole.
        tiles: how many there were; 1 for a whole image.
        precision: of the networks that made it, after any fallback.
        suspect: why the result was given up and `pixels` is the input; None for a restored image.
        note: what went otherwise than asked (a fallback, memory that ran out); None for nothing.
    """

    pixels: Pixels
    tile: int | None
    tiles: int
    precision: Precision
    suspect: str | None = None
    note: str | None = None


class Restorer:
    """Networks ready to restore images on one device."""

    def __init__(
        self, networks: Sequence[Network], recipe: Recipe, *, device: str = "cpu", memory: int | None = None
    ) -> None:
        """Take over `networks` (float32, eval mode), one for each step of the recipe: they are localized in place.

        `memory` is what this process may use, in bytes (of the GPU's memory on a GPU); None for all that is there.

        Raises:
            ValueError: the tile is no larger than a TLC window, which would silently turn TLC off, or keeps nothing.
        """
        if len(networks) != len(recipe.steps):
            raise ValueError(f"{len(recipe.steps)} networks needed, got {len(networks)}")
        self.configs = tuple(network.config for network in networks)
        self.recipe = recipe
        self.device = device
        self.memory = available_bytes(device) if memory is None else memory
        self._size = 0, 0, 0  # of the last images: how many, height and width
        self._planned = 0  # for the largest so far
        self._under_way = 0  # images
        self._counting = Lock()
        self._stride = max(config.stride for config in self.configs)
        window = max(
            windows(config, step.train_size)[0] if step.train_size is not None else 0
            for config, step in zip(self.configs, recipe.steps, strict=True)
        )
        self.least_tile = max(least_tile(recipe.halo, self._stride), window + self._stride)
        if isinstance(recipe.tile, int):
            plan_tiles(1, 1, tile_px=recipe.tile, halo_px=recipe.halo, stride=self._stride)
            if recipe.tile < self.least_tile:
                raise ValueError(
                    f"tile {recipe.tile} px must exceed the TLC window of {window} px by {self._stride} px or more: "
                    "in a smaller tile the local means would silently become global ones"
                )
        for network, step in zip(networks, recipe.steps, strict=True):
            if step.train_size is not None:
                localize(network, step.train_size)
        self._fallback: str | None = None  # why low precision was given up, for all images
        precisions: set[Precision] = {recipe.precision, "float32"}  # which is for the comparison and the fallback
        if device == "cpu" and not has_arithmetic(recipe.precision):
            self._fallback = f"this CPU has no {recipe.precision} arithmetic, and would be slow in it: float32 instead"
            precisions = {"float32"}
        self._proven = len(precisions) == 1
        self._proving = Lock()
        self._networks = {name: [self._ready(network, name) for network in networks] for name in precisions}

    @classmethod
    def load(
        cls,
        *weights: str | Path,
        tlc: bool | None = None,
        train_size: int | None = None,
        precision: Precision = "float32",
        tile: Tile = "auto",
        halo: int = 192,
        strength: float = 1.0,
        self_ensemble: bool = False,
        guard: bool = True,
        deterministic: bool = False,
        tf32: bool = False,
        output: str = "same",
        quality: int | None = None,
        subsampling: str | None = None,
        device: str = "cpu",
        memory: int | None = None,
    ) -> "Restorer":
        """Load checkpoints, each a path or the name of the bundled one ("demo"); several run one after the other.

        `tlc` and `train_size` left out are what the catalog, then the file, says; else TLC is on for crops of 256.
        The other keywords are `Recipe`'s fields; `device` is torch's name for it, `memory` as in the constructor.

        Raises:
            nafnet.checkpoint.CheckpointError: the file is no network of this family, or damaged.
            FileNotFoundError, ValueError: no such file; an impossible recipe.
        """
        loaded = [_load(name) for name in weights]
        recipe = Recipe(
            steps=tuple(settle(found, tlc=tlc, train_size=train_size) for found in loaded),
            precision=precision,
            tile=tile,
            halo=halo,
            strength=strength,
            self_ensemble=self_ensemble,
            guard=guard,
            deterministic=deterministic,
            tf32=tf32,
            output=output,
            quality=quality,
            subsampling=subsampling,
        )
        return cls([found.network for found in loaded], recipe, device=device, memory=memory)

    def __call__(self, image: Pixels) -> Pixels:
        """The pixels of `restore(image)`."""
        return self.restore(image).pixels

    def restore(self, image: Pixels) -> Restored:
        """Restore (H, W) or (H, W, C), uint8, uint16 or float32 in [0, 1]; the same shape and kind out.

        C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA). Alpha passes through. Grey enters an RGB network as three
        equal channels, whose results are averaged. Integers are rounded half to even, as the published scores are.
        When memory runs out the whole image is tried again in smaller tiles, never in tiles of several sizes.

        Raises:
            ValueError: another shape or dtype, an empty image, float values outside [0, 1], or, without the guard,
                a result that is not finite.
            MemoryError: even the smallest tile does not fit, or the recipe is deterministic and its tile does not.
        """
        colour = self._colour(image)
        height, width = image.shape[:2]
        with self._room(height, width):
            doubt = self._doubt(colour)  # first, since float32 may need smaller tiles
            memory: str | None = None
            for tile in self._rungs(height, width):
                try:
                    with self._settings():
                        values, precision, reason = self._attempt(colour, tile, doubt)
                    break
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    memory = f"out of memory {'with tiles of ' + str(tile) + ' px' if tile else 'as a whole'}"
                self._release()
            else:
                raise MemoryError(f"{memory}: give the actor more memory, or set a smaller tile")
            return self._conclude(image, values, tile, precision, "; ".join(filter(None, (memory, reason))) or None)

    def batch(self, height: int, width: int) -> int:
        """How many images of this size (px) `restore_batch` takes through the network at once."""
        if self.recipe.deterministic or self.tile(height, width) is not None:
            return 1  # bits must not hang on an image's company; tiles are large enough
        fixed = self.process_bytes(0, 0, None)
        fits = (self.memory - fixed) // max(1, self.process_bytes(height, width, None) - fixed)
        most = CPU_BATCH_PIXELS if self.device == "cpu" else BATCH_PIXELS
        return max(1, min(fits, most // (height * width)))

    def restore_batch(self, images: Sequence[Pixels]) -> list[Restored]:
        """`restore` for images of one shape and dtype, `batch` of them at once; the same values, to rounding.

        Raises:
            ValueError, MemoryError: as `restore` does, for any of them.
        """
        most = self.batch(*images[0].shape[:2])
        chunks = [images[start : start + most] for start in range(0, len(images), most)]
        return [restored for chunk in chunks for restored in self._restore_together(chunk)]

    def _restore_together(self, images: Sequence[Pixels]) -> list[Restored]:
        """In one pass through the network; in halves, down to single images, where memory runs out."""
        if len(images) == 1:
            return [self.restore(images[0])]
        colours = cast(Pixels, np.stack([self._colour(image) for image in images]))
        count, height, width, _ = colours.shape
        doubt = self._doubt(colours[0])
        try:
            with self._room(height, width, count), self._settings():
                values, precision, reason = self._attempt(colours, None, doubt)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return [self._conclude(*one, None, precision, reason) for one in zip(images, values, strict=True)]
        self._release()
        half = len(images) // 2
        return self._restore_together(images[:half]) + self._restore_together(images[half:])

    def tile(self, height: int, width: int) -> int | None:
        """The side of the tiles that an image of this size (px) is first tried in; None for the whole image."""
        return self._rungs(height, width)[0]

    def tiles(self, height: int, width: int) -> int:
        """How many tiles an image of this size (px) takes; 1 for a whole image."""
        return len(self._plan(height, width, self.tile(height, width))) or 1

    def process_bytes(self, height: int, width: int, tile: int | None) -> int:
        """The planned peak of this process for an image of this size (px) in tiles of `tile` px (None: whole)."""
        precision: Precision = "float32" if self._fallback else self.recipe.precision
        return process_bytes(
            self.configs,
            height,
            width,
            tile=tile,
            precision=precision,
            device=self.device,
            self_ensemble=self.recipe.self_ensemble,
        )

    def describe(self) -> str:
        """The networks, and the TLC windows of each level, in a few lines."""
        lines = []
        for config, step in zip(self.configs, self.recipe.steps, strict=True):
            with torch.device("meta"):
                count = parameters(Network(config))
            lines.append(f"{config.family}, width {config.width}, {count:,} parameters, weights {step.weights[:12]}")
            if step.train_size is None:
                lines.append("  attention over the whole image")
                continue
            lines.append(f"  TLC for training crops of {step.train_size} px")
            for level, side in enumerate(windows(config, step.train_size)):
                at = "full resolution" if level == 0 else f"1/{2**level} of it"
                lines.append(f"  level {level} ({at}): window {side} x {side} px")
        return "\n".join(lines)

    def _ready(self, network: Network, precision: Precision) -> Callable[[Tensor], Tensor]:
        """([N,] H, W, C) float32 in the CPU's memory to the same."""
        if self.device == "cpu":
            from nafnet.strips import StripNetwork  # noqa: PLC0415 - a compiler, 120 MB that only a CPU's actors need

            return StripNetwork(network, DTYPES[precision])
        return DeviceNetwork(network, DTYPES[precision], self.device)

    def _rungs(self, height: int, width: int) -> list[int | None]:
        """Tile sides (None: whole) in the order they are tried."""
        recipe = self.recipe
        fixed = recipe.tile if isinstance(recipe.tile, int) else None
        first = fixed if fixed is not None and max(height, width) > fixed else None
        ladder = rungs(height, width, least=self.least_tile, first=first)
        if recipe.deterministic:
            return ladder[:1]
        if recipe.tile == "auto":
            while len(ladder) > 1 and self.process_bytes(height, width, ladder[0]) > self.memory:
                ladder = ladder[1:]
        return ladder

    @contextmanager
    def _room(self, height: int, width: int, count: int = 1) -> Iterator[None]:
        """Of images that are restored meanwhile. Those of one size fit where the last were: fresh memory is slower."""
        planned = self.process_bytes(height, width, self.tile(height, width))
        planned += (count - 1) * (planned - self.process_bytes(0, 0, None))
        size = count, height, width
        with self._counting:
            self._under_way += 1
            at_once, fits = self._under_way, size == self._size
            self._size, self._planned = size, max(self._planned, planned)
        try:
            if self.device == "cpu" and not fits:
                make_room(planned, self._planned, at_once)
            yield
        finally:
            with self._counting:
                self._under_way -= 1

    def _plan(self, height: int, width: int, tile: int | None) -> list[Piece]:
        """The tiles, or none when the image goes through at once."""
        if tile is None:
            return []
        return plan_tiles(height, width, tile_px=tile, halo_px=self.recipe.halo, stride=self._stride)

    def _attempt(self, colour: Pixels, tile: int | None, doubt: str | None) -> tuple[Floats, Precision, str | None]:
        """All steps in one tile size; also the precision that did it and why it is not the recipe's."""
        precision = self.recipe.precision
        if doubt is None:
            values = self._chain(colour, tile, precision)
            if precision == "float32" or np.isfinite(values).all():
                return values, precision, None
            del values  # makes room for those that follow
            doubt = f"{precision} gave values that are not finite: float32 instead"
            if not self.recipe.deterministic:
                self._fallback = doubt
        return self._chain(colour, tile, "float32"), "float32", doubt

    def _colour(self, image: Pixels) -> Pixels:
        """(H, W, 1 or 3) of an image, without its alpha. Raises ValueError as `restore` says."""
        _check(image)
        pixels = image if image.ndim == 3 else image[..., None]
        colours = pixels.shape[-1] - (pixels.shape[-1] in (2, 4))
        for config in self.configs:
            if colours not in (config.image_channels, 1):
                raise ValueError(f"the network takes {config.image_channels} channels, the image has {colours}")
        return pixels[..., :colours]

    def _release(self) -> None:
        """Give back what an attempt that ran out of memory has left."""
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _doubt(self, colour: Pixels) -> str | None:
        """Why an image is restored in float32 instead of the recipe's precision; None when it is not.

        The first image settles it for all, or each for itself where the recipe is deterministic: its bits must not hang
        on which came before.
        """
        if self.recipe.deterministic:
            return self._fallback if self._proven else self._compare(colour)
        with self._proving:
            if not self._proven:
                self._fallback, self._proven = self._compare(colour), True
        return self._fallback

    def _compare(self, colour: Pixels) -> str | None:
        """Why the recipe's precision will not do; None when it agrees with float32 on the centre of an image."""
        top, left = (max(side - _CROP_PX, 0) // 2 for side in colour.shape[:2])
        crop = colour[top : top + _CROP_PX, left : left + _CROP_PX]
        with self._settings():
            exact, close = self._chain(crop, None, "float32"), self._chain(crop, None, self.recipe.precision)
        with np.errstate(invalid="ignore"):  # infinite both: NaN, which disagrees
            error = float(np.square(close - exact, dtype=np.float64).mean())
        if error <= 10 ** (-AGREEMENT_DB / 10):
            return None
        agreement = f"{-10 * np.log10(error):.1f} dB" if np.isfinite(error) else "no finite value"
        return (
            f"{self.recipe.precision} agrees with float32 by {agreement} on a crop, {AGREEMENT_DB:g} dB are "
            "asked for: float32 instead"
        )

    def _chain(self, colour: Pixels, tile: int | None, precision: Precision) -> Floats:
        """Every step on ([N,] H, W, 1 or 3), as float32, not clamped. Tiles are of one image."""
        image: Pixels = colour
        for config, network in zip(self.configs, self._networks[precision], strict=True):
            if image is not colour:
                np.clip(image, 0, 1, out=image)
            whole = partial(_apply, network, config.image_channels)
            image = self._ensemble(image, tile, whole) if self.recipe.self_ensemble else self._tiled(image, tile, whole)
        return cast(Floats, image)

    def _ensemble(self, image: Pixels, tile: int | None, restore: Callable[[Pixels], Floats]) -> Floats:
        total = np.zeros(image.shape, np.float32)
        for mirrored in (False, True):
            for turns in range(4):
                turned = np.rot90(image[..., ::-1, :] if mirrored else image, turns, _SIDES)
                back = np.rot90(self._tiled(turned, tile, restore), -turns, _SIDES)
                total += back[..., ::-1, :] if mirrored else back
        total /= 8
        return total

    def _tiled(self, image: Pixels, tile: int | None, restore: Callable[[Pixels], Floats]) -> Floats:
        plan = self._plan(image.shape[0], image.shape[1], tile)
        return restore_tiles(image, plan, restore) if plan else restore(image)

    def _conclude(
        self, image: Pixels, values: Floats, tile: int | None, precision: Precision, note: str | None
    ) -> Restored:
        """The image with its colours as the network made them, in its own dtype, its alpha as it was."""
        pixels = image if image.ndim == 3 else image[..., None]
        colours = values.shape[-1]
        out = np.empty_like(pixels)
        out[..., colours:] = pixels[..., colours:]
        suspect = self._blend(pixels[..., :colours], values, out[..., :colours])
        return Restored(
            pixels=out.reshape(image.shape),
            tile=tile,
            tiles=len(self._plan(image.shape[0], image.shape[1], tile)) or 1,
            precision=precision,
            suspect=suspect,
            note=note,
        )

    def _blend(self, colour: Pixels, values: Floats, out: Pixels) -> str | None:
        """Write the result, or the input and a reason when the guard gives the result up."""
        square, wrong = 0.0, 0
        rows = max(1, _BAND_VALUES // (colour.shape[1] * colour.shape[2]))
        bands = [slice(top, top + rows) for top in range(0, len(colour), rows)]
        for band in bands:
            source, made = to_float(colour[band]), values[band]
            change = made - source
            if self.recipe.guard:
                finite = np.isfinite(change)
                wrong += change.size - int(np.count_nonzero(finite))
                square += float(np.square(change, dtype=np.float64).sum(where=finite))
                made = np.where(finite, made, 0)
            if self.recipe.strength < 1:
                made = source + np.float32(self.recipe.strength) * change
                made = np.where(np.isfinite(made), made, 0) if self.recipe.guard else made
            out[band] = quantize(made, out.dtype)
        distance = float(np.sqrt(square / colour.size))
        if not self.recipe.guard or (not wrong and distance <= SUSPECT_RMS):
            return None
        out[...] = colour
        if wrong:
            return f"{wrong} of {colour.size} restored values are not finite; the input was written instead"
        return (
            f"the result is {distance:.2f} of full range from its input (root mean square), over {SUSPECT_RMS:g}: "
            "these weights may be for another kind of image; the input was written instead"
        )

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """torch as the recipe wants it, for the time of one image."""
        deterministic, on_cpu = self.recipe.deterministic, self.device == "cpu"
        with ExitStack() as settings:
            if deterministic or not on_cpu:
                settings.enter_context(_switches.set(deterministic=deterministic, tf32=self.recipe.tf32))
            if deterministic and on_cpu:
                settings.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(1)  # of this thread of Python only
            yield


class _Switches:
    """torch's switches of a whole process. Images that want the same share them; others wait for those to end."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._users = 0
        self._wanted: tuple[bool, bool] | None = None
        self._before = ExitStack()

    @contextmanager
    def set(self, *, deterministic: bool, tf32: bool) -> Iterator[None]:
        """Turn them for the time of the context."""
        wanted = deterministic, tf32
        with self._changed:
            self._changed.wait_for(lambda: not self._users or self._wanted == wanted)
            if not self._users:
                self._wanted = wanted
                self._turn(deterministic, tf32)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if not self._users:
                    self._before.close()
                    self._changed.notify_all()

    def _turn(self, deterministic: bool, tf32: bool) -> None:
        self._before.enter_context(
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=deterministic, allow_tf32=tf32)
        )
        self._before.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(deterministic)


_switches = _Switches()


def has_arithmetic(precision: Precision) -> bool:
    """Whether this machine's CPU computes in `precision`; where it does not, torch converts number by number."""
    return precision == "float32" or has_onednn(DTYPES[precision])


def _apply(network: Callable[[Tensor], Tensor], channels: int, piece: Pixels) -> Floats:
    """One network on ([N,] H, W, 1 or channels); grey is spread over the channels and gathered again."""
    grey = piece.shape[-1] == 1 and channels > 1
    values = to_float(piece)
    if grey:
        values = np.repeat(values, channels, axis=-1)
    # torch cannot read what is read-only or runs backwards: only those are copied
    values = np.require(values, requirements=["C", "W"])
    restored = network(torch.from_numpy(values)).numpy()
    return restored.mean(axis=-1, keepdims=True) if grey else cast(Floats, restored)


def _load(weights: str | Path) -> checkpoint.Checkpoint:
    named = catalog.CATALOG.get(str(weights))
    path = named.bundled_path() if named else None
    if named and path is None and not Path(weights).exists():
        raise FileNotFoundError(f"{named.name} is not bundled: fetch {named.file} and give its path here")
    return checkpoint.load(path or weights, expected_sha256=named.sha256 if named and path else None)


def settle(loaded: checkpoint.Checkpoint, *, tlc: bool | None, train_size: int | None) -> Step:
    """A recipe's step with these weights: None means what the catalog, then the file, says; else TLC for 256 px."""
    entry = catalog.find_hash(loaded.sha256)
    if tlc is None:
        tlc = entry.tlc if entry else True
    if train_size is None:
        train_size = loaded.train_size or (entry.train_size if entry else 256)
    return Step(loaded.sha256, tlc, train_size)


def _check(image: Pixels) -> None:
    if image.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(f"image must be uint8, uint16 or float32, got {image.dtype}")
    if image.ndim not in (2, 3) or image.size == 0 or (image.ndim == 3 and not 1 <= image.shape[-1] <= 4):
        raise ValueError(f"image must be (H, W) or (H, W, 1 to 4) and not empty, got {image.shape}")
    if image.dtype == np.float32:
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise ValueError(f"float images must lie in [0, 1], got [{low:g}, {high:g}]: divide by their range first")


def to_float(pixels: Pixels) -> Floats:
    """Integers of their full range, or floats as they are, as float32 in [0, 1]: what the network takes."""
    values = pixels.astype(np.float32, copy=False)
    return values if pixels.dtype == np.float32 else values / np.float32(data_range_of(pixels.dtype))
