"""Retention at work: each minute, what has been dealt with goes, and what nobody takes expires."""

import asyncio
import logging

from relay.delivery.dispatcher import Engine
from relay.delivery.lane import NO_STORAGE, Lane
from relay.store import Store
from relay.store.retention_policy import Policy

log = logging.getLogger("relay.upkeep")


class Upkeep:
    """Keeps the store as small as its policy says; `policy` may be replaced at any time."""

    every = 60.0  # seconds between two passes

    def __init__(self, store: Store, engine: Engine, policy: Policy) -> None:
        self.policy = policy
        self._store = store
        self._engine = engine

    async def run(self) -> None:
        """Make one pass, which leaves to the next what would take too long."""
        names = await self._holding()
        expired = 0
        while some := await self._store.deliveries.expire_held(names, self.policy.held):
            expired += some
        if expired:
            log.error("%d deliveries expired: nobody took them within [retention] held", expired)
        began = asyncio.get_running_loop().time()
        pruned = await self._store.upkeep.prune(self.policy)
        if pruned.events or pruned.attempts or pruned.pages or not pruned.done:
            log.info(
                "retention: %d events and %d attempts gone, %d pages given back in %.1f s%s",
                pruned.events,
                pruned.attempts,
                pruned.pages,
                asyncio.get_running_loop().time() - began,
                "" if pruned.done else ", more next time",
            )

    async def _holding(self) -> set[str]:
        """Return the destinations that take nothing: also those that are not in the config any more."""
        found = {name for name, lane in self._engine.lanes.items() if _takes_nothing(lane)}
        for name, counts in (await self._store.ledger.audit()).items():
            if counts.pending and name not in self._engine.lanes:
                found.add(name)
        return found


def _takes_nothing(lane: Lane) -> bool:
    """A probe under way is no sign of life yet."""
    return lane.held not in {None, NO_STORAGE} or lane.standing.circuit.is_open
