"""`nafnet doctor`: what is wrong on this machine, and what to do."""

import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from pipelines.cli_common import Storage, clear_errors, end_together, quiet, use_storage


def doctor(
    urls: Annotated[
        list[str] | None, typer.Argument(metavar="[URL]...", help="Prefixes that a run would read and write.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster to reach: 'auto', host:port or http://host:8265; 'local' starts one. "
            "Default: that of RAY_ADDRESS."
        ),
    ] = None,
    storage: Storage = None,
) -> None:
    """Check Python, packages, memory, disk, devices, codecs, weights, Prefect, Ray, and storage at each URL.

    At a URL a small object is written, read, listed and deleted. Ends with 1 when something would stop a run.
    """
    quiet(verbose=False)
    end_together()
    from pipelines import doctor as checks
    from pipelines.doctor import Finding, Level

    def findings() -> Iterator[Finding]:
        yield from checks.machine()
        yield _prefect()
        yield _ray(ray_address or os.environ.get("RAY_ADDRESS"))
        for url in urls or ():
            yield from checks.storage(url)

    bad = 0
    with clear_errors():
        use_storage(storage)
        for finding in findings():
            print(f"{finding.level:<5} {finding.what}: {finding.found}", flush=True)
            if finding.advice:
                print(f"      -> {finding.advice}", flush=True)
            bad += finding.level is Level.BAD
    if bad:
        raise typer.Exit(1)


def _prefect() -> Any:
    from pipelines import flows
    from pipelines.doctor import Finding, Level

    try:
        where = flows.reach_server()
    except Exception as error:  # noqa: BLE001 - whatever a server or the network does
        advice = "start it (prefect server start), or unset PREFECT_API_URL: each run then starts one of its own"
        return Finding("Prefect", Level.BAD, f"{type(error).__name__}: {error}", advice)
    return Finding("Prefect", Level.OK, where or "no PREFECT_API_URL: each run starts a server of its own")


def _ray(address: str | None) -> Any:
    from pipelines import engine, remote
    from pipelines.doctor import Finding, Level

    if address is None:
        return Finding("Ray", Level.OK, "no --ray-address or RAY_ADDRESS: each run starts one of its own")
    try:
        if remote.is_remote(address):
            return Finding("Ray", Level.OK, f"takes jobs, Ray {remote.version(address)}")
        with engine.connect(address) as cluster:
            found = f"{cluster.nodes} nodes, {cluster.cpus} CPUs, {cluster.gpus:g} GPUs, Ray {cluster.version}"
            return Finding("Ray", Level.OK, found)
    except Exception as error:  # noqa: BLE001 - Ray raises many
        advice = "check that the head runs, that its port is open, and that versions of Ray and Python agree"
        return Finding("Ray", Level.BAD, f"{address}: {error}", advice)
