"""Server-sent events. Each follower has a bounded buffer, so nothing waits for a slow follower."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from aiohttp import web

from relay.api.operators import OPERATOR
from relay.api.responses import error_response
from relay.api.views import about
from relay.base.json_text import encode

T = TypeVar("T")

MOST = 32
"""Followers of one stream. Each one costs time for every item."""

MOST_BYTES = 2**21
"""Bytes that wait for one follower; a limit on items alone is not enough, because senders choose subjects."""

HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent; only a write shows that a client's machine is gone."""

CHECK_EVERY = 1.0  # seconds between checks that a silent client is still connected

GATHER = 0.05
"""Seconds between two writes to a follower. The first item after a quiet time is sent at once."""

COUNT_EVERY = 1.0
"""Seconds between two messages with the number of new items."""

MOST_KEYS = 20_000
"""Keys of a follower's items that are compared. Beyond that, an item may be sent twice."""

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


class NewItemsView(msgspec.Struct):
    """Numbers of live events and attempts since the last message."""

    events: int
    attempts: int


class SilentView(msgspec.Struct):
    """The nodes of a cluster whose items are missing; none: all answer again."""

    nodes: Annotated[tuple[str, ...], about("Nodes that do not answer.")]
    unable: Annotated[
        tuple[str, ...], about("Nodes of another version, which does not know this stream.")
    ] = ()


def frame(event: str, data: Any, id_: str | None = None) -> bytes:
    """Return one server-sent event. JSON contains no line breaks, so its data is one line."""
    id_line = "" if id_ is None else f"id: {id_}\n"
    return f"event: {event}\n{id_line}data: ".encode() + encode(data) + b"\n\n"


class Seam:
    """Keeps a follower from getting an item twice, stored and live, by comparing keys of items."""

    def __init__(self) -> None:
        """Begin with the history; live items are not collected yet."""
        self.done = False
        """Whether keys are no longer compared."""
        self._is_open = False  # whether live items are collected
        self._live: set[str] | None = set()
        """Keys of live items during the last part of the history; None: the history has ended."""
        self._sent: set[str] = set()
        """Keys of stored items that may come again: live, or in the next part of the history."""

    def open(self) -> None:
        """Collect live items from now on."""
        self._is_open = True

    def close(self, keep: float) -> None:
        """End the history; live items are compared with it for `keep` more seconds."""
        self._live = None
        asyncio.get_running_loop().call_later(keep, self._finish)

    def _finish(self) -> None:
        self.done = True
        self._sent.clear()

    def takes_stored(self, key: str, *, keep: bool) -> bool:
        """Return whether a stored item is to be sent; `keep` its key if the item may come again."""
        if key in self._sent or key in (self._live or ()):
            return False
        if keep and len(self._sent) < MOST_KEYS:
            self._sent.add(key)
        return True

    def takes_live(self, key: str) -> bool:
        """Return whether a live item is to be sent: it was not sent from the store."""
        if not self._is_open or key in self._sent:
            return False
        if self._live is not None and len(self._live) < MOST_KEYS:
            self._live.add(key)
        return True


class Group(Generic[T]):
    """The followers that want the same items, so a filter is applied once for all of them."""

    def __init__(self, wanted: T) -> None:
        """Create an empty group; `wanted` are the items of its members."""
        self.wanted = wanted
        self.members: list[Follower[T]] = []
        self.totals: Counter[str] = Counter()
        """The numbers of live items by kind, for members that get numbers."""
        self.counted = asyncio.Event()
        """Set when a number changes."""

    @property
    def compares(self) -> bool:
        """Whether `put` and `count` need the key of an item."""
        for member in self.members:
            if member.seam is not None:
                if not member.seam.done:
                    return True
                member.seam = None
        return False

    def put(self, frame_: bytes, key: str | None) -> None:
        """Queue a frame for each follower that was not sent this item from the store."""
        for member in self.members:
            if key is None or member.seam is None or member.seam.takes_live(key):
                member.put(frame_)

    def count(self, kind: str, key: str | None, number: int = 1) -> None:
        """Count an item, or several items without a key."""
        self.totals[kind] += number
        self.counted.set()
        if key is not None:
            for member in self.members:
                if member.seam is not None and not member.seam.takes_live(key):
                    member.counted[kind] += number  # this member already has the item


class Follower(Generic[T]):
    """One client's buffer of frames. If it is full, the oldest frames are dropped and counted."""

    def __init__(
        self, group: Group[T], room: int, cut: Callable[[], None], seam: Seam | None, pause: float
    ) -> None:
        """Create an empty buffer.

        Args:
            group: the followers that want the same items.
            room: maximum number of frames.
            cut: closes the connection at once, without writing the waiting frames.
            seam: keeps stored items from being sent again; None without stored items.
            pause: seconds between two writes, during which frames are gathered.
        """
        self.group = group
        self.seam = seam
        self.counted = group.totals.copy()
        """The totals of the group that this client knows."""
        self.ended = False
        self.writing = False  # whether a write is in progress
        self._room = room
        self._cut = cut
        self._pause = pause
        self._frames: deque[bytes] = deque()
        self._size = 0
        self._lost = 0
        self._changed = asyncio.Event()
        self._hurry = asyncio.Event()  # the buffer fills, or the stream has ended

    @property
    def wanted(self) -> T:
        """The items that this client wants."""
        return self.group.wanted

    def put(self, frame_: bytes) -> None:
        """Queue a frame; never waits."""
        self._frames.append(frame_)
        self._size += len(frame_)
        while len(self._frames) > self._room or (self._size > MOST_BYTES and len(self._frames) > 1):
            self._size -= len(self._frames.popleft())
            self._lost += 1
        self._changed.set()
        if len(self._frames) * 2 > self._room or self._size * 2 > MOST_BYTES:
            self._hurry.set()

    def take(self) -> bytes:
        """Return the waiting frames, after a frame with the number of lost ones; `b""` if there are none."""
        frames, self._frames = self._frames, deque()
        lost, self._lost = self._lost, 0
        self._size = 0
        self._changed.clear()
        if not self.ended:
            self._hurry.clear()
        return (frame("lost", {"count": lost}) if lost else b"") + b"".join(frames)

    async def wait(self, seconds: float) -> None:
        """Wait for a frame or the end of the stream, at most for this time."""
        if not self.ended:
            await _first(self._changed, seconds)

    async def gather(self) -> None:
        """Wait until the next write; further frames join it."""
        if not self.ended:
            await _first(self._hurry, self._pause)

    def end(self) -> None:
        """End the stream after the waiting frames. A client that does not read them is cut off."""
        self.ended = True
        self._changed.set()
        self._hurry.set()
        if self.writing:
            self._cut()


class CountingFollower(Follower[T]):
    """A client that gets the number of live items. Numbers need no buffer, so none are lost."""

    def take(self) -> bytes:
        """Return the waiting frames, and a frame with the numbers of items since the last call, if any."""
        frames, totals = super().take(), self.group.totals
        gained = {kind: number - self.counted[kind] for kind, number in totals.items()}
        self.counted.update(gained)
        if any(gained.values()):
            return frames + frame("count", {"events": 0, "attempts": 0, **gained})
        self.group.counted.clear()  # no member with new numbers waits for it
        return frames

    async def wait(self, seconds: float) -> None:
        """Wait for an item, a frame or the end of the stream, at most for this time."""
        if not (self.ended or self._frames):
            await _first(self.group.counted, seconds)

    def put(self, frame_: bytes) -> None:
        """Queue a frame; never waits."""
        super().put(frame_)
        self.group.counted.set()

    def end(self) -> None:
        """End the stream after the waiting numbers."""
        super().end()
        self.group.counted.set()


async def _first(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, at most for this time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


class Followers(Generic[T]):
    """All followers of one stream, grouped by the items that they want."""

    def __init__(self, room: int) -> None:
        """Take `room`, the number of items that may wait for each follower."""
        self.ended = False
        self._room = room
        self._groups: dict[T, Group[T]] = {}

    def __iter__(self) -> Iterator[Follower[T]]:
        for group in self._groups.values():
            yield from group.members

    def __len__(self) -> int:
        return sum(len(group.members) for group in self._groups.values())

    @property
    def groups(self) -> Collection[Group[T]]:
        """The groups; each has at least one member."""
        return self._groups.values()

    @property
    def full(self) -> bool:
        """Whether no further follower is accepted."""
        return len(self) >= MOST

    def add(
        self,
        wanted: T,
        cut: Callable[[], None],
        *,
        seam: Seam | None = None,
        counts: bool = False,
    ) -> Follower[T]:
        """Add a follower until `discard`; with `counts`, it gets numbers of live items."""
        if (group := self._groups.get(wanted)) is None:
            group = self._groups[wanted] = Group(wanted)
        kind, pause = (CountingFollower[T], COUNT_EVERY) if counts else (Follower[T], GATHER)
        follower = kind(group, self._room, cut, seam, pause)
        group.members.append(follower)
        return follower

    def discard(self, follower: Follower[T]) -> None:
        """Remove a follower."""
        follower.group.members.remove(follower)
        if not follower.group.members:
            del self._groups[follower.group.wanted]

    def end(self) -> None:
        """End all streams and accept no more."""
        self.ended = True
        for follower in tuple(self):
            follower.end()


LOGIN_CHECK = 600.0
"""Seconds after which a browser has to prove its login again."""


async def stream(
    request: web.Request,
    followers: Followers[T],
    wanted: T,
    past: AsyncIterator[bytes] | None = None,
    *,
    seam: Seam | None = None,
    counts: bool = False,
) -> web.StreamResponse:
    """Send the items that a client wants until it disconnects or the daemon stops.

    `past` yields frames that are sent first; `b""` means that the search for them continues. Its `seam`
    keeps them from being sent again as live items. With `counts`, the client gets numbers of live items
    instead of the items.
    """
    if followers.ended:
        return error_response(503, "draining", "the relay is stopping", "try again after its restart")
    if followers.full:
        hint = "end a running `relay tail` or `relay top`"
        return error_response(503, "too_many_followers", f"this stream already has {MOST} clients", hint)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    follower = followers.add(wanted, transport.abort, seam=seam, counts=counts)
    response = web.StreamResponse(headers=_HEADERS)
    try:
        with _limited(request, follower), suppress(ConnectionError):  # a stream usually ends by a disconnect
            await response.prepare(request)
            await _write(response, follower, _GREETING)
            if past is not None:
                await _send_past(response, follower, past)
            await _follow(response, follower, transport)
    finally:
        followers.discard(follower)
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
            await follower.gather()
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
