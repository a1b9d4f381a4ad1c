"""Planned maintenance of workers: windows by days, times and a time zone."""

from datetime import UTC, datetime, time, timedelta, tzinfo
from functools import lru_cache
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

import msgspec

from relay.base.clock import SECOND
from relay.config import validators

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def _zone(name: str) -> str:
    """Check the name of a time zone."""
    zone_of(name)
    return name


def _time(text: str) -> str:
    """Check a time of day."""
    time_of(text)
    return text


def _meta(text: str, check: object = None) -> msgspec.Meta:
    return msgspec.Meta(description=text, extra=None if check is None else {"check": check})


class MaintenanceWindow(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of `maintenance = […]` of worker rules: a time in which silence is expected."""

    ids: Annotated[
        str, _meta("shell-style pattern of the workers' ids, such as `batch-*`", validators.pattern)
    ] = "*"
    days: Annotated[tuple[Day, ...], _meta('days on which the window begins, such as `["sat", "sun"]`')] = (
        DAYS
    )
    start: Annotated[str, _meta('time of day at which it begins, such as `"22:00"`', _time)]
    end: Annotated[str, _meta("time of day at which it ends; if not after the start, on the next day", _time)]
    zone: Annotated[
        str, _meta('time zone of `days`, `start` and `end`, such as `"Europe/Berlin"`', _zone)
    ] = "UTC"

    def open_until(self, wall: int) -> int | None:
        """Return when the window ends if it is open at a time (both wall clock); None if it is closed.

        A time that a change to daylight saving time skips or repeats is the earlier one of the two.
        """
        zone, start, end = zone_of(self.zone), time_of(self.start), time_of(self.end)
        today = datetime.fromtimestamp(wall // SECOND, zone).date()
        for day in (today, today - timedelta(days=1)):
            if DAYS[day.weekday()] not in self.days:
                continue
            begins = datetime.combine(day, start, zone).timestamp()
            last_day = day if end > start else day + timedelta(days=1)
            ends = datetime.combine(last_day, end, zone).timestamp()
            if begins * SECOND <= wall < ends * SECOND:
                return int(ends * SECOND)
        return None


@lru_cache(maxsize=64)
def zone_of(name: str) -> tzinfo:
    """Return a time zone.

    Raises:
        ValueError: this machine does not know it.
    """
    if name == "UTC":
        return UTC  # known without a database of time zones
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # `ZoneInfoNotFoundError` is a KeyError
        raise ValueError(
            'unknown time zone; write a name such as "Europe/Berlin" or "UTC".'
            " If the name is right, install the package tzdata"
        ) from None


@lru_cache(maxsize=64)
def time_of(text: str) -> time:
    """Return a time of day.

    Raises:
        ValueError: it is not `HH:MM`.
    """
    hour, _, minute = text.partition(":")
    try:
        if len(hour) == len(minute) == len("00") and text.isascii():
            return time(int(hour), int(minute))
    except ValueError:
        pass
    raise ValueError('expected a time of day such as "22:00"')
