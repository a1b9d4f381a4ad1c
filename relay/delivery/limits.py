"""Limits on attempts and memory: the slots of all lanes, a lane's rate limit, the bytes of waiting bodies."""

from collections import deque
from typing import Protocol

from relay.base.clock import SECOND
from relay.base.rate import TokenBucket
from relay.base.units import Rate
from relay.model import Delivery

SHARED_SLOTS = 256
"""Attempts that all lanes may have in flight at once, in addition to `OWN_SLOTS` per lane."""

OWN_SLOTS = 2
"""Slots that every lane has for itself: it makes progress even while 256 attempts of other lanes hang."""

MAX_BODY_BYTES = 32 * 2**20
"""Bytes of bodies that the windows of all lanes hold in memory."""


class Waiter(Protocol):
    """A lane that waits for a shared slot."""

    def turn(self) -> None:
        """Take the free slots that its deliveries need."""
        ...


class Slots:
    """Counts attempts in flight. Lanes that found no free slot wait for one in the order of their calls."""

    def __init__(self, shared: int = SHARED_SLOTS) -> None:
        self._free = shared
        self._waiting: deque[Waiter] = deque()

    def take(self, waiter: Waiter, active: int) -> bool:
        """Take a slot for a lane with `active` attempts in flight; False: the lane must wait for its turn."""
        if active < OWN_SLOTS:
            return True
        if self._free > 0:
            self._free -= 1
            return True
        if waiter not in self._waiting:
            self._waiting.append(waiter)
        return False

    def give(self, active: int) -> None:
        """Give a slot back; `active` attempts of that lane are still in flight."""
        if active < OWN_SLOTS:
            return
        self._free += 1
        while self._free > 0 and self._waiting:
            # A lane that no longer has anything to send takes no slot; then it is the next lane's turn.
            self._waiting.popleft().turn()


class RateLimit:
    """The `rate_limit` of one destination. Times are on the steady clock."""

    def __init__(self, rate: Rate, now: int) -> None:
        """Begin with a full bucket."""
        self.until = 0  # no attempt may begin before
        self._rate = rate
        self._bucket = TokenBucket(rate, now)

    def set_share(self, now: int, share: float) -> None:
        """Use a share of the rate from now on; a larger share than before begins with an empty bucket.

        So the shares of several nodes never allow more attempts than the whole rate.
        """
        self.until = 0
        self._bucket.resize(self._rate, now, share)

    def allows(self, now: int) -> bool:
        """Return whether an attempt may begin; if not, `until` is the earliest time."""
        if self.until > now:
            return False
        if wait := self._bucket.wait(now):
            self.until = now + int(wait * SECOND) + 1
            return False
        return True

    def take(self, now: int) -> None:
        """Count an attempt that begins."""
        self._bucket.take(now)


class BodyBudget:
    """Counts the bytes of bodies in the windows of all lanes."""

    def __init__(self, size: int = MAX_BODY_BYTES) -> None:
        self._free = size

    def has_room(self, size: int) -> bool:
        """Return whether a body of `size` bytes fits."""
        return size <= self._free

    def add(self, delivery: Delivery) -> None:
        """Count a delivery that enters a window; drop its body if that does not fit."""
        if delivery.event is None:
            return
        if delivery.size > self._free:
            delivery.event = delivery.rendered = None
        else:
            self._free -= delivery.size

    def remove(self, delivery: Delivery) -> None:
        """Count a delivery that leaves a window."""
        if delivery.event is not None:
            self._free += delivery.size
