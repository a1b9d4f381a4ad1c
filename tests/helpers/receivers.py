"""Receivers that misbehave: raw servers on loopback, one function per bad habit.

    async with receivers.hang() as receiver:
        answer = await client.send(receiver.url, {}, b"{}")
    assert receiver.requests == [...]

No HTTP library is involved: the code of a habit shows each byte that it sends.
"""

import asyncio
import functools
import socket
import ssl
import struct
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from yarl import URL

BLOCK = b"x" * 65_536


@dataclass(frozen=True)
class Request:
    """One received request."""

    line: str
    headers: dict[str, str]  # lower-case names
    body: bytes


class Peer:
    """One connection of a habit."""

    def __init__(self, receiver, reader, writer):
        self.receiver = receiver
        self.reader: asyncio.StreamReader = reader
        self.writer: asyncio.StreamWriter = writer

    async def request(self) -> Request:
        """Read and record one request; if the client hangs up, the habit ends."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.rstrip("\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in fields)}
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        request = Request(line, headers, body)
        self.receiver.requests.append(request)
        self.receiver.asked.set()
        return request

    async def send(self, data: bytes) -> None:
        """Send data, no faster than the client reads."""
        self.writer.write(data)
        await self.writer.drain()
        self.receiver.sent += len(data)

    async def gone(self) -> None:
        """Wait until the client hangs up."""
        while await self.reader.read(65_536):
            pass

    async def drip(self, data: bytes, pause: float = 0.02) -> None:
        """Send one byte at a time without end."""
        for at in range(2**30):
            await self.send(data[at % len(data) :][:1])
            await asyncio.sleep(pause)

    async def flood(self, block: bytes = BLOCK, total: int = 10 * 2**30) -> None:
        """Send the same block until `total` bytes are sent or the client hangs up."""
        for _ in range(total // len(block)):
            await self.send(block)

    def reset(self) -> None:
        """Reset the connection (RST)."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Habit = Callable[[Peer], Awaitable[None]]


@dataclass
class Receiver:
    """A server with one habit; at the end, it closes all connections and raises a habit's exception."""

    habit: Habit
    tls: ssl.SSLContext | None = None
    scheme: str = ""
    host: str = "127.0.0.1"
    url: str = ""
    port: int = 0
    connections: int = 0
    sent: int = 0  # bytes
    requests: list[Request] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # a request has come
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # the habit of a connection has ended

    async def __aenter__(self) -> Self:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, self.host, 0, ssl=self.tls, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]
        scheme = self.scheme or ("https" if self.tls else "http")
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"{scheme}://{host}:{self.port}/hook"
        return self

    async def __aexit__(self, *_) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def until(self, requests: int) -> None:
        """Wait until this number of requests has arrived."""
        while len(self.requests) < requests:
            self.asked.clear()
            await self.asked.wait()

    def _accept(self, reader, writer) -> None:
        self.connections += 1
        self._tasks.add(asyncio.create_task(self._live(Peer(self, reader, writer))))

    async def _live(self, peer: Peer) -> None:
        try:
            await self.habit(peer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass  # the client hung up
        finally:
            self.ended.set()
            if not peer.writer.transport.is_closing():
                peer.writer.transport.abort() if self.tls else peer.writer.close()


def receiver(habit: Callable[..., Awaitable[None]]) -> Callable[..., Receiver]:
    """Turn a habit into a factory of receivers with that habit; it passes keywords on to the habit."""

    @functools.wraps(habit)
    def make(*, tls: ssl.SSLContext | None = None, scheme: str = "", host: str = "127.0.0.1", **options):
        return Receiver(functools.partial(habit, **options), tls=tls, scheme=scheme, host=host)

    return make


def head(status: str = "200 OK", **headers: object) -> bytes:
    """Render the head of a response: `head("204 No Content", retry_after=3)`."""
    lines = [f"{name.replace('_', '-').title()}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1", "surrogateescape")


# --- well-behaved -------------------------------------------------------------------------------------


@receiver
async def answers(peer, status="200 OK", body=b"", **headers):
    """Send the same response to each request, and keep the connection open."""
    while True:
        await peer.request()
        length = {} if status.startswith("204") else {"content_length": len(body)}
        await peer.send(head(status, **length, **headers) + body)


@receiver
async def answers_until_close(peer, body=b"until close"):
    """Speak HTTP/1.0: the body ends with the connection."""
    await peer.request()
    await peer.send(b"HTTP/1.0 200 OK\r\n\r\n" + body)


@receiver
async def answers_in_chunks(peer, chunks=(b"in ", b"chunks")):
    """Send a correct chunked body."""
    while True:
        await peer.request()
        body = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in (*chunks, b""))
        await peer.send(head(transfer_encoding="chunked") + body)


@receiver
async def shows_certificates(peer):
    """Respond with the name in the client's certificate."""
    shown = peer.writer.get_extra_info("peercert") or {}
    name = shown.get("subjectAltName", ((None, "nobody"),))[0][1].encode()
    while True:
        await peer.request()
        await peer.send(head(content_length=len(name)) + name)


# --- silent and slow ----------------------------------------------------------------------------------


@receiver
async def hang(peer):
    """Read the request and never respond."""
    await peer.request()
    await peer.gone()


@receiver
async def never_reads(peer):
    """Accept, then neither read nor write: an upload fills every buffer on the way."""
    peer.writer.transport.pause_reading()
    await asyncio.Event().wait()


@receiver
async def hang_in_head(peer):
    """Stop in the middle of the status line."""
    await peer.request()
    await peer.send(b"HTTP/1.1 20")
    await peer.gone()


@receiver
async def hang_in_body(peer, status="200 OK"):
    """Send a 200 and the beginning of the body, then stop."""
    await peer.request()
    await peer.send(head(status, content_length=100) + b"begun")
    await peer.gone()


@receiver
async def drip_head(peer):
    """Send a head one byte at a time; a timeout between bytes would never fire."""
    await peer.request()
    await peer.drip(head(x_slow="y" * 80)[:-2])


@receiver
async def drip_body(peer, status="500 Internal Server Error"):
    """Send a body one byte at a time."""
    await peer.request()
    await peer.send(head(status, content_length=2**30))
    await peer.drip(b".")


@receiver
async def informational_flood(peer):
    """Send 103 responses without end."""
    await peer.request()
    await peer.flood(head("103 Early Hints") * 64)


# --- too much -----------------------------------------------------------------------------------------


@receiver
async def endless_headers(peer):
    """Send headers without end."""
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\n")
    await peer.flood(b"X-More: yes\r\n" * 4000)


@receiver
async def many_headers(peer, count=100_000):
    """Send a complete response with 100,000 headers."""
    await peer.request()
    await peer.send(head(content_length=0)[:-2])
    await peer.flood(b"X-More: yes\r\n" * 1000, total=count * 13)
    await peer.send(b"\r\n")


@receiver
async def huge_header(peer):
    """Send one header of 20 MB."""
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\nX-Huge: ")
    await peer.flood(total=20 * 2**20)
    await peer.send(b"\r\n\r\n")


@receiver
async def huge_status_line(peer):
    """Send a reason phrase of 20 MB."""
    await peer.request()
    await peer.send(b"HTTP/1.1 200 ")
    await peer.flood(total=20 * 2**20)


@receiver
async def huge_body(peer, status="200 OK"):
    """Send 10 GB."""
    await peer.request()
    await peer.send(head(status, content_length=10 * 2**30))
    await peer.flood()


@receiver
async def endless_chunks(peer):
    """Send chunks without end."""
    await peer.request()
    await peer.send(head(transfer_encoding="chunked"))
    await peer.flood(b"10000\r\n" + BLOCK + b"\r\n")


@receiver
async def endless_chunk_extension(peer):
    """Send a chunk extension of 10 GB."""
    await peer.request()
    await peer.send(head(transfer_encoding="chunked") + b"1;")
    await peer.flood()


@receiver
async def endless_trailers(peer):
    """End the body, then send trailers without end."""
    await peer.request()
    await peer.send(head(transfer_encoding="chunked") + b"2\r\nok\r\n0\r\n")
    await peer.flood(b"X-More: yes\r\n" * 4000)


@receiver
async def gzip_bomb(peer, size=100 * 2**20):
    """Send 100 MB of zeros, packed into 100 KB."""
    bomb = _bomb(size)
    while True:
        await peer.request()
        await peer.send(head(content_encoding="gzip", content_length=len(bomb)) + bomb)


@functools.cache
def _bomb(size: int) -> bytes:
    packer, zeros = zlib.compressobj(9, wbits=31), bytes(2**20)
    return b"".join([packer.compress(zeros) for _ in range(size // len(zeros))]) + packer.flush()


# --- no HTTP, or wrong HTTP ---------------------------------------------------------------------------


@receiver
async def sends(peer, answer=b""):
    """Send exactly these bytes, then close."""
    await peer.request()
    await peer.send(answer)


@receiver
async def sends_in_pieces(peer, pieces=(), pause=0.005):
    """Send each piece in a separate segment, then close."""
    await peer.request()
    for piece in pieces:
        await peer.send(piece)
        await asyncio.sleep(pause)  # else the kernel would join them


@receiver
async def sends_more_later(peer, status="204 No Content", extra=b"ok", pause=0.01):
    """Respond, keep the connection open, and send excess bytes a moment later."""
    while True:
        await peer.request()
        length = {} if status.startswith("204") else {"content_length": 0}
        await peer.send(head(status, **length))
        await asyncio.sleep(pause)  # the excess bytes must come later
        await peer.send(extra)


NONSENSE = {
    "HTTP/0.9": b"<html>hello</html>",
    "garbage": bytes(range(256)) * 8,
    "another protocol": b"220 mail.example ESMTP\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "a status of one digit": b"HTTP/1.1 2 OK\r\n\r\n",
    "switching protocols": head("101 Switching Protocols", upgrade="websocket", connection="upgrade"),
    "status 999": head("999 Beyond", content_length=0),
}
"""Bytes that are not an HTTP response, by their fault."""

BROKEN_BODIES = {
    "a chunk size that is not a number": head(transfer_encoding="chunked") + b"zz\r\nok\r\n0\r\n\r\n",
    "a chunk longer than its size": head(transfer_encoding="chunked") + b"1\r\ntoo long\r\n0\r\n\r\n",
    "chunks that stop": head(transfer_encoding="chunked") + b"2\r\nok\r\n",
    "an enormous chunk size": head(transfer_encoding="chunked") + b"f" * 40 + b"\r\nok",
    "less than its length": head(content_length=10) + b"ok",
}
"""Responses with status 200 and a broken body, by their fault."""


# --- connections --------------------------------------------------------------------------------------


@receiver
async def breaks_its_body(peer, answer):
    """Send the head, wait, and send the broken body."""
    await peer.request()
    start, end, rest = answer.partition(b"\r\n\r\n")
    await peer.send(start + end)
    await asyncio.sleep(0.02)  # the head must arrive first
    await peer.send(rest)


@receiver
async def closes_at_once(peer):
    """Accept and close."""


@receiver
async def closes_unanswered(peer):
    """Read the request and close."""
    await peer.request()


@receiver
async def answers_once(peer):
    """Respond to the first request only; close further connections and requests without a response."""
    await peer.request()
    if len(peer.receiver.requests) == 1:
        await peer.send(head(content_length=0))
        await peer.request()


@receiver
async def sends_first(peer, greeting=b"220 mail.example ESMTP\r\n"):
    """Send a greeting before any request, as a mail server does."""
    await peer.send(greeting)
    await peer.gone()


@receiver
async def resets(peer):
    """Read the request and reset the connection."""
    await peer.request()
    peer.reset()


@receiver
async def resets_in_body(peer, status="200 OK"):
    """Send a 200 and the beginning of the body; reset the connection after the client has read them."""
    await peer.request()
    await peer.send(head(status, content_length=100) + b"begun")
    await asyncio.sleep(0.02)  # an RST may overtake the bytes before it
    peer.reset()


@receiver
async def closes_kept_alive(peer):
    """Respond with keep-alive, then close the connection at the next request."""
    await peer.request()
    await peer.send(head(content_length=0))
    await peer.reader.read(1)


@receiver
async def resets_kept_alive(peer):
    """Respond with keep-alive, then reset the connection at the next request."""
    await peer.request()
    await peer.send(head(content_length=0))
    await peer.reader.read(1)
    peer.reset()


@receiver
async def breaks_off_kept_alive(peer, beginning=b"HTTP/1.1 200 O"):
    """Respond to one request, begin the response to the next one, and close."""
    await peer.request()
    await peer.send(head(content_length=0))
    await peer.request()
    await peer.send(beginning)


@receiver
async def answers_before_reading(peer, status="413 Payload Too Large"):
    """Respond after the head of the request, without reading the body."""
    await peer.reader.readuntil(b"\r\n\r\n")
    peer.writer.transport.pause_reading()
    await peer.send(head(status, content_length=0))
    await asyncio.Event().wait()


@receiver
async def sends_more_than_its_length(peer):
    """Send a second response after the first; the client must not take it for the next request."""
    await peer.request()
    await peer.send(head(content_length=2) + b"ok" + head("500 Unasked", content_length=0))
    await peer.gone()


def unused_port() -> int:
    """Return a loopback port without a listener; it stays bound, so that no other process listens on it."""
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))
    port = int(probe.getsockname()[1])
    probe.detach()  # open until this process ends
    return port


# --- a proxy ------------------------------------------------------------------------------------------

_HOP_BY_HOP = {"proxy-authorization", "connection"}


@receiver
async def forwards(peer):
    """Behave as a correct proxy: open tunnels, and forward each request on a new connection."""
    while True:
        request = await peer.request()
        method, target, _ = request.line.split(" ")
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            there = await asyncio.open_connection(host.strip("[]"), int(port))
            await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await _both_ways(peer, *there)
            return
        url = URL(target, encoded=True)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        kept = [f"{name}: {value}" for name, value in request.headers.items() if name not in _HOP_BY_HOP]
        head = "\r\n".join([f"{method} {url.raw_path_qs} HTTP/1.1", *kept, "connection: close", "", ""])
        writer.write(head.encode() + request.body)
        answer = await reader.readuntil(b"\r\n\r\n")
        size = int(answer.lower().partition(b"content-length:")[2].split()[0])
        await peer.send(answer + await reader.readexactly(size))
        writer.close()


async def _both_ways(peer, reader, writer):
    async def pump(source, sink):
        with suppress(ConnectionError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        sink.close()

    try:
        await asyncio.gather(pump(peer.reader, writer), pump(reader, peer.writer))
    finally:
        writer.close()
