"""The paper's training recipe on procedural scenes, for denoisers of unknown strength, on any device.

AdamW with betas .9/.9 and no warm-up, cosine decay, PSNR loss, gradient norm clipped at .01, blocks that start as the
identity, crops flipped and rotated (paper section 5.1 and the authors' released configs). Every batch is a function
of (seed, step), so an interrupted training goes on exactly where it was.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nafnet import checkpoint
from nafnet.degrade import gaussian_noise, scene
from nafnet.model import NetConfig, Network

_VALIDATION_SCENES = 12
_VALIDATION_SIGMA = 25.0  # of 255, as the published denoising tables use


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """All that decides the weights.

    Attributes:
        network: the shape to train.
        sigma: noise is drawn uniformly between these two standard deviations (of 255) for each crop.
        steps, batch, crop_px: optimiser steps, crops a step, side of a crop (the TLC window follows from it).
        learning_rate, final_learning_rate: ends of the cosine.
        weight_decay, clip: AdamW's decay, and the largest gradient norm.
        scenes, scene_px: how many procedural pictures, of which side.
        precision: "bf16" runs the network under autocast; weights and optimiser stay float32.
    """

    network: NetConfig = field(default_factory=NetConfig)
    sigma: tuple[float, float] = (5.0, 50.0)
    steps: int = 8000
    batch: int = 16
    crop_px: int = 96
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-7
    weight_decay: float = 1e-3
    clip: float = 0.01
    scenes: int = 800
    scene_px: int = 384
    precision: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError naming every field that cannot be."""
        problems = []
        if self.crop_px % self.network.stride or not 0 < self.crop_px <= self.scene_px:
            problems.append(f"crop_px must be a multiple of {self.network.stride} and at most {self.scene_px}")
        if not 0 <= self.sigma[0] <= self.sigma[1]:
            problems.append(f"sigma must go from low to high, got {self.sigma}")
        if min(self.steps, self.batch, self.scenes) < 1:
            problems.append("steps, batch and scenes must be at least 1")
        if self.precision not in {"float32", "bf16"}:
            problems.append(f"precision is float32 or bf16, got {self.precision!r}")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands. PSNR in dB; `validation_psnr` is on scenes never trained on, sigma 25."""

    step: int
    steps: int
    loss: float
    psnr: float
    validation_psnr: float | None
    seconds: float  # of this process
    seconds_left: float


def train(
    recipe: TrainRecipe,
    out: str | Path,
    *,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda _: None,
    report_every: int = 50,
    save_every: int = 500,
) -> Path:
    """Train and write `out` (safetensors) with `out`.history.jsonl and `out`.png (the curves) beside it.

    Until it is done, `out`.state holds what a later call with the same recipe goes on from.

    Raises:
        ValueError: the state beside `out` belongs to another recipe.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    network = Network(recipe.network).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.9), weight_decay=recipe.weight_decay
    )
    state_path = out.with_suffix(".state")
    first, history = _resume(state_path, recipe, network, optimizer)
    pool = _draw(range(recipe.scenes), recipe)
    held_out = _draw(range(10**6, 10**6 + _VALIDATION_SCENES), recipe)
    started, losses = time.monotonic(), list[float]()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = _cosine(step, recipe)
        degraded, clean = (t.to(device) for t in batch(pool, recipe, step))
        with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            restored = network(degraded)
        loss = psnr_loss(restored.float(), clean)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        done = step + 1
        last = done == recipe.steps
        if done % report_every == 0 or last:
            validation = _validate(network, held_out, device) if done % save_every == 0 or last else None
            seconds = time.monotonic() - started
            mean = sum(losses) / len(losses)
            left = seconds / (done - first) * (recipe.steps - done)
            progress = Progress(done, recipe.steps, mean, -mean, validation, seconds, left)
            history.append(asdict(progress))
            report(progress)
            losses.clear()
        if done % save_every == 0 and not last:
            _save_state(state_path, recipe, network, optimizer, done, history)
    metadata = {
        "recipe": json.dumps(asdict(recipe)),
        "train_size": str(recipe.crop_px),
        "data": "procedural scenes",
    }
    checkpoint.save(out, network, metadata)
    out.with_suffix(".history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    plot(history, out.with_suffix(".png"))
    state_path.unlink(missing_ok=True)
    return out


def psnr_loss(restored: Tensor, clean: Tensor) -> Tensor:
    """Minus the mean PSNR in dB of a batch (N, C, H, W) in [0, 1]: 10/ln 10 times the mean of ln(mse + 1e-8)."""
    mse = (restored - clean).square().mean(dim=(1, 2, 3))
    return 10 / math.log(10) * torch.log(mse + 1e-8).mean()


def batch(pool: npt.NDArray[np.uint8], recipe: TrainRecipe, step: int) -> tuple[Tensor, Tensor]:
    """The degraded and clean crops of one step, each (batch, 3, crop_px, crop_px) float32 in [0, 1].

    Noise is clipped to [0, 1], as a stored picture is.
    """
    rng = np.random.default_rng([recipe.seed, step])
    crops = np.empty((recipe.batch, recipe.crop_px, recipe.crop_px, 3), np.float32)
    noisy = np.empty_like(crops)
    for i in range(recipe.batch):
        top, left = rng.integers(0, recipe.scene_px - recipe.crop_px + 1, 2)
        crop = pool[rng.integers(len(pool)), top : top + recipe.crop_px, left : left + recipe.crop_px]
        crop = np.rot90(crop, int(rng.integers(4)))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        crops[i] = crop.astype(np.float32) / 255
        noisy[i] = np.clip(gaussian_noise(crops[i], rng.uniform(*recipe.sigma) / 255, rng), 0, 1)
    # (N, H, W, C) seen as (N, C, H, W) is channels-last memory already.
    return torch.from_numpy(noisy).permute(0, 3, 1, 2), torch.from_numpy(crops).permute(0, 3, 1, 2)


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Draw loss and PSNR against steps as a PNG."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["step"] for row in history], [row["loss"] for row in history])
    left.set(xlabel="step", ylabel="PSNR loss (dB)", title="training loss, noise of random strength")
    checked = [row for row in history if row["validation_psnr"] is not None]
    right.plot([row["step"] for row in checked], [row["validation_psnr"] for row in checked], marker="o")
    right.set(xlabel="step", ylabel="PSNR (dB)", title=f"held-out scenes, sigma {_VALIDATION_SIGMA:g}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _draw(seeds: range, recipe: TrainRecipe) -> npt.NDArray[np.uint8]:
    """Scenes of these seeds, (n, scene_px, scene_px, 3), drawn by one process a core."""
    # Torch has started threads by now, which a forked process would hang on.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        drawn: Iterator[npt.NDArray[np.uint8]] = workers.map(
            partial(scene, size_px=recipe.scene_px), (recipe.seed * 10**7 + s for s in seeds), chunksize=8
        )
        return np.stack(list(drawn))


def _cosine(step: int, recipe: TrainRecipe) -> float:
    low, high = recipe.final_learning_rate, recipe.learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * step / recipe.steps)) / 2


def _validate(network: Network, scenes: npt.NDArray[np.uint8], device: str) -> float:
    """Mean PSNR (dB) over whole scenes with noise of sigma 25, always the same noise, in float32."""
    network.eval()
    values = []
    for i, picture in enumerate(scenes):
        clean = picture.astype(np.float32) / 255
        noisy = np.clip(gaussian_noise(clean, _VALIDATION_SIGMA / 255, np.random.default_rng(i)), 0, 1)
        tensor = torch.from_numpy(noisy).permute(2, 0, 1)[None].to(device)
        with torch.inference_mode():
            restored = network(tensor)[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        values.append(-10 * math.log10(float(np.square(restored.astype(np.float64) - clean).mean())))
    network.train()
    return sum(values) / len(values)


def _save_state(
    path: Path,
    recipe: TrainRecipe,
    network: Network,
    optimizer: torch.optim.Optimizer,
    step: int,
    history: list[dict[str, float]],
) -> None:
    part = path.with_suffix(".state.part")
    state = {
        "recipe": json.dumps(asdict(recipe)),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "history": history,
    }
    torch.save(state, part)
    part.replace(path)


def _resume(
    path: Path, recipe: TrainRecipe, network: Network, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != json.dumps(asdict(recipe)):
        raise ValueError(f"{path} is of another recipe: delete it to start anew, or train to another file")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), list(state["history"])
