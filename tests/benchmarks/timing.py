"""How the benchmarks take and show their figures."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table. Seconds; `ratio` above 1 means that ours is faster.

    `floor` is a bound that no implementation on this machine passes (its arithmetic or its memory alone), None where
    none is known; `bar` is the ratio that this project holds itself to.
    """

    what: str
    ours: float
    baseline: float
    ratio: float
    floor: float | None = None
    bar: float | None = None

    def text(self) -> str:
        floor = f"{self.floor:>7.3f} s" if self.floor is not None else f"{'':>9}"
        bar = f"{self.bar:>6.2f}" if self.bar is not None else ""
        return f"{self.what:<62} {self.ours:>7.3f} s {self.baseline:>7.3f} s {self.ratio:>6.2f} {floor} {bar}".rstrip()


HEADER = f"{'what':<62} {'ours':>9} {'baseline':>9} {'ratio':>6} {'floor':>9} {'bar':>6}"


def measure(
    what: str,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    runs: int,
    *,
    floor: float | None = None,
    bar: float | None = None,
) -> Row:
    """Medians of both, taken in turn after a warm-up, so that a machine whose speed drifts slows both."""
    ours(), baseline()
    times = [(clock(ours), clock(baseline)) for _ in range(runs)]
    us, them = (statistics.median(column) for column in zip(*times, strict=True))
    return Row(what, us, them, statistics.median(b / a for a, b in times), floor, bar)


def measure_all(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each call in every round, the calls taking turns after a warm-up."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            seconds[name].append(clock(call))
    return seconds


def compare(
    what: str, ours: list[float], baseline: list[float], *, floor: float | None = None, bar: float | None = None
) -> Row:
    """A row from two columns of `measure_all`; the ratio is the median of the rounds' ratios."""
    ratio = statistics.median(b / a for a, b in zip(ours, baseline, strict=True))
    return Row(what, statistics.median(ours), statistics.median(baseline), ratio, floor, bar)


def clock(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
