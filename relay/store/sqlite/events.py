"""Loads and deletes events in SQLite."""

from collections.abc import Sequence
from functools import partial

from relay.model import Expunged, StoredEvent
from relay.store import Queries
from relay.store.deliveries import StoredDeliveries
from relay.store.events import StoredEvents
from relay.store.pruning import Candidate, deletions, paced
from relay.store.sqlite.database import Database
from relay.store.sqlite.prune import delete_events
from relay.store.sqlite.rows import load_events, marks
from relay.store.workers import StoredWorkers

EXPUNGE_EVENTS = 500
"""Events whose deliveries one transaction cancels."""

_DEAD_KEEP_NOTHING = 2**63 - 1  # `Candidate.dead`: dead deliveries do not keep an event that is expunged

PENDING_SQL = "SELECT id FROM deliveries WHERE event_id IN ({marks}) AND state = 'pending'"
COST_SQL = """
    SELECT e.id, 1 + e.size / 4096 + count(d.id) + 2 * coalesce(sum(d.attempts), 0)
      FROM events AS e LEFT JOIN deliveries AS d ON d.event_id = e.id
     WHERE e.id IN ({marks}) GROUP BY e.id
"""


class SqliteEvents(StoredEvents):
    """`relay.store.Events` over SQLite."""

    def __init__(
        self, database: Database, *, deliveries: StoredDeliveries, queries: Queries, workers: StoredWorkers
    ) -> None:
        super().__init__(database, queries=queries, workers=workers)
        self._sqlite = database
        self._deliveries = deliveries

    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """See `Events.load`."""
        return await load_events(self._sqlite.reader, event_ids)

    async def expunge(self, event_ids: Sequence[int]) -> Expunged:
        """See `Events.expunge`."""
        deleted, cancelled, left = 0, 0, []
        reader, writer = self._sqlite.reader, self._sqlite.writer
        for at in range(0, len(event_ids), EXPUNGE_EVENTS):
            some = event_ids[at : at + EXPUNGE_EVENTS]
            pending = await reader.execute_fetchall(PENDING_SQL.format(marks=marks(some)), some)
            if ids := [id_ for (id_,) in pending]:
                cancelled += (await self._deliveries.cancel(ids)).ended
            costs = await reader.execute_fetchall(COST_SQL.format(marks=marks(some)), some)
            candidates = [Candidate(id_, cost, _DEAD_KEEP_NOTHING) for id_, cost in costs]
            for portion in deletions(candidates):
                deleted += await paced(writer, partial(delete_events, portion))
            remaining = f"SELECT id FROM events WHERE id IN ({marks(some)})"  # noqa: S608 - marks only
            left += [id_ for (id_,) in await reader.execute_fetchall(remaining, some)]
        return Expunged(events=deleted, cancelled=cancelled, left=tuple(left))
