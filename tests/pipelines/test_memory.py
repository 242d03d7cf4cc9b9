"""What a worker needs for the published network on a published image."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from nafnet.images import Picture, encode
from nafnet.model import NetConfig
from tests.conftest import random_network, save_published

_STAGES = """
import ctypes, os, sys
from pathlib import Path
from pipelines.manifest import plan
from pipelines.settings import RestoreJob
from pipelines.actor import RestoreActor
from pipelines.stages import Work, fetch, finish
from nafnet.restore import Restorer
from tests.peak import peak_bytes
weights, folder = sys.argv[1:]
job = RestoreJob(source=folder + "/in", output=folder + "/out", reference=folder + "/ref")
recipe = Restorer.load(weights).recipe
work = Work(source=job.source, reference=job.reference, output=job.output, weights=(weights,), recipe=recipe,
            protocol="gopro", device="cpu", max_pixels=10**7, threads=2)
[pairs] = plan(job, recipe.hash, "gopro").tables()
actor = RestoreActor(work)
def go():
    for pixels in fetch(pairs, work):
        assert set(finish(actor(pixels), work)["status"].to_pylist()) == {"restored"}
"""
_PEAK = """
go()
print(peak_bytes())
"""
_GROWTH = """
def held(rounds):
    for _ in range(rounds):
        go()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = held(5)
print(held(25) - before)
"""


def measure(what: str, home: Path, rng: np.random.Generator, net: NetConfig, shape: tuple[int, int, int]) -> int:
    """Bytes that a process says of itself which takes scored images (how many, height, width) through all stages."""
    images, *size = shape
    weights = save_published(home / "net.pth", random_network(net))
    for folder in ("in", "ref"):
        (home / folder).mkdir()
        for i in range(images):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            (home / folder / f"{i}.png").write_bytes(encode(Picture(pixels, "PNG")))
    command = [sys.executable, "-c", _STAGES + what, str(weights), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_worker_restores_720p_at_width_32_in_two_gigabytes(tmp_path: Path, rng: np.random.Generator) -> None:
    assert measure(_PEAK, tmp_path, rng, NetConfig(width=32), (1, 720, 1280)) < 2e9


def test_a_hundred_scored_images_leave_nothing_behind(tmp_path: Path, rng: np.random.Generator) -> None:
    tiny = NetConfig(width=4, enc_blocks=(1,), dec_blocks=(1,))
    assert measure(_GROWTH, tmp_path, rng, tiny, (4, 500, 500)) < 30e6  # an image has 750 kB, and each was once kept
