"""A load generator that uses little CPU: keep-alive connections, prebuilt requests, a fixed count."""

import asyncio
import re
import time
from collections.abc import Sequence
from itertools import cycle
from typing import cast

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_DEADLINE = 120.0  # seconds for one round


class LoadError(Exception):
    """The server did not answer with 2xx."""


class _Sender(asyncio.Protocol):
    """One connection: sends a request, waits for the complete response, and repeats this for all requests."""

    def __init__(self, load: "_Load") -> None:
        self._load = load
        self._received = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's transports have no base class

    def send_next(self) -> None:
        if self._load.unsent:
            self._load.unsent -= 1
            self.transport.write(next(self._load.requests))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return
        length = _LENGTH.search(self._received, 0, head)
        if length is None or not self._received.startswith(b"HTTP/1.1 2"):
            self._load.fail(LoadError(f"unexpected response: {self._received!r}"))
        elif len(self._received) >= head + 4 + int(length[1]):
            self._received = b""
            self._load.answered()
            self.send_next()

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.fail(LoadError(f"the server closed a connection ({exc})"))


class _Load:
    """One round: its remaining requests, and its end."""

    def __init__(self, requests: Sequence[bytes], count: int) -> None:
        self.requests = cycle(requests)
        self.unsent = count
        self._unanswered = count
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self) -> None:
        self._unanswered -= 1
        if not self._unanswered and not self.over.done():
            self.over.set_result(None)

    def fail(self, error: LoadError) -> None:
        if not self.over.done():
            self.over.set_exception(error)


def post(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return the bytes of a POST request."""
    return _request("POST", path, body, headers)


def put(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return the bytes of a PUT request."""
    return _request("PUT", path, body, headers)


def _request(method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    fields = {"Host": "localhost", **headers, "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def send(address: tuple[str, int], *requests: bytes, count: int, connections: int) -> float:
    """Send `count` requests in total, repeating `requests` in order, over `connections` connections at once.

    Returns the time (`time.perf_counter`) at which the first byte was sent.

    Raises:
        LoadError: a response was not a 2xx, or a connection was lost.
        TimeoutError: it took more than two minutes.
    """
    load, loop = _Load(requests, count), asyncio.get_running_loop()
    senders = []
    try:
        for _ in range(min(connections, count)):
            _, sender = await loop.create_connection(lambda: _Sender(load), *address)
            senders.append(sender)
        began = time.perf_counter()
        for sender in senders:
            sender.send_next()
        async with asyncio.timeout(_DEADLINE):
            await load.over
    finally:
        for sender in senders:
            sender.transport.close()
    return began
