"""The clock of a cluster: all nodes follow the clock of their PostgreSQL server.

Due times and deadlines are stored, and any node may read them, so the steady clocks of all nodes must agree.
So must the wall clocks: row ids contain the time, and order keys and lists follow row ids.
"""

from collections.abc import Callable

import msgspec

from relay.base.clock import Clock, SystemClock

SLEW = 20
"""The steady clock runs at most one part in `SLEW` faster or slower than time, until it has caught up."""

DRIFT = 10_000
"""A machine's clock drifts by at most one part in `DRIFT` from the server's, with a wide margin."""


class _Sample(msgspec.Struct, frozen=True):
    """One comparison of the clocks."""

    at: int  # local steady clock
    offset: int  # of the server, relative to the local steady clock
    error: int  # largest error of the offset: half the round trip

    def error_at(self, now: int) -> int:
        return self.error + (now - self.at) // DRIFT


class ServerClock:
    """`relay.base.clock.Clock` that follows a server's clock. Microseconds.

    The first comparison sets the clock; do that before any time is used. Later ones only change its rate: it
    never jumps, and never goes back. The comparison with the smallest possible error counts. Afterwards, the
    wall clock is the steady clock. Do not keep `wall` or `steady`: they are replaced when the rate changes.
    """

    wall: Callable[[], int]
    steady: Callable[[], int]

    def __init__(self, local: Clock) -> None:
        self._local = local
        self._best: _Sample | None = None
        self._since = 0  # local steady clock
        self._offset = 0  # at `_since`
        self._target = 0  # offset that the clock approaches
        self._reached_at = 0  # local steady clock: when it has that offset
        # Each event reads the time several times, so once the clock has caught up, a read is one call.
        self.wall, self.steady = local.wall, local.steady

    def _follow(self) -> int:
        """Return the steady clock while it approaches the target."""
        now = self._local.steady()
        if now >= self._reached_at:
            self.wall = self.steady = _ahead(self._local, self._target)
            return now + self._target
        most, missing = (now - self._since) // SLEW, self._target - self._offset
        return now + self._offset + max(-most, min(most, missing))

    @property
    def behind(self) -> int:
        """How far the steady clock is behind the server's; negative: it is ahead."""
        now = self._local.steady()
        return now + self._target - self.steady()

    def local(self) -> int:
        """Return the local steady clock, for the moments that `compare` takes."""
        return self._local.steady()

    def compare(self, sent: int, received: int, server: int) -> None:
        """Take the server's time from a response; `sent` and `received` are `local` moments around it."""
        sample = _Sample(received, server - (sent + received) // 2, max(0, received - sent) // 2)
        best = self._best
        if best is not None and sample.error > best.error_at(received):
            return
        self._best = sample
        if best is None:
            self._since, self._offset, self._target = received, sample.offset, sample.offset
        else:
            now = self._local.steady()
            self._since, self._offset, self._target = now, self.steady() - now, sample.offset
            self._reached_at = now + abs(self._target - self._offset) * SLEW
        self.wall = self.steady = self._follow


def _ahead(clock: Clock, micros: int) -> Callable[[], int]:
    """Return the steady clock of a machine, shifted by `micros` microseconds."""
    if type(clock) is SystemClock:
        return clock.shifted(micros).steady
    return lambda: clock.steady() + micros
