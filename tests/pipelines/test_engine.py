"""A real local Ray: what happens when processes die, and that no row is lost."""

import hashlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray import cloudpickle
from ray.cluster_utils import Cluster as RayCluster

from nafnet.images import Picture, encode
from nafnet.restore import Restorer
from pipelines import engine
from pipelines.engine import Cluster, Placement, Pool, this_machine
from pipelines.manifest import plan
from pipelines.settings import RestoreJob
from pipelines.stages import RestoreActor, Row, Work, fetch, finish
from pipelines.storage import Store


class PoisonedActor(RestoreActor):
    """Dies on one key, as native code does that meets a bad image, and fails on another, as a bug would."""

    def _restore(self, rows: list[Row], at_once: int) -> list[Row]:
        keys = [row["key"] for row in rows]
        _die_on("restore", keys)
        if "with a bug.png" in keys and not self.work.contained:
            raise RuntimeError("met a bug")
        return super()._restore(rows, at_once)


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


def test_what_kills_its_process_is_found_after_two_deaths_and_the_rest_is_restored(
    tmp_path: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = {
        "kills to read SIGSEGV.png": "killed by SIGSEGV (a fault in native code)",
        "kills to restore SIGKILL.png": "killed by SIGKILL (as the kernel does when memory runs out)",
        "kills to write SIGBUS.png": "killed by SIGBUS",
    }
    names = [f"{i:02d}.png" for i in range(16)] + ["with a bug.png", *deadly]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(encode(Picture(np.full((32, 32, 3), 90, np.uint8), "PNG")))
    job = RestoreJob(source=str(tmp_path / "in"), output=str(tmp_path / "out"))
    recipe = Restorer.load(checkpoint_file).recipe
    work = Work(job.source, None, job.output, (str(checkpoint_file),), recipe, "stored", "cpu", 10**6)
    monkeypatch.setattr(engine, "RestoreActor", PoisonedActor)
    monkeypatch.setattr(engine, "fetch", poisoned_fetch)
    monkeypatch.setattr(engine, "finish", poisoned_finish)
    monkeypatch.setattr(engine, "_BLOCK_ROWS", 4)  # the poison has innocent neighbours
    monkeypatch.setenv("DEATHS", str(tmp_path / "deaths"))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file
    [pairs] = plan(job, recipe.hash, "stored").tables()
    got: list[pa.Table] = []
    done_by = engine.run([pairs.slice(0, 8), pairs.slice(8)], work, Placement(), got.append)
    assert done_by["nodes"] == 1
    rows = pa.concat_tables(got)
    assert Counter(rows["key"].to_pylist()) == Counter(names)  # each exactly once
    ends = dict(zip(rows["key"].to_pylist(), rows["status"].to_pylist(), strict=True))
    assert ends == {**dict.fromkeys(names, "restored"), **dict.fromkeys(deadly, "crashed")}
    reasons = {row["key"]: row["reason"] for row in rows.to_pylist()}
    for key, seen in deadly.items():
        assert f"the process died each time it held this image; when it held no other, it was {seen}" in reasons[key]
    deaths = Counter((tmp_path / "deaths").read_text().splitlines())
    assert all(1 <= deaths[key] <= 2 for key in deadly), deaths


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
    (tmp_path / "in").mkdir()
    for i in range(6):
        # Floats, so that rounding hides nothing; in this size the bits would hang on the number of threads.
        pixels = rng.random((120, 460, 3), dtype=np.float32)
        (tmp_path / "in" / f"{i}.tif").write_bytes(encode(Picture(pixels, "TIFF")))
    recipe = Restorer.load(checkpoint_file, tile="whole", deterministic=True).recipe
    made, workers, threads = [], [], []
    for run, actors in enumerate((1, 4)):
        job = RestoreJob(source=str(tmp_path / "in"), output=str(tmp_path / f"out{run}"))
        work = Work(job.source, None, job.output, (str(checkpoint_file),), recipe, "stored", "cpu", 10**6)
        got: list[pa.Table] = []
        done_by = engine.run(plan(job, recipe.hash, "stored").tables(), work, Placement(four_cpus, actors), got.append)
        rows = pa.concat_tables(got)
        assert Counter(rows["status"].to_pylist()) == {"restored": 6}
        workers.append(len(set(rows["worker"].to_pylist())))
        threads.append(done_by["threads"])
        files = sorted((tmp_path / f"out{run}" / "images").iterdir())
        made.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert threads == [4, 1]
    assert workers[0] == 1
    assert workers[1] > 1
    assert len(made[0]) == 6
    assert made[0] == made[1]


def test_blocks_are_balanced_by_bytes_and_the_largest_image_comes_first() -> None:
    sizes = [*[1000] * 700, 5_000_000, 9_000_000, 5_000_000]
    part = pa.table({"key": [f"{i:03d}" for i in range(len(sizes))], "size": sizes})
    blocks = engine._blocks(part, actors=1, threads=2)
    assert [len(block) for block in blocks] == [1, 1, 175, 175, 175, 175, 1]
    assert pa.concat_tables(blocks)["key"].to_pylist() == ["701", "700", "702", *part["key"].to_pylist()[:700]]
    few = engine._blocks(part.slice(0, 10), actors=2, threads=2)
    assert [len(block) for block in few] == [2] * 5  # something for every actor, and for each of its threads


@pytest.mark.parametrize(
    ("cpus", "gpus", "actors", "gpus_per_actor", "expected"),
    [
        (1, 0, None, 0, (Pool(1, 0.1, 0), 1)),
        (2, 0, None, 0, (Pool(1, 1, 0), 2)),
        (2, 0, 2, 0, (Pool(2, 0.5, 0), 1)),
        (16, 0, None, 0, (Pool(4, 3, 0), 4)),
        (16, 0, 2, 0, (Pool(2, 7, 0), 8)),
        (8, 4, None, 0.5, (Pool(8, 0.8, 0.5), 1)),
        (8, 4, None, 0.6, (Pool(4, 1, 0.6), 1)),
        (8, 4, 2, 1, (Pool(2, 1, 1), 1)),
    ],
)
def test_the_pool_fits_the_cluster(
    cpus: int, gpus: float, actors: int | None, gpus_per_actor: float, expected: tuple[Pool, int]
) -> None:
    assert Cluster(cpus, cpus, gpus, 1, "").pool(actors, gpus_per_actor) == expected


def test_a_pool_that_would_wait_for_ever_is_refused() -> None:
    with pytest.raises(ValueError, match="the cluster has 0 GPUs"):
        Cluster(4, 4, 0, 1, "").pool(None, 1)
    with pytest.raises(ValueError, match="the cluster has 4 CPUs"):
        Cluster(4, 4, 0, 1, "").pool(5, 0)


def test_an_actor_fits_on_one_node() -> None:
    pool, threads = Cluster(cpus=16, node_cpus=8, gpus=0, nodes=2, version="").pool(1, 0)
    assert (pool.cpus, threads) == (7, 8)


def test_actors_share_the_memory_of_their_node() -> None:
    assert this_machine().pool(1, 0)[0].memory_share() == 1
    assert Pool(3, 1, 0).memory_share() == pytest.approx(1 / 3)
    assert Pool(3, 1, 0).memory_share(nodes=2) == 0.5
    assert Pool(8, 1, 0.5).memory_share(nodes=4) == 0.5  # of its GPU's
    assert Pool(2, 1, 2).memory_share() == 1


def test_a_job_that_can_process_nothing_raises_what_it_met(tmp_path: Path, checkpoint_file: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(encode(Picture(np.full((32, 32, 3), 90, np.uint8), "PNG")))
    job = RestoreJob(source=str(tmp_path / "in"), output=str(tmp_path / "out"))
    recipe = Restorer.load(checkpoint_file).recipe
    work = Work(job.source, None, job.output, (str(checkpoint_file),), recipe, "stored", "cpu", 10**6)
    pairs = plan(job, recipe.hash, "stored", place=Store(str(tmp_path / "plan"))).tables()
    (tmp_path / "out").write_bytes(b"a file where the output folder should be")
    with pytest.raises(RuntimeError, match=r"no image could be processed; one met .*writing it"):
        engine.run(pairs, work, Placement(), lambda _: None)
