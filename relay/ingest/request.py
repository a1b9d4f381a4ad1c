"""One request: its parsed head, its body as a stream, and the state of its sender."""

import asyncio
import fcntl
import termios

from aiohttp import HttpVersion11, StreamReader
from aiohttp.http import HttpProcessingError, RawRequestMessage

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ChunkingError(HttpProcessingError):
    """The chunks of a body are mostly framing: parsing them costs far more CPU than sending them."""


class VersionError(HttpProcessingError):
    """The request has no target, or another version than HTTP/1.0 and HTTP/1.1."""


class Request:
    """One request. aiohttp's `web.Request` would add half of the relay's CPU per request.

    A request with a chunked body or an offer to upgrade is the last of its connection: the parser takes a
    trailer for a header of the next request, and loses the bytes after an offer.
    """

    __slots__ = (
        "_address", "_transport", "content", "headers", "is_1_1", "is_chunked", "is_half_closed",
        "is_kept", "method", "target", "wire_bytes",
    )  # fmt: skip

    def __init__(self, head: RawRequestMessage, content: StreamReader, transport: asyncio.Transport) -> None:
        self.method = head.method
        self.headers = head.headers
        self.content = content
        self.is_kept = not (
            head.should_close or head.chunked or head.upgrade
        )  # whether the connection stays open
        self.is_1_1 = head.version == HttpVersion11  # else HTTP/1.0
        self.is_chunked = head.chunked
        self.wire_bytes = 0  # received bytes of a chunked body, with its framing
        self.is_half_closed = False  # the sender waits for the answer, or has disconnected
        # Path and query as on the wire, also of a whole URL, as proxies get it (RFC 9112, 3.2.2).
        self.target = head.path if head.path.startswith("/") else head.url.raw_path_qs
        self._address: str | None = None
        self._transport = transport

    @property
    def content_length(self) -> int:
        """Announced bytes of the body; 0 without an announcement."""
        return int(self.headers.get("Content-Length", 0))  # the parser has checked that it is a number

    @property
    def remote(self) -> str | None:
        """The address of the other end: a sender's or a proxy's."""
        return self._address or address_of(self._transport)

    def remember_address(self) -> None:
        """Keep the address in case the sender disconnects; looking it up for every event would cost CPU."""
        self._address = address_of(self._transport)

    @property
    def may_be_gone(self) -> bool:
        """Whether the sender has closed its side, and so either waits for the answer or has disconnected."""
        return self.is_half_closed or self._transport.is_closing()

    @property
    def has_unread(self) -> bool:
        """Whether the socket holds bytes that have not been read."""
        return has_unread(self._transport)

    def ask_for_body(self) -> None:
        """Send 100 Continue to a sender that waits for it (RFC 9110, 10.1.1)."""
        self._transport.write(CONTINUE)


def address_of(transport: asyncio.Transport) -> str | None:
    """Return the address of the peer; None for a unix socket, or if the address is no longer known."""
    try:
        peer = transport.get_extra_info("peername")
    except (OSError, ValueError):  # uvloop asks the socket, which may be closed
        return None
    return str(peer[0]) if isinstance(peer, tuple) else None


def has_unread(transport: asyncio.Transport) -> bool:
    """Return whether bytes wait in a connection's socket."""
    try:
        return any(fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4)))
    except (OSError, ValueError):  # closed
        return False
