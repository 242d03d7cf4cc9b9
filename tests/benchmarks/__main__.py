"""`make bench`: what takes how long on this machine, as ratios to a plain implementation, in one run."""

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from skimage.restoration import denoise_nl_means, estimate_sigma

from nafnet.images import decode
from nafnet.metrics import psnr
from nafnet.restore import Restorer
from pipelines.demo import make_photos, photographs
from tests.benchmarks import cuda, networks, nodes, pictures, plan, scale, throughput
from tests.benchmarks.timing import HEADER, Row

Part = tuple[list[Row], list[str]]  # of the table, and lines below it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--runs", type=int, default=3, help="times each figure is taken")
    parser.add_argument("--images", type=int, default=1111, help="pairs that throughput is measured on")
    parser.add_argument("--plot", type=Path, default=Path("bench-memory.png"), help="where to save memory over a run")
    parser.add_argument("--nodes-plot", type=Path, default=Path("bench-nodes.png"), help="where to save the growth")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where to save the table")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{_processor()}, {os.cpu_count()} cores, {capability}, torch {torch.__version__}")
    print(HEADER)
    rows, lines = list[Row](), list[str]()
    for name in options.parts or PARTS:
        more, below = PARTS[name](options)
        print("".join(f"{row.text()}\n" for row in more), end="", flush=True)
        rows, lines = rows + more, lines + below
    print("\n".join(lines))
    table = {"machine": platform.platform(), "rows": [asdict(row) for row in rows], "lines": lines}
    options.json.write_text(json.dumps(table, indent=2))
    print(f"saved as {options.json}")


def _on_one_core(options: argparse.Namespace) -> Part:
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return pictures.rows(options.runs), []
    finally:
        torch.set_num_threads(cores)


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "cuda": lambda options: cuda.rows(options.runs),
    "networks": lambda options: (networks.rows(options.runs), []),
    "pictures": _on_one_core,
    "gains": lambda _: ([], gain_lines()),
    "plan": lambda _: ([], plan.lines()),
    "throughput": lambda options: (throughput.rows(options.images), []),
    "scale": lambda options: scale.rows(options.plot),
    "nodes": lambda options: nodes.rows(options.nodes_plot),
}


def gain_lines() -> list[str]:
    """The bundled weights against non-local means with its estimated sigma, on the same files."""
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
    return [
        f"mean PSNR gain on six photographs, noise of sigma 25, {who}: {statistics.fmean(values):.2f} dB"
        for who, values in gains.items()
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


main()
