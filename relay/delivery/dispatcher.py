"""All lanes together: told of what is new, started, changed and stopped."""

import asyncio
import random
from collections.abc import Callable, Collection, Mapping

import msgspec

from relay.base.clock import Clock
from relay.config.schema import DestinationConfig
from relay.delivery.attempt import Sender
from relay.delivery.http.http_client import Client
from relay.delivery.lane import Lane
from relay.delivery.limits import Slots
from relay.delivery.log_lines import Untried, log
from relay.delivery.memory import MOST, Memory
from relay.formats import FORMATS, Format
from relay.metrics import OUTCOMES, Metrics
from relay.model import DestinationState, News
from relay.process.logs import Sparing
from relay.store import Store


class Plan(msgspec.Struct, frozen=True):
    """Everything that lanes for a config need, made beforehand: taking it on cannot fail."""

    destinations: Mapping[str, DestinationConfig]
    senders: Mapping[str, Sender]  # for those that are new, and those that are others than before
    states: Mapping[str, DestinationState]

    async def discard(self) -> None:
        """Close what was made for it."""
        for sender in self.senders.values():
            await sender.close()


class Engine:
    """Forwards what the store owes to each destination, every one in a lane of its own."""

    def __init__(
        self,
        destinations: Mapping[str, DestinationConfig],
        *,
        store: Store,
        clock: Clock,
        metrics: Metrics,
        formats: Mapping[str, Format] = FORMATS,
        rand: Callable[[], float] = random.random,
        memory: int = MOST,
    ) -> None:
        self.lanes: dict[str, Lane] = {}
        self._destinations = destinations
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._formats = formats
        self._rand = rand
        self._untried = Untried(Sparing(log, clock))
        self._lacking = Sparing(log, clock, every=1.0)
        self._slots = Slots()
        self._memory = Memory(memory)
        self._own: Collection[tuple[str, int]] = ()
        self._leaving: dict[Lane, asyncio.Task[None]] = {}  # not in the config, with attempts under way

    async def start(self, own: Collection[tuple[str, int]] = ()) -> None:
        """Open a lane per destination and go on with what the store remembers.

        `own` are the relay's own listeners, which are never dialled.
        """
        self._own = own
        self.adopt(await self.plan(self._destinations))

    async def plan(self, destinations: Mapping[str, DestinationConfig]) -> Plan:
        """Make what lanes for these destinations need, beside the present ones.

        Raises:
            RelayError: a certificate's file cannot be read or used.
        """
        senders: dict[str, Sender] = {}
        plan = Plan(destinations, senders, await self._store.queries.destination_states())
        try:
            for name, config in destinations.items():
                lane = self.lanes.get(name)
                if lane is None or lane.config != config or _has_files(config):
                    client = Client(config, own=self._own)
                    senders[name] = Sender(
                        config, self._formats[config.format], client, self._clock, self._rand
                    )
        except BaseException:
            await plan.discard()
            raise
        return plan

    def adopt(self, plan: Plan) -> None:
        """Go by a plan from now on, in one step: lanes that it does not touch only look names up again."""
        former = dict(self.lanes)
        self.lanes.clear()  # not another one: others hold it
        for name, config in plan.destinations.items():
            lane = former.pop(name, None)
            if lane is None:
                state = plan.states.get(name) or DestinationState(name=name)
                lane = self._open(config, plan.senders[name], state)
                lane.turn()
            elif name in plan.senders:
                lane.change(config, plan.senders[name])
            else:
                lane.renew()
            self.lanes[name] = lane
        for lane in former.values():
            lane.leave()
            self._leaving[lane] = asyncio.create_task(self._see_off(lane))

    def in_flight(self, name: str) -> int:
        """Return how many attempts are being made at a destination, also one that has left the config."""
        return sum(lane.in_flight for lane in (*self.lanes.values(), *self._leaving) if lane.name == name)

    def listen(self, news: News) -> None:
        """Hand fresh deliveries to their lanes, in memory (see `relay.store.Listener`)."""
        for name, columns in news.books.items():
            self._count(name, columns)
        self._untried.tell(news)
        for delivery in news.deliveries:
            lane = self.lanes.get(delivery.destination)
            if lane is None:
                self._store.deliveries.release((delivery.id,))
            else:
                lane.offer(delivery)
        for name in news.woken:
            if (lane := self.lanes.get(name)) is not None:
                lane.wake()
        for name in news.hurried:
            if (lane := self.lanes.get(name)) is not None:
                lane.wake(retries=True)
        if news.dropped:
            for lane in self.lanes.values():
                lane.drop(news.dropped)

    def _count(self, name: str, columns: Mapping[str, int]) -> None:
        if columns["created"]:
            self._metrics.created.labels(name).inc(columns["created"])
        for outcome in OUTCOMES:
            if columns[outcome]:
                self._metrics.finished.labels(name, outcome).inc(columns[outcome])

    async def stop(self, seconds: float) -> None:
        """Let what is in flight finish for so long, record it, and end."""
        deadline = asyncio.get_running_loop().time() + seconds
        for task in self._leaving.values():
            task.cancel()
        lanes = (*self.lanes.values(), *self._leaving)
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)
        await asyncio.gather(*(lane.stop(deadline) for lane in lanes))

    def _open(self, config: DestinationConfig, sender: Sender, state: DestinationState) -> Lane:
        return Lane(
            config,
            sender,
            store=self._store,
            clock=self._clock,
            metrics=self._metrics,
            slots=self._slots,
            memory=self._memory,
            state=state,
            lacking=self._lacking,
        )

    async def _see_off(self, lane: Lane) -> None:
        """Wait for the last attempts of a lane; if its destination has returned, they may be its first."""
        await lane.stop(None)
        del self._leaving[lane]
        if (successor := self.lanes.get(lane.name)) is not None:
            successor.wake()
            successor.wake(retries=True)


def _has_files(config: DestinationConfig) -> bool:
    """Say whether files beside the config matter, which may have been renewed under the same names."""
    return config.ca_file is not None or config.client_cert is not None
