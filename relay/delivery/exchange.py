"""One HTTP exchange: a request written at once, on a connection of the pool, and the answer's head read.

aiohttp's connector (look-up, TLS, pool) and parser do the work. What its session adds, cookies,
redirects, negotiation and a task per request, no webhook has a use for, and it costs two thirds of
the whole: 98 against 33 microseconds of CPU (see docs/benchmarks.md).
"""

import asyncio
import functools
import re
import time
from collections.abc import Mapping

from aiohttp import (
    ClientConnectionResetError,
    ClientRequest,
    ClientTimeout,
    ConnectionTimeoutError,
    InvalidURL,
    NonHttpUrlClientError,
    StreamReader,
    TCPConnector,
)
from aiohttp.connector import Connection
from aiohttp.http import RawResponseMessage
from yarl import URL

from relay import __version__
from relay.delivery.connector import Protocol
from relay.delivery.proxy import Proxy
from relay.delivery.times import Times

LINE_LIMIT = 8190
"""Bytes of an answer's status line, and of each of its headers."""

HEADER_LIMIT = 128
"""Headers of an answer."""

_QUOTED = re.compile(r"https?://[\w.:-]+(?:[/?][\w.~:/?@!$&'()*+,;=%-]*)?", re.ASCII).fullmatch
_BREAK = re.compile(r"[\r\n\0]").search
_AGENT = f"hookferry/{__version__}"
_ANNOUNCEMENTS = range(100, 200)
_SWITCHING = 101


class Response:
    """An answer whose head has been read; its body is `content`."""

    __slots__ = ("_connection", "content", "headers", "reason", "status")

    def __init__(self, message: RawResponseMessage, content: StreamReader, connection: Connection) -> None:
        self.status = message.code
        self.reason = message.reason
        self.headers = message.headers
        self.content = content
        self._connection = connection

    def end(self) -> None:
        """Give the connection back, or drop it: when anything is still under way in either direction."""
        transport = self._connection.transport
        if transport is None or transport.get_write_buffer_size() or not self.content.is_eof():
            self._connection.close()
        else:
            self._connection.release()


class Exchange:
    """Asks receivers by one method; `connect_timeout` spans look-up, connect and handshake, in seconds."""

    def __init__(self, method: str, connect_timeout: float, proxy: Proxy | None = None) -> None:
        self._method = method
        self._proxy = proxy
        self._loop = asyncio.get_running_loop()
        self._timeout = ClientTimeout(
            total=None,  # the client's own spans the retry and the body as well
            connect=connect_timeout,
            ceil_threshold=float("inf"),  # aiohttp would round timeouts above 5 s up to whole seconds
        )
        self._prepare = functools.lru_cache(maxsize=16)(self._prepared)

    async def ask(
        self,
        connector: TCPConnector,
        url: str | URL,
        headers: Mapping[str, str],
        body: bytes,
        times: Times | None = None,
    ) -> Response:
        """Send a request and return the answer as soon as its head is there, noting `times` on the way.

        Raises:
            ValueError: a header holds a line break or NUL.
            aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError: no answer could be had.
            Blocked: the proxy must not be asked for it.
        """
        request, start = self._prepare(url)
        head = _head(start, headers, len(body))
        try:
            connection = await connector.connect(request, [], self._timeout)
        except TimeoutError as error:
            raise ConnectionTimeoutError("not connected in time") from error
        if times is not None and isinstance(connection.protocol, Protocol):
            times.connected, times.ready = connection.protocol.connected_at, time.perf_counter()
        try:
            response = await _converse(connection, head, body)
        except BaseException:
            connection.close()
            raise
        if times is not None:
            times.answered = time.perf_counter()
        return response

    def _prepared(self, url: str | URL) -> tuple[ClientRequest, str]:
        """Return what the connector wants to know of a URL, and a request's first lines."""
        target = _as_written(url) if isinstance(url, str) else url
        if target.scheme not in ("http", "https"):
            raise NonHttpUrlClientError(target)
        request = ClientRequest(self._method, target, loop=self._loop)
        # Its headers are now Host and, where the URL has a user, Authorization.
        own = {name: value for name, value in request.headers.items() if name in ("Host", "Authorization")}
        path = target.raw_path_qs
        if self._proxy is not None:
            self._proxy.check(target)
            # Host is what aiohttp would add at the first connect, and so change the key of the pool.
            tunnel = {"Host": own["Host"], "User-Agent": _AGENT, **self._proxy.credentials}
            request.update_proxy(self._proxy.url, None, tunnel)
            if target.scheme == "http":  # without a tunnel the proxy reads the request itself
                path = f"http://{own['Host']}{path}"
                own |= self._proxy.credentials
        return request, f"{self._method} {path} HTTP/1.1\r\n{_lines(own)}"


async def _converse(connection: Connection, head: bytes, body: bytes) -> Response:
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or transport.is_closing():
        raise ClientConnectionResetError("the connection was closed meanwhile")
    protocol.set_response_params(
        read_until_eof=True,
        auto_decompress=False,
        max_line_size=LINE_LIMIT,
        max_field_size=LINE_LIMIT,
        max_headers=HEADER_LIMIT,
    )
    # A large body waits in the transport's buffer, so that an early answer is seen meanwhile.
    transport.write(head + body)
    while True:
        message, content = await protocol.read()
        if message.code not in _ANNOUNCEMENTS or message.code == _SWITCHING:
            return Response(message, content, connection)


def _head(start: str, headers: Mapping[str, str], length: int) -> bytes:
    if _BREAK("".join(headers.values())) or _BREAK("".join(headers)):
        raise ValueError("a header holds a control character: a line break or NUL")
    agent = "" if any(name.lower() == "user-agent" for name in headers) else f"User-Agent: {_AGENT}\r\n"
    return f"{start}{agent}{_lines(headers)}Content-Length: {length}\r\n\r\n".encode()


def _lines(headers: Mapping[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


def _as_written(url: str) -> URL:
    """Parse a URL without yarl's unquoting where it needs no quoting either.

    Raises:
        aiohttp.InvalidURL: it is none.
    """
    try:
        return URL(url, encoded=bool(_QUOTED(url)))
    except ValueError as error:
        raise InvalidURL(url, str(error)) from error
