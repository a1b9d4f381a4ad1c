"""Requests repeated because their first answer never arrived (design: no setting, no risk for twins).

Moddy and Compozy re-send the same bytes after a time-out. Genuine twins have the same bytes too, so
a request is an echo only if its predecessor's sender hung up before it had the answer.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from relay.clock import SECOND, Clock
from relay.model import Receipt

REMEMBER = 60 * SECOND
MOST = 10_000

Fingerprint = tuple[str, bytes, str, str | None, bytes, str | None]
"""Raw path, sha256 of the body, what the source read out of the headers as well (type, subject, context),
and the idempotency key.

Shops that hang up always, and differ only by a header, are no echoes of each other; a header that a proxy
makes up anew does not hide an echo. Requests with different idempotency keys are different events.
"""


class Open:
    """One request on its way: whether its sender may be gone, and what became of it and of its answer."""

    __slots__ = ("gone", "receipt")

    def __init__(self, gone: Callable[[], bool]) -> None:
        self.gone = gone
        self.receipt: asyncio.Future[Receipt | None] | None = None


class Echoes:
    """Remembers, for a minute and in memory, whose answer nobody heard."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[Fingerprint, Open] = {}
        self._unheard: OrderedDict[Fingerprint, tuple[int, Receipt]] = OrderedDict()

    async def first(self, fingerprint: Fingerprint) -> Receipt | None:
        """Return the receipt of the request that this one repeats, or None: it is an event of its own."""
        under_way = self._open.get(fingerprint)
        if under_way is not None and under_way.gone():
            if under_way.receipt is None:
                under_way.receipt = asyncio.get_running_loop().create_future()
            await asyncio.wait([under_way.receipt])
        unheard = self._unheard.pop(fingerprint, None)
        if unheard is None or unheard[0] < self._clock.steady():
            return None
        return unheard[1]

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
        self._unheard[fingerprint] = (self._clock.steady() + REMEMBER, receipt)
        while len(self._unheard) > MOST:
            self._unheard.popitem(last=False)
