"""The HTTP client that deliveries go out with: whatever a receiver does becomes an `Answer`."""

import asyncio
import socket
import time
from collections.abc import Collection, Mapping
from contextvars import ContextVar

from aiohttp import (
    ClientConnectionResetError,
    ClientConnectorError,
    ClientError,
    ClientOSError,
    ConnectionTimeoutError,
    ServerDisconnectedError,
)
from aiohttp.abc import AbstractResolver
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from relay.config.model import DestinationConfig
from relay.delivery.answer import Answer, Result, of_failure, of_status, one_line
from relay.delivery.connector import AddressInfo, open_connector, tls_of
from relay.delivery.exchange import Exchange, Response
from relay.delivery.guard import Blocked, refused
from relay.delivery.proxy import Proxy
from relay.delivery.resolver import Resolver
from relay.delivery.times import Times
from relay.units import render_duration

READ_LIMIT = 64 * 1024
"""Bytes read of an answer's body; beyond them the connection is closed: a 10 GB answer costs no more."""

KEEP_LIMIT = 16 * 1024
"""Bytes kept of an answer's body."""

_STEERING = ("retry-after", "webhook-delivery")  # the headers that a delivery's fate may hang on
_STEERING_LIMIT = 200  # characters; a date needs 29

_dialled: ContextVar[list[str]] = ContextVar("dialled")
"""Addresses that the attempt at hand has connected to; none means that it got a kept-alive connection."""

_times: ContextVar[Times | None] = ContextVar("times", default=None)
"""What the attempt at hand notes its steps in, where somebody wants to know."""


class Client:
    """One destination's way out: its own pool, resolver, timeouts and trust.

    To be built inside the running loop, and closed when nothing is being sent any more.

    Args:
        destination: its method, timeouts, `allow_private`, `ca_file`, `client_cert` and `proxy` are used.
        own: the relay's own listeners, as (address, port); never dialled.
        resolver: stands in for the system's.

    Raises:
        RelayError: a certificate's file cannot be read or used.
    """

    def __init__(
        self,
        destination: DestinationConfig,
        *,
        own: Collection[tuple[str, int]] = (),
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._method = destination.method
        self._timeout = destination.timeout
        self._connect_timeout = destination.connect_timeout
        self._allow_private = destination.allow_private
        self._own = tuple(own)
        self._proxy = None
        if destination.proxy is not None:
            self._proxy = Proxy(destination.proxy, allow_private=self._allow_private, own=self._own)
        tls, names = tls_of(destination), resolver or Resolver()
        self._exchange = Exchange(destination.method, destination.connect_timeout, self._proxy)
        self._pooled, self._fresh = (
            open_connector(sockets=self._socket, resolver=names, tls=tls, keep=keep) for keep in (True, False)
        )

    async def send(
        self, url: str | URL, headers: Mapping[str, str], body: bytes, times: Times | None = None
    ) -> Answer:
        """Send one request and say what came of it; a receiver can make this raise nothing.

        The total timeout spans look-up, connect, handshake, upload and answer. A status once received
        decides the result, even where the body then breaks off or stalls.

        Args:
            url: where to; a string goes out as written (a `%2F` in its query stays one).
            headers: content type, signatures and what the destination wants besides.
            body: the bytes that were signed.
            times: filled in, on a connection of the request's own, so that every step is made.

        Raises:
            ValueError: a header holds a line break.
        """
        started = time.perf_counter()
        dialled: list[str] = []
        _dialled.set(dialled)
        response: Response | None = None
        failure: Exception | None = None
        kept, whole = bytearray(), False
        try:
            async with asyncio.timeout(self._timeout):
                if times is None:
                    response = await self._request(url, headers, body, dialled)
                else:
                    times.began = started
                    response = await self._request_anew(url, headers, body, times)
                whole = await _read(response, kept)
        except (ClientError, HttpProcessingError, OSError) as error:
            failure = error.with_traceback(None)  # aiohttp's frames refer to the error, ours to the body
        finally:
            if response is not None:
                response.end()
        duration_ms = (time.perf_counter() - started) * 1000
        try:
            if response is None:
                result, text = self._name(failure, dialled)
                return Answer(result=result, error=one_line(text), duration_ms=duration_ms)
            return Answer(
                result=of_status(response.status),
                status=response.status,
                error=self._remark(response, failure),
                headers=_steering(response),
                body=bytes(kept),
                truncated=not whole,
                duration_ms=duration_ms,
            )
        finally:
            failure = None  # what it was raised from leads to this frame: a cycle, until the collector runs

    async def close(self) -> None:
        """Close every connection; requests under way end as failures."""
        await self._pooled.close()
        await self._fresh.close()

    async def _request(
        self, url: str | URL, headers: Mapping[str, str], body: bytes, dialled: list[str]
    ) -> Response:
        """Get an answer's head; when a kept-alive connection had died meanwhile, ask once more.

        Receivers close idle connections at the very moment of a send: without this, 20 of 40 POSTs
        failed. The second try has a connection of its own, so it cannot meet the same fate.
        """
        try:
            return await self._exchange.ask(self._pooled, url, headers, body)
        except ClientConnectorError:
            raise
        except (ClientOSError, ClientConnectionResetError, ServerDisconnectedError) as error:
            if dialled or _spoke(error):
                raise
        return await self._exchange.ask(self._fresh, url, headers, body)

    async def _request_anew(
        self, url: str | URL, headers: Mapping[str, str], body: bytes, times: Times
    ) -> Response:
        """Get an answer's head over a new connection, and note when each step was done."""
        _times.set(times)
        try:
            return await self._exchange.ask(self._fresh, url, headers, body, times)
        finally:
            _times.set(None)

    def _socket(self, info: AddressInfo) -> socket.socket:
        """Make the socket of one connect, unless the guard refuses its address."""
        family, kind, protocol, _, address = info
        host, port = str(address[0]), int(address[1])
        reason = refused(host, port, allow_private=self._allow_private, own=self._own)
        if reason is not None:
            raise Blocked(reason)
        _dialled.get().append(host)
        if (times := _times.get()) is not None:
            times.dialled = times.dialled or time.perf_counter()
        return socket.socket(family, kind, protocol)

    def _name(self, failure: Exception | None, dialled: list[str]) -> tuple[Result, str]:
        """Name a failure without an answer."""
        result: Result
        if isinstance(failure, ConnectionTimeoutError):
            limit = render_duration(self._connect_timeout)
            if not dialled:
                result, text = "dns", f"the name was not resolved within {limit}"
            else:  # of a proxy, what was dialled may well have taken the connection
                peer = "" if self._proxy else f" to {', '.join(dialled)}"
                result, text = "timeout", f"no connection{peer} within {limit}"
        elif failure is None or isinstance(failure, TimeoutError):
            result, text = "timeout", f"no answer within {render_duration(self._timeout)}"
        else:
            result, text = of_failure(failure)
        return result, text if self._proxy is None else f"through the proxy {self._proxy.name}: {text}"

    def _remark(self, response: Response, failure: Exception | None) -> str | None:
        """Say what the operator should know of an answer; None when all is well."""
        result, trouble = of_status(response.status), ""
        if isinstance(failure, TimeoutError):
            trouble = f"; its body was not complete within {render_duration(self._timeout)}"
        elif failure is not None:
            trouble = f"; {of_failure(failure)[1]}"
        if result == "ok" and not trouble:
            return None
        line = f"HTTP {response.status} {response.reason or ''}".rstrip()
        if result == "3xx":
            line += f" to {response.headers.get('Location', 'nowhere')}: redirects are never followed"
        return one_line(line + trouble)


async def _read(response: Response, kept: bytearray) -> bool:
    """Read a body up to the limit and keep its beginning; say whether all of it was kept."""
    size = 0
    while block := await response.content.readany():
        size += len(block)
        kept += block[: max(0, KEEP_LIMIT - len(kept))]
        if size > READ_LIMIT:
            return False
    return size <= KEEP_LIMIT


def _spoke(error: Exception) -> bool:
    """Say whether the receiver had begun to answer: aiohttp then hands over the part of the head."""
    return isinstance(error, ServerDisconnectedError) and not isinstance(error.message, str)


def _steering(response: Response) -> dict[str, str]:
    """Pick the headers that steer deliveries, where their values are plain ASCII of sane length."""
    found = {}
    for name in _STEERING:
        value = response.headers.get(name)
        if value is not None and len(value) <= _STEERING_LIMIT and value.isascii() and value.isprintable():
            found[name] = value
    return found
