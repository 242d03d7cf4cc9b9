"""Manifest in, finished rows out: `stages.fetch`, `actor.RestoreActor` and `stages.finish` on Ray Data.

The only module that knows Ray. The driver hands out small blocks of keys and receives rows without pixels. Pixels cross
Ray's object store twice: from fetching to the actors that hold the network, and from there to scoring and writing.
"""

import os

os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives its Ray would start another
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ side writes to stderr past any logger
# Threads of the network that wait for one another spin: on a core that another stage wants, longer than they compute.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Memory that is given back to the system after each image comes back as page faults: 5 to 9 percent of an image's time.
# Blocks above 32 MiB, glibc's largest threshold, still go back at once.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 * 2**20))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(256 * 2**20))
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # in huge pages where Linux has them: 3 to 6 percent
# A process that reads or writes is kept until it is wanted again. Ray ends it after an idle second and starts another,
# again and again: 8 percent of the time of 640 pairs of 1280x720 px with a tiny network.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; unset it warns at each start

import json
import logging
import math
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
)
from ray.util import metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.actor import RestoreActor
from pipelines.isolation import Isolated, ProcessDied
from pipelines.machine import describe_machine
from pipelines.records import MANIFEST_SCHEMA, REPORT_SCHEMA, Status
from pipelines.stages import BLOCK_BYTES, Work, fetch, finish

logger = logging.getLogger(__name__)

PASSING = (ConnectionError, RaySystemError, RayActorError, NodeDiedError, OutOfMemoryError, GetTimeoutError)
"""What a job meets on a cluster that is gone or fails: another attempt may not meet it."""


class TimeLimit(TimeoutError):  # noqa: N818 - it names what was reached
    """The job was to end by now. What came back is kept by whoever got it; the same job again goes on."""


# A block costs 20 to 30 ms. `fetch` cuts it by what it holds decoded, which its encoded size does not tell.
_BLOCK_BYTES = 8 * 2**20  # of encoded images
_BLOCK_ROWS = 256
_BLOCKS_PER_ACTOR = 4  # at least, so that all end at about the same time
_BLOCKS_AT_ONCE = 2  # in an actor, and as many wait there, at which Ray Data lets the pool grow
# CPUs that a task of reading or of writing reserves: other than an actor's, or they would be fused into it, and little,
# so that on few cores two tasks can score while the network waits for images.
_SCARCE = 0.25
TIME_IS_UP = "the time limit was reached: run again to go on"
_LEAST_SHARE = 0.1  # CPUs of an actor on a machine with one
_RETRIES = 0  # of a block whose process died: its images are tried alone; Ray Data would go on for ever
_JUDGED = 8  # images that fail one after the other before the job is taken to be at fault
_TOKEN = secrets.token_hex(32)
# Ray Data's default gives a job what its tasks reserve just now, and of what a node has left only whole CPUs: on two,
# scoring and writing would be held to one task at a time. That is for a cluster that grows, which a Ray of our own
# does not; the older one lets it have all.
_AUTOSCALER = "RAY_DATA_CLUSTER_AUTOSCALER"
_REACH_SECONDS = 10  # for a head to take a connection
_MACHINES_SECONDS = 30  # for the nodes to say what they are
_SETTLE_SECONDS = 3  # in which what a job has just given back counts as free
_WAIT_FOR_ACTORS_SECONDS = 600  # on a busy cluster; then the run ends (GetTimeoutError) instead of waiting for ever
_STAGES = {"fetch_seconds": "fetch", "seconds": "network", "finish_seconds": "finish"}
_STAGE_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]  # bounds of the histogram
_NO_PROGRESS_SECONDS = 6 * 3600  # without a finished block: one of 100 megapixels takes over Ray's 30 minutes at times


@dataclass(frozen=True, slots=True)
class Placement:
    """Where to run and what to ask for. `address` is "local", "auto" or host:port; no `actors` means as many as fit.

    With `max_actors` the pool starts with `actors` and grows to that many as CPUs or GPUs become free and nodes join.
    """

    address: str = "local"
    actors: int | None = None
    max_actors: int | None = None
    gpus_per_actor: float = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """The processes that hold the network: from `actors` to `most`. `cpus` and `gpus` are what each reserves."""

    actors: int
    most: int
    cpus: float
    gpus: float

    def memory_share(self, nodes: int = 1) -> float:
        """What one actor may use of its machine's memory, or of its GPU's."""
        return min(1.0, self.gpus) if self.gpus else 1 / -(-self.most // nodes)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the connected Ray offers. `node_cpus` are those of its largest node, which an actor must fit on.

    `free_cpus` and `free_gpus` are what no other job has reserved.
    """

    cpus: int
    free_cpus: float
    node_cpus: int
    gpus: float
    free_gpus: float
    nodes: int
    version: str

    def pool(self, placement: Placement) -> tuple[Pool, int]:
        """The pool for these wishes, and how many threads each actor's network gets.

        It takes what is free, so that several jobs run beside one another, but never the last CPU: reading, scoring and
        writing need it, of other jobs too, and threads may use it meanwhile.

        Raises:
            ValueError: more is wished for than the cluster has, which would wait for ever.
        """
        wanted, limit, gpus = placement.actors, placement.max_actors, placement.gpus_per_actor
        if gpus > 0:
            if self._gpu_actors(self.gpus, gpus) < (wanted or 1):
                raise ValueError(
                    f"{wanted or 1} actors of {gpus:g} GPUs asked for, the cluster has {self.gpus:g} GPUs: "
                    "lower --actors or --gpus-per-actor (0 restores on CPUs)"
                )
            count = wanted or min(max(1, self._gpu_actors(self.free_gpus, gpus)), limit or sys.maxsize)
            threads = 1
        else:
            free = max(1, int(self.free_cpus))
            count = wanted or min(max(1, free // 4), limit or sys.maxsize)  # more than four threads gain little
            if count > self.cpus:
                raise ValueError(
                    f"{count} actors asked for, the cluster has {self.cpus} CPUs: ask for no more than those"
                )
            threads = max(1, min(free // count, self.node_cpus))
        return Pool(count, limit or count, self._share(count, most=threads), gpus), threads

    @staticmethod
    def _gpu_actors(there: float, each: float) -> int:
        """How many actors these GPUs hold: a fraction of a GPU is always of one."""
        return int(there) * int(1 / each) if each < 1 else int(there / each)

    def _share(self, actors: int, *, most: int) -> float:
        """CPUs that each actor reserves: whole ones, or a fraction of one where they are scarce."""
        share = max(0, int(self.free_cpus) - 1) / actors
        whole = min(int(share), most, max(1, self.node_cpus - 1))
        return float(whole) if whole else max(_LEAST_SHARE, int(share * 10) / 10)


def this_machine() -> Cluster:
    """What a Ray started here by `connect` would offer, without starting it; GPUs are left out."""
    cpus = os.cpu_count() or 1
    return Cluster(cpus, cpus, cpus, gpus=0, free_gpus=0, nodes=1, version=ray.__version__)


@contextmanager
def connect(address: str, *, verbose: bool = False) -> Iterator[Cluster]:
    """Start Ray for this run (`address` "local") or join a cluster, and leave or stop it at the end.

    Raises:
        ConnectionError: nothing listens at the address, or no cluster runs here for "auto".
    """
    _check_there(address)
    level = logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray.data").setLevel(level)
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    kept = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", _AUTOSCALER)}
    if address == "local":  # it listens on the network: a token of its own, which Ray else writes into HOME
        os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)
        os.environ.setdefault(_AUTOSCALER, "V2")
    dashboard = False if address == "local" else None  # None: whatever the cluster that is joined has
    with _stderr_shut(not verbose):
        ray.init(address=address, logging_level=level, log_to_driver=verbose, include_dashboard=dashboard)
    if in_main_thread:  # Ray's own handler aborts the process, where Prefect's cancels the run
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield _look()
    finally:
        ray.shutdown()
        for name, value in kept.items():  # Ray sets the mode, too
            if value is None:
                os.environ.pop(name, None)
        # What it has read of them stays in force: the next cluster, which may ask for no token, could not call back.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _look() -> Cluster:
    """What the connected Ray has and has free, once nothing is on its way to be free: its nodes report now and then."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        there, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        if all(free.get(name, 0) == there.get(name, 0) for name in ("CPU", "GPU")) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    nodes = _nodes()
    return Cluster(
        cpus=int(there.get("CPU", 1)),
        free_cpus=float(free.get("CPU", 0)),
        node_cpus=max((int(node["Resources"]["CPU"]) for node in nodes), default=1),
        gpus=float(there.get("GPU", 0)),
        free_gpus=float(free.get("GPU", 0)),
        nodes=max(1, len(nodes)),
        version=ray.__version__,
    )


def _nodes() -> list[dict[str, Any]]:
    """The connected cluster's nodes that take work: a head, or a driver's node, may have no CPUs."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]  # type: ignore[no-untyped-call]


def _machines() -> Iterator[dict[str, Any]]:
    """What each node of the connected cluster that takes work says of its machine.

    One that leaves meanwhile, or has not answered in time, is left out.
    """
    ask = ray.remote(num_cpus=0, max_retries=0)(describe_machine)
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in _nodes()
    ]
    came, _ = ray.wait(asked, num_returns=len(asked), timeout=_MACHINES_SECONDS)
    for answer in came:
        try:
            facts = ray.get(answer)
        except RayError:
            continue
        yield facts


def _kinds(machines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kinds there are among them, whatever their names, each with its count, the most frequent first."""
    kinds = Counter(
        json.dumps({name: fact for name, fact in machine.items() if name != "host"}) for machine in machines
    )
    return [{"count": count, **json.loads(kind)} for kind, count in kinds.most_common()]


def _check_there(address: str) -> None:
    """Ray itself would try for minutes. Raises ConnectionError."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")  # where there is none, Ray looks for one here and says so at once
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster at {address} ({error.strerror or error}): check that its head runs (ray start --head), "
            "the address, and that its port is open to this machine"
        ) from error


@contextmanager
def _stderr_shut(shut: bool) -> Iterator[None]:
    """Ray's C++ side announces its log level on the process's stderr while it starts; its errors are exceptions."""
    if not shut:
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def run(
    parts: Iterable[pa.Table],
    work: Work,
    placement: Placement,
    on_rows: Callable[[pa.Table], None],
    *,
    deadline: float = math.inf,
    verbose: bool = False,
) -> dict[str, Any]:
    """Restore every pair of every part (`MANIFEST_SCHEMA`) and hand each its row (`REPORT_SCHEMA`) to `on_rows`.

    Exactly one row comes back for every pair. Only one part is held at a time. Rows that a part's first pass lost,
    because a process died or a stage failed on something other than a bad image, are tried again one by one; what
    kills its process again ends as `crashed`. Returns what cluster, pool and threads did it.

    Raises:
        TimeLimit: the clock (`time.monotonic`) has come to the deadline.
        RuntimeError: not one image of a part of several could be processed, each for an error of the job.
        ValueError: the placement asks for more than the cluster has.
    """
    parts = iter(parts)
    lost, whole = MANIFEST_SCHEMA.empty_table(), False
    while True:
        with connect(placement.address, verbose=verbose) as cluster:
            meter = _Meter(work.output)

            def on_counted(rows: pa.Table, meter: _Meter = meter) -> None:
                meter.add(rows)
                on_rows(rows)

            pool, threads = cluster.pool(placement)
            work = replace(work, threads=threads, memory_share=pool.memory_share(cluster.nodes))
            _second_pass(lost, work, pool, on_counted, deadline, whole=whole)
            for part in parts:
                lost = _first_pass(part, work, pool, on_counted, deadline)
                if len(lost):
                    logger.warning(
                        "%d images were lost with their process or to an error; trying each alone", len(lost)
                    )
                    whole = len(lost) == len(part) > 1
                    break  # an actor that was just being restarted would outlive its pass and hold its CPUs for ever
            else:
                machines = _kinds([describe_machine()] if placement.address == "local" else _machines())
                return {**asdict(cluster), "pool": asdict(pool), "threads": threads, "machines": machines}


def _first_pass(
    part: pa.Table, work: Work, pool: Pool, on_rows: Callable[[pa.Table], None], deadline: float
) -> pa.Table:
    """Restore a part in blocks; returns the pairs for which no row came back."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # a lost block is not a lost run: its keys come back in the second pass
    # Ray waits before it starts what it asks the stopwatch in: where the deadline is nearer, it starts without waiting.
    soon = deadline - time.monotonic() < _WAIT_FOR_ACTORS_SECONDS
    context.wait_for_min_actors_s = -1 if soon else _WAIT_FOR_ACTORS_SECONDS
    context.custom_execution_callback_classes = [] if deadline == math.inf else [_stopwatch(deadline)]
    context.execution_no_progress_timeout_s = _NO_PROGRESS_SECONDS
    context.target_max_block_size = BLOCK_BYTES  # `fetch` gives away no less, which Ray would gather otherwise
    with warnings.catch_warnings():
        # max_restarts and max_task_retries go away in Ray 2.64, which is why it is pinned below: nothing replaces them.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        stages = _stages(_blocks(part, pool.most, work.threads), work, pool)
    seen: set[str] = set()
    batches: Iterable[pa.Table] = stages.iter_batches(
        prefetch_batches=0,  # else a block is kept back until the next one is there
        batch_size=None,
        batch_format="pyarrow",
    )
    try:
        for rows in batches:
            fresh = rows.cast(REPORT_SCHEMA).filter(
                pa.array([key not in seen for key in rows["key"].to_pylist()], pa.bool_())
            )
            seen.update(fresh["key"].to_pylist())
            on_rows(fresh)
    except ExecutionTimeoutError:
        if time.monotonic() < deadline:  # nothing came for long
            raise
        raise TimeLimit(TIME_IS_UP) from None
    return part.filter(pa.array([key not in seen for key in part["key"].to_pylist()], pa.bool_()))


def _stopwatch(deadline: float) -> type[ExecutionCallback]:
    """Ends what Ray Data executes at the deadline: it would wait for the next block as long as that takes.

    In Ray's own thread, several times a second. A thread of ours that waited for blocks would still be in Ray's C++
    side when Ray is shut down, which kills the process.
    """

    class Stopwatch(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:  # noqa: ARG002 - Ray's signature
            if time.monotonic() >= deadline:
                raise ExecutionTimeoutError(TIME_IS_UP)

    return Stopwatch


def _second_pass(
    lost: pa.Table, work: Work, pool: Pool, on_rows: Callable[[pa.Table], None], deadline: float, *, whole: bool
) -> None:
    """Each pair alone, in a process of its own. `whole`: a part of which nothing came back.

    Where not one of the first few comes through then, the job is at fault and not its images: raise what they met.
    """
    failed: list[pa.Table] = []
    for rows, died in _each_alone(lost, replace(work, contained=True), pool, deadline):
        failed.append(rows)
        if whole and not died and rows["status"][0].as_py() == Status.CRASHED:
            if len(failed) == min(len(lost), _JUDGED):
                raise RuntimeError(f"no image could be processed; one met {rows['reason'][0].as_py()}")
            continue
        whole = False
        for one in failed:
            on_rows(one)
        failed.clear()


def _each_alone(lost: pa.Table, work: Work, pool: Pool, deadline: float) -> Iterator[tuple[pa.Table, bool]]:
    """Each pair's row, and whether its process died."""
    task = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_retries=0, max_calls=0)(_alone)
    chain = cloudpickle.dumps(_Chain(fetch, RestoreActor, finish, work))  # type: ignore[no-untyped-call]
    under_way: dict[Any, pa.Table] = {}
    singles = (lost.slice(i, 1) for i in range(len(lost)))
    while True:
        under_way |= {task.remote(single, chain): single for single in islice(singles, pool.actors - len(under_way))}
        if not under_way:
            return
        left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        ended, _ = ray.wait(list(under_way), timeout=left)
        if not ended:
            raise TimeLimit(TIME_IS_UP)
        done = ended[0]
        single = under_way.pop(done)
        try:
            rows = ray.get(done)
        except RayTaskError:  # raised by the job's own code
            raise
        except RayError as error:
            rows = str(error).partition("\n")[0]
        yield (_crashed(single, work, rows), True) if isinstance(rows, str) else (rows, False)


def _alone(pairs: pa.Table, chain: bytes) -> pa.Table | str:
    """The rows of `pairs`, or how the process that had them died."""
    try:
        return _isolated(chain)(pairs)
    except ProcessDied as death:
        return str(death)


@lru_cache(maxsize=1)
def _isolated(chain: bytes) -> Isolated:
    """Kept from task to task: it starts in seconds and works in milliseconds."""
    return Isolated(chain)


class _Meter:
    """What came back, as metrics that Ray's agent on the driver's node exports for Prometheus (needs ray[default])."""

    def __init__(self, output: str) -> None:
        def about(
            kind: type[metrics.Counter | metrics.Histogram], name: str, words: str, tag: str, **settings: Any
        ) -> Any:
            metric = kind(f"nafnet_{name}", words, tag_keys=("output", tag), **settings)
            metric.set_default_tags({"output": output})
            return metric

        self._images = about(metrics.Counter, "images", "Images that have their row", "status")
        self._megapixels = about(metrics.Counter, "megapixels", "Size of the images that have their row", "status")
        self._seconds = about(
            metrics.Histogram, "seconds", "Time of one image in a stage", "stage", boundaries=_STAGE_SECONDS
        )

    def add(self, rows: pa.Table) -> None:
        """Count rows in `REPORT_SCHEMA`."""
        for row in rows.select(["status", "height", "width", *_STAGES]).to_pylist():
            self._images.inc(1, {"status": row["status"]})
            if row["height"]:
                self._megapixels.inc(row["height"] * row["width"] / 1e6, {"status": row["status"]})
            for column, stage in _STAGES.items():
                if row[column] is not None:
                    self._seconds.observe(row[column], {"stage": stage})


class _Chain:
    """All stages one after the other in one process."""

    def __init__(
        self,
        fetch: Callable[[pa.Table, Work], Iterable[pa.Table]],
        actor: type[RestoreActor],
        finish: Callable[[pa.Table, Work], pa.Table],
        work: Work,
    ) -> None:
        self._fetch, self._make_actor, self._finish, self._work = fetch, actor, finish, work
        self._actor: RestoreActor | None = None

    def __call__(self, pairs: pa.Table) -> pa.Table:
        self._actor = self._actor or self._make_actor(self._work)
        return pa.concat_tables(self._finish(self._actor(t), self._work) for t in self._fetch(pairs, self._work))


def _stages(blocks: list[pa.Table], work: Work, pool: Pool) -> Dataset:
    return (
        ray.data.from_arrow(blocks)
        .map_batches(
            partial(fetch, work=work),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_SCARCE,
            max_retries=_RETRIES,
        )
        .map_batches_internal(  # the public one wants a number of images with GPUs, and would gather blocks up to it
            RestoreActor,
            fn_constructor_args=(work,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=pool.actors,
                max_size=pool.most,
                initial_size=pool.actors,
                max_concurrent_calls_per_actor=_BLOCKS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        .map_batches(
            partial(finish, work=work),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_SCARCE,
            max_retries=_RETRIES,
        )
    )


def _blocks(part: pa.Table, actors: int, threads: int) -> list[pa.Table]:
    """The part cut into blocks of about equal bytes, few large images or many small ones, the largest first.

    A large image that came last would leave all actors but one idle. A small part has blocks for every actor, with an
    image for every thread of it.
    """
    part = part.sort_by([("size", "descending"), ("key", "ascending")])
    most = max(threads, min(_BLOCK_ROWS, len(part) // (_BLOCKS_PER_ACTOR * actors)))
    blocks, start, size = list[pa.Table](), 0, 0
    for i, file_size in enumerate(part["size"].to_pylist()):
        if i > start and (size + file_size > _BLOCK_BYTES or i - start == most):
            blocks.append(part.slice(start, i - start))
            start, size = i, 0
        size += file_size
    if start < len(part):
        blocks.append(part.slice(start))
    return blocks


def _crashed(pairs: pa.Table, work: Work, seen: str) -> pa.Table:
    reason = (
        f"the process died each time it held this image; when it held no other, {seen}: "
        "restore it by itself with -v to see more, or leave it out with --exclude"
    )
    rows = [
        {
            **{name: row[name] for name in ("key", "source", "reference", "size", "fingerprint")},
            "status": Status.CRASHED,
            "reason": reason,
            "recipe": work.recipe.hash,
            "finished_at": datetime.now(UTC),
        }
        for row in pairs.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=REPORT_SCHEMA)
