"""Serves the admin API on a socket with aiohttp; bytes that are not HTTP get the API's own kind of error."""

import asyncio
import logging
import socket
from http import HTTPStatus
from typing import cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from relay.api.responses import error_response
from relay.base.clock import SystemClock
from relay.base.ids import REQUEST, new_id
from relay.process.sockets import ACCEPTS, BACKLOG

log = logging.getLogger("relay.api")


async def listen(app: web.Application, sock: socket.socket, *, grace: float) -> web.BaseRunner:
    """Serve on a bound socket; `grace` is the time in seconds for requests in progress at the stop."""
    runner = _Runner(app, access_log=None, shutdown_timeout=grace)
    await runner.setup()
    await web.SockSite(runner, sock, backlog=ACCEPTS).start()
    sock.listen(BACKLOG)
    return runner


class _Protocol(web.RequestHandler):
    """aiohttp's protocol of one connection; its own error page would name its version."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - aiohttp's name
    ) -> web.StreamResponse:
        """Answer a request that is not HTTP, or that failed outside of the API, and close the connection."""
        if request.writer.output_size > 0:
            raise ConnectionError("a response has started")
        is_theirs = status < HTTPStatus.INTERNAL_SERVER_ERROR
        level = logging.DEBUG if is_theirs else logging.ERROR
        log.log(level, "cannot answer a request from %s", request.remote, exc_info=exc)
        text = "the request is not valid HTTP" if is_theirs else "internal error"
        hint = "" if is_theirs else "this is a bug in the relay; the traceback is in its log"
        code = HTTPStatus(status).phrase.lower().replace(" ", "_")
        body = error_response(status, code, text, hint).body
        assert isinstance(body, bytes)  # noqa: S101 - a response of the API is bytes
        if request.transport is not None:
            request.transport.write(_head(status, len(body)) + body)
        return _Written()


def _head(status: int, length: int) -> bytes:
    lines = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        f"X-Request-Id: {new_id(REQUEST, SystemClock().wall())}",
        "Connection: close",
    )
    return "\r\n".join((*lines, "", "")).encode()


class _Server(web.Server):
    """aiohttp's server with this module's protocol."""

    def __call__(self) -> web.RequestHandler:
        off = cast("logging.Logger", None)  # as aiohttp's runner passes it
        return _Protocol(self, loop=asyncio.get_running_loop(), access_log=off)


class _Runner(web.AppRunner):
    """aiohttp's runner with this module's server."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(made.request_handler, request_factory=made.request_factory)


class _Written(web.StreamResponse):
    """Signals to aiohttp that the answer is written, and that the connection ends."""

    @property
    def keep_alive(self) -> bool:
        return False

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:  # noqa: ARG002 - aiohttp's name
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        pass
