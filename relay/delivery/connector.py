"""aiohttp's client, set up so that a receiver can do no harm with it."""

import asyncio
import functools
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from aiohttp import TCPConnector
from aiohttp.abc import AbstractResolver
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError

from relay.config.model import DestinationConfig
from relay.errors import RelayError

WIRE_LIMIT = 2**20
"""Bytes of one answer, counted on the wire; generous, as bodies are given up long before."""

_SLICE = 16 * 1024  # bytes parsed at once: a recv brings 256 KiB, enough for 10,000 heads of 500 bytes
_HEADS = 16  # heads waiting to be looked at; a receiver has use for one or two before the answer
_DNS_TTL = 30  # seconds; the guard judges the dialled address, so a cached one is no risk

AddressInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]
"""Family, type, protocol, canonical name and address: what a socket is about to connect to."""

SocketFactory = Callable[[AddressInfo], socket.socket]


class Protocol(ResponseHandler):
    """Bounds an answer on the wire, and ends a body whose framing is broken.

    aiohttp bounds what it hands out; but receivers can send for ever what is neither header nor body:
    1xx announcements, remarks behind a chunk's size. And where a chunk is malformed, aiohttp 3.14
    drops the connection yet leaves the reader of the body waiting for its timeout.
    """

    _received = 0

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.connected_at = time.perf_counter()  # made between the connect and the TLS handshake

    def set_response_params(self, **params: Any) -> None:
        """Begin an answer."""
        self._received = 0
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, up to the limits."""
        if len(data) > _SLICE:
            for at in range(0, len(data), _SLICE):
                if self._exception is None:
                    self.data_received(data[at : at + _SLICE])
            return
        self._received += len(data)
        if self._received <= WIRE_LIMIT and len(self._buffer) <= _HEADS:
            super().data_received(data)
            return
        if self.transport is not None:
            self.transport.abort()
        self.set_exception(HttpProcessingError(message="far more than an answer"))

    def close(self) -> None:
        """Drop the connection: a polite TLS close waits 30 s for receivers that are hanging anyway."""
        self.abort()

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        """End head and body alike."""
        super().set_exception(exc, *cause)
        payload = self._payload
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(exc, *cause)


def open_connector(
    *, sockets: SocketFactory, resolver: AbstractResolver, tls: ssl.SSLContext | bool, keep: bool
) -> TCPConnector:
    """Open a pool of connections.

    Args:
        sockets: makes the socket of every single connect; may refuse with an `OSError`.
        resolver: looks names up; the connector does not close it.
        tls: what `tls_of` returned.
        keep: whether connections are kept for the next request.
    """
    connector = TCPConnector(
        ssl=tls,
        resolver=resolver,
        ttl_dns_cache=_DNS_TTL,
        limit=0,  # the lane's slots bound it; waiting in a second queue would count as the receiver's
        force_close=not keep,
        socket_factory=sockets,
    )
    # There is no public way to a protocol of one's own.
    connector._factory = functools.partial(Protocol, loop=connector._loop)  # type: ignore[assignment]  # noqa: SLF001
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
