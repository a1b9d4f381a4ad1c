"""Server-sent events. Each follower has a bounded buffer, so nothing waits for a slow follower."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web

from relay.api.operators import OPERATOR
from relay.api.responses import error_response
from relay.base.json_text import encode

T = TypeVar("T")

MOST = 32
"""Followers of one stream. Each one costs time for every item."""

MOST_BYTES = 2**19
"""Bytes that wait for one follower; a limit on items alone is not enough, because senders choose subjects."""

HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent; only a write shows that a client's machine is gone."""

CHECK_EVERY = 1.0  # seconds between checks that a silent client is still connected

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # otherwise nginx holds lines back until its buffer is full
}
_GREETING = b": hookferry\n\n"  # aiohttp sends the head only with the first bytes of the body
_STILL_HERE = b": still here\n\n"


class LostView(msgspec.Struct):
    """Number of items that were dropped because the client was too slow."""

    count: int


class SilentView(msgspec.Struct):
    """The nodes of a cluster whose items are missing, because they do not answer; empty: all answer again."""

    nodes: tuple[str, ...]


def frame(event: str, data: Any, id_: str | None = None) -> bytes:
    """Return one server-sent event. JSON contains no line breaks, so its data is one line."""
    id_line = "" if id_ is None else f"id: {id_}\n"
    return f"event: {event}\n{id_line}data: ".encode() + encode(data) + b"\n\n"


class Follower(Generic[T]):
    """One client's buffer of frames. If it is full, the oldest frames are dropped and counted."""

    def __init__(self, wanted: T, room: int, cut: Callable[[], None]) -> None:
        """Create an empty buffer.

        Args:
            wanted: the items that this client wants.
            room: maximum number of frames.
            cut: closes the connection at once, without writing the waiting frames.
        """
        self.wanted = wanted
        self.ended = False
        self.writing = False  # whether a write is in progress
        self._room = room
        self._cut = cut
        self._frames: deque[bytes] = deque()
        self._size = 0
        self._lost = 0
        self._changed = asyncio.Event()

    def put(self, frame_: bytes) -> None:
        """Queue a frame; never waits."""
        self._frames.append(frame_)
        self._size += len(frame_)
        while len(self._frames) > self._room or (self._size > MOST_BYTES and len(self._frames) > 1):
            self._size -= len(self._frames.popleft())
            self._lost += 1
        self._changed.set()

    def take(self) -> bytes:
        """Return the waiting frames, after a frame with the number of lost ones; `b""` if there are none."""
        frames, self._frames = self._frames, deque()
        lost, self._lost = self._lost, 0
        self._size = 0
        self._changed.clear()
        return (frame("lost", {"count": lost}) if lost else b"") + b"".join(frames)

    async def wait(self, seconds: float) -> None:
        """Wait for a frame or the end of the stream, at most for this time."""
        if not self.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()

    def end(self) -> None:
        """End the stream after the waiting frames. A client that does not read them is cut off."""
        self.ended = True
        self._changed.set()
        if self.writing:
            self._cut()


class Followers(Generic[T]):
    """All followers of one stream."""

    def __init__(self, room: int) -> None:
        """Take `room`, the number of items that may wait for each follower."""
        self.ended = False
        self._room = room
        self._all: set[Follower[T]] = set()

    def __iter__(self) -> Iterator[Follower[T]]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def full(self) -> bool:
        """Whether no further follower is accepted."""
        return len(self._all) >= MOST

    @contextmanager
    def joined(self, wanted: T, cut: Callable[[], None]) -> Iterator[Follower[T]]:
        """Add a follower for the duration of the block."""
        follower = self.add(wanted, cut)
        try:
            yield follower
        finally:
            self.discard(follower)

    def add(self, wanted: T, cut: Callable[[], None]) -> Follower[T]:
        """Add a follower until `discard`."""
        follower = Follower(wanted, self._room, cut)
        self._all.add(follower)
        return follower

    def discard(self, follower: Follower[T]) -> None:
        """Remove a follower."""
        self._all.discard(follower)

    def end(self) -> None:
        """End all streams and accept no more."""
        self.ended = True
        for follower in tuple(self._all):
            follower.end()


LOGIN_CHECK = 600.0
"""Seconds after which a browser has to prove its login again."""


async def stream(
    request: web.Request, followers: Followers[T], wanted: T, past: AsyncIterator[bytes] | None = None
) -> web.StreamResponse:
    """Send the items that a client wants until it disconnects or the daemon stops.

    `past` yields frames that are sent first; `b""` means that the search for them continues.
    """
    if followers.ended:
        return error_response(503, "draining", "the relay is stopping", "try again after its restart")
    if followers.full:
        hint = "end a running `relay tail` or `relay top`"
        return error_response(503, "too_many_followers", f"this stream already has {MOST} followers", hint)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    with followers.joined(wanted, transport.abort) as follower, _limited(request, follower):
        response = web.StreamResponse(headers=_HEADERS)
        try:
            await response.prepare(request)
            await _write(response, follower, _GREETING)
            if past is not None:
                await _send_past(response, follower, past)
            await _follow(response, follower, transport)
        except ConnectionError:
            pass  # the client has disconnected, which is the usual end of a stream
    return response


@contextmanager
def _limited(request: web.Request, follower: Follower[Any]) -> Iterator[None]:
    """End the stream of a browser after a while; it reconnects, and needs a valid login again."""
    operator = request.get(OPERATOR)
    if operator is None or operator.access not in ("login", "proxy"):
        yield
        return
    ending = asyncio.get_running_loop().call_later(LOGIN_CHECK, follower.end)
    try:
        yield
    finally:
        ending.cancel()


async def _send_past(response: web.StreamResponse, follower: Follower[T], past: AsyncIterator[bytes]) -> None:
    now = asyncio.get_running_loop().time
    written = now()
    async for frame_ in past:
        if follower.ended:
            return
        if frame_ or now() - written >= HEARTBEAT:
            await _write(response, follower, frame_ or _STILL_HERE)
            written = now()


async def _follow(response: web.StreamResponse, follower: Follower[T], transport: asyncio.Transport) -> None:
    now = asyncio.get_running_loop().time
    written = now()
    while not transport.is_closing():
        ended = follower.ended
        if frames := follower.take():
            await _write(response, follower, frames)
            written = now()
        elif ended:
            return
        elif now() - written >= HEARTBEAT:
            await _write(response, follower, _STILL_HERE)
            written = now()
        else:
            await follower.wait(CHECK_EVERY)


async def _write(response: web.StreamResponse, follower: Follower[T], frames: bytes) -> None:
    follower.writing = True
    try:
        await response.write(frames)
    finally:
        follower.writing = False
