"""The dispatcher: opens, changes and closes lanes, and hands each delivery to its lane."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import msgspec

from relay.base.clock import SECOND, Clock
from relay.config.schema import DestinationConfig
from relay.delivery.attempt import AttemptRunner, log
from relay.delivery.http.http_client import HttpClient
from relay.delivery.lane import Lane
from relay.delivery.limits import MAX_BODY_BYTES, BodyBudget, Slots
from relay.formats import FORMATS, Format
from relay.formats.destination import format_of
from relay.metrics import OUTCOMES, Metrics
from relay.model import DestinationState, News
from relay.process.logs import RateLimitedLog
from relay.store import Store

STUCK_AFTER = 60 * SECOND
"""A store query takes milliseconds, and SQLite waits at most 5 s for a lock."""


class DispatchPlan(msgspec.Struct, frozen=True):
    """Everything that the lanes of a config need, prepared so that `Dispatcher.adopt` cannot fail."""

    destinations: Mapping[str, DestinationConfig]
    runners: Mapping[str, AttemptRunner]  # for new and changed destinations
    states: Mapping[str, DestinationState]

    async def discard(self) -> None:
        """Close the connections of a plan that no dispatcher adopts."""
        for runner in self.runners.values():
            await runner.close()


class Dispatcher:
    """Sends pending deliveries: one lane per destination."""

    def __init__(
        self,
        destinations: Mapping[str, DestinationConfig],
        *,
        store: Store,
        clock: Clock,
        metrics: Metrics,
        formats: Mapping[str, Format] = FORMATS,
        rand: Callable[[], float] = random.random,
        body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self.lanes: dict[str, Lane] = {}
        self._destinations = destinations
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._formats = formats
        self._rand = rand
        self._log = RateLimitedLog(log, clock)
        self._resource_log = RateLimitedLog(log, clock, every=1.0)
        self._slots = Slots()
        self._budget = BodyBudget(body_bytes)
        self._own: Collection[tuple[str, int]] = ()
        self._leaving: dict[Lane, asyncio.Task[None]] = {}  # not in the config, with attempts in flight

    async def start(self, own: Collection[tuple[str, int]] = ()) -> None:
        """Open a lane for each destination, with the state that the store remembers.

        `own` are the relay's own listeners, which are never dialled.
        """
        self._own = own
        self.adopt(await self.plan(self._destinations))

    async def plan(self, destinations: Mapping[str, DestinationConfig]) -> DispatchPlan:
        """Prepare lanes for these destinations without touching the current ones.

        Raises:
            RelayError: a certificate file cannot be read or used.
        """
        runners: dict[str, AttemptRunner] = {}
        plan = DispatchPlan(destinations, runners, await self._store.queries.destination_states())
        try:
            for name, config in destinations.items():
                lane = self.lanes.get(name)
                # Certificate files may have been renewed under the same names.
                has_files = config.ca_file is not None or config.client_cert is not None
                if lane is None or lane.config != config or has_files:
                    client = HttpClient(config, own=self._own)
                    format_ = format_of(config, self._formats)
                    runners[name] = AttemptRunner(config, format_, client, self._clock, self._rand)
        except BaseException:
            await plan.discard()
            raise
        return plan

    def adopt(self, plan: DispatchPlan) -> None:
        """Apply a plan in one step. Unchanged lanes only resolve their names again."""
        former = dict(self.lanes)
        self.lanes.clear()  # the same dict: other objects hold it
        for name, config in plan.destinations.items():
            lane = former.pop(name, None)
            if lane is None:
                state = plan.states.get(name) or DestinationState(name=name)
                lane = Lane(
                    config,
                    plan.runners[name],
                    store=self._store,
                    clock=self._clock,
                    metrics=self._metrics,
                    slots=self._slots,
                    budget=self._budget,
                    state=state,
                    resource_log=self._resource_log,
                )
                lane.turn()
            elif name in plan.runners:
                lane.change(config, plan.runners[name])
            else:
                lane.renew()
            self.lanes[name] = lane
        for lane in former.values():
            lane.remove()
            self._leaving[lane] = asyncio.create_task(self._finish(lane))

    def in_flight(self, name: str) -> int:
        """Return the number of attempts in flight at a destination, in the config or not.

        With attempts at shards that other nodes own.
        """
        return sum(
            lane.in_flight_everywhere for lane in (*self.lanes.values(), *self._leaving) if lane.name == name
        )

    async def drained(self, name: str) -> None:
        """Wait until no attempt is in flight at a destination and the outcomes are stored."""
        for lane in (*self.lanes.values(), *self._leaving):
            if lane.name == name:
                await lane.drained()

    def listen(self, news: News) -> None:
        """Hand the fresh deliveries of a commit to their lanes, in memory (see `relay.store.Listener`)."""
        ended_badly = False
        for name, columns in news.ledger.items():
            if columns["created"]:
                self._metrics.created.labels(name).inc(columns["created"])
            for outcome in OUTCOMES:
                if columns[outcome]:
                    self._metrics.finished.labels(name, outcome).inc(columns[outcome])
            ended_badly = ended_badly or columns["dead"] > 0 or columns["expired"] > 0
        if ended_badly:
            self._log_unattempted(news)
        for delivery in news.deliveries:
            lane = self.lanes.get(delivery.destination)
            if lane is None:
                self._store.deliveries.release((delivery.id,))
            else:
                lane.offer(delivery)
        if news.woken or news.made_due or news.dropped or news.later:
            self._wake(news)

    def _wake(self, news: News) -> None:
        """Drop deliveries that ended without an attempt; wake lanes whose waiting deliveries are due."""
        for name, lane in self.lanes.items():
            if news.dropped:
                lane.drop(news.dropped)
            if name in news.woken:
                lane.wake()
            if name in news.made_due:
                lane.wake(retries=True)
                lane.wake()
            if name in news.later:
                lane.expect(news.later[name])

    async def stop(self, seconds: float) -> None:
        """Wait up to `seconds` for attempts in flight, record them, and end."""
        deadline = asyncio.get_running_loop().time() + seconds
        for task in self._leaving.values():
            task.cancel()
        lanes = (*self.lanes.values(), *self._leaving)
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)
        await asyncio.gather(*(lane.stop(deadline) for lane in lanes))

    def _log_unattempted(self, news: News) -> None:
        """Log how many deliveries ended without an attempt; a lane logs the others."""
        attempted = Counter((outcome.delivery.destination, outcome.state) for outcome in news.outcomes)
        for name, columns in news.ledger.items():
            if (dead := columns["dead"] - attempted[name, "dead"]) > 0:
                line = f"{name}: {dead} deliveries are dead without an attempt: the backlog is full"
                self._log.warning(f"{name}: dead", line, destination=name, state="dead", count=dead)
            if (expired := columns["expired"] - attempted[name, "expired"]) > 0:
                line = f"{name}: {expired} deliveries expired without an attempt"
                self._log.info(f"{name}: expired", line, destination=name, state="expired", count=expired)

    async def _finish(self, lane: Lane) -> None:
        """Wait for the last attempts of a removed lane, then wake the lane of the same name, if any."""
        await lane.stop(None)
        del self._leaving[lane]
        if (successor := self.lanes.get(lane.name)) is not None:
            successor.wake()
            successor.wake(retries=True)


class StuckLanes:
    """Finds lanes that do not claim due deliveries: a store query has been due or under way for a minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waits: dict[tuple[str, int, int], int] = {}  # (lane, window, query) → waiting since

    def find(self, lanes: Mapping[str, Lane]) -> list[str]:
        """Return the names of stuck lanes; time counts from the first call that saw them wait."""
        now, before = self._clock.steady(), self._waits
        self._waits = {
            (name, window, query): before.get((name, window, query), now)
            for name, lane in lanes.items()
            for window, (query, waiting) in enumerate(lane.refills)
            if waiting
        }
        return sorted({name for (name, _, _), since in self._waits.items() if now - since > STUCK_AFTER})
