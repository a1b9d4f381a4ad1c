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

    def resize(self, rate: Rate, now: int, share: float) -> None:
        """Refill at a share of a rate from now on. Tokens beyond the new burst are lost, none are added."""
        self._tokens, self._at = self._tokens + (now - self._at) * self._per_micro, now
        self._per_micro = share * rate.count / (rate.seconds * SECOND)
        self._burst = max(1.0, share * rate.count / rate.seconds)
        self._tokens = min(self._tokens, self._burst if share else 0.0)

    def wait(self, now: int, price: int = 1) -> float:
        """Return the seconds until `price` tokens are available, 0 if they are available now."""
        burst = max(price, self._burst)
        self._tokens = min(burst, self._tokens + (now - self._at) * self._per_micro)
        self._at = now
        return 0.0 if self._tokens >= price else (price - self._tokens) / self._per_micro / SECOND

    def take(self, now: int, price: int = 1) -> float:
        """Take `price` tokens and return 0; if they are not available, return the seconds until they are."""
        wait = self.wait(now, price)
        if not wait:
            self._tokens -= price
        return wait
