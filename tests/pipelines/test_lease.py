"""One run at a time on an output."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines import lease
from pipelines.lease import Follower, Holder, LeaseHeld, LeaseLost, hold, read
from pipelines.storage import StorageError, Store


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "out"))
    return Store(f"{request.getfixturevalue('s3_url')}/{tmp_path.name}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.5)


def elsewhere(**changes: Any) -> Holder:
    """Somebody on another machine."""
    return replace(Holder.me("flow run brave-owl"), host="other", process=None, user="ann", pid=7, **changes)


def test_a_second_run_is_refused_with_who_holds_it_and_until_when(output: Store) -> None:
    with hold(output, "flow run quick-fox"):
        holder = read(output)
        assert holder is not None
        assert (holder.run, holder.pid) == ("flow run quick-fox", os.getpid())
        with pytest.raises(LeaseHeld) as refused, hold(output, "another"):
            pass
        assert read(output) == holder
    words = str(refused.value)
    assert words.startswith(
        f"{output.url()} is in use by flow run quick-fox, process {os.getpid()} of {holder.user} on"
    )
    assert f"since {holder.started_at.isoformat(sep=' ', timespec='seconds')}" in words
    assert f"its lease runs out at {holder.expires_at.isoformat(sep=' ', timespec='seconds')}" in words
    assert read(output) is None
    with hold(output, "afterwards"):
        pass


def test_of_many_at_once_one_wins(output: Store) -> None:
    start, end = threading.Barrier(4), threading.Barrier(4)

    def run(number: int) -> bool:
        store = Store(output.url())
        start.wait()
        try:
            with hold(store, f"run {number}") as held:
                end.wait()
                held.check()
                return True
        except LeaseHeld:
            end.wait()
            return False

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(run, range(4))) == [False, False, False, True]
    assert read(output) is None


def test_of_many_at_once_one_takes_over_what_ran_out(output: Store) -> None:
    output.write(lease.KEY, elsewhere(expires_at=datetime.now(UTC) - timedelta(seconds=1)).encode())
    test_of_many_at_once_one_wins(output)


def test_an_error_within_gives_the_lease_back(output: Store) -> None:
    with pytest.raises(ZeroDivisionError), hold(output, "run"):
        1 / 0
    assert read(output) is None


def test_a_lease_of_another_machine_counts_until_it_runs_out(output: Store) -> None:
    output.write(lease.KEY, elsewhere(expires_at=datetime.now(UTC) + timedelta(seconds=50)).encode())
    with pytest.raises(LeaseHeld, match="in use by flow run brave-owl, process 7 of ann on other"), hold(output, "run"):
        pass
    output.write(lease.KEY, elsewhere(expires_at=datetime.now(UTC) - timedelta(seconds=1)).encode())
    with hold(output, "run"):
        holder = read(output)
        assert holder is not None
        assert holder.run == "run"


HOLDER = """
import sys, time
from pipelines.lease import hold
from pipelines.storage import Store
with hold(Store(sys.argv[1]), "the first"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="the system does not tell one process from another")
def test_a_killed_holder_of_this_machine_is_replaced_at_once(output: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, output.url()], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(LeaseHeld, match=f"in use by the first, process {process.pid} of"), hold(output, "second"):
            pass
        os.kill(process.pid, signal.SIGKILL)
    with hold(output, "second") as held:
        held.check()


def test_a_run_whose_lease_was_taken_stops_and_leaves_it_alone(output: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.05)
    other = elsewhere(expires_at=datetime.now(UTC) + timedelta(seconds=50))
    with hold(output, "run") as held:
        held.check()
        output.write(lease.KEY, other.encode())
        for _ in range(400):
            time.sleep(0.05)
            if held._lost:
                break
        with pytest.raises(LeaseLost, match=r"was taken over by flow run brave-owl.*this run has stopped writing"):
            held.check()
    assert read(output) == other


def test_after_a_pause_longer_than_the_lease_it_is_looked_at_first(
    output: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(output, "run") as held:
        first = read(output)
        monkeypatch.setattr(lease, "_SECONDS", 0)
        held.check()  # still ours: renewed
        second = read(output)
        assert first is not None
        assert second is not None
        assert (second.id, second.expires_at > first.started_at) == (first.id, True)
        output.write(lease.KEY, elsewhere().encode())
        with pytest.raises(LeaseLost):
            held.check()


def test_a_held_lease_is_renewed(output: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.05)
    with hold(output, "run"):
        first = read(output)
        assert first is not None
        for _ in range(400):
            time.sleep(0.05)
            now = read(output)
            assert now is not None
            if now.expires_at > first.expires_at:
                break
    assert now == replace(first, expires_at=now.expires_at)
    assert now.expires_at > first.expires_at


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path: Path, s3_url: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (str(tmp_path / "file"), f"{s3_url}-that-is-not-there/out"):
        with pytest.raises(StorageError, match=r"cannot write to .*: check "), hold(Store(place), "run"):
            pass


def test_what_is_no_lease_is_said(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text("{")
    with pytest.raises(StorageError, match=r"lease\.json is no lease .* delete it"), hold(Store(str(tmp_path)), "run"):
        pass


def test_who_follows_a_lease_stops_when_it_ends(output: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold(output, "flow run quick-fox") as held:
        follower = Follower(output, held.id)
        follower.check()
        with pytest.raises(LeaseLost, match="no longer: it is over"):
            Follower(output, "another").check()
    follower.check()  # it has looked a moment ago
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.0)
    with pytest.raises(LeaseLost):
        follower.check()
    old = elsewhere(expires_at=datetime.now(UTC) - timedelta(seconds=30))
    output.write(lease.KEY, old.encode())
    Follower(output, old.id).check()  # clocks differ, and an outage passes
    output.write(lease.KEY, replace(old, expires_at=old.expires_at - timedelta(seconds=60)).encode())
    with pytest.raises(LeaseLost):
        Follower(output, old.id).check()
