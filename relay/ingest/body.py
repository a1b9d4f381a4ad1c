"""Reading a request's body: with a limit, a deadline and a budget over all requests in flight."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from relay.errors import BodyTimeout, Malformed, Overloaded, TooLarge, UnsupportedEncoding
from relay.ingest.request import ChunkingError, Request

STANDSTILL = 0.1  # seconds by which a timer is late where the process or its event loop stood still
SMALL = 16 * 2**10  # bytes up to which a body counts as small

T = TypeVar("T")


class _Pool:
    """What bodies of one kind may take of the budget, and who has how much of it.

    A sender that has nothing else in it may always fill it alone, or a large body would never fit.
    """

    __slots__ = ("_limit", "_peers", "_strangers", "_used", "_used_by_strangers")

    def __init__(self, limit: int, strangers: int) -> None:
        self._limit = limit  # bytes for everybody
        self._strangers = strangers  # bytes for senders that have not been verified
        self._used = 0
        self._used_by_strangers = 0
        self._peers: dict[tuple[str, bool], int] = {}  # bytes by address, and whether verified

    def resize(self, limit: int, strangers: int) -> None:
        """Have other limits from now on."""
        self._limit = limit
        self._strangers = strangers

    def take(self, size: int, peer: tuple[str, bool], has: int) -> None:
        """Reserve bytes for a body that `has` some already.

        Raises:
            Overloaded: others have what is missing.
        """
        used, used_by_strangers, used_by_peer = self._used, self._used_by_strangers, self._peers.get(peer, 0)
        is_known = peer[1]
        share = (self._limit if is_known else self._strangers) // 2  # of one peer
        if (
            (used > has and used + size > self._limit)
            or (used_by_peer > has and used_by_peer + size > share)
            or (not is_known and used_by_strangers > has and used_by_strangers + size > self._strangers)
        ):
            raise Overloaded
        self._used = used + size
        self._peers[peer] = used_by_peer + size
        if not is_known:
            self._used_by_strangers = used_by_strangers + size

    def give(self, size: int, peer: tuple[str, bool]) -> None:
        """Return reserved bytes."""
        self._used -= size
        if not peer[1]:
            self._used_by_strangers -= size
        left = self._peers[peer] - size
        if left:
            self._peers[peer] = left
        else:
            del self._peers[peer]


class Budget:
    """Bytes of bodies being read or waiting for their commit, over all connections.

    Large bodies leave an eighth of it to small ones. Senders whose token has been verified before the body
    was read share it with nobody else beyond half of it. One address, as trusted proxies forward it, has at
    most half of what all senders of its kind may have.
    """

    __slots__ = ("large", "limit", "small", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.small = _Pool(limit, limit // 8)
        self.large = _Pool(limit - limit // 8, limit // 2)

    def resize(self, limit: int) -> None:
        """Have another limit from now on; what is held stays."""
        self.limit = limit
        self.small.resize(limit, limit // 8)
        self.large.resize(limit - limit // 8, limit // 2)

    def hold(self, who: Callable[[], tuple[str, bool]]) -> "Hold":
        """Return what one body holds of it; `who` tells the sender's address, and whether it is verified."""
        return Hold(self, who)


class Hold:
    """What one body holds of the budget."""

    __slots__ = ("_budget", "_peer", "_pool", "_who", "size")

    def __init__(self, budget: Budget, who: Callable[[], tuple[str, bool]]) -> None:
        self._budget = budget
        self._who = who
        self._peer: tuple[str, bool] | None = None  # asked only where it takes time: it costs an event
        self._pool: _Pool | None = None
        self.size = 0

    def take(self, size: int) -> None:
        """Reserve bytes for what comes of the body.

        Raises:
            Overloaded: there are not that many left for this sender.
        """
        budget, total = self._budget, self.size + size
        if budget.used + size > budget.limit:
            raise Overloaded
        if self._peer is None:
            self._peer = self._who()
        pool = budget.small if total <= SMALL else budget.large
        if pool is self._pool:
            pool.take(size, self._peer, self.size)
        else:
            pool.take(total, self._peer, 0)
            if self._pool is not None:
                self._pool.give(self.size, self._peer)
            self._pool = pool
        self.size = total
        budget.used += size

    def release(self) -> None:
        """Return all of it."""
        self._budget.used -= self.size
        if self._pool is not None and self._peer is not None:
            self._pool.give(self.size, self._peer)
            self._pool = None
        self.size = 0


class Patience(msgspec.Struct, frozen=True):
    """How long a body may take to arrive."""

    seconds: float  # for the first byte, and for all where `rate` is 0
    rate: int = 0  # bytes that have arrived and are worth one more second


def read_whole(request: Request, limit: int, budget: Budget) -> bytes | None:
    """Return a small body that came with its head, as almost all do; None: `read_body` has to read it.

    Its length is taken from the budget, and the caller's to give back. Nothing else is asked of it.

    Raises:
        UnsupportedEncoding, TooLarge, Overloaded: as `read_body`.
    """
    content, headers = request.content, request.headers
    if "Content-Encoding" in headers or not content.is_eof() or content.total_bytes > SMALL:
        return None
    if content.exception() is not None:
        return None
    body: bytes = content.read_nowait()
    if len(body) > limit or (not body and request.content_length > limit):  # the parser skips 2**64 - 1
        raise TooLarge
    if budget.used + len(body) > budget.limit:
        raise Overloaded
    budget.used += len(body)
    return body


async def read_body(request: Request, limit: int, patience: Patience, hold: Hold) -> bytes:
    """Read the body; the caller releases `hold` once it is done with it, whatever comes of this.

    Raises:
        UnsupportedEncoding: it is compressed; inflating hostile bodies froze peers for seconds.
        TooLarge: by its Content-Length, or while it arrives.
        BodyTimeout: it did not arrive in time.
        Malformed: it was cut short or badly framed.
        Overloaded: the budget has nothing left for it.
    """
    encoding = request.headers.get("Content-Encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedEncoding
    content = request.content
    if content.is_eof() and content.exception() is None:
        body = content.read_nowait()
        if len(body) > limit or (not body and request.content_length > limit):  # the parser skips 2**64 - 1
            raise TooLarge
        hold.take(len(body))
        return body
    if request.content_length > limit:
        raise TooLarge
    if request.is_1_1 and request.headers.get("Expect", "").lower() == "100-continue":
        request.ask_for_body()
    request.remember_address()
    return await _read_slowly(request, limit, patience, hold)


async def _read_slowly(request: Request, limit: int, patience: Patience, hold: Hold) -> bytes:
    content = request.content
    body = bytearray()  # a list would cost fifty bytes for a piece of one

    async def read() -> None:
        nonlocal body
        while chunk := await content.readany():
            if hold.size + len(chunk) > limit:
                raise TooLarge
            hold.take(len(chunk))
            body += chunk

    def earned() -> float:
        return hold.size / patience.rate if patience.rate else 0.0

    try:
        await in_time(patience.seconds, read, lambda: request.has_unread, earned)
    except TimeoutError:
        raise BodyTimeout from None
    except (TooLarge, Overloaded):
        raise
    except Exception as error:
        error.__traceback__ = None  # the content keeps the error: a cycle by way of this frame and its chunks
        is_wasteful = isinstance(error, ChunkingError)
        raise Malformed("The chunks are too small" if is_wasteful else "The body was cut short") from error
    return bytes(body)


async def in_time(
    seconds: float,
    read: Callable[[], Awaitable[T]],
    unread: Callable[[], bool],
    earned: Callable[[], float] = lambda: 0.0,
) -> T:
    """Return what `read` gives within `seconds`, and what it has `earned` of them meanwhile.

    After a standstill of the process (SIGSTOP, a suspended machine), uvloop rings timers before it reads what
    has come meanwhile. So a deadline that rings late moves, and one that finds bytes `unread` once lets them
    be read first.

    `read` is cancelled and called again where the deadline moves.

    Raises:
        TimeoutError: it took longer.
    """
    loop = asyncio.get_running_loop()
    began, has_waited = loop.time(), False
    at = began + seconds
    while True:
        try:
            async with asyncio.timeout_at(at):
                return await read()
        except TimeoutError:
            now = loop.time()
            late = now - at
            if late >= STANDSTILL:
                began += late
                at = now + min(late, seconds)
            elif (until := began + seconds + earned()) > now:
                at, has_waited = until, False
            elif not has_waited and unread():
                at, has_waited = now, True
            else:
                raise
