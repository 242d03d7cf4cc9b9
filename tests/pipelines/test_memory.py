"""What a worker needs for the published network on a published image."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from nafnet.images import Picture, encode
from nafnet.model import NetConfig
from tests.conftest import random_network, save_published

_WORKER = """
import sys
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
[pixels] = fetch(pairs, work)
rows = finish(RestoreActor(work)(pixels), work)
assert rows["status"].to_pylist() == ["restored"]
print(peak_bytes())
"""


def test_a_worker_restores_720p_at_width_32_in_two_gigabytes(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = save_published(tmp_path / "net.pth", random_network(NetConfig(width=32)))
    for folder in ("in", "ref"):
        (tmp_path / folder).mkdir()
        pixels = rng.integers(0, 256, (720, 1280, 3), dtype=np.uint8)
        (tmp_path / folder / "a.png").write_bytes(encode(Picture(pixels, "PNG")))
    command = [sys.executable, "-c", _WORKER, str(weights), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2e9


_STAGES = """
import ctypes, os, sys
from pathlib import Path
from pipelines.manifest import plan
from pipelines.settings import RestoreJob
from pipelines.actor import RestoreActor
from pipelines.stages import Work, fetch, finish
from nafnet.restore import Restorer
weights, folder = sys.argv[1:]
job = RestoreJob(source=folder + "/in", output=folder + "/out", reference=folder + "/ref")
recipe = Restorer.load(weights).recipe
work = Work(source=job.source, reference=job.reference, output=job.output, weights=(weights,), recipe=recipe,
            protocol="gopro", device="cpu", max_pixels=10**7, threads=2)
[pairs] = plan(job, recipe.hash, "gopro").tables()
actor = RestoreActor(work)
def held(rounds):
    for _ in range(rounds):
        assert [len(finish(actor(pixels), work)) for pixels in fetch(pairs, work)] == [4]
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = held(5)
print(held(25) - before)
"""


def test_a_hundred_scored_images_leave_nothing_behind(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = save_published(tmp_path / "net.pth", random_network(NetConfig(width=4, enc_blocks=(1,), dec_blocks=(1,))))
    for folder in ("in", "ref"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            pixels = rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)
            (tmp_path / folder / f"{i}.png").write_bytes(encode(Picture(pixels, "PNG")))
    command = [sys.executable, "-c", _STAGES, str(weights), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30e6  # an image has 750 kB, and each was once kept
