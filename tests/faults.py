"""An HTTP proxy that breaks what goes through it, at a rate and from a seed: for tests of what a bad network does.

It stands in front of a test's own S3 server. Requests are passed on as they came, so that their signatures (which
cover the Host header) stay valid.
"""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self, get_args

Fault = Literal["drop", "lose", "delay", "slow_down", "too_many", "cut"]
"""What happens to a request.

drop: the connection is closed and the request goes nowhere. lose: the server does it, but its answer is not passed on.
delay: it is answered late. slow_down, too_many: it is answered 503 SlowDown or 429 and goes nowhere. cut: the
connection is closed in the middle of the answer's body.
"""
FAULTS: tuple[Fault, ...] = get_args(Fault)

_HEAD_BYTES = 2**18
_REFUSALS = {"slow_down": (503, "SlowDown"), "too_many": (429, "TooManyRequests")}


class FaultProxy:
    """A proxy to `upstream` (host:port) on a port of its own, in a thread of its own.

    Attributes:
        url: where it listens, once started.
        rate: share of the requests that meet a fault; may be changed while it runs.
        next: how many requests from now on meet a fault whatever the rate; counts down to 0.
        counts: how many requests met which fault, and under "passed" how many met none.
        heads: the requests without their bodies, in the order in which they came.
    """

    def __init__(
        self,
        upstream: str,
        *,
        rate: float = 0.05,
        seed: int = 0,
        faults: Sequence[Fault] = FAULTS,
        delay_seconds: float = 0.5,
    ) -> None:
        self._host, _, port = upstream.rpartition(":")
        self._port = int(port)
        self.rate = rate
        self.next = 0
        self.counts: Counter[str] = Counter()
        self.heads: list[str] = []
        self.url = ""
        self._faults, self._delay_seconds = tuple(faults), delay_seconds
        self._random = random.Random(seed)  # noqa: S311 - a test's dice
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._clients: set[asyncio.Task[None]] = set()

    def start(self) -> Self:
        """Listen on a free port of this machine's loopback."""
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_HEAD_BYTES), self._loop
        ).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def stop(self) -> None:
        """Close every connection and the port."""

        async def close() -> None:
            self._server.close()
            for client in self._clients:
                client.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection: a request after the other, each over a connection of its own to the server."""
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client went away, or the server did, or the proxy stops: the client sees a closed connection
        finally:
            self._clients.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Handle one request; False when the connection is to be closed after it."""
        head = await reader.readuntil(b"\r\n\r\n")
        if _header(head, b"expect"):
            head = _without(head, b"expect")
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.heads.append(head.decode("latin-1"))
        body = await _body(reader, head)
        wanted = self.next > 0 or self._random.random() < self.rate
        self.next = max(0, self.next - 1)
        fault = self._random.choice(self._faults) if wanted else None
        self.counts[fault or "passed"] += 1
        if fault == "drop":
            return False
        if fault in _REFUSALS:
            writer.write(_refusal(*_REFUSALS[fault], with_body=not head.startswith(b"HEAD ")))
            await writer.drain()
            return True
        answer_head, answer = await self._ask(head, body)
        if fault == "lose":
            return False
        if fault == "delay":
            await asyncio.sleep(self._delay_seconds)
        writer.write(answer_head + (answer[: len(answer) // 2] if fault == "cut" else answer))
        await writer.drain()
        return fault != "cut"

    async def _ask(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """The server's answer, its body as it is sent."""
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=_HEAD_BYTES)
        try:
            writer.write(head + body)
            await writer.drain()
            answer_head = b"HTTP/1.1 100 "
            while answer_head.startswith(b"HTTP/1.1 100 "):
                answer_head = await reader.readuntil(b"\r\n\r\n")
            bodyless = head.startswith(b"HEAD ") or answer_head.split(b" ")[1] in {b"204", b"304"}
            return answer_head, b"" if bodyless else await _body(reader, answer_head)
        finally:
            writer.close()


def _header(head: bytes, name: bytes) -> bytes:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return b""


def _without(head: bytes, name: bytes) -> bytes:
    return b"\r\n".join(line for line in head.split(b"\r\n") if line.partition(b":")[0].strip().lower() != name)


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """What follows a head, as it is sent: of a given length, or in chunks."""
    if _header(head, b"transfer-encoding").lower() != b"chunked":
        return await reader.readexactly(int(_header(head, b"content-length") or 0))
    chunks = []
    while True:
        size = await reader.readuntil(b"\r\n")
        chunks += [size, await reader.readexactly(int(size.split(b";")[0], 16) + 2)]
        if int(size.split(b";")[0], 16) == 0:
            return b"".join(chunks)


def _refusal(status: int, code: str, *, with_body: bool) -> bytes:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Please reduce your request rate.</Message></Error>"
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n"
    return (head + text * with_body).encode()
