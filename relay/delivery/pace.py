"""How fast a destination may be asked: its `rate_limit`, and when that allows the next attempt."""

from relay.base.clock import SECOND
from relay.base.rate import TokenBucket
from relay.base.units import Rate


class Pace:
    """Tells whether an attempt may begin now, and otherwise when."""

    def __init__(self, rate: Rate | None, now: int) -> None:
        """Begin with a full bucket at `now` (steady clock); no rate: no limit."""
        self.until = 0  # steady clock: nothing may begin before
        self._bucket = None if rate is None else TokenBucket(rate, now)

    def allows(self, now: int) -> bool:
        """Say whether one attempt may begin; otherwise `until` is when."""
        if self.until > now:
            return False
        if self._bucket is not None and (wait := self._bucket.wait(now)):
            self.until = now + int(wait * SECOND) + 1
            return False
        return True

    def take(self, now: int) -> None:
        """Count one that begins."""
        if self._bucket is not None:
            self._bucket.take(now)
