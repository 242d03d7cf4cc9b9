"""Trying storage again: which errors pass by themselves, how long they are waited for, and how often that was.

Inner retries of the file systems are switched off (`pipelines.storage`), so that what is counted here is what happened.
"""

import http.client
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying
from tenacity.retry import retry_if_exception
from tenacity.stop import stop_after_attempt, stop_after_delay
from tenacity.wait import wait_random_exponential

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ATTEMPTS = 9
_SECONDS = 120.0  # from the first attempt; one that is under way is not cut off
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 10.0  # bounds of a random wait, the first doubled each time

_STATUSES = {408, 429, 500, 502, 503, 504}
_CODES = {  # that S3 sends with other statuses
    "BadDigest", "IncompleteBody", "InternalError", "RequestTimeout", "SlowDown", "TooManyRequests",
    "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch",
}  # fmt: skip
# Of botocore and aiohttp, by name: a backend is imported by what uses it alone.
_CLASSES = {
    "ClientConnectionError", "ClientPayloadError", "ConnectionError", "FlexibleChecksumError", "HTTPClientError",
    "IncompleteReadError", "ResponseParserError",
}  # fmt: skip


class ShortRead(OSError):  # noqa: N818 - what the network did
    """Fewer bytes came than there are."""


class GaveUp(OSError):  # noqa: N818
    """Storage failed each time, for as long as it is waited for."""


@dataclass(slots=True)
class Count:
    """How many times something was tried again."""

    retries: int = 0


_counting: ContextVar[Count | None] = ContextVar("counting", default=None)
_lock = threading.Lock()
_total = Count()


@contextmanager
def counted() -> Iterator[Count]:
    """Counts the retries of this thread within the block."""
    count = Count()
    before = _counting.set(count)
    try:
        yield count
    finally:
        _counting.reset(before)


def total() -> int:
    """The retries of this process, all its threads together."""
    return _total.retries


def persist(what: str, call: Callable[[], T]) -> T:
    """The result of `call`, tried again after waits of growing random length while its errors may pass by themselves.

    Raises:
        GaveUp: it never worked; names `what` and the last error. Other errors are raised as they are, at once.
    """
    started = time.monotonic()

    def give_up(state: RetryCallState) -> T:
        error = _error(state)
        seconds = time.monotonic() - started
        raise GaveUp(
            f"{what}: gave up after {state.attempt_number} attempts in {seconds:.0f} s: {type(error).__name__}: {error}"
        ) from error

    return Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS),
        stop=stop_after_attempt(_ATTEMPTS) | stop_after_delay(_SECONDS),
        before_sleep=lambda state: _note(what, state),
        retry_error_callback=give_up,
    )(call)


def _note(what: str, state: RetryCallState) -> None:
    with _lock:
        _total.retries += 1
    if count := _counting.get():
        count.retries += 1
    logger.debug("%s: trying again after %r", what, _error(state))


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def is_transient(error: BaseException) -> bool:
    """Whether an error may be gone the next time: throttling, a fault of the server, a broken or cut connection.

    403, 404 and their kin, and certificates that do not fit, never pass by themselves.
    """
    for one in chain(error):
        status, code = answer(one)
        if status is not None:
            return status in _STATUSES or code in _CODES
        if isinstance(one, TimeoutError | ConnectionError | http.client.IncompleteRead | ShortRead):
            return True
        if not _CLASSES.isdisjoint(base.__name__ for base in type(one).__mro__):
            return not any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain(one))
    return False


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def answer(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status and the S3 error code that an error carries, if it does."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status, str(response.get("Error", {}).get("Code", ""))
    statuses = (getattr(error, name, None) for name in ("status", "status_code", "code"))  # aiohttp, azure, gcsfs
    return next((status for status in statuses if isinstance(status, int)), None), ""
