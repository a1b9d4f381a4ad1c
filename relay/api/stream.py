"""Server-sent events on their way out: to as many as want to follow, and no longer than they are there."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

from aiohttp import web

from relay.api.responses import refuse
from relay.base.json_text import encode

T = TypeVar("T")

MOST = 32
"""Followers of one stream: each costs a look at every item."""

MOST_BYTES = 2**19
"""What may wait for one follower, beside its number of items: a sender chooses how long a subject is."""


def frame(event: str, data: Any, id_: str | None = None) -> bytes:
    """Write one server-sent event; JSON has no line end of its own in it."""
    id_line = "" if id_ is None else f"id: {id_}\n"
    return f"event: {event}\n{id_line}data: ".encode() + encode(data) + b"\n\n"


class Follower(Generic[T]):
    """One reader's buffer of frames; what it is too slow for is lost, oldest first, and counted."""

    def __init__(self, wish: T, room: int, cut: Callable[[], None]) -> None:
        self.wish = wish  # what it wants to hear of
        self.ended = False
        self.writing = False  # what it was given last has not left yet
        self._room = room
        self._cut = cut  # closes its connection, whatever still waits to be written
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
        """Return what waits, after how much was lost before it; `b""`: nothing."""
        frames, self._frames = self._frames, deque()
        lost, self._lost = self._lost, 0
        self._size = 0
        self._changed.clear()
        return (frame("lost", {"count": lost}) if lost else b"") + b"".join(frames)

    async def wait(self, seconds: float) -> None:
        """Wait for something to take, or the end; so long at most."""
        if not self.ended:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds)

    def end(self) -> None:
        """Let it have what waits and go; one that takes nothing is cut off."""
        self.ended = True
        self._changed.set()
        if self.writing:
            self._cut()


class Followers(Generic[T]):
    """All that follow one stream."""

    def __init__(self, room: int) -> None:
        """Take `room`, the number of items that may wait for each."""
        self.ended = False
        self._room = room
        self._all: set[Follower[T]] = set()

    def __iter__(self) -> Iterator[Follower[T]]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def full(self) -> bool:
        """Whether there is room for no more."""
        return len(self._all) >= MOST

    @contextmanager
    def joined(self, wish: T, cut: Callable[[], None]) -> Iterator[Follower[T]]:
        """Have one more, as long as the block lasts."""
        follower = Follower(wish, self._room, cut)
        self._all.add(follower)
        try:
            yield follower
        finally:
            self._all.discard(follower)

    def end(self) -> None:
        """End all, and have no more."""
        self.ended = True
        for follower in tuple(self._all):
            follower.end()


HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent: a reader whose machine is gone shows by it."""

LOOK = 1.0  # seconds between looks whether a reader that hears nothing is still there

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would keep lines until its buffer is full
}
_GREETING = b": hookferry\n\n"  # aiohttp holds the head back until there is something to send with it
_STILL_HERE = b": still here\n\n"


async def stream(request: web.Request, followers: Followers[T], wish: T) -> web.StreamResponse:
    """Send what comes for one follower, until it goes or the relay does."""
    if followers.ended:
        return refuse(503, "draining", "The relay is stopping", "ask again once it is back")
    if followers.full:
        hint = "end one first: every `relay tail` and `relay top` that runs is one"
        return refuse(503, "too_many_followers", f"{MOST} follow this already", hint)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    with followers.joined(wish, transport.abort) as follower:
        response = web.StreamResponse(headers=_HEADERS)
        try:
            await response.prepare(request)
            await _write(response, follower, _GREETING)
            await _follow(response, follower, transport)
        except ConnectionError:
            pass  # it has gone, which is how a stream ends
    return response


async def _follow(response: web.StreamResponse, follower: Follower[T], transport: asyncio.Transport) -> None:
    now = asyncio.get_running_loop().time
    spoken = now()
    while not transport.is_closing():
        ended = follower.ended
        if frames := follower.take():
            await _write(response, follower, frames)
            spoken = now()
        elif ended:
            return
        elif now() - spoken >= HEARTBEAT:
            await _write(response, follower, _STILL_HERE)
            spoken = now()
        else:
            await follower.wait(LOOK)


async def _write(response: web.StreamResponse, follower: Follower[T], frames: bytes) -> None:
    follower.writing = True
    try:
        await response.write(frames)
    finally:
        follower.writing = False
