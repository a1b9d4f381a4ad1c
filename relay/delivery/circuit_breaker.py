"""The circuit breaker of a destination: stop after repeated failures, probe, then ramp up.

A pure state machine: callers pass the time (steady clock, microseconds). It decides only the number of
attempts that may be in flight at once.
"""

from typing import Literal

from relay.base.clock import SECOND
from relay.config.schema import CircuitConfig

FAILURE_RESULTS = frozenset(("connect", "tls", "dns", "timeout", "protocol", "429", "5xx"))
"""Results that do not prove the receiver is up. Every other response proves it."""

NEUTRAL_RESULTS = frozenset(("blocked", "format"))
"""Results of attempts that sent nothing: they prove nothing about the receiver."""

Change = Literal["opened", "recovered"]


class CircuitBreaker:
    """Starts closed and opens after `failures` failures in a row; then it allows one probe at a time.

    The wait before a probe doubles after each failed probe. After a successful probe the circuit allows one
    attempt at once, then two, then four, up to the destination's concurrency. A failure
    during that ramp opens it again.
    """

    __slots__ = (
        "_failures_to_open",
        "_max_probe_wait",
        "_probe_wait",
        "_responses_to_double",
        "concurrency",
        "failures",
        "open_until",
        "openings",
        "ramp",
        "wait",
    )

    def __init__(self, config: CircuitConfig, concurrency: int) -> None:
        self.failures = 0  # in a row
        self._configure(config, concurrency)
        self.ramp: int | None = None  # attempts allowed at once while recovering; None: not recovering
        self._responses_to_double = 0  # responses until the ramp doubles
        self.open_until: int | None = None  # when the next probe is due; None: closed
        self.openings = 0  # number of openings and manual closings; each attempt remembers it from its start

    def reconfigure(self, config: CircuitConfig, concurrency: int, now: int) -> None:
        """Apply another config, which may fix the destination: forget failures; probe now if open."""
        self.failures = 0
        self._configure(config, concurrency)
        if self.ramp is not None:
            self._set_ramp(min(self.ramp, concurrency))
        self.probe_by(now)

    def resize(self, concurrency: int) -> None:
        """Allow another number of attempts at once."""
        self.concurrency = concurrency
        if self.ramp is not None:
            self._set_ramp(max(1, min(self.ramp, concurrency)))

    def restart(self, *, careful: bool) -> None:
        """Forget everything; `careful` allows one attempt at once, then more, as after a successful probe."""
        self.failures, self.open_until, self.wait = 0, None, self._probe_wait
        self.openings += 1
        self.ramp = None
        if careful:
            self._set_ramp(1)

    def open_again(self, probe_at: int, wait: int) -> None:
        """Open, as before a restart or on the previous owner of the lane; the next probe is at `probe_at`.

        `wait` is the previous owner's wait before that probe (0: unknown); the next one is twice as long.
        """
        self.open_until, self.ramp = probe_at, None
        self.wait = max(self._probe_wait, min(wait, self._max_probe_wait))

    @property
    def is_open(self) -> bool:
        """Whether the destination counts as down: at most one probe is in flight."""
        return self.open_until is not None

    def limit(self, now: int) -> int:
        """Return the number of attempts that may be in flight at once."""
        if self.open_until is not None:
            return 0 if now < self.open_until else 1
        return self.concurrency if self.ramp is None else self.ramp

    def record(self, result: str, now: int, openings: int) -> Change | None:
        """Record the result of an attempt and return the change of state, if any.

        `openings` is the value of `self.openings` when the attempt began.
        """
        if result in NEUTRAL_RESULTS:
            return None
        if result in FAILURE_RESULTS:
            # An attempt that began before the circuit opened is no failed probe.
            return self._fail(now) if openings == self.openings else None
        self.failures = 0
        if self.open_until is not None:
            self.open_until, self.wait = None, self._probe_wait
            self._set_ramp(1)
            return "recovered"
        if self.ramp is not None:
            self._responses_to_double -= 1
            if self._responses_to_double == 0:
                self._set_ramp(self.ramp * 2)
        return None

    def probe_by(self, time: int) -> None:
        """If open, probe at `time` at the latest."""
        if self.open_until is not None:
            self.open_until, self.wait = min(self.open_until, time), self._probe_wait

    def close(self) -> Change | None:
        """Close an open circuit without waiting for a probe, and start the ramp."""
        if self.open_until is None:
            return None
        self.failures, self.open_until, self.wait = 0, None, self._probe_wait
        self.openings += 1  # a probe that is still in flight began before the destination was repaired
        self._set_ramp(1)
        return "recovered"

    def _configure(self, config: CircuitConfig, concurrency: int) -> None:
        self.concurrency = concurrency
        self._failures_to_open = config.failures
        self._probe_wait = int(config.probe * SECOND)
        self._max_probe_wait = int(config.max_probe * SECOND)
        self.wait = self._probe_wait  # before the next probe

    def _set_ramp(self, ramp: int) -> None:
        """Allow `ramp` attempts at once until `ramp` responses have arrived."""
        self._responses_to_double = ramp
        self.ramp = ramp if ramp < self.concurrency or ramp == 1 else None

    def _fail(self, now: int) -> Change | None:
        if self.open_until is not None:
            self.wait = min(self.wait * 2, self._max_probe_wait)
            self.open_until = now + self.wait
            return None
        self.failures += 1
        if self.failures < self._failures_to_open and self.ramp is None:
            return None
        self.ramp = None
        self.openings += 1
        self.open_until = now + self.wait
        return "opened"
