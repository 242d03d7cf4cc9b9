"""Real S3 servers for the tests that need object storage: rclone everywhere, Ceph's gateway where it is installed."""

import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.storage import use
from pipelines.storage_options import StorageOptions

KEY, SECRET = "TESTTESTTESTTESTKEY0", "test-secret-test-secret"


@pytest.fixture(autouse=True)
def _no_storage_options() -> Iterator[None]:
    """Options that a test put in force end with it."""
    yield
    use(StorageOptions())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, seconds: float) -> None:
    """Until something listens there. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port} after {seconds} s")


@pytest.fixture(scope="session")
def s3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the S3 server keeps its buckets, as folders."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    return folder


@pytest.fixture(scope="session")
def s3_address(s3_folder: Path) -> Iterator[str]:
    """host:port of an S3 server of our own; credentials reach s3fs through the environment."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    rclone = Path(sys.executable).with_name("rclone")
    command = [rclone, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", address, "--dir-cache-time", "50ms"]
    environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": f"http://{address}"}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1"}
    # With a range this server sends the checksum of the whole object. Set before any client is made: they are kept.
    environment |= {"AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}
    with subprocess.Popen([*command, str(s3_folder)], stderr=subprocess.DEVNULL, start_new_session=True) as server:
        try:
            wait_for(port, 20)
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                yield address
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def s3_url(s3_address: str) -> str:
    """The URL of a bucket on that server."""
    return "s3://bucket"


_CEPH = """[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{port}
mon_initial_members = a
public_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_bind_msgr1 = false
osd_objectstore = memstore
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data_avail_crit = 0
run_dir = {folder}
admin_socket = {folder}/$name.$pid.asok
log_file = {folder}/$name.log
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
"""


@pytest.fixture(scope="session")
def ceph_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of Ceph's S3 gateway on a cluster of one node that keeps all in memory. Same keys as the other."""
    programs = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"Ceph is not installed here: no {', '.join(missing)} (apt-get install radosgw ceph-mon ceph-osd)")
    folder, port, gateway_port = tmp_path_factory.mktemp("ceph"), free_port(), free_port()
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    config = folder / "ceph.conf"
    config.write_text(_CEPH.format(fsid=fsid, port=port, folder=folder))
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    servers: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def serve(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("wb") as out:
            servers.append(subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True))

    cluster = ("-c", str(config))
    try:
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{port}]", f"{folder}/monmap")
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", f"{folder}/monmap", *cluster)
        serve("ceph-mon", "-f", "-i", "a", *cluster)
        run("ceph", "--connect-timeout", "30", *cluster, "osd", "new", osd)
        run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd, *cluster)
        serve("ceph-osd", "-f", "-i", "0", *cluster)
        client = ("-n", "client.rgw", *cluster, "--auth-client-required=none", "--ms-mon-client-mode=crc")
        serve("radosgw", "-f", *client, "--rgw-frontends", f"beast endpoint=127.0.0.1:{gateway_port}")
        user = ("--uid=test", "--display-name=test", f"--access-key={KEY}", f"--secret-key={SECRET}")
        run("radosgw-admin", *client, "user", "create", *user)
        wait_for(gateway_port, 60)
        yield f"http://127.0.0.1:{gateway_port}"
    finally:
        for server in reversed(servers):
            server.kill()
            server.wait()


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stages called one after the other, for tests of what is around them: Ray takes ten seconds a run."""
    from pipelines import engine
    from pipelines.actor import RestoreActor
    from pipelines.stages import Work, fetch, finish

    def run(
        parts: Iterable[pa.Table], work: Work, _placement: object, on_rows: Callable[[pa.Table], None], **_: object
    ) -> dict[str, Any]:
        actor = RestoreActor(work)
        for part in parts:
            for start in range(0, len(part), 4):
                for table in fetch(part.slice(start, 4), work):
                    on_rows(finish(actor(table), work))
        return {}

    monkeypatch.setattr(engine, "run", run)
