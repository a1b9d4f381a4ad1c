"""One HTTP exchange: a request written at once, on a connection of the pool, and its answer read.

aiohttp's connector (look-up, TLS, pool) does the work. What its session adds, cookies, redirects,
negotiation and a task per request, no webhook has a use for, and it costs two thirds of the whole:
98 against 33 microseconds of CPU (see docs/benchmarks.md).
"""

import asyncio
import functools
import re
import time
from collections.abc import Mapping
from typing import cast

from aiohttp import (
    ClientConnectionResetError,
    ClientRequest,
    ClientTimeout,
    ConnectionTimeoutError,
    InvalidURL,
    NonHttpUrlClientError,
    TCPConnector,
)
from aiohttp.connector import Connection
from yarl import URL

from relay import __version__
from relay.delivery.http.connector import Protocol
from relay.delivery.http.proxy import Proxy
from relay.delivery.http.response import Reply
from relay.delivery.http.timings import Times

_QUOTED = re.compile(r"https?://[\w.:-]+(?:[/?][\w.~:/?@!$&'()*+,;=%-]*)?", re.ASCII).fullmatch
_BREAK = re.compile(r"[\r\n\0]").search
_AGENT = f"hookferry/{__version__}"


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
        reply: Reply,
        *,
        oldest: float,
        times: Times | None = None,
    ) -> None:
        """Send a request and read the answer into `reply`, noting `times` on the way.

        Also where this raises, or is cancelled, `reply` holds what has come by then. No connection is
        used that was made before `oldest`, by `time.perf_counter`.

        Raises:
            ValueError: a header holds a line break or NUL.
            aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError: no answer could be had.
            Blocked: the proxy must not be asked for it.
        """
        request, start = self._prepare(url)
        head = _head(start, headers, len(body))
        while True:
            try:
                connection = await connector.connect(request, [], self._timeout)
            except TimeoutError as error:
                raise ConnectionTimeoutError("not connected in time") from error
            protocol = cast("Protocol | None", connection.protocol)
            if protocol is None or protocol.connected_at >= oldest:
                break
            connection.close()
        if times is not None and protocol is not None:
            times.connected, times.ready = protocol.connected_at, time.perf_counter()
        try:
            await _converse(connection, protocol, head + body, reply)
        except BaseException:
            connection.close()
            raise
        finally:
            if times is not None and protocol is not None:
                times.answered = protocol.answered_at
        transport = connection.transport
        if reply.keeps and transport is not None and not transport.get_write_buffer_size():
            connection.release()
        else:  # something is still under way in either direction
            connection.close()

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


async def _converse(connection: Connection, protocol: Protocol | None, request: bytes, reply: Reply) -> None:
    transport = connection.transport
    if protocol is None or transport is None or transport.is_closing():
        raise ClientConnectionResetError("the connection was closed meanwhile")
    # A large body waits in the transport's buffer, so that an early answer is seen meanwhile.
    transport.write(request)
    await protocol.hear(reply)


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
