"""How throughput grows with nodes: 1 to 16 logical ones on this machine, whose GPUs are names and whose network sleeps.

What is shown is what the pipeline itself allows: planning, blocks, actors, rows and their writing are real, and share
this machine's cores. Time starts with the first image in an actor: starting sixteen nodes on two cores shows nothing.
"""

import os
import tempfile
import time
from pathlib import Path
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
_IMAGES = 48  # for each node
_SECONDS = 1.0  # that an image takes in the network


class SleepingActor:
    """Stands for a GPU that is busy with each image for a while; gives it back as it came."""

    def __init__(self, work: Work) -> None:
        self._began = Path(work.output) / f"{os.getpid()}.began"

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not self._began.exists():
            self._began.parent.mkdir(parents=True, exist_ok=True)
            self._began.touch()
        time.sleep(_SECONDS * len(batch))
        rows = [
            {**row, "restored": row["pixels"], "restored_dtype": row["dtype"], "seconds": _SECONDS, "tiles": 1}
            for row in batch.to_pylist()
        ]
        return pa.Table.from_pylist(rows, schema=PIXEL_SCHEMA)


def rows(plot: Path) -> tuple[list[Row], list[str]]:
    engine.RestoreActor = SleepingActor  # type: ignore[assignment, misc]
    rates = {nodes: _rate(nodes) for nodes in NODES}
    _draw(rates, plot)
    one = rates[1]
    table = [
        Row(
            f"{nodes} nodes against one, an image of {_SECONDS:g} s", 1 / rate, 1 / one, rate / one,
            floor=_SECONDS / nodes, bar=BAR if nodes == NODES[-1] else None,
        )
        for nodes, rate in rates.items()
    ]  # fmt: skip
    return table, [f"throughput by nodes: {plot}"]


def _rate(nodes: int) -> float:
    """Images a second, from the first that an actor takes to the last whose row is back."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})  # reads and writes
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, num_gpus=1)
        cluster.wait_for_nodes()
        with tempfile.TemporaryDirectory() as folder:
            return _run(Path(folder), nodes, cluster.address)
    finally:
        cluster.shutdown()


def _run(home: Path, nodes: int, address: str) -> float:
    (home / "in").mkdir()
    file = encode(Picture(np.full((64, 64, 3), 90, np.uint8), "PNG"))
    for i in range(_IMAGES * nodes):
        (home / "in" / f"{i:05d}.png").write_bytes(file)
    job = RestoreJob(source=str(home / "in"), output=str(home / "out"))
    recipe = Restorer.load("demo").recipe
    work = Work(job.source, None, job.output, ("demo",), recipe, "stored", "cuda", 10**9)
    got: list[Any] = []
    engine.run(plan(job, recipe.hash, "stored").tables(), work, Placement(address, nodes, None, 1), got.append)
    ended = time.time()
    rows = pa.concat_tables(got)
    if set(rows["status"].to_pylist()) != {"restored"} or len(rows) != _IMAGES * nodes:
        raise RuntimeError(f"{len(rows)} rows of {_IMAGES * nodes} images: {rows['status'].value_counts()}")
    began = min(path.stat().st_mtime for path in (home / "out").glob("*.began"))
    return len(rows) / (ended - began)


def _draw(rates: dict[int, float], plot: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(list(rates), list(rates.values()), marker="o", label="measured")
    axes.plot(list(rates), [rates[1] * nodes for nodes in rates], linestyle="--", label="as many times one node")
    axes.set(xlabel="nodes", ylabel="images a second", xscale="log", yscale="log")
    axes.set_xticks(list(rates), labels=[str(nodes) for nodes in rates])
    axes.set_yticks([1, 2, 4, 8, 16], labels=["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(plot, bbox_inches="tight")
    plt.close(figure)
