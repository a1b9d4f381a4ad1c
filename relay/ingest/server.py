"""aiohttp's server, hardened for the open internet: caps, deadlines, and never a word of HTML."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from relay.ingest.response import Response

log = logging.getLogger("relay.http")

KEEPALIVE = 15.0  # seconds an idle connection is kept; aiohttp's default is 3,630
FIRST_HEAD = 10.0  # seconds for the first request's head
LINGERING = 1.0  # seconds to swallow the rest of a refused body
MAX_CONNECTIONS = 4096

_FULL_BODY = b'{"error":{"code":"overload","message":"Too many connections"}}'
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_FULL_BODY), _FULL_BODY)
)


class Connection(RequestHandler):
    """One connection, refused with 503 beyond the cap and closed if it never says what it wants."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection in, or send it away."""
        super().connection_made(transport)
        server: Any = self._manager
        if len(server.connections) > server.max_connections:
            stream = cast("asyncio.Transport", transport)  # uvloop's transports inherit from nothing
            stream.write(_FULL)
            stream.close()
            return
        loop = asyncio.get_running_loop()
        self._head_deadline = loop.call_later(FIRST_HEAD, self._close_if_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Count the connection out."""
        deadline = getattr(self, "_head_deadline", None)
        if deadline is not None:
            deadline.cancel()
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write an answer, and tell who wants to know that it could not be written."""
        written, is_reset = await super().finish_response(request, resp, start_time)
        lost = getattr(resp, "lost", None)
        if is_reset and lost is not None:
            lost()
        return written, is_reset

    def _close_if_silent(self) -> None:
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP, in JSON and without a traceback in the log."""
        _ = message
        if status < 500:  # noqa: PLR2004 - HTTP
            log.debug("bad request from %s: %s", request.remote, type(exc).__name__)
        else:
            log.error("a request could not be answered", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        text = "Bad request" if status < 500 else "Internal server error"  # noqa: PLR2004 - HTTP
        code = "bad_request" if status < 500 else "internal_error"  # noqa: PLR2004 - HTTP
        body = msgspec.json.encode({"error": {"code": code, "message": text}})
        response = web.Response(status=status, body=body, content_type="application/json")
        response.force_close()
        return response


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
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEPALIVE,
            lingering_time=LINGERING,
            access_log=None,  # type: ignore[arg-type] # None turns it off, as in AppRunner
            auto_decompress=False,
        )
