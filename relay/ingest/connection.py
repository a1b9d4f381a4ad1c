"""One sender's connection: when it is read, answered and closed.

Two classes complete it by what parses HTTP: `relay.ingest.fast` and `relay.ingest.reference`.
"""

import asyncio
import fcntl
import logging
import socket
import termios
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, cast

from aiohttp import HttpVersion10, HttpVersion11, StreamReader
from aiohttp.http import HttpProcessingError, RawRequestMessage

from relay.base.eager import begin
from relay.ingest.body import in_time
from relay.ingest.replies import Response, farewell
from relay.ingest.request import ChunkingError, Request, VersionError, has_unread

log = logging.getLogger("relay.http")

KEEPALIVE = 15.0  # seconds an idle connection is kept; aiohttp's default is 3,630
FIRST_HEAD = 10.0  # seconds for the first request's head
LINGERING = 1.0  # seconds to swallow the rest of a refused body
MOST_KEPT = 512
"""Open connections beyond which every answer closes its connection.

Ten thousand workers that send a heartbeat every 30 s and keep their connections would otherwise have 5,000
idle connections. That exceeds the cap: other senders' heartbeats would be refused. No proxy needs as many.
"""

_FAILED = b'{"error":{"code":"internal_error","message":"Internal server error"}}'
SLICE = 2**14  # bytes that the parser is given at once where they may be several requests
CHUNKS = 2**12  # bytes of a chunked body likewise: a microsecond for each chunk of one byte, which takes six
TURN = 0.001  # seconds that one turn of the loop may spend on parsing one sender's chunks
WASTE = 2**18  # bytes by which the framing of a chunked body may outweigh the body itself
READ_AHEAD = 2**18  # bytes: with twice as many of a body unread, no more are taken from the socket
YIELDING = (0.001, 0.001, 0.002, 0.004)
"""Seconds, one after the other, for which a request that did not wait its turn lets events be committed."""

_HEARD_EVERY = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # seconds between looks; the last one repeats


Parsed = tuple[Sequence[tuple[RawRequestMessage, StreamReader]], bool, bytes]
"""Of a parser: new requests with their bodies; the rest is for upgrades, and the relay takes none."""


class Parser(Protocol):
    """What turns a connection's bytes into requests and their bodies."""

    def feed_data(self, data: bytes, /) -> Parsed:
        """Parse bytes; return at most one new request with its body.

        Raises:
            HttpProcessingError: the bytes are not HTTP.
        """
        ...

    def message_consumed(self) -> None:
        """Parse the next request: the last one is answered."""
        ...

    def pause_reading(self) -> None:
        """Stop within the present body until it has been read."""
        ...


class Owner(Protocol):
    """The listener: it counts its connections and answers their requests."""

    handle: Callable[[Request], Awaitable[Response]]  # answers one request
    is_committing: Callable[[], bool]  # whether events wait for the database
    connections: set["Connection"]
    under_way: int  # requests, of all its connections
    idle: asyncio.Event  # set once no request is under way
    is_leaving: bool  # every answer closes its connection

    def connection_made(self, connection: "Connection", transport: asyncio.Transport) -> None:
        """Count a new connection."""
        ...

    def connection_lost(self, connection: "Connection") -> None:
        """Stop counting a connection; no request is under way on it."""
        ...

    def unroutable(self, reason: str, transport: asyncio.Transport, problem: str) -> None:
        """Count bytes that are not an HTTP request."""
        ...

    def overhear(self, request: Request) -> None:
        """Note a request on a connection that was turned away."""
        ...


class Connection(asyncio.Protocol):
    """One connection, closed if it never says what it wants.

    Requests are answered one at a time, in their order. The parser stops after each; what a sender has sent
    behind it without waiting (RFC 9112, 9.3.2) stays unparsed until the answer is written, and while there
    is any, nothing more is taken from the socket. A turn of the loop begins one request at most, and parses
    chunks for a millisecond at most: senders of very many requests or chunks hold up nobody else.

    A sender may close its own side after its last request and wait for the answers (RFC 9112, 9.6). Until an
    answer is written, this looks the same as a sender that is gone; afterwards, the one acknowledges the
    answer and the other resets the connection.
    """

    __slots__ = (
        "_behind", "_is_catching_up", "_is_ending", "_is_full", "_is_half_closed", "_is_leaving", "_is_over",
        "_is_resting", "_is_turned_away", "_loop", "_owner", "_parser", "_patience", "_request",
        "_silent_since", "_task",
        "_transport", "_unread",
    )  # fmt: skip

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._parser: Parser | None = None  # set by the subclass
        self._transport: asyncio.Transport | None = None
        self._request: Request | None = None  # under way
        self._task: asyncio.Task[object] | None = None
        self._behind = bytearray()  # waits to be parsed; while there is any, nothing is read
        self._is_catching_up = False  # what is begun was sent before the last answer
        self._is_resting = False  # parsing goes on in the next turn of the loop
        self._is_full = False  # nothing is read because a body has to be read first
        self._is_over = False  # nothing is parsed any more
        self._is_half_closed = False  # the sender sends nothing more, but may wait for answers
        self._is_ending = False  # our own side is closed once everything is written
        self._is_leaving = False  # nothing is begun any more
        self._is_turned_away = False  # answered before anything was asked
        self._unread: asyncio.Future[None] | None = None  # while the sender does not read its answers
        self._patience = FIRST_HEAD
        self._silent_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the connection. TCP_NODELAY every loop has set; TCP's own keep-alive would take two hours."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's inherit from nothing
        self._silent_since = self._loop.time()
        self._owner.connection_made(self, self._transport)

    def connection_lost(self, _error: Exception | None) -> None:
        """Let the request under way go on: what has come whole will be stored."""
        self._behind.clear()
        self._transport = self._parser = None  # which knows us: the cycle would wait for the collector
        self._is_over = True
        if self._request is not None and not self._request.content.is_eof():
            self._request.content.set_exception(ConnectionResetError("the sender hung up"))
        self.resume_writing()
        if self._task is None:
            self._owner.connection_lost(self)

    def eof_received(self) -> bool:
        """Keep the connection open while the sender may wait for an answer; say whether to do so."""
        request = self._request
        if self._is_over or (request is None and not self._is_resting):
            return False
        self._is_half_closed = True
        if request is not None:
            request.is_half_closed = True
            self._cut_short()
        return True

    def _cut_short(self) -> None:
        """End a body whose rest can no longer come."""
        request = self._request
        if request is None or request.content.is_eof():
            return
        if not (self._is_full or self._behind or self._is_resting):
            self._is_over = True
            request.content.set_exception(ConnectionResetError("the sender closed within a body"))

    # --- reading --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse, unless the request before has not been answered yet; read away what comes after the end."""
        if self._is_over:
            return
        request = self._request
        if (
            not self._behind
            and (request is None or not request.content.is_eof())  # as `_may_parse`, which is a call more
            and (len(data) <= SLICE or len(data) <= self._missing)
        ):
            self._parse(data, at_once=True)
        else:
            self._behind += data
            self._go_on(at_once=True)

    @property
    def _may_parse(self) -> bool:
        """Whether no request has to be answered first."""
        return self._request is None or not self._request.content.is_eof()

    @property
    def _missing(self) -> int:
        """Bytes of the present body that are still to come; 0 where nobody knows."""
        request = self._request
        if request is None or request.is_chunked:
            return 0
        return request.content_length - request.content.total_bytes

    def _go_on(self, *, at_once: bool = False) -> None:
        """Parse what waits, until a request has to be answered first or this turn has had its share."""
        if not self._is_resting:
            until = self._loop.time() + TURN
            while (
                self._behind and self._may_parse and not (self._is_over or self._is_full or self._is_resting)
            ):
                is_chunked = self._request is not None and self._request.is_chunked
                size = CHUNKS if is_chunked else max(SLICE, self._missing)
                data = bytes(self._behind[:size])
                del self._behind[:size]
                self._parse(data, at_once=at_once and not self._behind)
                if self._behind and time.monotonic() > until:
                    self._is_resting = True
                    self._loop.call_soon(self._go_on_rested)
        self._read_or_not()

    def _go_on_rested(self) -> None:
        self._is_resting = False
        self._go_on()
        if self._is_half_closed:
            self._cut_short()

    def _parse(self, data: bytes, *, at_once: bool = False) -> None:
        parser = self._parser
        if parser is None or self._is_over:
            return
        try:
            messages, *_ = parser.feed_data(data)  # the rest is for upgrades, of which none is taken
        except HttpProcessingError as error:
            self._refuse(error)
            return
        if self._is_turned_away:
            self._is_over = bool(messages)
            for head, content in messages:
                self._owner.overhear(Request(head, content, cast("asyncio.Transport", self._transport)))
            return
        for head, content in messages:  # at most one
            if not head.path or head.version not in (HttpVersion11, HttpVersion10):
                self._refuse(VersionError(message="expected HTTP/1.0 or HTTP/1.1"))
            elif not self._is_leaving:
                request = Request(head, content, cast("asyncio.Transport", self._transport))
                request.is_half_closed = self._is_half_closed
                self._begin(request, at_once=at_once)
        asked = self._request
        if asked is not None and asked.is_chunked and not asked.content.is_eof():
            asked.wire_bytes += len(data)
            if asked.wire_bytes > 2 * asked.content.total_bytes + WASTE:
                self._refuse(ChunkingError(message="the chunks are too small"))

    def _refuse(self, error: Exception) -> None:
        """Answer what is no HTTP; nothing that comes after can be understood."""
        self._is_over = True
        if self._is_turned_away:
            return
        if self._request is not None:
            self._request.content.set_exception(error)
            return
        transport = cast("asyncio.Transport", self._transport)
        # Below the parser's first line stand the sender's own bytes, which may hold a token.
        problem = (str(getattr(error, "message", "")).splitlines() or [""])[0].rstrip(": ")
        self._owner.unroutable("malformed", transport, problem or type(error).__name__)
        transport.write(farewell(400, "bad_request", "Bad request"))
        self._hang_up()

    @property
    def connected(self) -> bool:
        """Whether more of a body can come; asked by `StreamReader`."""
        return self._transport is not None

    def pause_reading(self) -> None:
        """Take no more for now: as much of a body has come as may wait; told by `StreamReader`."""
        self._is_full = True
        if self._parser is not None:
            self._parser.pause_reading()
        self._read_or_not()

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's
        """Go on with a body that has been read; told by `StreamReader`."""
        was_full, self._is_full = self._is_full, False
        if resume_parser and self._request is not None and not self._request.content.is_eof():
            self._parse(b"")  # also if it is not full: told so at the end of a chunk, the parser pauses later
            if self._is_half_closed:
                self._cut_short()
        if was_full:  # a parser that has come to a body's end tells so, and goes on by itself
            self._go_on() if resume_parser else self._read_or_not()

    def _read_or_not(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._behind or self._is_full:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # --- answering ------------------------------------------------------------------------------------

    def _begin(self, request: Request, *, at_once: bool) -> None:
        """Begin to answer a request: at once if no other waits for an answer, else in the loop's next turn.

        In the next turn it begins together with others that have come, and they share a commit. Begun one by
        one, the same events took half as much CPU again, in more and smaller transactions.
        """
        self._request = request
        is_late = self._is_catching_up
        serving = self._serve(request, is_late=is_late)
        if is_late or not at_once or self._owner.under_way or not request.content.is_eof():
            self._task = self._loop.create_task(serving)
        elif (task := begin(serving)) is not None:
            self._task = task

    async def _let_events_go_first(self) -> None:
        """Wait a moment while events are being committed.

        A sender of very many cheap requests would else keep the interpreter from the database's thread, which
        waits up to 5 ms for it at each of the two dozen steps of a transaction.
        """
        for seconds in YIELDING:
            if not self._owner.is_committing():
                return
            await asyncio.sleep(seconds)

    async def _serve(self, request: Request, *, is_late: bool) -> bool:
        """Answer one request, then begin the next if it has come; return whether more may come."""
        goes_on, owner, response = False, self._owner, None
        self._patience = KEEPALIVE
        try:
            if is_late:  # it was sent before the last answer
                await self._let_events_go_first()
            owner.under_way += 1
            try:
                response = await owner.handle(request)
                if owner.is_leaving or len(owner.connections) > MOST_KEPT:
                    response.force_close()
                answer = response.encode(request)
            except (Exception, SystemExit):  # a plugin's; out of a task, the latter would end the loop
                log.exception("a request could not be answered")
                if response is not None and response.on_heard is not None:
                    response.on_heard(False)  # noqa: FBT003 - it takes nothing else
                response = Response(500, _FAILED)
                response.force_close()
                answer = response.encode(request)
            finally:
                owner.under_way -= 1
                if not owner.under_way:
                    owner.idle.set()
            if await self._write(answer, response, request):
                is_whole = request.content.is_eof() or await self._swallow(request.content)
                goes_on = is_whole and response.keeps(request) and not (self._is_over or self._is_leaving)
        except Exception:
            log.exception("a connection failed")
        finally:  # cancelled, too
            self._request = self._task = None
            if self._transport is None:
                owner.connection_lost(self)
            elif goes_on:
                self._next()
            else:
                self._hang_up()
        return goes_on

    async def _write(self, answer: bytes, response: Response, request: Request) -> bool:
        """Write an answer, and wait until it can be sent; return whether the sender was there for it."""
        was_there, transport = False, self._transport
        try:
            if transport is not None and not transport.is_closing():
                transport.write(answer)
                if self._unread is not None:
                    await self._unread
                was_there = await self._is_heard() if request.is_half_closed else not transport.is_closing()
        finally:  # cancelled, too
            if response.on_heard is not None:
                response.on_heard(was_there)
        return was_there

    async def _is_heard(self) -> bool:
        """Return whether a sender that has closed its own side takes what was written to it.

        A sender that neither acknowledges nor resets for a second counts as one that does: to take its next
        request for a repetition could lose an event.
        """
        loop, began, looks = self._loop, self._loop.time(), 0
        while self._transport is not None and not self._transport.is_closing():
            written = self._transport.get_write_buffer_size() == 0
            if written and (heard := _heard(self._transport.get_extra_info("socket"))) is not None:
                return heard
            if loop.time() - began >= LINGERING:
                return True
            await asyncio.sleep(_HEARD_EVERY[min(looks, len(_HEARD_EVERY) - 1)])
            looks += 1
        return False

    async def _swallow(self, content: StreamReader) -> bool:
        """Read what still comes of a refused body, for a moment; say whether that was all.

        Also before a close: with the body unread, it would take the answer back.
        """

        async def read() -> None:
            while not content.is_eof():
                await content.readany()

        try:
            await in_time(LINGERING, read, lambda: self.has_unread)
        except Exception:  # noqa: BLE001 - out of time, badly framed, or hung up
            return False
        return True

    def _next(self) -> None:
        """Go on with what has come behind an answered request."""
        self._silent_since = self._loop.time()
        cast("Parser", self._parser).message_consumed()
        self._is_catching_up = True
        self._parse(b"")  # what the parser has already
        if self._behind:
            self._go_on()
        self._is_catching_up = False
        if self._is_half_closed and self._request is None and not self._is_resting:
            self._hang_up()
        elif self._is_half_closed:
            self._cut_short()

    def pause_writing(self) -> None:
        """Note since when no answer is read."""
        self._unread = self._loop.create_future()
        self._silent_since = self._loop.time()

    def resume_writing(self) -> None:
        """Let an answer that waits to be read be the past."""
        if self._unread is not None and not self._unread.done():  # it is cancelled with who waited for it
            self._unread.set_result(None)
        self._unread = None
        if self._is_ending:
            self._loop.call_soon(self._end)  # not yet: asyncio's transport is about to look at its buffer

    # --- ending ---------------------------------------------------------------------------------------

    def _hang_up(self) -> None:
        """Close once everything is written, or say that and wait a moment for the sender to do so.

        What it still sends is read away: a close with anything unread would reset the connection, and take
        the answer back.
        """
        transport = cast("asyncio.Transport", self._transport)
        if transport.is_closing() or self._is_half_closed or not (self._is_over or self._behind):
            transport.close()
            return
        self._is_over, self._is_full = True, False
        self._behind.clear()
        self._patience, self._silent_since = LINGERING, self._loop.time()
        self._is_ending = True
        transport.set_write_buffer_limits(high=0)  # `resume_writing` says when everything is written
        if self._unread is None:
            self._end()
        self._read_or_not()

    def turn_away(self, answer: bytes) -> None:
        """Answer at once, before anything was asked, and hear for a moment what it is."""
        cast("asyncio.Transport", self._transport).write(answer)
        self._is_over = self._is_turned_away = True  # so that it lingers
        self._hang_up()
        self._is_over = False

    def _end(self) -> None:
        """Close our own side, with nothing left to write.

        asyncio's transports close it by themselves once everything is written, and log a traceback where the
        sender has reset the connection meanwhile.
        """
        if self._transport is None or self._transport.is_closing():
            return
        try:
            self._transport.write_eof()
        except OSError:
            self._transport.abort()

    @property
    def has_unread(self) -> bool:
        """Whether the sender has sent something that has not been taken from the socket yet."""
        return self._transport is not None and has_unread(self._transport)

    @property
    def silent_since(self) -> float | None:
        """When the last request was answered, or the connection made (loop time); None: one is under way."""
        return self._silent_since if self._request is None else None

    def cut_off(self) -> None:
        """End it at once, without waiting for anything that is written to be read."""
        if self._transport is not None:
            self._transport.abort()

    def close_if_silent(self, now: float) -> None:
        """Cut it off if for too long nothing was asked, or an answer not read to its end.

        `now` is as in `loop.time()`. Closing would wait for what is written to be read. What has come is
        read first, once: after a standstill, uvloop rings timers before it reads.
        """
        waits = self._task is None or self._unread is not None
        if waits and self._transport is not None and now - self._silent_since >= self._patience:
            if self._task is None and self._patience and self.has_unread:
                self._patience = 0.0  # until a request begins
            else:
                self._transport.abort()

    def forgive(self, seconds: float) -> None:
        """Do not count these as silence: the relay itself stood still."""
        self._silent_since += seconds

    async def shutdown(self, seconds: float) -> None:
        """Hang up, after at most so many seconds for the request under way, whose body may still come."""
        self._is_leaving = True
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._transport is None:
            return
        if self._unread is None:
            self._transport.close()
        else:  # its answer has been told lost
            self._transport.abort()


def _heard(sock: socket.socket) -> bool | None:
    """Return whether the other end has acknowledged all bytes, or reset the connection; None: neither yet."""
    try:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return False
        waiting = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        return False
    return None if any(waiting) else True
