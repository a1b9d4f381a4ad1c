"""aiohttp's client, set up so that a receiver can do no harm with it."""

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
from relay.delivery.http.response import TOO_MUCH, WIRE_LIMIT, Reply
from relay.errors import RelayError

_SLICE = 16 * 1024  # bytes parsed at once: a recv brings 256 KiB, enough for 10,000 heads of 500 bytes
_HEADS = 16  # heads waiting to be looked at; a proxy has use for one or two before the answer

DNS_TTL = 10
"""Seconds that a resolved address is used for new connections.

The system's resolver does not tell a record's TTL, so this is its upper bound: shorter ones are honoured
10 s late at most, and longer ones are kept by the system's resolver.
"""

AddressInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]
"""Family, type, protocol, canonical name and address: what a socket is about to connect to."""

SocketFactory = Callable[[AddressInfo], socket.socket]


class Protocol(ResponseHandler):
    """Reads answers with a `Reply`, and bounds what a proxy answers, which aiohttp parses itself.

    Args:
        loop: the running one.
        unasked: called when the receiver sends what it was not asked for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, unasked: Callable[[], None]) -> None:
        super().__init__(loop)
        self.connected_at = time.perf_counter()  # made between the connect and the TLS handshake
        self.answered_at = 0.0  # when the last status line was complete
        self._unasked = unasked
        self._reply: Reply | None = None
        self._waiter: asyncio.Future[None] | None = None  # for all of the reply
        self._tunnel_bytes = 0

    async def hear(self, reply: Reply) -> None:
        """Read an answer to its end, or for as long as it can be read.

        Raises:
            aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError: it has no status line.
        """
        self._reply, self._waiter = reply, self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._reply = self._waiter = None
        if reply.status is None:
            raise HttpProcessingError(message=reply.trouble or "no HTTP answer")

    def data_received(self, data: bytes) -> None:
        """Take in what arrived."""
        reply = self._reply
        if reply is None:
            if self._parser is not None:
                self._read_tunnel(data)
            else:  # nothing that follows could be told from an answer
                self._unasked()
                self.abort()
            return
        reply.feed(data)
        if not self.answered_at and reply.status is not None:
            self.answered_at = time.perf_counter()
        if reply.is_over:
            self._wake(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Take the end of the connection for the end of the answer."""
        super().connection_lost(exc)
        reply = self._reply
        if reply is None:
            return
        is_answered = reply.status is not None
        reply.end()
        failure: BaseException | None = None
        if not is_answered and not reply.is_garbage:
            failure = exc or ServerDisconnectedError()
            if isinstance(exc, OSError):
                failure = ClientOSError(*exc.args)
                failure.__cause__ = exc
        self._wake(failure)

    def close(self) -> None:
        """Drop the connection: a polite TLS close waits 30 s for receivers that are hanging anyway."""
        self.abort()

    def _wake(self, failure: BaseException | None) -> None:
        if self._waiter is None or self._waiter.done():
            return
        if failure is None:
            self._waiter.set_result(None)
        else:
            self._waiter.set_exception(failure)

    def _read_tunnel(self, data: bytes) -> None:
        """Parse what a proxy answers to the wish for a tunnel."""
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
    unasked: Callable[[], None],
) -> TCPConnector:
    """Open a pool of connections.

    Args:
        sockets: makes the socket of every single connect; may refuse with an `OSError`.
        resolver: looks names up; the connector does not close it.
        tls: what `tls_of` returned.
        keep: whether connections are kept for the next request.
        unasked: called when a receiver sends what it was not asked for.
    """
    connector = TCPConnector(
        ssl=tls,
        resolver=resolver,
        ttl_dns_cache=DNS_TTL,
        limit=0,  # the lane's slots bound it; waiting in a second queue would count as the receiver's
        force_close=not keep,
        socket_factory=sockets,
    )
    # There is no public way to a protocol of one's own.
    connector._factory = functools.partial(  # type: ignore[assignment]  # noqa: SLF001
        Protocol,
        loop=connector._loop,  # noqa: SLF001
        unasked=unasked,
    )
    return connector


def tls_of(destination: DestinationConfig) -> ssl.SSLContext | bool:
    """Return what a destination's `ca_file` and `client_cert` make of TLS; True: aiohttp's own defaults.

    A `ca_file` alone is trusted, else the system's certificates.

    Raises:
        RelayError: a file cannot be read, or does not hold what it should.
    """
    ca_file, client_cert = destination.ca_file, destination.client_cert
    if ca_file is None and client_cert is None:
        return True
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one, too
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
