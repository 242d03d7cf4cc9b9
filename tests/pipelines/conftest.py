"""A real S3 server for the tests that need object storage."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

KEY, SECRET = "TESTTESTTESTTESTKEY0", "test-secret-test-secret"


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a bucket on an S3 server of our own; credentials reach s3fs through the environment."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    rclone = Path(sys.executable).with_name("rclone")
    command = [rclone, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", address, "--dir-cache-time", "1s"]
    environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": f"http://{address}"}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1"}
    # With a range this server sends the checksum of the whole object. Set before any client is made: they are kept.
    environment |= {"AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}
    with subprocess.Popen([*command, str(folder)], stderr=subprocess.DEVNULL, start_new_session=True) as server:
        try:
            for _ in range(100):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                yield "s3://bucket"
        finally:
            server.terminate()
