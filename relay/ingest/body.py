"""Reading a request's body: with a limit, a deadline and a budget over all requests in flight."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from relay.errors import BodyTimeout, Malformed, Overloaded, TooLarge
from relay.ingest.request import ChunkingError, Request

STANDSTILL = 0.1  # seconds; a timer that is later means that the process or its loop was stopped
SMALL = 16 * 2**10  # bytes up to which a body counts as small

T = TypeVar("T")


class _Pool:
    """The share of the budget for bodies of one kind, and how much of it each address uses.

    A body that is alone in its pool may fill it. Otherwise a large body would never fit.
    """

    __slots__ = ("_limit", "_peers", "_strangers", "_used", "_used_by_strangers")

    def __init__(self, limit: int, strangers: int) -> None:
        self._limit = limit  # bytes for everybody
        self._strangers = strangers  # bytes for senders that have not been verified
        self._used = 0
        self._used_by_strangers = 0
        self._peers: dict[tuple[str, bool], int] = {}  # bytes by address, and whether verified

    def resize(self, limit: int, strangers: int) -> None:
        """Change the limits."""
        self._limit = limit
        self._strangers = strangers

    def take(self, size: int, peer: tuple[str, bool], has: int) -> None:
        """Reserve `size` more bytes for a body that already `has` some.

        Raises:
            Overloaded: other bodies use the missing bytes.
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
    """Bytes of bodies that are being read or wait for their commit, over all connections.

    An eighth of the budget is reserved for small bodies. Senders that are verified only after their body is
    read may use at most half of the budget for large bodies, and an eighth for small ones. One address, as
    trusted proxies report it, may use at most half of each share.
    """

    __slots__ = ("large", "limit", "small", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.small = _Pool(limit, limit // 8)
        self.large = _Pool(limit - limit // 8, limit // 2)

    def resize(self, limit: int) -> None:
        """Change the limit; reserved bytes stay reserved."""
        self.limit = limit
        self.small.resize(limit, limit // 8)
        self.large.resize(limit - limit // 8, limit // 2)

    def hold(self, who: Callable[[], tuple[str, bool]]) -> "Hold":
        """Return one body's reservation; `who` returns its sender's address and whether it is verified."""
        return Hold(self, who)


class Hold:
    """One body's reservation in the budget."""

    __slots__ = ("_budget", "_peer", "_pool", "_who", "size")

    def __init__(self, budget: Budget, who: Callable[[], tuple[str, bool]]) -> None:
        self._budget = budget
        self._who = who
        self._peer: tuple[str, bool] | None = None  # found when needed, because finding it costs CPU
        self._pool: _Pool | None = None
        self.size = 0

    def take(self, size: int) -> None:
        """Reserve `size` more bytes.

        Raises:
            Overloaded: the budget has fewer bytes left for this sender.
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
        """Return all reserved bytes."""
        self._budget.used -= self.size
        if self._pool is not None and self._peer is not None:
            self._pool.give(self.size, self._peer)
            self._pool = None
        self.size = 0


class Extra:
    """Memory that a request takes in addition to its body. A request that is alone may exceed the budget."""

    def __init__(self, budget: Budget, has: int) -> None:
        self._budget = budget
        self._has = has  # bytes that the request has reserved already
        self._size = 0

    def take(self, size: int) -> None:
        """Reserve `size` more bytes.

        Raises:
            Overloaded: other requests use the missing bytes.
        """
        budget = self._budget
        if budget.used > self._has + self._size and budget.used + size > budget.limit:
            raise Overloaded
        self._size += size
        budget.used += size

    def release(self) -> None:
        """Return all bytes that `take` reserved."""
        self._budget.used -= self._size
        self._size = 0


class Patience(msgspec.Struct, frozen=True):
    """How long a body may take to arrive."""

    seconds: float  # for the whole body, plus the seconds that `rate` adds
    rate: int = 0  # bytes per additional second; 0: no time is added


async def read_body(request: Request, limit: int, patience: Patience, hold: Hold) -> bytes:
    """Read the body. The caller must release `hold` afterwards, also after an error.

    Raises:
        TooLarge: the body is larger than `limit`, by its Content-Length or while it arrives.
        BodyTimeout: the body did not arrive in time.
        Malformed: the body was cut short or is badly framed.
        Overloaded: the budget has no bytes left for it.
    """
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
    body = bytearray()  # a list would need 50 bytes for each piece of one byte

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
        error.__traceback__ = None  # the content keeps the error; its traceback would make a cycle
        is_wasteful = isinstance(error, ChunkingError)
        raise Malformed("The chunks are too small" if is_wasteful else "The body was cut short") from error
    return bytes(body)


async def in_time(
    seconds: float,
    read: Callable[[], Awaitable[T]],
    unread: Callable[[], bool],
    earned: Callable[[], float] = lambda: 0.0,
) -> T:
    """Return the result of `read`, with a time limit of `seconds` plus the seconds `earned` meanwhile.

    After a standstill of the process (SIGSTOP, a suspended machine), uvloop runs timers before it reads the
    bytes that have arrived meanwhile. So a deadline whose timer is late moves, and a deadline that finds
    `unread` bytes gives them one chance to be read. When the deadline moves, `read` is cancelled and called
    again.

    Raises:
        TimeoutError: `read` took longer.
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
