"""A function that kills its process, and the one that calls it."""

import os
import signal

import pytest
from ray import cloudpickle

from pipelines.isolation import Isolated, ProcessDied


def test_a_process_that_dies_is_told_of_and_replaced() -> None:
    calls: list[object] = []

    def work(order: object) -> object:
        calls.append(order)
        if isinstance(order, signal.Signals):
            os.kill(os.getpid(), order)
        if order == "raise":
            raise ValueError("no")
        if order == "exit":
            os._exit(3)
        return len(calls), os.getpid()

    isolated = Isolated(cloudpickle.dumps(work))
    count, pid = isolated("first")
    assert (count, pid != os.getpid()) == (1, True)
    with pytest.raises(ValueError, match="no"):
        isolated("raise")
    assert isolated("third") == (3, pid)  # the process and its state are kept
    with pytest.raises(ProcessDied, match=r"it was killed by SIGSEGV \(a fault in native code\)"):
        isolated(signal.SIGSEGV)
    count, other = isolated("anew")
    assert (count, other != pid) == (1, True)
    with pytest.raises(ProcessDied, match="it ended itself with exit code 3"):
        isolated("exit")
