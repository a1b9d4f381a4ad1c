"""The retry policy: the effect of an attempt on its delivery and destination, and the time of the retry."""

import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Literal

import msgspec

from relay.base.clock import SECOND
from relay.config.schema import RetryConfig

_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)
_DAY = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_CLOCK = "(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_DATES = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"{_DAY}, (?P<day>[0-9]{{2}}) (?P<month>[A-Z][a-z]{{2}}) (?P<year>[0-9]{{4}}) {_CLOCK} GMT",
        rf"[A-Z][a-z]+, (?P<day>[0-9]{{2}})-(?P<month>[A-Z][a-z]{{2}})-(?P<year>[0-9]{{2}}) {_CLOCK} GMT",
        rf"{_DAY} (?P<month>[A-Z][a-z]{{2}}) (?P<day>[ 0-9][0-9]) {_CLOCK} (?P<year>[0-9]{{4}})",
    )
)
"""IMF-fixdate, RFC 850 and asctime: recipients must accept all three (RFC 9110 §5.6.7)."""

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How long a delivery waits for its next attempt. Times are seconds."""

    schedule: tuple[float, ...]  # the delay after the first failure, the second, …
    jitter: float  # 0…1: up to this share of a delay is added at random
    max_retry_after: float  # the longest wait that a receiver can request

    @classmethod
    def of(cls, config: RetryConfig) -> "RetryPolicy":
        """Return the policy of a destination's `retry = {…}`."""
        return cls(schedule=config.schedule, jitter=config.jitter, max_retry_after=config.max_retry_after)

    def next_delay(self, attempts_done: int, hint: float | None, rand: float) -> float | None:
        """Return the seconds to wait after `attempts_done` attempts, or None if the schedule is exhausted.

        `hint` is the receiver's `Retry-After`, `rand` a number in [0, 1). Attempts that are not counted may
        leave `attempts_done` at 0; then the delay is that after the first attempt.
        """
        done = max(attempts_done, 1)
        if done > len(self.schedule):
            return None
        delay = max(self.schedule[done - 1], min(hint or 0.0, self.max_retry_after))
        return delay * (1 + self.jitter * rand)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The effect of an attempt on its delivery.

    `ok`: delivered. `retry`: retry by the policy. `abort`: dead, for `reason`. `disable`: disable the
    destination for `reason` and hold its deliveries, this one too. `hold`: the relay's own config or machine
    prevents the request; the retry schedule does not count the attempt.
    """

    kind: Literal["ok", "retry", "abort", "disable", "hold"]
    reason: Literal["aborted", "final_status", "gone", "asked", "blocked"] | None = (
        None  # None for ok and retry
    )
    hint: float | None = None  # seconds that the receiver asks this delivery to wait, not capped
    pause: float | None = None  # seconds that the whole destination rests, capped


OK = Verdict(kind="ok")
HOLD = Verdict(kind="hold", reason="blocked")


def verdict_of(
    status: int | None,
    result: str,
    headers: Mapping[str, str],
    *,
    now: int,
    max_retry_after: float,
    final_statuses: Collection[int] = (),
) -> Verdict:
    """Return the verdict on an attempt by its status, its result label and the response headers.

    Names in `headers` are lower-case, unless the mapping ignores case. `now` is the wall clock in
    microseconds. Any 2xx is a success, with any headers and body. A status in `final_statuses` ends the
    delivery at once.
    """
    if status is None:
        return HOLD if result == "blocked" else Verdict(kind="retry")
    if 200 <= status < 300:  # noqa: PLR2004 - HTTP's own numbers
        return OK
    command = headers.get("webhook-delivery", "").strip().lower()
    if status == 410:  # noqa: PLR2004 - Gone, RFC 9110 §15.5.11
        return Verdict(kind="disable", reason="gone")
    if command == "disable":
        return Verdict(kind="disable", reason="asked")
    hint = parse_retry_after(headers.get("retry-after", ""), now)
    pause = min(hint, max_retry_after) if hint and status in (429, 503) else None
    is_aborted = command == "abort-message"
    if is_aborted or status in final_statuses:
        return Verdict(kind="abort", reason="aborted" if is_aborted else "final_status", pause=pause)
    return Verdict(kind="retry", hint=hint, pause=pause)


def parse_retry_after(value: str, now: int) -> float | None:
    """Return the seconds from `now` (wall clock, microseconds) until the time in a `Retry-After` header.

    It may be up to nine ASCII digits or a date in one of HTTP's three forms; a past date gives 0. Anything
    else gives None: some receivers send fractions, signs or dates without a zone.
    """
    if _SECONDS.fullmatch(value):
        return float(value)
    match = next((found for form in _DATES if (found := form.fullmatch(value))), None)
    if match is None or match["month"] not in _MONTHS:
        return None
    numbers = {name: int(match[name]) for name in ("year", "day", "hour", "minute", "second")}
    if len(match["year"]) == 2:  # noqa: PLR2004 - RFC 850's
        numbers["year"] = _full_year(numbers["year"], datetime.fromtimestamp(now / SECOND, UTC).year)
    try:
        at = datetime(month=_MONTHS.index(match["month"]) + 1, **numbers, tzinfo=UTC)
    except ValueError:  # such as 31 February
        return None
    return max(0.0, at.timestamp() - now / SECOND)


def _full_year(digits: int, present: int) -> int:
    """Return the full year for two digits: at most 50 years ahead, else in the past (RFC 9110 §5.6.7)."""
    year = present - present % 100 + digits
    return year - 100 if year > present + 50 else year
