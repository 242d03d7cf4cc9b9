"""The doctor on this machine, which is well, and on what is not."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nafnet.catalog import CATALOG
from pipelines import doctor
from pipelines.cli import app
from pipelines.doctor import Finding, Level
from tests.pipelines.conftest import free_port


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_this_machine_is_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path))
    findings = list(doctor.machine())
    assert not [finding for finding in findings if finding.level is Level.BAD]
    assert {"Python", "packages", "memory", "CPU", "PNG codec", "weights"} <= by_name(findings).keys()
    assert "ray 2." in by_name(findings)["packages"].found


def test_what_is_wrong_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path))
    entry = CATALOG["NAFNet-SIDD-width32"]
    (tmp_path / entry.file).write_bytes(b"cut off")
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["ray<1", "nosuch>=2; extra == 'pipelines'", "other; extra == 'dev'"]
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    found = by_name(list(doctor.machine()))
    assert found["packages"].level is Level.BAD
    assert "is not <1; nosuch is missing" in found["packages"].found
    assert found["weights NAFNet-SIDD-width32"].level is Level.BAD
    assert str(tmp_path / entry.file) in found["weights NAFNet-SIDD-width32"].found
    assert found["disk for temporary files"].level is Level.WARN
    assert all(one.advice for one in found.values() if one.level is not Level.OK)


def test_storage_is_probed_and_left_as_it_was(s3_url: str, tmp_path: Path) -> None:
    for url in (f"{s3_url}/{tmp_path.name}", str(tmp_path / "new")):
        [finding] = doctor.storage(url)
        assert (finding.level, finding.found) == (Level.OK, "can write, read, list, delete")
    assert not [*(tmp_path / "new").iterdir()]
    [finding] = doctor.storage("s3://no-such-bucket/x")
    assert finding.level is Level.BAD
    assert finding.found.startswith("cannot write: ")


def test_the_command_ends_with_one_when_something_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    well = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert well.exit_code == 0, well.output
    assert "Ray: no --ray-address or RAY_ADDRESS: each run starts one of its own" in well.output
    assert f"Prefect: {prefect_server}, version 3." in well.output
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    wrong = CliRunner().invoke(app, ["doctor", str(tmp_path / "file")])
    assert wrong.exit_code == 1
    assert "bad   Ray: " in wrong.output
    assert f"bad   storage {tmp_path}/file: cannot write: " in wrong.output
    assert "-> check the bucket" in wrong.output
