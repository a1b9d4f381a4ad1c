"""`GET /api/top`: the figures of `relay top`, once a second, computed only while somebody follows.

In a cluster, the node that somebody follows asks the other nodes for their figures, and adds them up.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web

from relay import __version__
from relay.api.context import Context
from relay.api.endpoints import EVENT_STREAM, endpoint
from relay.api.query_params import NoQuery
from relay.api.stream import Followers, LostView, frame, stream
from relay.api.views import ABSENT, Time, about
from relay.base.clock import SECOND, rfc3339
from relay.delivery.destination_health import ELSEWHERE
from relay.delivery.lane import Lane
from relay.metrics import OUTCOMES, STATUSES, Reading, Row
from relay.model import RESULTS
from relay.store import Answers

log = logging.getLogger("relay.api")

EVERY = 1.0  # seconds between two snapshots

SHOW = "show figures"
"""The request of another node that is followed."""

FOLLOWED = 3.0  # seconds after such a request during which this node computes its figures
FIRST = 2.5  # seconds within which the other nodes must answer first; later, within `EVERY`

METRICS = ("received", "attempts", "finished", "commit_seconds", "lag")


class TopSource(msgspec.Struct):
    """Figures of one source."""

    name: str
    paused: bool
    events_per_second: float


class TopDestination(msgspec.Struct):
    """Figures of one destination."""

    name: str
    held: str | None
    circuit: Literal["open", "closed"]
    pending: int
    in_flight: int
    attempts_per_second: float
    delivered_per_second: float
    failed_per_second: float
    last_error: Annotated[str | None, about("Of the latest failed attempt since the start.")]
    last_error_at: Time | None


class TopNode(msgspec.Struct, kw_only=True):
    """Another node of the cluster."""

    name: str
    answers: Annotated[bool, about("Whether it answers in time; if not, its figures are missing.")] = False
    ready: bool | None = None
    reasons: tuple[str, ...] = ()
    unable: Annotated[bool, about("Whether its figures are missing because it runs another version.")] = False


class Top(msgspec.Struct):
    """Figures of the daemon, or of all nodes of a cluster, over the last second."""

    at: str
    version: str
    uptime_seconds: int
    ready: Annotated[bool, about("Of the node that answers, as the reasons.")]
    reasons: tuple[str, ...]
    backlog: int
    events_per_second: float
    attempts_per_second: float
    delivered_per_second: float
    failed_per_second: float
    commit_ms: Annotated[float | None, about("Of the slowest node, as `loop_lag_ms`.")]
    loop_lag_ms: float
    sources: tuple[TopSource, ...]
    destinations: tuple[TopDestination, ...]
    workers: dict[str, int]
    nodes: Annotated[tuple[TopNode, ...], about("The other nodes of the cluster.")]


class _SourcePart(msgspec.Struct):
    """Figures of a source at another node, which may run another version: each may be missing."""

    name: str
    paused: bool = False
    events_per_second: float = 0.0


class _DestinationPart(msgspec.Struct):
    """Figures of a destination at another node, in the same way."""

    name: str
    held: str | None = ELSEWHERE
    circuit: str = "closed"
    pending: int = 0
    in_flight: int = 0
    attempts_per_second: float = 0.0
    delivered_per_second: float = 0.0
    failed_per_second: float = 0.0
    last_error: str | None = None
    last_error_at: str | None = None


class _Part(msgspec.Struct):
    """Figures of another node, in the same way."""

    ready: bool = True
    reasons: tuple[str, ...] = ()
    events_per_second: float = 0.0
    attempts_per_second: float = 0.0
    delivered_per_second: float = 0.0
    failed_per_second: float = 0.0
    commit_ms: float | None = None
    loop_lag_ms: float = 0.0
    sources: tuple[_SourcePart, ...] = ()
    destinations: tuple[_DestinationPart, ...] = ()


class TopApi:
    """The endpoint `/api/top`."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._began = context.clock.steady()
        self._followers: Followers[None] = Followers(room=1)  # a slow client needs only the latest snapshot
        self._ticking: asyncio.Task[None] | None = None
        self._latest: dict[str, Any] | None = None  # figures of this node, while somebody follows
        self._computed = asyncio.Event()  # `_latest` is set
        self._asked_until = 0.0  # loop time until which another node wants the figures
        self._nodes = context.store.nodes
        self._nodes.handle(SHOW, self._show_here)

    def end(self) -> None:
        """End all streams, because the daemon stops."""
        self._followers.end()
        if self._ticking is not None:
            self._ticking.cancel()

    @endpoint(
        "GET", "/api/top", "top", "Stream figures once a second as server-sent events `top` and `lost`.",
        query=NoQuery, returns=Top | LostView, content=EVENT_STREAM,
    )  # fmt: skip
    async def _top(self, request: web.Request, _query: NoQuery) -> web.StreamResponse:
        self._start()
        return await stream(request, self._followers, None)

    async def _show_here(self, _to: str, _argument: None) -> dict[str, Any] | None:
        """Return the figures of this node for another one; None: they could not be computed."""
        self._asked_until = asyncio.get_running_loop().time() + FOLLOWED
        self._start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST):
                await self._computed.wait()
        return None if self._latest is None else _without_idle(self._latest)

    def _start(self) -> None:
        if not self._followers.ended and (self._ticking is None or self._ticking.done()):
            self._ticking = asyncio.create_task(self._tick())

    @property
    def _is_followed(self) -> bool:
        return bool(self._followers) or self._asked_until > asyncio.get_running_loop().time()

    async def _tick(self) -> None:
        """Send a snapshot every second while there are followers."""
        try:
            await self._send_snapshots()
        finally:
            self._latest = None
            self._computed.clear()

    async def _send_snapshots(self) -> None:
        before = await self._context.metrics.read(*METRICS)
        others = await self._pause(FIRST)
        while self._is_followed:
            now = await self._context.metrics.read(*METRICS)
            try:
                self._latest = self._snapshot(before, now)
                self._computed.set()
                item = frame("top", _merged(self._latest, others)) if self._followers else b""
            except Exception:
                log.exception("cannot compute the figures of `relay top`")
            else:
                for follower in self._followers:
                    follower.put(item)
            before = now
            others = await self._pause(EVERY)

    async def _pause(self, patience: float) -> Answers:
        """Wait until the next snapshot; returns the figures of other nodes if somebody follows this one."""
        if self._nodes.alone or not self._followers:
            await asyncio.sleep(EVERY)
            return Answers()
        others, _ = await asyncio.gather(self._nodes.ask_others(SHOW, None, patience), asyncio.sleep(EVERY))
        return others

    def _snapshot(self, before: Reading, now: Reading) -> dict[str, Any]:
        context, pending = self._context, self._context.store.ledger.pending()
        lanes, reasons = context.dispatcher.lanes, context.health.reasons()
        rates = _Rates(before, now)
        destinations = [_destination(lane, pending.get(name, 0)) for name, lane in lanes.items()]
        destinations += [
            {"name": name, "held": ABSENT, "circuit": "closed", "pending": number,
             "in_flight": context.dispatcher.in_flight(name), **_last_error(None)}
            for name, number in pending.items() if name not in lanes
        ]  # fmt: skip
        return {
            "at": rfc3339(context.clock.wall()),
            "version": __version__,
            "uptime_seconds": (context.clock.steady() - self._began) // SECOND,
            "ready": not reasons,
            "reasons": reasons,
            "backlog": sum(pending.values()),
            "events_per_second": rates.of_sources(),
            **rates.of_destinations(),
            "commit_ms": rates.commit_ms(),
            "loop_lag_ms": round(now.row("lag")[0] * 1000, 2),
            "sources": [
                {"name": name, "paused": mount.paused, "events_per_second": rates.of_source(name)}
                for name, mount in context.ingest.mounts.items()
            ],
            "destinations": [{**each, **rates.of_destination(each["name"])} for each in destinations],
            "workers": self._workers(),
            "nodes": [],
        }

    def _workers(self) -> dict[str, int]:
        """Return the number of workers by status, without zeros, as `relay status` shows them."""
        count, sources = self._context.store.workers.count, self._context.ingest.mounts
        found = {status: sum(count(name, status) for name in sources) for status in STATUSES}
        return {status: number for status, number in found.items() if number}


_OK, _DELIVERED = RESULTS.index("ok"), OUTCOMES.index("delivered")
"""Places in the rows of attempts and of finished deliveries."""


class _Rates:
    """Changes between two readings, per second."""

    def __init__(self, before: Reading, now: Reading) -> None:
        self._before = before
        self._now = now
        self._seconds = now.at - before.at
        self._all = _Flow()
        self._flows: dict[str, _Flow] = {}
        for name, gained in self._gained("attempts"):
            attempts, succeeded = sum(gained), gained[_OK]
            for flow in (self._all, self._flows.setdefault(name, _Flow())):
                flow.attempts += attempts / self._seconds
                flow.failed += (attempts - succeeded) / self._seconds
        for name, gained in self._gained("finished"):
            for flow in (self._all, self._flows.setdefault(name, _Flow())):
                flow.delivered += gained[_DELIVERED] / self._seconds

    def of_source(self, name: str) -> float:
        """Return the rate of events from a source."""
        gained = self._now.growth(self._before, "received", name)
        return 0.0 if gained is None else round(gained[0] / self._seconds, 1)

    def of_sources(self) -> float:
        """Return the rate of events from all sources, removed ones included."""
        return round(sum(gained[0] for _, gained in self._gained("received")) / self._seconds, 1)

    def of_destination(self, name: str) -> dict[str, float]:
        """Return the rates of a destination."""
        return self._flows.get(name, _Flow()).rates()

    def of_destinations(self) -> dict[str, float]:
        """Return the rates of all destinations together, removed ones included."""
        return self._all.rates()

    def commit_ms(self) -> float | None:
        """Return the mean duration of a transaction, None if no transaction was committed."""
        gained = self._now.growth(self._before, "commit_seconds")
        if gained is None:
            return None
        *commits, took = gained
        return round(took / sum(commits) * 1000, 2)

    def _gained(self, metric: str) -> Iterator[tuple[str, Row]]:
        """Yield the rows of a metric that have grown, and by how much."""
        for name in self._now.rows[metric]:
            if (gained := self._now.growth(self._before, metric, name)) is not None:
                yield name, gained


class _Flow:
    """Rates of attempts and deliveries, per second."""

    def __init__(self) -> None:
        self.attempts = self.delivered = self.failed = 0.0

    def rates(self) -> dict[str, float]:
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
        **_last_error(lane.last_failure),
    }


def _last_error(failure: tuple[int, str] | None) -> dict[str, str | None]:
    at, error = failure or (None, None)
    return {"last_error": error, "last_error_at": None if at is None else rfc3339(at)}


_RATES = ("events_per_second", "attempts_per_second", "delivered_per_second", "failed_per_second")


def _without_idle(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Return a snapshot without the sources and destinations about which this node has nothing to report."""

    def has_news(row: Mapping[str, Any]) -> bool:
        is_here = row.get("held", ELSEWHERE) not in (ELSEWHERE, ABSENT)
        return is_here or bool(row.get("in_flight")) or any(row.get(name) for name in _RATES)

    return {
        **snapshot,
        "sources": [row for row in snapshot["sources"] if has_news(row)],
        "destinations": [row for row in snapshot["destinations"] if has_news(row)],
    }


def _merged(mine: dict[str, Any], others: Answers) -> dict[str, Any]:
    """Return the snapshot of the cluster: the figures of this node plus those of the others."""
    known = tuple((name, part) for name, part in others.given if part is not None)
    silent = [*others.silent, *(name for name, part in others.given if part is None)]
    found, unable = msgspec.structs.replace(others, given=known).read(_Part)
    parts: dict[str, dict[str, Any]] = {name: msgspec.to_builtins(part) for name, part in found}
    if not (parts or silent or unable):
        return mine
    every = [mine, *parts.values()]
    commits = [part["commit_ms"] for part in every if part["commit_ms"] is not None]
    return {
        **mine,
        **_added(every),
        "commit_ms": max(commits, default=None),
        "loop_lag_ms": max(part["loop_lag_ms"] for part in every),
        "sources": _rows(part["sources"] for part in every),
        "destinations": _rows(part["destinations"] for part in every),
        "nodes": [
            *(
                TopNode(name=name, answers=True, ready=part["ready"], reasons=part["reasons"])
                for name, part in parts.items()
            ),
            *(TopNode(name=name) for name in silent),
            *(TopNode(name=name, unable=True) for name in unable),
        ],
    }


def _added(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the sums of the rates that the rows have."""
    found: dict[str, float] = {}
    for row in rows:
        for name in _RATES:
            if name in row:
                found[name] = found.get(name, 0.0) + row[name]
    return {name: round(value, 1) for name, value in found.items()}


def _rows(lists: Iterable[Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the sources or destinations of nodes by name.

    The state of a destination comes from the node that has its lane; this node's row counts otherwise.
    """
    found: dict[str, dict[str, Any]] = {}
    for rows in lists:
        for row in rows:
            known = found.get(row["name"])
            if known is None:
                found[row["name"]] = row
                continue
            merged = {**known, **_added((known, row))}
            if "in_flight" in row:
                merged["in_flight"] = known["in_flight"] + row["in_flight"]
                # Several nodes have the state if each of them owns shards of the destination.
                if states := [each for each in (known, row) if each["held"] not in (ELSEWHERE, ABSENT)]:
                    held = [each["held"] for each in states]
                    merged["held"] = None if None in held else held[0]
                    merged["circuit"] = (
                        "open" if any(each["circuit"] == "open" for each in states) else "closed"
                    )
                latest = max(known, row, key=lambda each: each["last_error_at"] or "")
                merged |= {name: latest[name] for name in ("last_error", "last_error_at")}
            found[row["name"]] = merged
    return list(found.values())
