"""Many images: what one costs beyond its arithmetic, whether a huge one idles the cores, whether memory stays flat.

The bare loop is decoder, network, encoder and a file written, one image after the other, one thread, no Ray.
"""

import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import torch

from nafnet.images import Picture, decode, encode
from nafnet.model import NetConfig
from nafnet.restore import Restorer
from pipelines import engine
from pipelines.engine import Placement
from pipelines.manifest import plan
from pipelines.settings import RestoreJob
from pipelines.stages import Work
from tests.benchmarks.timing import Row, clock
from tests.conftest import random_network, save_published

TINY = NetConfig(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,))
OVERHEAD_SECONDS = 0.003  # of CPU that an image may cost beyond the bare loop
OF_IDEAL = 1 / 1.2
STEADY, MANY = 1_000, 20_000  # images done between which memory should stay as it is


def rows(plot: Path) -> tuple[list[Row], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        weights = save_published(home / "tiny.pth", random_network(TINY))
        overhead = _overhead(home / "overhead", weights)
        mixed, line = _mixed(home / "mixed")
        return [overhead, mixed], [line, *_memory(home / "memory", weights, plot)]


def _overhead(home: Path, weights: Path) -> Row:
    """CPU seconds of all processes for each image once the run is steady, against the bare loop's and 3 ms."""
    _write(home, [(64, 64)] * 4_000)
    bare, _ = _share(weights, sorted((home / "in").iterdir())[:500])
    watch = _Watch()
    _run(home, weights, watch)
    first = next(mark for mark in watch.marks if mark.images > STEADY)
    last = watch.marks[-1]
    cost = (last.cpu_seconds - first.cpu_seconds) / (last.images - first.images)
    what = "an image of 64x64 px: CPU of a run against a bare loop and 3 ms"
    return Row(what, cost, bare + OVERHEAD_SECONDS, (bare + OVERHEAD_SECONDS) / cost, floor=bare, bar=1.0)


def _mixed(home: Path) -> tuple[Row, str]:
    """One large image among small ones with the bundled weights: a tenth of 100 megapixels and 10,000 small ones."""
    weights = "demo"
    _write(home, [(2_500, 4_000), *[(256, 256)] * 1_000])
    _write(home / "one", [(64, 64)])
    files, cores = sorted((home / "in").iterdir()), os.cpu_count() or 1
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        shares = pool.map(_share, [weights] * cores, [files[i::cores] for i in range(cores)])
        ideal = sum(seconds for _, seconds in shares) / cores
    start = clock(lambda: _run(home / "one", weights))
    run = clock(lambda: _run(home, weights)) - start
    what = "10 megapixels among 1,000 images of 256x256 px: a run against the ideal"
    line = f"a run over one small image takes {start:.1f} s, which the line on 10 megapixels leaves out"
    return Row(what, run, ideal, ideal / run, bar=OF_IDEAL), line


def _memory(home: Path, weights: Path, plot: Path) -> list[str]:
    """Memory of the run's processes from the first images to the last, also as a plot."""
    _write(home, [(32, 32)] * MANY)
    watch = _Watch()
    _run(home, weights, watch)
    lines = []
    _, axes = plt.subplots(figsize=(8, 4))
    for name in ("driver", "actor", "workers"):
        done = [mark.images for mark in watch.marks]
        megabytes = [mark.megabytes.get(name, 0) for mark in watch.marks]
        axes.plot(done, megabytes, label=name)
        early = statistics.median(mb for n, mb in zip(done, megabytes, strict=True) if STEADY <= n <= 3 * STEADY)
        late = statistics.median(mb for n, mb in zip(done, megabytes, strict=True) if n >= MANY - 2 * STEADY)
        lines.append(f"memory of the {name}: {early:,.0f} MB after 1,000 small images, {late:,.0f} MB after 20,000")
    axes.set(xlabel="images done", ylabel="MB of its own", ylim=(0, None), title=f"{MANY:,} images of 32x32 px")
    axes.legend()
    plt.savefig(plot, bbox_inches="tight")
    plt.close()
    return [*lines, f"memory over the run: {plot}"]


def _write(home: Path, sizes: list[tuple[int, int]]) -> None:
    """Image files of these sizes (height, width); those of one size share their content."""
    (home / "in").mkdir(parents=True)
    rng, files = np.random.default_rng(0), dict[tuple[int, int], bytes]()
    for i, size in enumerate(sizes):
        if size not in files:
            files[size] = encode(Picture(rng.integers(0, 8, (*size, 3), np.uint8) * np.uint8(32), "PNG"))
        (home / "in" / f"{i:06d}.png").write_bytes(files[size])


def _share(weights: str | Path, files: list[Path]) -> tuple[float, float]:
    """The bare loop: CPU seconds for each file, and seconds for all."""
    torch.set_num_threads(1)
    restorer = Restorer.load(weights)
    with tempfile.TemporaryDirectory() as out:
        _loop(restorer, files[-8:], Path(out))  # warm
        started, cpu = time.perf_counter(), time.thread_time()
        _loop(restorer, files, Path(out))
        return (time.thread_time() - cpu) / len(files), time.perf_counter() - started


def _loop(restorer: Restorer, files: list[Path], out: Path) -> None:
    for file in files:
        restored = restorer(decode(file.read_bytes()).pixels)
        (out / file.name).write_bytes(encode(Picture(restored, "PNG")))


def _run(home: Path, weights: str | Path, watch: "_Watch | None" = None) -> None:
    job = RestoreJob(source=str(home / "in"), output=str(home / "out"))
    recipe = Restorer.load(weights).recipe
    work = Work(job.source, None, job.output, (str(weights),), recipe, "stored", "cpu", 10**9)
    planned = plan(job, recipe.hash, "stored")
    counted = [0]

    def on_rows(rows: pa.Table) -> None:
        counted[0] += len(rows)
        if watch is not None:
            watch.mark(counted[0])

    engine.run(planned.tables(), work, Placement(), on_rows)
    if counted[0] != planned.matched:
        raise RuntimeError(f"{counted[0]} rows of {planned.matched} images came back")


@dataclass(frozen=True)
class _Mark:
    images: int
    cpu_seconds: float
    megabytes: dict[str, float]


@dataclass
class _Watch:
    """What this process and its descendants have used whenever rows came back."""

    marks: list[_Mark] = field(default_factory=list)
    _cpu: dict[tuple[int, str], float] = field(default_factory=dict)  # by process; of dead ones what was seen last

    def mark(self, images: int) -> None:
        megabytes: dict[str, float] = {}
        for pid, stat in _family(os.getpid()).items():
            self._cpu[pid, stat[19]] = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
            name, own = _memory_of(pid)
            if name is not None:
                megabytes[name] = megabytes.get(name, 0) + own
        self.marks.append(_Mark(images, sum(self._cpu.values()), megabytes))


def _family(root: int) -> dict[int, list[str]]:
    """The fields of /proc/PID/stat from the third on, of a process and all below it."""
    stats = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stats[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # gone meanwhile
                continue
    family, more = {root}, {root}
    while more:
        more = {pid for pid, stat in stats.items() if int(stat[1]) in more} - family
        family |= more
    return {pid: stats[pid] for pid in family if pid in stats}


def _memory_of(pid: int) -> tuple[str | None, float]:
    """Which part of a run a process is, and its memory in MB without what it shares; None for Ray's own."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None, 0
    own = int(status.partition("RssAnon:")[2].split()[0]) / 1e3 if "RssAnon:" in status else 0
    if pid == os.getpid():
        return "driver", own
    if "MapWorker" in title:
        return "actor", own
    return ("workers", own) if title.startswith(("ray::IDLE", "ray::MapBatches")) else (None, 0)
