"""Reads of the store: lists, selections, exports."""

from relay.model import DestinationState
from relay.store.database import Database
from relay.store.dump import Exporting
from relay.store.queries.lists import Listing
from relay.store.stats import Tallying


class SqliteQueries(Exporting, Listing, Tallying):
    """`relay.store.Queries` over SQLite."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def destination_states(self) -> dict[str, DestinationState]:
        """See `Queries.destination_states`."""
        rows = await self._reader.execute_fetchall(
            "SELECT name, paused, failing_since, disabled_at, disabled_reason FROM destinations"
        )
        return {
            name: DestinationState(
                name=name,
                paused=bool(paused),
                failing_since=failing_since,
                disabled_at=disabled_at,
                disabled_reason=disabled_reason,
            )
            for name, paused, failing_since, disabled_at, disabled_reason in rows
        }

    async def paused_sources(self) -> frozenset[str]:
        """See `Queries.paused_sources`."""
        rows = await self._reader.execute_fetchall("SELECT name FROM sources WHERE paused")
        return frozenset(name for (name,) in rows)
