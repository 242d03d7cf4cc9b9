"""Whole runs over a bad network, and with secrets that must not be seen afterwards."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nafnet.images import Picture, decode, encode
from nafnet.restore import Restorer
from pipelines import flows, retry
from pipelines.actor import RestoreActor
from pipelines.check import check
from pipelines.made import make
from pipelines.manifest import plan
from pipelines.report import summarize
from pipelines.settings import RestoreJob
from pipelines.stages import Work, fetch, finish
from pipelines.storage import use
from pipelines.storage_options import StorageOptions
from tests.faults import FaultProxy
from tests.pipelines.conftest import KEY, SECRET


def put_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.full((16, 16, 3), i % 256, np.uint8)
        (folder / f"{i:03d}.png").write_bytes(encode(Picture(pixels, "PNG")))


def test_five_hundred_images_come_through_a_bad_network(
    s3_address: str, s3_folder: Path, tmp_path: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT_SECONDS", 0.02)
    place = s3_folder / "bucket" / tmp_path.name
    put_images(place / "in", 500)
    url = f"s3://bucket/{tmp_path.name}"
    with FaultProxy(s3_address, rate=0.05, seed=11, delay_seconds=0.1) as proxy:
        options = StorageOptions.parse("test", {"s3://": {"endpoint_url": proxy.url}})
        use(options)
        job = RestoreJob(source=f"{url}/in", output=f"{url}/out")
        recipe = Restorer.load(checkpoint_file).recipe
        work = Work(
            source=job.source, reference=None, output=job.output, weights=(str(checkpoint_file),), recipe=recipe,
            protocol="stored", device="cpu", max_pixels=10**6, storage=options,
        )  # fmt: skip
        [pairs] = plan(job, recipe.hash, "stored").tables()
        actor = RestoreActor(work)
        rows = pa.concat_tables([finish(actor(table), work) for table in fetch(pairs, work)])
    faults = {name: count for name, count in proxy.counts.items() if name != "passed"}
    assert len(faults) == 6
    assert rows["key"].to_pylist() == [f"{i:03d}.png" for i in range(500)]
    assert set(rows["status"].to_pylist()) == {"restored"}
    assert 0 < sum(rows["retries"].to_pylist()) <= sum(faults.values())
    assert summarize(rows)["storage_retries"] == sum(rows["retries"].to_pylist())
    for key in rows["key"].to_pylist():
        assert decode((place / "out" / "images" / key).read_bytes()).pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("layout", ["tree", "lmdb"])
def test_a_data_set_is_found_and_checked_over_a_bad_network(
    s3_address: str, s3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT_SECONDS", 0.02)
    place = s3_folder / "bucket" / tmp_path.name
    make("gopro", place, images=4, size=(96, 64), layout=layout)
    want = check("gopro", str(place))
    with FaultProxy(s3_address, rate=0.12, seed=5, delay_seconds=0.1) as proxy:
        use(StorageOptions.parse("test", {"s3://": {"endpoint_url": proxy.url}}))
        found = check("gopro", f"s3://bucket/{tmp_path.name}")
    assert sum(count for name, count in proxy.counts.items() if name != "passed") >= 3
    assert (found.images, found.sizes, found.problems) == (want.images, want.sizes, want.problems)


def test_a_secret_is_in_nothing_that_a_run_leaves(
    s3_address: str,
    s3_folder: Path,
    tmp_path: Path,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of its files, its logs, and what Prefect keeps of it. The environment alone would open nothing."""
    from prefect.client.orchestration import get_client

    caplog.set_level(logging.DEBUG)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    options = {"endpoint_url": f"http://{s3_address}", "key": KEY, "secret": SECRET}
    monkeypatch.setenv("SECRET_STORAGE", json.dumps({"s3://": options}))
    place = s3_folder / "bucket" / tmp_path.name
    put_images(place / "in", 3)
    (place / "in" / "3.png").write_bytes(b"no image")
    url = f"s3://bucket/{tmp_path.name}"
    given: dict[str, Any] = {"source": f"{url}/in", "output": f"{url}/out", "storage": "env:SECRET_STORAGE"}
    state = flows.restore(**given, max_failed=1, return_state=True)
    assert state.is_completed()
    with get_client(sync_client=True) as client:
        (run,) = [one for one in client.read_flow_runs() if one.parameters.get("source") == given["source"]]
        kept = [json.dumps(run.parameters), *(one.message for one in client.read_logs())]
    assert run.parameters["storage"] == "env:SECRET_STORAGE"
    printed = capfd.readouterr()
    seen = [*kept, caplog.text, printed.out, printed.err, repr(state), str(state.message)]
    files = [path for path in place.rglob("*") if path.is_file()]
    for path in files:
        seen.append(path.read_bytes().decode("latin-1"))
        if path.suffix == ".parquet":
            seen.append(str(pq.read_table(path).to_pylist()))
    assert json.loads((place / "out" / "run.json").read_text())["job"]["storage"] == "env:SECRET_STORAGE"
    assert sum(path.parent.name == "images" for path in files) == 3
    assert not [text for text in seen if SECRET in text]
