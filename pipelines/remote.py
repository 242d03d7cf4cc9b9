"""A cluster elsewhere, reached through Ray's Jobs API: the driver runs there, its rows come back through storage."""

import io
import json
import logging
import math
import os
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pyarrow as pa
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.driver import Order, Outcome, outcome_key
from pipelines.engine import TIME_IS_UP, TimeLimit
from pipelines.report import part_names, read_parts
from pipelines.storage import Store

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_REST = 3  # times as long as looking took: listings grow with the report
_ANSWER_SECONDS = 120  # for one request, of which the longest sends the package
_PATIENCE_SECONDS = 60.0  # with a cluster that does not answer
_STOP_SECONDS = 25.0  # Ray kills a driver that has not ended 3 s after it was asked to
# What sees a run's process die, and stops its job: bare Python until then. It is told the address and the job.
_WATCH = """
import sys
if not sys.stdin.read():
    from pipelines import remote
    remote._stop(remote._client(sys.argv[1]), sys.argv[2])
"""
_FLOW_RUN, _OUTPUT = "nafnet_flow_run", "nafnet_output"  # in a job's metadata


class JobFailed(RuntimeError):  # noqa: N818 - the state that Ray gives it
    """A job that its own error ended, or a person."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose job it is: a flow run, the outermost, and the API of the server that knows it ("" for a temporary one)."""

    flow_run: str
    api: str


class _Client(JobSubmissionClient):
    """Ray's own waits for an answer for ever."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, timeout=_ANSWER_SECONDS, **kwargs)


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
) -> dict[str, Any]:
    """Have a cluster follow the order, and hand rows (`REPORT_SCHEMA`) to `on_rows` as they appear in the output.

    The job's id is that of the flow run. Returns what `engine.run` does.

    Raises:
        ConnectionError: the cluster cannot be reached, or is gone.
        JobFailed: the job came to no end there; says why.
        TimeLimit: the clock (`time.monotonic`) has come to the deadline.
    """
    output = Store(order.job["output"])
    client = _client(address)
    key = f"manifest/order-{uuid4().hex[:12]}.json"
    output.write(key, json.dumps(asdict(order)).encode())
    seen = set(part_names(output))
    command = ["python", "-c", "from pipelines.driver import main; main()", output.url(), key]
    with _answering():
        job = _free_id(client, owner)
    with _stopped_with_this_process(client, address, job):
        with _unpacked(wheel) as modules, _answering():
            client.submit_job(
                entrypoint=shlex.join([*command, storage] if storage else command),
                submission_id=job,
                metadata={_FLOW_RUN: json.dumps(asdict(owner)), _OUTPUT: output.url()},
                runtime_env={"py_modules": modules} if modules else None,
            )
        logger.info("submitted to %s as %s", address, job)
        while True:
            looked = time.monotonic()
            status = _patiently(lambda: client.get_job_status(job))  # before the rows: the last ones are not missed
            fresh = [name for name in part_names(output) if name not in seen]
            for rows in read_parts(output, names=fresh):
                on_rows(rows)
            seen.update(fresh)
            if status.is_terminal():
                break
            if time.monotonic() > deadline:
                raise TimeLimit(TIME_IS_UP)
            time.sleep(max(_POLL_SECONDS, _REST * (time.monotonic() - looked)))
    with _answering():
        return _result(client, job, output, key)


def reap(address: str, output: str, is_over: Callable[[Owner], bool]) -> None:
    """Stop the jobs that dead runs left on a cluster: those that write to this output, whose lease is the caller's, and
    those of flow runs that are over.

    Raises:
        ConnectionError: the cluster cannot be reached, or a job that writes to the output cannot be stopped.
    """
    client = _client(address)
    with _answering():
        ours = list(_ours(client))
    for job, owner, place in ours:
        if place == output:
            logger.warning("stopping job %s, which a run that is over left on the cluster", job)
            if not _stop(client, job):
                raise ConnectionError(f"job {job} writes to {output} and cannot be stopped: stop it on the cluster")
            continue
        try:
            over = is_over(owner)
        except Exception as error:  # noqa: BLE001 - of whoever is asked; the job is another run's matter
            logger.warning("could not tell whether job %s is still wanted: %s", job, error)
            continue
        if over:
            logger.warning("stopping job %s, whose flow run is over", job)
            _stop(client, job)


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
        return _Client(address)
    except AuthenticationError as error:
        raise ValueError(
            f"the cluster at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
    except (OSError, RuntimeError) as error:
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
            owner = json.loads(known[_FLOW_RUN])
            yield job.submission_id, Owner(owner.get("flow_run", ""), owner.get("api", "")), known.get(_OUTPUT, "")


def _free_id(client: JobSubmissionClient, owner: Owner) -> str:
    """restore-<flow run>; with a number when the run is retried, since an id is never free again."""
    taken = {job.submission_id for job in client.list_jobs()}
    name = f"restore-{owner.flow_run}"
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return next(one for one in (name, *numbered) if one not in taken)


@contextmanager
def _stopped_with_this_process(client: JobSubmissionClient, address: str, job: str) -> Iterator[None]:
    """Stop the job when an error ends the block, or when this process is killed: as Prefect does with a terminated
    worker's runs, which then have no moment left. Another process sees that, since their pipe is closed.
    """
    # It uses nothing that may go with this one: a group that signals are sent to, a folder, somebody who reads.
    with Popen(  # noqa: S603
        [sys.executable, "-c", _WATCH, address, job],
        stdin=PIPE,
        stdout=DEVNULL,
        stderr=DEVNULL,
        cwd="/",
        start_new_session=True,
    ) as watch:
        try:
            yield
        except BaseException:
            _stop(client, job)
            raise
        finally:
            watch.communicate(b"over")


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


@contextmanager
def _answering() -> Iterator[None]:
    """What the cluster's own trouble raises in Ray's client, as a ConnectionError."""
    try:
        yield
    except (requests.RequestException, RuntimeError) as error:
        if isinstance(error, JobFailed):
            raise
        raise ConnectionError(f"the cluster's Jobs API failed: {error}") from error


def _patiently(ask: Callable[[], JobStatus]) -> JobStatus:
    began = time.monotonic()
    while True:
        try:
            return ask()
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
            if time.monotonic() - began > _PATIENCE_SECONDS:
                raise ConnectionError(f"the cluster has not answered for {_PATIENCE_SECONDS:.0f} s: {error}") from error
            time.sleep(_POLL_SECONDS)


def _stop(client: JobSubmissionClient, job: str) -> bool:
    """Stop a job and wait until it has ended; whether it has. What goes wrong is logged: the lease ends it, too."""
    try:
        client.stop_job(job)
        deadline = time.monotonic() + _STOP_SECONDS
        while not client.get_job_status(job).is_terminal():
            if time.monotonic() > deadline:
                raise TimeoutError(f"still there after {_STOP_SECONDS:.0f} s")
            time.sleep(0.5)
    except Exception as error:  # noqa: BLE001 - it must not hide what ends the run
        logger.warning("could not stop job %s: %s", job, error)
        return False
    return True


def _result(client: JobSubmissionClient, job: str, output: Store, key: str) -> dict[str, Any]:
    """What a job that has ended came to. Raises ConnectionError or JobFailed when it was no good end."""
    place = outcome_key(key)
    if output.exists(place):
        outcome = Outcome(**json.loads(output.read(place)))
        if outcome.cluster is not None:
            return outcome.cluster
        if outcome.passing:
            raise ConnectionError(f"job {job}: {outcome.error}")
        raise JobFailed(f"job {job}: {outcome.error}")
    info = client.get_job_info(job)
    if info.status == JobStatus.STOPPED:
        raise JobFailed(f"job {job} was stopped on the cluster: run again to go on")
    words = f"job {job} {info.status.lower()}: {info.message}"  # with the end of its log
    if info.driver_exit_code == 1:  # Python's own, as when the package is not there
        raise JobFailed(words)
    raise ConnectionError(words)
