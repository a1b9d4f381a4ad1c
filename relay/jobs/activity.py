"""The latest event of each source, the latest success of each destination, and unusually silent sources.

The usual gap of a source is the longest gap between two events, apart from the gaps that together make up
less than 5 % of the time. So the nights and weekends of a sender that sleeps are usual; a single failure is
not. Sources with few events have no usual gap.

For an event or a success, the daemon only sets an attribute to the current time. Once a minute, this job
records which sources have sent events since its last run. At the start, it reads from the store what happened
before.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial

import msgspec

from relay.api.views import latest_success
from relay.base.clock import SECOND, Clock
from relay.delivery.dispatcher import Dispatcher
from relay.ingest.handler import Ingest
from relay.metrics import Metrics
from relay.model import Selection
from relay.store import Store

EVERY = 60.0
"""Seconds between two runs: one slot of `Rhythm.minutes`."""

PATIENCE = 3
"""A source is silent after this many usual gaps without an event; alerts.yml has the same number."""

RARE = 0.05
"""Share of the time that unusual gaps may take up together."""

SHORTEST = 300
"""Seconds: no usual gap is shorter, because a pause of a quarter of an hour needs no alert."""

DAYS = 14
"""Days of which hours are remembered: they contain at least one weekend besides the current one."""

ENOUGH_DAYS = 7
ENOUGH_HOURS = 10
"""A usual gap is known after this many days and hours with events: so sources with few events have none."""

_MINUTE, _HOUR = 60, 3600
_HOURS, _MINUTES = DAYS * 24, ENOUGH_DAYS * 24 * 60  # slots
_SHORT_RUN = 45 * SECOND  # runs closer together, such as an operator's, do not count as a minute


class Slots(msgspec.Struct):
    """Periods of equal length with and without events, the latest ones, as bits."""

    length: int  # number of periods to remember
    bits: int = 0  # up to the latest period with an event, which is bit 0
    empty: int = 0  # periods without an event since then

    def add(self, *, active: bool) -> None:
        """Append one period."""
        self.empty += 1
        if active:
            keeps = self.empty < self.length  # a shift by years of minutes would take much memory
            self.bits = ((self.bits << self.empty) & ((1 << self.length) - 1)) | 1 if keeps else 1
            self.empty = 0

    @property
    def span(self) -> int:
        """Periods from the first with an event to the last."""
        return self.bits.bit_length()

    def usual_gap(self) -> int:
        """Return the usual gap between two periods with events, in periods; 0: there are no two."""
        gaps = Counter(map(len, f"{self.bits:b}".split("1")[1:-1]))  # by the number of periods without events
        rest = RARE * (self.span - 1)
        for empty in sorted(gaps, reverse=True):
            rest -= gaps[empty] * (empty + 1)
            if rest < 0:
                return empty + 1
        return 0


class Rhythm:
    """When a source sends: its events by hour for two weeks, and by minute since the start of the relay."""

    def __init__(self) -> None:
        self.hours = Slots(_HOURS)
        self.minutes = Slots(_MINUTES)
        self.usual_gap = 0  # seconds between two events, at the latest `measure`; 0: not known
        self.seen: int | None = None  # time of the latest event that is in the slots, wall clock
        self._minutes = 0  # of the current hour
        self._active = False  # in the current hour

    def add_minute(self, *, active: bool) -> bool:
        """Append a minute in which the relay was able to accept events; return whether it ends an hour."""
        self.minutes.add(active=active)
        self._active = self._active or active
        self._minutes += 1
        if self._minutes == _HOUR // _MINUTE:
            self.hours.add(active=self._active)
            self._minutes, self._active = 0, False
        return not self._minutes

    @property
    def silence(self) -> int:
        """Seconds without an event, as far as the slots record them."""
        return self.minutes.empty * _MINUTE

    def measure(self) -> None:
        """Measure the usual gap, which takes a millisecond."""
        hours = self.hours
        if hours.span < ENOUGH_DAYS * 24 or hours.bits.bit_count() < ENOUGH_HOURS:
            self.usual_gap = 0
            return
        gap = hours.usual_gap() * _HOUR
        if gap == _HOUR and self.minutes.span >= 24 * 60:
            gap = self.minutes.usual_gap() * _MINUTE
        self.usual_gap = max(gap, SHORTEST)


class Activity:
    """The latest event of each source and the latest success of each destination, also before the start."""

    every = EVERY

    def __init__(
        self,
        store: Store,
        ingest: Ingest,
        dispatcher: Dispatcher,
        metrics: Metrics,
        clock: Clock,
        *,
        accepts: Callable[[], bool],
    ) -> None:
        """Build it before the store is open; `accepts` returns whether the relay accepts events now."""
        self._store = store
        self._ingest = ingest
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._clock = clock
        self._accepts = accepts
        self._rhythms: dict[str, Rhythm] = {}
        self._successes: dict[str, int | None] = {}  # by destination: as of the last run, wall clock
        self._ran_at: int | None = None  # steady clock
        self._stopped_at = store.stopped_at  # wall clock

    async def run(self) -> None:
        """Append a minute for each source; read the past of sources and destinations that are new here."""
        await self._read_past()
        if not self._store.nodes.alone:
            await self._read_others()
        now, mounts = self._clock.steady(), self._ingest.mounts
        is_minute = self._ran_at is not None and now - self._ran_at >= _SHORT_RUN
        if is_minute or self._ran_at is None:
            self._ran_at = now
        counts = is_minute and self._accepts()
        for name, rhythm in self._rhythms.items():
            if name not in mounts:  # a reload has just removed it
                continue
            if mounts[name].paused:
                rhythm.minutes.empty = 0  # silence is counted again from the end of the pause
            elif counts:
                latest = self.last_event(name)
                ends_hour = rhythm.add_minute(active=latest != rhythm.seen)
                rhythm.seen = latest
                if ends_hour:
                    rhythm.measure()
                    await asyncio.sleep(0)  # lets senders in
        for name in self._successes:
            self._successes[name] = self.last_success(name)

    def last_event(self, source: str) -> int | None:
        """Return the time of a source's latest event (wall clock); None: the store has none."""
        counters = self._ingest.counters.get(source)
        if counters is not None and counters.last_event is not None:
            return counters.last_event
        rhythm = self._rhythms.get(source)
        return None if rhythm is None else rhythm.seen

    def silence(self, source: str) -> int:
        """Return the seconds without an event during which the relay was able to accept one."""
        rhythm = self._rhythms.get(source)
        return 0 if rhythm is None or self.last_event(source) != rhythm.seen else rhythm.silence

    def usual_gap(self, source: str) -> int:
        """Return the usual seconds between two events; 0: not known, or the source is paused."""
        rhythm, mount = self._rhythms.get(source), self._ingest.mounts.get(source)
        return 0 if rhythm is None or mount is None or mount.paused else rhythm.usual_gap

    def is_silent(self, source: str) -> bool:
        """Return whether a source is silent for much longer than usual."""
        return 0 < PATIENCE * self.usual_gap(source) < self.silence(source)

    def last_success(self, destination: str) -> int | None:
        """Return the time of the latest 2xx from a destination (wall clock); None: the store has none."""
        lane = self._dispatcher.lanes.get(destination)
        if lane is not None and lane.last_success is not None:
            return lane.last_success
        return self._successes.get(destination)

    def certificate_expires(self, destination: str) -> int | None:
        """Return when the certificate of a destination expires (wall clock), as of the latest connection."""
        lane = self._dispatcher.lanes.get(destination)
        return None if lane is None or lane.certificate is None else lane.certificate.ends

    def certificate_lifetime(self, destination: str) -> int | None:
        """Return the total period of validity of that certificate, in microseconds."""
        lane = self._dispatcher.lanes.get(destination)
        if lane is None or lane.certificate is None:
            return None
        return lane.certificate.ends - lane.certificate.begins

    async def _read_past(self) -> None:
        """Read the past of sources and destinations that are new here; forget removed ones."""
        mounts, lanes, metrics = self._ingest.mounts, self._dispatcher.lanes, self._metrics
        for name in self._rhythms.keys() - mounts.keys():
            del self._rhythms[name]
            for gauge in (metrics.last_event, metrics.silence, metrics.usual_gap):
                gauge.remove(name)
        for name in self._successes.keys() - lanes.keys():
            del self._successes[name]
            for gauge in (metrics.last_success, metrics.certificate, metrics.certificate_lifetime):
                gauge.remove(name)
        if new := {name: Rhythm() for name in mounts.keys() - self._rhythms.keys()}:
            for name, rhythm in new.items():
                rhythm.seen = await self._stored_event(name)
            await self._read_hours(new)
            for name, rhythm in new.items():
                self._rhythms[name] = rhythm
                metrics.last_event.labels(name).set_function(partial(_seconds, self.last_event, name))
                metrics.silence.labels(name).set_function(partial(self.silence, name))
                metrics.usual_gap.labels(name).set_function(partial(self.usual_gap, name))
        for name, moment in (await self._stored_successes(lanes.keys() - self._successes.keys())).items():
            self._successes[name] = moment
            metrics.last_success.labels(name).set_function(partial(_seconds, self.last_success, name))
            metrics.certificate.labels(name).set_function(partial(_seconds, self.certificate_expires, name))
            lifetime = partial(_seconds, self.certificate_lifetime, name)
            metrics.certificate_lifetime.labels(name).set_function(lifetime)

    async def _read_others(self) -> None:
        """Read the latest events and successes again: other nodes accept events and make attempts, too."""
        for name in tuple(self._rhythms):
            moment = await self._stored_event(name)
            counters = self._ingest.counters[name]
            if moment is not None and moment > (counters.last_event or 0):
                counters.last_event = moment
        lanes = {name: lane for name, lane in self._dispatcher.lanes.items() if not lane.is_owned}
        for name, moment in (await self._stored_successes(lanes.keys())).items():
            lanes[name].last_success = moment

    async def _stored_event(self, source: str) -> int | None:
        """Return when the latest event of a source was received."""
        rows = await self._store.queries.find("events", source=source, limit=1)
        return rows[0]["received_at"] if rows else None

    async def _read_hours(self, rhythms: dict[str, Rhythm]) -> None:
        """Fill the hours of sources from the counts of events, and their silence until the last stop."""
        since = self._clock.wall() - DAYS * 86_400 * SECOND
        hours: dict[str, set[int]] = {name: set() for name in rhythms}
        async for page in self._store.queries.stats(Selection(since=since)):
            for stat in page:
                if stat.events and stat.source in hours:
                    hours[stat.source].add(stat.hour // (_HOUR * SECOND))
        for name, active in hours.items():
            rhythm, seen = rhythms[name], rhythms[name].seen
            for hour in range(min(active, default=0), max(active, default=-1) + 1):
                rhythm.hours.add(active=hour in active)
            rhythm.measure()
            stopped_at = min(self._stopped_at or self._store.stopped_at, self._clock.wall())
            if seen is not None and stopped_at > seen:
                seconds = (stopped_at - seen) // SECOND
                rhythm.minutes.empty = seconds // _MINUTE
                rhythm.hours.empty = seconds // _HOUR

    async def _stored_successes(self, destinations: Collection[str]) -> dict[str, int | None]:
        """Return the time of the latest success of each destination that the store has."""
        backlogs = await self._store.ledger.backlog(self._clock.steady()) if destinations else {}
        return {name: await latest_success(self._store, name, backlogs.get(name)) for name in destinations}


def _seconds(read: Callable[[str], int | None], name: str) -> float:
    """Convert a time or a period from microseconds to the seconds of metrics; 0 for None."""
    return (read(name) or 0) / SECOND
