"""Checks every 15 s that all deliveries are accounted for, and exports the pending ones."""

import logging

from relay.base.clock import SECOND, Clock
from relay.delivery.destination_health import ELSEWHERE
from relay.delivery.dispatcher import Dispatcher
from relay.metrics import PENDING_STATES, Metrics
from relay.model import Backlog, Counts
from relay.store import Store

log = logging.getLogger("relay")

LEDGER = "ledger"
"""The job; it runs on one node of a cluster."""


class LedgerCheck:
    """Compares the ledger with the table of deliveries, and sets the gauges that need a query."""

    def __init__(self, store: Store, dispatcher: Dispatcher, metrics: Metrics, clock: Clock) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._clock = clock
        self.unaccounted: dict[str, int] = {}  # by destination, those that are not 0, at the latest check
        self.backlog: dict[str, Backlog] = {}  # by destination, at the latest check
        self.counts: dict[str, Counts] | None = None  # the ledger at the latest check
        self._names: set[str] = set()  # destinations whose gauges this node exports

    async def check(self) -> None:
        """Check once. Destinations that left the config are included, because their deliveries are held.

        In a cluster, one node checks and exports the gauges; on the others, they are 0.
        """
        if not self._store.nodes.lead(LEDGER):
            self._clear()
            return
        counts = self.counts = await self._store.ledger.audit()
        backlog = await self._store.ledger.backlog(self._clock.steady())
        self.backlog = backlog
        for name in self._dispatcher.lanes.keys() | counts.keys():
            lane, ledger, waiting = self._dispatcher.lanes.get(name), counts.get(name), backlog.get(name)
            unaccounted = 0 if ledger is None else ledger.unaccounted
            self._metrics.unaccounted.labels(name).set(unaccounted)
            self.unaccounted.pop(name, None)
            if unaccounted:
                self.unaccounted[name] = unaccounted
                log.error("%s: %d deliveries are unaccounted for", name, unaccounted)
            pending = 0 if ledger is None else ledger.pending
            in_flight = min(self._dispatcher.in_flight(name), pending)
            rest = pending - in_flight
            held = rest if lane is None or lane.held not in {None, ELSEWHERE} else 0
            due = 0 if held or waiting is None else min(rest, max(0, waiting.due - in_flight))
            for state, number in (
                ("in_flight", in_flight),
                ("held", held),
                ("due", due),
                ("waiting", rest - held - due),
            ):
                self._metrics.pending.labels(name, state).set(number)
            oldest = 0 if waiting is None else waiting.oldest / SECOND
            self._metrics.oldest.labels(name).set(oldest)
            self._names.add(name)

    def _clear(self) -> None:
        """Set the gauges to 0, because another node exports them now."""
        self.backlog = {}
        for name in self._names:
            for state in PENDING_STATES:
                self._metrics.pending.labels(name, state).set(0)
            for gauge in (self._metrics.unaccounted, self._metrics.oldest):
                gauge.labels(name).set(0)
        self._names.clear()
