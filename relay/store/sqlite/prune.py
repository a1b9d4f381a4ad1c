"""Retention over SQLite, see `relay.store.pruning`: its statements, and free pages returned to the disk."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import aiosqlite

from relay.base.clock import Clock
from relay.errors import StorageUnavailableError
from relay.store.pruning import COST, PAGE, Candidate, Group, Retention, deletions, paced
from relay.store.sqlite.database import Database
from relay.store.sqlite.disk import Disk
from relay.store.sqlite.event_times import FORGET_SQL
from relay.store.sqlite.mark import GIVEN_SQL
from relay.store.sqlite.queries import EVENT_PATHS, SqliteReader
from relay.store.sqlite.transaction import Transaction, WriterConnection
from relay.store.sqlite.writer import SqliteWriter

SCARCE_COST = 100
"""`COST` on a full disk, because deleted pages are first written to the log."""

VACUUM_PAGES = 64  # pages that one transaction returns to the disk
VACUUM_STEPS = 100  # of these transactions in one pass
SPARE = 10  # one tenth of the file may stay free

PAGE_SQL = """
    SELECT e.id, e.source, e.type, e.received_at,
           1 + e.size / 4096 + count(d.id) + 2 * coalesce(sum(d.attempts), 0),
           max(CASE d.state WHEN 'pending' THEN 9223372036854775807 WHEN 'dead' THEN d.finished_at END)
      FROM ({candidates}) AS c JOIN events AS e ON e.id = c.id LEFT JOIN deliveries AS d ON d.event_id = c.id
     GROUP BY c.id ORDER BY c.id
"""
LAST_SQL = """
    SELECT coalesce((SELECT id - 1 FROM events WHERE received_at > ? ORDER BY received_at LIMIT 1),
                    (SELECT max(id) FROM events), 0)
"""
DELETABLE_SQL = """
    WITH candidate (id, dead) AS (VALUES {values})
    SELECT candidate.id FROM candidate JOIN events AS e ON e.id = candidate.id
     WHERE NOT EXISTS (SELECT 1 FROM deliveries AS d
                        WHERE d.event_id = candidate.id
                          AND (d.state = 'pending' OR (d.state = 'dead' AND d.finished_at > candidate.dead)))
"""
DELETE_SQL = (
    """
    WITH deletable (id) AS (VALUES {values})
    DELETE FROM deliveries WHERE event_id IN (SELECT id FROM deletable)
    """,
    "WITH deletable (id) AS (VALUES {values}) DELETE FROM events WHERE id IN (SELECT id FROM deletable)",
)
ROWS_SQL = {
    "attempts": (
        """
        DELETE FROM attempts WHERE id IN (
               SELECT id FROM attempts WHERE started_at < ? ORDER BY started_at LIMIT ?)
        """,
        COST // 5,  # a stored response takes up to four pages
    ),
    "keys": (
        """
        DELETE FROM dedupe WHERE (source, key, identity) IN (
               SELECT source, key, identity FROM dedupe WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)
        """,
        COST,
    ),
    "stats": (
        """
        DELETE FROM stats WHERE (hour, source, type) IN (
               SELECT hour, source, type FROM stats WHERE hour < ? ORDER BY hour LIMIT ?)
        """,
        COST,
    ),
}


async def delete_events(candidates: Sequence[Candidate], connection: WriterConnection) -> int:
    """Delete, in one transaction, those events that may still be deleted; returns their number.

    Their deliveries and attempts are deleted as well.
    """
    transaction = Transaction(connection)
    transaction.run(GIVEN_SQL)
    deletable = await transaction.fetch_rows(
        DELETABLE_SQL, [(candidate.id, candidate.dead) for candidate in candidates]
    )
    for sql in DELETE_SQL:
        transaction.run_rows(sql, deletable)
    await transaction.commit()
    return len(deletable)


class SqliteRetention(Retention[WriterConnection]):
    """Deletes finished data of an SQLite file."""

    def __init__(self, database: Database, clock: Clock, disk: Disk) -> None:
        super().__init__(SqliteReader(database), clock)
        self._database = database
        self._disk = disk

    @property
    def _writer(self) -> SqliteWriter:
        return self._database.writer

    async def _last(self, _group: Group, moment: int) -> int:
        [(last,)] = await self._database.reader.execute_fetchall(LAST_SQL, (moment,))
        return int(last)

    async def _page(self, group: Group, end: int, start: int) -> Sequence[tuple[Any, ...]]:
        sql = PAGE_SQL.format(candidates=EVENT_PATHS[group.kind].sql(newest_first=False))
        name = (group.name,) if group.name else ()
        rows = await self._database.reader.execute_fetchall(sql, (*name, end, start, PAGE))
        return list(map(tuple, rows))

    async def _delete_events(self, candidates: Sequence[Candidate], connection: WriterConnection) -> int:
        return await delete_events(candidates, connection)

    async def _delete_rows(
        self, name: str, before: int, connection: aiosqlite.Connection
    ) -> tuple[int, bool]:
        sql, limit = ROWS_SQL[name]
        async with connection.execute(sql, (before, limit)) as cursor:
            return cursor.rowcount, cursor.rowcount == limit

    async def _end(self, deleted: Counter[str], deadline: float) -> int:
        if deleted["events"]:
            await paced(self._database.writer, _forget_times)
        return await self._return_pages(deadline)

    async def _delete(self, candidates: Sequence[Candidate]) -> int:
        """Delete events; on a full disk in small transactions, the cheapest first."""
        deleted = 0
        scarce = bool(candidates) and self._disk.scarce
        if scarce:
            candidates = sorted(candidates, key=lambda candidate: candidate.cost)
        for some in deletions(candidates, SCARCE_COST if scarce else COST):
            try:
                deleted += await paced(self._database.writer, partial(delete_events, some))
            except StorageUnavailableError:
                if not scarce or self._database.writer.failure is not None:
                    raise
                self._round = 0  # the next pass deletes the large ones, in the space freed by the others
        return deleted

    async def _return_pages(self, deadline: float) -> int:
        """Return a portion of the free pages to the disk; returns their number.

        On a full disk all pages are returned, because senders are refused until there is room.
        """
        freed, steps, scarce = 0, 0, self._disk.scarce
        while steps < VACUUM_STEPS or (scarce and asyncio.get_running_loop().time() < deadline):
            steps += 1
            [(free, pages)] = await self._database.reader.execute_fetchall(
                "SELECT freelist_count, page_count FROM pragma_freelist_count, pragma_page_count"
            )
            if free <= (0 if scarce else max(pages // SPARE, VACUUM_PAGES)):
                break
            freed += await paced(self._database.writer, vacuum_some)
        return freed


async def _forget_times(connection: aiosqlite.Connection) -> None:
    """Delete the rows of `event_times` whose events are deleted; at most one per 1,024 deleted events."""
    await connection.execute(FORGET_SQL)


async def vacuum_some(connection: aiosqlite.Connection) -> int:
    """Move the last pages of the file into free pages and shorten the file; returns the pages removed."""
    [(before,)] = await connection.execute_fetchall("PRAGMA freelist_count")
    # The pragma takes one step per page, without columns. Only `executescript` runs all steps.
    await connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
    [(after,)] = await connection.execute_fetchall("PRAGMA freelist_count")
    return int(before) - int(after)
