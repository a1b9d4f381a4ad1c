"""A token bucket: so many per so many seconds, with a burst of one second's worth or one."""

from relay.base.clock import SECOND
from relay.base.units import Rate


class TokenBucket:
    """Full at first; it tells how long to wait when it is empty."""

    __slots__ = ("_at", "_burst", "_per_micro", "_tokens")

    def __init__(self, rate: Rate, now: int, *, burst: float | None = None) -> None:
        """Start full at `now` (steady clock, microseconds)."""
        self._per_micro = rate.count / (rate.seconds * SECOND)
        self._burst = max(1.0, burst if burst is not None else rate.count / rate.seconds)
        self._tokens = self._burst
        self._at = now

    def wait(self, now: int) -> float:
        """Return the seconds until there is a token: 0 when there is one."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_micro)
        self._at = now
        return 0.0 if self._tokens >= 1 else (1 - self._tokens) / self._per_micro / SECOND

    def take(self, now: int) -> float:
        """Take one token and return 0, or return the seconds until there is one, taking none."""
        wait = self.wait(now)
        if not wait:
            self._tokens -= 1
        return wait
