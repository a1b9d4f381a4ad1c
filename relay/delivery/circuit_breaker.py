"""The circuit of a destination: stop asking who does not answer, probe, and ramp up again.

A value with the time handed in (steady clock, microseconds): it decides nothing but how many attempts
may be under way at once.
"""

from typing import Literal

from relay.base.clock import SECOND
from relay.config.schema import CircuitConfig

TROUBLE = frozenset(("connect", "tls", "dns", "timeout", "protocol", "429", "5xx"))
"""Results that say nothing of life; any other answer proves it."""

UNSENT = frozenset(("blocked", "format"))
"""Results of attempts that never left the house: they say nothing either way."""

Change = Literal["opened", "recovered"]


class Circuit:
    """Closed at first; opens after `failures` in a row; one probe then, waiting longer each time.

    On recovery it allows one attempt at once, after its answer two, after theirs four, until the
    destination's concurrency is reached; trouble on the way opens it again.
    """

    __slots__ = (
        "_concurrency",
        "_failures",
        "_most_probe",
        "_needed",
        "_probe",
        "_ramp",
        "_round",
        "_wait",
        "open_until",
        "openings",
    )

    def __init__(self, config: CircuitConfig, concurrency: int) -> None:
        self._failures = 0
        self._set(config, concurrency)
        self._ramp: int | None = None  # attempts allowed at once while recovering; None: all
        self._round = 0  # answers until twice as many are allowed
        self.open_until: int | None = None  # when the next probe is due; None: closed
        self.openings = 0  # how often it has opened: an attempt remembers it from its beginning

    def change(self, config: CircuitConfig, concurrency: int, now: int) -> None:
        """Go by another config, which may mend what failed: forget failures, probe now if it is open."""
        self._failures = 0
        self._set(config, concurrency)
        if self._ramp is not None:
            self._climb(min(self._ramp, concurrency))
        self.probe_at(now)

    @property
    def is_open(self) -> bool:
        """Whether the destination counts as dead: at most one probe may be under way."""
        return self.open_until is not None

    def limit(self, now: int) -> int:
        """Return how many attempts may be under way at once."""
        if self.open_until is not None:
            return 0 if now < self.open_until else 1
        return self._concurrency if self._ramp is None else self._ramp

    def record(self, result: str, now: int, openings: int) -> Change | None:
        """Take in the result of an attempt that began after so many openings; return what it changed."""
        if result in UNSENT:
            return None
        if result in TROUBLE:
            # One that began before the circuit opened tells nothing new: it is no failed probe.
            return self._fail(now) if openings == self.openings else None
        self._failures = 0
        if self.open_until is not None:
            self.open_until, self._wait = None, self._probe
            self._climb(1)
            return "recovered"
        if self._ramp is not None:
            self._round -= 1
            if self._round == 0:
                self._climb(self._ramp * 2)
        return None

    def probe_at(self, now: int) -> None:
        """Probe then at the latest, if it is open."""
        if self.open_until is not None:
            self.open_until, self._wait = min(self.open_until, now), self._probe

    def _set(self, config: CircuitConfig, concurrency: int) -> None:
        self._concurrency = concurrency
        self._needed = config.failures
        self._probe = int(config.probe * SECOND)
        self._most_probe = int(config.max_probe * SECOND)
        self._wait = self._probe

    def _climb(self, ramp: int) -> None:
        """Allow so many at once; after a full round of answers it is time for more."""
        self._round = ramp
        self._ramp = ramp if ramp < self._concurrency or ramp == 1 else None

    def _fail(self, now: int) -> Change | None:
        if self.open_until is not None:
            self._wait = min(self._wait * 2, self._most_probe)
            self.open_until = now + self._wait
            return None
        self._failures += 1
        if self._failures < self._needed and self._ramp is None:
            return None
        self._ramp = None
        self.openings += 1
        self.open_until = now + self._wait
        return "opened"
