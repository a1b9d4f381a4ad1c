"""How it goes at the moment, once a second: what `relay top` shows. Computed only while somebody looks."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from aiohttp import web

from relay import __version__
from relay.api.context import Parts
from relay.api.query_params import NoQuery
from relay.api.responses import query_of
from relay.api.stream import Followers, frame, stream
from relay.api.views import ABSENT
from relay.base.clock import SECOND, rfc3339
from relay.delivery.lane import Lane

log = logging.getLogger("relay.api")

EVERY = 1.0  # seconds between two snapshots

_EVENTS, _ATTEMPTS = "relay_events_received_total", "relay_delivery_attempts_total"
_FINISHED, _WORKERS = "relay_deliveries_finished_total", "relay_workers"
_COMMIT = "relay_storage_commit_duration_seconds"
_LAG = "relay_event_loop_lag_seconds"
_NAMES = (_EVENTS, _ATTEMPTS, _FINISHED, _WORKERS, f"{_COMMIT}_sum", f"{_COMMIT}_count", _LAG)


class _Reading:
    """The metrics of one moment, by name and labels, and when that was."""

    def __init__(self) -> None:
        self.at = asyncio.get_running_loop().time()
        self._values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in _NAMES}

    @classmethod
    async def take(cls, parts: Parts) -> "_Reading":
        """Read them, a family at a time: those of 50 destinations take 3 ms, and senders would notice."""
        reading = cls()
        for family in parts.metrics.registry.restricted_registry(_NAMES).collect():
            for sample in family.samples:
                reading._values[sample.name][tuple(sample.labels.values())] = sample.value
            await asyncio.sleep(0)
        return reading

    def of(self, name: str, *labels: str) -> float:
        """Return one metric; 0: there is none yet."""
        return self._values[name].get(labels, 0.0)

    def all(self, name: str) -> dict[tuple[str, ...], float]:
        """Return the metrics of a name by their labels."""
        return self._values[name]


class TopApi:
    """The part of the admin API under `/api/top`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._began = parts.clock.steady()
        self._followers: Followers[None] = Followers(room=1)  # who is late wants the latest, not the oldest
        self._ticking: asyncio.Task[None] | None = None

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [web.get("/api/top", self._top, allow_head=False)]

    def end(self) -> None:
        """End all streams: the relay stops."""
        self._followers.end()
        if self._ticking is not None:
            self._ticking.cancel()

    async def _top(self, request: web.Request) -> web.StreamResponse:
        query_of(request, NoQuery)
        if not self._followers.ended and (self._ticking is None or self._ticking.done()):
            self._ticking = asyncio.create_task(self._tick())
        return await stream(request, self._followers, None)

    async def _tick(self) -> None:
        """Make a snapshot a second for as long as there is somebody to see it."""
        before = await _Reading.take(self._parts)
        await asyncio.sleep(EVERY)
        while self._followers:
            now = await _Reading.take(self._parts)
            try:
                told = frame("top", self._snapshot(before, now))
            except Exception:
                log.exception("there is no snapshot for `relay top`")
            else:
                for follower in self._followers:
                    follower.put(told)
            before = now
            await asyncio.sleep(EVERY)

    def _snapshot(self, before: _Reading, now: _Reading) -> dict[str, Any]:
        parts, owed = self._parts, self._parts.store.ledger.pending()
        reasons = parts.health.reasons()
        rates = _Rates(before, now)
        destinations = [_destination(lane, owed.get(name, 0)) for name, lane in parts.engine.lanes.items()]
        destinations += [
            {"name": name, "held": ABSENT, "circuit": "closed", "pending": pending,
             "in_flight": parts.engine.in_flight(name)}
            for name, pending in owed.items() if name not in parts.engine.lanes
        ]  # fmt: skip
        destinations = [{**told, **rates.of_destination(told["name"])} for told in destinations]
        sources = [
            {"name": name, "paused": mount.paused, "events_per_second": rates.of_source(name)}
            for name, mount in parts.ingest.mounts.items()
        ]
        return {
            "at": rfc3339(parts.clock.wall()),
            "version": __version__,
            "uptime_seconds": (parts.clock.steady() - self._began) // SECOND,
            "ready": not reasons,
            "reasons": reasons,
            "backlog": sum(owed.values()),
            "events_per_second": rates.of_sources(),
            **rates.of_destinations(),
            "commit_ms": rates.commit_ms(),
            "loop_lag_ms": round(now.of(_LAG) * 1000, 2),
            "sources": sources,
            "destinations": destinations,
            "workers": _workers(now.all(_WORKERS)),
        }


class _Rates:
    """What changed between two readings, per second."""

    def __init__(self, before: _Reading, now: _Reading) -> None:
        self._before = before
        self._now = now
        self._seconds = now.at - before.at
        self._all = _Flow()
        self._flows: dict[str, _Flow] = {}
        for (name, result), rate in self._per_second(_ATTEMPTS):
            for flow in (self._all, self._flows.setdefault(name, _Flow())):
                flow.attempts += rate
                flow.failed += 0 if result == "ok" else rate
        for (name, outcome), rate in self._per_second(_FINISHED):
            if outcome == "delivered":
                for flow in (self._all, self._flows.setdefault(name, _Flow())):
                    flow.delivered += rate

    def of_source(self, name: str) -> float:
        """Return how many events come in from a source."""
        return round((self._now.of(_EVENTS, name) - self._before.of(_EVENTS, name)) / self._seconds, 1)

    def of_sources(self) -> float:
        """Return how many come in, from those of former configurations too."""
        return round(sum(rate for _, rate in self._per_second(_EVENTS)), 1)

    def of_destination(self, name: str) -> dict[str, float]:
        """Return how a destination is getting on."""
        return self._flows.get(name, _Flow()).told()

    def of_destinations(self) -> dict[str, float]:
        """Return how they all are, those of former configurations too."""
        return self._all.told()

    def commit_ms(self) -> float | None:
        """Return what a transaction took on the average; None: there was none."""
        commits = self._now.of(f"{_COMMIT}_count") - self._before.of(f"{_COMMIT}_count")
        took = self._now.of(f"{_COMMIT}_sum") - self._before.of(f"{_COMMIT}_sum")
        return round(took / commits * 1000, 2) if commits else None

    def _per_second(self, name: str) -> Iterator[tuple[tuple[str, ...], float]]:
        """Yield what has changed."""
        for labels, value in self._now.all(name).items():
            if amount := value - self._before.of(name, *labels):
                yield labels, amount / self._seconds


class _Flow:
    """What goes out, per second."""

    def __init__(self) -> None:
        self.attempts = self.delivered = self.failed = 0.0

    def told(self) -> dict[str, float]:
        return {
            "attempts_per_second": round(self.attempts, 1),
            "delivered_per_second": round(self.delivered, 1),
            "failed_per_second": round(self.failed, 1),
        }


def _destination(lane: Lane, pending: int) -> dict[str, Any]:
    circuit = "open" if lane.health.circuit.is_open else "closed"
    return {
        "name": lane.name,
        "held": lane.held,
        "circuit": circuit,
        "pending": pending,
        "in_flight": lane.in_flight,
    }


def _workers(census: Mapping[tuple[str, ...], float]) -> dict[str, int]:
    """Add workers up by their status, whatever their source; as `relay status` does, without zeros."""
    found: dict[str, int] = {}
    for (_, status), number in census.items():
        if number:
            found[status] = found.get(status, 0) + int(number)
    return found
