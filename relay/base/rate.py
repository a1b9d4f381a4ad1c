"""A token bucket with a burst of one second's tokens, or one token."""

from relay.base.clock import SECOND
from relay.base.units import Rate


class TokenBucket:
    """A token bucket that starts full."""

    __slots__ = ("_at", "_burst", "_per_micro", "_tokens")

    def __init__(self, rate: Rate, now: int, *, burst: float | None = None) -> None:
        """Start full at `now` (steady clock, microseconds)."""
        self._per_micro = rate.count / (rate.seconds * SECOND)
        self._burst = max(1.0, burst if burst is not None else rate.count / rate.seconds)
        self._tokens = self._burst
        self._at = now

    def wait(self, now: int) -> float:
        """Return the seconds until a token is available, 0 if a token is available now."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_micro)
        self._at = now
        return 0.0 if self._tokens >= 1 else (1 - self._tokens) / self._per_micro / SECOND

    def take(self, now: int) -> float:
        """Take a token and return 0; if no token is available, return the seconds until the next one."""
        wait = self.wait(now)
        if not wait:
            self._tokens -= 1
        return wait
