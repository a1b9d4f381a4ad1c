"""Connection pools: aiohttp's connector with a protocol that limits what a receiver can do."""

import asyncio
import functools
import socket
import ssl
import time
from collections.abc import Callable

from aiohttp import ClientOSError, ServerDisconnectedError, TCPConnector
from aiohttp.abc import AbstractResolver
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError

from relay.config.schema import DestinationConfig
from relay.delivery.http.response import TOO_MUCH, WIRE_LIMIT, ResponseParser
from relay.errors import RelayError

_SLICE = 16 * 1024  # bytes parsed at once: a recv brings 256 KiB, enough for 10,000 heads of 500 bytes
_HEADS = 16  # heads that wait to be read; a proxy needs one or two before the final response

DNS_TTL = 10
"""Seconds that a resolved address is used for new connections.

The system's resolver does not report a record's TTL. A shorter TTL is followed at most 10 s late; the
system's resolver keeps longer ones.
"""

AddressInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]
"""Family, type, protocol, canonical name and address that a socket is about to connect to."""

SocketFactory = Callable[[AddressInfo], socket.socket]


class Protocol(ResponseHandler):
    """Reads responses with a `ResponseParser`, and limits those of a proxy, which aiohttp parses.

    Args:
        loop: the running loop.
        unexpected: called when the receiver sends bytes while no request is in flight.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, unexpected: Callable[[], None]) -> None:
        super().__init__(loop)
        self.connected_at = time.perf_counter()  # after the connect, before the TLS handshake
        self.answered_at = 0.0  # when the last status line was complete
        self._unexpected = unexpected
        self._response: ResponseParser | None = None
        self._finished: asyncio.Future[None] | None = None  # for the end of the response
        self._tunnel_bytes = 0

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
            else:  # later bytes could not be told from the next response
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


def open_connector(
    *,
    sockets: SocketFactory,
    resolver: AbstractResolver,
    tls: ssl.SSLContext | bool,
    keep: bool,
    unexpected: Callable[[], None],
) -> TCPConnector:
    """Open a pool of connections.

    Args:
        sockets: makes the socket of each connect; may raise an `OSError` to refuse it.
        resolver: resolves names; the connector does not close it.
        tls: the return value of `tls_of`.
        keep: whether connections are kept for the next request.
        unexpected: called when a receiver sends bytes while no request is in flight.
    """
    connector = TCPConnector(
        ssl=tls,
        resolver=resolver,
        ttl_dns_cache=DNS_TTL,
        limit=0,  # the lane's slots limit it; a wait here would count against the receiver
        force_close=not keep,
        socket_factory=sockets,
    )
    # aiohttp has no public way to set the protocol.
    connector._factory = functools.partial(  # type: ignore[assignment]  # noqa: SLF001
        Protocol,
        loop=connector._loop,  # noqa: SLF001
        unexpected=unexpected,
    )
    return connector


def tls_of(destination: DestinationConfig) -> ssl.SSLContext | bool:
    """Return the TLS context for a destination's `ca_file` and `client_cert`; True: aiohttp's defaults.

    With a `ca_file`, only its certificates are trusted, otherwise the system's.

    Raises:
        RelayError: a file cannot be read, or does not contain a certificate.
    """
    ca_file, client_cert = destination.ca_file, destination.client_cert
    if ca_file is None and client_cert is None:
        return True
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is an OSError
        raise RelayError(
            f"ca_file {ca_file} cannot be used: {error.strerror or error}",
            hint="give the path of a PEM file with the certificates to trust",
        ) from error
    if client_cert is not None:
        try:
            client_cert.load_into(context)
        except ValueError as error:
            raise RelayError(f"client_cert of {destination.name}: {error}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context
