"""Refused requests over SQLite."""

from collections.abc import Sequence
from typing import Any

import aiosqlite

from relay.model import RefusedRequest
from relay.store.refused import MOST_NAMED, head_of, position_of, range_of, request_of, size_of, the_one
from relay.store.sqlite.database import Database

PRUNE_AT_ONCE = 200
"""Requests that one transaction deletes."""

ADD_SQL = """
    INSERT INTO refused (public_id, at, source, reason, size, head, body) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
PAGE_SQL = """
    SELECT id, head, retried_at, event_id FROM refused WHERE id < ? {conditions} ORDER BY id DESC LIMIT ?
"""
NAMED_SQL = """
    SELECT head, body, retried_at, event_id FROM refused
     WHERE public_id >= ? AND public_id < ? ORDER BY public_id LIMIT ?
"""
OLD_SQL = """
    DELETE FROM refused WHERE id IN (SELECT id FROM refused WHERE id <= ? ORDER BY id LIMIT ?)
"""
LAST_OLD_SQL = "SELECT max(id) FROM refused WHERE at < ?"
LAST_BEYOND_SQL = """
    SELECT max(id) FROM (
        SELECT id, sum(size) OVER (ORDER BY id DESC) AS total FROM refused) WHERE total > ?
"""


class SqliteRefused:
    """`relay.store.Refused` over SQLite."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, requests: Sequence[RefusedRequest]) -> None:
        """See `Refused.add`."""
        rows = []
        for each in requests:
            head = head_of(each)
            rows.append((each.id, each.at, each.source, each.reason, size_of(each, head), head, each.body))

        async def insert(connection: aiosqlite.Connection) -> None:
            await connection.execute("BEGIN IMMEDIATE")
            await connection.executemany(ADD_SQL, rows)
            await connection.execute("COMMIT")

        await self._database.writer.call(insert)

    async def page(
        self,
        *,
        limit: int,
        cursor: str | None = None,
        source: str | None = None,
        reason: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> tuple[tuple[RefusedRequest, ...], str | None]:
        """See `Refused.page`."""
        filters = {"source = ?": source, "reason = ?": reason, "at >= ?": since, "at < ?": until}
        given = {text: value for text, value in filters.items() if value is not None}
        sql = PAGE_SQL.format(conditions="".join(f"AND {text} " for text in given))
        values: list[Any] = [position_of(cursor), *given.values(), limit]
        rows = list(await self._database.reader.execute_fetchall(sql, values))
        found = tuple(request_of(head, None, at, event_id) for _, head, at, event_id in rows)
        return found, str(rows[-1][0]) if len(rows) == limit else None

    async def named(self, given: str) -> RefusedRequest:
        """See `Refused.named`."""
        rows = list(await self._database.reader.execute_fetchall(NAMED_SQL, (*range_of(given), MOST_NAMED)))
        return request_of(*the_one(given, rows))

    async def note_retry(self, id_: str, at: int) -> None:
        """See `Refused.note_retry`."""

        async def note(connection: aiosqlite.Connection) -> None:
            sql = "UPDATE refused SET retried_at = ? WHERE public_id = ? AND event_id IS NULL"
            await connection.execute(sql, (at, id_))

        await self._database.writer.call(note)

    async def prune(self, before: int, most_bytes: int) -> int:
        """See `Refused.prune`."""
        reader, last = self._database.reader, 0
        for sql, value in ((LAST_OLD_SQL, before), (LAST_BEYOND_SQL, most_bytes)):
            [(found,)] = await reader.execute_fetchall(sql, (value,))
            last = max(last, found or 0)

        async def delete(connection: aiosqlite.Connection) -> int:
            return (await connection.execute(OLD_SQL, (last, PRUNE_AT_ONCE))).rowcount

        deleted = 0
        while last and (some := await self._database.writer.call(delete)):
            deleted += some
        return deleted
