"""A function in a process of its own, which may die without taking its caller along."""

import pickle
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_MEANINGS = {
    signal.SIGKILL: "as the kernel does when memory runs out",
    signal.SIGSEGV: "a fault in native code",
    signal.SIGBUS: "a fault in native code, or a disk that is full",
    signal.SIGILL: "native code made for another CPU",
    signal.SIGABRT: "native code that gave up",
}


class ProcessDied(Exception):  # noqa: N818 - what happened, not who is at fault
    """The process ended while it worked; the message says how."""


class Isolated:
    """Calls a function in a child process, which lives until it dies, and is then started anew."""

    def __init__(self, pickled: bytes) -> None:
        """`pickled` is the function, by pickle or cloudpickle; it may keep state from call to call."""
        self._pickled = pickled
        self._child: BaseProcess | None = None

    def __call__(self, argument: Any) -> Any:
        """The function's result.

        Raises:
            ProcessDied: the process died over it; the next call has a new one.
            Exception: what the function raised.
        """
        child = self._child = self._child or self._start()
        try:
            self._pipe.send(argument)
            result, error = self._pipe.recv()
        except (EOFError, OSError):
            child.join()
            self._child = None
            raise ProcessDied(_how(child.exitcode or 0)) from None
        if error is not None:
            raise error
        return result

    def _start(self) -> BaseProcess:
        context = get_context("spawn")  # what runs threads, as Ray's workers do, must not fork
        self._pipe, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(theirs, self._pickled), daemon=True)
        child.start()
        theirs.close()
        return child


def _serve(pipe: Connection, pickled: bytes) -> None:
    function = pickle.loads(pickled)  # noqa: S301 - from our own parent
    while True:
        try:
            argument = pipe.recv()
        except EOFError:  # the parent is gone
            return
        result, failure = None, None
        try:
            result = function(argument)
        except Exception as error:  # noqa: BLE001 - raised in the parent
            failure = error
        pipe.send((result, failure))


def _how(code: int) -> str:
    if code >= 0:
        return f"it ended itself with exit code {code}"
    try:
        name = signal.Signals(-code)
    except ValueError:
        return f"it was killed by signal {-code}"
    meaning = f" ({_MEANINGS[name]})" if name in _MEANINGS else ""
    return f"it was killed by {name.name}{meaning}"
