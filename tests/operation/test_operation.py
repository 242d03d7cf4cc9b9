"""A data team's whole console on one machine: server, worker, two Ray nodes, bucket. Runs are cancelled, killed, timed
out, submitted elsewhere; each time the cluster is looked at, and the same run again comes to the same."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Crashed
from ray._common.utils import get_default_ray_temp_dir

from infra import console as consoles
from infra.console import BIN, ROOT, Console
from pipelines.report import read_rows
from pipelines.storage import Store
from tests.pipelines.conftest import free_port

IDLE_SECONDS = 30  # after a run was stopped, within which its cluster must be free again
LASTING = {"checkpoint": ["demo", "demo", "demo"]}  # work that does not end while the run is being stopped


@pytest.fixture(scope="module")
def console() -> Iterator[Console]:
    """Everything that `make up` starts, and a second Ray node."""
    # PostgreSQL runs as another user, and each start of pytest shuts others out of its own temporary folders.
    home = Path(tempfile.mkdtemp(prefix="console-"))
    home.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consoles, "_PORTS", {name: free_port() for name in consoles._PORTS})
        try:
            console = consoles.up(home)
            assert ("postgres" in console.pids) == any(Path("/usr/lib/postgresql").glob("*/bin"))  # else SQLite
            second = ("--address", console.environment["RAY_ADDRESS"], "--node-ip-address", "127.0.0.1")
            second += ("--num-cpus", "2", "--dashboard-agent-listen-port", "0")
            console.start("ray-2", BIN / "ray", "start", "--block", "--disable-usage-stats", *second)
            until(lambda: cluster(console)[0] == 2, 60)
            yield console
        finally:
            consoles.down(home)
            shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def client(console: Console) -> Iterator[SyncPrefectClient]:
    url = console.environment["PREFECT_API_URL"]
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client


def until(ready: Callable[[], bool], seconds: float) -> None:
    """Wait until `ready`. Raises TimeoutError."""
    began = time.monotonic()
    while not ready():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.5)


def of_ray(console: Console, path: str) -> Any:
    """What Ray's dashboard answers."""
    headers = {"Authorization": f"Bearer {console.environment['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(f"{jobs_address(console)}{path}", headers=headers)) as answer:
        return json.loads(answer.read())


def cluster(console: Console) -> tuple[int, float, float]:
    """How many nodes Ray has, how many CPUs of them are reserved, and how many there are."""
    found = of_ray(console, "/api/cluster_status")["data"]["clusterStatus"]["loadMetricsReport"]
    return sum(count for _, count in found["nodeTypes"]), *found["usage"]["CPU"]


def idle(console: Console) -> None:
    """Wait until nobody has anything of the cluster."""
    until(lambda: cluster(console)[1] == 0, IDLE_SECONDS)


def jobs_address(console: Console) -> str:
    return f"http://127.0.0.1:{console.ports['dashboard']}"


def jobs(console: Console) -> dict[str, str]:
    """The status of each job that was submitted, by its id."""
    there = of_ray(console, "/api/jobs/")
    return {job["submission_id"]: job["status"] for job in there if job["submission_id"]}


def start(client: SyncPrefectClient, name: str, **parameters: Any) -> UUID:
    return client.create_flow_run_from_deployment(client.read_deployment_by_name(name).id, parameters=parameters).id


def is_final(client: SyncPrefectClient, run: UUID) -> bool:
    state = client.read_flow_run(run).state
    return state is not None and state.is_final()


def ended(client: SyncPrefectClient, run: UUID, seconds: float = 300) -> FlowRun:
    until(lambda: is_final(client, run), seconds)
    return client.read_flow_run(run)


def complete(client: SyncPrefectClient, run: UUID) -> FlowRun:
    found = ended(client, run)
    assert found.state is not None
    assert found.state.is_completed(), found.state.message
    return found


def rows(console: Console, output: str) -> list[dict[str, Any]]:
    """What two reports of the same work have in common."""
    store = Store(str(console.home / "s3" / consoles.BUCKET / "restored" / output))
    return read_rows(store, ("key", "status", "psnr", "psnr_input", "ssim_3d", "digest", "recipe")).to_pylist()


def begun(console: Console, output: str) -> None:
    """Wait until a run is in the middle: it has written images, and not all."""
    images = console.home / "s3" / consoles.BUCKET / "restored" / output / "images"
    until(lambda: len([*images.rglob("*.png")]) >= 2, 300)


def logs(client: SyncPrefectClient, run: UUID) -> list[str]:
    found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])), limit=200)
    return [one.message for one in found]


@pytest.fixture(scope="module")
def whole(console: Console) -> tuple[FlowRun, list[dict[str, Any]]]:
    """A run of restore/gopro to its end, and its rows."""
    url = console.environment["PREFECT_API_URL"]
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        [command] = commands(ROOT / "README.md", "shell")
        execute(console, *command)
        [run] = client.read_flow_runs()
    return run, rows(console, "gopro")


def commands(page: Path, language: str) -> list[tuple[str, str]]:
    """The commands of a page's one block of this language, with what they are said to print."""
    [block] = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)
    return re.findall(r"^\$ (.+)\n((?:[^$].*\n|\n)*)", block, re.M)


def execute(console: Console, command: str, shown: str) -> None:
    environment = {**os.environ, **console.environment}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line in done.stdout for line in shown.splitlines() if line != "..."), done.stdout


Whole = tuple[FlowRun, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def elsewhere(console: Console, wheel: str) -> Whole:
    """A run of lasting work to its end, submitted as a job, and its rows."""
    url = console.environment["PREFECT_API_URL"]
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        run = start(
            client, "restore/gopro", **LASTING, output="s3://nafnet/restored/elsewhere",
            ray_address=jobs_address(console), ray_wheel=wheel,
        )  # fmt: skip
        return complete(client, run), rows(console, "elsewhere")


def test_a_deployment_runs_and_shows_what_it_did(console: Console, client: SyncPrefectClient, whole: Whole) -> None:
    run, made = whole
    assert [row["status"] for row in made] == ["restored"] * 8
    found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])))
    by_key = {one.key: str(one.data) for one in found}
    assert {"progress", "summary", "counts", "sheet", "report", "history-gopro"} <= set(by_key)
    assert {"restored", "mean psnr_input", "mean psnr"} <= {row["what"] for row in json.loads(by_key["counts"])}
    assert [row["images"] for row in json.loads(by_key["history-gopro"])] == [8]
    lines = logs(client, run.id)
    assert any(line.startswith("8 images match") for line in lines)
    assert any(line.startswith("block {") for line in lines)
    kept = ["\n".join(lines).encode(), json.dumps(run.parameters).encode(), *(str(one.data).encode() for one in found)]
    assert not [one for one in kept if any(secret in one for secret in secrets(console))]


def secrets(console: Console) -> list[bytes]:
    """The keys of the storage and of Ray."""
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN")
    return [console.environment[name].encode() for name in names]


def test_bad_parameters_are_refused_before_there_is_a_run(console: Console, client: SyncPrefectClient) -> None:
    with pytest.raises(RuntimeError, match="2 is greater than the maximum of 1"):
        console.run(BIN / "prefect", "deployment", "run", "restore/gopro", "--param", "strength=2")
    deployment = client.read_deployment_by_name("restore/gopro")  # and the form asks for all that is wrong at once
    values = {**deployment.parameters, "strength": 2, "halo": -1, "precision": "int4"}
    asked = {"schema": deployment.parameter_openapi_schema, "values": values}
    said = client.request("POST", "/ui/schemas/validate", json=asked).json()
    assert not said["valid"]
    assert {"strength", "halo", "precision"} <= {one["property"] for one in said["errors"]}


def test_a_cancelled_run_frees_the_cluster_and_goes_on(
    console: Console, client: SyncPrefectClient, elsewhere: Whole
) -> None:
    again = {**LASTING, "output": "s3://nafnet/restored/again"}
    run = start(client, "restore/gopro", **again)
    begun(console, "again")
    console.run(BIN / "prefect", "flow-run", "cancel", run)
    idle(console)
    state = ended(client, run, 60).state
    assert state is not None
    assert state.is_cancelled()
    assert len(rows(console, "again")) < 8
    complete(client, start(client, "restore/gopro", **again))
    assert rows(console, "again") == elsewhere[1]


def test_a_deployment_runs_beside_another(console: Console, client: SyncPrefectClient) -> None:
    """One model beside others, which have the cluster for long: neither waits for the other to end."""
    long = start(
        client, "restore/gopro", **LASTING, self_ensemble=True, output="s3://nafnet/restored/long"
    )  # fmt: skip
    until(lambda: cluster(console)[1] >= 1, 300)
    short = start(
        client, "restore/folder", output="s3://nafnet/restored/short", reference=str(console.home / "photos/original"),
        limit=2,
    )  # fmt: skip
    complete(client, short)
    assert not is_final(client, long)
    client.set_flow_run_state(long, Cancelling())
    idle(console)
    state = ended(client, long, 60).state
    assert state is not None
    assert state.is_cancelled()


def test_a_run_ends_at_its_time_limit(console: Console, client: SyncPrefectClient) -> None:
    late = start(
        client, "restore/gopro", checkpoint="demo", self_ensemble=True, time_limit=20 / 3600,
        output="s3://nafnet/restored/late",
    )  # fmt: skip
    state = ended(client, late).state
    assert state is not None
    assert state.is_failed()
    assert "the time limit was reached: run again to go on" in str(state.message)
    idle(console)
    assert len(rows(console, "late")) < 8


def test_a_cluster_elsewhere_takes_the_work_as_a_job(
    console: Console, client: SyncPrefectClient, elsewhere: Whole
) -> None:
    run, made = elsewhere
    assert [row["status"] for row in made] == ["restored"] * 8
    assert jobs(console)[f"restore-{run.id}"] == "SUCCEEDED"
    log = of_ray(console, f"/api/jobs/restore-{run.id}/logs")["logs"]
    [started] = [line for line in log.splitlines() if line.startswith("nafnet-pipelines ")]
    assert "py_modules_files" in started  # where Ray keeps what comes with a job: it ran the wheel
    assert any(line.startswith("block {") for line in logs(client, run.id))
    idle(console)


def test_a_job_that_a_dead_run_left_is_stopped_by_the_next_and_that_by_cancelling(
    console: Console, client: SyncPrefectClient
) -> None:
    left = {**LASTING, "output": "s3://nafnet/restored/left", "ray_address": jobs_address(console)}
    dead = start(client, "restore/gopro", **left)
    until(lambda: jobs(console).get(f"restore-{dead}") == "RUNNING", 300)
    for pid in [console.pids["worker"][0], *processes_of(dead)]:  # nobody is left who could stop it
        with suppress(ProcessLookupError):  # it may have ended with the worker
            os.kill(pid, signal.SIGKILL)
    assert jobs(console)[f"restore-{dead}"] == "RUNNING"
    client.set_flow_run_state(dead, Crashed(message="its worker is gone"), force=True)  # a deployment runs once
    consoles.worker(console)
    run = start(client, "restore/gopro", **left)
    until(lambda: jobs(console).get(f"restore-{run}") == "RUNNING", 300)
    assert jobs(console)[f"restore-{dead}"] == "STOPPED"
    client.set_flow_run_state(run, Cancelling())
    until(lambda: jobs(console)[f"restore-{run}"] == "STOPPED", IDLE_SECONDS)
    idle(console)
    state = ended(client, run, 60).state
    assert state is not None
    assert state.is_cancelled()


def processes_of(run: UUID) -> list[int]:
    """The processes that execute a flow run."""
    mark = f"PREFECT__FLOW_RUN_ID={run}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def test_the_commands_of_the_page_work(console: Console, whole: Whole) -> None:
    there = commands(ROOT / "infra" / "README.md", "console")
    assert len(there) == 4
    for command in there:
        execute(console, *command)


def test_a_deployment_that_degrades_is_paused_by_the_page_s_automation(
    console: Console, client: SyncPrefectClient
) -> None:
    weaker = start(
        client, "restore/folder", output="s3://nafnet/restored/weaker", reference=str(console.home / "photos/original"),
        limit=2, strength=0.2,
    )  # fmt: skip
    complete(client, weaker)
    until(lambda: client.read_deployment_by_name("restore/folder").paused, 30)
    told = {"restore.started", "restore.progress", "restore.completed", "restore.degraded"}
    until(lambda: told <= events(console), 60)  # automations hear of them before the server has stored them


def events(console: Console) -> set[str]:
    """The names of the latest events that the server knows."""
    body = json.dumps({"limit": 50, "filter": {"event": {"prefix": ["restore."]}}}).encode()
    request = urllib.request.Request(
        f"{console.environment['PREFECT_API_URL']}/events/filter", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return {event["event"] for event in json.loads(answer.read())["events"]}


@pytest.mark.parametrize("submitted", [False, True], ids=["joined", "submitted"])
def test_a_worker_that_is_terminated_leaves_nothing_running_and_its_run_goes_on(
    console: Console, client: SyncPrefectClient, elsewhere: Whole, submitted: bool
) -> None:
    output = f"ending-{submitted}"
    ending = {**LASTING, "output": f"s3://nafnet/restored/{output}"}
    if submitted:
        ending["ray_address"] = jobs_address(console)
    run = start(client, "restore/gopro", **ending)
    begun(console, output)
    os.kill(console.pids["worker"][0], signal.SIGTERM)
    if submitted:
        until(lambda: jobs(console)[f"restore-{run}"] == "STOPPED", IDLE_SECONDS)
    idle(console)
    until(lambda: not console.running("worker"), IDLE_SECONDS)
    until(lambda: not processes_of(run), IDLE_SECONDS)
    assert len(rows(console, output)) < 8
    client.set_flow_run_state(run, Crashed(message="its worker is gone"), force=True)  # or wait five minutes
    consoles.worker(console)
    complete(client, start(client, "restore/gopro", **ending))
    assert rows(console, output) == elsewhere[1]


def test_what_stops_is_gone(console: Console) -> None:
    """Runs last: the servers end with `make down`, and nothing of them stays; no file that they wrote tells a key."""
    pids = [pid for pid, _ in console.pids.values()]
    [session] = Path(get_default_ray_temp_dir()).glob(f"session_*_{console.pids['ray'][0]}")
    consoles.down(console.home)
    assert not [one for pid in pids for one in consoles._session(pid)]
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(console.home) not in left
    drivers = [*session.glob("logs/job-driver-restore-*.log")]  # of the jobs that were submitted
    assert len(drivers) >= 2
    files = [*(session / "logs").rglob("*"), *(console.home / "s3").rglob("*"), *console.home.glob("*.log")]
    assert not [file for file in files if file.is_file() and holds(file, secrets(console))]


def holds(file: Path, secrets: list[bytes]) -> bool:
    content = file.read_bytes()
    return any(secret in content for secret in secrets)
