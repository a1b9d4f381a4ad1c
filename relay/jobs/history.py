"""The last hour and the last day of each source and destination, in memory, from the metrics.

Prometheus keeps metrics for longer, but not every relay has a Prometheus server.
Every ten seconds, this job records how much the counters have grown since its last run.
"""

import asyncio
import math
from array import array
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import accumulate

import msgspec

from relay.base.clock import SECOND, Clock
from relay.base.turns import Turns
from relay.metrics import Metrics, Reading, declared
from relay.model import RESULTS

EVERY = 10.0
"""Seconds of one slot."""

SLOTS = 360
"""Slots that are kept: one hour."""

LONG = 30
"""Slots in a long slot of five minutes."""

LONG_SLOTS = 288
"""Long slots that are kept: 24 hours."""

MOST_MADE = 8
"""Results that are cached until the next reading, because several pages and nodes request the same one."""

FRESH = 1.0
"""Seconds between two readings of the running slot."""

SOURCE = ("events", "refused")
DESTINATION = ("succeeded", "failed", "p50", "p95", "pending")
"""Figures of a slot: attempts by result, their duration in seconds, and deliveries that wait at its end."""

_FIGURES = {"sources": SOURCE, "destinations": DESTINATION}
_METRICS = ("received", "rejected", "attempts", "attempt_seconds")
_OK = RESULTS.index("ok")
_BOUNDS = (*declared()["attempt_seconds"].options["buckets"], math.inf)
_SUMS = frozenset({"events", "refused", "succeeded", "failed"})
_UNKNOWN = math.nan
_NOTHING = array("d", [_UNKNOWN])
_IDLE = (0.0, 0.0, _UNKNOWN, _UNKNOWN)
"""Figures of a destination without an attempt."""


class Ring:
    """The values of the latest complete slots and of the running slot."""

    __slots__ = ("_slots", "_values")

    def __init__(self, slots: int) -> None:
        """Create a ring of unknown values; `slots` is the number of complete slots to keep."""
        self._slots = slots
        self._values = array("d", [_UNKNOWN] * (slots + 1))

    def set(self, slot: int, value: float) -> None:
        """Set the value of a slot."""
        self._values[slot % len(self._values)] = value

    def get(self, slot: int) -> float:
        """Return the value of a slot that is kept."""
        return self._values[slot % len(self._values)]

    def forget(self, after: int, until: int) -> None:
        """Make the values of the slots after `after`, up to and including `until`, unknown."""
        for slot in range(after + 1, min(until, after + len(self._values)) + 1):
            self.set(slot, _UNKNOWN)

    def until(self, slot: int, count: int) -> "array[float]":
        """Return the values of the `count` slots that end with `slot`, oldest first."""
        start, kept = (slot + 1) % len(self._values), min(count, self._slots)
        ordered = self._values[start:] + self._values[:start]
        return _NOTHING * (count - kept) + ordered[len(ordered) - kept :]


class Figure:
    """The values of one figure, in short slots for the last hour and in long slots for the last day."""

    __slots__ = ("long", "short")

    def __init__(self) -> None:
        self.short = Ring(SLOTS)
        self.long = Ring(LONG_SLOTS)


class Figures:
    """The figures of a source or destination."""

    __slots__ = ("_last", "_of")

    def __init__(self, names: Iterable[str], last: int) -> None:
        """Create figures with unknown values up to the slot `last`."""
        self._last = last
        self._of = {name: Figure() for name in names}

    def of(self, name: str) -> Figure:
        """Return one figure."""
        return self._of[name]

    def note(self, slot: int, values: Iterable[float], *, is_complete: bool) -> None:
        """Record the values of a slot. The running slot does not count in its long slot yet."""
        before, long = self._last, _long(slot)
        if is_complete:
            self._last = slot
        for (name, figure), value in zip(self._of.items(), values, strict=True):
            if is_complete:
                if slot - before > 1:  # the machine was suspended
                    figure.short.forget(before, slot)
                if _long(before) != long:
                    figure.long.forget(_long(before), long)
                if not math.isnan(value):
                    known = figure.long.get(long)
                    joined = value if math.isnan(known) else _joined(name, (known, value))
                    figure.long.set(long, _UNKNOWN if joined is None else joined)
            figure.short.set(slot, value)


class View(msgspec.Struct, frozen=True):
    """The slots of a response, and how they are joined to periods."""

    is_long: bool
    each: int  # slots of a period
    count: int  # periods
    last: int  # the last slot
    running: int | None  # the running short slot, which the last long slot does not include yet
    begins: bool  # whether the running short slot is the first of its long slot

    def values(self, name: str, figure: Figure | None) -> list[float | None]:
        """Return the values of a figure by period, oldest first."""
        if figure is None:
            return [None] * self.count
        slots = (figure.long if self.is_long else figure.short).until(self.last, self.each * self.count)
        if self.running is not None:
            known = (
                [figure.short.get(self.running)]
                if self.begins
                else [slots[-1], figure.short.get(self.running)]
            )
            joined = _joined(name, _known(array("d", known)))
            slots[-1] = _UNKNOWN if joined is None else joined
        if slots.tobytes() == slots[:1].tobytes() * len(slots):  # fast path for destinations without traffic
            return [_joined(name, _known(slots[: self.each]))] * self.count
        return [_joined(name, _known(slots[at : at + self.each])) for at in range(0, len(slots), self.each)]


class Series(msgspec.Struct, frozen=True):
    """The figures of a source or destination, oldest first; None where the relay did not run."""

    name: str
    figures: dict[str, list[float | None]]


class Past(msgspec.Struct, frozen=True):
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
        self._figures: dict[tuple[str, str], Figures] = {}  # by kind and name
        self._made: dict[Hashable, Past] = {}  # cached results, see `MOST_MADE`
        self._before: Reading | None = None
        self._slot = 0  # the last complete one
        self._ran_at = 0  # its end, steady clock
        self._until = 0  # the same, wall clock
        self._read_at = 0  # latest reading of the running slot, steady clock
        self._noting = asyncio.Lock()  # held while figures are noted or read

    async def run(self) -> None:
        """Note the figures of the slot that ends now."""
        async with self._noting:
            steady = self._clock.steady()
            passed = round((steady - self._ran_at) / (EVERY * SECOND))
            before = self._before
            if before is not None and not passed:  # an operator has just run this job
                return
            self._before = now = await self._metrics.read(*_METRICS)
            self._ran_at, self._read_at, self._until = steady, steady, self._clock.wall()
            self._made.clear()
            known = {(kind, name) for kind, names in self._names.items() for name in names()}
            for key in self._figures.keys() - known:
                del self._figures[key]
            if before is not None:
                self._slot += passed
                await self._note_slot(self._slot, before, now)

    async def _note_slot(self, slot: int, before: Reading, now: Reading) -> None:
        """Record the figures of a slot: the last complete one, or the running one."""
        turns, pending = Turns(), self._pending()
        for name in tuple(self._names["sources"]()):
            await turns.give()
            self._note("sources", name, slot, _of_source(name, before, now))
        for name in tuple(self._names["destinations"]()):
            await turns.give()
            values = _of_destination(name, before, now)
            self._note("destinations", name, slot, (*values, float(pending.get(name, 0))))

    def _note(self, kind: str, name: str, slot: int, values: Iterable[float]) -> None:
        if (found := self._figures.get((kind, name))) is None:
            found = self._figures[kind, name] = Figures(_FIGURES[kind], self._slot)
        found.note(slot, values, is_complete=slot == self._slot)

    async def _note_running(self) -> None:
        """Record the running slot so far. When the slot ends, its final figures replace these."""
        before, steady = self._before, self._clock.steady()
        if before is None or steady - self._read_at < FRESH * SECOND:
            return
        now = await self._metrics.read(*_METRICS)
        self._read_at = steady
        self._made.clear()
        await self._note_slot(self._slot + 1, before, now)

    async def past(
        self,
        minutes: int,
        periods: int,
        source: str | None = None,
        destination: str | None = None,
        *,
        running: bool = False,
    ) -> Past:
        """Return the last `minutes`, divided into at most `periods` periods.

        More than an hour consists of slots of five minutes. With names, return only this source, this
        destination, or both. With `running`, the last period ends now and is up to one slot shorter.
        """
        async with self._noting:
            if running:
                await self._note_running()
            names = tuple(tuple(each()) for each in self._names.values())  # a reload may change them
            asked = (minutes, periods, source, destination, running, names)
            if (made := self._made.get(asked)) is not None:
                return made
            made = await self._past(minutes, periods, source, destination, running=running)
            if len(self._made) < MOST_MADE:
                self._made[asked] = made
            return made

    async def _past(
        self, minutes: int, periods: int, source: str | None, destination: str | None, *, running: bool
    ) -> Past:
        is_long = minutes > SLOTS * EVERY / 60
        length, most = (LONG * EVERY, LONG_SLOTS) if is_long else (EVERY, SLOTS)
        slots = min(max(1, round(minutes * 60 / length)), most)
        each = -(-slots // periods)
        until, last, running_slot = self._until, self._slot, None
        if running and self._read_at > self._ran_at:
            until, last = until + self._read_at - self._ran_at, last + 1
            running_slot = last if is_long else None
        if is_long and not running:
            until -= round(last % LONG * EVERY * SECOND)
            last -= last % LONG
        view = View(
            is_long=is_long,
            each=each,
            count=-(-slots // each),
            last=_long(last) if is_long else last,
            running=running_slot,
            begins=_long(last) > _long(self._slot),
        )
        sources = self._wanted("sources", source, destination)
        destinations = self._wanted("destinations", destination, source)
        return Past(
            until=until,
            step=each * length,
            sources=await self._series("sources", sources, view),
            destinations=await self._series("destinations", destinations, view),
        )

    def _wanted(self, kind: str, name: str | None, other: str | None) -> Collection[str]:
        """Return the names of a kind: all of them, unless one of this kind or of the other is wanted."""
        names = self._names[kind]()
        if name is None:
            return () if other is not None else names
        return (name,) if name in names else ()

    async def _series(self, kind: str, names: Collection[str], view: View) -> tuple[Series, ...]:
        turns, found = Turns(), list[Series]()
        for name in tuple(names):
            known = self._figures.get((kind, name))
            figures = {
                figure: view.values(figure, None if known is None else known.of(figure))
                for figure in _FIGURES[kind]
            }
            found.append(Series(name, figures))
            await turns.give()
        return tuple(found)


def _long(slot: int) -> int:
    """Return the long slot that contains a short slot."""
    return -(-slot // LONG)


async def merged(parts: Sequence[Past]) -> Past:
    """Return the history of a cluster from those of its nodes, of which the first gives the periods.

    Counts are added; of other figures, the largest counts. Nodes end their slots at different moments, so an
    event may count in the period beside its own.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    return Past(
        until=first.until,
        step=first.step,
        sources=await _merged([(each.sources, _periods_behind(each, first)) for each in parts]),
        destinations=await _merged([(each.destinations, _periods_behind(each, first)) for each in parts]),
    )


def _periods_behind(part: Past, first: Past) -> int:
    return round((first.until - part.until) / (first.step * SECOND))


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
    """Return the known figures of slots. Usually all are known, which a sum shows faster than a loop."""
    return [value for value in values if not math.isnan(value)] if math.isnan(sum(values)) else values


def _joined(figure: str, values: Sequence[float]) -> float | None:
    """Return the figure of a period of several slots: a sum, or else the largest value."""
    if not values:
        return None
    return sum(values) if figure in _SUMS else max(values)


def _of_source(name: str, before: Reading, now: Reading) -> tuple[float, float]:
    """Return the figures `SOURCE` for the time between two readings."""
    events, refused = (now.growth(before, metric, name) for metric in ("received", "rejected"))
    return sum(events or ()), sum(refused or ())


def _of_destination(name: str, before: Reading, now: Reading) -> tuple[float, float, float, float]:
    """Return the figures `DESTINATION` for the time between two readings, without `pending`."""
    attempts = now.growth(before, "attempts", name)
    if attempts is None:
        return _IDLE
    *counts, _ = now.growth(before, "attempt_seconds", name) or (0.0,)
    buckets = tuple(zip(_BOUNDS, accumulate(counts), strict=False))
    succeeded = attempts[_OK]
    return succeeded, sum(attempts) - succeeded, quantile(0.5, buckets), quantile(0.95, buckets)


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
