"""What a run shows in Prefect while it goes on and when it has ended: artifacts, events, and a log line for each block.

None of it may end a run: a server that does not answer for a moment is logged.
"""

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, cast
from uuid import UUID

import pyarrow as pa
from prefect.artifacts import (
    Artifact,
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.objects import Artifact as Stored
from prefect.events import emit_event
from prefect.runtime import deployment, flow_run

from pipelines import report, report_html
from pipelines.progress import Progress
from pipelines.records import Status
from pipelines.report_sheet import Strip, sheet_png

logger = logging.getLogger(__name__)
rows_logger = logging.getLogger("pipelines.rows")
"""One line a block and one a failed image, as JSON."""

DEGRADED_DB = 0.1  # by which the mean gain falls from one run of a deployment to the next before it is an event
_UPDATE_SECONDS = 5.0  # each opens a connection
_HISTORY = 100  # runs of a deployment that its history keeps

EventName = Literal["started", "progress", "completed", "degraded"]


@contextmanager
def unimportant() -> Iterator[None]:
    """Log what goes wrong in showing a run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a server or the network does
        logger.warning("could not show the run in Prefect: %s: %s", type(error).__name__, error)


def log_to_prefect() -> None:
    """Let our lines through to a deployment's run: PREFECT_LOGGING_EXTRA_LOGGERS gives handlers, and no level."""
    for name in ("nafnet", "pipelines"):
        if deployment.id and logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.INFO)


def emit(name: EventName, **payload: Any) -> None:
    """The event `restore.<name>` of this flow run, about its deployment where it has one; for automations."""
    related = [{"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}]
    about = f"nafnet.deployment.{deployment.name}" if deployment.id else "nafnet.restore"
    with unimportant():
        emit_event(f"restore.{name}", {"prefect.resource.id": about}, related=related, payload=payload)


class Watch:
    """Keeps a run's progress artifact up to date, every few seconds, and logs its blocks and failures."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._artifact: UUID | None = None
        self._updated = time.monotonic()
        with unimportant():
            artifact = create_progress_artifact(0.0, key="progress", description="Images that have their row")
            self._artifact = cast(UUID, artifact)  # a coroutine only when called from one

    def add(self, rows: pa.Table) -> None:
        """Log rows of a block that came back, and show how far the run is."""
        _log(rows)
        done, total = self._progress.done, self._progress.total
        if done < total and time.monotonic() - self._updated <= _UPDATE_SECONDS:
            return
        self._updated = time.monotonic()
        emit("progress", done=done, total=total, images_per_second=round(self._progress.rate, 3))
        if self._artifact is not None:
            with unimportant():
                update_progress_artifact(self._artifact, progress=100 * done / total)


def _log(rows: pa.Table) -> None:
    if not rows_logger.isEnabledFor(logging.INFO) or not len(rows):
        return
    shown = rows.select(["key", "status", "reason", "seconds", "worker"]).to_pylist()
    block = {
        "images": len(rows),
        "keys": [shown[0]["key"], shown[-1]["key"]],  # the first and the last of them
        "counts": Counter(row["status"] for row in shown),
        "network_seconds": round(sum(row["seconds"] or 0 for row in shown), 3),
        "workers": sorted({row["worker"] for row in shown if row["worker"]}),
    }
    rows_logger.info("block %s", json.dumps(block))
    for row in shown:
        if row["status"] != Status.RESTORED:
            failed = {name: row[name] for name in ("key", "status", "reason", "worker")}
            rows_logger.warning("image %s", json.dumps(failed))


def show_summary(summary: dict[str, Any], page: str, strips: Sequence[Strip]) -> None:
    """The summary as artifacts of the run."""
    create_markdown_artifact(report.summary_markdown(summary), key="summary", description="What the run came to")
    scores = {f"mean {name}": summary[name] for name in report.SCORES if summary[name] is not None}
    table = [{"what": what, "value": round(value, 4)} for what, value in (summary["counts"] | scores).items()]
    create_table_artifact(table, key="counts", description="Images by status, and mean scores")
    if strips:
        sheet = report_html.data_url(sheet_png(strips))
        create_image_artifact(sheet, key="sheet", description="Before, restored and reference")
    show_page("report", page)


def show_page(name: str, page: str) -> None:
    """A link to NAME.html, at a path or a URL."""
    create_link_artifact(page if "://" in page else f"file://{page}", key=name, link_text=f"{name}.html")


def show_history(summary: dict[str, Any]) -> None:
    """Add the run to its deployment's history; the event `restore.degraded` when its mean gain fell."""
    if not deployment.id:
        return
    key = f"history-{re.sub('[^a-z0-9]+', '-', str(deployment.name).lower()).strip('-')}"
    before = cast(Stored | None, Artifact.get(key))  # a coroutine only when called from one
    rows = json.loads(str(before.data)) if before is not None and before.data else []
    run = {
        "run": flow_run.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": summary["images"],
        "restored": summary["counts"][Status.RESTORED],
        "psnr": _rounded(summary["psnr"], 4),
        "gain": _rounded(summary["gain"], 4),
        "megapixels_per_network_second": _rounded(summary["megapixels_per_network_second"], 3),
        "wall_seconds": _rounded(summary["wall_seconds"], 1),
    }
    create_table_artifact([*rows, run][-_HISTORY:], key=key, description="This deployment from run to run")
    last = next((row["gain"] for row in reversed(rows) if row["gain"] is not None), None)
    if last is not None and run["gain"] is not None and last - run["gain"] > DEGRADED_DB:
        logger.warning("the mean gain fell from %.2f to %.2f dB since the last run", last, run["gain"])
        emit("degraded", gain=run["gain"], gain_before=last, threshold=DEGRADED_DB)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
