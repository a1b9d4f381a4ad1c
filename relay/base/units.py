"""Durations, sizes and rates with units: `"90s"`, `"2 MiB"`, `"50/s"`."""

import re
from typing import Annotated

import msgspec

Duration = Annotated[float, msgspec.Meta(extra={"unit": "duration"})]
"""Seconds; written `"90s"`, `"1h30m"`, `"14d"`."""

Size = Annotated[int, msgspec.Meta(extra={"unit": "size"})]
"""Bytes; written `"64 KiB"`, `"2 MiB"`, `"1 GB"`."""


class Rate(msgspec.Struct, frozen=True):
    """A number per period; written `"50/s"`, `"1000/m"`, `"5000/h"`."""

    count: int
    seconds: float


CENTURY = 100 * 365 * 86_400.0
"""The longest duration, in seconds: times are microseconds in 64 bits."""

_LARGEST = 2**63 - 1
_SECONDS = {
    "ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800,
}  # fmt: skip
_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_DIGITS = 9  # of a rate's numbers
_DURATION = re.compile(r" *([0-9]+(?:\.[0-9]+)?) *(ms|min|s|m|h|d|w)", re.ASCII)
_SIZE = re.compile(r" *([0-9]+(?:\.[0-9]+)?) *([KMGT]i?B|B) *", re.ASCII | re.IGNORECASE)
_RATE = re.compile(r" *([0-9]+) */ *([0-9]*) *(s|m|min|h) *", re.ASCII)


def parse_duration(text: str) -> float:
    """Return seconds.

    Raises:
        ValueError: the text is not a sequence of numbers with units, or exceeds 100 years.

    >>> parse_duration("1h30m")
    5400.0
    """
    total, end = 0.0, 0
    while match := _DURATION.match(text, end):
        total += float(match[1]) * _SECONDS[match[2]]
        end = match.end()
    if end == 0 or text[end:].strip(" "):
        raise ValueError('expected a duration such as "90s", "5m" or "14d"')
    if total > CENTURY:
        raise ValueError("longer than 100 years")
    return total


def parse_time_span(text: str) -> float:
    """Return seconds, more than 0.

    Raises:
        ValueError: the text is not a duration, or it is 0.
    """
    seconds = parse_duration(text)
    if not seconds:
        raise ValueError('expected a duration longer than 0, such as "1h"')
    return seconds


def parse_size(text: str) -> int:
    """Return bytes.

    Raises:
        ValueError: the text is not a number with a unit, or exceeds 2^63 bytes.

    >>> parse_size("2 MiB")
    2097152
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError('expected a size such as "64 KiB" or "2 MiB"')
    count = float(match[1]) * _BYTES[match[2].lower()]
    if count > _LARGEST:
        raise ValueError("larger than any disk")
    return int(count)


def parse_rate(text: str) -> Rate:
    """Return a rate.

    Raises:
        ValueError: the text is not `count/unit`, or the count is 0.

    >>> parse_rate("1000/m")
    Rate(count=1000, seconds=60)
    """
    match = _RATE.fullmatch(text)
    if match is None or not match[1].strip("0") or (match[2] and not match[2].strip("0")):
        raise ValueError('expected a rate such as "50/s" or "1000/m"')
    if len(match[1]) > _DIGITS or len(match[2]) > _DIGITS:
        raise ValueError(f"a rate's numbers have at most {_DIGITS} digits")
    return Rate(int(match[1]), int(match[2] or 1) * _SECONDS[match[3]])


def render_duration(seconds: float) -> str:
    """Render seconds with units.

    >>> render_duration(5400)
    '1h30m'
    """
    if seconds < 1:
        return f"{seconds * 1000:g}ms"
    parts, rest = [], seconds
    for unit in ("d", "h", "m"):
        whole, rest = divmod(rest, _SECONDS[unit])
        if whole:
            parts.append(f"{whole:.0f}{unit}")
    if rest or not parts:
        parts.append(f"{rest:g}s")
    return "".join(parts)


def render_size(count: int) -> str:
    """Render bytes with a unit.

    >>> render_size(2_097_152)
    '2 MiB'
    """
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count} B"


def render_rate(rate: Rate) -> str:
    """Render a rate.

    >>> render_rate(Rate(1000, 60))
    '1000/m'
    """
    unit = next((unit for unit, seconds in _SECONDS.items() if seconds == rate.seconds), f"{rate.seconds:g}s")
    return f"{rate.count}/{unit}"
