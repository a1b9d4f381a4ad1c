"""The HTTP client that deliveries go out with: whatever a receiver does becomes an `Answer`."""

import asyncio
import socket
import ssl
import time
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from pathlib import Path

from aiohttp import (
    ClientConnectionResetError,
    ClientConnectorError,
    ClientError,
    ClientOSError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    DummyCookieJar,
    ServerDisconnectedError,
    TCPConnector,
)
from aiohttp.abc import AbstractResolver
from yarl import URL

from relay import __version__
from relay.config.model import DestinationConfig
from relay.delivery.answer import Answer, Result, of_failure, of_status, one_line
from relay.delivery.guard import Blocked, refused
from relay.delivery.resolver import Resolver
from relay.errors import RelayError
from relay.units import render_duration

READ_LIMIT = 64 * 1024
"""Bytes read of an answer's body; beyond them the connection is closed: a 10 GB answer costs no more."""

KEEP_LIMIT = 16 * 1024
"""Bytes kept of an answer's body."""

_STEERING = ("retry-after", "webhook-delivery")  # the headers that a delivery's fate may hang on
_STEERING_LIMIT = 200  # characters; a date needs 29
_DNS_TTL = 30  # seconds; the guard judges the dialled address, so a cached one is no risk
_LINE_LIMIT = 8190  # bytes of the status line and of each header
_HEADER_LIMIT = 128

# aiohttp puts these in on its own; a webhook names its content type, and wants neither a compressed
# answer nor a negotiation.
_NOT_AUTOMATIC = ("Accept", "Accept-Encoding", "Content-Type")

_Info = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]

_dialled: ContextVar[list[str]] = ContextVar("dialled")
"""Addresses that the attempt at hand has connected to; none means that it got a kept-alive connection."""


class Client:
    """One destination's way out: its own pool, resolver, timeouts and trust.

    To be built inside the running loop, and closed when nothing is being sent any more.

    Args:
        destination: timeouts, method, concurrency, `allow_private` and `ca_file` are used.
        own: the relay's own listeners, as (address, port); never dialled.
        resolver: stands in for the system's.

    Raises:
        RelayError: the `ca_file` cannot be read, or holds no certificate.
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
        self._resolver = resolver or Resolver()
        trust = _trust(destination.ca_file)
        self._pooled = self._session(trust=trust, keep=True)
        self._fresh = self._session(trust=trust, keep=False)

    async def send(self, url: str | URL, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send one request and say what came of it; a receiver can make this raise nothing.

        The total timeout spans look-up, connect, handshake, upload and answer. A status once received
        decides the result, even where the body then breaks off or stalls.

        Raises:
            ValueError: a header holds a line break.
        """
        started = time.perf_counter()
        dialled: list[str] = []
        _dialled.set(dialled)
        response: ClientResponse | None = None
        failure: Exception | None = None
        kept, whole = bytearray(), False
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._request(url, headers, body, dialled)
                whole = await _read(response, kept)
        except (ClientError, OSError) as error:
            failure = error
        finally:
            # At its end an answer gives the connection back; one still held broke off, ran over the
            # limit, came before the request was out, or switched protocols.
            if response is not None and response.connection is not None:
                _hang_up(response)
        duration_ms = (time.perf_counter() - started) * 1000
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

    async def close(self) -> None:
        """Close every connection; requests under way end as failures."""
        await self._pooled.close()
        await self._fresh.close()

    async def _request(
        self, url: str | URL, headers: Mapping[str, str], body: bytes, dialled: list[str]
    ) -> ClientResponse:
        """Get an answer's head; when a kept-alive connection had died meanwhile, ask once more.

        Receivers close idle connections at the very moment of a send: without this, 20 of 40 POSTs
        failed. The second try has a connection of its own, so it cannot meet the same fate.
        """
        try:
            return await self._pooled.request(
                self._method, url, headers=headers, data=body, allow_redirects=False
            )
        except ClientConnectorError:
            raise
        except (ClientOSError, ClientConnectionResetError, ServerDisconnectedError) as error:
            if dialled or _spoke(error):
                raise
        return await self._fresh.request(self._method, url, headers=headers, data=body, allow_redirects=False)

    def _session(self, *, trust: ssl.SSLContext | bool, keep: bool) -> ClientSession:
        connector = TCPConnector(
            ssl=trust,
            resolver=self._resolver,
            ttl_dns_cache=_DNS_TTL,
            limit=0,  # the lane's slots bound it; waiting in a second queue would count as the receiver's
            force_close=not keep,
            socket_factory=self._socket,
        )
        session = ClientSession(
            connector=connector,
            headers={"User-Agent": f"hookferry/{__version__}"},
            skip_auto_headers=_NOT_AUTOMATIC,
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(
                total=None,  # `send` spans the retry and the body as well
                connect=self._connect_timeout,
                ceil_threshold=float("inf"),  # aiohttp would round timeouts above 5 s up to whole seconds
            ),
            auto_decompress=False,
            trust_env=False,
            max_line_size=_LINE_LIMIT,
            max_field_size=_LINE_LIMIT,
            max_headers=_HEADER_LIMIT,
        )
        # aiohttp repeats a PUT whenever a connection breaks, even a new one; `_request` knows better.
        session._retry_connection = False  # noqa: SLF001 - there is no public switch
        return session

    def _socket(self, info: _Info) -> socket.socket:
        """Make the socket of one connect, unless the guard refuses its address."""
        family, kind, protocol, _, address = info
        host, port = str(address[0]), int(address[1])
        reason = refused(host, port, allow_private=self._allow_private, own=self._own)
        if reason is not None:
            raise Blocked(reason)
        _dialled.get().append(host)
        return socket.socket(family, kind, protocol)

    def _name(self, failure: Exception | None, dialled: list[str]) -> tuple[Result, str]:
        if isinstance(failure, ConnectionTimeoutError):
            limit = render_duration(self._connect_timeout)
            if dialled:
                return "timeout", f"no connection to {', '.join(dialled)} within {limit}"
            return "dns", f"the name was not resolved within {limit}"
        if failure is None or isinstance(failure, TimeoutError):
            return "timeout", f"no answer within {render_duration(self._timeout)}"
        return of_failure(failure)

    def _remark(self, response: ClientResponse, failure: Exception | None) -> str | None:
        """Say what the operator should know of an answer; None when all is well."""
        if isinstance(failure, TimeoutError):
            trouble = f"; its body was not complete within {render_duration(self._timeout)}"
        elif failure is not None:
            trouble = f"; {of_failure(failure)[1]}"
        else:
            trouble = ""
        status = response.status
        if of_status(status) == "3xx":
            target = response.headers.get("Location", "nowhere")
            return one_line(f"HTTP {status} to {target}: redirects are never followed{trouble}")
        if of_status(status) != "ok" or trouble:
            return one_line(f"HTTP {status} {response.reason or ''}{trouble}")
        return None


async def _read(response: ClientResponse, kept: bytearray) -> bool:
    """Read a body up to the limit and keep its beginning; say whether all of it was kept."""
    size = 0
    while block := await response.content.readany():
        size += len(block)
        kept += block[: max(0, KEEP_LIMIT - len(kept))]
        if size > READ_LIMIT:
            return False
    return size <= KEEP_LIMIT


def _hang_up(response: ClientResponse) -> None:
    """Drop a connection at once: a polite TLS close would go on reading what the receiver still sends."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()
    response.close()


def _spoke(error: Exception) -> bool:
    """Say whether the receiver had begun to answer: aiohttp then hands over the part of the head."""
    return isinstance(error, ServerDisconnectedError) and not isinstance(error.message, str)


def _steering(response: ClientResponse) -> dict[str, str]:
    """Pick the headers that steer deliveries, where their values are plain ASCII of sane length."""
    found = {}
    for name in _STEERING:
        value = response.headers.get(name)
        if value is not None and len(value) <= _STEERING_LIMIT and value.isascii() and value.isprintable():
            found[name] = value
    return found


def _trust(ca_file: Path | None) -> ssl.SSLContext | bool:
    """Return what certificates are checked against: that file alone, else the system's store."""
    if ca_file is None:
        return True
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one, too
        raise RelayError(
            f"ca_file {ca_file} cannot be used: {error.strerror or error}",
            hint="give the path of a PEM file with the certificates to trust",
        ) from error
    context.set_alpn_protocols(["http/1.1"])
    return context
