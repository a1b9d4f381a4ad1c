"""Watching workers: who is silent past its deadline is offline."""

import logging

from relay.clock import SECOND, Clock
from relay.store import Store

log = logging.getLogger("relay.workers")


class Watch:
    """Judges all workers, every `interval` seconds; robust against clock steps and suspended processes."""

    def __init__(self, store: Store, clock: Clock, interval: float) -> None:
        self.interval = interval
        self._store = store
        self._clock = clock
        self._last: int | None = None  # steady clock; None: not yet since the start

    async def sweep(self) -> None:
        """Mark who is silent; when the sweep itself was away for long, put deadlines off instead."""
        now = self._clock.steady()
        away = self._last is None or now - self._last > 3 * self.interval * SECOND
        for worker in await self._store.sweep(hold=away):
            log.warning("%s: worker %s is offline: silent", worker.source, worker.id)
        self._last = now
