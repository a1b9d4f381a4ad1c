"""Connection pools: aiohttp's connector with a protocol that limits the responses of receivers."""

import functools
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import TCPConnector
from aiohttp.abc import AbstractResolver

from relay.config.schema import DestinationConfig
from relay.delivery.http.exchange import Protocol
from relay.errors import RelayError

DNS_TTL = 10
"""Seconds that a resolved address is used for new connections.

The system's resolver does not report a record's TTL. A shorter TTL is followed at most 10 s late; the
system's resolver keeps longer ones.
"""

AddressInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]
"""Family, type, protocol, canonical name and address that a socket is about to connect to."""

SocketFactory = Callable[[AddressInfo], socket.socket]


def open_connector(
    *,
    sockets: SocketFactory,
    resolver: AbstractResolver,
    tls: ssl.SSLContext | bool,
    keep: bool,
    unexpected: Callable[[], None],
    verified: Callable[[Mapping[str, Any]], None],
) -> TCPConnector:
    """Open a pool of connections.

    Args:
        sockets: makes the socket of each connect; may raise an `OSError` to refuse it.
        resolver: resolves names; the connector does not close it.
        tls: the return value of `tls_of`.
        keep: whether connections are kept for the next request.
        unexpected: called when a receiver sends bytes while no request is in flight.
        verified: called with the certificate of a receiver, as `ssl.SSLSocket.getpeercert` returns it.
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
        verified=verified,
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
