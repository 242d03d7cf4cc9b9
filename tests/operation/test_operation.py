"""A data team's whole console on one machine: server, worker, two Ray nodes, bucket; a deployment runs, is cancelled
in the middle, and goes on."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra import console as consoles
from infra.console import BIN, Console
from pipelines.report import read_rows
from pipelines.storage import Store
from tests.pipelines.conftest import free_port

IDLE_SECONDS = 30  # after a cancelled run, within which its cluster must be free again


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """Everything that `make up` starts, and a second Ray node."""
    home = tmp_path_factory.mktemp("console")
    home.parent.chmod(0o755)  # PostgreSQL runs as another user
    home.parent.parent.chmod(0o755)
    home.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consoles, "_PORTS", {name: free_port() for name in consoles._PORTS})
        try:
            console = consoles.up(home)
            second = ("--address", console.environment["RAY_ADDRESS"], "--node-ip-address", "127.0.0.1")
            console.start("ray-2", BIN / "ray", "start", "--block", "--disable-usage-stats", "--num-cpus", 2, *second)
            until(lambda: cluster(console)["nodes"] == 2, 60)
            yield console
        finally:
            consoles.down(home)


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


_LOOK = """
import json, ray
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
free, there = ray.available_resources(), ray.cluster_resources()
print(json.dumps({"nodes": len(ray.nodes()), "cpus": there["CPU"], "free": free.get("CPU", 0)}))
"""


def cluster(console: Console) -> dict[str, Any]:
    """What Ray has, and has free, as someone else who joins it sees it."""
    return json.loads(console.run(sys.executable, "-c", _LOOK).splitlines()[-1])


def start(console: Console, name: str, **parameters: Any) -> UUID:
    given = [word for key, value in parameters.items() for word in ("--param", f"{key}={json.dumps(value)}")]
    said = console.run(BIN / "prefect", "deployment", "run", name, *given)
    line = next(line for line in said.splitlines() if "UUID" in line)
    return UUID(line.rpartition(" ")[2].strip())


def ended(client: SyncPrefectClient, run: UUID, seconds: float = 150) -> FlowRun:
    until(lambda: bool((state := client.read_flow_run(run).state) and state.is_final()), seconds)
    return client.read_flow_run(run)


def rows(disk: Path) -> list[dict[str, Any]]:
    """What two reports of the same work have in common."""
    return read_rows(
        Store(str(disk)), ("key", "status", "psnr", "psnr_input", "ssim_3d", "digest", "recipe")
    ).to_pylist()


def test_a_deployment_runs_is_cancelled_and_goes_on(console: Console, client: SyncPrefectClient) -> None:
    bucket = console.home / "s3" / consoles.BUCKET
    # It runs to its end, with what a person sees of it.
    first = ended(client, start(console, "restore/gopro", checkpoint="demo"))
    assert first.state is not None
    assert first.state.is_completed(), first.state.message
    whole = rows(bucket / "restored" / "gopro")
    assert [row["status"] for row in whole] == ["restored"] * 8
    found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[first.id])))
    assert {"progress", "summary", "counts", "sheet", "report", "history-gopro"} <= {one.key for one in found}
    lines = [one.message for one in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[first.id])))]
    assert any(line.startswith("8 images match") for line in lines)
    assert any(line.startswith("block {") for line in lines)
    # A bad parameter is refused before there is a run.
    with pytest.raises(RuntimeError, match="2 is greater than the maximum of 1"):
        start(console, "restore/gopro", strength=2)
    # Cancelled in the middle: the cluster is free again.
    again = {"checkpoint": "demo", "output": "s3://nafnet/restored/again"}
    second = start(console, "restore/gopro", **again)
    images = bucket / "restored" / "again" / "images"
    until(lambda: len([*images.rglob("*.png")]) >= 2, 120)
    console.run(BIN / "prefect", "flow-run", "cancel", second)
    until(lambda: (there := cluster(console))["free"] == there["cpus"], IDLE_SECONDS)
    state = ended(client, second, 60).state
    assert state is not None
    assert state.is_cancelled()
    assert len([*images.rglob("*.png")]) < 8
    # The same run again goes on, and comes to the same.
    third = ended(client, start(console, "restore/gopro", **again))
    assert third.state is not None
    assert third.state.is_completed(), third.state.message
    assert rows(bucket / "restored" / "again") == whole


def test_what_stops_is_gone(console: Console) -> None:
    """Runs last: the servers end with `make down`, and nothing of them stays."""
    pids = [pid for pid, _ in console.pids.values()]
    consoles.down(console.home)
    assert not [one for pid in pids for one in consoles._session(pid)]
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(console.home) not in left
