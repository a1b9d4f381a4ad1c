"""The retention job: every minute, delete old finished events and expire deliveries held for too long."""

import asyncio
import logging

from relay.delivery.destination_health import NO_STORAGE
from relay.delivery.dispatcher import Dispatcher
from relay.delivery.lane import Lane
from relay.store import Store
from relay.store.retention_policy import Policy

log = logging.getLogger("relay.upkeep")

RETENTION = "retention"
"""The job. In a cluster, one node deletes; each node expires the deliveries of its own lanes."""


class Upkeep:
    """Deletes and expires data by `policy`, which may be replaced at any time."""

    every = 60.0  # seconds between passes

    def __init__(self, store: Store, dispatcher: Dispatcher, policy: Policy) -> None:
        self.policy = policy
        self._store = store
        self._dispatcher = dispatcher

    async def run(self) -> None:
        """Make one pass, bounded in time; the next pass continues."""
        names = await self._held_destinations()
        expired = 0
        while some := await self._store.deliveries.expire_held(names, self.policy.held):
            expired += some
        if expired:
            log.error("%d deliveries expired: held longer than [retention] held", expired)
        if not self._store.nodes.lead(RETENTION):
            return
        began = asyncio.get_running_loop().time()
        pruned = await self._store.upkeep.prune(self.policy)
        if pruned.events or pruned.attempts or pruned.pages or not pruned.done:
            log.info(
                "retention: deleted %d events and %d attempts, freed %d pages in %.1f s%s",
                pruned.events,
                pruned.attempts,
                pruned.pages,
                asyncio.get_running_loop().time() - began,
                "" if pruned.done else ", more in the next pass",
            )

    async def _held_destinations(self) -> set[str]:
        """Return the destinations whose deliveries are held, including those no longer in any config."""
        lanes = self._dispatcher.lanes.values()
        found = {name for lane in lanes if _is_holding(lane) for name in lane.senders}
        if not self._store.nodes.lead(RETENTION):
            return found
        configured = {name for node in await self._store.nodes.all() for name in node.destinations}
        for name, counts in (await self._store.ledger.audit()).items():
            if counts.pending and name not in configured and name not in self._dispatcher.lanes:
                found.add(name)
        return found


def _is_holding(lane: Lane) -> bool:
    """Return whether deliveries are held; a probe in progress does not end that."""
    return lane.is_owned and (lane.held not in {None, NO_STORAGE} or lane.health.circuit.is_open)
