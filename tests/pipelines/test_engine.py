"""A real local Ray: what happens when processes die, and that no row is lost."""

import hashlib
import os
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster as RayCluster
from ray.data._internal.cluster_autoscaler import CLUSTER_AUTOSCALER_ENV_KEY, ClusterAutoscalerVersion

from nafnet.images import Picture, encode
from nafnet.restore import Restorer
from pipelines import engine
from pipelines.actor import RestoreActor
from pipelines.engine import Cluster, Placement, Pool, this_machine
from pipelines.machine import describe_machine
from pipelines.manifest import plan
from pipelines.settings import RestoreJob
from pipelines.stages import Row, Work, fetch, finish
from tests.pipelines.conftest import free_port


class PoisonedActor(RestoreActor):
    """Dies on one key, as native code does that meets a bad image, and fails on another, as a bug would."""

    def _restore(self, rows: list[Row], at_once: int) -> list[Row]:
        keys = [row["key"] for row in rows]
        _die_on("restore", keys)
        if "with a bug.png" in keys and not self.work.contained:
            raise RuntimeError("met a bug")
        return super()._restore(rows, at_once)


class StartingActor(RestoreActor):
    """Is not there for a minute."""

    def __init__(self, work: Work) -> None:
        time.sleep(60)
        super().__init__(work)


def poisoned_fetch(batch: pa.Table, work: Work) -> Iterator[pa.Table]:
    """Dies while it reads one key, as a decoder does that meets a crafted file."""
    _die_on("read", batch["key"].to_pylist())
    return fetch(batch, work)


def poisoned_finish(batch: pa.Table, work: Work) -> pa.Table:
    """Dies while it writes one key."""
    _die_on("write", batch["key"].to_pylist())
    return finish(batch, work)


def _die_on(doing: str, keys: list[str]) -> None:
    """A key such as "kills to read SIGSEGV.png" ends the process that does that; beside it a file counts the deaths."""
    for key in keys:
        if key.startswith(f"kills to {doing}"):
            with Path(os.environ["DEATHS"]).open("a") as deaths:
                deaths.write(f"{key}\n")
            os.kill(os.getpid(), getattr(signal, key.removesuffix(".png").split()[-1]))
            time.sleep(60)


GREY = encode(Picture(np.full((32, 32, 3), 90, np.uint8), "PNG"))


def job_on(
    home: Path, checkpoint: Path, files: dict[str, bytes], *, output: str = "out", **options: Any
) -> tuple[Iterator[pa.Table], Work]:
    """The parts and the work of a job on these files."""
    (home / "in").mkdir(exist_ok=True)
    for name, data in files.items():
        (home / "in" / name).write_bytes(data)
    job = RestoreJob(source=str(home / "in"), output=str(home / output))
    recipe = Restorer.load(checkpoint, **options).recipe
    work = Work(job.source, None, job.output, (str(checkpoint),), recipe, "stored", "cpu", 10**6)
    return plan(job, recipe.hash, "stored").tables(), work


def test_what_kills_its_process_is_found_after_two_deaths_and_the_rest_is_restored(
    tmp_path: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = {
        "kills to read SIGSEGV.png": "killed by SIGSEGV (a fault in native code)",
        "kills to restore SIGKILL.png": "killed by SIGKILL (as the kernel does when memory runs out)",
        "kills to write SIGBUS.png": "killed by SIGBUS",
    }
    names = [f"{i:02d}.png" for i in range(16)] + ["with a bug.png", *deadly]
    parts, work = job_on(tmp_path, checkpoint_file, dict.fromkeys(names, GREY))
    monkeypatch.setattr(engine, "RestoreActor", PoisonedActor)
    monkeypatch.setattr(engine, "fetch", poisoned_fetch)
    monkeypatch.setattr(engine, "finish", poisoned_finish)
    monkeypatch.setattr(engine, "_BLOCK_ROWS", 4)  # the poison has innocent neighbours
    monkeypatch.setenv("DEATHS", str(tmp_path / "deaths"))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file
    [pairs] = parts
    got: list[pa.Table] = []
    done_by = engine.run([pairs.slice(0, 8), pairs.slice(8)], work, Placement(), got.append)
    assert done_by["nodes"] == 1
    assert done_by["machines"] == [this_kind()]
    rows = pa.concat_tables(got)
    assert Counter(rows["key"].to_pylist()) == Counter(names)  # each exactly once
    ends = dict(zip(rows["key"].to_pylist(), rows["status"].to_pylist(), strict=True))
    assert ends == {**dict.fromkeys(names, "restored"), **dict.fromkeys(deadly, "crashed")}
    reasons = {row["key"]: row["reason"] for row in rows.to_pylist()}
    for key, seen in deadly.items():
        assert f"the process died each time it held this image; when it held no other, it was {seen}" in reasons[key]
    deaths = Counter((tmp_path / "deaths").read_text().splitlines())
    assert all(1 <= deaths[key] <= 2 for key in deadly), deaths


def this_kind() -> dict[str, Any]:
    """What a run says of its only kind of machine when that is this one."""
    return {"count": 1, **{name: fact for name, fact in describe_machine().items() if name != "host"}}


@pytest.fixture
def four_cpus() -> Iterator[str]:
    """The address of a Ray that hands out four CPUs, whatever this machine has."""
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 4})
    yield cluster.address
    cluster.shutdown()


def test_a_deterministic_recipe_gives_the_same_bits_from_any_number_of_actors(
    tmp_path: Path, checkpoint_file: Path, four_cpus: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_BLOCK_ROWS", 1)  # something for each actor
    # Floats, so that rounding hides nothing; in this size the bits would hang on the number of threads.
    pictures = [Picture(rng.random((120, 460, 3), dtype=np.float32), "TIFF") for _ in range(6)]
    files = {f"{i}.tif": encode(picture) for i, picture in enumerate(pictures)}
    made, workers, threads = [], [], []
    for run, actors in enumerate((1, 4)):
        options = {"tile": "whole", "deterministic": True}
        parts, work = job_on(tmp_path, checkpoint_file, files, output=f"out{run}", **options)
        got: list[pa.Table] = []
        done_by = engine.run(parts, work, Placement(four_cpus, actors), got.append)
        rows = pa.concat_tables(got)
        assert Counter(rows["status"].to_pylist()) == {"restored": 6}
        workers.append(len(set(rows["worker"].to_pylist())))
        threads.append(done_by["threads"])
        written = sorted((tmp_path / f"out{run}" / "images").iterdir())
        made.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written})
    assert threads == [4, 1]
    assert workers[0] == 1
    assert workers[1] > 1
    assert len(made[0]) == 6
    assert made[0] == made[1]


def test_a_ray_of_its_own_gives_a_job_all_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what its tasks reserve just now, and of the rest whole CPUs only: one of two would often be idle."""
    monkeypatch.delenv(engine._AUTOSCALER, raising=False)
    with engine.connect("local"):
        chosen = ClusterAutoscalerVersion(os.environ[CLUSTER_AUTOSCALER_ENV_KEY])
        assert chosen is ClusterAutoscalerVersion.V2
    assert engine._AUTOSCALER not in os.environ  # it would hold for a cluster that is joined next


def test_blocks_are_balanced_by_bytes_and_the_largest_image_comes_first() -> None:
    sizes = [*[1000] * 700, 5_000_000, 9_000_000, 5_000_000]
    part = pa.table({"key": [f"{i:03d}" for i in range(len(sizes))], "size": sizes})
    blocks = engine._blocks(part, actors=1, threads=2)
    assert [len(block) for block in blocks] == [1, 1, 175, 175, 175, 175, 1]
    assert pa.concat_tables(blocks)["key"].to_pylist() == ["701", "700", "702", *part["key"].to_pylist()[:700]]
    few = engine._blocks(part.slice(0, 10), actors=2, threads=2)
    assert [len(block) for block in few] == [2] * 5  # something for every actor, and for each of its threads


def of(cpus: int, gpus: float = 0, *, free: float | None = None, free_gpus: float | None = None) -> Cluster:
    """A cluster of one node, all of it free unless said otherwise."""
    return Cluster(
        cpus,
        cpus if free is None else free,
        cpus,
        gpus,
        gpus if free_gpus is None else free_gpus,
        nodes=1,
        version="",
    )


@pytest.mark.parametrize(
    ("cluster", "wish", "expected"),
    [
        (of(1), Placement(), (Pool(1, 1, 0.1, 0), 1)),
        (of(2), Placement(), (Pool(1, 1, 1, 0), 2)),
        (of(2), Placement(actors=2), (Pool(2, 2, 0.5, 0), 1)),
        (of(16), Placement(), (Pool(4, 4, 3, 0), 4)),
        (of(16), Placement(actors=2), (Pool(2, 2, 7, 0), 8)),
        (of(8, 4), Placement(gpus_per_actor=0.5), (Pool(8, 8, 0.8, 0.5), 1)),
        (of(8, 4), Placement(gpus_per_actor=0.6), (Pool(4, 4, 1, 0.6), 1)),
        (of(8, 4), Placement(actors=2, gpus_per_actor=1), (Pool(2, 2, 1, 1), 1)),
        # Growing with the cluster.
        (of(8, 1), Placement(max_actors=4, gpus_per_actor=1), (Pool(1, 4, 1, 1), 1)),
        (of(8, 4), Placement(actors=1, max_actors=8, gpus_per_actor=0.5), (Pool(1, 8, 1, 0.5), 1)),
        (of(16), Placement(actors=1, max_actors=3), (Pool(1, 3, 15, 0), 16)),
        (of(16), Placement(max_actors=2), (Pool(2, 2, 7, 0), 8)),
        # Beside another job: what is free, and something of it where nothing is.
        (of(16, free=9.5), Placement(), (Pool(2, 2, 4, 0), 4)),
        (of(4, free=1), Placement(), (Pool(1, 1, 0.1, 0), 1)),
        (of(4, free=0), Placement(actors=1), (Pool(1, 1, 0.1, 0), 1)),
        (of(16, 4, free=8, free_gpus=2), Placement(gpus_per_actor=1), (Pool(2, 2, 1, 1), 1)),
        (of(16, 4, free=8, free_gpus=0), Placement(gpus_per_actor=1), (Pool(1, 1, 1, 1), 1)),
    ],
)
def test_the_pool_fits_the_cluster(cluster: Cluster, wish: Placement, expected: tuple[Pool, int]) -> None:
    assert cluster.pool(wish) == expected


def test_a_pool_that_would_wait_for_ever_is_refused() -> None:
    with pytest.raises(ValueError, match="the cluster has 0 GPUs"):
        of(4).pool(Placement(gpus_per_actor=1))
    with pytest.raises(ValueError, match="the cluster has 4 CPUs"):
        of(4).pool(Placement(actors=5))


def test_an_actor_fits_on_one_node() -> None:
    cluster = Cluster(cpus=16, free_cpus=16, node_cpus=8, gpus=0, free_gpus=0, nodes=2, version="")
    pool, threads = cluster.pool(Placement(actors=1))
    assert (pool.cpus, threads) == (7, 8)


def test_actors_share_the_memory_of_their_node() -> None:
    assert this_machine().pool(Placement(actors=1))[0].memory_share() == 1
    assert Pool(3, 3, 1, 0).memory_share() == pytest.approx(1 / 3)
    assert Pool(3, 3, 1, 0).memory_share(nodes=2) == 0.5
    assert Pool(1, 3, 1, 0).memory_share() == pytest.approx(1 / 3)  # it may grow
    assert Pool(8, 8, 1, 0.5).memory_share(nodes=4) == 0.5  # of its GPU's
    assert Pool(2, 2, 1, 2).memory_share() == 1


class SlowActor(RestoreActor):
    """Takes a while for each image, and says on which node."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        time.sleep(0.8 * len(batch))  # two at once
        if ray.is_initialized():  # not where an image is tried alone
            self.worker = ray.get_runtime_context().get_node_id()
        return super().__call__(batch)


def test_a_pool_grows_with_the_cluster_and_outlives_a_node_that_leaves(
    tmp_path: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i:03d}.png" for i in range(100)]  # Ray Data looks for new nodes every 20 s
    parts, work = job_on(tmp_path, checkpoint_file, dict.fromkeys(names, GREY))
    monkeypatch.setattr(engine, "RestoreActor", SlowActor)
    monkeypatch.setattr(engine, "_BLOCK_ROWS", 1)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})  # which stand for some
    got: list[pa.Table] = []
    joined: list[Any] = []
    left: list[str] = []

    def on_rows(rows: pa.Table) -> None:
        got.append(rows)
        if not joined:
            joined.append(cluster.add_node(num_cpus=4, num_gpus=1))
        elif not left and joined[0].node_id in rows["worker"].to_pylist():
            left.append(joined[0].node_id)
            cluster.remove_node(joined[0], allow_graceful=False)

    try:
        where = Placement(cluster.address, actors=1, max_actors=3, gpus_per_actor=1)
        told = engine.run(parts, work, where, on_rows)
    finally:
        cluster.shutdown()
    assert told["machines"] == [this_kind()]  # all nodes are this one, and one has left
    rows = pa.concat_tables(got)
    assert left, Counter(rows["worker"].to_pylist())  # the node that joined got work
    assert Counter(rows["key"].to_pylist()) == Counter(names)
    assert set(rows["status"].to_pylist()) == {"restored"}


def test_metrics_count_what_comes_back(tmp_path: Path, checkpoint_file: Path) -> None:
    """As Prometheus would see them, under the names that the dashboard asks for."""
    picture = encode(Picture(np.full((50, 80, 3), 90, np.uint8), "PNG"))
    files = {"a.png": picture, "b.png": picture, "c.png": b"no picture"}
    parts, work = job_on(tmp_path, checkpoint_file, files)
    port = free_port()
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "metrics_export_port": port})
    seen: dict[str, float] = {}

    def on_rows(rows: pa.Table) -> None:
        if sum(len(one) for one in got) + len(rows) == 3:  # the last: what it adds is counted before it is handed on
            until = time.monotonic() + 60
            while len(seen) < 3 and time.monotonic() < until:
                time.sleep(1)
                seen.update(scraped(port))
        got.append(rows)

    got: list[pa.Table] = []
    try:
        engine.run(parts, work, Placement(cluster.address), on_rows)
    finally:
        cluster.shutdown()
    assert seen == {"restored": 2, "unreadable": 1, "megapixels": pytest.approx(0.008)}
    asked = (Path(engine.__file__).parent.parent / "infra" / "grafana.json").read_text()
    assert {"ray_nafnet_images_total", "ray_nafnet_megapixels_total", "ray_nafnet_seconds_bucket"} == set(
        re.findall(r"ray_nafnet_[a-z_]+", asked)
    )


def scraped(port: int) -> dict[str, float]:
    """Images by status, and megapixels of those restored."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:  # the agent is on its way
        return {}
    if "ray_nafnet_seconds_bucket" not in text:
        return {}
    found = re.findall(r'^ray_nafnet_images_total\{.*Status="?(\w+).*\} ([\d.]+)$', text, re.M | re.I)
    sizes = re.findall(r"^ray_nafnet_megapixels_total\{.*restored.*\} ([\d.e-]+)$", text, re.M)
    return {name: float(value) for name, value in [*found, *(("megapixels", size) for size in sizes)]}


def test_a_job_that_can_process_nothing_raises_what_it_met(tmp_path: Path, checkpoint_file: Path) -> None:
    parts, work = job_on(tmp_path, checkpoint_file, {"a.png": GREY, "b.png": GREY})
    pairs = [*parts]  # they lie in the output folder
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_bytes(b"a file where the output folder should be")
    with pytest.raises(RuntimeError, match=r"no image could be processed; one met .*writing it"):
        engine.run(pairs, work, Placement(), lambda _: None)


def test_at_the_time_limit_ray_data_stops_before_ray_does(
    tmp_path: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that is in Ray's C++ side when Ray is shut down ends the process with SIGSEGV."""
    parts, work = job_on(tmp_path, checkpoint_file, {"a.png": GREY})
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    first_pass, shutdown = engine._first_pass, ray.shutdown
    before: set[threading.Thread] = set()
    after: set[threading.Thread] = set()

    def begin(part: pa.Table, work: Work, pool: Pool, on_rows: Callable[[pa.Table], None], _: float) -> pa.Table:
        before.update(threading.enumerate())
        return first_pass(part, work, pool, on_rows, time.monotonic() + 2)

    def stop() -> None:
        after.update(threading.enumerate())
        shutdown()

    monkeypatch.setattr(engine, "RestoreActor", StartingActor)
    monkeypatch.setattr(engine, "_first_pass", begin)
    monkeypatch.setattr(ray, "shutdown", stop)
    began = time.monotonic()
    with pytest.raises(engine.TimeLimit):
        engine.run(parts, work, Placement(), lambda _: None)
    assert time.monotonic() - began < 50  # and not after the actor's minute
    assert after
    assert after <= before
