"""When to try again, and whether: what a finished attempt means for its delivery and destination."""

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
"""IMF-fixdate, RFC 850's and asctime's: recipients must take all three (RFC 9110 §5.6.7)."""

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Answers one question: how long a delivery waits for its next attempt. Times are seconds."""

    schedule: tuple[float, ...]  # the delay after the first failure, the second, …
    jitter: float  # 0…1: the share of a delay that may be added to it, never taken away
    max_retry_after: float  # a receiver may ask for more patience than the schedule's, up to this

    @classmethod
    def of(cls, config: RetryConfig) -> "RetryPolicy":
        """Take a destination's `retry = {…}`."""
        return cls(schedule=config.schedule, jitter=config.jitter, max_retry_after=config.max_retry_after)

    def next_delay(self, attempts_done: int, hint: float | None, rand: float) -> float | None:
        """Return the seconds to wait after `attempts_done` attempts, or None: the schedule is exhausted.

        `hint` is the receiver's `Retry-After`, `rand` a number in [0, 1). An attempt that spends
        nothing may leave `attempts_done` at 0; it waits as after the first.
        """
        spent = max(attempts_done, 1)
        if spent > len(self.schedule):
            return None
        delay = max(self.schedule[spent - 1], min(hint or 0.0, self.max_retry_after))
        return delay * (1 + self.jitter * rand)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What an attempt means.

    `ok`: delivered. `retry`: ask the policy when. `abort`: dead, for `reason`. `disable`: the
    destination is off for `reason` and its deliveries, this one too, are held. `hold`: a fault of our
    own configuration; the attempt spends none of the schedule.
    """

    kind: Literal["ok", "retry", "abort", "disable", "hold"]
    reason: Literal["aborted", "final_status", "gone", "asked", "blocked"] | None = None  # unless retry, ok
    hint: float | None = None  # seconds this delivery was asked to wait, uncapped
    pause: float | None = None  # seconds the whole destination rests, capped


OK = Verdict(kind="ok")
HOLD = Verdict(kind="hold", reason="blocked")


def verdict(
    status: int | None,
    result: str,
    headers: Mapping[str, str],
    *,
    now: int,
    max_retry_after: float,
    final_statuses: Collection[int] = (),
) -> Verdict:
    """Judge a finished attempt by its status, its closed label and the answer's headers.

    Names in `headers` are lower-case, unless the mapping takes any case. `now` is the wall clock in
    microseconds. A 2xx is a success whatever else the answer says or fails to say. A status in
    `final_statuses` ends the delivery at once.
    """
    if status is None:
        return HOLD if result == "blocked" else Verdict(kind="retry")
    if label(status) == "ok":
        return OK
    wish = headers.get("webhook-delivery", "").strip().lower()
    if status == 410:  # noqa: PLR2004 - Gone, RFC 9110 §15.5.11
        return Verdict(kind="disable", reason="gone")
    if wish == "disable":
        return Verdict(kind="disable", reason="asked")
    hint = parse_retry_after(headers.get("retry-after", ""), now)
    pause = min(hint, max_retry_after) if hint and status in (429, 503) else None
    is_aborted = wish == "abort-message"
    if is_aborted or status in final_statuses:
        return Verdict(kind="abort", reason="aborted" if is_aborted else "final_status", pause=pause)
    return Verdict(kind="retry", hint=hint, pause=pause)


def label(status: int) -> str:
    """Return the closed label of a status: ok, 3xx, 4xx, 429, 5xx; `protocol` for what HTTP has not."""
    if status == 429:  # noqa: PLR2004 - Too Many Requests, RFC 6585 §4
        return "429"
    return {2: "ok", 3: "3xx", 4: "4xx", 5: "5xx"}.get(status // 100, "protocol")


def parse_retry_after(value: str, now: int) -> float | None:
    """Return the seconds that a `Retry-After` asks for from `now` (wall clock, microseconds).

    Accepted are up to nine ASCII digits and the three forms of an HTTP date; a past date is 0 seconds.
    Anything else is None: receivers send fractions, signs and dates without a zone.
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
    except ValueError:  # the 31st of February
        return None
    return max(0.0, at.timestamp() - now / SECOND)


def _full_year(digits: int, present: int) -> int:
    """Complete a year of two digits: more than 50 years ahead means the past (RFC 9110 §5.6.7)."""
    year = present - present % 100 + digits
    return year - 100 if year > present + 50 else year
