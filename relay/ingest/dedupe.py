"""Requests that repeat an earlier one whose sender disconnected before its answer.

Moddy and Compozy send the same bytes again after a timeout. Two genuine events may have the same bytes, so
only a request whose earlier sender disconnected counts as a repetition
(docs/contracts/common.md#repeated-requests).
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable

from relay.base.clock import SECOND, Clock
from relay.model import Receipt, StoredEvent

REMEMBER = 60 * SECOND
MOST = 10_000

LONG = 256  # bytes of a text above which its digest stands for it: a sender chooses how long it is

Fingerprint = tuple[str, bytes, str, bytes, bytes, str | None]
"""Raw path, sha256 of the body, what the source read out of the headers as well (type, subject, context),
and the idempotency key.

Shops that hang up always, and differ only by a header, are no echoes of each other; a header that a proxy
makes up anew does not hide an echo. Requests with different idempotency keys are different events.
"""


def fingerprint(target: str, event: StoredEvent, key: str | None) -> Fingerprint:
    """Return what two requests have in common if one repeats the other."""
    subject = b"" if event.subject is None else event.subject.encode("utf-8", "surrogatepass")
    return target, event.sha256, event.type, _short(subject), _short(event.context), key


def _short(text: bytes) -> bytes:
    return text if len(text) <= LONG else hashlib.sha256(text).digest()


def _digest(fingerprint: Fingerprint) -> bytes:
    return hashlib.blake2b(repr(fingerprint).encode(), digest_size=20).digest()


class Open:
    """One request on its way: whether its sender may be gone, and what became of it and of its answer."""

    __slots__ = ("gone", "receipt")

    def __init__(self, gone: Callable[[], bool]) -> None:
        self.gone = gone
        self.receipt: asyncio.Future[Receipt | None] | None = None


class UnheardReplies:
    """Remembers, for a minute and in memory, whose answer nobody heard.

    What is remembered of an answer has one size, whatever the sender wrote: `MOST` of them take 4 MiB.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[Fingerprint, Open] = {}
        self._unheard: OrderedDict[bytes, tuple[int, str]] = OrderedDict()  # until when, and which event

    async def first(self, fingerprint: Fingerprint) -> Receipt | None:
        """Return the receipt of the request that this one repeats, or None: it is an event of its own.

        Several repetitions wait in turn: each goes on once it is known whether the one before was heard.
        """
        while (under_way := self._open.get(fingerprint)) is not None and under_way.gone():
            if under_way.receipt is None:
                under_way.receipt = asyncio.get_running_loop().create_future()
            await asyncio.wait([under_way.receipt])
        if not self._unheard:
            return None
        self._forget_old()
        unheard = self._unheard.pop(_digest(fingerprint), None)
        return None if unheard is None else Receipt(event_id=unheard[1], duplicate=True)

    def begin(self, fingerprint: Fingerprint, gone: Callable[[], bool]) -> Open:
        """Note that a request is on its way into the store."""
        entry = self._open[fingerprint] = Open(gone)
        return entry

    def end(self, fingerprint: Fingerprint, entry: Open, receipt: Receipt | None, *, gone: bool) -> None:
        """Note what became of it, and whether its sender was `gone`; no receipt: nothing was stored."""
        if self._open.get(fingerprint) is entry:
            del self._open[fingerprint]
        if receipt is not None:
            self.unheard(fingerprint, receipt, gone=gone)
        if entry.receipt is not None:
            entry.receipt.set_result(receipt)

    def unheard(self, fingerprint: Fingerprint, receipt: Receipt, *, gone: bool) -> None:
        """Remember a receipt whose sender is `gone`, for the repetition that will come."""
        if not gone:
            return
        self._forget_old()
        digest = _digest(fingerprint)
        self._unheard[digest] = (self._clock.steady() + REMEMBER, receipt.event_id)
        self._unheard.move_to_end(digest)  # they expire in the order in which they stand
        while len(self._unheard) > MOST:
            self._unheard.popitem(last=False)

    def _forget_old(self) -> None:
        now = self._clock.steady()
        while self._unheard and next(iter(self._unheard.values()))[0] < now:
            self._unheard.popitem(last=False)
