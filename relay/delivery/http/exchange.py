"""One HTTP exchange: write a request to a pooled connection and read the response.

aiohttp's connector resolves names, does TLS and keeps the pool. Its session would add cookies, redirects,
negotiation and a task per request; webhooks do not need these, and they cost two thirds of the CPU time:
98 instead of 33 microseconds (see docs/benchmarks.md).
"""

import asyncio
import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from aiohttp import (
    ClientConnectionResetError,
    ClientOSError,
    ClientRequest,
    ClientTimeout,
    ConnectionTimeoutError,
    InvalidURL,
    NonHttpUrlClientError,
    ServerDisconnectedError,
    TCPConnector,
)
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from relay import __version__
from relay.delivery.http.proxy import Proxy
from relay.delivery.http.response import TOO_MUCH, WIRE_LIMIT, ResponseParser
from relay.delivery.http.result import Timing

_QUOTED = re.compile(r"https?://[\w.:-]+(?:[/?][\w.~:/?@!$&'()*+,;=%-]*)?", re.ASCII).fullmatch
_BREAK = re.compile(r"[\r\n\0]").search
_AGENT = f"hookferry/{__version__}"
_BROKEN = "a header contains a line break or NUL"


_SLICE = 16 * 1024  # bytes parsed at once: a recv brings 256 KiB, enough for 10,000 heads of 500 bytes
_HEADS = 16  # heads that wait to be read; a proxy needs one or two before the final response


class Protocol(ResponseHandler):
    """Reads responses with a `ResponseParser`, and limits those of a proxy, which aiohttp parses.

    Args:
        loop: the running loop.
        unexpected: called when the receiver sends bytes while no request is in flight.
        verified: called with the receiver's certificate after a TLS handshake.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        unexpected: Callable[[], None],
        verified: Callable[[Mapping[str, Any]], None],
    ) -> None:
        super().__init__(loop)
        self.connected_at = time.perf_counter()  # after the connect, before the TLS handshake
        self.answered_at = 0.0  # when the last status line was complete
        self._unexpected = unexpected
        self._verified = verified
        self._response: ResponseParser | None = None
        self._finished: asyncio.Future[None] | None = None  # for the end of the response
        self._tunnel_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection; called after the TLS handshake."""
        super().connection_made(transport)
        if certificate := transport.get_extra_info("peercert"):
            self._verified(certificate)

    async def receive(self, response: ResponseParser) -> None:
        """Read a response to its end, or to the first byte that cannot be parsed.

        Raises:
            aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError: it has no status line.
        """
        self._response, self._finished = response, self._loop.create_future()
        try:
            await self._finished
        finally:
            self._response = self._finished = None
        if response.status is None:
            raise HttpProcessingError(message=response.trouble or "no HTTP response")

    def data_received(self, data: bytes) -> None:
        """Parse bytes that arrived."""
        response = self._response
        if response is None:
            if self._parser is not None:
                self._read_tunnel(data)
            else:  # later bytes could be mistaken for the next response
                self._unexpected()
                self.abort()
            return
        response.feed(data)
        if not self.answered_at and response.status is not None:
            self.answered_at = time.perf_counter()
        if response.is_over and self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the response with the connection."""
        super().connection_lost(exc)
        response, finished = self._response, self._finished
        if response is None or finished is None:
            return
        has_status = response.status is not None
        response.end()
        if finished.done():
            return
        if has_status or response.is_garbage:
            finished.set_result(None)
            return
        failure: BaseException = exc or ServerDisconnectedError()
        if isinstance(exc, OSError):
            failure = ClientOSError(*exc.args)
            failure.__cause__ = exc
        finished.set_exception(failure)

    def close(self) -> None:
        """Abort the connection: an orderly TLS close waits 30 s for a receiver that hangs."""
        self.abort()

    def _read_tunnel(self, data: bytes) -> None:
        """Parse a proxy's response to the request for a tunnel."""
        self._tunnel_bytes += len(data)
        if self._tunnel_bytes <= WIRE_LIMIT and len(self._buffer) <= _HEADS:
            for at in range(0, len(data), _SLICE):
                if self._exception is None:
                    super().data_received(data[at : at + _SLICE])
            return
        if self.transport is not None:
            self.transport.abort()
        self.set_exception(HttpProcessingError(message=TOO_MUCH))


class Exchange:
    """Sends requests of one method; `connect_timeout` (seconds) spans look-up, connect and handshake."""

    def __init__(self, method: str, connect_timeout: float, proxy: Proxy | None = None) -> None:
        self._method = method
        self._proxy = proxy
        self._loop = asyncio.get_running_loop()
        self._timeout = ClientTimeout(
            total=None,  # the client's timeout also spans the second try and the body
            connect=connect_timeout,
            ceil_threshold=float("inf"),  # by default aiohttp rounds timeouts above 5 s up to whole seconds
        )
        self._prepare = functools.lru_cache(maxsize=16)(self._prepared)

    async def run(
        self,
        connector: TCPConnector,
        url: str | URL,
        headers: Mapping[str, str],
        body: bytes,
        response: ResponseParser,
        *,
        oldest: float,
        timing: Timing | None = None,
    ) -> None:
        """Send a request and read the response into `response`; note the time of each step in `timing`.

        If this raises or is cancelled, `response` has the part that arrived before. Connections made before
        `oldest` (by `time.perf_counter`) are not used.

        Raises:
            ValueError: a header contains a line break or NUL.
            aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError: there is no response.
            Blocked: the target must not be requested from the proxy.
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
        if timing is not None and protocol is not None:
            timing.connected, timing.ready = protocol.connected_at, time.perf_counter()
        transport = connection.transport
        try:
            if protocol is None or transport is None or transport.is_closing():
                raise ClientConnectionResetError("the connection was closed meanwhile")  # noqa: TRY301 - closes it below
            # A large body waits in the transport's buffer, so that an early response is read meanwhile.
            transport.write(head + body)
            await protocol.receive(response)
        except BaseException:
            connection.close()
            raise
        finally:
            if timing is not None and protocol is not None:
                timing.answered = protocol.answered_at
        transport = connection.transport
        if response.keeps and transport is not None and not transport.get_write_buffer_size():
            connection.release()
        else:  # bytes are still in transit in one of the directions
            connection.close()

    def _prepared(self, url: str | URL) -> tuple[ClientRequest, str]:
        """Return the connector's view of a URL, and the first lines of a request."""
        target = _as_written(url) if isinstance(url, str) else url
        if target.scheme not in ("http", "https"):
            raise NonHttpUrlClientError(target)
        request = ClientRequest(self._method, target, loop=self._loop)
        # It has the headers Host and, if the URL has a user, Authorization.
        own = {name: value for name, value in request.headers.items() if name in ("Host", "Authorization")}
        path = target.raw_path_qs
        if self._proxy is not None:
            self._proxy.check(target)
            # aiohttp would add Host at the first connect, which would change the key of the pool.
            tunnel = {"Host": own["Host"], "User-Agent": _AGENT, **self._proxy.credentials}
            request.update_proxy(self._proxy.url, None, tunnel)
            if target.scheme == "http":  # there is no tunnel: the proxy reads the request
                path = f"http://{own['Host']}{path}"
                own |= self._proxy.credentials
        lines = "".join(f"{name}: {value}\r\n" for name, value in own.items())
        return request, f"{self._method} {path} HTTP/1.1\r\n{lines}"


def _head(start: str, headers: Mapping[str, str], length: int) -> bytes:
    agent = _agent_line(tuple(headers))
    if _BREAK("".join(headers.values())):
        raise ValueError(_BROKEN)
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"{start}{agent}{lines}Content-Length: {length}\r\n\r\n".encode()


@functools.lru_cache(maxsize=256)
def _agent_line(names: tuple[str, ...]) -> str:
    """Check the names of headers; return the relay's User-Agent, or nothing if they have one."""
    if _BREAK("".join(names)):
        raise ValueError(_BROKEN)
    return "" if "user-agent" in map(str.lower, names) else f"User-Agent: {_AGENT}\r\n"


def _as_written(url: str) -> URL:
    """Parse a URL; where it needs no quoting, do not unquote it either.

    Raises:
        aiohttp.InvalidURL: it is not a URL.
    """
    try:
        return URL(url, encoded=bool(_QUOTED(url)))
    except ValueError as error:
        raise InvalidURL(url, str(error)) from error
