"""All lanes together: told of what is new, started, paused and stopped."""

import asyncio
import random
from collections.abc import Callable, Collection, Mapping

from relay.clock import Clock
from relay.config.model import DestinationConfig
from relay.delivery.client import Client
from relay.delivery.lane import Lane
from relay.delivery.memory import MOST, Memory
from relay.delivery.sender import Sender
from relay.delivery.slots import Slots
from relay.formats import FORMATS, Format
from relay.metrics import OUTCOMES, Metrics
from relay.model import DestinationState, News
from relay.store import Store


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
        self._memory = Memory(memory)

    async def start(self, own: Collection[tuple[str, int]] = ()) -> None:
        """Open a lane per destination and go on with what the store remembers.

        `own` are the relay's own listeners, which are never dialled.
        """
        states = await self._store.destination_states()
        slots = Slots()
        for name, config in self._destinations.items():
            client = Client(config, own=own)
            self.lanes[name] = Lane(
                config,
                Sender(config, self._formats[config.format], client, self._clock, self._rand),
                store=self._store,
                clock=self._clock,
                metrics=self._metrics,
                slots=slots,
                memory=self._memory,
                state=states.get(name) or DestinationState(name=name),
            )
        for lane in self.lanes.values():
            lane.turn()

    def listen(self, news: News) -> None:
        """Hand fresh deliveries to their lanes, in memory (see `relay.store.Listener`)."""
        for name, columns in news.books.items():
            self._count(name, columns)
        for delivery in news.deliveries:
            lane = self.lanes.get(delivery.destination)
            if lane is None:
                self._store.release((delivery.id,))
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
        await asyncio.gather(*(lane.stop(deadline) for lane in self.lanes.values()))
