"""Watches the database server and the cluster: figures for metrics, cautions for `/ready` and status."""

import logging
from contextlib import suppress

from relay.base.clock import Clock
from relay.errors import StorageError
from relay.metrics import Metrics
from relay.model import Caution, Observed
from relay.store import Store

log = logging.getLogger("relay")

DATABASE = "database"
"""The job; each node of a cluster runs it."""

EVERY = 15.0


class DatabaseWatch:
    """The latest figures and cautions; none with SQLite."""

    def __init__(self, store: Store, metrics: Metrics, clock: Clock) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._latest: Observed | None = None
        self._seen: frozenset[str] = frozenset()  # cautions that were logged
        if not store.nodes.alone:
            metrics.watch_cluster(store.nodes.figures)

    @property
    def cautions(self) -> tuple[Caution, ...]:
        """Risks that do not keep the relay from working; the most severe first."""
        return (() if self._latest is None else self._latest.cautions) + self._store.nodes.cautions()

    async def check(self) -> None:
        """Read the figures of the server. While it does not answer, the latest figures stay."""
        with suppress(StorageError):
            self._latest = await self._store.upkeep.observe()
        if self._latest is not None:
            self._metrics.note_server(self._latest)
        found = self.cautions
        for caution in found:
            if caution.what.partition("(")[0] not in self._seen:
                log.warning("%s", caution.what)
        self._seen = frozenset(caution.what.partition("(")[0] for caution in found)
