"""One clock for everything that is judged or stored: integers, microseconds UTC."""

import time
from functools import lru_cache
from typing import Protocol

SECOND = 1_000_000


class Clock(Protocol):
    """What the rest of the relay asks for the time."""

    def wall(self) -> int:
        """Microseconds since the Unix epoch, as the machine's clock says; may step."""
        ...

    def steady(self) -> int:
        """Microseconds that only ever grow at the pace of time: wall at start + monotonic since.

        Deadlines and due times are on this scale, so a clock step of an hour alarms nobody.
        """
        ...


class SystemClock:
    """The machine's own clocks."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def wall(self) -> int:
        """See `Clock.wall`."""
        return time.time_ns() // 1000

    def steady(self) -> int:
        """See `Clock.steady`."""
        return (time.monotonic_ns() + self._offset) // 1000


def rfc3339(micros: int) -> str:
    """Render microseconds since the epoch as RFC 3339 in UTC with milliseconds.

    >>> rfc3339(1_700_000_000_123_456)
    '2023-11-14T22:13:20.123Z'
    """
    seconds, rest = divmod(micros, SECOND)
    return f"{_second(seconds)}.{rest // 1000:03d}Z"


@lru_cache(maxsize=64)  # events come many to a second, and this is most of what rendering one costs
def _second(seconds: int) -> str:
    moment = time.gmtime(seconds)
    return (
        f"{moment.tm_year:04d}-{moment.tm_mon:02d}-{moment.tm_mday:02d}"
        f"T{moment.tm_hour:02d}:{moment.tm_min:02d}:{moment.tm_sec:02d}"
    )
