"""One run at a time on an output: a file there says who holds it, and is renewed for as long as that run lives.

A run that was killed leaves its lease behind. It runs out within a minute, and on the machine of its holder it is seen
at once that the process is gone.
"""

import getpass
import json
import logging
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from pipelines.storage import StorageError, Store

logger = logging.getLogger(__name__)

KEY = "lease.json"
_SECONDS = 60.0  # that a lease lasts unless it is renewed
_RENEW_SECONDS = 15.0
_SETTLE_SECONDS = 2.0  # in which another's write, begun at the same moment, is there to be read


class LeaseHeld(StorageError):  # noqa: N818 - it names the state of the place
    """Another run has the output."""


class LeaseLost(StorageError):  # noqa: N818
    """Another run has taken the output over: this one must write nothing more."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The content of the file. `process` names the process for as long as its machine is up, if the system can tell."""

    id: str
    host: str
    pid: int
    process: str | None
    user: str
    run: str
    started_at: datetime
    expires_at: datetime

    @classmethod
    def me(cls, run: str) -> Self:
        now = datetime.now(UTC)
        return cls(
            id=uuid.uuid4().hex,
            host=platform.node(),
            pid=os.getpid(),
            process=_process(os.getpid()),
            user=_user(),
            run=run,
            started_at=now,
            expires_at=now + timedelta(seconds=_SECONDS),
        )

    @property
    def gone(self) -> bool:
        """Whether it has run out, or its process is one of this machine that is no more."""
        if self.expires_at < datetime.now(UTC):
            return True
        here = _machine()
        known = self.process is not None and here is not None and self.process.startswith(here)
        return known and _process(self.pid) != self.process

    def encode(self) -> bytes:
        return json.dumps(asdict(self), default=datetime.isoformat, indent=2).encode() + b"\n"

    def __str__(self) -> str:
        since = self.started_at.isoformat(sep=" ", timespec="seconds")
        return f"{self.run}, process {self.pid} of {self.user} on {self.host}, since {since}"


class Lease:
    """An output that this process holds. Made by `hold`."""

    def __init__(self, output: Store, mine: Holder) -> None:
        self._output, self._mine = output, mine
        self._renewed = time.monotonic()
        self._lost: Holder | None = None
        self._ends = threading.Event()
        self._lock = threading.Lock()

    @property
    def id(self) -> str:
        """What tells this lease from any other."""
        return self._mine.id

    def check(self) -> None:
        """Return if the output is still this run's. To be called before anything is written.

        Raises:
            LeaseLost: another run has it.
        """
        if time.monotonic() - self._renewed > _SECONDS:  # as after an outage or a long sleep
            self._renew()
        if self._lost:
            raise LeaseLost(f"{self._output.url()} was taken over by {self._lost}: this run has stopped writing to it")

    def _renew(self) -> None:
        with self._lock:
            there = read(self._output)
            if there and there.id != self._mine.id:
                self._lost = there
                return
            self._mine = replace(self._mine, expires_at=datetime.now(UTC) + timedelta(seconds=_SECONDS))
            self._output.write(KEY, self._mine.encode())
            self._renewed = time.monotonic()

    def _keep(self) -> None:
        while not self._ends.wait(_RENEW_SECONDS) and not self._lost:
            try:
                self._renew()
            except Exception as error:  # noqa: BLE001 - `check` tries again, and lets the run end if it must
                logger.warning("could not renew the lease on %s: %s", self._output.url(), error)

    def _give_back(self) -> None:
        try:
            there = read(self._output)
            if there and there.id == self._mine.id:
                self._output.delete(KEY)
        except Exception as error:  # noqa: BLE001 - it runs out by itself; what ended the run matters more
            logger.warning("could not give back the lease on %s: %s", self._output.url(), error)


class Follower:
    """Another process that works for the holder of a lease, and stops when that has lost it or given it back."""

    def __init__(self, output: Store, id_: str) -> None:
        self._output, self._id = output, id_
        self._seen = -math.inf

    def check(self) -> None:
        """Return if the lease was there when it was last looked for, a few seconds ago at most.

        Raises:
            LeaseLost: it has ended, or its holder has not renewed it for long.
        """
        if time.monotonic() - self._seen < _RENEW_SECONDS:
            return
        there = read(self._output)
        overdue = there is not None and there.expires_at + timedelta(seconds=_SECONDS) < datetime.now(UTC)
        if there is None or there.id != self._id or overdue:
            raise LeaseLost(f"the run that this works for holds {self._output.url()} no longer: it is over")
        self._seen = time.monotonic()


@contextmanager
def hold(output: Store, run: str) -> Iterator[Lease]:
    """Hold `output` for the time of the block; `run` says in a word or two what for.

    Raises:
        LeaseHeld: another run has it. Says who, since when and until when.
        StorageError: the output cannot be written to.
    """
    lease = Lease(output, _take(output, run))
    keeper = threading.Thread(target=lease._keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        lease._ends.set()
        keeper.join()
        lease._give_back()


def read(output: Store) -> Holder | None:
    """Who holds the output, as the file there says; None when there is none."""
    try:
        content = json.loads(output.read(KEY))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(f"{output.url(KEY)} is no lease ({error}): if no run is under way, delete it") from error
    times = {name: datetime.fromisoformat(content[name]) for name in ("started_at", "expires_at")}
    return Holder(**{**content, **times})


def _take(output: Store, run: str) -> Holder:
    output.check_writable()
    mine = Holder.me(run)
    there = read(output)
    if there and not there.gone:
        raise LeaseHeld(_refusal(output, there))
    try:
        if there:
            output.write(KEY, mine.encode())
        else:
            output.create(KEY, mine.encode())
    except FileExistsError:
        pass  # another was quicker, as is seen below
    if there or not output.is_local:
        time.sleep(_SETTLE_SECONDS)
    winner = read(output)
    if winner is None:
        raise LeaseHeld(f"{output.url()} was in use by another run until just now: run this again")
    if winner.id != mine.id:
        raise LeaseHeld(_refusal(output, winner))
    return mine


def _refusal(output: Store, holder: Holder) -> str:
    until = holder.expires_at.isoformat(sep=" ", timespec="seconds")
    return (
        f"{output.url()} is in use by {holder}: wait for that run to end, or stop it. "
        f"Should it be dead, its lease runs out at {until}: run this again after that"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def _machine() -> str | None:
    """This boot of this machine, and the numbering of its processes: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} "
    except OSError:
        return None


def _process(pid: int) -> str | None:
    """What tells a living process of this machine from any later one of its number; None when there is none."""
    machine = _machine()
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if machine is None or state in {"Z", "X"}:
        return None
    return f"{machine}{pid} {fields[18]}"  # the time it started at, in ticks since boot
