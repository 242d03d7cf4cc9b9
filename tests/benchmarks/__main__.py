"""`make bench`: what takes how long on this machine, as ratios to a plain implementation, in one run."""

import argparse
import json
import os
import platform
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from skimage.restoration import denoise_nl_means, estimate_sigma

from nafnet.images import decode
from nafnet.metrics import psnr
from nafnet.restore import Restorer
from pipelines.demo import make_photos, photographs
from tests.benchmarks import cuda, networks, pictures
from tests.benchmarks.timing import HEADER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="times each figure is taken")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where to save the table")
    options = parser.parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{_processor()}, {os.cpu_count()} cores, {capability}, torch {torch.__version__}")
    print(HEADER)
    rows, lines = cuda.rows(options.runs)
    rows += networks.rows(options.runs)
    torch.set_num_threads(1)
    rows += pictures.rows(options.runs)
    torch.set_num_threads(os.cpu_count() or 1)
    for row in rows:
        print(row.text())
    gains = photograph_gains()
    lines += [
        f"mean PSNR gain on six photographs, noise of sigma 25, {who}: {gain:.2f} dB" for who, gain in gains.items()
    ]
    print("\n".join(lines))
    table = {"machine": platform.platform(), "rows": [asdict(row) for row in rows], "lines": lines, "gains_db": gains}
    options.json.write_text(json.dumps(table, indent=2))
    print(f"saved as {options.json}")


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


main()
