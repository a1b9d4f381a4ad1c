"""Requests that repeat an earlier one whose sender disconnected before its answer.

Moddy and Compozy send the same bytes again after a timeout. Two genuine events may have the same bytes, so
only a request whose earlier sender disconnected counts as a repetition
(docs/contracts/common.md#repeated-requests).
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from relay.base.clock import SECOND, Clock
from relay.errors import StorageError
from relay.model import Receipt, StoredEvent
from relay.store import Acceptance, SharedReplies

REMEMBER = 60 * SECOND
MOST = 10_000

LONG = 256  # bytes; a longer text is represented by its digest, because senders choose its length

Fingerprint = tuple[str, bytes, str, bytes, bytes, str | None]
"""Raw path, sha256 of the body, type, subject, context, and idempotency key.

Type, subject and context may come from headers. So requests of shops that always disconnect and differ only
in a header are not repetitions. A header that a proxy generates for each request does not hide a repetition.
Requests with different idempotency keys are different events.
"""


Ids = str | tuple[str, ...]
"""Id of a request's event; the ids of all, if the request had several."""


def fingerprint(target: str, event: StoredEvent, key: str | None) -> Fingerprint:
    """Return a key that is equal for a request and its repetition."""
    subject = b"" if event.subject is None else event.subject.encode("utf-8", "surrogatepass")
    if len(subject) > LONG:
        subject = hashlib.sha256(subject).digest()
    context = event.context
    if len(context) > LONG:
        context = hashlib.sha256(context).digest()
    return target, event.sha256, event.type, subject, context, key


def fingerprint_all(target: str, body: bytes, acceptances: Sequence[Acceptance]) -> Fingerprint:
    """Return a key that is equal for a request with several events and its repetition."""
    digest = hashlib.sha256()
    for each in acceptances:
        event = each.event
        if event is not None:
            digest.update(repr((event.type, event.subject, event.context, each.key)).encode())
    return target, hashlib.sha256(body).digest(), "", digest.digest(), b"", None


def _digest(fingerprint: Fingerprint) -> bytes:
    return hashlib.blake2b(repr(fingerprint).encode(), digest_size=20).digest()


class Entry(msgspec.Struct, eq=False):
    """A request on its way into the store."""

    gone: Callable[[], bool]  # returns whether the sender may have disconnected
    receipt: asyncio.Future[Receipt | None] | None = None  # for a repetition that waits


class UnheardReplies:
    """Remembers, for a minute and in memory, the replies that did not reach their senders.

    Each remembered event takes the same memory, independent of its request: `MOST` of them take 4 MiB. With
    `shared`, the nodes of a cluster remember them together.
    """

    def __init__(self, clock: Clock, shared: SharedReplies | None = None) -> None:
        self._clock = clock
        self._shared = shared
        self._open: dict[Fingerprint, Entry] = {}
        self._unheard: OrderedDict[bytes, tuple[int, Ids]] = OrderedDict()  # digest → (expiry, ids)
        self._events = 0  # of all remembered replies

    async def first(self, fingerprint: Fingerprint) -> Receipt | None:
        """Return the receipt of the request that this request repeats, or None if it is a new event.

        Several repetitions wait for one another: each continues when the relay knows whether the reply to the
        previous one has reached its sender.
        """
        while (entry := self._open.get(fingerprint)) is not None and entry.gone():
            if entry.receipt is None:
                entry.receipt = asyncio.get_running_loop().create_future()
            await asyncio.wait([entry.receipt])
        if not self._unheard and not self._shared:
            return None
        self._forget_old()
        ids = await self._take_in_turn(fingerprint)
        if ids is None:
            return None
        if isinstance(ids, str):
            return Receipt(event_id=ids, duplicate=True)
        each = tuple([Receipt(event_id=id_, duplicate=True) for id_ in ids])
        return Receipt(event_id=ids[0], duplicate=True, each=each)

    async def _take_in_turn(self, fingerprint: Fingerprint) -> Ids | None:
        """Return the same as `_take`; further repetitions wait until the caller has begun its request."""
        if self._shared is None:
            return await self._take(_digest(fingerprint))
        asking = self._open[fingerprint] = Entry(lambda: True)
        try:
            return await self._take(_digest(fingerprint))
        finally:
            if self._open.get(fingerprint) is asking:
                del self._open[fingerprint]
            if asking.receipt is not None:
                asking.receipt.set_result(None)

    async def _take(self, digest: bytes) -> Ids | None:
        """Forget a reply, of any node, and return the ids of its events; None: it is not remembered."""
        mine = self._forget(digest) if digest in self._unheard else None
        shared = self._shared
        if shared is None or (mine is None and digest not in shared):
            return mine
        try:
            ids = await shared.take(digest)
        except StorageError:
            return mine
        return ids[0] if len(ids) == 1 else ids or None

    def begin(self, fingerprint: Fingerprint, gone: Callable[[], bool]) -> Entry:
        """Note that a request is on its way into the store."""
        entry = self._open[fingerprint] = Entry(gone)
        return entry

    def end(self, fingerprint: Fingerprint, entry: Entry, receipt: Receipt | None, *, gone: bool) -> None:
        """Note the end of a request, and remember its receipt if its sender is `gone`.

        Args:
            fingerprint: as in `begin`.
            entry: the return value of `begin`.
            receipt: None if nothing was stored.
            gone: whether the sender disconnected before the reply.
        """
        if self._open.get(fingerprint) is entry:
            del self._open[fingerprint]
        if receipt is not None and gone:
            self._forget_old()
            digest = _digest(fingerprint)
            if digest in self._unheard:
                self._forget(digest)  # so that the oldest is first
            ids = tuple([each.event_id for each in receipt.each]) or receipt.event_id
            self._unheard[digest] = (self._clock.steady() + REMEMBER, ids)
            if self._shared is not None:
                self._shared.share(digest, (ids,) if isinstance(ids, str) else ids)
            self._events += _count(ids)
            while self._events > MOST:
                self._forget(next(iter(self._unheard)))
        if entry.receipt is not None:
            entry.receipt.set_result(receipt)

    def _forget_old(self) -> None:
        now = self._clock.steady()
        while self._unheard and next(iter(self._unheard.values()))[0] < now:
            self._forget(next(iter(self._unheard)))

    def _forget(self, digest: bytes) -> Ids:
        _, ids = self._unheard.pop(digest)
        self._events -= _count(ids)
        return ids


def _count(ids: Ids) -> int:
    return 1 if isinstance(ids, str) else len(ids)
