"""The flow on a real Prefect server. The whole path, on a real local Ray: bad images among good ones, resuming, S3."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from prefect import get_client
from prefect.blocks.system import Secret
from prefect.client.schemas import State
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from nafnet import catalog
from nafnet.images import Picture, decode, encode, read_note
from nafnet.model import NetConfig
from nafnet.restore import Restorer
from pipelines import driver, engine, flows, lease, manifest, remote
from pipelines.driver import Order, is_passing
from pipelines.machine import describe_machine
from pipelines.report import read_rows
from pipelines.retry import GaveUp
from pipelines.settings import RestoreJob
from pipelines.stages import Work
from pipelines.storage import StorageError, Store
from tests.conftest import GOPRO_LIKE, SIDD_LIKE, random_network, save_published
from tests.pipelines.conftest import KEY, SECRET

pytestmark = pytest.mark.usefixtures("prefect_server")


def restore(**parameters: Any) -> State[Any]:
    return flows.restore(**parameters, return_state=True)


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in read_rows(Store(str(output))).to_pylist()}


def png(rng: np.random.Generator, height: int = 48, width: int = 64) -> bytes:
    return encode(Picture(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), "PNG"))


def test_bad_images_among_good_ones_then_resume(
    tmp_path: Path, rng: np.random.Generator, checkpoint_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    degraded, reference, output = tmp_path / "in", tmp_path / "ref", tmp_path / "out"
    good = {f"seq/{i}.png": png(rng) for i in range(4)} | {"other/photo one.png": png(rng, 37, 91)}
    whole = png(rng)
    bad = {
        "corrupt.png": whole[:60] + bytes(100) + whole[160:],
        "cut.png": whole[: len(whole) // 2],
        "text.png": b"this is not a picture",
        "empty.png": b"",
        "other size.png": png(rng, 48, 48),
        "no reference.png": whole,
    }
    for key, data in {**good, **bad}.items():
        for folder in (degraded, reference):
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if folder == degraded or key in good else whole)
    (reference / "no reference.png").unlink()
    job = {"source": str(degraded), "output": str(output), "reference": str(reference)}
    job |= {"checkpoint": str(checkpoint_file)}

    state = restore(**job)
    assert state.is_failed()
    assert state.name == flows.INCOMPLETE
    counts = {"restored": 5, "unreadable": 4, "missing": 1, "mismatched": 1}
    assert state.message == ("11 images: 5 restored, 4 unreadable, 1 missing, 1 mismatched (tolerated: 0 not restored)")
    rows = rows_of(output)
    assert set(rows) == {*good, *bad}
    assert Counter(row["status"] for row in rows.values()) == counts
    assert all(row["reason"] for row in rows.values() if row["status"] != "restored")
    written = {str(p.relative_to(output / "images")) for p in (output / "images").rglob("*") if p.is_file()}
    assert written == set(good)
    summary = json.loads((output / "summary.json").read_text())
    assert {k: v for k, v in summary["counts"].items() if v} == counts
    run = json.loads((output / "run.json").read_text())
    assert run["recipe"]["hash"] == rows["seq/0.png"]["recipe"]
    assert run["plan"] == {"matched": 11, "attempted": 10, "finished_before": 0}
    machine = describe_machine()
    assert run["machine"] == machine
    del machine["host"]
    assert run["ray"]["machines"] == [{"count": 1, **machine}]
    assert run["versions"]["torch"] == torch.__version__
    assert set(run["precision"]) >= {"dtype", "tf32", "deterministic"}
    assert (run["inputs"]["images"], len(run["inputs"]["sha256"])) == (11, 64)
    assert run["weights"]["sha256"] == run["recipe"]["steps"][0]["weights"]
    page = (output / "report.html").read_text()
    assert "no reference.png" in page
    assert "5 restored" in page

    before = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}
    with caplog.at_level("INFO"):
        assert restore(**job, max_failed=6).is_completed()
    assert "nothing to do: every image is finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(rows_of(output)) == 11

    assert restore(**job, exclude=tuple(bad)).is_completed()  # what an earlier, wider job could not do is not counted
    assert json.loads((output / "summary.json").read_text())["images"] == 5

    (reference / "no reference.png").write_bytes(whole)
    (degraded / "cut.png").write_bytes(whole)
    (degraded / "seq" / "new.png").write_bytes(whole)
    (reference / "seq" / "new.png").write_bytes(whole)
    restore(**job)
    again = rows_of(output)
    changed = {key for key in again if again[key]["finished_at"] != rows.get(key, {}).get("finished_at")}
    assert changed == {"no reference.png", "cut.png", "seq/new.png"}
    assert {again[key]["status"] for key in changed} == {"restored"}


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("config", "tlc", "sizes"),
    [
        (GOPRO_LIKE, True, [(97, 131), (720, 1280)]),
        (SIDD_LIKE, False, [(131, 97), (256, 256)]),
        (replace(GOPRO_LIKE, activation="gelu", attention="ca", dw_expand=1), False, [(97, 131)]),
        (replace(SIDD_LIKE, activation="gelu", attention="ca"), True, [(400, 500)]),
    ],
    ids=["NAFNet-GoPro", "NAFNet-SIDD", "Baseline-GoPro", "Baseline-SIDD"],
)
def test_checkpoints_in_the_published_format(
    tmp_path: Path, rng: np.random.Generator, config: NetConfig, tlc: bool, sizes: list[tuple[int, int]]
) -> None:
    weights = save_published(tmp_path / "net.pth", random_network(config))
    (tmp_path / "in").mkdir()
    for height, width in sizes:
        (tmp_path / "in" / f"{height}x{width}.png").write_bytes(png(rng, height, width))
    state = restore(source=str(tmp_path / "in"), output=str(tmp_path / "out"), checkpoint=str(weights), tlc=tlc)
    assert state.is_completed(), state.message
    assert len(rows_of(tmp_path / "out")) == len(sizes)
    restorer = Restorer.load(weights, tlc=tlc)
    for height, width in sizes:
        name = f"{height}x{width}.png"
        alone = restorer(decode((tmp_path / "in" / name).read_bytes()).pixels).astype(int)
        written = decode((tmp_path / "out" / "images" / name).read_bytes()).pixels.astype(int)
        assert np.abs(written - alone).max() <= 1  # another number of threads may round the other way
        assert np.mean(written != alone) < 1e-3


@pytest.mark.usefixtures("without_ray")
def test_implausible_results_are_counted_told_and_tried_again(tmp_path: Path, rng: np.random.Generator) -> None:
    """Weights that keep black as it is and throw everything else far away: no bias, and a loud last layer."""
    network = random_network(GOPRO_LIKE)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(network.ending.weight, std=5)
    weights = save_published(tmp_path / "loud.pth", network)
    output = tmp_path / "out"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "black.png").write_bytes(encode(Picture(np.zeros((48, 64, 3), np.uint8), "PNG")))
    for name in ("noise 1.png", "noise 2.png"):
        (tmp_path / "in" / name).write_bytes(png(rng))
    job = {"source": str(tmp_path / "in"), "output": str(output), "checkpoint": str(weights)}

    state = restore(**job)
    assert state.name == flows.INCOMPLETE
    assert state.message == "3 images: 1 restored, 2 suspect (tolerated: 0 not restored)"
    rows = rows_of(output)
    assert {key: row["status"] for key, row in rows.items()} == {
        "black.png": "restored",
        "noise 1.png": "suspect",
        "noise 2.png": "suspect",
    }
    for key in rows:
        restored, degraded = ((folder / key).read_bytes() for folder in (output / "images", tmp_path / "in"))
        np.testing.assert_array_equal(decode(restored).pixels, decode(degraded).pixels)
    assert json.loads((output / "summary.json").read_text())["counts"]["suspect"] == 2
    page = (output / "report.html").read_text()
    assert page.count("over 0.25: these weights may be for another kind of image") == 2
    assert "1 restored, 2 suspect" in page

    assert restore(**job, max_failed=2).is_completed()
    assert rows_of(output) == rows  # nothing was done
    assert restore(**job, max_failed=2, retry_failed=True).is_completed()
    again = rows_of(output)
    changed = {key for key in again if again[key]["finished_at"] != rows[key]["finished_at"]}
    assert changed == {"noise 1.png", "noise 2.png"}


@pytest.mark.usefixtures("without_ray")
def test_a_chain_with_strength_and_self_ensemble(
    tmp_path: Path, rng: np.random.Generator, checkpoint_file: Path
) -> None:
    second = save_published(tmp_path / "second.pth", random_network(SIDD_LIKE, seed=1))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(rng))
    settings = {"strength": 0.5, "self_ensemble": True, "deterministic": True, "tile": "whole"}
    chain = (str(checkpoint_file), str(second))
    state = restore(source=str(tmp_path / "in"), output=str(tmp_path / "out"), checkpoint=chain, **settings)
    assert state.is_completed(), state.message

    degraded = decode((tmp_path / "in" / "a.png").read_bytes()).pixels
    written = (tmp_path / "out" / "images" / "a.png").read_bytes()
    restorer = Restorer.load(*chain, **settings)
    np.testing.assert_array_equal(decode(written).pixels, restorer(degraded))
    for other in ({"strength": 1}, {"self_ensemble": False}):
        assert (restorer(degraded) != Restorer.load(*chain, **{**settings, **other})(degraded)).any()
    assert (restorer(degraded) != Restorer.load(*reversed(chain), **settings)(degraded)).any()

    hashes = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in chain]
    note = read_note(written)
    assert note is not None
    assert note.endswith(f": recipe {restorer.recipe.hash}, weights {'+'.join(hashes)}")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["weights"] == {"checkpoint": list(chain), "sha256": "+".join(hashes)}
    assert [step["weights"] for step in run["recipe"]["steps"]] == hashes
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<dt>steps[1].weights</dt><dd><code>{hashes[1]}" in page


def test_the_convention_is_settled_with_the_checkpoint(tmp_path: Path, checkpoint_file: Path) -> None:
    places = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), "checkpoint": str(checkpoint_file)}
    variant = {"metrics": "mmagic", "crop_border": 4, "y_channel": True}
    for settings, name in (
        ({}, "stored"),
        ({"protocol": "gopro"}, "gopro"),
        ({"protocol": "gopro", "metrics": "basicsr"}, "gopro+basicsr"),
        (variant, "stored+mmagic+y+crop4"),
    ):
        assert flows.prepare(RestoreJob.model_validate({**places, **settings})).protocol == name


@pytest.mark.usefixtures("without_ray")
def test_a_submitted_job_looks_for_weights_where_the_run_had_them(
    tmp_path: Path, rng: np.random.Generator, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that knows no place of its own and has none in its cache."""
    digest = hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    size = checkpoint_file.stat().st_size
    entry = catalog.CatalogEntry("Ours", checkpoint_file.name, GOPRO_LIKE, True, "gopro", digest, size, 30.0, 0.9, 256)
    monkeypatch.setattr(catalog, "CATALOG", {"Ours": entry})
    monkeypatch.setattr(catalog, "MIRRORS", ())
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("NAFNET_WEIGHTS", str(checkpoint_file.parent))

    def follow(_address: str, order: Order, *_: object, **__: object) -> dict[str, Any]:
        monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "there"))
        monkeypatch.delenv("NAFNET_WEIGHTS")
        return driver._run(Store(order.job["output"]), Order(**json.loads(json.dumps(asdict(order)))))

    monkeypatch.setattr(remote, "run", follow)
    monkeypatch.setattr(remote, "reap", lambda *_: None)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(rng))
    places = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    assert restore(**places, checkpoint="Ours", ray_address="http://cluster:8265").is_completed()
    assert (tmp_path / "there" / checkpoint_file.name).exists()


def test_from_bucket_to_bucket(s3_url: str, rng: np.random.Generator, checkpoint_file: Path) -> None:
    source, reference = Store(f"{s3_url}/in"), Store(f"{s3_url}/ref")
    keys = ["a/1.png", "a/2.png", "b c/ü#1.png"]
    for key in keys:
        source.write(key, png(rng))
        reference.write(key, png(rng))
    output = f"{s3_url}/out"
    job = {"source": source.url(), "output": output, "reference": reference.url()}
    state = restore(**job, checkpoint=str(checkpoint_file))
    assert state.is_completed(), state.message
    rows = read_rows(Store(output))
    assert rows["key"].to_pylist() == keys
    assert rows["status"].to_pylist() == ["restored"] * 3
    assert all(Store(output).exists(f"images/{key}") for key in keys)
    kept = [Store(output).read(name) for name in ("run.json", "report.html", "summary.json")]
    secrets = [os.environ["AWS_SECRET_ACCESS_KEY"].encode(), os.environ["AWS_ACCESS_KEY_ID"].encode()]
    assert not any(secret in content for secret in secrets for content in kept)


@pytest.mark.usefixtures("without_ray")
def test_options_of_storage_come_from_a_secret_block(
    s3_address: str,
    s3_folder: Path,
    rng: np.random.Generator,
    checkpoint_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    there = s3_folder / "bucket" / tmp_path.name
    (there / "in").mkdir(parents=True)
    (there / "in" / "1.png").write_bytes(png(rng))
    place = f"s3://bucket/{tmp_path.name}"
    job = {"source": f"{place}/in", "output": f"{place}/out", "storage": "block:lab-storage"}
    with pytest.raises(ValueError, match="no Secret block of this name"):
        flows.load_options("block:lab-storage")
    options = {"s3://": {"endpoint_url": f"http://{s3_address}", "key": KEY, "secret": SECRET}}
    Secret(value=options).save("lab-storage")
    state = restore(**job, checkpoint=str(checkpoint_file))
    assert state.is_completed(), state.message
    assert (there / "out" / "images" / "1.png").exists()
    kept = (there / "out" / "run.json").read_text()
    assert json.loads(kept)["job"]["storage"] == "block:lab-storage"
    assert SECRET not in kept


@pytest.mark.usefixtures("without_ray")
def test_a_run_shows_its_summary_as_artifacts(tmp_path: Path, rng: np.random.Generator, checkpoint_file: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(rng))
    state = restore(source=str(tmp_path / "in"), output=str(tmp_path / "out"), checkpoint=str(checkpoint_file))
    run = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
    by_key = {artifact.key: artifact for artifact in artifacts}
    assert {"summary", "counts", "sheet", "progress", "report"} <= set(by_key)
    assert by_key["progress"].data == 100.0
    counts = {row["what"]: row["value"] for row in json.loads(str(by_key["counts"].data))}
    assert counts["restored"] == 1


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("deployed", [True, False])
def test_a_deployment_tries_a_failing_cluster_again_for_what_is_left(
    tmp_path: Path, rng: np.random.Generator, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch, deployed: bool
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(rng))
    whole, attempts = engine.run, list[list[str]]()

    def failing(
        parts: Iterable[pa.Table], work: Work, place: engine.Placement, on_rows: Callable[[pa.Table], None], **_: Any
    ) -> dict[str, Any]:
        pairs = pa.concat_tables(parts)
        attempts.append(pairs["key"].to_pylist())
        if len(attempts) > 1:
            return whole([pairs], work, place, on_rows)
        whole([pairs.slice(0, 2)], work, place, on_rows)
        raise ConnectionError("the head is gone")

    listed = list[str]()

    def cut_off(job: RestoreJob, *recipe: str) -> manifest.Plan:
        listed.append(job.source)
        if deployed and len(listed) == 1:
            raise GaveUp("9 attempts")
        return plan(job, *recipe)

    plan = manifest.plan
    monkeypatch.setattr(manifest, "plan", cut_off)
    monkeypatch.setattr(engine, "run", failing)
    for task in (flows.plan_images, flows.restore_images):
        monkeypatch.setattr(flows, task.fn.__name__, task.with_options(retry_delay_seconds=0.1))
    monkeypatch.setattr(flows, "deployment", SimpleNamespace(id="a deployment" if deployed else None))
    state = restore(source=str(tmp_path / "in"), output=str(tmp_path / "out"), checkpoint=str(checkpoint_file))
    names = [f"{i}.png" for i in range(5)]
    if not deployed:  # a person sees it at once
        assert (state.is_failed(), attempts) == (True, [names])
        assert "the head is gone" in str(state.message)
        return
    assert state.is_completed(), state.message
    assert attempts == [names, names[2:]]
    assert len(listed) == 2
    assert list(rows_of(tmp_path / "out")) == names
    assert len(read_rows(Store(str(tmp_path / "out")))) == 5


def test_a_place_that_is_not_there_ends_the_run_with_words(tmp_path: Path) -> None:
    state = restore(source=str(tmp_path / "nowhere"), output=str(tmp_path / "out"))
    assert state.is_failed()
    assert f"nothing at {tmp_path}/nowhere" in str(state.message)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("without_ray")
def test_starting_anew_and_a_second_run_at_once(
    tmp_path: Path, rng: np.random.Generator, checkpoint_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "b.png"):
        (source / name).write_bytes(png(rng))
    job = {"source": str(source), "output": str(output), "checkpoint": str(checkpoint_file)}
    with lease.hold(Store(str(output)), "flow run brave-owl"):
        refused = restore(**job)
    assert refused.is_failed()
    assert f"{output} is in use by flow run brave-owl, process {os.getpid()} of" in str(refused.message)
    assert list(output.iterdir()) == []

    assert restore(**job).is_completed()
    first = rows_of(output)
    assert not (output / "lease.json").exists()
    (source / "b.png").unlink()
    with caplog.at_level("INFO"):
        assert restore(**job, fresh=True).is_completed()
    assert "starting anew: earlier rows are moved to report-before/; left as they are: 1 image" in caplog.text
    again = rows_of(output)
    assert set(again) == {"a.png"}
    assert again["a.png"]["finished_at"] > first["a.png"]["finished_at"]
    assert again["a.png"]["digest"] == first["a.png"]["digest"]
    assert (output / "images" / "b.png").exists()


def test_only_what_may_pass_is_tried_again() -> None:
    cut, refused = StorageError("cannot list"), StorageError("there is no such bucket")
    cut.__cause__, refused.__cause__ = GaveUp("9 attempts"), OSError("NoSuchBucket")
    lost = lease.LeaseLost("taken over")
    lost.__cause__ = GaveUp("9 attempts")
    errors = [cut, refused, lost, GaveUp("9 attempts"), ConnectionError(), ValueError()]
    assert [is_passing(error) for error in errors] == [True, False, False, True, True, False]


def test_every_stage_is_told_where_weights_lie(
    tmp_path: Path, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAFNET_WEIGHTS", str(tmp_path))
    job = RestoreJob(source=str(tmp_path / "in"), output=str(tmp_path / "out"), checkpoint=(str(checkpoint_file),))
    assert flows.prepare(job).work(job.source, None).weights_from == str(tmp_path)
