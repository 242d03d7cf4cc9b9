"""How far a run is, for whoever watches: a bar in a terminal, else one log line every few seconds."""

import logging
import sys
import time
from collections import Counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)

_LINE_SECONDS = 5.0


class Progress:
    """Counts images by status. A context manager, so that the bar is closed whatever happens."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.counts: Counter[str] = Counter()
        self._started = self._said = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task("restoring", total=total, rate="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def done(self) -> int:
        """Images that have their row."""
        return self.counts.total()

    @property
    def rate(self) -> float:
        """Images a second since the start."""
        return self.done / max(time.monotonic() - self._started, 1e-9)

    def add(self, statuses: Counter[str]) -> None:
        """Count finished images."""
        self.counts += statuses
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate:.2f} images/s{self._failed()}")
        elif time.monotonic() - self._said > _LINE_SECONDS or self.done == self.total:
            self._said = time.monotonic()
            left = (self.total - self.done) / max(self.rate, 1e-9)
            logger.info(
                "%d of %d images, %.2f images/s, %.0f s left%s",
                self.done,
                self.total,
                self.rate,
                left,
                self._failed(),
            )

    def _failed(self) -> str:
        failed = self.done - self.counts["restored"]
        return f", {failed} not restored" if failed else ""


def _bar() -> Bar:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=Console(stderr=True), transient=True)
