"""One connection of aiohttp's server, hardened, and at a fraction of what one costs there.

Most connections carry one heartbeat: Node's agents hang up after 5 s, whatever a server offers, and the
next beat comes after 30. aiohttp makes two timers, two tasks and four sockets for each. Here a request has
a task, silence is looked for by the server over all connections at once, and the rest is left out.
"""

import asyncio
import logging
from typing import Any, cast

import msgspec
from aiohttp import StreamReader, web
from aiohttp.http import HttpRequestParser, StreamWriter
from aiohttp.web_protocol import ERROR, RequestHandler, _ErrInfo

log = logging.getLogger("relay.http")

KEEPALIVE = 15.0  # seconds an idle connection is kept; aiohttp's default is 3,630
FIRST_HEAD = 10.0  # seconds for the first request's head
LINGERING = 1.0  # seconds to swallow the rest of a refused body


class Connection(RequestHandler):
    """One connection, closed if it never says what it wants.

    aiohttp has no public way to any of this. What is replaced or used of its inside is named in
    tests/test_connection.py, with a digest: a release that changes it fails there, and is to be read.
    """

    __slots__ = ("_silent_since",)

    # Every request asks for them, at the price of a look-up each. There is no TLS, and our address is known.
    ssl_context = None
    sockname = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the connection.

        Not by aiohttp's way, which sets TCP_NODELAY once more (every loop has), TCP's own keep-alive (after
        two hours), a timer, and a task that waits for a request.
        """
        self.transport = cast("asyncio.Transport", transport)  # uvloop's inherit from nothing
        self._silent_since = self._loop.time()
        self._server.connection_made(self, self.transport)

    @property
    def _server(self) -> web.Server:
        return cast("web.Server", self._manager)  # None once the connection is lost

    def data_received(self, data: bytes) -> None:
        """Parse, and begin with what has been asked."""
        super().data_received(data)
        if self._messages and self._task_handler is None and not (self._close or self._force_close):
            self._begin()

    def pause_writing(self) -> None:
        """Note since when no answer is read."""
        super().pause_writing()
        self._silent_since = self._loop.time()

    def close_if_silent(self, now: float) -> None:
        """Cut it off if for too long nothing has been asked, or read of an answer; `now` as in `loop.time()`.

        Closing would wait for what is written to be read.
        """
        patience = KEEPALIVE if self._request_count else FIRST_HEAD
        waits = self._task_handler is None or self.writing_paused
        if waits and self.transport is not None and now - self._silent_since >= patience:
            self.transport.abort()

    def _begin(self) -> None:
        self._task_handler = self._loop.create_task(self._serve())

    async def _serve(self) -> None:
        """Answer one request, then begin with the next if it has come already."""
        if self._force_close:
            return
        request, payload, handler = self._next_request()
        goes_on = False
        try:
            response, is_reset = await self._handle_request(request, None, handler)
            if is_reset or self.transport is None:  # gone at once, or while it did not read
                _tell_lost(response)
            else:  # also before a close: with the body unread, it would take the answer back
                goes_on = await self._swallow(payload) and bool(response.keep_alive)
        except ConnectionError:
            log.debug("%s hung up before it was answered", request.remote)
        except asyncio.CancelledError:
            self.force_close()
            raise
        except Exception:
            log.exception("a connection failed")
            self.force_close()
        finally:
            request._task = None  # type: ignore[assignment] # noqa: SLF001 - a cycle, as aiohttp has it
        if self._force_close:
            return
        self._task_handler = None
        self._silent_since = self._loop.time()
        if self._close or not goes_on:
            cast("asyncio.Transport", self.transport).close()
            return
        if self._messages:
            self._begin()

    def _next_request(self) -> tuple[web.BaseRequest, StreamReader, Any]:
        message, payload = self._messages.popleft()
        cast("HttpRequestParser", self._parser).message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        handler = self._request_handler
        if isinstance(message, _ErrInfo):
            handler, message = self._make_error_handler(message), ERROR
        writer, task = StreamWriter(self, self._loop), cast("asyncio.Task[None]", self._task_handler)
        return self._server.request_factory(message, payload, self, writer, task), payload, handler

    async def _swallow(self, payload: StreamReader) -> bool:
        """Read what still comes of a refused body, for a moment; say whether that was all."""
        if payload.is_eof():
            return True
        try:
            async with asyncio.timeout(LINGERING):
                while not payload.is_eof():
                    await payload.readany()
        except TimeoutError:
            return False
        return True

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


def _tell_lost(response: object) -> None:
    """Tell who wants to know that an answer could not be written."""
    lost = getattr(response, "lost", None)
    if lost is not None:
        lost()
