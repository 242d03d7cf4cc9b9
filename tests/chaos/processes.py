"""Processes as Linux shows them, so that exactly one of them can be killed, and none is overlooked afterwards."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """One that was alive when it was looked at. `title` is its command line, which Ray's workers write over."""

    pid: int
    parent: int
    title: str


def processes() -> list[Process]:
    """All that are alive now; those that have ended and wait for their parent are left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if state not in "ZX":
                    found.append(Process(int(folder.name), int(parent), title))
    return found


def below(pid: int) -> list[Process]:
    """Children of `pid` and theirs."""
    everyone, family = processes(), {pid}
    while more := {one.pid for one in everyone if one.parent in family} - family:
        family |= more
    return [one for one in everyone if one.pid in family - {pid}]


def marked(mark: str) -> list[Process]:
    """Those that were started with `mark` in their environment, by whomever, in whatever session."""
    found = []
    for one in processes():
        with suppress(OSError):
            if mark.encode() in Path(f"/proc/{one.pid}/environ").read_bytes():
                found.append(one)
    return found


def kill(pid: int) -> None:
    """SIGKILL, to one that may have ended meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
