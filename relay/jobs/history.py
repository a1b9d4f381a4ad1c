"""The last hour of each source and destination, in memory, from the metrics.

Prometheus keeps metrics for longer, but not every relay has one, and a page or a command can show this hour
without it. Every ten seconds, this job records how much the counters have grown since its last run.
"""

import asyncio
import math
from array import array
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

import msgspec

from relay.base.clock import SECOND, Clock
from relay.base.turns import Turns
from relay.metrics import Metrics, Reading

EVERY = 10.0
"""Seconds of one slot."""

SLOTS = 360
"""Slots that are kept: one hour."""

MOST_MADE = 8
"""Results that are cached until the next reading, because several pages and nodes request the same one."""

FRESH = 1.0
"""Seconds between two readings of the running slot."""

SOURCE = ("events", "refused")
DESTINATION = ("succeeded", "failed", "p50", "p95", "pending")
"""Figures of a slot: attempts by result, their duration in seconds, and deliveries that wait at its end."""

_FIGURES = {"sources": SOURCE, "destinations": DESTINATION}
_EVENTS, _REFUSED = "relay_events_received_total", "relay_events_rejected_total"
_ATTEMPTS, _BUCKETS = "relay_delivery_attempts_total", "relay_delivery_attempt_duration_seconds_bucket"
_NAMES = (_EVENTS, _REFUSED, _ATTEMPTS, _BUCKETS)
_SUMS = frozenset({"events", "refused", "succeeded", "failed"})
_PLACES = SLOTS + 1
_UNKNOWN = math.nan
_NOTHING = array("d", [_UNKNOWN])


class Ring:
    """One figure of the last `SLOTS` slots, and of the running one."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values = array("d", [_UNKNOWN] * _PLACES)

    def set(self, slot: int, value: float) -> None:
        """Set the figure of a slot."""
        self._values[slot % _PLACES] = value

    def until(self, slot: int, count: int) -> "array[float]":
        """Return the figures of the last `count` slots until `slot`, oldest first."""
        start = (slot + 1) % _PLACES
        ordered = self._values[start:] + self._values[:start]
        return _NOTHING * max(0, count - SLOTS) + ordered[_PLACES - min(count, SLOTS) :]


class Series(msgspec.Struct, frozen=True):
    """The figures of a source or destination, oldest first; None where the relay did not run."""

    name: str
    figures: dict[str, list[float | None]]


class Hour(msgspec.Struct, frozen=True):
    """Figures of sources and destinations in periods of equal length."""

    until: int  # end of the last period, wall clock
    step: float  # seconds of a period
    sources: tuple[Series, ...]
    destinations: tuple[Series, ...]


class History:
    """Notes the figures; `pending` returns the number of pending deliveries by destination."""

    every = EVERY

    def __init__(
        self,
        metrics: Metrics,
        clock: Clock,
        *,
        sources: Callable[[], Collection[str]],
        destinations: Callable[[], Collection[str]],
        pending: Callable[[], Mapping[str, int]],
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._names = {"sources": sources, "destinations": destinations}
        self._pending = pending
        self._rings: dict[tuple[str, str, str], Ring] = {}  # by kind, name and figure
        self._made: dict[Hashable, Hour] = {}  # cached results, see `MOST_MADE`
        self._before: Reading | None = None
        self._slot = 0  # the last one
        self._ran_at = 0  # its end, steady clock
        self._until = 0  # the same, wall clock
        self._read_at = 0  # latest reading of the running slot, steady clock
        self._reading = asyncio.Lock()

    async def run(self) -> None:
        """Note the figures of the slot that ends now."""
        steady = self._clock.steady()
        passed = round((steady - self._ran_at) / (EVERY * SECOND))
        before = self._before
        if before is not None and not passed:  # an operator has just run this job
            return
        self._before = now = await self._metrics.read(_NAMES)
        self._ran_at, self._read_at, self._until = steady, steady, self._clock.wall()
        self._made.clear()
        known = {(kind, name) for kind, names in self._names.items() for name in names()}
        for key in [key for key in self._rings if key[:2] not in known]:
            del self._rings[key]
        if before is None:
            return
        skipped = range(self._slot + 1, self._slot + min(passed, _PLACES + 1))  # the machine was suspended
        self._slot += passed
        for ring in self._rings.values():
            for slot in skipped:
                ring.set(slot, _UNKNOWN)
        self._note_slot(self._slot, before, now)

    def _note_slot(self, slot: int, before: Reading, now: Reading) -> None:
        sources, destinations = _of_sources(before, now), _of_destinations(before, now)
        pending = self._pending()
        for name in self._names["sources"]():
            self._note("sources", name, slot, sources.get(name) or dict.fromkeys(SOURCE, 0.0))
        for name in self._names["destinations"]():
            figures = destinations.get(name) or _figures((0.0, 0.0), ())
            self._note("destinations", name, slot, {**figures, "pending": float(pending.get(name, 0))})

    def _note(self, kind: str, name: str, slot: int, figures: Mapping[str, float]) -> None:
        for figure, value in figures.items():
            key = (kind, name, figure)
            if (ring := self._rings.get(key)) is None:
                ring = self._rings[key] = Ring()
            ring.set(slot, value)

    async def _note_running(self) -> None:
        """Record the running slot so far. When the slot ends, its final figures replace these."""
        async with self._reading:
            before, steady = self._before, self._clock.steady()
            if before is None or steady - self._read_at < FRESH * SECOND:
                return
            now = await self._metrics.read(_NAMES)
            if self._before is before:  # the slot has not ended meanwhile
                self._read_at = steady
                self._made.clear()
                self._note_slot(self._slot + 1, before, now)

    async def hour(
        self,
        minutes: int,
        periods: int,
        source: str | None = None,
        destination: str | None = None,
        *,
        running: bool = False,
    ) -> Hour:
        """Return the last `minutes`, divided into at most `periods` periods.

        With a name, return only this source or destination, or both. With `running`, the last period ends now
        and is up to ten seconds shorter than the others.
        """
        if running:
            await self._note_running()
        names = tuple(tuple(each()) for each in self._names.values())  # a reload may change them
        asked, read_at = (minutes, periods, source, destination, running, names), self._read_at
        if (made := self._made.get(asked)) is not None:
            return made
        made = await self._hour(minutes, periods, source, destination, running=running)
        if read_at == self._read_at and len(self._made) < MOST_MADE:
            self._made[asked] = made
        return made

    async def _hour(
        self, minutes: int, periods: int, source: str | None, destination: str | None, *, running: bool
    ) -> Hour:
        slots = min(max(1, round(minutes * 60 / EVERY)), SLOTS)
        each = -(-slots // periods)
        count, until, last = -(-slots // each), self._until, self._slot
        if running and self._read_at > self._ran_at:
            until, last = until + self._read_at - self._ran_at, last + 1
        sources = self._wanted("sources", source, destination)
        destinations = self._wanted("destinations", destination, source)
        return Hour(
            until=until,
            step=each * EVERY,
            sources=await self._series("sources", sources, each, count, last),
            destinations=await self._series("destinations", destinations, each, count, last),
        )

    def _wanted(self, kind: str, name: str | None, other: str | None) -> Collection[str]:
        """Return the names of a kind: all of them, unless one of this kind or of the other is wanted."""
        names = self._names[kind]()
        if name is None:
            return () if other is not None else names
        return (name,) if name in names else ()

    async def _series(
        self, kind: str, names: Collection[str], each: int, count: int, last: int
    ) -> tuple[Series, ...]:
        turns, found = Turns(), list[Series]()

        def values(name: str, figure: str) -> list[float | None]:
            ring = self._rings.get((kind, name, figure))
            if ring is None:
                return [None] * count
            slots = ring.until(last, each * count)
            if slots.tobytes() == slots[:1].tobytes() * len(slots):  # of a destination without traffic
                return [_joined(figure, _known(slots[:each]))] * count
            return [_joined(figure, _known(slots[at : at + each])) for at in range(0, len(slots), each)]

        for name in tuple(names):
            found.append(Series(name, {figure: values(name, figure) for figure in _FIGURES[kind]}))
            await turns.give()
        return tuple(found)


async def merged(hours: Sequence[Hour]) -> Hour:
    """Return the history of a cluster from those of its nodes, of which the first gives the periods.

    Counts are added; of other figures, the largest counts. Nodes end their slots at different moments, so an
    event may count in the period beside its own.
    """
    first = hours[0]
    if len(hours) == 1:
        return first
    return Hour(
        until=first.until,
        step=first.step,
        sources=await _merged([(each.sources, _periods_behind(each, first)) for each in hours]),
        destinations=await _merged([(each.destinations, _periods_behind(each, first)) for each in hours]),
    )


def _periods_behind(hour: Hour, first: Hour) -> int:
    return round((first.until - hour.until) / (first.step * SECOND))


async def _merged(lists: Iterable[tuple[Iterable[Series], int]]) -> tuple[Series, ...]:
    """Merge the series of nodes by name; each list comes with the number of periods that it is behind."""
    found: dict[str, list[tuple[Series, int]]] = {}
    for several, behind in lists:
        for each in several:
            found.setdefault(each.name, []).append((each, behind))

    def values(figure: str, of: Sequence[tuple[Series, int]]) -> list[float | None]:
        columns = [_shifted(series.figures[figure], behind) for series, behind in of]
        return [
            _joined(figure, [value for value in period if value is not None])
            for period in zip(*columns, strict=True)
        ]

    turns, series = Turns(), list[Series]()
    for name, of in found.items():
        series.append(Series(name, {figure: values(figure, of) for figure in of[0][0].figures}))
        await turns.give()
    return tuple(series)


def _shifted(values: Sequence[float | None], by: int) -> list[float | None]:
    """Move values by a number of periods to the past, or to the future if it is negative."""
    gap: list[float | None] = [None] * min(abs(by), len(values))
    return [*values[by:], *gap][: len(values)] if by >= 0 else [*gap, *values][: len(values)]


def _known(values: "array[float]") -> Sequence[float]:
    """Return the figures of slots that are known. Mostly all are: a sum finds out faster than a loop."""
    return [value for value in values if not math.isnan(value)] if math.isnan(sum(values)) else values


def _joined(figure: str, values: Sequence[float]) -> float | None:
    """Return the figure of a period of several slots: a sum, or else the largest value."""
    if not values:
        return None
    return sum(values) if figure in _SUMS else max(values)


def _of_sources(before: Reading, now: Reading) -> dict[str, dict[str, float]]:
    """Return the growth of each source's counters between two readings."""
    found: dict[str, dict[str, float]] = {}
    for figure, metric in zip(SOURCE, (_EVENTS, _REFUSED), strict=True):
        for labels, value in now.all(metric).items():
            figures = found.setdefault(labels[0], dict.fromkeys(SOURCE, 0.0))
            figures[figure] += value - before.of(metric, *labels)
    return found


def _of_destinations(before: Reading, now: Reading) -> dict[str, dict[str, float]]:
    """Return the growth of each destination's counters between two readings."""
    attempts: dict[str, list[float]] = {}
    for (name, result), value in now.all(_ATTEMPTS).items():
        attempts.setdefault(name, [0.0, 0.0])[result != "ok"] += value - before.of(_ATTEMPTS, name, result)
    buckets: dict[str, list[tuple[float, float]]] = {}
    for (name, bound), value in now.all(_BUCKETS).items():
        gained = value - before.of(_BUCKETS, name, bound)
        buckets.setdefault(name, []).append((float(bound), gained))
    return {name: _figures(counts, buckets.get(name, ())) for name, counts in attempts.items()}


def _figures(counts: Sequence[float], buckets: Sequence[tuple[float, float]]) -> dict[str, float]:
    succeeded, failed = counts
    p50, p95 = quantile(0.5, buckets), quantile(0.95, buckets)
    return {"succeeded": succeeded, "failed": failed, "p50": p50, "p95": p95}


def quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float:
    """Return a quantile from the upper bounds and cumulative counts of a histogram; NaN if it is empty.

    As Prometheus' `histogram_quantile`: values are taken as evenly distributed within a bucket, and those
    above the largest finite bound as equal to it.
    """
    total = buckets[-1][1] if buckets else 0.0
    if not total:
        return _UNKNOWN
    wanted, lower, below = share * total, 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted:
            return (
                lower if math.isinf(bound) else lower + (bound - lower) * (wanted - below) / (count - below)
            )
        lower, below = bound, count
    return lower
