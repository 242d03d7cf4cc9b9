"""A whole run on GoPro's count of made pairs against its parts in a plain loop on the same cores.

The loop is as bare as it can be: a process for each core, and in it decoder, network and scorer one image after the
other; no Ray, no Prefect, no report, and nothing is encoded or written. The run is the `nafnet restore` command with
all that it does, from its start to its end.
"""

import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from nafnet.conventions import Convention
from nafnet.images import decode
from nafnet.metrics import score
from nafnet.model import NetConfig
from nafnet.restore import Restorer
from pipelines.made import make
from tests.benchmarks.timing import Row, clock
from tests.conftest import random_network, save_published

TINY = NetConfig(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,))
BAR = 0.85


def rows(images: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make("gopro", home / "set", images=images)
        weights = save_published(home / "tiny.pth", random_network(TINY))
        blurred = sorted((home / "set").rglob("blur/*.png"))
        pairs = [(path, Path(str(path).replace("/blur/", "/sharp/"))) for path in blurred]
        cores = torch.get_num_threads()
        # Half of the loop before the run and half after it: a machine's speed changes over half an hour.
        loop = clock(lambda: _loop(weights, pairs[::2], cores))
        run = clock(lambda: _run(weights, home))
        loop += clock(lambda: _loop(weights, pairs[1::2], cores))
    what = f"{images} pairs of 1280x720: nafnet restore against a plain loop"
    return [Row(what, run, loop, loop / run, bar=BAR)]


def _loop(weights: Path, pairs: list[tuple[Path, Path]], cores: int) -> None:
    shares = [(weights, pairs[i::cores]) for i in range(cores)]
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        list(pool.map(_share, shares))


def _share(work: tuple[Path, list[tuple[Path, Path]]]) -> None:
    weights, pairs = work
    torch.set_num_threads(1)
    restorer, convention = Restorer.load(weights), Convention("gopro")
    for degraded_file, sharp_file in pairs:
        degraded, sharp = decode(degraded_file.read_bytes()).pixels, decode(sharp_file.read_bytes()).pixels
        restored = restorer(degraded)
        score(degraded, sharp, convention), score(restored, sharp, convention)


def _run(weights: Path, home: Path) -> None:
    command = [str(Path(sys.executable).with_name("nafnet")), "restore", f"{home}/set/test", f"{home}/out"]
    command += ["--reference", f"{home}/set/test", "--pair", "blur=sharp", "--include", "*/blur/*.png"]
    command += ["--checkpoint", str(weights), "--protocol", "gopro"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
