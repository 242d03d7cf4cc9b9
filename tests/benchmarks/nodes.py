"""How throughput grows with nodes: 1 to 16 logical ones on this machine, whose GPUs are names and whose network sleeps.

What is shown is what the pipeline itself allows: planning, blocks, actors, rows and their writing are real, and share
this machine's cores. Throughput is that of the time in which all actors have images: that sixteen nodes start one after
the other on two cores shows nothing, which is why they get more images the more they are. The whole run, from the first
image in an actor to the last row, is told below the table.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
from ray.cluster_utils import Cluster

from nafnet.images import Picture, encode
from nafnet.restore import Restorer
from pipelines import engine
from pipelines.engine import Placement
from pipelines.manifest import plan
from pipelines.settings import RestoreJob
from pipelines.stages import PIXEL_SCHEMA, Work
from tests.benchmarks.timing import Row

NODES = (1, 2, 4, 8, 16)
BAR = 15.0  # times one node, by sixteen
_SECONDS = 1.0  # that an image takes in the network


def _images(nodes: int) -> int:
    """For each node."""
    return 40 + 8 * nodes


class SleepingActor:
    """Stands for a GPU that is busy with one image at a time; gives it back as it came, and notes when."""

    def __init__(self, work: Work) -> None:
        self._notes = Path(work.output) / f"{os.getpid()}.times"
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        self._gpu = Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        for row in rows:
            with self._gpu:
                time.sleep(_SECONDS)
                with self._notes.open("a") as notes:
                    notes.write(f"{time.time()}\n")
            row |= {"restored": row["pixels"], "restored_dtype": row["dtype"], "seconds": _SECONDS, "tiles": 1}
        return pa.Table.from_pylist(rows, schema=PIXEL_SCHEMA)


@dataclass(frozen=True, slots=True)
class _Rate:
    """Images a second: while all actors have some, and from the first that one takes to the last whose row is back."""

    steady: float
    whole: float


def rows(plot: Path) -> tuple[list[Row], list[str]]:
    engine.RestoreActor = SleepingActor  # type: ignore[assignment, misc]
    rates = {nodes: _rate(nodes) for nodes in NODES}
    _draw(rates, plot)
    one = rates[1].steady
    table = [
        Row(
            f"{nodes} nodes against one, an image of {_SECONDS:g} s", 1 / rate.steady, 1 / one, rate.steady / one,
            floor=_SECONDS / nodes, bar=BAR if nodes == NODES[-1] else None,
        )
        for nodes, rate in rates.items()
    ]  # fmt: skip
    whole = ", ".join(f"{nodes}: {rate.whole / rates[1].whole:.2f}" for nodes, rate in rates.items())
    return table, [
        f"whole runs by nodes, starts and ends included, against one: {whole}",
        f"throughput by nodes: {plot}",
    ]


def _rate(nodes: int) -> _Rate:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})  # reads and writes
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, num_gpus=1)
        cluster.wait_for_nodes()
        with tempfile.TemporaryDirectory() as folder:
            return _run(Path(folder), nodes, cluster.address)
    finally:
        cluster.shutdown()


def _run(home: Path, nodes: int, address: str) -> _Rate:
    (home / "in").mkdir()
    file = encode(Picture(np.full((64, 64, 3), 90, np.uint8), "PNG"))
    for i in range(_images(nodes) * nodes):
        (home / "in" / f"{i:05d}.png").write_bytes(file)
    job = RestoreJob(source=str(home / "in"), output=str(home / "out"))
    recipe = Restorer.load("demo").recipe
    work = Work(job.source, None, job.output, ("demo",), recipe, "stored", "cuda", 10**9)
    got: list[Any] = []
    engine.run(plan(job, recipe.hash, "stored").tables(), work, Placement(address, nodes, None, 1), got.append)
    ended = time.time()
    rows = pa.concat_tables(got)
    if set(rows["status"].to_pylist()) != {"restored"} or len(rows) != _images(nodes) * nodes:
        raise RuntimeError(f"{len(rows)} rows of {_images(nodes) * nodes} images: {rows['status'].value_counts()}")
    times = [sorted(map(float, path.read_text().split())) for path in (home / "out").glob("*.times")]
    if len(times) != nodes:
        raise RuntimeError(f"{len(times)} actors had images: one on each of {nodes} nodes was to")
    first, last = max(one[0] for one in times), min(one[-1] for one in times)
    if first >= last:
        raise RuntimeError("the actors never all had images: more images for each node are needed")
    steady = sum(first < moment <= last for one in times for moment in one) / (last - first)
    return _Rate(steady, len(rows) / (ended - min(one[0] for one in times) + _SECONDS))


def _draw(rates: dict[int, _Rate], plot: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(list(rates), [rate.steady for rate in rates.values()], marker="o", label="measured")
    axes.plot(list(rates), [rates[1].steady * nodes for nodes in rates], linestyle="--", label="as many times one node")
    axes.set(xlabel="nodes", ylabel="images a second", xscale="log", yscale="log")
    axes.set_xticks(list(rates), labels=[str(nodes) for nodes in rates])
    axes.set_yticks([1, 2, 4, 8, 16], labels=["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(plot, bbox_inches="tight")
    plt.close(figure)
