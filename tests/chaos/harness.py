"""Runs of the real command that are killed on their way, and what must hold when the same command has ended green.

Everything is seen from outside: the command, its processes, the files it writes and the report as anyone reads it.
"""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nafnet.images import Picture, UnreadableImage, decode, encode
from nafnet.model import NetConfig
from pipelines.report import read_rows
from pipelines.storage import Store
from tests.chaos.processes import Process, below, kill, marked
from tests.conftest import random_network, save_published

TINY = NetConfig(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,))
SIZES = ((48, 64), (64, 48), (96, 80))  # height and width, px
KEY, SECRET = "CHAOSCHAOSCHAOSKEY00", "chaos-secret-chaos-secret"
MARK = "NAFNET_CHAOS_RUN"
_POLL_SECONDS = 0.05
_ORPHAN_SECONDS = 60.0  # what is left of a killed run ends by itself within these
_RUN_SECONDS = 240.0  # a run that takes longer hangs
_RUNS = 4  # of the same command after the last kill, until it ends green
_BLOCK_IMAGES = 50  # of a block: those of one in flight are written, or not, when what held it is gone
_SAME_WRITE_SECONDS = 0.3  # a server may set the time of a file after it has written it


def make_collection(home: Path, images: int) -> tuple[Path, Path]:
    """A folder of noise images of a few sizes, and the weights of a tiny network."""
    rng = np.random.default_rng(0)
    source = home / "in"
    source.mkdir(parents=True)
    for i in range(images):
        pixels = rng.integers(0, 256, (*SIZES[i % len(SIZES)], 3), dtype=np.uint8)
        (source / f"{i:04d}.png").write_bytes(encode(Picture(pixels, "PNG")))
    return source, save_published(home / "tiny.pth", random_network(TINY))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run reads and writes: URLs, where the output's files lie on this disk, and what the command needs."""

    name: str
    source: str
    output: str
    disk: Path
    weights: Path
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def images(self) -> dict[str, Path]:
        """The images that are there now, by key; a write that was cut off left a name that begins with a dot."""
        folder = self.disk / "images"
        files = (path for path in folder.rglob("*") if path.is_file()) if folder.exists() else iter(())
        return {path.relative_to(folder).as_posix(): path for path in files if not path.name.startswith(".")}

    def keys_in_parts(self) -> Counter[str]:
        """How often each key has a row, over all report parts."""
        parts = (self.disk / "report").rglob("[!.]*.parquet")
        return Counter(key for part in parts for key in pq.read_table(part, columns=["key"])["key"].to_pylist())

    def rows(self) -> list[dict[str, object]]:
        """The report as anyone reads it, one row a key."""
        rows: list[dict[str, object]] = read_rows(Store(str(self.disk))).to_pylist()
        return rows


class Run:
    """One start of the command, as a session of its own, its output in a file."""

    def __init__(self, place: Place, log: Path) -> None:
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        command = [str(Path(sys.executable).with_name("nafnet")), "restore", place.source, place.output]
        options = ["--checkpoint", str(place.weights), *place.options]
        environment = os.environ | place.environment | {name: value, "NO_COLOR": "1"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*command, *options], stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self.log, self.started = log, time.monotonic()

    @property
    def status(self) -> int | None:
        """The exit code, None while it is running."""
        return self.process.poll()

    def family(self) -> list[Process]:
        return below(self.process.pid)

    def wait(self, seconds: float = _RUN_SECONDS) -> int:
        """The exit code. A run that takes longer is killed: TimeoutError, with the end of its log."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            end_all(self.mark)
            raise TimeoutError(f"a run did not end within {seconds:.0f} s:\n{self.log.read_text()[-3000:]}") from None


def end_all(mark: str) -> None:
    """Kill whatever was started under this mark."""
    for one in marked(mark):
        kill(one.pid)


class S3:
    """An S3 server on a folder and a port that stay the same when it is killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bucket").mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.environment = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            # With a range this server sends the checksum of the whole object.
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }
        self.start()

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        rclone = str(Path(sys.executable).with_name("rclone"))
        command = [rclone, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{self.port}"]
        self.process = subprocess.Popen(
            [*command, "--dir-cache-time", "1s", str(self.folder)], stderr=subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(_POLL_SECONDS)
        raise RuntimeError(f"rclone takes no connections on port {self.port}")

    def stop(self) -> None:
        """SIGKILL, and wait until it is gone."""
        kill(self.process.pid)
        self.process.wait()


# What can be killed


class NothingToKill(Exception):  # noqa: N818 - what was found, and no failure
    """The run ended before there was one."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a fault acts on. `rng` decides how long what was killed stays away."""

    run: Run
    rng: random.Random
    server: S3 | None = None
    lose_node: Callable[[], None] | None = None


def kill_driver(scene: Scene) -> None:
    """The command's process alone: it is the driver of Ray and the process of Prefect's flow."""
    kill(scene.run.process.pid)
    scene.run.process.wait()


def kill_group(scene: Scene) -> None:
    """Everything that the command started, at once, as a machine that loses its power."""
    family = scene.run.family()
    kill(scene.run.process.pid)
    for one in family:
        kill(one.pid)
    scene.run.process.wait()


def actors() -> list[Process]:
    """The processes that hold the network, of the run or of the cluster that this process started."""
    found = [one for one in below(os.getpid()) if one.title.startswith("ray::") and "RestoreActor" in one.title]
    return sorted(found, key=lambda one: one.pid)


def kill_actor(scene: Scene) -> None:
    """A process that holds the network, once there is one; a run that finds nothing to do has none."""
    while not (there := actors()) and scene.run.status is None:
        time.sleep(_POLL_SECONDS)
    if not there:
        raise NothingToKill
    kill(scene.rng.choice(there).pid)


def kill_server(scene: Scene) -> None:
    """The S3 server, which comes back after a moment on the same port and folder."""
    assert scene.server is not None
    scene.server.stop()
    time.sleep(scene.rng.uniform(0.1, 2.0))
    scene.server.start()


def kill_node(scene: Scene) -> None:
    """A machine of the cluster: its raylet and all of its workers."""
    assert scene.lose_node is not None
    scene.lose_node()


FAULTS: dict[str, Callable[[Scene], None]] = {
    "driver": kill_driver,
    "all its processes": kill_group,
    "actor": kill_actor,
    "S3 server": kill_server,
    "worker node": kill_node,
}


# One collection, and what happens to it


@dataclass(frozen=True, slots=True)
class Kill:
    """What to kill, and when: once so many images are there (0: from the start of the command), and seconds later."""

    fault: str
    images: int
    delay: float


@dataclass(slots=True)
class Outcome:
    """What one kill came to.

    `images` were there at that moment, `unreported` of them without a row in a report part. `redone` were written
    again after it, and `seconds` later the first new image was there, or the command had ended.
    """

    fault: str
    place: str
    images: int
    unreported: int
    redone: int = 0
    seconds: float | None = None
    problems: list[str] = field(default_factory=list)


def schedule(rng: random.Random, faults: Sequence[str], images: int, startup_seconds: float) -> list[Kill]:
    """The faults at random moments of one collection's way, in the order in which they come.

    One in six comes before the first image: while the command, Prefect or Ray start, or images are listed.
    """
    kills = []
    for fault in faults:
        early = rng.random() < 1 / 6
        after = 0 if early else rng.randrange(1, images)
        kills.append(Kill(fault, after, rng.uniform(0, startup_seconds if early else 0.4)))
    return sorted(kills, key=lambda one: one.images)


class Campaign:
    """One collection's way from the first start of the command to its green end."""

    def __init__(self, place: Place, log: Path, say: Callable[[str], None], deadline: float = float("inf")) -> None:
        """`deadline` (`time.monotonic`) is when nothing more is killed, so that it ends."""
        self.place, self.log, self.say, self.deadline = place, log, say, deadline
        self.outcomes: list[Outcome] = []
        self._marks: list[str] = []
        self._written: dict[str, float] = {}

    def go(
        self,
        kills: Sequence[Kill],
        rng: random.Random,
        server: S3 | None = None,
        lose_node: Callable[[], None] | None = None,
    ) -> float:
        """Start the command, kill what is to be killed, start it again whenever it has ended, until it ends green.

        Returns the seconds that it took.

        Raises:
            TimeoutError: a run hangs.
            RuntimeError: the command does not end green although nothing is killed any more, or something that it
                started is still there a minute later.
        """
        began = time.monotonic()
        try:
            self._until_green(self._through(kills, Scene(self._start(), rng, server, lose_node)))
            seconds = time.monotonic() - began
            if left := leftovers(self._marks):
                raise RuntimeError(f"{self.place.name}: left over: {', '.join(one.title[:80] for one in left)}")
            return seconds
        finally:
            for mark in self._marks:
                end_all(mark)

    def _through(self, kills: Sequence[Kill], scene: Scene) -> Run:
        """The run that is under way, or has ended, after all the kills."""
        run = scene.run
        for one in kills:
            if time.monotonic() > self.deadline:
                break
            if run.status is not None:
                run = self._start()
            self._watch(run, partial(self._are_there, one.images))
            self._watch_for(run, one.delay)
            if run.status is not None:  # it was faster: kill one that finds little to do
                run = self._start()
                self._watch_for(run, one.delay)
            self._strike(one.fault, replace(scene, run=run))
        return run

    def _until_green(self, run: Run) -> None:
        for attempt in range(_RUNS):
            if attempt or run.status is not None:
                run = self._start()
            self._watch(run, lambda: False)
            if run.status == 0:
                return
            self.say(f"{self.place.name}: it ended with {run.status}: once more")
        raise RuntimeError(f"{self.place.name}: not green in {_RUNS} runs:\n{self.log.read_text()[-3000:]}")

    def _start(self) -> Run:
        run = Run(self.place, self.log)
        self._marks.append(run.mark)
        return run

    def _are_there(self, images: int) -> bool:
        return len(self._written) >= images

    def _watch_for(self, run: Run, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._watch(run, lambda: time.monotonic() >= until)

    def _watch(self, run: Run, until: Callable[[], bool]) -> None:
        """Look at what is written until `until`, or until the run has ended."""
        while run.status is None and not until():
            if time.monotonic() - run.started > _RUN_SECONDS:
                run.wait(0)
            self._look()
            time.sleep(_POLL_SECONDS)
        self._look()

    def _look(self) -> None:
        """Notice images that are new, and those that were written again."""
        before, again = len(self._written), 0
        for key, path in self.place.images().items():
            try:
                written = path.stat().st_mtime
            except FileNotFoundError:  # replaced this very moment
                continue
            again += key in self._written and written - self._written[key] > _SAME_WRITE_SECONDS
            self._written[key] = written
        if self.outcomes:
            last = self.outcomes[-1]
            last.redone += again
            if last.seconds is None and len(self._written) > before:
                last.seconds = time.monotonic() - self._struck

    def _strike(self, fault: str, scene: Scene) -> None:
        self._look()
        self._struck = time.monotonic()
        try:
            FAULTS[fault](scene)
        except NothingToKill:
            self.say(f"{self.place.name}: no {fault} to kill")
            return
        there = self.place.images()
        unreported = len(there.keys() - self.place.keys_in_parts().keys())
        outcome = Outcome(fault, self.place.name, len(there), unreported, problems=half_done(self.place))
        self.outcomes.append(outcome)
        self.say(
            f"{self.place.name}: killed {fault} {self._struck - scene.run.started:.1f} s after the command's start: "
            f"{len(there)} images there, {unreported} of them without a row"
        )


def half_done(place: Place) -> list[str]:
    """What must never be seen, at any moment: an image that is there in part, a row whose image is not there."""
    problems, there = [], place.images()
    for key, path in there.items():
        try:
            decode(path.read_bytes())
        except (UnreadableImage, FileNotFoundError) as error:
            problems.append(f"half an image: {key}: {error}")
    for row in place.rows():
        if row["status"] == "restored" and row["key"] not in there:
            problems.append(f"a row without its image: {row['key']}")
    return problems


def done_again(outcome: Outcome) -> list[str]:
    """What is wrong when images with a row were written again: those without one, and a block in flight, may be."""
    allowed = outcome.unreported + _BLOCK_IMAGES
    if outcome.redone <= allowed:
        return []
    return [f"{outcome.redone} images were done again, {outcome.unreported} had no row, {allowed} are allowed"]


def leftovers(marks: Sequence[str]) -> list[Process]:
    """What is still running of these runs after a while, which should have ended by itself. It is killed."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while left := [one for mark in marks for one in marked(mark)] + actors():
        if time.monotonic() > deadline:
            for one in left:
                kill(one.pid)
            return left
        time.sleep(0.5)
    return []


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a finished collection differs from an undisturbed one: keys. `repeated` counts rows beyond one a key."""

    lost: list[str]
    duplicated: list[str]
    repeated: int


def judge(place: Place, expected: dict[str, bytes]) -> Verdict:
    """Compare with the images that an undisturbed run wrote: one row for each, its image the same to the byte.

    An image that no input has counts as duplicated, as does a key that the report has twice.
    """
    rows, there = place.rows(), place.images()
    count = Counter(str(row["key"]) for row in rows)
    restored = {row["key"] for row in rows if row["status"] == "restored"}
    lost = [
        key
        for key, data in expected.items()
        if key not in restored or key not in there or there[key].read_bytes() != data
    ]
    duplicated = [key for key, times in count.items() if times > 1] + sorted((there.keys() | count) - expected.keys())
    parts = place.keys_in_parts()
    return Verdict(lost, duplicated, parts.total() - len(parts))


def undisturbed(place: Place, log: Path) -> tuple[dict[str, bytes], float]:
    """The images of a run that nothing happens to, and the seconds from its start to its first image."""
    began = time.time()
    run = Run(place, log)
    if run.wait() != 0:
        raise RuntimeError(f"the run that nothing happened to failed:\n{log.read_text()[-3000:]}")
    if left := leftovers([run.mark]):
        raise RuntimeError(f"the run that nothing happened to left {', '.join(one.title for one in left)}")
    images = place.images()
    first = min(path.stat().st_mtime for path in images.values())
    return {key: path.read_bytes() for key, path in images.items()}, first - began


def copy_into(bucket: Path, source: Path) -> None:
    """Put the inputs into a bucket that a server shows."""
    shutil.copytree(source, bucket / "in")
