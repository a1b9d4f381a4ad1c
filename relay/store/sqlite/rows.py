"""Reads events from SQLite by row id."""

from collections.abc import Sequence
from typing import Any

import aiosqlite

from relay.model import StoredEvent
from relay.store.rows import EVENT_COLUMNS, event_of


def marks(values: Sequence[Any]) -> str:
    """Return a placeholder for each value of `IN (…)`."""
    return ", ".join("?" * len(values))


async def load_events(reader: aiosqlite.Connection, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
    """Read events with their bodies by row id; deleted events are missing from the result."""
    sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE id IN ({marks(event_ids)})"  # noqa: S608 - constants
    events = map(event_of, await reader.execute_fetchall(sql, event_ids))
    return {event.id: event for event in events}
