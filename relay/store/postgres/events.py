"""Loads and deletes events in PostgreSQL."""

from collections.abc import Sequence

from relay.model import Expunged, StoredEvent
from relay.store import Queries
from relay.store.deliveries import StoredDeliveries
from relay.store.events import StoredEvents
from relay.store.postgres.connection import Connection, Database
from relay.store.postgres.queries import LOAD_SQL
from relay.store.postgres.rows import stored_event
from relay.store.workers import StoredWorkers

EXPUNGE_EVENTS = 500
"""Events whose deliveries one transaction cancels and deletes."""

PENDING_SQL = "SELECT id FROM owed WHERE event_id = ANY($1::bigint[])"

LOCK_SQL = "SELECT id FROM events WHERE id = ANY($1::bigint[]) ORDER BY id FOR UPDATE"
"""Waits for replays on other nodes. Only the next statement sees their deliveries."""

# An event with a pending delivery stays: an attempt is under way.
DELETE_SQL = """
    WITH chosen AS (
         SELECT e.id FROM events AS e
          WHERE e.id = ANY($1::bigint[])
            AND NOT EXISTS (SELECT 1 FROM owed AS o WHERE o.event_id = e.id)),
    old AS (SELECT d.id FROM deliveries AS d JOIN chosen AS c ON c.id = d.event_id),
    a AS (DELETE FROM attempts AS t USING old WHERE t.delivery_id = old.id),
    e AS (DELETE FROM ends AS t USING old WHERE t.delivery_id = old.id),
    d AS (DELETE FROM deliveries AS t USING old WHERE t.id = old.id),
    r AS (DELETE FROM repetitions AS t USING chosen WHERE t.event_id = chosen.id)
    DELETE FROM events AS t USING chosen WHERE t.id = chosen.id
    RETURNING t.id
"""


async def delete_events(connection: Connection, ids: Sequence[int]) -> list[int]:
    """Delete events without pending deliveries, with everything that belongs to them; returns their ids."""
    async with connection.transaction():
        await connection.execute(LOCK_SQL, ids)
        return [id_ for (id_,) in await connection.fetch(DELETE_SQL, ids)]


def _load(ids: Sequence[int]) -> tuple[str, list[int], int, int]:
    """Return the statement that reads events, and its values."""
    return LOAD_SQL, list(ids), min(ids), max(ids)


class PostgresEvents(StoredEvents):
    """`relay.store.Events` over PostgreSQL."""

    def __init__(
        self,
        database: Database,
        *,
        deliveries: StoredDeliveries,
        queries: Queries,
        workers: StoredWorkers,
    ) -> None:
        super().__init__(database, queries=queries, workers=workers)
        self._postgres = database
        self._deliveries = deliveries

    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """See `Events.load`."""
        if not event_ids:
            return {}
        rows = await self._postgres.fetch(*_load(event_ids))
        found = {event.id: event for event in map(stored_event, rows)}
        if missing := [id_ for id_ in event_ids if id_ not in found]:
            # A reader may use a server that lags behind, such as a former primary. So ask the writer's server
            # as well: a delivery whose event does not exist is dead.
            rows = await self._postgres.writer.call(lambda connection: connection.fetch(*_load(missing)))
            found |= {event.id: event for event in map(stored_event, rows)}
        return found

    async def expunge(self, event_ids: Sequence[int]) -> Expunged:
        """See `Events.expunge`."""
        deleted, cancelled, left = 0, 0, []
        for at in range(0, len(event_ids), EXPUNGE_EVENTS):
            some = list(event_ids[at : at + EXPUNGE_EVENTS])
            pending = await self._postgres.fetch(PENDING_SQL, some)
            if ids := [id_ for (id_,) in pending]:
                cancelled += (await self._deliveries.cancel(ids)).ended

            async def delete(connection: Connection, ids: Sequence[int] = tuple(some)) -> list[int]:
                return await delete_events(connection, ids)

            deleted += len(await self._postgres.writer.call(delete))
            rest = await self._postgres.fetch("SELECT id FROM events WHERE id = ANY($1::bigint[])", some)
            left += [id_ for (id_,) in rest]
        return Expunged(events=deleted, cancelled=cancelled, left=tuple(left))
