"""What the commands share: clear errors, few lines on the terminal, a validated job."""

import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Storage = Annotated[
    str | None,
    typer.Option(
        metavar="env:VARIABLE|file:PATH|block:NAME",
        help="Where options of file systems (endpoint, keys) are kept: JSON in the environment, a .json or .toml file, "
        "a Prefect Secret. Default: the environment alone (AWS_*).",
    ),
]

RayAddress = Annotated[
    str,
    typer.Option(
        help="'local' starts Ray for this run; 'auto' or host:port joins a cluster; http://host:8265 submits the work "
        "to one as a job."
    ),
]


def use_storage(name: str | None) -> None:
    """Open file systems with the options kept at `name`. Raises ValueError or StorageError when they are no good."""
    from pipelines.storage import use
    from pipelines.storage_options import load

    if name is not None and name.startswith("block:"):
        from pipelines.flows import load_options as load
    use(load(name))


def job_of(given: dict[str, Any]) -> Any:
    """A validated `RestoreJob`. Raises ValueError that names every wrong option."""
    from pydantic import ValidationError

    from pipelines.settings import RestoreJob

    try:
        return RestoreJob.model_validate(given)
    except ValidationError as error:
        raise ValueError(words_of(error)) from error


def words_of(error: Any) -> str:
    """All of pydantic's complaints, by the names of options, a line each."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        name = ".".join(str(part) for part in problem["loc"])
        option = f"--{name.replace('_', '-')}: " if name and name not in {"source", "output"} else f"{name}: "
        lines.append((option if name else "") + problem["msg"].removeprefix("Value error, "))
    return "\n        ".join(lines)


@contextmanager
def clear_errors(code: int = 2) -> Iterator[None]:
    """What a person can mend is one message and an exit code, and a traceback only with -v."""
    expected: tuple[type[Exception], ...] = (ValueError, OSError)  # CheckpointError is a ValueError
    try:
        from pipelines.report import ReportError
        from pipelines.storage import StorageError

        expected += (StorageError, ReportError)
    except ModuleNotFoundError:
        pass  # the model library alone: no storage, no storage errors
    try:
        yield
    except expected as error:
        logging.getLogger(__name__).debug("where it was raised", exc_info=error)
        fail(str(error), code=code)


def fail(message: str, *, code: int = 2) -> None:
    """End the command with a message on stderr."""
    print(f"nafnet: {message}", file=sys.stderr)
    raise typer.Exit(code)


def end_early(state: Any) -> None:
    """End with what stopped a flow: a message for what a person can mend, a traceback for the rest."""
    error = state.result(raise_on_failure=False)
    with clear_errors(code=1):
        if isinstance(error, BaseException):
            raise error
    fail(f"the run ended early: {state.message}", code=1)


def quiet(verbose: bool) -> None:
    """Our own lines to stderr; Ray's and Prefect's only when asked for. Must come before Prefect is imported."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("nafnet", "pipelines"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).propagate = False  # Prefect's root handler would say it again
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("pipelines.rows").setLevel(logging.INFO if verbose else logging.CRITICAL)  # in the report, too
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # Its temporary server takes longer than its default of 20 s on a busy machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    if verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "warning")
    else:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")


def end_together() -> None:
    """Let what this command starts end with it, after a SIGKILL too: Prefect's temporary server would run for ever.

    A shell waits until this process is gone, and ends whatever has the mark in its environment. That is looked up in
    /proc: nothing is found where there is none.
    """
    mark = f"NAFNET_COMMAND={uuid.uuid4().hex}"
    ours, _theirs = os.pipe()  # the other end stays open for as long as this process lives
    script = 'read -r _; for one in /proc/[0-9]*; do grep -qsxz "$0" "$one/environ" && kill "${one#/proc/}"; done'
    subprocess.Popen(  # noqa: S603
        ["sh", "-c", script, mark],  # noqa: S607
        stdin=ours,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(ours)
    name, _, value = mark.partition("=")
    os.environ[name] = value
