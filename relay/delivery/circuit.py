"""The circuit of a destination: stop asking who does not answer, probe, and ramp up again.

A value with the time handed in (steady clock, microseconds): it decides nothing but how many attempts
may be under way at once.
"""

from typing import Literal

from relay.clock import SECOND
from relay.config.model import CircuitConfig

TROUBLE = frozenset(("connect", "tls", "dns", "timeout", "protocol", "429", "5xx"))
"""Results that say nothing of life; any other answer proves it."""

Change = Literal["opened", "recovered"]


class Circuit:
    """Closed at first; opens after `failures` in a row; one probe then, waiting longer each time."""

    __slots__ = ("_failures", "_most_probe", "_needed", "_probe", "_ramp", "_wait", "open_until")

    def __init__(self, config: CircuitConfig) -> None:
        self._needed = config.failures
        self._probe = int(config.probe * SECOND)
        self._most_probe = int(config.max_probe * SECOND)
        self._wait = self._probe
        self._failures = 0
        self._ramp: int | None = None  # attempts allowed at once while recovering; None: all
        self.open_until: int | None = None  # when the next probe is due; None: closed

    @property
    def is_open(self) -> bool:
        """Whether the destination counts as dead: at most one probe may be under way."""
        return self.open_until is not None

    def limit(self, now: int, concurrency: int) -> int:
        """Return how many attempts may be under way at once."""
        if self.open_until is not None:
            return 0 if now < self.open_until else 1
        return concurrency if self._ramp is None else min(self._ramp, concurrency)

    def record(self, result: str, now: int) -> Change | None:
        """Take in an attempt's result; return what it changed."""
        if result in TROUBLE:
            return self._fail(now)
        if result == "blocked":  # never dialled: says nothing either way
            return None
        self._failures = 0
        if self.open_until is not None:
            self.open_until, self._wait, self._ramp = None, self._probe, 1
            return "recovered"
        if self._ramp is not None:
            self._ramp = self._ramp * 2 if self._ramp < _RAMPED else None
        return None

    def _fail(self, now: int) -> Change | None:
        if self.open_until is not None:
            if now < self.open_until:
                return None  # began before the circuit opened
            self._wait = min(self._wait * 2, self._most_probe)
            self.open_until = now + self._wait
            return None
        self._failures += 1
        if self._failures < self._needed and self._ramp is None:
            return None
        self._ramp = None
        self.open_until = now + self._wait
        return "opened"


_RAMPED = 1024
"""Beyond this many at once nothing is left to ramp up to."""
