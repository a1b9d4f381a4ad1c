"""aiohttp's server, hardened for the open internet: caps, deadlines, and never a word of HTML."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from relay.ingest.connection import Connection
from relay.ingest.response import Response

MAX_CONNECTIONS = 4096
SWEEP_EVERY = 1.0  # seconds between looks for silent connections: so much later than said they are closed

_FULL_BODY = b'{"error":{"code":"overload","message":"Too many connections"}}'
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_FULL_BODY), _FULL_BODY)
)


class Server(web.Server):
    """Makes hardened connections for one listener."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[Response]],
        *,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        super().__init__(self._answer)  # type: ignore[arg-type] # see Response
        self.max_connections = max_connections
        self._handle = handler
        self._under_way = 0
        self._idle = asyncio.Event()
        self._leaving = False
        self._sweep: asyncio.TimerHandle | None = None  # while there are connections

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Count a connection in, or send it away beyond the cap."""
        super().connection_made(handler, transport)
        if len(self._connections) > self.max_connections:  # `connections` would copy them all
            transport.write(_FULL)
            transport.close()
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_EVERY, self._close_silent)

    def _close_silent(self) -> None:
        now, self._sweep = self._loop.time(), None
        for connection in self.connections:
            connection.close_if_silent(now)  # type: ignore[attr-defined] # all are `Connection`s
        if self._connections:
            self._sweep = self._loop.call_later(SWEEP_EVERY, self._close_silent)

    def leave(self) -> None:
        """Let every answer from now on close its connection: kept ones move on to our successor."""
        self._leaving = True

    async def finish(self, seconds: float) -> None:
        """Wait for so long until no request is under way.

        aiohttp's own shutdown waits for handlers as well, but it throws away what still arrives of a body.
        """
        if self._under_way:
            self._idle.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)

    async def _answer(self, request: web.BaseRequest) -> Response:
        self._under_way += 1
        try:
            response = await self._handle(request)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
        if self._leaving:
            response.force_close()
        return response

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return Connection(
            self,
            loop=self._loop,
            access_log=None,  # type: ignore[arg-type] # None turns it off, as in AppRunner
            auto_decompress=False,
        )
