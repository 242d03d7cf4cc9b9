"""A cluster elsewhere, reached through Ray's Jobs API: the driver runs there, its rows come back through storage."""

import io
import json
import logging
import math
import os
import shlex
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pyarrow as pa
from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.driver import Order, Outcome, outcome_key
from pipelines.engine import TimeLimit
from pipelines.report import part_names, read_parts
from pipelines.storage import Store

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_PATIENCE_SECONDS = 60.0  # with a cluster that does not answer
_STOP_SECONDS = 25.0  # Ray kills a driver that has not ended 3 s after it was asked to
_FLOW_RUN, _OUTPUT = "nafnet_flow_run", "nafnet_output"  # in a job's metadata


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose job it is: a flow run, and the API of the server that knows it ("" for a temporary one)."""

    flow_run: str
    api: str


def is_remote(address: str) -> bool:
    """Whether jobs are submitted to this address, instead of joining a cluster there."""
    return address.startswith(("http://", "https://"))


def run(
    address: str,
    order: Order,
    owner: Owner,
    on_rows: Callable[[pa.Table], None],
    *,
    deadline: float = math.inf,
    storage: str | None = None,
    wheel: str | None = None,
    is_over: Callable[[Owner], bool],
) -> dict[str, Any]:
    """Have a cluster follow the order, and hand rows (`REPORT_SCHEMA`) to `on_rows` as they appear in the output.

    Jobs that a dead run left there are stopped first: those that write to this output, whose lease is ours, and those
    of flow runs that are over. The job's id is that of the flow run. Returns what `engine.run` does.

    Raises:
        ConnectionError: the cluster cannot be reached, or is gone.
        RuntimeError: the job came to no end there; says why.
        TimeLimit: the clock (`time.monotonic`) has come to the deadline.
    """
    output = Store(order.job["output"])
    client = _client(address)
    _reap(client, output.url(), is_over)
    key = f"manifest/order-{uuid4().hex[:12]}.json"
    output.write(key, json.dumps(asdict(order)).encode())
    seen = set(part_names(output))
    command = ["python", "-c", "from pipelines.driver import main; main()", output.url(), key]
    with _unpacked(wheel) as modules:
        job = client.submit_job(
            entrypoint=shlex.join([*command, storage] if storage else command),
            submission_id=_free_id(client, owner),
            metadata={_FLOW_RUN: json.dumps(asdict(owner)), _OUTPUT: output.url()},
            runtime_env={"py_modules": modules} if modules else None,
        )
    logger.info("submitted to %s as %s", address, job)
    try:
        while True:
            status = _patiently(lambda: client.get_job_status(job))  # before the rows: the last ones are not missed
            fresh = [name for name in part_names(output) if name not in seen]
            for rows in read_parts(output, names=fresh):
                on_rows(rows)
            seen.update(fresh)
            if status.is_terminal():
                break
            if time.monotonic() > deadline:
                raise TimeLimit("the time limit was reached: run again to go on")
            time.sleep(_POLL_SECONDS)
    except BaseException:
        _stop(client, job)
        raise
    return _result(client, job, output, key)


def version(address: str) -> str:
    """The version of Ray that the cluster has. Raises ConnectionError where none answers."""
    return _client(address).get_version()


def stop(address: str, flow_run: str) -> None:
    """Stop what a flow run has on the cluster, where it is still there."""
    client = _client(address)
    for job, owner, _ in _ours(client):
        if owner.flow_run == flow_run:
            _stop(client, job)


def _client(address: str) -> JobSubmissionClient:
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS, of another cluster, would win over the argument
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"no Ray Jobs API at {address} ({str(error).partition(chr(10))[0]}): check that the head runs with a "
            "dashboard (ray[default]), the address, and that its port is open to this machine"
        ) from error
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _ours(client: JobSubmissionClient) -> Iterator[tuple[str, Owner, str]]:
    """The jobs of this program that are there and not over: id, owner, output."""
    for job in client.list_jobs():
        known = job.metadata or {}
        if job.submission_id and _FLOW_RUN in known and not job.status.is_terminal():
            yield job.submission_id, Owner(**json.loads(known[_FLOW_RUN])), known.get(_OUTPUT, "")


def _reap(client: JobSubmissionClient, output: str, is_over: Callable[[Owner], bool]) -> None:
    for job, owner, place in _ours(client):
        if place == output or is_over(owner):
            logger.warning("stopping job %s, which a run that is over left on the cluster", job)
            _stop(client, job)


def _free_id(client: JobSubmissionClient, owner: Owner) -> str:
    """restore-<flow run>; with a number when the run is retried, since an id is never free again."""
    taken = {job.submission_id for job in client.list_jobs()}
    name = f"restore-{owner.flow_run}"
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return next(one for one in (name, *numbered) if one not in taken)


@contextmanager
def _unpacked(wheel: str | None) -> Iterator[list[str]]:
    """The packages of a wheel, as folders: Ray would install a wheel with all it depends on, into each job."""
    if wheel is None:
        yield []
        return
    place, _, name = wheel.rpartition("/")
    data = Store(place or ".").read(name)
    with TemporaryDirectory() as folder, zipfile.ZipFile(io.BytesIO(data)) as file:
        file.extractall(folder)
        yield [str(path) for path in Path(folder).iterdir()]


def _patiently(ask: Callable[[], JobStatus]) -> JobStatus:
    began = time.monotonic()
    while True:
        try:
            return ask()
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
            if time.monotonic() - began > _PATIENCE_SECONDS:
                raise ConnectionError(f"the cluster has not answered for {_PATIENCE_SECONDS:.0f} s: {error}") from error
            time.sleep(_POLL_SECONDS)


def _stop(client: JobSubmissionClient, job: str) -> None:
    """Stop a job and wait until it has ended. What goes wrong is logged: the lease ends it, too."""
    try:
        client.stop_job(job)
        deadline = time.monotonic() + _STOP_SECONDS
        while not client.get_job_status(job).is_terminal():
            if time.monotonic() > deadline:
                raise TimeoutError(f"still there after {_STOP_SECONDS:.0f} s")
            time.sleep(0.5)
    except Exception as error:  # noqa: BLE001 - it must not hide what ends the run
        logger.warning("could not stop job %s: %s", job, error)


def _result(client: JobSubmissionClient, job: str, output: Store, key: str) -> dict[str, Any]:
    """What a job that has ended came to. Raises ConnectionError or RuntimeError when it was no good end."""
    place = outcome_key(key)
    if output.exists(place):
        outcome = Outcome(**json.loads(output.read(place)))
        if outcome.cluster is not None:
            return outcome.cluster
        if outcome.passing:
            raise ConnectionError(f"job {job}: {outcome.error}")
        raise RuntimeError(f"job {job}: {outcome.error}")
    info = client.get_job_info(job)
    if info.status == JobStatus.STOPPED:
        raise RuntimeError(f"job {job} was stopped on the cluster: run again to go on")
    raise RuntimeError(f"job {job} {info.status.lower()}: {info.message}")  # with the end of its log
