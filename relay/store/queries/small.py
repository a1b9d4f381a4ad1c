"""Lists that need one statement: what is kept of workers."""

from collections.abc import Mapping
from typing import Any

import aiosqlite
import msgspec

from relay.store.queries.page import Page, Place


class Small(msgspec.Struct, frozen=True):
    """One such list."""

    sql: str
    key: str  # what it is ordered by, the latest first
    filters: Mapping[str, str]  # by name: the column that must be equal


SMALL: Mapping[str, Small] = {
    "worker_metrics": Small(
        """
        SELECT e.at AS row, e.source, e.worker_id, e.at, e.status, e.cpu, e.memory, e.uptime,
               e.message_count, e.sessions
          FROM worker_metrics AS e
        """,
        "e.at",
        {"source": "e.source", "worker_id": "e.worker_id"},
    ),
    "worker_commands": Small(
        """
        SELECT e.created_at AS row, e.public_id AS id, e.source, e.worker_id, e.state, e.created_at,
               e.sent_at, e.expires_at, e.body
          FROM worker_commands AS e
        """,
        "e.created_at",
        {"id": "e.public_id", "source": "e.source", "worker_id": "e.worker_id", "state": "e.state"},
    ),
}


async def small(
    reader: aiosqlite.Connection, kind: str, *, limit: int, before: Place | None, filters: Mapping[str, Any]
) -> Page:
    """Return a page of such a list."""
    known = SMALL[kind]
    conditions = [f"{known.filters[name]} = ?" for name in filters]
    values = list(filters.values())
    if before is not None:
        conditions.append(f"{known.key} < ?")
        values.append(before.key)
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    sql = f"{known.sql} {where} ORDER BY {known.key} DESC LIMIT ?"
    rows = await records(reader, sql, (*values, limit))
    return Page(rows, str(Place(rows[-1]["row"])) if len(rows) == limit else None)


async def records(reader: aiosqlite.Connection, sql: str, values: Any) -> list[dict[str, Any]]:
    """Run a statement and return its rows by the names of their columns."""
    async with reader.execute(sql, values) as cursor:
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]
