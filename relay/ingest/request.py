"""One request: its head as aiohttp's parser gave it, its body as it comes, and whether its sender waits."""

import asyncio
import fcntl
import termios

from aiohttp import HttpVersion11, StreamReader
from aiohttp.http import HttpProcessingError, RawRequestMessage

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ChunkingError(HttpProcessingError):
    """A body comes in chunks that are mostly framing: parsing them costs far more than sending them."""


class VersionError(HttpProcessingError):
    """A request in another version of HTTP than 1.0 and 1.1, or without a target."""


class Request:
    """One request; a `web.Request` can do more, and costs an event half of what the relay itself does.

    What follows a chunked body or an offer to upgrade on the same connection is not to be trusted: the parser
    takes a trailer for a header of the next request, and loses what comes behind an offer. So these are last.
    """

    __slots__ = (
        "_address", "_head", "_transport", "content", "headers", "is_1_1", "is_chunked", "is_half_closed",
        "is_kept", "method", "wire_bytes",
    )  # fmt: skip

    def __init__(self, head: RawRequestMessage, content: StreamReader, transport: asyncio.Transport) -> None:
        self.method = head.method
        self.headers = head.headers
        self.content = content
        self.is_kept = not (head.should_close or head.chunked or head.upgrade)  # the connection, afterwards
        self.is_1_1 = head.version == HttpVersion11  # not 1.0
        self.is_chunked = head.chunked
        self.wire_bytes = 0  # of a chunked body with its framing, so far
        self.is_half_closed = False  # the sender sends nothing more: it waits for the answer, or is gone
        self._address: str | None = None
        self._head = head
        self._transport = transport

    @property
    def target(self) -> str:
        """Path and query as on the wire; a whole URL, as sent to proxies, must be taken (RFC 9112, 3.2.2)."""
        target = self._head.path
        return target if target.startswith("/") else self._head.url.raw_path_qs

    @property
    def content_length(self) -> int:
        """Bytes of the body, as announced; 0 where they are not."""
        return int(self.headers.get("Content-Length", 0))  # the parser has seen that it is a number

    @property
    def remote(self) -> str | None:
        """The address that sent it: a sender's, or a proxy's."""
        return self._address or address_of(self._transport)

    def remember_address(self) -> None:
        """Keep the address for when the sender has hung up; asking for it would cost each event time."""
        self._address = address_of(self._transport)

    @property
    def is_gone(self) -> bool:
        """Whether the sender has hung up for certain."""
        return self._transport.is_closing()

    @property
    def may_be_gone(self) -> bool:
        """Whether the sender has closed its side at least: what becomes of the answer tells the rest."""
        return self.is_half_closed or self._transport.is_closing()

    @property
    def has_unread(self) -> bool:
        """Whether the sender has sent something that has not been taken from the socket yet."""
        return has_unread(self._transport)

    def ask_for_body(self) -> None:
        """Tell a sender who waits to be asked for its body that it may come (RFC 9110, 10.1.1)."""
        self._transport.write(CONTINUE)


def address_of(transport: asyncio.Transport) -> str | None:
    """Return the address at the other end; None: it has none (unix sockets), or it is not known any more."""
    try:
        peer = transport.get_extra_info("peername")
    except (OSError, ValueError):  # uvloop asks the socket each time, which may be closed
        return None
    return str(peer[0]) if isinstance(peer, tuple) else None


def has_unread(transport: asyncio.Transport) -> bool:
    """Return whether bytes wait in a connection's socket."""
    try:
        return any(fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4)))
    except (OSError, ValueError):  # closed
        return False
