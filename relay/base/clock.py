"""The clock for all deadlines and stored times: integers, microseconds UTC."""

import time
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Protocol

from relay.base.units import parse_duration

SECOND = 1_000_000
_EPOCH = datetime.fromtimestamp(0, UTC)
_YEAR_10000 = 253_402_300_800  # seconds; a larger number counts milliseconds


class Clock(Protocol):
    """The source of time for all parts."""

    def wall(self) -> int:
        """Microseconds since the Unix epoch by the machine's clock; it may jump."""
        ...

    def steady(self) -> int:
        """Microseconds that never jump: wall clock at the start plus monotonic time since.

        Deadlines and due times use this scale, so that a clock step expires nothing.
        """
        ...


_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""On Linux this clock includes the time during which the machine was suspended."""


class SystemClock:
    """The clocks of the operating system."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.clock_gettime_ns(_ELAPSED)

    def shifted(self, micros: int) -> "SystemClock":
        """Return a clock whose steady clock is ahead of this one by `micros` microseconds."""
        shifted = SystemClock()
        shifted._offset = self._offset + micros * 1000
        return shifted

    def wall(self) -> int:
        """See `Clock.wall`."""
        return time.time_ns() // 1000

    def steady(self) -> int:
        """See `Clock.steady`."""
        return (time.clock_gettime_ns(_ELAPSED) + self._offset) // 1000


def rfc3339(micros: int) -> str:
    """Render microseconds since the epoch as RFC 3339 in UTC with milliseconds.

    >>> rfc3339(1_700_000_000_123_456)
    '2023-11-14T22:13:20.123Z'
    """
    seconds, rest = divmod(micros, SECOND)
    return f"{_second(seconds)}.{rest // 1000:03d}Z"


def moment(text: str, now: int) -> int:
    """Parse a point in time, RFC 3339 or an age such as `"2h"`, to microseconds since the epoch.

    Raises:
        ValueError: the text is neither.

    >>> moment("2023-11-14T22:13:20Z", 0)
    1700000000000000
    """
    try:
        then = datetime.fromisoformat(text)
    except ValueError:
        try:
            return now - int(parse_duration(text) * SECOND)
        except ValueError as error:
            if not str(error).startswith("expected"):
                raise
            raise ValueError('expected "2h", "14d" or a time such as "2026-01-31T12:00:00Z"') from None
    if then.tzinfo is None:
        raise ValueError(f'"{text}" has no time zone; append Z for UTC')
    return _micros(then)


def instant(value: object) -> int | None:
    """Parse a point in time from a sender, to microseconds since the epoch.

    RFC 3339 with a time zone, or seconds or milliseconds since the epoch. Returns None for any other format.

    >>> instant("2023-11-14T22:13:20Z"), instant(1700000000), instant("1700000000000")
    (1700000000000000, 1700000000000000, 1700000000000000)
    """
    try:
        if isinstance(value, str) and not value.isdecimal():
            then = datetime.fromisoformat(value)
            return None if then.tzinfo is None else _micros(then)
        number = float(value) if isinstance(value, str | int | float) else 0
    except (ValueError, OverflowError):
        return None
    if not 0 < number < _YEAR_10000 * 1000:
        return None
    return int(number * SECOND) if number < _YEAR_10000 else int(number * 1000)


def _micros(then: datetime) -> int:
    return (then - _EPOCH) // timedelta(microseconds=1)


@lru_cache(maxsize=64)  # many events share a second, and this is most of the cost of rendering a time
def _second(seconds: int) -> str:
    moment = time.gmtime(seconds)
    return (
        f"{moment.tm_year:04d}-{moment.tm_mon:02d}-{moment.tm_mday:02d}"
        f"T{moment.tm_hour:02d}:{moment.tm_min:02d}:{moment.tm_sec:02d}"
    )
