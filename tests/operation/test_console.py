"""How the processes of a console are stopped."""

import subprocess
import sys

import pytest

from infra import console as consoles
from infra.console import Console


@pytest.fixture
def gone():
    """The pid of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_ends_while_it_is_stopped_is_stopped(tmp_path, monkeypatch, gone):
    console = Console(tmp_path)
    console.start("it", "sleep", "60")
    monkeypatch.setattr(consoles, "_session", lambda leader: [gone, leader])  # as if it had ended since it was seen
    console.stop("it")
    assert not console.running("it")
    monkeypatch.setattr(console, "running", lambda _: True)
    monkeypatch.setattr(consoles, "_STOP_SECONDS", 0)
    console.stop("it")
