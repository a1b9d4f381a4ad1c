"""The public listener: accepts connections, caps their number, and closes idle ones."""

import asyncio
import heapq
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from relay.ingest.body import STANDSTILL
from relay.ingest.connection import Connection, Owner
from relay.ingest.implementation import Implementation
from relay.ingest.reference import ReferenceConnection
from relay.ingest.replies import Response, closing_response
from relay.ingest.request import Request, address_of
from relay.process.sockets import ACCEPTS, BACKLOG

MAX_CONNECTIONS = 4096
YIELDING = 64
"""Idle connections that one search finds, longest idle first, to make room for new ones."""

TURNED_AWAY = 64
"""Connections beyond the cap whose requests are read at a time, for a second each."""

SETTLE = 0.3  # seconds for requests that arrive while the listener closes
SWEEP_EVERY = 1.0  # seconds between checks for idle connections, which may be closed as much later


class Server:
    """One listener and its connections."""

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[Response]],
        *,
        implementation: Implementation = "fast",
        max_connections: int = MAX_CONNECTIONS,
        unroutable: Callable[[str, str | None, str], None] = lambda _reason, _peer, _problem: None,
        is_committing: Callable[[], bool] = lambda: False,
        overhear: Callable[[Request], None] = lambda _request: None,
    ) -> None:
        self.max_connections = max_connections
        self.connections: set[Connection] = set()
        self.is_committing = is_committing
        self._connect = _connection_class(implementation)
        self.handle = handle
        self._unroutable = unroutable  # gets the reason, the sender's address and the problem
        self._overhear = overhear  # gets the requests of connections that were turned away
        self._turned_away: set[Connection] = set()
        self._listener: asyncio.Server | None = None
        self.under_way = 0
        self.idle = asyncio.Event()
        self.is_leaving = False
        self._idlest: list[Connection] = []  # idle at the last search, longest idle at the end
        self._sweep: asyncio.TimerHandle | None = None  # while there are connections

    async def listen(self, sock: socket.socket) -> None:
        """Start serving on a bound socket."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: self._connect(self), sock=sock, backlog=ACCEPTS)
        sock.listen(BACKLOG)

    def connection_made(self, connection: Connection, transport: asyncio.Transport) -> None:
        """Register a connection. At the cap, the longest idle one makes room, or this one gets 503."""
        is_full = len(self.connections) >= self.max_connections
        if is_full and self._make_room():
            is_full = False
        if is_full:
            self._turn_away(connection, transport)
            return
        self.connections.add(connection)
        if self._sweep is None:
            self._look_again()

    def _turn_away(self, connection: Connection, transport: asyncio.Transport) -> None:
        """Answer a connection beyond the cap; read some of the requests, because workers may send them."""
        self.unroutable("too_many", transport, f"{len(self.connections)} connections are open")
        answer = closing_response(503, "overload", "Too many connections", **{"Retry-After": "1"})
        if len(self._turned_away) < TURNED_AWAY:
            self._turned_away.add(connection)
            connection.turn_away(answer)
        else:
            transport.write(answer)
            transport.close()

    def overhear(self, request: Request) -> None:
        """See `Owner.overhear`."""
        self._overhear(request)

    def unroutable(self, reason: str, transport: asyncio.Transport, problem: str) -> None:
        """See `Owner.unroutable`."""
        self._unroutable(reason, address_of(transport), problem)

    def connection_lost(self, connection: Connection) -> None:
        """See `Owner.connection_lost`."""
        self.connections.discard(connection)
        self._turned_away.discard(connection)

    def _make_room(self) -> bool:
        """Abort the longest idle connection; return False if no connection is idle."""
        for look in (False, True):
            if look:
                silent = [each for each in self.connections if each.idle_since is not None]
                self._idlest = heapq.nsmallest(YIELDING, silent, key=lambda each: each.idle_since or 0.0)
                self._idlest.reverse()
            while self._idlest:
                connection = self._idlest.pop()
                is_silent = connection.idle_since is not None and not connection.has_unread
                if connection in self.connections and is_silent:
                    self.connections.discard(connection)  # at once: `connection_lost` runs in a later turn
                    connection.abort()
                    return True
        return False

    def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + SWEEP_EVERY
        self._sweep = loop.call_at(due, self._close_idle, due)

    def _close_idle(self, due: float) -> None:
        self._sweep, now = None, asyncio.get_running_loop().time()
        late = now - due
        for connection in (*self.connections, *self._turned_away):
            if late >= STANDSTILL:
                connection.add_standstill(late)
            connection.close_if_idle(now)
        if self.connections or self._turned_away:
            self._look_again()

    def leave(self) -> None:
        """Close each connection with its next answer, so that senders move on to the next process."""
        self.is_leaving = True

    async def stop_listening(self) -> None:
        """Stop accepting connections, after requests on their way have arrived."""
        await asyncio.sleep(0)  # one turn of the loop accepts waiting connections; closing would reset them
        if self._listener is not None:
            self._listener.close()
        await asyncio.sleep(SETTLE)

    async def finish(self, seconds: float) -> None:
        """Wait until no request is under way, at most `seconds`."""
        if self.under_way:
            self.idle.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.idle.wait()

    async def close(self, *, grace: float) -> None:
        """Close every connection, after at most `grace` seconds for requests under way."""
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._turned_away):
            connection.abort()
        await asyncio.gather(*(connection.shutdown(grace) for connection in self.connections))


def _connection_class(implementation: Implementation) -> Callable[[Owner], Connection]:
    if implementation == "aiohttp":
        return ReferenceConnection
    from relay.ingest.fast import FastConnection  # noqa: PLC0415 - an untested aiohttp may lack the classes

    return FastConnection
