"""A sender's connection: decides when to read, respond and close.

Two subclasses add the HTTP parser: `relay.ingest.fast` and `relay.ingest.reference`.
"""

import asyncio
import fcntl
import logging
import socket
import termios
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from typing import Any, Protocol, cast

from aiohttp import HttpVersion10, HttpVersion11, StreamReader
from aiohttp.http import HttpProcessingError, RawRequestMessage

from relay.ingest.body import in_time
from relay.ingest.replies import Response, closing_response
from relay.ingest.request import ChunkingError, Request, VersionError, has_unread

log = logging.getLogger("relay.http")

KEEPALIVE = 15.0  # seconds an idle connection is kept; aiohttp's default is 3,630
FIRST_HEAD = 10.0  # seconds for the first request's head
LINGERING = 1.0  # seconds to read and drop the rest of a refused body
MOST_KEPT = 512
"""Open connections beyond which every answer closes its connection.

Ten thousand workers that send a heartbeat every 30 s and keep their connections would otherwise have 5,000
idle connections. That exceeds the cap, so other senders' heartbeats would be refused. Proxies need fewer.
"""

_FAILED = b'{"error":{"code":"internal_error","message":"Internal server error"}}'
SLICE = 2**14  # bytes that the parser gets at once if they may be several requests
CHUNKS = 2**12  # bytes of a chunked body that it gets at once; a chunk of one byte takes six bytes and 1 µs
TURN = 0.001  # seconds that one turn of the loop may spend on one sender's chunks
WASTE = 2**18  # bytes by which the framing of a chunked body may exceed the body itself
READ_AHEAD = 2**18  # bytes; with twice as many unread bytes of a body, the socket is not read
YIELDING = (0.001, 0.001, 0.002, 0.004)
"""Pauses in seconds in which a request that was sent before the last answer lets events be committed."""

_HEARD_EVERY = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # seconds between checks; the last one repeats

Parsed = tuple[Sequence[tuple[RawRequestMessage, StreamReader]], bool, bytes]
"""New requests with their bodies. The other two values are about upgrades, which the relay never accepts."""


class Parser(Protocol):
    """Turns a connection's bytes into requests and their bodies."""

    def feed_data(self, data: bytes, /) -> Parsed:
        """Parse bytes; return at most one new request with its body.

        Raises:
            HttpProcessingError: the bytes are not HTTP.
        """
        ...

    def message_consumed(self) -> None:
        """Allow the parser to parse the next request, because the last one is answered."""
        ...

    def pause_reading(self) -> None:
        """Stop parsing the body until the handler has read the parsed part."""
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
    """One sender's connection; it is closed when it is idle for too long.

    Requests are answered one at a time, in their order. The parser stops after each request. Bytes that a
    sender pipelines after it (RFC 9112, 9.3.2) stay unparsed until the answer is written, and until then the
    socket is not read. A turn of the loop begins at most one request and parses chunks for at most a
    millisecond, so that a sender of very many requests or chunks delays no other.

    A sender may close its side after its last request and wait for the answers (RFC 9112, 9.6). Until an
    answer is written, this looks the same as a sender that has disconnected. Afterwards, a waiting sender
    acknowledges the answer, and the system of a disconnected one resets the connection.
    """

    __slots__ = (
        "_idle_since",
        "_is_catching_up",
        "_is_ending",
        "_is_full",
        "_is_half_closed",
        "_is_leaving",
        "_is_over",
        "_is_turned_away",
        "_is_waiting",
        "_loop",
        "_owner",
        "_parser",
        "_patience",
        "_request",
        "_task",
        "_transport",
        "_unparsed",
        "_unread",
    )  # fmt: skip

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._parser: Parser | None = None  # set by the subclass
        self._transport: asyncio.Transport | None = None
        self._request: Request | None = None  # under way
        self._task: asyncio.Task[object] | None = None
        self._unparsed = bytearray()  # received and not parsed; until it is empty, the socket is not read
        self._is_catching_up = False  # the requests that begin now were sent before the last answer
        self._is_waiting = False  # parsing continues in a later turn of the loop
        self._is_full = False  # the socket is not read, because a body must be read first
        self._is_over = False  # nothing more is parsed
        self._is_half_closed = False  # the sender has closed its side, and may wait for answers
        self._is_ending = False  # the relay's side is closed once everything is written
        self._is_leaving = False  # no further request begins
        self._is_turned_away = False  # answered with 503 before its first request
        self._unread: asyncio.Future[None] | None = None  # while the sender does not read its answers
        self._patience = FIRST_HEAD
        self._idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection. Every event loop sets TCP_NODELAY; TCP keep-alive would take two hours."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports have no base class
        self._idle_since = self._loop.time()
        self._owner.connection_made(self, self._transport)

    def connection_lost(self, _error: Exception | None) -> None:
        """End the connection. A request that has arrived whole is still handled, and its event is stored."""
        self._unparsed.clear()
        self._transport = self._parser = None  # breaks a reference cycle
        self._is_over = True
        if self._request is not None and not self._request.content.is_eof():
            self._request.content.set_exception(ConnectionResetError("the sender disconnected"))
        self.resume_writing()
        if self._task is None:
            self._owner.connection_lost(self)

    def eof_received(self) -> bool:
        """Return whether the connection stays open, because the sender may wait for an answer."""
        request = self._request
        if self._is_over or (request is None and not self._is_waiting):
            return False
        self._is_half_closed = True
        if request is not None:
            request.is_half_closed = True
            self._cut_short()
        return True

    def _cut_short(self) -> None:
        """Fail a body whose rest can no longer arrive."""
        request = self._request
        if request is None or request.content.is_eof():
            return
        if not (self._is_full or self._unparsed or self._is_waiting):
            self._is_over = True
            request.content.set_exception(ConnectionResetError("the sender closed within a body"))

    # --- reading --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse bytes, or keep them until the current request is answered; ignore them after the end."""
        if self._is_over:
            return
        request = self._request
        if (
            not self._unparsed
            and (request is None or not request.content.is_eof())  # as `_may_parse`, without its call
            and (len(data) <= SLICE or len(data) <= self._missing)
        ):
            self._parse(data, at_once=True)
        else:
            self._unparsed += data
            self._parse_more(at_once=True)

    @property
    def _may_parse(self) -> bool:
        """Whether the parser may run: no complete request waits for its answer."""
        return self._request is None or not self._request.content.is_eof()

    @property
    def _missing(self) -> int:
        """Bytes of the current body that have not arrived; 0 if unknown."""
        request = self._request
        if request is None or request.is_chunked:
            return 0
        return request.content_length - request.content.total_bytes

    def _parse_more(self, *, at_once: bool = False) -> None:
        """Parse kept bytes until a request must be answered first, or for `TURN` seconds."""
        if not self._is_waiting:
            until = self._loop.time() + TURN
            while self._unparsed and self._may_parse:
                if self._is_over or self._is_full or self._is_waiting:
                    break
                is_chunked = self._request is not None and self._request.is_chunked
                size = CHUNKS if is_chunked else max(SLICE, self._missing)
                data = bytes(self._unparsed[:size])
                del self._unparsed[:size]
                self._parse(data, at_once=at_once and not self._unparsed)
                if self._unparsed and time.monotonic() > until:
                    self._is_waiting = True
                    self._loop.call_soon(self._parse_later)
        self._read_or_not()

    def _parse_later(self) -> None:
        self._is_waiting = False
        self._parse_more()
        if self._is_half_closed:
            self._cut_short()

    def _parse(self, data: bytes, *, at_once: bool = False) -> None:
        parser = self._parser
        if parser is None or self._is_over:
            return
        try:
            messages, *_ = parser.feed_data(data)
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
        """Answer bytes that are not HTTP with 400; nothing after them can be parsed."""
        self._is_over = True
        if self._is_turned_away:
            return
        if self._request is not None:
            self._request.content.set_exception(error)
            return
        transport = cast("asyncio.Transport", self._transport)
        # The parser's later lines quote the sender's bytes, which may contain a token.
        problem = (str(getattr(error, "message", "")).splitlines() or [""])[0].rstrip(": ")
        self._owner.unroutable("malformed", transport, problem or type(error).__name__)
        transport.write(closing_response(400, "bad_request", "Bad request"))
        self._close()

    @property
    def connected(self) -> bool:
        """Whether more of a body can arrive; read by `StreamReader`."""
        return self._transport is not None

    def pause_reading(self) -> None:
        """Stop reading the socket: enough of a body waits to be read. Called by `StreamReader`."""
        self._is_full = True
        if self._parser is not None:
            self._parser.pause_reading()
        self._read_or_not()

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's
        """Read the socket again, because the body has been read. Called by `StreamReader`."""
        was_full, self._is_full = self._is_full, False
        if resume_parser and self._request is not None and not self._request.content.is_eof():
            self._parse(b"")  # also if not full: a parser that is paused at a chunk's end pauses later
            if self._is_half_closed:
                self._cut_short()
        if was_full:  # at a body's end (no `resume_parser`), the parser continues without this call
            self._parse_more() if resume_parser else self._read_or_not()

    def _read_or_not(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._unparsed or self._is_full:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # --- answering ------------------------------------------------------------------------------------

    def _begin(self, request: Request, *, at_once: bool) -> None:
        """Begin to answer a request: at once if no other request waits, else in the loop's next turn.

        In the next turn, it begins together with other requests that have arrived, and they share a commit.
        When each began alone, the same events took 50 % more CPU, in more and smaller transactions.
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

        Otherwise a flood of cheap requests would keep the interpreter lock from the database thread. That
        thread waits up to 5 ms for the lock at each of the two dozen steps of a transaction.
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
            except (Exception, SystemExit):  # a plugin may raise both; a SystemExit would end the loop
                log.exception("a request could not be answered")
                if response is not None and response.on_heard is not None:
                    response.on_heard(False)  # noqa: FBT003 - its only argument
                response = Response(500, _FAILED)
                response.force_close()
                answer = response.encode(request)
            finally:
                owner.under_way -= 1
                if not owner.under_way:
                    owner.idle.set()
            if await self._write(answer, response, request):
                is_whole = request.content.is_eof() or await self._discard_body(request.content)
                is_kept = request.is_kept and not response.is_last
                goes_on = is_whole and is_kept and not (self._is_over or self._is_leaving)
        except Exception:
            log.exception("a connection failed")
        finally:  # cancelled, too
            self._request = self._task = None
            if self._transport is None:
                owner.connection_lost(self)
            elif goes_on:
                self._next()
            else:
                self._close()
        return goes_on

    async def _write(self, answer: bytes, response: Response, request: Request) -> bool:
        """Write an answer and wait until it is sent; return whether the sender was still connected."""
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
        """Return whether a sender that has closed its side receives the answer.

        Returns True if the sender neither acknowledges nor resets within a second. Otherwise its next request
        could count as a repetition, and an event could be lost.
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

    async def _discard_body(self, content: StreamReader) -> bool:
        """Read and drop the rest of a refused body for a moment; return whether all of it was read.

        This also precedes a close: closing with unread bytes resets the connection, and the answer is lost.
        """

        async def read() -> None:
            while not content.is_eof():
                await content.readany()

        try:
            await in_time(LINGERING, read, lambda: self.has_unread)
        except Exception:  # noqa: BLE001 - timeout, bad framing, or disconnected
            return False
        return True

    def _next(self) -> None:
        """Begin the next request if it has arrived after the answered one."""
        self._idle_since = self._loop.time()
        cast("Parser", self._parser).message_consumed()
        self._is_catching_up = True
        self._parse(b"")  # bytes that the parser has
        if self._unparsed:
            self._parse_more()
        self._is_catching_up = False
        if self._is_half_closed and self._request is None and not self._is_waiting:
            self._close()
        elif self._is_half_closed:
            self._cut_short()

    def pause_writing(self) -> None:
        """Note that the sender does not read its answers, and since when."""
        self._unread = self._loop.create_future()
        self._idle_since = self._loop.time()

    def resume_writing(self) -> None:
        """Note that the sender reads its answers again."""
        if self._unread is not None and not self._unread.done():  # done: its waiting task was cancelled
            self._unread.set_result(None)
        self._unread = None
        if self._is_ending:
            self._loop.call_soon(self._end)  # later: asyncio's transport still needs its buffer

    # --- ending ---------------------------------------------------------------------------------------

    def _close(self) -> None:
        """Close the connection once everything is written.

        If the sender may still send, only the relay's side is closed, and the sender's bytes are read and
        dropped for a moment. A close with unread bytes would reset the connection and lose the answer.
        """
        transport = cast("asyncio.Transport", self._transport)
        if transport.is_closing() or self._is_half_closed or not (self._is_over or self._unparsed):
            transport.close()
            return
        self._is_over, self._is_full = True, False
        self._unparsed.clear()
        self._patience, self._idle_since = LINGERING, self._loop.time()
        self._is_ending = True
        transport.set_write_buffer_limits(high=0)  # `resume_writing` is called once everything is written
        if self._unread is None:
            self._end()
        self._read_or_not()

    def turn_away(self, answer: bytes) -> None:
        """Answer before any request, and parse the first bytes to find the sender's request."""
        cast("asyncio.Transport", self._transport).write(answer)
        self._is_over = self._is_turned_away = True  # so that `_close` lingers
        self._close()
        self._is_over = False

    def _end(self) -> None:
        """Close the relay's side, after everything is written.

        asyncio's transports could do so themselves, but log a traceback if the sender has reset the
        connection meanwhile.
        """
        if self._transport is None or self._transport.is_closing():
            return
        try:
            self._transport.write_eof()
        except OSError:
            self._transport.abort()

    @property
    def has_unread(self) -> bool:
        """Whether the socket holds bytes that have not been read."""
        return self._transport is not None and has_unread(self._transport)

    @property
    def idle_since(self) -> float | None:
        """Loop time of the last answer or the connection's start; None while a request is under way."""
        return self._idle_since if self._request is None else None

    def abort(self) -> None:
        """Abort the connection, without waiting until the sender has read its answers."""
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self, now: float) -> None:
        """Abort the connection if for too long no request arrived, or the sender did not read an answer.

        A close would wait until the sender has read its answers. Bytes in the socket are read first, once:
        after a standstill, uvloop runs timers before it reads.

        Args:
            now: loop time.
        """
        waits = self._task is None or self._unread is not None
        if waits and self._transport is not None and now - self._idle_since >= self._patience:
            if self._task is None and self._patience and self.has_unread:
                self._patience = 0.0  # until a request begins
            else:
                self._transport.abort()

    def add_standstill(self, seconds: float) -> None:
        """Do not count these seconds as silence, because the relay did not run."""
        self._idle_since += seconds

    async def shutdown(self, seconds: float) -> None:
        """Close the connection, after at most `seconds` for the request under way and its body."""
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
        else:  # its answer counts as lost
            self._transport.abort()


def _heard(sock: socket.socket) -> bool | None:
    """Return True if the sender has acknowledged all bytes, False if it has reset, else None."""
    try:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return False
        waiting = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        return False
    return None if any(waiting) else True


def begin(coroutine: Coroutine[Any, Any, object]) -> asyncio.Task[None] | None:
    """Run a coroutine until it first waits; return a task for the rest, or None if it has ended.

    A coroutine that never waits needs neither a task nor a turn of the loop, as with eager tasks of
    Python 3.12. Until it first waits, it runs outside a task, so it must not use the current task, as
    `asyncio.timeout` does.
    """
    try:
        awaited = coroutine.send(None)
    except StopIteration:
        return None
    rest = _finish(coroutine, awaited)
    rest.send(None)  # into its `try`: a task that is cancelled before its first turn throws there
    return asyncio.get_running_loop().create_task(rest)


async def _finish(coroutine: Coroutine[Any, Any, object], awaited: Any) -> None:
    await _wait_for_rest(coroutine, awaited)


@types.coroutine
def _wait_for_rest(coroutine: Coroutine[Any, Any, object], awaited: Any) -> Generator[Any, None, None]:
    """Wait in place of the coroutine until it ends."""
    try:
        try:
            yield  # to `begin`
        except BaseException as error:  # noqa: BLE001 - passed on, as a cancellation is
            awaited = coroutine.throw(error)
        while True:
            try:
                yield awaited
            except BaseException as error:  # noqa: BLE001 - passed on
                awaited = coroutine.throw(error)
            else:
                awaited = coroutine.send(None)
    except StopIteration:
        return
