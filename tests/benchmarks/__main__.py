"""`make bench`: what takes how long on this machine, as ratios to a plain implementation, in one run.

Ours and the baseline take turns, so that a machine whose speed drifts slows both. Each figure is a median.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import skimage.transform
import torch
from PIL import Image
from skimage.restoration import denoise_nl_means, estimate_sigma

from nafnet.conventions import Convention
from nafnet.images import Picture, decode, encode
from nafnet.metrics import psnr, score
from nafnet.model import NetConfig, Network
from nafnet.restore import Restorer
from nafnet.tlc import localize
from pipelines.demo import make_photos, photographs
from tests.benchmarks import plain
from tests.nafnet.reference import randomize

HEIGHT, WIDTH = 720, 1280


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="times each figure is taken")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where to save the table")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    rows = [*network_rows(options.runs), *picture_rows(options.runs)]
    print(f"{'what':<58} {'ours':>9} {'baseline':>9} {'ratio':>6}")
    for row in rows:
        print(f"{row['what']:<58} {row['ours']:>7.3f} s {row['baseline']:>7.3f} s {row['ratio']:>6.2f}")
    gains = photograph_gains()
    for name, gain in gains.items():
        print(f"mean PSNR gain on six photographs, noise of sigma 25, {name}: {gain:.2f} dB")
    options.json.write_text(json.dumps({"machine": platform.platform(), "rows": rows, "gains_db": gains}, indent=2))
    print(f"saved as {options.json}")


def network_rows(runs: int) -> list[dict[str, object]]:
    """Width 32, GoPro layout, 1280x720, one image at a time, all cores."""
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    nafnet, baseline = NetConfig(), NetConfig(activation="gelu", attention="ca", dw_expand=1)
    rows = []
    for name, config in (("NAFNet", nafnet), ("Baseline", baseline)):
        network = randomize(Network(config))
        plainly = lambda net=network: plain.run(net, image, train_size=256)  # noqa: E731
        global_pool, local_pool = ready(network, None), ready(network, 256)
        difference = float((local_pool(image) - plainly()).abs().max())
        what = f"{name} width 32, float32, TLC (differs by {difference:.0e})"
        rows.append(measure(what, lambda run=local_pool: run(image), plainly, runs))
        what = f"{name} width 32, float32: TLC against global pooling"
        rows.append(measure(what, lambda run=local_pool: run(image), lambda run=global_pool: run(image), runs))
        if name == "NAFNet":
            half = ready(network, 256, torch.bfloat16)
            rows.append(measure(f"{name} width 32, bf16, TLC", lambda run=half: run(image), plainly, runs))
    return rows


def ready(network: Network, train_size: int | None, dtype: torch.dtype = torch.float32) -> Callable[..., torch.Tensor]:
    """The network as `nafnet.Restorer` runs it."""
    copy = Network(network.config)
    copy.load_state_dict(network.state_dict())
    if train_size is not None:
        localize(copy, train_size)
    copy.eval().to(dtype).to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda image: copy(image.contiguous(memory_format=torch.channels_last)))


def picture_rows(runs: int) -> list[dict[str, object]]:
    """Codec and scores of a 1280x720 photograph on one core."""
    torch.set_num_threads(1)
    resized = skimage.transform.resize(skimage.data.coffee(), (HEIGHT, WIDTH), anti_aliasing=True)
    photo = np.rint(resized * 255).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 10, photo.shape)
    noisy = np.clip(photo + noise, 0, 255).astype(np.uint8)
    picture = Picture(photo, "PNG")
    ours, pillow = encode(picture), pillow_png(photo)
    return [
        measure(
            f"PNG encode, {len(ours) / len(pillow):.2f} of the size of Pillow's default",
            lambda: encode(picture),
            lambda: pillow_png(photo),
            runs,
        ),
        measure("PNG decode against Pillow's", lambda: decode(ours), lambda: Image.open(io.BytesIO(ours)).load(), runs),
        measure(
            "PSNR, SSIM-2D and SSIM-3D against scikit-image's SSIM-2D",
            lambda: score(noisy, photo, Convention("gopro")),
            lambda: skimage_ssim(noisy, photo),
            runs,
        ),
    ]


def photograph_gains() -> dict[str, float]:
    """The bundled weights against non-local means with its estimated sigma, on the same files (dB)."""
    restorer = Restorer.load("demo")
    gains: dict[str, list[float]] = {"bundled weights": [], "non-local means": []}
    with tempfile.TemporaryDirectory() as folder:
        degraded, _ = make_photos(Path(folder))
        for name, original in photographs().items():
            noisy = decode((degraded / f"{name}.png").read_bytes()).pixels
            before = psnr(noisy, original, data_range=255)
            sigma = float(np.mean(estimate_sigma(noisy / 255, channel_axis=-1)))
            options = {"patch_size": 5, "patch_distance": 6, "h": 0.8 * sigma, "sigma": sigma, "fast_mode": False}
            means = np.clip(denoise_nl_means(noisy / 255, channel_axis=-1, **options), 0, 1) * 255
            for who, image in (("bundled weights", restorer(noisy)), ("non-local means", means)):
                gains[who].append(psnr(image, original, data_range=255) - before)
    return {who: statistics.fmean(values) for who, values in gains.items()}


def pillow_png(photo: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    return buffer.getvalue()


def skimage_ssim(image: np.ndarray, reference: np.ndarray) -> float:
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(image, reference, channel_axis=-1, data_range=255, **options))


def measure(what: str, ours: Callable[[], object], baseline: Callable[[], object], runs: int) -> dict[str, object]:
    """Medians of both in seconds, taken in turn after a warm-up; ratio above 1 means that ours is faster."""
    ours(), baseline()
    times = [(clock(ours), clock(baseline)) for _ in range(runs)]
    us, them = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    return {"what": what, "ours": us, "baseline": them, "ratio": ratio}


def clock(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


main()
