"""What is written for machines that are not here, held to the schemas of those that would read it."""

import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prefect.utilities.callables import parameter_schema
from ray.autoscaler._private.util import prepare_config, validate_config

from infra.console import ROOT
from pipelines import flows

INFRA = ROOT / "infra"
BIN = Path(sys.executable).parent
KUBERNETES = "1.31"


def run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_is_clean_and_its_user_is_not_root() -> None:
    run(BIN / "hadolint", INFRA / "Dockerfile")
    users = re.findall(r"^USER (.+)$", (INFRA / "Dockerfile").read_text(), re.M)
    assert users
    assert users[-1] not in {"root", "0"}


def test_the_compose_file_fits_its_schema_and_opens_nothing_but_loopback() -> None:
    run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml")
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of a KubeRay resource, whose own schema no registry has."""
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert all(isinstance(group["rayStartParams"], dict) for group in groups)
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]} for group in groups]


@pytest.mark.parametrize("path", sorted((INFRA / "k8s").glob("*.yaml")), ids=lambda path: path.stem)
def test_kubernetes_files_fit_their_schema_and_run_as_nobody_special(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        own = document["apiVersion"].startswith("ray.io/")
        for one in pods(document) if own else [document]:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
            pod = one["spec"] if own else one["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("path", sorted((INFRA / "ray").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_cluster_launcher_takes_its_file(path: Path) -> None:
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


def test_deployments_name_flows_and_parameters_that_there_are() -> None:
    """Prefect itself passes over a key that it does not know."""
    known = {
        *("name", "description", "entrypoint", "tags", "schedules", "concurrency_limit", "work_pool", "parameters"),
    }
    deployments = yaml.safe_load((INFRA / "prefect.yaml").read_text())["deployments"]
    names = set()
    for deployment in deployments:
        assert set(deployment) <= known
        module, _, name = deployment["entrypoint"].rpartition(".")
        assert module == "pipelines.flows"
        flow = getattr(flows, name)
        names.add(f"{flow.name}/{deployment['name']}")
        flow.validate_parameters(deployment["parameters"])
        assert all(schedule["active"] is False for schedule in deployment["schedules"])
        assert deployment["concurrency_limit"]["collision_strategy"] == "ENQUEUE"
    assert names == {"restore/gopro", "restore/sidd", "restore/reds", "restore/folder", "benchmark/paper"}


def test_a_form_shows_descriptions_choices_bounds_and_defaults() -> None:
    """What Prefect's interface draws a deployment's form from."""
    for flow in (flows.restore, flows.benchmark):
        schema = parameter_schema(flow).model_dump_for_openapi()
        shown = schema["properties"]
        assert not [name for name, one in shown.items() if not one.get("description")]
        given = {name for name, one in signature(flow.fn).parameters.items() if one.default is not one.empty}
        assert given == {name for name, one in shown.items() if "default" in one}
        assert set(schema["required"]) == set(shown) - given
        assert shown["precision"]["enum"] == ["float32", "bf16", "float16"]
        assert {"type": "integer", "minimum": 32} in shown["tile"]["anyOf"]
    assert (shown["gpus_per_actor"]["minimum"], shown["halo"]["default"]) == (0, 192)


def test_the_wheel_alone_holds_what_a_worker_needs(wheel: str, tmp_path: Path) -> None:
    """As on a worker without a checkout: what a deployment names comes from the package, with all that it reads."""
    place = tmp_path / "packages"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, wheel)
    code = (
        "import pipelines.flows, pipelines.report_html, pipelines.compare_html, nafnet\n"
        "for one in (pipelines, nafnet): print(one.__file__)\n"
        "nafnet.Restorer.load('demo')\n"
        "print(sorted(path.name for path in __import__('pathlib').Path(pipelines.__file__).parent.glob('*.j2')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    *packages, templates = done.stdout.splitlines()
    assert packages == [str(place / name / "__init__.py") for name in ("pipelines", "nafnet")]
    assert templates == str(sorted(path.name for path in (ROOT / "pipelines").glob("*.j2")))


def test_waits_between_attempts_double() -> None:
    for task in (flows.plan_images, flows.restore_images):
        assert task.retries == 3
        assert task.retry_delay_seconds == [10, 20, 40]
