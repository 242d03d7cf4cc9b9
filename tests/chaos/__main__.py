"""`make chaos`: kill what can be killed while the real command works, and show that nothing is lost or done twice.

Everything follows from the seed, which is printed with each kill's moment, apart from how fast this machine is.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # of the cluster that commands join

from ray.cluster_utils import Cluster

from tests.chaos.harness import (
    S3,
    Campaign,
    Outcome,
    Place,
    copy_into,
    done_again,
    judge,
    make_collection,
    schedule,
    undisturbed,
)
from tests.chaos.processes import below, kill
from tests.faults import FaultProxy

IMAGES = 200
PROXIED_IMAGES = 500
FAULT_RATE = 0.05  # of requests to the S3 server
_NODE = {"num_cpus": 2, "object_store_memory": 200 * 2**20}
# What is killed where, the first so many of it. Only a killed command is started anew: that takes the most time.
FAULTS = [
    *(("local", "driver"), ("S3", "driver"), ("cluster", "worker node"), ("local", "actor"), ("S3", "S3 server")),
    *(("local", "all its processes"), ("S3", "actor"), ("S3", "all its processes"), ("cluster", "actor")),
    *(("local", "actor"), ("S3", "S3 server"), ("cluster", "worker node"), ("S3", "S3 server"), ("local", "driver")),
    *(("local", "all its processes"), ("cluster", "driver"), ("S3", "actor"), ("S3", "driver"), ("S3", "S3 server")),
    *(("cluster", "worker node"), ("local", "actor"), ("S3", "S3 server"), ("cluster", "worker node")),
]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: a fault in a place.

    Lost and duplicated are those of the place's collection at its end. `redone` images were written again, `most` of
    them after one kill; `seconds` passed, in the mean, from a kill to the next new image or the end.
    """

    fault: str
    times: int
    images: int
    lost: int
    duplicated: int
    redone: int
    most: int | None
    seconds: float

    def text(self) -> str:
        most = "" if self.most is None else self.most
        counts = (self.times, self.images, self.lost, self.duplicated, self.redone, most)
        return columns(self.fault, *counts, f"{self.seconds:.1f}")


def columns(fault: str, *values: object) -> str:
    return f"{fault:<28}" + "".join(f"{value:>{width}}" for value, width in zip(values, _WIDTHS, strict=True))


_WIDTHS = (6, 8, 6, 12, 8, 14, 9)
HEADER = columns("fault", "times", "images", "lost", "duplicated", "redone", "most at once", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of what is killed")
    parser.add_argument("--kills", type=int, default=len(FAULTS), help=f"at most {len(FAULTS)}")
    parser.add_argument("--minutes", type=float, default=12, help="after which nothing more is killed")
    parser.add_argument("--short", action="store_true", help="local files alone, one driver and one actor")
    parser.add_argument("--places", nargs="*", default=[*PLACES, "network"], help="of local, S3, cluster, network")
    options = parser.parse_args()
    faults = [("local", "driver"), ("local", "actor")] if options.short else FAULTS[: options.kills]
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        sys.exit(chaos(Path(folder), faults, options))


def chaos(home: Path, faults: list[tuple[str, str]], options: argparse.Namespace) -> int:
    """Print the table; 1 when anything was lost, duplicated or left over."""
    deadline = time.monotonic() + options.minutes * 60
    os.environ["PREFECT_HOME"] = str(home / "prefect")
    everything, weights = make_collection(home / "all", PROXIED_IMAGES)
    source, _ = make_collection(home / "some", IMAGES)  # the first of them
    log = home / "log"
    quiet = Place("undisturbed", str(everything), str(home / "quiet"), home / "quiet", weights)
    wanted, startup = undisturbed(quiet, log)
    expected = dict(sorted(wanted.items())[:IMAGES])
    print(f"undisturbed: {len(wanted)} images, the first after {startup:.1f} s", flush=True)
    lines, failed = list[Line](), False
    if "network" in options.places and not options.short:
        line, failed = network(home, everything, weights, wanted, options.seed)
        lines.append(line)
    for name in options.places:
        chosen = [fault for place, fault in faults if place == name]
        if not chosen or time.monotonic() > deadline:
            continue
        rng = random.Random(f"{options.seed} {name}")  # noqa: S311 - it is not for secrets
        with PLACES[name](home, source, weights) as (place, what):
            campaign = Campaign(place, log, lambda text: print(text, flush=True), deadline)
            try:
                seconds = campaign.go(schedule(rng, chosen, IMAGES, startup), rng, **what)
                print(f"{name}: green after {seconds:.0f} s", flush=True)
            except (TimeoutError, RuntimeError) as error:
                print(error, flush=True)
                failed = True
            verdict = judge(place, expected)
        print(f"{name}: {verdict.repeated} rows repeat a key", flush=True)
        for kind, keys in (("lost", verdict.lost), ("duplicated", verdict.duplicated)):
            if keys:
                print(f"{name}: {kind}: {', '.join(keys[:10])}")
        for outcome in campaign.outcomes:
            for problem in outcome.problems + done_again(outcome):
                print(f"{name}: after {outcome.fault}: {problem}")
                failed = True
        failed |= bool(verdict.lost or verdict.duplicated)
        lines += table(campaign.outcomes, name, len(expected), len(verdict.lost), len(verdict.duplicated))
    print("\n".join([HEADER, *(line.text() for line in lines)]))
    print(f"{sum(line.times for line in lines if line.most is not None)} kills")
    return failed


def network(home: Path, source: Path, weights: Path, expected: dict[str, bytes], seed: int) -> tuple[Line, bool]:
    """One run through a proxy that breaks requests; its "times" are those."""
    server, began = S3(home / "s3-network"), time.monotonic()
    try:
        copy_into(server.folder / "bucket", source)
        with FaultProxy(f"127.0.0.1:{server.port}", rate=FAULT_RATE, seed=seed) as proxy:
            there = server.environment | {"AWS_ENDPOINT_URL": proxy.url}
            disk = server.folder / "bucket" / "out"
            place = Place("network", "s3://bucket/in", "s3://bucket/out", disk, weights, environment=there)
            campaign = Campaign(place, home / "log", print)
            campaign.go([], random.Random(seed))  # noqa: S311
            verdict = judge(place, expected)
            faults = proxy.counts.total() - proxy.counts["passed"]
            print(f"network: {dict(proxy.counts)}", flush=True)
    finally:
        server.stop()
    lost, duplicated = len(verdict.lost), len(verdict.duplicated)
    seconds = time.monotonic() - began
    line = Line("network faults, S3", faults, len(expected), lost, duplicated, verdict.repeated, None, seconds)
    return line, bool(lost or duplicated)


def table(outcomes: list[Outcome], place: str, images: int, lost: int, duplicated: int) -> list[Line]:
    by_fault: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_fault[outcome.fault].append(outcome)
    lines = []
    for fault, struck in by_fault.items():
        redone = [outcome.redone for outcome in struck]
        seconds = [outcome.seconds for outcome in struck if outcome.seconds is not None]
        mean = sum(seconds) / max(1, len(seconds))
        name = f"{fault}, {place}"
        lines.append(Line(name, len(struck), images, lost, duplicated, sum(redone), max(redone), mean))
    return lines


What = dict[str, object]  # of `Scene` in the harness: what this place has that can be killed


@contextmanager
def local(home: Path, source: Path, weights: Path) -> Iterator[tuple[Place, What]]:
    yield Place("local", str(source), str(home / "local"), home / "local", weights), {}


@contextmanager
def s3(home: Path, source: Path, weights: Path) -> Iterator[tuple[Place, What]]:
    server = S3(home / "s3")
    try:
        copy_into(server.folder / "bucket", source)
        disk = server.folder / "bucket" / "out"
        place = Place("S3", "s3://bucket/in", "s3://bucket/out", disk, weights, environment=server.environment)
        yield place, {"server": server}
    finally:
        server.stop()


@contextmanager
def cluster(home: Path, source: Path, weights: Path) -> Iterator[tuple[Place, What]]:
    """Two nodes, on local files. A node that is lost comes back as another one a little later."""
    nodes = Cluster(initialize_head=True, head_node_args=_NODE)
    try:
        worker = nodes.add_node(**_NODE)

        def lose_node() -> None:
            nonlocal worker
            workers = [one for process in worker.live_processes() for one in below(process[1].pid)]
            nodes.remove_node(worker, allow_graceful=False)
            for one in workers:
                kill(one.pid)
            worker = nodes.add_node(**_NODE)

        options = ("--ray-address", nodes.address, "--actors", "2")
        yield (
            Place("cluster", str(source), str(home / "cluster"), home / "cluster", weights, options),
            {"lose_node": lose_node},
        )
    finally:
        nodes.shutdown()


PLACES: dict[str, Callable[..., object]] = {"local": local, "S3": s3, "cluster": cluster}

main()
